//! The agent of one Bellwether node: it runs the VMM processes that the controllers order, reports
//! what it sees, and holds the node's lease.
//!
//! ```text
//!   controllers --orders--> [service] --> [registry] --> [owner] one task for each VM --> VMM process
//!        ^                                                  |                                ^
//!        |                                                  v                                |
//!        +---- register, renew ---- [renewal] <-- [board] observations     [desk] lease page-+
//! ```
//!
//! - [`service`]: the Agent service (`agent.proto`), for controllers only.
//! - [`registry`], [`owner`]: who may do what to which VM; decisions are in `bellwether-agent-core`.
//! - [`renewal`], [`desk`], [`board`]: registration, lease, grants and observations.
//! - [`fencing`]: what the fencer promises, and the grants that it pets the watchdog under.
//! - [`launch`], [`process`], [`runtime_dir`], [`vmm`]: processes that outlive the agent.
//! - [`heartbeat`]: on the storage; what this node does when it alone hears no controller.
//! - [`storage`], [`inspect`]: the shared storage.
//!
//! *Who owns what.* A VM's record belongs to its owner task, the lease to the renewal task, the
//! files of the runtime directory to the running agent (it holds `agent.lock`). *What a crash does*:
//! SIGKILL of the agent ends nothing but the agent; the next one finds every VMM by its directory,
//! checks that the process is the one that was started there, and asks it for its state.
#![forbid(unsafe_code)]

pub mod agent;
pub mod board;
pub mod capacity;
pub mod cli;
pub mod clock;
pub mod config;
pub mod desk;
mod failpoints;
pub mod fencing;
pub mod heartbeat;
pub mod inspect;
pub mod launch;
pub mod node;
pub mod owner;
pub mod process;
pub mod registry;
pub mod renewal;
pub mod runtime_dir;
pub mod service;
pub mod storage;
pub mod terms;
pub mod vmm;
mod wire;
