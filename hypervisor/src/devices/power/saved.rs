//! The saved form of the ACPI fixed hardware.

use serde::{Deserialize, Serialize};

use crate::devices::saved::SavedForm;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmV1 {
    pub status: u16,
    pub enable: u16,
    pub control: u16,
}

impl SavedForm for AcpiPmV1 {
    const KIND: &'static str = "acpi-pm";
    const VERSION: u32 = 1;
}
