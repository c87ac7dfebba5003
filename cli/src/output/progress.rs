//! The steps of tasks as they happen: a moving line at a terminal, plain lines elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use bellwether_proto::v1;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Output;

/// No task has this number.
const NO_TASK: u64 = 0;

/// What was last shown of a task.
struct Shown {
    step: String,
    bar: Option<ProgressBar>,
}

/// Shows tasks on standard error.
pub struct Progress {
    bars: Option<MultiProgress>,
    tasks: BTreeMap<u64, Shown>,
}

impl Progress {
    pub fn new(output: &Output) -> Self {
        let bars = output.stderr_is_terminal().then(MultiProgress::new);
        Self { bars, tasks: BTreeMap::new() }
    }

    /// Takes the newest state of a task, and shows it if its step is a new one. A moving line also
    /// shows how far a step is.
    pub fn show(&mut self, task: &v1::Task) {
        let step = match (task.outcome.as_str(), &self.bars) {
            ("running", Some(_)) => format!("{}{}", task.step, super::pre_copied(task)),
            ("running", None) => task.step.clone(),
            (outcome, _) => outcome.to_owned(),
        };
        let shown = self.tasks.entry(task.id).or_insert_with(|| Shown {
            step: String::new(),
            bar: self.bars.as_ref().map(|bars| bars.add(bar())),
        });
        if shown.step == step {
            return;
        }
        let title = title(task);
        match &shown.bar {
            Some(bar) if task.outcome != "running" => {
                bar.finish_with_message(format!("{title}: {step}"))
            }
            Some(bar) => bar.set_message(format!("{title}: {step}")),
            None => super::say(&format!("task {} {title}: {step}", task.id)),
        }
        shown.step = step;
    }

    /// The same for something that is no task; there is one such line.
    pub fn show_text(&mut self, text: &str) {
        let text = super::printable(text);
        let shown = self.tasks.entry(NO_TASK).or_insert_with(|| Shown {
            step: String::new(),
            bar: self.bars.as_ref().map(|bars| bars.add(bar())),
        });
        if shown.step == text {
            return;
        }
        match &shown.bar {
            Some(bar) => bar.set_message(text.clone()),
            None => super::say(&text),
        }
        shown.step = text;
    }

    /// Takes the moving lines off the terminal; the result follows.
    pub fn finish(&mut self) {
        for shown in self.tasks.values().filter_map(|shown| shown.bar.as_ref()) {
            shown.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    // The template is a constant; if it did not parse, the default would do as well.
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn title(task: &v1::Task) -> String {
    match task.vm_name.as_str() {
        "" => task.kind.clone(),
        vm => format!("{} {vm}", task.kind),
    }
}
