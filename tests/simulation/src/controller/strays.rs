//! Clears away incarnations that nobody counts on.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use bellwether_agent_core::{Order as What, Stamped};
use bellwether_core::reconcile::{Stray, strays};

use super::This;
use super::lead::Leadership;
use super::orders::send;
use crate::kernel::{Nanos, SECOND};
use crate::wire::{Details, Order};

const RELEASE: Nanos = 15 * SECOND;

/// Releases that are under way.
#[derive(Default)]
pub struct Strays {
    under_way: Rc<RefCell<BTreeSet<Stray>>>,
}

impl Strays {
    /// Orders the release of every stray that is not being released already.
    pub fn clear(&self, this: &This, leadership: Leadership) {
        let found = strays(&this.state(), &this.observed.borrow());
        for stray in found {
            if self.under_way.borrow_mut().insert(stray) {
                let (controller, under_way) = (Rc::clone(this), Rc::clone(&self.under_way));
                this.world.kernel.spawn(this.process, async move {
                    release(&controller, leadership, stray).await;
                    under_way.borrow_mut().remove(&stray);
                });
            }
        }
    }
}

async fn release(this: &This, leadership: Leadership, stray: Stray) {
    let online = this.state().nodes.get(&stray.node).is_some_and(|node| node.is_online());
    if !online {
        return this.sleep(RELEASE / 15).await;
    }
    let (term, boot) = (leadership.term, this.boot_of(stray.node));
    let stamped = Stamped { term, task: 0, epoch: stray.epoch, boot, order: What::Release };
    let order = Order { vm: stray.vm, stamped, details: Details::Plain };
    match send(this, stray.node, order, RELEASE).await {
        // The next report would name it again if it was taken before the release.
        Ok(_) => this.note(|observed| {
            if let Some(report) = observed.nodes.get_mut(&stray.node) {
                report.vms.retain(|seen| seen.vm != stray.vm || seen.epoch != stray.epoch);
            }
        }),
        Err(_) => this.sleep(RELEASE / 15).await,
    }
}
