//! Device sections: the saved form of each device, by name and version.
//!
//! The section table is a row of records: kind (4 bytes), version (4), offset (8), length (8),
//! XXH3-64 of the payload (8), length of the name (4), name. Kinds: 1 is the state of a device,
//! named like `virtio-blk.0`; 2 is the memory at fixed offsets, exactly once, its checksum is that
//! of the chunk table; 3 is the segment table of later rounds of memory, exactly once in format 2
//! and never in format 1. A kind that this build does not know is an error: to leave out what one
//! does not understand would be to guess.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::{Decoder, Encoder};
use crate::error::{FormatError, StateFileError, invalid};
use crate::header::{FORMAT_ROUNDS, Header};
use crate::segment;

const KIND_DEVICE: u32 = 1;
const KIND_MEMORY_FIXED: u32 = 2;
/// The table of the segments that hold pages which were written again during pre-copy.
const KIND_MEMORY_ROUNDS: u32 = 3;

/// The longest name of a section.
pub const NAME_LENGTH_MAX: usize = 128;
/// The largest payload of one section, 64 MiB: real devices take kilobytes.
pub const PAYLOAD_MAX: u64 = 64 << 20;
/// The most sections of one file.
pub const SECTIONS_MAX: usize = 4096;
/// The largest section table that is read.
pub(crate) const TABLE_MAX: u64 = (SECTIONS_MAX * (NAME_LENGTH_MAX + 36)) as u64;

/// The saved state of one device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Section {
    /// Which device, like `virtio-blk.0`; unique in its file.
    pub kind: String,
    /// The version of the payload, the device's own.
    pub version: u32,
    pub bytes: Vec<u8>,
}

/// The device sections of a file. Each is taken exactly once; none may be left over.
#[derive(Debug)]
pub struct Sections {
    path: PathBuf,
    left: Vec<Section>,
}

impl Sections {
    pub(crate) fn new(path: &Path, left: Vec<Section>) -> Self {
        Self { path: path.to_owned(), left }
    }

    /// Takes a section that must be there.
    pub fn take(&mut self, kind: &str) -> Result<Section, StateFileError> {
        let missing = || FormatError::SectionMissing { kind: kind.to_owned() };
        self.take_if_present(kind).ok_or_else(missing).map_err(invalid(&self.path))
    }

    /// Takes a section that may be there.
    pub fn take_if_present(&mut self, kind: &str) -> Option<Section> {
        let index = self.left.iter().position(|section| section.kind == kind)?;
        Some(self.left.swap_remove(index))
    }

    /// Ends the reading; an error if a section was not taken.
    pub fn finish(self) -> Result<(), StateFileError> {
        if self.left.is_empty() {
            return Ok(());
        }
        let mut kinds: Vec<_> = self.left.into_iter().map(|section| section.kind).collect();
        kinds.sort();
        Err(invalid(&self.path)(FormatError::SectionsLeft { kinds: kinds.join(", ") }))
    }
}

/// A record of the section table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) version: u32,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) checksum: u64,
}

impl Record {
    /// The record of a payload at this offset; refuses what no reader would take.
    pub(crate) fn of(
        kind: &str,
        version: u32,
        bytes: &[u8],
        offset: u64,
    ) -> Result<Self, FormatError> {
        let bad = |why| Err(FormatError::BadSection { kind: kind.to_owned(), why });
        if kind.is_empty() || kind.len() > NAME_LENGTH_MAX {
            return bad("its name is empty or too long");
        }
        if bytes.len() as u64 > PAYLOAD_MAX {
            return bad("its payload is too large");
        }
        let (length, checksum) = (bytes.len() as u64, xxh3_64(bytes));
        Ok(Self { name: kind.to_owned(), version, offset, length, checksum })
    }

    /// Whether this is the payload that was written.
    pub(crate) fn check(&self, payload: &[u8]) -> Result<(), FormatError> {
        if xxh3_64(payload) == self.checksum {
            return Ok(());
        }
        Err(FormatError::SectionDamaged { kind: self.name.clone() })
    }
}

