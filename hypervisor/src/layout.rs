//! The guest's physical address space.
//!
//! ```text
//! 0            RAM: what a boot hands over (below 64 KiB)
//! 0xa_0000     nothing (legacy video, option ROMs)
//! 0xe_0000     RAM, reserved: ACPI tables
//! 0x10_0000    RAM: the kernel and what it makes of the rest, at most up to 3 GiB
//! 0xc000_0000  PCI BARs, 64 KiB for each slot
//! 0xfec0_0000  IOAPIC; 0xfee0_0000 local APIC; 0xfffb_c000 KVM's own pages
//! 1 << 32      RAM beyond 3 GiB
//! ```

/// The hole between low and high memory begins where `bellwether-memory` says.
pub const HOLE_START: u64 = bellwether_memory::RAM_BELOW_4G_MAX;

/// What the 64-bit boot of Linux is handed beside its command line.
pub const GDT: u64 = 0x5000;
pub const BOOT_PARAMS: u64 = 0x9000;
pub const PAGE_TABLES: u64 = 0xa000;
/// PVH's `hvm_start_info`, its list of modules and its memory map.
pub const START_INFO: u64 = 0x6000;
pub const MODULES: u64 = 0x6800;
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line, in both protocols.
pub const CMDLINE: u64 = 0x8000;

/// Conventional memory ends here; legacy devices would follow.
pub const LOW_END: u64 = 0x9_fc00;
/// The BIOS area, in which an RSDP is looked for as well.
pub const ACPI_START: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0x10_0000;
/// A kernel's segments start here or above.
pub const HIGH_START: u64 = 0x10_0000;

/// BARs: one window of this size for each PCI slot.
pub const PCI_WINDOW_START: u64 = HOLE_START;
pub const PCI_WINDOW_END: u64 = 0xfe00_0000;
pub const PCI_SLOT_BYTES: u64 = 0x1_0000;

/// The PCI slots of the devices, fixed, so that one more of a kind moves none of the others.
pub const SLOT_DISKS: usize = 1;
pub const SLOT_RNG: usize = 17;
pub const SLOT_NICS: usize = 18;

/// Ports of the ACPI fixed hardware; the sleep port is where other VMMs have it as well.
pub const PM1_EVENT_PORT: u16 = 0x600;
pub const PM1_CONTROL_PORT: u16 = 0x604;
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_IRQ: u32 = 4;
pub const SCI_IRQ: u32 = 9;
