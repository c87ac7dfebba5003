//! What was shown: progress as it happens, a table and a JSON object at the end.

use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// What the demonstration measured and checked.
pub struct Report {
    started: Instant,
    steps: usize,
    checks: usize,
    rows: Vec<(String, String)>,
    failure: Option<String>,
    pub migration_outage_ms: Option<f64>,
    pub failover_s: Option<f64>,
    pub fence_proof: Option<String>,
    pub leader_gap_s: Option<f64>,
    pub journal_records: Option<u64>,
    pub journal_lost: Option<u64>,
}

impl Report {
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            steps: 0,
            checks: 0,
            rows: Vec::new(),
            failure: None,
            migration_outage_ms: None,
            failover_s: None,
            fence_proof: None,
            leader_gap_s: None,
            journal_records: None,
            journal_lost: None,
        }
    }

    /// A new part begins.
    pub fn step(&mut self, title: &str) {
        let time = self.started.elapsed().as_secs_f64();
        eprintln!("\n[{time:5.1} s] {}. {title}", self.steps);
        self.steps += 1;
    }

    pub fn say(&self, text: &str) {
        eprintln!("          {text}");
    }

    /// A claim; if it does not hold, the demonstration ends.
    pub fn check(&mut self, claim: &str, holds: bool) -> Result<()> {
        if !holds {
            eprintln!("          ✗ {claim}");
            bail!("not so: {claim}");
        }
        eprintln!("          ✓ {claim}");
        self.checks += 1;
        Ok(())
    }

    /// A line of the table at the end.
    pub fn row(&mut self, what: &str, value: impl Into<String>) {
        let value = value.into();
        self.say(&format!("{what}: {value}"));
        self.rows.push((what.to_owned(), value));
    }

    pub fn fail(&mut self, reason: &str) {
        self.failure = Some(reason.to_owned());
    }

    pub fn is_ok(&self) -> bool {
        self.failure.is_none()
    }

    pub fn print_table(&self) {
        let width = self.rows.iter().map(|(what, _)| what.len()).max().unwrap_or(0);
        eprintln!("\n{:-<72}", "");
        for (what, value) in &self.rows {
            eprintln!("{what:width$}  {value}");
        }
        let time = self.started.elapsed().as_secs_f64();
        eprintln!("{:-<72}", "");
        match &self.failure {
            None => eprintln!("All {} checks passed in {time:.0} s.", self.checks),
            Some(reason) => {
                eprintln!("FAILED after {} checks and {time:.0} s: {reason}", self.checks);
            }
        }
    }

    pub fn to_json(&self) -> Value {
        json!({
            "ok": self.is_ok(),
            "migration_outage_ms": self.migration_outage_ms,
            "failover_s": self.failover_s,
            "fence_proof": self.fence_proof,
            "leader_gap_s": self.leader_gap_s,
            "journal_records": self.journal_records,
            "journal_lost": self.journal_lost,
        })
    }
}
