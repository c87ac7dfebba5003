//! What an agent's exit status means.
//!
//! | status | of `status` | of anything else |
//! |---|---|---|
//! | 0 | on | done |
//! | 1 | failed | failed |
//! | 2 | off | wrong arguments |
//! | 3 to 12 | failed, for the reason in the table of fence-agents | the same |
//! | none | killed, or not in time | the same |
//!
//! So 2 means two things, and an agent that is told nonsense may answer `status` with it. Therefore it
//! counts only behind an `off` that the same settings brought to success, and never against what the
//! agent printed: those of fence-agents print `Status: OFF` or `Status: ON`.

/// Whether a host has power.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PowerState {
    On,
    Off,
}

/// Why an action did not succeed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Failure {
    #[error("exit status {code}: {meaning}")]
    Code { code: i32, meaning: &'static str },
    #[error("it was killed by signal {0}")]
    Signal(i32),
    #[error("it did not answer in time and was killed: what it has done is not known")]
    Timeout,
    #[error("its exit status says {code} and it printed `Status: {printed}`: it cannot be trusted")]
    Contradiction { code: &'static str, printed: String },
}

/// How a program ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    Code(i32),
    Signal(i32),
    Timeout,
}

/// The exit statuses of fence-agents, `fencing.py`.
fn meaning(code: i32) -> &'static str {
    match code {
        1 => "the agent failed",
        2 => "wrong arguments",
        3 => "the login was denied",
        4 => "the connection was lost",
        5 => "the device did not answer in time",
        6 => "the host did not come on in time",
        7 => "the host did not go off in time",
        8 | 9 => "the state of the plug cannot be read, or there is no such plug",
        10 => "a password is missing",
        11 => "the user may not do this",
        12 => "there is no such VM",
        126 | 127 => "it cannot be executed",
        _ => "a status that no agent should have",
    }
}

/// The outcome of any action but `status`.
pub fn done(ended: Ended) -> Result<(), Failure> {
    match ended {
        Ended::Code(0) => Ok(()),
        other => Err(failure(other)),
    }
}

/// The outcome of `status`.
pub fn state(ended: Ended, output: &str) -> Result<PowerState, Failure> {
    let (state, code) = match ended {
        Ended::Code(0) => (PowerState::On, "on"),
        Ended::Code(2) => (PowerState::Off, "off"),
        other => return Err(failure(other)),
    };
    match printed(output).filter(|printed| !printed.eq_ignore_ascii_case(code)) {
        Some(printed) => Err(Failure::Contradiction { code, printed: printed.to_owned() }),
        None => Ok(state),
    }
}

fn failure(ended: Ended) -> Failure {
    match ended {
        Ended::Code(code) => Failure::Code { code, meaning: meaning(code) },
        Ended::Signal(signal) => Failure::Signal(signal),
        Ended::Timeout => Failure::Timeout,
    }
}

/// The word behind `Status:`, if a line begins so.
fn printed(output: &str) -> Option<&str> {
    let line = output.lines().rev().find_map(|line| line.trim().strip_prefix("Status:"));
    line.map(str::trim).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_is_off_for_status_and_an_error_for_everything_else() {
        assert_eq!(state(Ended::Code(2), "Status: OFF\n"), Ok(PowerState::Off));
        assert_eq!(state(Ended::Code(2), ""), Ok(PowerState::Off));
        assert_eq!(state(Ended::Code(0), "Status: ON"), Ok(PowerState::On));
        assert_eq!(
            done(Ended::Code(2)),
            Err(Failure::Code { code: 2, meaning: "wrong arguments" })
        );
        assert_eq!(done(Ended::Code(0)), Ok(()));
    }

    #[test]
    fn an_agent_that_contradicts_itself_is_not_believed() {
        let off = state(Ended::Code(2), "Status: ON\n").unwrap_err();
        assert!(matches!(off, Failure::Contradiction { code: "off", .. }), "{off}");
        let on = state(Ended::Code(0), "Status: OFF\n").unwrap_err();
        assert!(on.to_string().contains("cannot be trusted"), "{on}");
    }

    #[test]
    fn nothing_but_two_is_ever_off() {
        let endings = (-1..=255).filter(|code| *code != 2).map(Ended::Code);
        for ended in endings.chain([Ended::Timeout, Ended::Signal(9)]) {
            assert_ne!(state(ended, ""), Ok(PowerState::Off), "{ended:?}");
            assert_ne!(state(ended, "Status: OFF"), Ok(PowerState::Off), "{ended:?}");
        }
    }
}
