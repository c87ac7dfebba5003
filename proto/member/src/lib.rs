//! Becoming a member of a cluster, and the files by which a member knows that it is one.
//!
//! A member is one controller or one agent on one host. It lives in a *data directory*, which
//! holds its certificate, its key, the cluster's CA and `member.toml` ([`MemberConfig`]). There are
//! two ways to get one: [`init_cluster`] makes the first controller of a new cluster, [`join`] makes
//! every later member with a token from an administrator.
//!
//! ```text
//!   (nothing) --init_cluster--> complete data directory of controller 1, bootstrap = true
//!   (nothing) --join----------> complete data directory of a controller or an agent
//! ```
//!
//! Both write into a sibling of the data directory and rename it into place as the last step. So a
//! data directory either is complete or does not exist; a crash leaves at most a sibling named
//! `.NAME.new-PID`, which nothing reads and which may be removed.
#![forbid(unsafe_code)]

mod call;
mod config;
mod error;
mod files;
mod init;
mod join;
mod storage;
mod wire;

pub use bellwether_types::{MemberRole, Ports};
pub use call::{CallFailure, not_started};
pub use config::{KnownController, MEMBER_FILE, MemberConfig, check_name, open_member};
pub use error::MemberError;
pub use files::{create_private_dir, write_atomic};
pub use init::{AdminFiles, CERTIFICATE_DAYS, InitOptions, InitReport, init_cluster};
pub use join::{JoinOptions, join};
pub use storage::{STORAGE_MARK, storage_owner};
