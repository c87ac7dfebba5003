//! The saved form of an entropy device.

use serde::{Deserialize, Serialize};

use crate::devices::saved::SavedForm;
use crate::devices::virtio::engine::EngineV1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngV1 {
    pub engine: EngineV1,
}

impl SavedForm for RngV1 {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}
