//! One host's power switch.
//!
//! ```text
//!   off ---- fails, or not in time -------------------------> no proof
//!    | succeeds
//!    v
//!   status --- off ----------------------------------------> PROOF
//!    |   \---- on ---> again, until `confirm_ms` is over ---> no proof: the agent said off, the host is on
//!    \-------- fails, not in time, contradicts itself ------> no proof
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bellwether_core::power::{SwitchAnswer, SwitchStep, switch_step};
use rustix::event::{Timespec, poll};

use crate::config::SwitchConfig;
use crate::metadata::{Metadata, MetadataError, Problem};
use crate::outcome::{Ended, Failure, PowerState, done, state};
use crate::process::{self, Finished};

/// Metadata is only printed: an agent that takes longer is broken.
const METADATA_MAX: Duration = Duration::from_secs(20);
/// Between two looks whether a host has gone off.
const STATUS_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// So much of what an agent printed goes into an error.
const SAID_MAX: usize = 400;

/// Why there is no proof.
#[derive(Debug, thiserror::Error)]
pub enum PowerError {
    #[error("run fence agent `{}`: {source}; install fence-agents, or give its path", agent.display())]
    Start { agent: PathBuf, source: std::io::Error },
    #[error("fence agent `{}`: {source}", agent.display())]
    Metadata { agent: PathBuf, source: MetadataError },
    #[error("{}", list(.0))]
    Settings(Vec<Problem>),
    #[error("`{action}` of fence agent `{}`: {source}{}", agent.display(), in_its_words(.said))]
    Failed { agent: PathBuf, action: &'static str, source: Failure, said: String },
    #[error(
        "fence agent `{}` said that it switched the host off, and {} ms later its status still says \
         on: the host may be running",
        agent.display(), after.as_millis()
    )]
    StillOn { agent: PathBuf, after: Duration },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn in_its_words(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!("; it said: {said}") }
}

/// The evidence that a host has no power. Only [`Switch::off`] makes one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PowerProof {
    agent: PathBuf,
    off: Duration,
    confirmed: Duration,
}

impl PowerProof {
    pub fn agent(&self) -> &Path {
        &self.agent
    }
    /// How long `off` took.
    pub fn off(&self) -> Duration {
        self.off
    }
    /// How long it took until the status said off.
    pub fn confirmed(&self) -> Duration {
        self.confirmed
    }
}

/// The power switch of one host: an agent with settings that fit it.
#[derive(Debug)]
pub struct Switch {
    agent: PathBuf,
    config: SwitchConfig,
}

impl Switch {
    /// Asks the agent what it takes, and checks the settings against it.
    pub fn new(config: SwitchConfig) -> Result<(Self, Metadata), PowerError> {
        let agent = config.program();
        let metadata = describe(&agent)?;
        match metadata.check(&config.parameters) {
            problems if problems.is_empty() => Ok((Self { agent, config }, metadata)),
            problems => Err(PowerError::Settings(problems)),
        }
    }

    /// Whether the host has power. For the hourly test: it changes nothing.
    pub fn status(&self) -> Result<PowerState, PowerError> {
        let finished = self.run("status", self.config.status_timeout())?;
        state(finished.ended, &finished.output)
            .map_err(|source| self.failed("status", source, &finished))
    }

    /// Switches the host off, and proves it. An error says nothing about the host: it may be off.
    pub fn off(&self) -> Result<PowerProof, PowerError> {
        let started = Instant::now();
        let finished = self.run("off", self.config.off_timeout())?;
        done(finished.ended).map_err(|source| self.failed("off", source, &finished))?;
        let off = started.elapsed();
        let mut answer = SwitchAnswer::Off;
        loop {
            let (agent, after) = (self.agent.clone(), started.elapsed() - off);
            match switch_step(answer, millis(after), millis(self.config.confirm())) {
                SwitchStep::Proven => {
                    return Ok(PowerProof { agent, off, confirmed: started.elapsed() });
                }
                SwitchStep::StillOn => return Err(PowerError::StillOn { agent, after }),
                SwitchStep::AskStatus => {}
                // There is nothing to wait for but another answer.
                SwitchStep::AskAgain => {
                    let _timed_out = poll(&mut [], Some(&STATUS_PAUSE));
                }
            }
            answer = SwitchAnswer::Status { is_on: self.status()? == PowerState::On };
        }
    }

    /// Switches the host on. Not part of any proof.
    pub fn on(&self) -> Result<(), PowerError> {
        let finished = self.run("on", self.config.off_timeout())?;
        done(finished.ended).map_err(|source| self.failed("on", source, &finished))
    }

    fn run(&self, action: &'static str, at_most: Duration) -> Result<Finished, PowerError> {
        run(&self.agent, &self.config.parameters.input(action), at_most)
    }

    fn failed(&self, action: &'static str, source: Failure, finished: &Finished) -> PowerError {
        let errors = finished.errors.trim();
        let said = if errors.is_empty() { finished.output.trim() } else { errors };
        let said = self.config.parameters.redact(said);
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        let said = said.chars().take(SAID_MAX).collect();
        PowerError::Failed { agent: self.agent.clone(), action, source, said }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Asks an agent what it is.
pub fn describe(agent: &Path) -> Result<Metadata, PowerError> {
    let finished = run(agent, "action=metadata\n", METADATA_MAX)?;
    if finished.ended != Ended::Code(0) {
        let source = done(finished.ended).err().unwrap_or(Failure::Timeout);
        let said = finished.errors.trim().chars().take(SAID_MAX).collect();
        return Err(PowerError::Failed { agent: agent.into(), action: "metadata", source, said });
    }
    Metadata::parse(&finished.output)
        .map_err(|source| PowerError::Metadata { agent: agent.into(), source })
}

fn run(agent: &Path, input: &str, at_most: Duration) -> Result<Finished, PowerError> {
    process::run(agent, input, at_most)
        .map_err(|source| PowerError::Start { agent: agent.into(), source })
}
