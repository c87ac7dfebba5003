//! The ACPI tables (ACPI 6.5, chapter 5): just what a guest needs to find processors, the interrupt
//! chips, the PCI bus, the serial port, the power button and the way to switch off.

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, aml};
use crate::{GuestMemory, layout};

const LOCAL_APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 0x06;
const HEADER_BYTES: usize = 36;

/// Writes all tables; returns the RSDP's address.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<u64, BootError> {
    let tables = build(vcpus, layout::ACPI_START);
    memory
        .write_slice(&tables, GuestAddress(layout::ACPI_START))
        .map_err(|source| BootError::Memory { what: "the ACPI tables", source })?;
    Ok(layout::ACPI_START)
}

/// All tables as one block to be placed at `base`, the RSDP first.
fn build(vcpus: u8, base: u64) -> Vec<u8> {
    const RSDP_BYTES: usize = 36;
    let mut block = vec![0; RSDP_BYTES];
    let mut place = |table: Vec<u8>| {
        block.resize(block.len().next_multiple_of(64), 0);
        let address = base + block.len() as u64;
        block.extend(table);
        address
    };
    let facs = place(facs());
    let dsdt = place(dsdt());
    let fadt = place(fadt(dsdt, facs));
    let madt = place(madt(vcpus));
    let xsdt = place(table(b"XSDT", 1, &[fadt.to_le_bytes(), madt.to_le_bytes()].concat()));
    block[..RSDP_BYTES].copy_from_slice(&rsdp(xsdt));
    block
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// A table with its standard header.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let length = (HEADER_BYTES + body.len()) as u32;
    let mut raw = Vec::with_capacity(length as usize);
    raw.extend(signature);
    raw.extend(length.to_le_bytes());
    raw.extend([revision, 0]);
    raw.extend(b"BELLWEBELLWTHR");
    raw.extend(1u32.to_le_bytes());
    raw.extend(b"BELL");
    raw.extend(1u32.to_le_bytes());
    raw.extend(body);
    raw[9] = checksum(&raw);
    raw
}

fn rsdp(xsdt: u64) -> [u8; 36] {
    let mut raw = [0; 36];
    raw[..8].copy_from_slice(b"RSD PTR ");
    raw[9..15].copy_from_slice(b"BELLWE");
    raw[15] = 2;
    raw[20] = 36;
    raw[24..32].copy_from_slice(&xsdt.to_le_bytes());
    raw[8] = checksum(&raw[..20]);
    raw[32] = checksum(&raw);
    raw
}

fn facs() -> Vec<u8> {
    let mut raw = vec![0; 64];
    raw[..4].copy_from_slice(b"FACS");
    raw[4] = 64;
    raw
}

/// A register in port space: (space, bits, offset, access size, address).
fn port_register(bits: u8, access: u8, port: u64) -> [u8; 12] {
    let mut raw = [1, bits, 0, access, 0, 0, 0, 0, 0, 0, 0, 0];
    raw[4..].copy_from_slice(&port.to_le_bytes());
    raw
}

/// The fixed hardware: a power button, sleep control and the reset register.
fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    /// WBINVD works, C1 works, no fixed sleep button, a reset register.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 10;
    /// No VGA, no CMOS clock, no 8042.
    const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
    let event = layout::PM1_EVENT_PORT;
    let control = layout::PM1_CONTROL_PORT;
    let mut raw = table(b"FACP", 5, &[0; 268 - HEADER_BYTES]);
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(36, &(facs as u32).to_le_bytes());
    put(40, &(dsdt as u32).to_le_bytes());
    put(46, &(layout::SCI_IRQ as u16).to_le_bytes());
    put(56, &u32::from(event).to_le_bytes());
    put(64, &u32::from(control).to_le_bytes());
    put(88, &[4, 2]);
    put(96, &101u16.to_le_bytes());
    put(98, &1001u16.to_le_bytes());
    put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &port_register(8, 1, RESET_PORT));
    put(128, &[RESET_VALUE]);
    put(140, &dsdt.to_le_bytes());
    put(148, &port_register(32, 2, u64::from(event)));
    put(172, &port_register(16, 2, u64::from(control)));
    raw[9] = 0;
    raw[9] = checksum(&raw);
    raw
}