/// What a section table says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Table {
    pub(crate) devices: Vec<Record>,
    /// The segment table of a file with later rounds.
    pub(crate) rounds: Option<Record>,
}

/// The section table: the memory, its later rounds, then the devices.
pub(crate) fn encode_table(
    header: &Header,
    rounds: Option<&Record>,
    devices: &[Record],
) -> Vec<u8> {
    let mut e = Encoder::default();
    encode_record(&mut e, KIND_MEMORY_FIXED, &memory_record(header));
    rounds.into_iter().for_each(|record| encode_record(&mut e, KIND_MEMORY_ROUNDS, record));
    devices.iter().for_each(|record| encode_record(&mut e, KIND_DEVICE, record));
    e.into_bytes()
}

fn encode_record(e: &mut Encoder, kind: u32, record: &Record) {
    e.u32(kind).u32(record.version).u64(record.offset).u64(record.length);
    e.u64(record.checksum).u32(record.name.len() as u32).raw(record.name.as_bytes());
}

/// The one record that says where the memory is: what the header says as well.
fn memory_record(header: &Header) -> Record {
    Record {
        name: String::new(),
        version: 1,
        offset: header.data_offset,
        length: header.data_length,
        checksum: header.chunk_table.checksum,
    }
}

/// The records of a section table, all checked against the header. Never panics.
pub(crate) fn decode_table(header: &Header, bytes: &[u8]) -> Result<Table, FormatError> {
    let inconsistent = |what| FormatError::Inconsistent { what };
    let (mut table, mut memory) = (Table::default(), false);
    let mut d = Decoder::new(bytes);
    while !d.rest().is_empty() {
        let (kind, record) = decode_record(&mut d).ok_or(inconsistent("section table is torn"))?;
        match kind {
            KIND_DEVICE => {
                check_device(header, &table.devices, &record)?;
                table.devices.push(record);
            }
            KIND_MEMORY_FIXED if !memory && record == memory_record(header) => memory = true,
            KIND_MEMORY_FIXED => return Err(inconsistent("memory section")),
            KIND_MEMORY_ROUNDS if header.version >= FORMAT_ROUNDS => {
                check_rounds(header, table.rounds.as_ref(), &record)?;
                table.rounds = Some(record);
            }
            _ => return Err(FormatError::UnknownSection { kind, name: record.name }),
        }
    }
    if !memory {
        return Err(inconsistent("no memory section"));
    }
    if table.rounds.is_none() && header.version >= FORMAT_ROUNDS {
        return Err(inconsistent("no segment table"));
    }
    Ok(table)
}

fn decode_record(d: &mut Decoder<'_>) -> Option<(u32, Record)> {
    let (kind, version) = (d.u32()?, d.u32()?);
    let (offset, length, checksum) = (d.u64()?, d.u64()?, d.u64()?);
    let name_length = d.u32()? as usize;
    let name = String::from_utf8_lossy(d.raw(name_length)?).into_owned();
    Some((kind, Record { name, version, offset, length, checksum }))
}

fn check_device(header: &Header, before: &[Record], record: &Record) -> Result<(), FormatError> {
    if before.len() >= SECTIONS_MAX {
        return Err(FormatError::Inconsistent { what: "too many sections" });
    }
    if before.iter().any(|other| other.name == record.name) {
        return Err(FormatError::DuplicateSection { kind: record.name.clone() });
    }
    if record.name.is_empty() || record.length > PAYLOAD_MAX || !is_inside(header, record) {
        return Err(FormatError::Inconsistent { what: "section out of place" });
    }
    Ok(())
}

fn check_rounds(
    header: &Header,
    before: Option<&Record>,
    record: &Record,
) -> Result<(), FormatError> {
    let sized =
        record.length <= segment::TABLE_MAX && record.length.is_multiple_of(segment::ROW_SIZE);
    let known = record.version == 1 && record.name.is_empty();
    if before.is_some() || !sized || !known || !is_inside(header, record) {
        return Err(FormatError::Inconsistent { what: "segment table" });
    }
    Ok(())
}

