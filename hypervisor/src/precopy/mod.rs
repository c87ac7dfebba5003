//! Pre-copy: memory goes into the state file while the guest runs, so that a save has to write only
//! what changed last (ADR 0012).
//!
//! ```text
//!   driver                          the job's thread
//!   start ------------------------> log on, file, round 0, round 1, ...   -- progress --> watchers
//!                                       |converged, or stuck and so asked
//!                                     ready: short rounds keep the residue small
//!   save: finish ------------------> stops after what it is writing
//!      <---- Warm: file, log, rest --/
//!   abort, or the wait was too long: file removed, log off
//! ```
//!
//! | who | owns | when it dies |
//! |---|---|---|
//! | the job's thread | file and log, until it gives them away | an error ends the job: file removed, log off |
//! | the driver | the job; then [`Warm`] | the process ends; the file is unsealed |

mod converge;
mod job;
mod progress;

pub use converge::{Convergence, Limits, Round, Verdict};
pub use job::{Job, JobError, Options, Warm};
pub use progress::{Phase, Progress, Watched};