fn madt(vcpus: u8) -> Vec<u8> {
    const PCAT_COMPATIBLE: u32 = 1;
    const LEVEL_ACTIVE_HIGH: u16 = 0b1101;
    let mut body = [LOCAL_APIC.to_le_bytes(), PCAT_COMPATIBLE.to_le_bytes()].concat();
    for id in 0..vcpus {
        body.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(IOAPIC.to_le_bytes());
    body.extend([0; 4]);
    body.extend([2, 10, 0, layout::SCI_IRQ as u8]);
    body.extend(layout::SCI_IRQ.to_le_bytes());
    body.extend(LEVEL_ACTIVE_HIGH.to_le_bytes());
    // LINT1 of every processor is the NMI.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 4, &body)
}

fn dsdt() -> Vec<u8> {
    const PCI_BRIDGE: u16 = 0x0a03;
    const SERIAL: u16 = 0x0501;
    let bridge = aml::device(
        *b"PCI0",
        &[
            aml::name(*b"_HID", &aml::pnp_id(PCI_BRIDGE)),
            aml::name(
                *b"_CRS",
                &aml::resources(&[
                    aml::word_range(2, 0, 0, 0),
                    aml::io(0xcf8, 8),
                    aml::word_range(1, 3, 0, 0xcf7),
                    aml::word_range(1, 3, 0xd00, 0xffff),
                    aml::dword_memory(
                        layout::PCI_WINDOW_START as u32,
                        (layout::PCI_WINDOW_END - 1) as u32,
                    ),
                ]),
            ),
        ],
    );
    let serial = aml::device(
        *b"COM1",
        &[
            aml::name(*b"_HID", &aml::pnp_id(SERIAL)),
            aml::name(*b"_UID", &aml::byte(1)),
            aml::name(
                *b"_CRS",
                &aml::resources(&[aml::io(layout::SERIAL_PORT, 8), aml::irq(layout::SERIAL_IRQ)]),
            ),
        ],
    );
    let mut body = aml::scope(*b"_SB_", &[bridge, serial]);
    // Sleep type 0 of the control port means off.
    body.extend(aml::name(*b"_S5_", &aml::package(&[0, 0])));
    table(b"DSDT", 2, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(raw: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(raw[at..at + 8].try_into().unwrap())
    }

    /// What a compiler writes of itself: checksum, its name and its version.
    fn without_compiler(mut raw: Vec<u8>) -> Vec<u8> {
        raw[9] = 0;
        raw[28..36].fill(0);
        raw
    }

    /// Takes a table apart and puts it together again with the reference implementation's compiler.
    fn recompiled(name: &str, table: &[u8]) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = |kind: &str| directory.path().join(format!("{name}.{kind}"));
        std::fs::write(path("dat"), table).unwrap();
        let iasl = |option: &str, file: &std::path::Path| {
            let output = std::process::Command::new("iasl").arg(option).arg(file).output();
            let output =
                output.expect("iasl is there: `cargo xtask setup`, or the package acpica-tools");
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(output.status.success(), "{name}: {text}");
            text
        };
        iasl("-d", &path("dat"));
        let text = iasl("-oa", &path("dsl"));
        assert!(text.contains("0 Errors, 0 Warnings"), "{name}: {text}");
        std::fs::read(path("aml")).unwrap()
    }

    #[test]
    fn the_reference_compiler_reads_and_writes_the_same_tables() {
        let facs = facs();
        for vcpus in [1, 8] {
            for (name, table) in [
                ("facs", facs.clone()),
                ("dsdt", dsdt()),
                ("facp", fadt(0xe_0100, 0xe_0040)),
                ("apic", madt(vcpus)),
                ("xsdt", table(b"XSDT", 1, &[0xe_0400u64.to_le_bytes(); 2].concat())),
            ] {
                let again = recompiled(name, &table);
                match name {
                    "facs" => assert_eq!(again, table, "{name}"),
                    _ => assert_eq!(without_compiler(again), without_compiler(table), "{name}"),
                }
            }
        }
    }

    #[test]
    fn a_guest_that_follows_the_pointers_finds_every_table_whole() {
        let base = layout::ACPI_START;
        let block = build(8, base);
        assert!(block.len() as u64 <= layout::ACPI_END - base);
        assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
        let table_at = |address: u64| {
            let at = (address - base) as usize;
            let length = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap()) as usize;
            let raw = &block[at..at + length];
            assert_eq!(sum(raw), 0, "checksum of {:?}", std::str::from_utf8(&raw[..4]));
            raw
        };
        let xsdt = table_at(u64_at(&block, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table_at(u64_at(xsdt, 36));
        let madt = table_at(u64_at(xsdt, 44));
        assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 268));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(&table_at(u64_at(fadt, 140))[..4], b"DSDT");
        assert_eq!(madt.len(), 44 + 8 * 8 + 12 + 10 + 6);
    }
}
