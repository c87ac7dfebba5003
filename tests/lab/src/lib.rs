//! The lab: a cluster of real hosts on one machine. Each host is a machine under software
//! emulation with Debian's kernel and KVM, so that power is cut, hosts freeze and cables are
//! pulled in earnest, and no privileges, no KVM and no devices of this machine are needed.
//!
//! ```text
//! lab process                                   a host (QEMU)
//!   timeline  <------- console, log ----------  kernel, journald
//!   channel   <------- control channel ------>  lab agent: runs programs, follows guests
//!   fabric    <------- a cable per network -->  management, storage, guests
//!   machine   -------- power, freeze -------->  the process itself
//!   supply    <------- control channel -------  `fence_lab`, a fence agent: power switches
//! ```
#![forbid(unsafe_code)]

pub mod channel;
pub mod cluster;
pub mod console;
pub mod door;
pub mod fabric;
pub mod failover;
pub mod journal;
pub mod lab;
pub mod machine;
pub mod monitor;
pub mod scenario;
pub mod shell;
pub mod supply;
pub mod timeline;
pub mod traces;
pub mod visitor;
pub mod watch;
pub mod wire;
