//! One function for each command.

mod cluster;
mod context;
mod event;
mod node;
mod simulate;
mod task;
mod vm;
mod why;

use bellwether_proto::v1;
use clap::CommandFactory;

use crate::args::{Cli, Command, Global};
use crate::client::Cluster;
use crate::contexts::ContextFile;
use crate::exit::{Exit, Failure};
use crate::output::{Output, Progress};
use crate::watch::wait_for_tasks;

/// What every command works with.
pub struct Session<'a> {
    pub global: &'a Global,
    pub output: &'a Output,
}

impl Session<'_> {
    fn contexts(&self) -> Result<ContextFile, Failure> {
        ContextFile::locate(self.global.config.as_deref())
    }

    /// The cluster of the context in use.
    fn cluster(&self) -> Result<Cluster, Failure> {
        let all = self.contexts()?.load()?;
        let (name, context) = all.choose(self.global.context.as_deref())?;
        Cluster::open(name, context, self.global.timeout)
    }

    /// Waits for tasks unless told not to; none if it did not wait.
    async fn wait(&self, cluster: &Cluster, ids: &[u64]) -> Result<Option<Vec<v1::Task>>, Failure> {
        if self.global.no_wait {
            return Ok(None);
        }
        if ids.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let mut progress = Progress::new(self.output);
        wait_for_tasks(cluster, ids, &mut progress).await.map(Some)
    }
}

/// The failure of the first task that did not succeed.
fn check_tasks(tasks: &[v1::Task]) -> Result<(), Failure> {
    let Some(task) = tasks.iter().find(|task| task.outcome != "done") else { return Ok(()) };
    let about =
        if task.vm_name.is_empty() { String::new() } else { format!(" of VM {}", task.vm_name) };
    let reason = if task.error.is_empty() { &task.step } else { &task.error };
    let message = format!("the {}{about} failed (task {}): {reason}", task.kind, task.id);
    Err(Failure::new(Exit::Refused, message)
        .remedy(format!("see each step with `bell task show {}`", task.id)))
}

pub async fn run(cli: Cli, output: &Output) -> Result<(), Failure> {
    // clap sees this only when both stand on the same side of the verb.
    if cli.global.wait && cli.global.no_wait {
        return Err(Failure::usage("--wait and --no-wait exclude each other"));
    }
    let session = Session { global: &cli.global, output };
    match cli.command {
        Command::Cluster(command) => cluster::run(&session, command).await,
        Command::Node(command) => node::run(&session, command).await,
        Command::Vm(command) => vm::run(&session, command).await,
        Command::Task(command) => task::run(&session, command).await,
        Command::WhatIf(command) => why::what_if(&session, command).await,
        Command::Explain(command) => why::explain(&session, command).await,
        Command::Simulate { file } => simulate::run(&session, &file),
        Command::Event(command) => event::run(&session, command).await,
        Command::Context(command) => context::run(&session, command).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "bell", &mut script);
            output.bytes(&script)
        }
    }
}
