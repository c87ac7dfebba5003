//! Several cases on one cluster: starting one for each would cost more than all of them.

use std::time::Instant;

use anyhow::{Result, bail};

/// Collects what became of the cases, so that one failure does not hide the others.
#[derive(Debug, Default)]
pub struct Cases {
    count: usize,
    failed: Vec<String>,
}

impl Cases {
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes the result of a case.
    pub fn note(&mut self, name: &str, started: Instant, result: Result<()>) {
        self.count += 1;
        let time = started.elapsed().as_secs_f64();
        match result {
            Ok(()) => eprintln!("ok      {name} ({time:.1} s)"),
            Err(error) => {
                eprintln!("FAILED  {name} ({time:.1} s): {error:#}");
                self.failed.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// Runs a case.
    pub async fn run(&mut self, name: &str, case: impl Future<Output = Result<()>>) {
        let started = Instant::now();
        let result = case.await;
        self.note(name, started, result);
    }

    pub fn finish(self) -> Result<()> {
        match self.failed.is_empty() {
            true => Ok(()),
            false => bail!(
                "{} of {} cases failed:\n  {}",
                self.failed.len(),
                self.count,
                self.failed.join("\n  ")
            ),
        }
    }
}
