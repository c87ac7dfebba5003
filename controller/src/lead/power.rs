//! The power switches of the nodes' hosts, as the leader uses them: tested every hour, and switched
//! off where a VM waits for that proof.
//!
//! `power/NODE.toml` in the data directory of each controller says how NODE is switched off. Fence
//! agents block for as long as their timeouts say, so each call has a thread of its own, and one that
//! hangs holds up nothing else. A call outlives the leadership that made it; its result does not.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bellwether_core::command::Change;
use bellwether_core::power::{PowerSwitch, is_awaited, to_switch_off};
use bellwether_power::{PowerError, PowerState, Switch, SwitchConfig};
use bellwether_types::{BootId, NodeId};
use tokio::task::{AbortHandle, JoinSet, spawn_blocking};

use crate::controller::Controller;

/// The directory of the settings, in a controller's data directory.
pub const DIRECTORY: &str = "power";
/// Between two looks at the settings, milliseconds: a new file needs no restart.
const LOOK_MS: u64 = 10_000;
/// Between two tests of a switch, milliseconds.
const TEST_MS: u64 = 3_600_000;

pub struct Switches {
    controller: Arc<Controller>,
    looked_at: Option<u64>,
    /// The look at the settings that is under way: one that hangs in a test is not joined by others.
    look: Option<AbortHandle>,
    calls: JoinSet<()>,
}

impl Switches {
    pub fn new(controller: &Arc<Controller>) -> Self {
        let (controller, calls) = (Arc::clone(controller), JoinSet::new());
        Self { controller, looked_at: None, look: None, calls }
    }

    /// Begins whatever is due, and waits for nothing.
    pub fn look(&mut self) {
        while self.calls.try_join_next().is_some() {}
        let now = self.controller.clock.now_ms();
        let is_time = self.looked_at.is_none_or(|at| now >= at.saturating_add(LOOK_MS));
        if is_time && self.look.as_ref().is_none_or(AbortHandle::is_finished) {
            self.looked_at = Some(now);
            self.look = Some(self.calls.spawn(refresh(Arc::clone(&self.controller))));
        }
        let due = to_switch_off(&self.controller.state(), &self.controller.observed(), now);
        for (node, boot_id) in due {
            note(&self.controller, node, |switch| switch.is_switching = true);
            self.calls.spawn(switch_off(Arc::clone(&self.controller), node, boot_id));
        }
    }
}

fn note(controller: &Controller, node: NodeId, change: impl FnOnce(&mut PowerSwitch)) {
    controller.note(|observed| {
        if let Some(switch) = observed.switches.get_mut(&node) {
            change(switch);
        }
    });
}

fn said(controller: &Controller, node: NodeId, word: Result<bool, String>) {
    let now = controller.clock.now_ms();
    note(controller, node, |switch| switch.said = Some((now, word)));
}

/// Finds new settings and forgets those that are gone; tests what has not been tested for an hour.
async fn refresh(controller: Arc<Controller>) {
    let nodes: Vec<(NodeId, String)> =
        controller.state().nodes.values().map(|node| (node.id, node.name.clone())).collect();
    for (node, name) in nodes {
        let path = settings(&controller.power_dir, &name);
        let found = blocking(move || match path.exists() {
            true => Some(load(&path)),
            false => None,
        });
        match found.await {
            Some(found) => meet(&controller, node, found).await,
            None => drop(controller.observed().switches.remove(&node)),
        }
    }
}

async fn meet(controller: &Controller, node: NodeId, found: Result<SwitchConfig, String>) {
    let now = controller.clock.now_ms();
    let device = found.as_ref().map_or_else(|_| DIRECTORY.to_owned(), name_of);
    let known = controller.observed().switches.get(&node).cloned();
    if known.as_ref().is_none_or(|known| known.device != device) {
        let switch = PowerSwitch::new(device);
        controller.observed().switches.insert(node, switch);
    }
    let config = match found {
        Ok(config) => config,
        Err(reason) => return said(controller, node, Err(reason)),
    };
    let known = known.filter(|known| known.device == name_of(&config));
    let is_tested = |switch: &PowerSwitch| {
        let at = switch.said.as_ref().map(|(at, _)| *at);
        switch.is_switching || at.is_some_and(|at| now < at.saturating_add(TEST_MS))
    };
    if !known.as_ref().is_some_and(is_tested) {
        said(controller, node, blocking(move || is_on(config)).await);
    }
}

/// Asks the switch of a node's host whether it is on, now; nothing if the node has none.
pub async fn ask(
    controller: &Controller,
    node: NodeId,
    name: &str,
) -> Option<Result<bool, String>> {
    let path = settings(&controller.power_dir, name);
    let word = blocking(move || path.exists().then(|| load(&path).and_then(is_on))).await?;
    said(controller, node, word.clone());
    Some(word)
}

fn is_on(config: SwitchConfig) -> Result<bool, String> {
    let asked = || {
        let (switch, _) = Switch::new(config)?;
        Ok::<_, PowerError>(switch.status()? == PowerState::On)
    };
    asked().map_err(|error| error.to_string())
}

/// The proof is proposed by the leader that asked for it. Should it lead no longer, the next one asks
/// again: a host that is off can be switched off once more.
async fn switch_off(controller: Arc<Controller>, node: NodeId, boot_id: BootId) {
    let name = controller.state().node_name(node);
    if !still_asks(&controller, node, boot_id).await {
        tracing::info!(node = name, "its host is not switched off: nothing asks for it any more");
        return note(&controller, node, |switch| switch.is_switching = false);
    }
    tracing::warn!(node = name, "switching its host off: a VM waits for that proof");
    let path = settings(&controller.power_dir, &name);
    let result = blocking(move || {
        let config = load(&path)?;
        let (switch, _) = Switch::new(config).map_err(|error| error.to_string())?;
        switch.off().map_err(|error| error.to_string())
    });
    match result.await {
        Ok(proof) => {
            let device = file_name(proof.agent());
            let (off_ms, confirmed_ms) = (proof.off().as_millis(), proof.confirmed().as_millis());
            tracing::warn!(node = name, device, off_ms, confirmed_ms, "its host is off");
            if let Err(error) =
                controller.propose(Change::SwitchedOff { node, boot_id, device }).await
            {
                tracing::warn!(node = name, %error, "the proof was not committed");
            }
            said(&controller, node, Ok(false));
        }
        Err(reason) => {
            tracing::error!(node = name, reason, "its host was not switched off");
            said(&controller, node, Err(reason));
        }
    }
    note(&controller, node, |switch| switch.is_switching = false);
}

/// Whether the newest state asks for it, and this controller still leads. One that was cut off from the
/// others takes itself for the leader, and a host that has long come back for silent.
async fn still_asks(controller: &Controller, node: NodeId, boot_id: BootId) -> bool {
    controller.raft.confirm_leadership().await.is_ok()
        && is_awaited(&controller.state(), node, boot_id)
}

fn settings(directory: &Path, node: &str) -> PathBuf {
    directory.join(format!("{node}.toml"))
}

fn load(path: &Path) -> Result<SwitchConfig, String> {
    SwitchConfig::load(path).map_err(|error| error.to_string())
}

fn name_of(config: &SwitchConfig) -> String {
    file_name(&config.program())
}

fn file_name(program: &Path) -> String {
    program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
}

/// Runs what blocks in a thread of its own.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(call).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The program ends.
        Err(_) => std::future::pending().await,
    }
}