/// Whether the payload lies between the memory and the section table.
fn is_inside(header: &Header, record: &Record) -> bool {
    let end = record.offset.checked_add(record.length);
    record.offset >= header.data_offset + header.data_length
        && end.is_some_and(|end| end <= header.section_table.offset)
}

#[cfg(test)]
mod tests {
    use bellwether_types::{Epoch, VmId};
    use proptest::prelude::*;

    use super::*;
    use crate::header::{FORMAT_FIXED, Identity};
    use crate::layout::{Layout, MemoryRegion};

    fn header() -> Header {
        let vm_id = VmId::from_uuid(uuid::Uuid::nil());
        let identity = Identity { vm_id, epoch: Epoch(1), generation: 1 };
        let regions = [MemoryRegion { start: 0, length: 4096 }];
        let layout = Layout::new(&regions).unwrap();
        let mut header = Header::unsealed(FORMAT_FIXED, identity, &regions, &layout);
        header.section_table.offset = header.file_length + 100;
        header
    }

    fn record(name: &str) -> Record {
        Record::of(name, 3, b"payload", header().file_length).unwrap()
    }

    #[test]
    fn a_table_survives_its_bytes() {
        let records = [record("vcpu.0"), record("serial")];
        let bytes = encode_table(&header(), None, &records);
        let table = Table { devices: records.to_vec(), rounds: None };
        assert_eq!(decode_table(&header(), &bytes).unwrap(), table);
    }

    #[test]
    fn rounds_belong_to_format_2_exactly_once() {
        let header = Header { version: FORMAT_ROUNDS, ..header() };
        let rounds = Record {
            name: String::new(),
            version: 1,
            offset: header.file_length,
            length: 48,
            checksum: 5,
        };
        let decode = |rounds: Option<&Record>, header: &Header| {
            decode_table(header, &encode_table(header, rounds, &[record("a")]))
        };
        let table = decode(Some(&rounds), &header).unwrap();
        assert_eq!((table.rounds.as_ref(), table.devices.len()), (Some(&rounds), 1));
        assert!(decode(None, &header).is_err());
        assert!(matches!(
            decode(Some(&rounds), &self::header()),
            Err(FormatError::UnknownSection { kind: KIND_MEMORY_ROUNDS, .. })
        ));
        for bad in [
            Record { length: 47, ..rounds.clone() },
            Record { version: 2, ..rounds.clone() },
            Record { offset: 0, ..rounds.clone() },
            Record { name: "x".into(), ..rounds.clone() },
        ] {
            assert!(decode(Some(&bad), &header).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn each_mistake_has_its_own_error() {
        let twice = encode_table(&header(), None, &[record("a"), record("a")]);
        assert!(matches!(
            decode_table(&header(), &twice),
            Err(FormatError::DuplicateSection { .. })
        ));
        let mut round = encode_table(&header(), None, &[record("a")]);
        round[36] = 9;
        assert!(matches!(
            decode_table(&header(), &round),
            Err(FormatError::UnknownSection { kind: 9, .. })
        ));
        let table = encode_table(&header(), None, &[record("a")]);
        assert!(decode_table(&header(), &table[..table.len() - 1]).is_err());
        assert!(decode_table(&header(), &table[36..]).is_err());
        let outside = Record { offset: 0, ..record("a") };
        assert!(decode_table(&header(), &encode_table(&header(), None, &[outside])).is_err());
        assert!(Record::of("", 1, b"", 0).is_err());
    }

    #[test]
    fn leftovers_are_an_error_that_names_them() {
        let section = |kind: &str| Section { kind: kind.into(), version: 1, bytes: vec![] };
        let mut sections =
            Sections::new(Path::new("/x.state"), vec![section("b"), section("a"), section("c")]);
        assert_eq!(sections.take("a").unwrap().kind, "a");
        let again = sections.take("a").unwrap_err();
        assert!(matches!(again.problem(), Some(FormatError::SectionMissing { .. })));
        let text = sections.finish().unwrap_err().to_string();
        assert!(text.contains("/x.state") && text.contains("b, c"), "{text}");
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _outcome = decode_table(&header(), &bytes);
        }
    }
}
