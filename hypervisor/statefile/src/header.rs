//! The header: 4 KiB that tell what the file is, without its body. There are two slots.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `BWSTATE\n` * |
//! | 8 | 4 | format version: 1, or 2 if there are later rounds of memory * |
//! | 12 | 4 | architecture: 1 x86-64, 2 aarch64 * |
//! | 16 | 8 | serial: of two valid slots the higher one counts * |
//! | 24 | 8 | sealed: `SEALED!\n`, or zero |
//! | 32 | 4 | page size |
//! | 36 | 4 | chunk size |
//! | 40 | 16 | VM id, as a UUID in its text order |
//! | 56 | 8 | epoch of the runner that wrote the file |
//! | 64 | 8 | generation: which save of this epoch |
//! | 72 | 24 | chunk table: offset, length, XXH3-64 |
//! | 96 | 24 | section table: offset, length, XXH3-64 |
//! | 120 | 8 | offset of the memory |
//! | 128 | 8 | length of the memory in the file |
//! | 136 | 8 | length of the file |
//! | 144 | 4 | number of memory regions |
//! | 148 | 16 each | memory regions: guest physical start, length |
//! | .. | | zero |
//! | 4088 | 8 | XXH3-64 over the 4088 bytes before * |
//!
//! The fields with a star stay where they are in every future format.
//!
//! ```text
//! slot A: serial 1, unsealed ----- seal(): fdatasync of all data -----> slot B: serial 2, sealed
//! ```
//!
//! A crash while slot B is written leaves slot A, which says "not sealed": the truth.

use std::fmt;

use bellwether_types::{Epoch, VmId};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::{Decoder, Encoder};
use crate::chunk::{CHUNK_SIZE, PAGE_SIZE};
use crate::error::FormatError;
use crate::layout::{Layout, MemoryRegion, REGIONS_MAX};

/// The newest format that this build reads.
pub const FORMAT_VERSION: u32 = FORMAT_ROUNDS;
/// All memory at fixed offsets. A file without later rounds is still written in it.
pub const FORMAT_FIXED: u32 = 1;
/// Memory at fixed offsets, then segments of pages that were written again (pre-copy).
pub const FORMAT_ROUNDS: u32 = 2;
/// The length of a header slot.
pub(crate) const SLOT: usize = 4096;
/// Both slots together; the chunk table follows.
pub(crate) const HEADER_AREA: u64 = 2 * SLOT as u64;

const MAGIC: [u8; 8] = *b"BWSTATE\n";
const SEALED: u64 = u64::from_le_bytes(*b"SEALED!\n");
/// Where the fields begin that may move in a later format.
const SEALED_AT: usize = 24;
const CHECKSUM_AT: usize = SLOT - 8;
/// The architecture of this build, as the format numbers it.
const ARCHITECTURE: u32 = if cfg!(target_arch = "aarch64") { 2 } else { 1 };

/// Whose state a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    pub vm_id: VmId,
    /// The epoch of the runner that writes the file.
    pub epoch: Epoch,
    /// Tells several saves of one epoch apart: a failed migration, then another.
    pub generation: u64,
}

impl Identity {
    /// The name of the file in its directory: `<vm>.<epoch>.<generation>.state`.
    pub fn file_name(&self) -> String {
        format!("{}.{}.{}.state", self.vm_id, self.epoch, self.generation)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM {} epoch {} generation {}", self.vm_id, self.epoch, self.generation)
    }
}

/// Where a table lies and what its bytes add up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableRef {
    pub offset: u64,
    pub length: u64,
    /// XXH3-64 over the bytes of the table.
    pub checksum: u64,
}

/// The decoded header of a state file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// [`FORMAT_FIXED`] or [`FORMAT_ROUNDS`].
    pub version: u32,
    pub identity: Identity,
    /// Guest memory, in ascending order.
    pub regions: Vec<MemoryRegion>,
    /// Of two valid slots the one with the higher serial counts.
    pub serial: u64,
    /// Only a sealed file is complete and may be restored.
    pub sealed: bool,
    pub chunk_table: TableRef,
    pub section_table: TableRef,
    pub data_offset: u64,
    pub data_length: u64,
    pub file_length: u64,
}

impl Header {
    /// The header of a file that has just been created.
    pub(crate) fn unsealed(
        version: u32,
        identity: Identity,
        regions: &[MemoryRegion],
        layout: &Layout,
    ) -> Self {
        Self {
            version,
            identity,
            regions: regions.to_vec(),
            serial: 1,
            sealed: false,
            chunk_table: TableRef {
                offset: HEADER_AREA,
                length: layout.chunk_table_length(),
                checksum: 0,
            },
            section_table: TableRef::default(),
            data_offset: layout.data_offset(),
            data_length: layout.data_end() - layout.data_offset(),
            file_length: layout.data_end(),
        }
    }

