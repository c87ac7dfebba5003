//! The power of the machines, and the switches through which hosts can take it from each other: the
//! fence agent `fence_lab` in a host asks over the control channel, and any network may be dead.

use std::collections::BTreeMap;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};

use crate::timeline::{LAB, Timeline};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Power {
    Off,
    On,
    Frozen,
}

impl Power {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Frozen => "frozen",
        }
    }
}

/// One machine's power: its process, while it has any.
#[derive(Clone, Default, Debug)]
pub struct Supply {
    shared: Arc<Mutex<Option<Fed>>>,
}

#[derive(Debug)]
struct Fed {
    process: Child,
    frozen: bool,
}

impl Supply {
    /// A machine that ended by itself has no power.
    pub fn power(&self) -> Power {
        match &*self.living() {
            None => Power::Off,
            Some(Fed { frozen: true, .. }) => Power::Frozen,
            Some(_) => Power::On,
        }
    }

    pub fn feed(&self, process: Child) {
        *self.lock() = Some(Fed { process, frozen: false });
    }

    pub fn cut(&self) -> Result<()> {
        if let Some(mut fed) = self.lock().take() {
            fed.process.kill().context("kill the machine")?;
            fed.process.wait()?;
        }
        Ok(())
    }

    /// Notes whether the machine stands still, once `signal` has made it so.
    pub fn stand_still(&self, frozen: bool, signal: impl FnOnce(u32) -> Result<()>) -> Result<()> {
        match &mut *self.living() {
            Some(fed) => {
                signal(fed.process.id())?;
                fed.frozen = frozen;
                Ok(())
            }
            None => bail!("it is switched off"),
        }
    }

    fn living(&self) -> MutexGuard<'_, Option<Fed>> {
        let mut fed = self.lock();
        let ended = |fed: &mut Fed| fed.process.try_wait().is_ok_and(|status| status.is_some());
        if fed.as_mut().is_some_and(ended) {
            *fed = None;
        }
        fed
    }

    fn lock(&self) -> MutexGuard<'_, Option<Fed>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a power switch behaves.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Manner {
    #[default]
    Works,
    /// It says that the host is off, and has done nothing.
    Lies,
    Fails,
    /// It gives no answer.
    Hangs,
}

/// The power switches of all hosts.
#[derive(Clone, Default)]
pub struct Panel {
    switches: Arc<Mutex<BTreeMap<String, (Supply, Manner)>>>,
}

impl Panel {
    pub fn add(&self, host: &str, supply: Supply) {
        self.lock().insert(host.to_owned(), (supply, Manner::default()));
    }

    pub fn set(&self, host: &str, manner: Manner) {
        if let Some((_, known)) = self.lock().get_mut(host) {
            *known = manner;
        }
    }

    /// What a fence agent gets for an answer: its exit status, and what it prints. None: it waits.
    pub fn ask(&self, host: &str, action: &str, timeline: &Timeline) -> Option<(i32, String)> {
        let switch = self.lock().get(host).cloned();
        let Some((supply, manner)) = switch else {
            return Some((1, format!("there is no host `{host}`")));
        };
        if action != "status" {
            timeline.note(LAB, &format!("power switch of {host}: {action} ({manner:?})"));
        }
        match (action, manner) {
            (_, Manner::Hangs) => None,
            (_, Manner::Fails) => Some((1, "the switch refuses".to_owned())),
            ("off", Manner::Lies) => Some((0, "Success: Powered OFF".to_owned())),
            ("off", Manner::Works) => Some(match supply.cut() {
                Ok(()) => (0, "Success: Powered OFF".to_owned()),
                Err(error) => (1, format!("{error:#}")),
            }),
            ("status" | "monitor", _) => Some(match supply.power() {
                Power::Off => (2, "Status: OFF".to_owned()),
                Power::On | Power::Frozen => (0, "Status: ON".to_owned()),
            }),
            _ => Some((1, format!("this switch knows no `{action}`"))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Supply, Manner)>> {
        self.switches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
