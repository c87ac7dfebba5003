//! What the lab and the agent in a host say to each other: JSON, a message per line, over a port
//! of the machine that no network fault touches.

use serde::{Deserialize, Serialize};

/// The port's name on both sides.
pub const PORT_NAME: &str = "lab.agent";

/// A message longer than this is a mistake, not a message.
pub const LINE_BYTES_MAX: usize = 4 << 20;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToHost {
    /// Run a program, with this as its standard input, and answer with `Done`.
    Run { id: u64, argv: Vec<String>, input: String, limit_ms: u64 },
    /// What the power switch says to the request of this number.
    Power { id: u64, code: i32, text: String },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromHost {
    /// The first message after the agent started.
    Hello {
        boot_id: String,
    },
    Done {
        id: u64,
        outcome: Outcome,
    },
    /// A fence agent asks the power switch of a host; answered with `Power`, or never.
    Power {
        id: u64,
        host: String,
        action: String,
    },
    /// A line that a guest printed on its serial port.
    Guest {
        vm_id: String,
        epoch: u64,
        line: String,
    },
}

/// How a program ended.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Its exit status, or 128 and the signal; 124 when its time was over.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}
