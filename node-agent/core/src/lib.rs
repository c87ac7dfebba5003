//! The pure core of the agent: VM and lease state machines.
//!
//! Nothing here does I/O or reads a clock: an order, an answer or a clock reading goes in, a
//! decision comes out, and the shell (`bellwether-agent`) carries it out.
//!
//! - [`adoption`]: which of two incarnations a new agent keeps.
//! - [`durability`]: what has to be on the disk before what.
//! - [`fencing`]: what the fencer decides: when to pet the watchdog, and whom to kill.
//! - [`machine`]: which orders about one VM are admitted, and what they do.
//! - [`isolation`]: whether a node that hears no controller is alone with that.
//! - [`lease`]: until when this node may run VMs.
//! - [`observe`]: what is told to the controllers about a VM.
//! - [`rotation`]: which controller to ask next, and when.
#![forbid(unsafe_code)]

pub mod adoption;
pub mod durability;
pub mod fencing;
pub mod incarnation;
pub mod isolation;
pub mod lease;
pub mod machine;
pub mod observe;
pub mod order;
pub mod refusal;
pub mod rotation;

pub use adoption::Leftover;
pub use durability::{Saved, Terms};
pub use incarnation::{Incarnation, Phase, VmmSight, VmmState};
pub use isolation::{Isolation, Pulse, Verdict};
pub use lease::{Lease, LeaseAnswer, LeaseRequest, LeaseState, Stamp, is_recent};
pub use machine::{Durable, Machine, Released, Standing};
pub use observe::{Observation, observe};
pub use order::{
    Action, ActivateTimings, Answer, Order, Outcome, SaveTimings, SealedState, Stamped,
};
pub use refusal::{Refusal, RefusalKind};
pub use rotation::Rotation;
