//! The power switches of the nodes' hosts, as `controller/src/lead/power.rs` uses them: which host is
//! switched off, and what proves that it is, says the core.

use std::rc::Rc;

use bellwether_core::command::Change;
use bellwether_core::power::{
    PowerSwitch as Known, SwitchAnswer, SwitchStep, switch_step, to_switch_off,
};
use bellwether_types::{BootId, NodeId};

use super::This;
use crate::faults;
use crate::kernel::{HostId, MS, Nanos, SECOND};
use crate::scenario::PowerSwitch;
use crate::world::Shared;

/// The name of the fence agent in here.
const DEVICE: &str = "fence_sim";
/// How long an `off` may take, one `status`, and how long a host may be said to be on behind an `off`.
const OFF_MAX: Nanos = 40 * SECOND;
const STATUS_MAX: Nanos = 10 * SECOND;
const CONFIRM_MS: u64 = 5_000;
const STATUS_PAUSE: Nanos = 500 * MS;
/// Until somebody finds a host off that is to be on.
const NOTICED: Nanos = 10 * SECOND;

/// A leader finds the settings of the switches, and tests each of them.
pub fn learn(this: &This) {
    for node in 1..=this.world.cluster.nodes {
        let node = NodeId(node);
        if this.world.cluster.equipment_of(node.0).switch.is_none() {
            continue;
        }
        this.note(|observed| {
            observed.switches.insert(node, Known::new(DEVICE.to_owned()));
        });
        let there = Rc::clone(this);
        this.world.kernel.spawn(this.process, async move {
            let word = Switch::of(&there, node).status().await;
            there.said(node, word);
        });
    }
}

/// Begins to switch off what is to be, and waits for nothing.
pub fn look(this: &This) {
    let due = to_switch_off(&this.state(), &this.observed.borrow(), this.now_ms());
    for (node, boot_id) in due {
        this.note_switch(node, |switch| switch.is_switching = true);
        let there = Rc::clone(this);
        // It outlives the leadership that asked for it; its result does not.
        this.world.kernel.spawn(this.process, switch_off(there, node, boot_id));
    }
}

async fn switch_off(this: This, node: NodeId, boot_id: BootId) {
    match Switch::of(&this, node).off().await {
        Ok(()) => {
            let device = DEVICE.to_owned();
            let _asked_again = this.propose(Change::SwitchedOff { node, boot_id, device }).await;
            this.said(node, Ok(false));
        }
        Err(reason) => this.said(node, Err(reason)),
    }
    this.note_switch(node, |switch| switch.is_switching = false);
}

impl super::Controller {
    fn note_switch(&self, node: NodeId, change: impl FnOnce(&mut Known)) {
        self.note(|observed| {
            if let Some(switch) = observed.switches.get_mut(&node) {
                change(switch);
            }
        });
    }

    fn said(&self, node: NodeId, word: Result<bool, String>) {
        let now = self.now_ms();
        self.note_switch(node, |switch| switch.said = Some((now, word)));
    }
}

/// One host's switch, and who asks it.
struct Switch {
    world: Shared,
    asker: HostId,
    node: NodeId,
    kind: Option<PowerSwitch>,
}

impl Switch {
    fn of(this: &This, node: NodeId) -> Self {
        let kind = this.world.cluster.equipment_of(node.0).switch;
        Self { world: Rc::clone(&this.world), asker: this.host(), node, kind }
    }

    async fn takes(&self, low: Nanos, high: Nanos) {
        let duration = self.world.chance.borrow_mut().within(low, high);
        self.world.sleep(self.asker, duration).await;
    }

    /// Whether the host has power: one that boots has.
    async fn status(&self) -> Result<bool, String> {
        if self.kind == Some(PowerSwitch::Hangs) {
            self.world.sleep(self.asker, STATUS_MAX).await;
            return Err(self.failed("switch hangs", "it did not answer in time"));
        }
        self.takes(50 * MS, 300 * MS).await;
        Ok(self.world.kernel.is_up(HostId(self.node.0)))
    }

    /// `off`, then `status`, as the core says.
    async fn off(&self) -> Result<(), String> {
        self.order_off().await?;
        let done = self.world.kernel.monotonic(self.asker);
        let mut answer = SwitchAnswer::Off;
        loop {
            let after_ms = (self.world.kernel.monotonic(self.asker) - done) / MS;
            match switch_step(answer, after_ms, CONFIRM_MS) {
                SwitchStep::Proven => {
                    self.world.hit("switch", "proven");
                    return Ok(());
                }
                SwitchStep::StillOn => {
                    return Err(self.failed("switch lies", "it said off, and says on"));
                }
                SwitchStep::AskStatus => {}
                SwitchStep::AskAgain => self.world.sleep(self.asker, STATUS_PAUSE).await,
            }
            answer = SwitchAnswer::Status { is_on: self.status().await? };
        }
    }

    async fn order_off(&self) -> Result<(), String> {
        match self.kind {
            Some(PowerSwitch::Works) => {
                self.takes(200 * MS, 3 * SECOND).await;
                self.cut_power();
                Ok(())
            }
            Some(PowerSwitch::Lies) => {
                self.takes(50 * MS, 500 * MS).await;
                Ok(())
            }
            Some(PowerSwitch::Hangs) => {
                // What it has done nobody knows.
                self.takes(OFF_MAX / 2, OFF_MAX).await;
                if self.world.chance.borrow_mut().below(2) == 0 {
                    self.cut_power();
                }
                Err(self.failed("switch hangs", "it did not answer in time"))
            }
            Some(PowerSwitch::Fails) | None => {
                self.takes(50 * MS, SECOND).await;
                Err(self.failed("switch fails", "the connection was lost"))
            }
        }
    }

    fn cut_power(&self) {
        self.world.hit("switch", "host off");
        self.world.say("switch", format!("n{} is switched off", self.node));
        self.world.switched_off.borrow_mut().insert(self.node);
        faults::power_off(&self.world, self.node.0);
        // An `off` that is under way cannot be taken back.
        if self.world.healed.get() {
            let (there, node) = (Rc::clone(&self.world), self.node.0);
            self.world.kernel.after(NOTICED, move |_| faults::power_on(&there, node));
        }
    }

    fn failed(&self, row: &'static str, reason: &str) -> String {
        self.world.hit("switch", row);
        reason.to_owned()
    }
}
