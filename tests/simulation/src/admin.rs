//! The administrator: asks any controller, waits for the answer, and remembers what it was told.

use std::collections::BTreeSet;

use bellwether_core::command::Change;
use bellwether_core::state::Member;
use bellwether_core::{Outcome, Place, TaskKind};
use bellwether_types::{ClusterId, DiskFormat, DiskSpec, MemberRole, NodeId, Ports, VmId, VmSpec};

use crate::kernel::{HostId, MS, Nanos, SECOND};
use crate::net::Address;
use crate::scenario::{Request, VmSetup};
use crate::wire::{Api, ApiCall, ApiReply, CallError, Code, Response, disk_path};
use crate::world::Shared;

/// The administrator's own machine, which nothing happens to.
pub const HOST: HostId = HostId(0);
const ANSWER_MAX: Nanos = 40 * SECOND;
/// How often a request that was not begun is tried at another controller.
const TRIES: u32 = 4;

/// What an administrator was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    Done(Outcome),
    Refused(String),
    /// It may have been carried out.
    Unknown,
}

/// Asks until some controller has begun it.
pub async fn ask(world: &Shared, call: ApiCall) -> Told {
    for _ in 0..TRIES {
        let controller = world.chance.borrow_mut().within(1, world.cluster.controllers);
        let request = crate::wire::Request::Api(Api { forwarded: false, call: call.clone() });
        let to = Address::Controller(controller);
        let answer = world.net.clone().call(HOST, to, request, ANSWER_MAX).await;
        match answer {
            Ok(Response::Api(ApiReply::Done { outcome, index })) => {
                world.told(index, &outcome);
                return match outcome {
                    Outcome::Rejected(rejection) => Told::Refused(rejection.text),
                    outcome => Told::Done(outcome),
                };
            }
            // The controller says that nothing was done.
            Err(CallError::Status(status)) if status.code == Code::Unavailable => {
                world.sleep(HOST, 500 * MS).await;
            }
            Err(CallError::Status(status)) if status.code != Code::Unknown => {
                return Told::Refused(status.message);
            }
            _ => return Told::Unknown,
        }
    }
    Told::Unknown
}

/// Makes the cluster: its first member, its nodes, its VMs.
pub async fn found(world: &Shared) {
    let id = ClusterId::from_uuid(world.chance.borrow_mut().uuid());
    let first =
        Member { id: 1, name: "n1".into(), address: "127.0.0.1".into(), ports: Ports::default() };
    insist(world, Change::InitCluster { id, name: "sim".into(), storage: "/s".into(), first })
        .await;
    for node in 1..=world.cluster.nodes {
        let hash = [u8::try_from(node).unwrap_or(0); 32];
        let role = MemberRole::Agent;
        insist(world, Change::CreateToken { hash, role, expires_at: u64::MAX }).await;
        let (name, address) = (format!("n{node}"), "127.0.0.1".to_owned());
        let ports = Ports::default();
        insist(world, Change::RedeemToken { hash, role, name, address, ports }).await;
    }
    for setup in &world.cluster.vms {
        create(world, setup).await;
    }
}

async fn insist(world: &Shared, change: Change) {
    while !matches!(
        ask(world, ApiCall::Change(change.clone())).await,
        Told::Done(_) | Told::Refused(_)
    ) {
        world.sleep(HOST, 300 * MS).await;
    }
}

async fn create(world: &Shared, setup: &VmSetup) -> Told {
    let id = VmId::from_uuid(world.chance.borrow_mut().uuid());
    if setup.lease_arbiter {
        world.leased.borrow_mut().insert(id);
    }
    let spec = VmSpec {
        name: setup.name.clone(),
        vcpus: 1,
        memory_mib: setup.memory_mib,
        kernel: "/s/kernel".into(),
        initrd: None,
        nics: vec![],
        cmdline: String::new(),
        disks: vec![DiskSpec {
            path: format!("/s/{}", disk_path(id)).into(),
            read_only: false,
            format: DiskFormat::Raw,
        }],
        possible_owners: setup
            .possible_owners
            .iter()
            .map(|node| NodeId(*node))
            .collect::<BTreeSet<_>>(),
        priority: setup.priority,
        restart: setup.restart,
    };
    let created =
        ask(world, ApiCall::Change(Change::DefineVm { id, spec, rules: Default::default() })).await;
    if setup.start && matches!(created, Told::Done(_)) {
        return ask(world, ApiCall::Begin { vm: id, kind: TaskKind::Start, node: None }).await;
    }
    created
}

