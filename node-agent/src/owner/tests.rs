//! What only happens to an owner when the kernel is slow.

use std::process::{Command as Spawn, Stdio};

use bellwether_agent_core::Order;
use bellwether_types::{Arbiter, BootId, ClusterId, Epoch, NodeId};

use super::*;
use crate::board::Board;
use crate::desk::Desk;
use crate::launch::Launcher;
use crate::process::Process;
use crate::runtime_dir::RuntimeDir;
use crate::terms::Terms;

fn node(dir: &std::path::Path) -> Arc<Node> {
    let boot_id = BootId::from_uuid(uuid::Uuid::from_u128(1));
    let runtime = Arc::new(RuntimeDir::open(dir).unwrap());
    let cluster = ClusterId::from_uuid(uuid::Uuid::from_u128(2));
    Arc::new(Node {
        id: NodeId(7),
        name: "n7".into(),
        cluster,
        boot_id,
        terms: Terms::open(Arc::clone(&runtime), cluster).unwrap(),
        runtime,
        launcher: Launcher::new("/nowhere".into()),
        desk: Desk::new(boot_id),
        fencing: crate::fencing::Fencing::new(dir),
        board: Board::default(),
        status_interval: Duration::from_secs(1),
        patience: 1,
    })
}

/// An owner whose release has had no answer in time, while its VMM's process still lives.
fn releasing(node: &Arc<Node>) -> (Owner, std::process::Child) {
    let vm = VmId::from_uuid(uuid::Uuid::from_u128(3));
    let last = LastRelease { term: 0, epoch: Epoch(0) };
    let mut owner = Owner::new(Arc::clone(node), vm, Durable::default(), watch::channel(last).1);
    let standing =
        bellwether_agent_core::Standing { lease_live: true, contact_recent: true, term: 0 };
    let arbiter = Arbiter::Storage;
    let stamped = |order| Stamped { term: 1, task: 0, epoch: Epoch(4), boot: node.boot_id, order };
    let prepare = stamped(Order::Prepare { arbiter });
    owner.machine.admit(&prepare, standing).unwrap();
    owner.machine.complete(&prepare, &Outcome::Done(Answer::Prepared { prepare_us: 1 }));
    owner.machine.admit(&stamped(Order::Activate { hash: None }), standing).unwrap();
    let release = stamped(Order::Release);
    assert_eq!(owner.machine.admit(&release, standing), Ok(Action::Release));
    owner.machine.complete(&release, &Outcome::Unknown);

    let home = node.runtime.home(vm, Epoch(4));
    let mut body = Body::create(home, vm, node.boot_id, Epoch(4), arbiter).unwrap();
    let child = Spawn::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    body.started(Process::open(child.id()).unwrap()).unwrap();
    owner.body = Some(body);
    (owner, child)
}

async fn ends(owner: &mut Owner) {
    let process = owner.body.as_ref().and_then(Body::process).unwrap();
    process.kill().unwrap();
    process.exited().await.unwrap();
    owner.exited();
    owner.publish();
}

#[tokio::test]
async fn an_exit_after_a_release_that_timed_out_completes_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let (mut owner, _child) = releasing(&node);
    owner.publish();
    assert_eq!(node.board.all().len(), 1);
    ends(&mut owner).await;
    assert!(node.board.all().is_empty(), "{:?}", node.board.all());
    let floors = node.runtime.floors().unwrap();
    assert_eq!(floors[0].1.floor, Epoch(4), "the floor is durable");
    assert_eq!(floors[0].1.released.as_ref().unwrap().reason, "killed");
    assert!(node.runtime.incarnations().unwrap().is_empty());
}

#[tokio::test]
async fn an_exit_without_a_durable_floor_is_an_end_and_no_release() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let (mut owner, _child) = releasing(&node);
    std::fs::remove_dir(dir.path().join("floors")).unwrap();
    ends(&mut owner).await;
    assert_eq!(node.board.all()[0].1.state, VmState::Failed);
    assert_eq!(node.runtime.incarnations().unwrap().len(), 1, "a later agent finds it");
}
