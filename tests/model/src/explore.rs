//! Exploring a configuration, and telling what came of it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use crate::action::Action;
use crate::config::Config;
use crate::marks::{Mark, Marks};
use crate::model::Protocol;
use crate::state::{Phase, State};

/// What an exploration found.
#[derive(Debug)]
pub struct Report {
    pub config: Config,
    pub states: usize,
    pub transitions: usize,
    pub depth: usize,
    pub took: Duration,
    pub counterexample: Option<Counterexample>,
    marks: Arc<Marks>,
}

/// The shortest way to a state that breaks an invariant.
#[derive(Debug)]
pub struct Counterexample {
    pub invariant: &'static str,
    pub steps: Vec<(Action, State)>,
}

/// Explores everything that is reachable, or as far as the first broken invariant.
pub fn explore(config: Config) -> Report {
    let protocol = Protocol::new(config.clone());
    let marks = protocol.marks();
    let begun = Instant::now();
    let checker = protocol.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let took = begun.elapsed();
    let broken = checker.discoveries().into_values().next().map(|path| {
        let invariant = checker.model().broken(path.last_state());
        (invariant.unwrap_or("none"), path)
    });
    let counterexample = broken.map(|(invariant, path)| {
        let states = path.clone().into_states();
        let steps = path.into_actions().into_iter().zip(states.into_iter().skip(1)).collect();
        Counterexample { invariant, steps }
    });
    Report {
        config,
        states: checker.unique_state_count(),
        transitions: checker.state_count(),
        depth: checker.max_depth(),
        took,
        counterexample,
        marks,
    }
}

impl Report {
    pub fn count(&self, mark: Mark) -> u64 {
        self.marks.count(mark)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { config, states, transitions, depth, took, .. } = self;
        write!(f, "{}", config.name)?;
        if let Some(flaw) = config.flaw {
            write!(f, " with {flaw:?}")?;
        }
        writeln!(
            f,
            ": {states} states, {transitions} transitions, depth {depth}, {:.1} s",
            took.as_secs_f64()
        )?;
        for mark in Mark::ALL {
            match self.count(*mark) {
                0 => {}
                count => writeln!(f, "  {count:>10} {}", mark.text())?,
            }
        }
        match &self.counterexample {
            Some(counterexample) => write!(f, "{counterexample}"),
            None => writeln!(f, "  every invariant holds"),
        }
    }
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  invariant {} is broken after {} steps:", self.invariant, self.steps.len())?;
        for (number, (action, state)) in self.steps.iter().enumerate() {
            writeln!(f, "  {:>3}. {action:?}", number + 1)?;
            for vm in &state.vms {
                writeln!(f, "       {}", Line(vm))?;
            }
        }
        Ok(())
    }
}

/// A VM in one line: place, step, claim, and each VMM.
struct Line<'a>(&'a crate::state::Vm);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vm = self.0;
        write!(f, "{:?}", vm.place)?;
        if let Some(task) = vm.task {
            write!(f, " | {:?}: {:?}", task.kind, task.step)?;
        }
        write!(f, " | claim {:?}", vm.claim.epoch)?;
        if let Some(holder) = vm.claim.holder {
            write!(f, " of {holder:?}")?;
        }
        if let Some(file) = vm.claim.handed {
            write!(f, " handed over {file:?}")?;
        }
        for (index, agent) in vm.agents.iter().enumerate() {
            let Some(vmm) = agent.vmm.filter(|vmm| vmm.phase != Phase::Ended) else { continue };
            write!(f, " | n{} {:?} {:?}", index + 1, vmm.epoch, vmm.phase)?;
            let notes = [
                (vmm.locked && !vmm.cut, "locked"),
                (vmm.cut, "cut"),
                (vmm.stuck, "stuck"),
                (vmm.lease.is_some(), "leased"),
            ];
            for (_, note) in notes.iter().filter(|(applies, _)| *applies) {
                write!(f, " {note}")?;
            }
            if let Some(file) = vmm.loaded {
                write!(f, " loaded {file:?}")?;
            }
        }
        Ok(())
    }
}
