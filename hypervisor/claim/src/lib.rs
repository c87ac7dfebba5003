//! The storage arbiter: who may run a VM is decided by the storage that holds its disks.
//!
//! A VMM runs a VM only while it holds the VM's **claim** (a lock on a small file beside the disks,
//! with a record in it) and a **lock on each of its disks**. It holds them all its life, and the
//! kernel lets them go when it dies, however it dies.
//!
//! ```text
//!  node 1                          storage                           node 2
//!  VMM epoch 7                 <vm>.claim                            start command, epoch 8
//!    |-- OFD write lock --------->[ locked ]<---------- F_OFD_SETLK ----|
//!    |-- record: epoch 7 -------->[ epoch 7 ]                           |  refused: Held { by: epoch 7 }
//!    |   guest runs, writes       [         ]<---------- retry ---------|  refused
//!    X   killed / power lost      [ unlocked]                           |
//!        (kernel, or the NFS      [ locked  ]<---------- retry ---------|  granted
//!         server's lease)         [ epoch 8 ]<---------- record --------|  fdatasync, then the guest runs
//!                                 [         ]                           |
//!  a start command of epoch 7, late, anywhere:
//!    |-- lock (after 8 let go) -->[ epoch 8 ]
//!    |<-- refused: Superseded { stored: 8, ours: 7 }
//! ```
//!
//! **Two holders are impossible on one kernel.** An open file description lock (`F_OFD_SETLK`,
//! fcntl(2)) belongs to the open file. The kernel grants a write lock on a range of an inode to one
//! open file at a time, under one spin lock. It ends when the last descriptor of that file is
//! closed, which the kernel does for every process that ends, SIGKILL included; not when some
//! other descriptor of the same inode is closed, which is the trap of the older POSIX locks.
//!
//! **Two holders are impossible on NFSv4.** The client turns the lock into a LOCK operation
//! (RFC 8881, section 18.10); the server grants it to one owner of one client, under that client's
//! lease. A client that is cut off for longer than the lease (90 s by default) loses its locks *at
//! the server*, and only then can another client have them. The old client's open file is then
//! marked: its writes fail with EIO instead of reaching the disk, as long as the module parameter
//! `nfs.recover_lost_locks` is off. [`check_mount`] refuses what breaks this chain: NFSv3 (its locks
//! are a protocol beside the data path), `nolock`, `local_lock`, `soft`, `nocto`, and that parameter.
//!
//! **What the epoch adds.** A lock says that nobody else runs the VM *now*. It does not say that we
//! should: a start command can be delayed (a frozen agent, a retried message) until the VM has run
//! elsewhere and stopped again. The record keeps the highest epoch that ever held the claim, on the
//! storage itself, so a command with an older epoch is refused by the storage, even if nobody can be
//! asked. A record of the same epoch is taken over only by the same start command: same node, same
//! boot, same nonce.
//!
//! **What it does not do.** Locks bind those who ask for them. A person who deletes the claim file
//! of a running VM makes the next claim succeed; the disk locks then still stand in the way.
#![deny(unsafe_code)]

mod claim;
mod disk;
mod mount;
mod ofd;
pub mod record;
mod retry;
pub mod trial;

pub use claim::{Claim, ClaimError, ClaimView, claim_path};
pub use disk::{DiskLock, DiskLockError};
pub use mount::{MountError, MountProblem, StorageClass, check_mount, classify};
pub use record::ClaimRecord;
