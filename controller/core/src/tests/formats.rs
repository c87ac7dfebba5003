//! What earlier releases wrote is read for ever: a snapshot and the commands of format 1.

use bellwether_types::{
    BootId, ClusterId, DiskFormat, DiskSpec, MemberRole, NodeId, Ports, RestartPolicy, TaskId, VmId,
};

use crate::command::{Change, Registration};
use crate::state::VmSpecV1;
use crate::task::{Measures, StepEvent, TaskRequest};
use crate::{Command, Member, State, TaskKind};

/// The commands from which the golden files were made.
fn commands() -> Vec<Command> {
    let uuid = |n: u128| uuid::Uuid::from_u128(n);
    let vm = VmId::from_uuid(uuid(7));
    let first = Member { id: 1, name: "n1".into(), address: "a".into(), ports: Ports::default() };
    let id = ClusterId::from_uuid(uuid(1));
    let role = MemberRole::Agent;
    let node = NodeId(1);
    let request = |kind| TaskRequest { vm, kind, node: None, by: "admin".into() };
    let step = |task, step_no, event| Change::Advance { task: TaskId(task), step_no, event };
    let changes = [
        Change::InitCluster { id, name: "c".into(), storage: "/s".into(), first },
        Change::CreateToken { hash: [3; 32], role, expires_at: u64::MAX },
        Change::RedeemToken {
            hash: [3; 32],
            role,
            name: "n1".into(),
            address: "a".into(),
            ports: Ports::default(),
        },
        Change::RegisterNode(Registration {
            node,
            name: "n1".into(),
            boot_id: BootId::from_uuid(uuid(5)),
            address: "a".into(),
            agent_port: 1,
            memory_mib: 4_096,
            vcpus: 8,
            version: "0".into(),
            replaces: None,
        }),
        Change::CreateVm {
            id: vm,
            spec: VmSpecV1 {
                name: "web".into(),
                vcpus: 2,
                memory_mib: 512,
                kernel: "/k".into(),
                cmdline: "tick".into(),
                disks: vec![DiskSpec {
                    path: "/d".into(),
                    format: DiskFormat::Raw,
                    read_only: false,
                }],
                possible_owners: [node].into(),
                priority: 3,
                restart: RestartPolicy::Restart,
            },
        },
        Change::BeginTask(request(TaskKind::Start)),
        step(1, 1, StepEvent::Chosen { node }),
        step(1, 2, StepEvent::Prepared),
        step(1, 3, StepEvent::Activated { measures: Measures::from([("lock_us".into(), 9)]) }),
        Change::SetPaused { vm, paused: true },
        Change::NodeUnknown { node, boot_id: BootId::from_uuid(uuid(5)) },
        Change::BeginTask(request(TaskKind::Failover)),
    ];
    changes.into_iter().zip(1_000..).map(|(change, at)| Command { at, change }).collect()
}

fn applied(commands: &[Command]) -> State {
    let mut state = State::default();
    for command in commands {
        state.apply(command.clone());
    }
    state
}

const STATE_1: &[u8] = include_bytes!("golden/state-1.bin");
const COMMANDS_1: &[u8] = include_bytes!("golden/commands-1.bin");

#[test]
fn commands_of_format_1_are_read_and_still_mean_the_same() {
    let read: Vec<Command> = postcard::from_bytes(COMMANDS_1).unwrap();
    assert_eq!(read, commands());
    let mut state = applied(&read);
    assert_eq!(state.invariants(), Ok(()));
    // Format 1 did not count how often a node was lost.
    state.nodes.values_mut().for_each(|node| node.losses.clear());
    assert_eq!(state, postcard::from_bytes::<State>(STATE_1).unwrap());
}

#[test]
fn a_snapshot_survives_its_encoding_with_all_that_is_new() {
    let mut state: State = postcard::from_bytes(STATE_1).unwrap();
    state.settings.reserve_nodes = 2;
    for vm in state.vms.values_mut() {
        vm.rules.anti_affinity.insert("web".into(), bellwether_types::Strength::Hard);
        vm.restarts.push(7);
        vm.arbiter = bellwether_types::Arbiter::Lease;
    }
    for node in state.nodes.values_mut() {
        let boot_id = BootId::from_uuid(uuid::Uuid::from_u128(5));
        let promise = Err("no watchdog is armed".into());
        node.watchdog = Some(crate::fence::NodeWatchdog { boot_id, nonce: 3, promise });
    }
    state.index = crate::state::Index::of(&state);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::take_from_bytes::<State>(&bytes).unwrap(), (state, &[][..]));
}

#[test]
fn a_newer_format_is_refused_and_a_cut_one_too() {
    let mut bytes = STATE_1.to_vec();
    bytes[0] = 9;
    assert!(postcard::from_bytes::<State>(&bytes).is_err());
    assert!(postcard::from_bytes::<State>(&STATE_1[..STATE_1.len() - 1]).is_err());
}
