//! The points at which a test can hold or kill an agent: `agent.<order>.before` and
//! `agent.<order>.after`. The one before is passed before the order is looked at, the one after
//! when everything is done and only the answer is missing.

use bellwether_agent_core::Order;
use bellwether_failpoint::hold;

macro_rules! points {
    ($function:ident, $side:literal) => {
        pub async fn $function(order: &Order) {
            let name = match order {
                Order::Prepare { .. } => concat!("agent.prepare.", $side),
                Order::TakeOver => concat!("agent.take-over.", $side),
                Order::LoadState { .. } => concat!("agent.load-state.", $side),
                Order::Activate { .. } => concat!("agent.activate.", $side),
                Order::PreCopy => concat!("agent.pre-copy.", $side),
                Order::EndPreCopy => concat!("agent.end-pre-copy.", $side),
                Order::LoadAhead => concat!("agent.load-ahead.", $side),
                Order::Seal => concat!("agent.seal.", $side),
                Order::ClaimBack { .. } => concat!("agent.claim-back.", $side),
                Order::Release => concat!("agent.release.", $side),
                Order::HandOver => concat!("agent.hand-over.", $side),
                Order::Pause => concat!("agent.pause.", $side),
                Order::Resume => concat!("agent.resume.", $side),
                Order::Shutdown => concat!("agent.shutdown.", $side),
                Order::RemoveState => concat!("agent.remove-state.", $side),
                Order::Console => concat!("agent.console.", $side),
            };
            hold(name).await;
        }
    };
}

points!(before, "before");
points!(after, "after");
