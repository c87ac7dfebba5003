//! The console of a VM, passed through between the administrator and the agent that runs it.

use bellwether_core::{Node, Place};
use bellwether_proto::v1;
use bellwether_types::TaskId;
use futures::{Stream, StreamExt, stream};
use std::pin::Pin;
use tonic::{Status, Streaming};

use crate::controller::Controller;
use crate::lead::orders;

type Frames = Pin<Box<dyn Stream<Item = Result<v1::ConsoleOutputFrame, Status>> + Send + 'static>>;

/// Attaches to the console of the VM that the first message names. The stream ends when the VM
/// leaves its node; attaching again finds it where it is then.
pub async fn attach(
    controller: &Controller,
    mut input: Streaming<v1::ConsoleInputFrame>,
) -> Result<Frames, Status> {
    let first = input.message().await?;
    let first = first.ok_or_else(|| Status::invalid_argument("the first message names the VM"))?;
    let (node, order) = opening_order(controller, &first.vm)?;
    let opening = v1::ConsoleUp { order: Some(order), data: first.data };
    let typed = input.filter_map(|frame| async {
        let frame: v1::ConsoleInputFrame = frame.ok()?;
        Some(v1::ConsoleUp { order: None, data: frame.data })
    });
    let up = stream::iter([opening]).chain(typed);
    let mut agent = controller.links.agent(&node).map_err(Status::unavailable)?;
    let down = agent.console(up).await?.into_inner();
    Ok(Box::pin(down.map(|frame| {
        frame.map(|frame| v1::ConsoleOutputFrame { data: frame.data, dropped: frame.dropped })
    })))
}

/// Who runs the VM, and the order for its console.
fn opening_order(controller: &Controller, vm: &str) -> Result<(Node, v1::Order), Status> {
    let state = controller.state();
    let vm =
        state.find_vm(vm).ok_or_else(|| Status::not_found(format!("there is no VM `{vm}`")))?;
    let Place::Runner(runner) = &vm.place else {
        return Err(Status::failed_precondition(format!(
            "VM {} is not running, so it has no console",
            vm.spec.name
        )));
    };
    let node = state.nodes.get(&runner.node);
    let node = node.ok_or_else(|| Status::unavailable("the VM's node is gone"))?;
    let term = controller.raft.status().term;
    let order = orders::order(term, TaskId(0), vm.id, runner.epoch, node);
    Ok((node.clone(), order.map_err(Status::unavailable)?))
}