/// Carries out one request of the scenario.
pub async fn request(world: Shared, request: Request) {
    world.say("admin", request.to_string());
    let told = match call(&world, &request) {
        Some(call) => ask(&world, call).await,
        None => match &request {
            Request::Create { vm } => create(&world, vm).await,
            _ => Told::Refused("there is no such VM".into()),
        },
    };
    let (word, text) = match &told {
        Told::Done(outcome) => ("done", format!("{outcome}")),
        Told::Refused(text) => ("refused", text.clone()),
        Told::Unknown => ("unknown", "nobody knows".into()),
    };
    world.hit("admin", word);
    world.say("admin", format!("{request}: {word} ({text})"));
}

fn call(world: &Shared, request: &Request) -> Option<ApiCall> {
    let begin = |name: &str, kind, node: Option<u64>| {
        let vm = world.find_vm(name)?;
        Some(ApiCall::Begin { vm, kind, node: node.map(NodeId) })
    };
    let paused = |name: &str, paused| Some(ApiCall::SetPaused { vm: world.find_vm(name)?, paused });
    let cordon =
        |node, cordoned| Some(ApiCall::Change(Change::Cordon { node: NodeId(node), cordoned }));
    match request {
        Request::Create { .. } => None,
        Request::Start { vm, node } => begin(vm, TaskKind::Start, *node),
        Request::Stop { vm } => begin(vm, TaskKind::Stop, None),
        Request::Shutdown { vm } => begin(vm, TaskKind::Shutdown, None),
        Request::Migrate { vm, node } => begin(vm, TaskKind::Migrate, *node),
        Request::Save { vm } => begin(vm, TaskKind::Save, None),
        Request::Restore { vm } => begin(vm, TaskKind::Restore, None),
        Request::Delete { vm } => begin(vm, TaskKind::Delete, None),
        Request::Pause { vm } => paused(vm, true),
        Request::Resume { vm } => paused(vm, false),
        Request::Drain { node } => cordon(*node, true),
        Request::Undrain { node } => cordon(*node, false),
        Request::ConfirmDown { node } => {
            let who = "admin".to_owned();
            Some(ApiCall::Change(Change::ConfirmDown { node: NodeId(*node), who }))
        }
    }
}

/// Starts VMs anew, one after the other: stopped and started, or restored.
pub async fn start_anew(world: Shared, vms: Vec<VmId>) {
    for vm in vms {
        let place = world.committed(|state| state.vms.get(&vm).map(|vm| vm.place.clone()));
        match place {
            Some(Place::Runner(_)) => {
                until_done(&world, vm, TaskKind::Stop).await;
                until_done(&world, vm, TaskKind::Start).await;
            }
            Some(Place::Sealed { .. }) => until_done(&world, vm, TaskKind::Restore).await,
            Some(_) => until_done(&world, vm, TaskKind::Start).await,
            None => {}
        }
    }
}

/// Asks for a task until it has begun, and waits for its end.
async fn until_done(world: &Shared, vm: VmId, kind: TaskKind) {
    while !matches!(ask(world, ApiCall::Begin { vm, kind, node: None }).await, Told::Done(_)) {
        world.sleep(HOST, 500 * MS).await;
    }
    while world.committed(|state| state.vms.get(&vm).is_some_and(|vm| vm.task.is_some())) {
        world.sleep(HOST, 100 * MS).await;
    }
}
