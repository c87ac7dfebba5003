//! This node's fencer: what it promises goes to the controllers, what they grant goes to it.
//!
//! ```text
//!   fencer --facts.json--> agent --renewal--> leader        (read anew before each renewal)
//!   fencer <--grant page-- agent <--grant---- leader        (after each that a quorum confirmed)
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bellwether_agent_core::Stamp;
use bellwether_fencer::facts::{Bound, Facts};
use bellwether_fencer::fencer::GRANT_FILE;
use bellwether_lease::{LeaseError, LeasePage};
use bellwether_proto::v1;

/// The fencer's directory, as this agent uses it.
#[derive(Debug)]
pub struct Fencing {
    directory: PathBuf,
    /// Opened when there is a fencer to write it for.
    page: Mutex<Option<LeasePage>>,
}

impl Fencing {
    /// Of a runtime directory.
    pub fn new(runtime: &Path) -> Self {
        Self { directory: runtime.join("fencer"), page: Mutex::new(None) }
    }

    /// What the fencer has written down; none where no fencer has been.
    fn facts(&self) -> Result<Facts, String> {
        match Facts::read(&self.directory) {
            Ok(Some(facts)) => Ok(facts),
            Ok(None) => Err("no fencer runs (bellwether-fencer.service)".into()),
            Err(error) => Err(format!("its fencer's facts cannot be read: {error}")),
        }
    }

    /// What the node can promise now.
    pub fn promise(&self) -> v1::Watchdog {
        let facts = match self.facts() {
            Ok(facts) => facts,
            Err(problem) => return v1::Watchdog { problem, ..v1::Watchdog::default() },
        };
        match facts.proof() {
            Ok(Bound { watchdog_ms, pet_ms }) => {
                let stop_ms = facts.stop_ms;
                v1::Watchdog { problem: String::new(), watchdog_ms, pet_ms, stop_ms }
            }
            Err(reason) => v1::Watchdog { problem: reason.to_string(), ..v1::Watchdog::default() },
        }
    }

    /// A quorum has confirmed, after this stamp, that the leader of `term` leads. For as long as the
    /// fencer pets under such a grant, it may.
    pub fn granted(&self, term: u64, stamp: Stamp) {
        // Without a fencer there is nobody to tell.
        let Ok(facts) = self.facts() else { return };
        let deadline_ns = stamp.boot_ns.saturating_add(facts.pet_ms.saturating_mul(1_000_000));
        match self.write(term, deadline_ns) {
            // The leader of an older term is deposed: what it grants is worth nothing.
            Ok(()) | Err(LeaseError::OlderEpoch { .. }) => {}
            Err(error) => tracing::error!(%error, "cannot hand a grant to the fencer"),
        }
    }

    fn write(&self, term: u64, deadline_ns: u64) -> Result<(), LeaseError> {
        let mut page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        let page = match &mut *page {
            Some(page) => page,
            none => none.insert(LeasePage::open_for_grants(&self.directory.join(GRANT_FILE))?),
        };
        page.grant(term, deadline_ns).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bellwether_fencer::device::WatchdogFacts;

    fn facts(hardware: bool) -> Facts {
        let watchdog = WatchdogFacts {
            device: "/dev/watchdog".into(),
            identity: "i6300ESB timer".into(),
            firmware_version: 0,
            timeout_ms: 6_000,
            nowayout: None,
            hardware,
        };
        Facts {
            pid: 7,
            start_ticks: 8,
            watchdog: Some(watchdog),
            pet_ms: 1_000,
            stop_ms: 900,
            realtime: true,
            locked: true,
        }
    }

    #[test]
    fn what_the_fencer_promises_is_told_and_its_grants_end_when_it_stops_petting() {
        let runtime = tempfile::tempdir().unwrap();
        let fencing = Fencing::new(runtime.path());
        assert!(fencing.promise().problem.contains("no fencer"));
        // Nobody to tell: nothing happens.
        fencing.granted(3, Stamp::default());

        let directory = runtime.path().join("fencer");
        std::fs::create_dir(&directory).unwrap();
        facts(true).write(&directory).unwrap();
        let page = LeasePage::create(&directory.join(GRANT_FILE)).unwrap();
        let told = fencing.promise();
        assert_eq!((told.problem.as_str(), told.watchdog_ms, told.pet_ms), ("", 6_000, 1_000));
        assert_eq!(told.stop_ms, 900);
        let stamp = Stamp { boot_ns: 5_000_000_000, raw_ns: 0 };
        fencing.granted(3, stamp);
        assert_eq!(page.read().unwrap().deadline_ns, 6_000_000_000);
        assert_eq!(page.read().unwrap().epoch, 3);
        // The leader of an older term grants nothing.
        fencing.granted(2, Stamp { boot_ns: 9_000_000_000, raw_ns: 0 });
        assert_eq!(page.read().unwrap().deadline_ns, 6_000_000_000);

        facts(false).write(&directory).unwrap();
        assert!(fencing.promise().problem.contains("kernel's own"));
        Facts::remove(&directory).unwrap();
        assert!(fencing.promise().problem.contains("no fencer"));
    }
}
