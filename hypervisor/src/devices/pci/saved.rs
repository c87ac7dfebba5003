//! The saved form of the host bridge's ports.

use serde::{Deserialize, Serialize};

use crate::devices::saved::SavedForm;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciHostV1 {
    /// The last value written to port 0xcf8.
    pub address: u32,
}

impl SavedForm for PciHostV1 {
    const KIND: &'static str = "pci-host";
    const VERSION: u32 = 1;
}
