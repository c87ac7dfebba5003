//! The administrator: asks any controller, waits for the answer, and remembers what it was told.

use bellwether_core::command::Change;
use bellwether_core::state::{Member, Node};
use bellwether_core::{Outcome, Place, TaskKind, Vm};
use bellwether_types::{
    Arbiter, ClusterId, ClusterPatch, DiskFormat, DiskSpec, MemberRole, NodeId, Ports,
    RestartPolicy, VmId, VmRules, VmSpec,
};

use crate::kernel::{HostId, MS, Nanos, SECOND};
use crate::net::Address;
use crate::scenario::{Request, VmSetup};
use crate::wire::{Api, ApiCall, ApiReply, CallError, Code, Response, disk_path};
use crate::world::Shared;

/// The administrator's own machine, which nothing happens to.
pub const HOST: HostId = HostId(0);
const ANSWER_MAX: Nanos = 40 * SECOND;
/// How often a request that was not begun is tried at another controller.
const TRIES: u32 = 8;
/// How long it takes to find that nobody listens.
const CONNECT_MAX: Nanos = SECOND;

/// What an administrator was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    Done(Outcome),
    Refused(String),
    /// It may have been carried out.
    Unknown,
}

/// Asks until some controller has begun it. Each try is an operation of its own.
pub async fn ask(world: &Shared, call: ApiCall) -> Told {
    for _ in 0..TRIES {
        let controller = world.chance.borrow_mut().within(1, world.cluster.controllers);
        let operation = world.oracle.borrow_mut().order.called();
        let api = Api { forwarded: false, operation: Some(operation), call: call.clone() };
        let request = crate::wire::Request::Api(Box::new(api));
        let to = Address::Controller(controller);
        if !world.net.hears(HOST, to) {
            // No connection is made, so nothing is asked.
            let checked = world.oracle.borrow_mut().order.undone(operation);
            world.oracle.borrow_mut().in_order(checked);
            world.sleep(HOST, CONNECT_MAX).await;
            continue;
        }
        let answer = world.net.clone().call(HOST, to, request, ANSWER_MAX).await;
        match answer {
            Ok(Response::Api(ApiReply::Done { outcome, index })) => {
                acknowledged(world, &call, operation, index, &outcome);
                return match outcome {
                    Outcome::Rejected(rejection) => Told::Refused(rejection.text),
                    outcome => Told::Done(outcome),
                };
            }
            Ok(Response::Api(ApiReply::Shown { vm, index })) => {
                shown(world, &call, operation, index, vm.as_deref());
                return Told::Done(Outcome::Unchanged);
            }
            // The controller says that nothing was done.
            Err(CallError::Status(status)) if status.code == Code::Unavailable => {
                let checked = world.oracle.borrow_mut().order.undone(operation);
                world.oracle.borrow_mut().in_order(checked);
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

fn acknowledged(world: &Shared, call: &ApiCall, operation: u64, index: u64, outcome: &Outcome) {
    world.told(index, outcome);
    // A pause is an intent and an order; only the intent stands in the log, under no operation.
    if !matches!(call, ApiCall::SetPaused { .. }) {
        let mut oracle = world.oracle.borrow_mut();
        let checked = oracle.order.acknowledged(operation, index);
        oracle.in_order(checked);
    }
}

fn shown(world: &Shared, call: &ApiCall, operation: u64, index: u64, vm: Option<&Vm>) {
    let ApiCall::Show { vm: id } = call else { return };
    world.hit("admin", "read");
    let mut oracle = world.oracle.borrow_mut();
    let checked = oracle.order.read(operation, index, *id, vm);
    oracle.in_order(checked);
}

/// Makes the cluster: its first member, its nodes, its VMs. With `wait` one VM is started after the
/// other, and all is quiet at the end.
pub async fn found(world: &Shared, wait: bool) {
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
    let patch = world.cluster.settings;
    if patch != ClusterPatch::default() {
        insist(world, Change::SetCluster { patch }).await;
    }
    if wait {
        settle_nodes(world).await;
    }
    for setup in &world.cluster.vms {
        create(world, setup).await;
        if wait {
            let begun = |vm: &Vm| vm.task.is_none() || vm.pending.is_some();
            let id = world.find_vm(&setup.name);
            while !world.committed(|state| id.and_then(|id| state.vms.get(&id)).is_none_or(begun)) {
                world.sleep(HOST, 100 * MS).await;
            }
        }
    }
    // The agents' reports follow.
    world.sleep(HOST, 2 * SECOND).await;
    world.founded.set(true);
}

/// Waits until every node has registered.
async fn settle_nodes(world: &Shared) {
    while !world.committed(|state| state.nodes.values().all(Node::is_online)) {
        world.sleep(HOST, 100 * MS).await;
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
    let patch = setup.rules.patch(|name| world.find_vm(name));
    let spec = VmSpec {
        name: setup.name.clone(),
        vcpus: setup.vcpus,
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
        possible_owners: patch.possible_owners.clone().unwrap_or_default(),
        priority: patch.priority.unwrap_or(0),
        restart: patch.restart.unwrap_or(RestartPolicy::Restart),
    };
    let mut rules = VmRules::default();
    rules.change(patch);
    let change = match setup.lease_arbiter {
        true => Change::DefineVmUnder { id, spec, rules, arbiter: Arbiter::Lease },
        false => Change::DefineVm { id, spec, rules },
    };
    let created = ask(world, ApiCall::Change(change)).await;
    if setup.start && matches!(created, Told::Done(_)) {
        return ask(
            world,
            ApiCall::Begin { vm: id, kind: TaskKind::Start, node: setup.on.map(NodeId) },
        )
        .await;
    }
    created
}

/// Carries out one request of the scenario.
pub async fn request(world: Shared, request: Request) {
    let reads = matches!(request, Request::Show { .. });
    if !reads {
        world.say("admin", request.to_string());
    }
    let told = match call(&world, &request) {
        Some(call) => ask(&world, call).await,
        None => match &request {
            Request::Create { vm } => create(&world, vm).await,
            _ => Told::Refused("there is no such VM".into()),
        },
    };
    if reads {
        return;
    }
    let (word, answer) = match &told {
        Told::Done(Outcome::Unchanged) => ("done", Some("nothing is to be done".to_owned())),
        Told::Done(_) => ("done", None),
        Told::Refused(text) => ("refused", Some(format!("refused: {text}"))),
        Told::Unknown => ("unknown", Some("nobody knows whether that was done".to_owned())),
    };
    world.hit("admin", word);
    if let Some(answer) = answer {
        world.say("answer", format!("{request}: {answer}"));
    }
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
        Request::Show { vm } => Some(ApiCall::Show { vm: world.find_vm(vm)? }),
        Request::Pause { vm } => paused(vm, true),
        Request::Resume { vm } => paused(vm, false),
        Request::Drain { node } => cordon(*node, true),
        Request::Undrain { node } => cordon(*node, false),
        Request::ConfirmDown { node } => {
            let who = "admin".to_owned();
            Some(ApiCall::Change(Change::ConfirmDown { node: NodeId(*node), who }))
        }
        Request::Unquarantine { node } => {
            let by = "admin".to_owned();
            Some(ApiCall::Change(Change::LiftQuarantine { node: NodeId(*node), by }))
        }
        Request::SetVm { vm, rules } => {
            let patch = rules.patch(|name| world.find_vm(name));
            Some(ApiCall::Change(Change::SetVm { vm: world.find_vm(vm)?, patch }))
        }
        Request::SetCluster { patch } => {
            Some(ApiCall::Change(Change::SetCluster { patch: *patch }))
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
