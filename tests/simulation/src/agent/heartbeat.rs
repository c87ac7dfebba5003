//! The node's heartbeat on the storage, and what it does when it alone hears no controller: the same
//! steps as `node-agent/src/heartbeat.rs`, with the same verdict.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use bellwether_agent_core::{Isolation, Order as What, Stamped, Verdict};
use bellwether_types::{Epoch, VmId, VmState};

use super::{Agent, This};
use crate::kernel::{MS, Nanos, SECOND};
use crate::net::Address;
use crate::sync::within;
use crate::wire::{CallError, Details, Order, Request};

/// Between two heartbeats.
const PERIOD: Nanos = SECOND;
/// Storage that takes longer for a heartbeat counts as silent.
const STORAGE_MAX: Nanos = 5 * SECOND;
/// The pause before a hand-over that failed is tried again.
const AGAIN: Nanos = 10 * SECOND;
/// In the product an order of the node's own has no deadline.
const ANSWER_MAX: Nanos = 3_600 * SECOND;

/// Writes heartbeats for as long as the agent runs, and hands VMs over when it has to.
pub async fn run(agent: This) {
    let after_ns = agent.world.cluster.handover_after_ms * MS;
    let mut watch = Watch { agent, isolation: Isolation::default(), verdict: Verdict::InTouch };
    let shift = Rc::new(Shift::default());
    loop {
        watch.agent.world.sleep(watch.agent.host(), PERIOD).await;
        // Before the first registration there is nothing to be cut off from.
        if !watch.agent.desk.borrow().knows_storage {
            continue;
        }
        match watch.look().await {
            Verdict::CutOff { for_ns } if after_ns > 0 && for_ns >= after_ns => {
                watch.hand_over(&shift);
            }
            _ => {}
        }
    }
}

/// What was handed over since this agent began, and whether somebody is at it.
#[derive(Default)]
struct Shift {
    is_busy: Cell<bool>,
    done: RefCell<BTreeSet<(VmId, Epoch)>>,
}

struct Watch {
    agent: This,
    isolation: Isolation,
    verdict: Verdict,
}

impl Watch {
    async fn look(&mut self) -> Verdict {
        let agent = &self.agent;
        let (node, pulse) = (agent.node, agent.desk.borrow().pulse);
        let exchange = agent.world.storage.exchange_heartbeats(agent.host(), node, pulse);
        let seen = within(&agent.world.kernel, agent.host(), STORAGE_MAX, exchange).await;
        let pulse = seen.map_or(Err(()), |seen| seen.map_err(|_| ()));
        let (contact, lease_ms) = {
            let desk = agent.desk.borrow();
            (desk.last_contact, desk.lease_ms)
        };
        let verdict = self.isolation.look(agent.stamp(), contact, lease_ms * MS, pulse);
        let old = std::mem::replace(&mut self.verdict, verdict);
        if std::mem::discriminant(&old) != std::mem::discriminant(&verdict) {
            agent.world.hit("isolation", word(verdict));
        }
        verdict
    }

    fn hand_over(&self, shift: &Rc<Shift>) {
        if shift.is_busy.replace(true) {
            return;
        }
        self.agent.check_verdict();
        let (agent, shift) = (Rc::clone(&self.agent), Rc::clone(shift));
        self.agent.world.kernel.spawn(self.agent.process, async move {
            if !hand_over_all(&agent, &shift.done).await {
                agent.world.sleep(agent.host(), AGAIN).await;
            }
            shift.is_busy.set(false);
        });
    }
}

const fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::InTouch => "in-touch",
        Verdict::Blind => "blind",
        Verdict::NoQuorum => "no-quorum",
        Verdict::CutOff { .. } => "cut-off",
    }
}

/// Hands over every VM that runs here or stands sealed; false if one is left.
async fn hand_over_all(agent: &This, done: &RefCell<BTreeSet<(VmId, Epoch)>>) -> bool {
    let mut is_done = true;
    let seen: Vec<_> =
        agent.board.borrow().iter().map(|(vm, it)| (*vm, it.epoch, it.state)).collect();
    for (vm, epoch, state) in seen {
        // Whoever is in touch again needs no hand-over.
        if agent.is_in_touch() {
            return true;
        }
        let is_due = matches!(state, VmState::Running | VmState::Saved);
        if !is_due || done.borrow().contains(&(vm, epoch)) {
            continue;
        }
        let name = agent.world.committed(|state| state.vm_name(vm));
        let node = agent.node;
        agent.world.say("agent", format!("n{node} is cut off and hands VM {name} over"));
        match agent.hand_over(vm, epoch).await {
            Ok(()) => {
                agent.world.hit("agent", "handed over");
                agent.world.say("agent", format!("n{node} has handed VM {name} over"));
                done.borrow_mut().insert((vm, epoch));
            }
            Err(_) => {
                agent.world.hit("agent", "hand-over failed");
                is_done = false;
            }
        }
    }
    is_done
}

impl Agent {
    fn is_in_touch(&self) -> bool {
        let (contact, lease_ms) = {
            let desk = self.desk.borrow();
            (desk.last_contact, desk.lease_ms)
        };
        contact.is_some_and(|at| self.stamp().since(&at) < lease_ms * MS)
    }

    async fn hand_over(&self, vm: VmId, epoch: Epoch) -> Result<(), CallError> {
        for (what, details) in [(What::Seal, Details::Seal), (What::HandOver, Details::Plain)] {
            let term = self.terms.borrow().highest();
            let stamped = Stamped { term, task: 0, epoch, boot: self.boot, order: what };
            let request = Request::Order(Box::new(Order { vm, stamped, details }));
            let net = self.world.net.clone();
            net.call(self.host(), Address::Agent(self.node), request, ANSWER_MAX).await?;
        }
        Ok(())
    }

    /// A hand-over needs a sign of a quorum that is younger than the node's own silence.
    fn check_verdict(&self) {
        let contact = self.desk.borrow().heard_at;
        let rose = self.world.storage.server(|server| server.pulse_rose.get(&self.node).copied());
        self.world.oracle.borrow_mut().verdict(self.node, contact, rose);
    }
}