    /// The bytes of a slot. At most [`REGIONS_MAX`] regions fit; a [`Layout`] has seen to that.
    pub fn encode(&self) -> [u8; SLOT] {
        debug_assert!(self.regions.len() <= REGIONS_MAX);
        let mut e = Encoder::default();
        e.raw(&MAGIC).u32(self.version).u32(ARCHITECTURE).u64(self.serial);
        e.u64(if self.sealed { SEALED } else { 0 });
        e.u32(PAGE_SIZE as u32).u32(CHUNK_SIZE as u32);
        e.raw(self.identity.vm_id.uuid().as_bytes());
        e.u64(self.identity.epoch.0).u64(self.identity.generation);
        for table in [&self.chunk_table, &self.section_table] {
            e.u64(table.offset).u64(table.length).u64(table.checksum);
        }
        e.u64(self.data_offset).u64(self.data_length).u64(self.file_length);
        e.u32(self.regions.len() as u32);
        for region in &self.regions {
            e.u64(region.start).u64(region.length);
        }
        let fields = e.into_bytes();
        let mut slot = [0; SLOT];
        slot[..fields.len()].copy_from_slice(&fields);
        let checksum = xxh3_64(&slot[..CHECKSUM_AT]);
        slot[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    /// Reads the header out of the first bytes of a file (both slots, or what there is of them),
    /// and gives the offset of the slot that counts. It never panics, whatever the bytes are.
    pub fn decode(area: &[u8]) -> Result<(Self, usize), FormatError> {
        let slots = area.chunks(SLOT).take(2).enumerate();
        let valid = slots
            .filter_map(|(index, slot)| Some((envelope(slot)?, index)))
            .max_by_key(|(envelope, index)| (envelope.serial, *index));
        let Some((envelope, index)) = valid else {
            let magic = area.chunks(SLOT).take(2).any(|slot| slot.starts_with(&MAGIC));
            return Err(if magic {
                FormatError::HeaderDamaged
            } else {
                FormatError::NotAStateFile
            });
        };
        if envelope.version > FORMAT_VERSION {
            return Err(FormatError::NewerFormat { found: envelope.version });
        }
        if envelope.version == 0 {
            return Err(FormatError::Inconsistent { what: "format version 0" });
        }
        if envelope.architecture != ARCHITECTURE {
            let found = envelope.architecture;
            return Err(FormatError::OtherArchitecture { found, ours: ARCHITECTURE });
        }
        let header = decode_body(&envelope)?;
        header.check()?;
        Ok((header, index * SLOT))
    }

    /// Checks that the fields agree with each other. What passes is safe to compute with.
    fn check(&self) -> Result<(), FormatError> {
        let inconsistent = |what| Err(FormatError::Inconsistent { what });
        let layout = Layout::new(&self.regions)?;
        if self.chunk_table.offset != HEADER_AREA
            || self.chunk_table.length != layout.chunk_table_length()
        {
            return inconsistent("chunk table");
        }
        if self.data_offset != layout.data_offset()
            || self.data_length != layout.data_end() - layout.data_offset()
            || self.file_length < layout.data_end()
        {
            return inconsistent("memory");
        }
        let table_end = self.section_table.offset.checked_add(self.section_table.length);
        if self.sealed
            && (self.section_table.offset < layout.data_end()
                || table_end != Some(self.file_length))
        {
            return inconsistent("section table");
        }
        Ok(())
    }
}

/// The fields of a slot that keep their places for ever.
struct Envelope<'a> {
    version: u32,
    architecture: u32,
    serial: u64,
    body: &'a [u8],
}

/// The envelope of a whole, undamaged slot.
fn envelope(slot: &[u8]) -> Option<Envelope<'_>> {
    let mut d = Decoder::new(slot);
    if d.raw(MAGIC.len())? != MAGIC || slot.len() != SLOT {
        return None;
    }
    let (version, architecture, serial) = (d.u32()?, d.u32()?, d.u64()?);
    let (covered, checksum) = slot.split_at_checked(CHECKSUM_AT)?;
    if u64::from_le_bytes(checksum.try_into().ok()?) != xxh3_64(covered) {
        return None;
    }
    let body = covered.get(SEALED_AT..)?;
    Some(Envelope { version, architecture, serial, body })
}

