//! The states of a VMM and what may be asked of it in each. Pure: no I/O, no clock.
//!
//! ```text
//! empty --create--> created --start-------------------------> running
//!                      |  \--load--> loaded --start-------->    |  ^
//!                      |                                        |  | start (higher epoch)
//!                      |                            save        v  |
//!                      |                           (running) > sealed
//!                      v
//!               (stop from any state, or the guest ends) -> exited; the process ends
//! ```
//!
//! `paused` is not a state of its own but running behind a closed gate: an administrator, the lease
//! and a failed load can each hold the guest, independently. `lock` may come before `start`, in
//! created and in loaded. The driver owns the record; a crash leaves nothing, because the locks go
//! with the process and an unsealed file does not count.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Empty,
    Created,
    Loaded,
    /// Running, or paused by a hold.
    Running,
    Sealed,
    Exited,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Create,
    Lock,
    LoadAhead,
    Load,
    Start,
    Pause,
    Resume,
    Save,
    HandOver,
    PreCopy,
    Shutdown,
    Stop,
}

/// The verb is not possible in this phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{verb} is not possible while the VMM is {phase}; {}", hint(*verb))]
pub struct Refused {
    pub verb: Verb,
    pub phase: Phase,
}

/// The phase after `verb` has succeeded in `phase`.
pub fn next(phase: Phase, verb: Verb) -> Result<Phase, Refused> {
    use {Phase::*, Verb as V};
    Ok(match (phase, verb) {
        (Empty, V::Create) => Created,
        (Created | Loaded, V::Lock) => phase,
        (Created, V::LoadAhead) => Created,
        (Created, V::Load) => Loaded,
        (Created | Loaded | Sealed, V::Start) => Running,
        (Running, V::Pause | V::Resume | V::PreCopy | V::Shutdown) => Running,
        (Running, V::Save) => Sealed,
        // Asked again, it answers again.
        (Sealed, V::Save | V::HandOver) => Sealed,
        (_, V::Stop) => Exited,
        _ => return Err(Refused { verb, phase }),
    })
}

fn hint(verb: Verb) -> &'static str {
    match verb {
        Verb::Create => "one process runs one VM: start another VMM",
        Verb::Lock => "lock after create and before start",
        Verb::LoadAhead => "load ahead right after create",
        Verb::Load => "load right after create, into a machine that has not run",
        Verb::Start => "start after create or load, or to claim a sealed VM back",
        Verb::Pause | Verb::Resume | Verb::Save | Verb::PreCopy | Verb::Shutdown => {
            "start the VM first"
        }
        Verb::HandOver => "save the VM first",
        Verb::Stop => "",
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::Created => "created",
            Self::Loaded => "loaded",
            Self::Running => "running",
            Self::Sealed => "sealed",
            Self::Exited => "exited",
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoadAhead => f.write_str("load ahead"),
            Self::PreCopy => f.write_str("pre-copy"),
            Self::HandOver => f.write_str("hand over"),
            other => f.write_str(&format!("{other:?}").to_lowercase()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Phase::*;

    const VERBS: [Verb; 12] = [
        Verb::Create,
        Verb::Lock,
        Verb::LoadAhead,
        Verb::Load,
        Verb::Start,
        Verb::Pause,
        Verb::Resume,
        Verb::Save,
        Verb::HandOver,
        Verb::PreCopy,
        Verb::Shutdown,
        Verb::Stop,
    ];

    /// The whole table, so that a change to it is a decision and not an accident.
    #[test]
    fn the_table_is_the_drawing() {
        let allowed = |phase| -> Vec<Verb> {
            VERBS.into_iter().filter(|&verb| next(phase, verb).is_ok()).collect()
        };
        assert_eq!(allowed(Empty), [Verb::Create, Verb::Stop]);
        assert_eq!(
            allowed(Created),
            [Verb::Lock, Verb::LoadAhead, Verb::Load, Verb::Start, Verb::Stop]
        );
        assert_eq!(allowed(Loaded), [Verb::Lock, Verb::Start, Verb::Stop]);
        assert_eq!(
            allowed(Running),
            [Verb::Pause, Verb::Resume, Verb::Save, Verb::PreCopy, Verb::Shutdown, Verb::Stop]
        );
        assert_eq!(allowed(Sealed), [Verb::Start, Verb::Save, Verb::HandOver, Verb::Stop]);
        assert_eq!(allowed(Exited), [Verb::Stop]);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let refused = next(Running, Verb::Load).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "load is not possible while the VMM is running; load right after create, into a machine that has not run"
        );
    }
}
