//! What is told to the controllers about a VM: its state in the cluster's words.

use bellwether_types::{Epoch, VmState};

use crate::incarnation::{Incarnation, Phase, VmmSight, VmmState};

/// The reasons with which a VMM ends in order. Every other one is a failure, a guest that reset
/// itself included: whoever wants it to go on has to start it again.
const CLEAN_EXITS: [&str; 2] = ["guest-shutdown", "stopped"];

/// Why a VM is unknown whose guest may have run, and whose VMM has not told its state since.
const UNTOLD: &str = "the VMM has not told its state yet";

/// What the agent last saw of one incarnation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observation {
    pub epoch: Epoch,
    pub state: VmState,
    pub reason: String,
    pub memory_loaded_bytes: u64,
    pub memory_total_bytes: u64,
}

/// The observation of an incarnation, with the last thing its VMM said, if it said any.
pub fn observe(incarnation: &Incarnation, sight: Option<&VmmSight>) -> Observation {
    let (state, reason) = match incarnation.phase {
        _ if incarnation.is_unknown() => (VmState::Unknown, UNTOLD.to_owned()),
        Phase::Preparing | Phase::Prepared | Phase::Locked => (VmState::Starting, String::new()),
        Phase::Loaded => (VmState::Restoring, String::new()),
        Phase::Activating if incarnation.loaded.is_some() => (VmState::Restoring, String::new()),
        Phase::Activating => (VmState::Starting, String::new()),
        Phase::Active => active(sight),
        Phase::Sealing => (VmState::Saving, String::new()),
        Phase::Sealed => (VmState::Saved, String::new()),
        Phase::Releasing => (VmState::Stopping, String::new()),
        // Nothing has run since the seal: the file is the VM.
        Phase::Ended if incarnation.sealed.is_some() => {
            (VmState::Saved, incarnation.reason.clone())
        }
        Phase::Ended => (exit_state(&incarnation.reason), incarnation.reason.clone()),
    };
    Observation {
        epoch: incarnation.epoch,
        state,
        reason,
        memory_loaded_bytes: sight.map_or(0, |sight| sight.memory_loaded_bytes),
        memory_total_bytes: sight.map_or(0, |sight| sight.memory_total_bytes),
    }
}

fn active(sight: Option<&VmmSight>) -> (VmState, String) {
    match sight {
        Some(sight) if sight.state == VmmState::Paused => (VmState::Paused, sight.reason.clone()),
        // The guest has ended and the process is about to: nothing runs any more.
        Some(sight) if sight.state == VmmState::Exited => {
            (exit_state(&sight.reason), sight.reason.clone())
        }
        _ => (VmState::Running, String::new()),
    }
}

/// Whether an exit for this reason is an orderly stop or a failure.
pub fn exit_state(reason: &str) -> VmState {
    match CLEAN_EXITS.contains(&reason) {
        true => VmState::Stopped,
        false => VmState::Failed,
    }
}

#[cfg(test)]
mod tests {
    use bellwether_types::Arbiter;

    use super::*;

    fn in_phase(phase: Phase) -> Incarnation {
        Incarnation { phase, ..Incarnation::preparing(Epoch(3), Arbiter::Storage) }
    }

    #[test]
    fn phases_become_the_clusters_words() {
        for (phase, state) in [
            (Phase::Preparing, VmState::Starting),
            (Phase::Locked, VmState::Starting),
            (Phase::Loaded, VmState::Restoring),
            (Phase::Active, VmState::Running),
            (Phase::Sealing, VmState::Saving),
            (Phase::Sealed, VmState::Saved),
            (Phase::Releasing, VmState::Stopping),
        ] {
            assert_eq!(observe(&in_phase(phase), None).state, state, "{phase}");
        }
    }

    #[test]
    fn what_may_run_and_is_not_seen_is_unknown() {
        for phase in [Phase::Preparing, Phase::Activating, Phase::Sealed, Phase::Releasing] {
            let lost = Incarnation { uncertain: true, may_have_run: true, ..in_phase(phase) };
            assert_eq!(observe(&lost, None).state, VmState::Unknown, "{phase}");
        }
        let idle = Incarnation { uncertain: true, ..in_phase(Phase::Preparing) };
        assert_eq!(observe(&idle, None).state, VmState::Starting);
        let gone = Incarnation { may_have_run: true, ..in_phase(Phase::Ended) };
        assert_eq!(observe(&gone, None).state, VmState::Failed);
    }

    #[test]
    fn only_an_orderly_end_is_stopped() {
        for (reason, state) in [
            ("guest-shutdown", VmState::Stopped),
            ("stopped", VmState::Stopped),
            ("guest-reset", VmState::Failed),
            ("triple-fault", VmState::Failed),
            ("internal-error: emulation", VmState::Failed),
            ("killed", VmState::Failed),
            ("", VmState::Failed),
        ] {
            let ended = Incarnation { reason: reason.into(), ..in_phase(Phase::Ended) };
            assert_eq!(observe(&ended, None).state, state, "{reason}");
        }
    }
}