fn decode_body(envelope: &Envelope<'_>) -> Result<Header, FormatError> {
    let mut d = Decoder::new(envelope.body);
    let short = || FormatError::Inconsistent { what: "too short" };
    let sealed = match d.u64().ok_or_else(short)? {
        0 => false,
        SEALED => true,
        _ => return Err(FormatError::Inconsistent { what: "sealed marker" }),
    };
    let (pages, chunks) = (d.u32().ok_or_else(short)?, d.u32().ok_or_else(short)?);
    if u64::from(pages) != PAGE_SIZE || u64::from(chunks) != CHUNK_SIZE {
        return Err(FormatError::OtherSizes { pages, chunks });
    }
    let header = decode_fields(&mut d, envelope, sealed).ok_or_else(short)?;
    if header.regions.len() > REGIONS_MAX || d.rest().iter().any(|byte| *byte != 0) {
        return Err(FormatError::Inconsistent { what: "unknown fields" });
    }
    Ok(header)
}

fn decode_fields(d: &mut Decoder<'_>, envelope: &Envelope<'_>, sealed: bool) -> Option<Header> {
    let vm_id = VmId::from_uuid(Uuid::from_bytes(d.array()?));
    let identity = Identity { vm_id, epoch: Epoch(d.u64()?), generation: d.u64()? };
    let mut table = || Some(TableRef { offset: d.u64()?, length: d.u64()?, checksum: d.u64()? });
    let (chunk_table, section_table) = (table()?, table()?);
    let (data_offset, data_length, file_length) = (d.u64()?, d.u64()?, d.u64()?);
    let count = d.u32()?;
    // The slot ends the list soon enough, whatever the count says.
    let mut regions = Vec::new();
    for _ in 0..count {
        regions.push(MemoryRegion { start: d.u64()?, length: d.u64()? });
    }
    Some(Header {
        version: envelope.version,
        identity,
        regions,
        serial: envelope.serial,
        sealed,
        chunk_table,
        section_table,
        data_offset,
        data_length,
        file_length,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(serial: u64) -> Header {
        let identity =
            Identity { vm_id: VmId::from_uuid(Uuid::from_u128(7)), epoch: Epoch(3), generation: 4 };
        let regions = [MemoryRegion { start: 0, length: 1 << 21 }];
        let layout = Layout::new(&regions).unwrap();
        Header { serial, ..Header::unsealed(FORMAT_FIXED, identity, &regions, &layout) }
    }

    fn area(a: &Header, b: &Header) -> Vec<u8> {
        [a.encode(), b.encode()].concat()
    }

    /// Changes a slot and makes its checksum right again.
    fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut slot = sample(1).encode();
        slot[at..at + bytes.len()].copy_from_slice(bytes);
        let checksum = xxh3_64(&slot[..CHECKSUM_AT]);
        slot[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        slot.to_vec()
    }

    #[test]
    fn the_higher_serial_counts_and_a_torn_slot_gives_way() {
        let mut bytes = area(&sample(1), &sample(2));
        assert_eq!(Header::decode(&bytes).unwrap(), (sample(2), SLOT));
        bytes[SLOT + 60] ^= 1;
        assert_eq!(Header::decode(&bytes).unwrap(), (sample(1), 0));
        bytes[60] ^= 1;
        assert_eq!(Header::decode(&bytes), Err(FormatError::HeaderDamaged));
        assert_eq!(Header::decode(&bytes[..100]), Err(FormatError::HeaderDamaged));
        assert_eq!(Header::decode(b"not a state file"), Err(FormatError::NotAStateFile));
        assert_eq!(Header::decode(b""), Err(FormatError::NotAStateFile));
    }

    #[test]
    fn each_foreign_field_has_its_own_error() {
        let decode = |at, bytes: &[u8]| Header::decode(&patched(at, bytes)).unwrap_err();
        assert_eq!(decode(8, &9u32.to_le_bytes()), FormatError::NewerFormat { found: 9 });
        assert!(matches!(decode(12, &9u32.to_le_bytes()), FormatError::OtherArchitecture { .. }));
        assert!(matches!(decode(32, &[1]), FormatError::OtherSizes { .. }));
        assert!(matches!(decode(24, &[1]), FormatError::Inconsistent { what: "sealed marker" }));
        assert!(matches!(decode(72, &[1]), FormatError::Inconsistent { what: "chunk table" }));
        assert!(matches!(decode(120, &[1]), FormatError::Inconsistent { what: "memory" }));
        assert!(matches!(
            decode(144, &[200]),
            FormatError::Memory(_) | FormatError::Inconsistent { .. }
        ));
        assert!(matches!(decode(4000, &[1]), FormatError::Inconsistent { what: "unknown fields" }));
    }

    #[test]
    fn a_newer_format_says_what_to_do() {
        let text = Header::decode(&patched(8, &7u32.to_le_bytes())).unwrap_err().to_string();
        assert!(text.contains("newer Bellwether, format 7, this one reads up to 2"), "{text}");
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn random_fields_under_a_right_checksum_never_panic(
            at in 8usize..700, bytes in proptest::collection::vec(any::<u8>(), 1..64),
        ) {
            let _outcome = Header::decode(&patched(at, &bytes));
        }
    }
}
