//! The administrator's command, run as an administrator runs it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::process::Command;

/// No command takes longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(90);

/// `bell` with the contexts of one cluster.
#[derive(Clone, Debug)]
pub struct Bell {
    program: PathBuf,
    config: PathBuf,
}

/// What a command printed, and how it ended.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Bell {
    pub fn new(program: &Path, config: &Path) -> Self {
        Self { program: program.to_owned(), config: config.to_owned() }
    }

    /// How a person would say it.
    pub fn words(&self) -> String {
        format!("{} --config {}", self.program.display(), self.config.display())
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Runs a command to its end, whatever that is.
    pub async fn run(&self, arguments: &[&str]) -> Result<Answer> {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).args(arguments);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(PATIENCE, command.output()).await;
        let output = output.with_context(|| format!("bell {} hangs", arguments.join(" ")))?;
        let output = output.with_context(|| format!("start {}", self.program.display()))?;
        Ok(Answer {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a command that must succeed, and gives its output.
    pub async fn text(&self, arguments: &[&str]) -> Result<String> {
        let answer = self.run(arguments).await?;
        match answer.code {
            0 => Ok(answer.out),
            code => {
                bail!("`bell {}` ended with {code}: {}", arguments.join(" "), answer.err.trim())
            }
        }
    }

    /// Runs a command that must succeed, and reads its JSON.
    pub async fn json(&self, arguments: &[&str]) -> Result<Value> {
        let all: Vec<&str> = ["-o", "json"].iter().chain(arguments).copied().collect();
        let text = self.text(&all).await?;
        serde_json::from_str(&text)
            .with_context(|| format!("`bell {}` printed no JSON: {text}", all.join(" ")))
    }

    /// Runs a command that must be refused with this exit code and these words; `a|b` is either.
    pub async fn refused(&self, arguments: &[&str], code: i32, words: &[&str]) -> Result<Answer> {
        let answer = self.run(arguments).await?;
        let line = arguments.join(" ");
        if answer.code != code {
            bail!(
                "`bell {line}` ended with {} and not with {code}: {}{}",
                answer.code,
                answer.out,
                answer.err
            );
        }
        let said = answer.err.to_lowercase();
        let is_said = |word: &&&str| word.split('|').any(|one| said.contains(&one.to_lowercase()));
        match words.iter().find(|word| !is_said(word)) {
            None => Ok(answer),
            Some(word) => bail!("`bell {line}` does not say `{word}`: {}", answer.err),
        }
    }
}
