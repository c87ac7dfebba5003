//! The saved form of a block device.

use serde::{Deserialize, Serialize};

use crate::devices::saved::SavedForm;
use crate::devices::virtio::QueueV1;

/// Beside the transport's own section: the disk's shape and the queue, if a driver uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockV1 {
    pub sectors: u64,
    pub read_only: bool,
    pub has_flush: bool,
    pub is_broken: bool,
    pub queue: Option<QueueV1>,
}

impl SavedForm for BlockV1 {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}
