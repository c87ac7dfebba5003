//! The saved form of a network card. Packets that are on their way are not in it: a network loses some.

use bellwether_types::Mac;
use serde::{Deserialize, Serialize};

use crate::devices::saved::SavedForm;
use crate::devices::virtio::engine::EngineV1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetV1 {
    pub mac: Mac,
    pub engine: EngineV1,
}

impl SavedForm for NetV1 {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}
