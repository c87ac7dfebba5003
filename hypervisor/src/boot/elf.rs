//! A kernel as an ELF image with a PVH note.
//!
//! The file can be anything: every number in it is checked, and nothing is read that is not bounded.

use super::BootError;
use super::bytes::{u16_at, u32_at, u64_at};
use super::source::Source;
use crate::{GuestMemory, layout};

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PROGRAM_HEADERS_MAX: u16 = 128;
const NOTES_BYTES_MAX: u64 = 64 * 1024;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
/// `XEN_ELFNOTE_PHYS32_ENTRY`
const NOTE_PVH_ENTRY: u32 = 18;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// An opened and checked kernel image.
pub struct Image {
    source: Source,
    segments: Vec<Segment>,
    entry: u32,
}

impl Image {
    /// Whether a file that begins with these bytes is meant to be one.
    pub fn is_one(head: &[u8]) -> bool {
        head.starts_with(b"\x7fELF")
    }

    /// Reads the headers and the notes.
    pub fn new(source: Source) -> Result<Self, BootError> {
        let mut image = Self { source, segments: vec![], entry: 0 };
        image.segments = image.read_segments()?;
        image.entry = image.read_pvh_entry()?;
        Ok(image)
    }

    /// The 32-bit entry point that the PVH note names.
    pub fn entry(&self) -> u32 {
        self.entry
    }

    /// Every segment lies between 1 MiB and `memory_end`. Returns where the last one ends.
    pub fn check_fits(&self, memory_end: u64) -> Result<u64, BootError> {
        let mut image_end = layout::HIGH_START;
        for segment in self.loadable() {
            let Segment { address, memory_bytes: bytes, .. } = *segment;
            if address < layout::HIGH_START {
                return Err(BootError::TooLow { path: self.source.path(), address });
            }
            let end = address.checked_add(bytes).filter(|&end| end <= memory_end);
            let path = self.source.path();
            let end = end.ok_or(BootError::TooLarge { path, address, bytes, end: memory_end })?;
            image_end = image_end.max(end);
        }
        Ok(image_end)
    }

    /// Copies the segments into fresh guest memory, which is zero where the file has nothing.
    pub fn load(&self, memory: &GuestMemory) -> Result<(), BootError> {
        for segment in self.loadable() {
            self.source.copy(memory, segment.offset, segment.file_bytes, segment.address)?;
        }
        Ok(())
    }

    fn loadable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.memory_bytes > 0)
    }

    fn not_elf(&self, why: &'static str) -> BootError {
        BootError::NotElf { path: self.source.path(), why }
    }

    fn read_segments(&self) -> Result<Vec<Segment>, BootError> {
        let mut header = [0; HEADER_BYTES];
        self.source.read(&mut header, 0)?;
        self.check_header(&header)?;
        let table = u64_at(&header, 32);
        let count = u16_at(&header, 56);
        if count == 0 || count > PROGRAM_HEADERS_MAX {
            return Err(self.not_elf("its number of program headers is out of bounds"));
        }
        (0..u64::from(count))
            .map(|index| {
                let offset = table.checked_add(index * PROGRAM_HEADER_BYTES as u64);
                self.read_segment(
                    offset.ok_or_else(|| self.not_elf("a header's offset overflows"))?,
                )
            })
            .collect()
    }

    fn check_header(&self, header: &[u8; HEADER_BYTES]) -> Result<(), BootError> {
        let problem = if header[..4] != *b"\x7fELF" {
            "it does not begin with the ELF magic"
        } else if header[4] != 2 || header[5] != 1 {
            "it is not 64-bit little-endian"
        } else if u16_at(header, 18) != MACHINE_X86_64 {
            "it is for another architecture"
        } else if !matches!(u16_at(header, 16), TYPE_EXECUTABLE | TYPE_SHARED) {
            "it is not executable"
        } else if usize::from(u16_at(header, 54)) != PROGRAM_HEADER_BYTES {
            "its program headers have another size"
        } else {
            return Ok(());
        };
        Err(self.not_elf(problem))
    }

    fn read_segment(&self, at: u64) -> Result<Segment, BootError> {
        let mut raw = [0; PROGRAM_HEADER_BYTES];
        self.source.read(&mut raw, at)?;
        let segment = Segment {
            kind: u32_at(&raw, 0),
            offset: u64_at(&raw, 8),
            address: u64_at(&raw, 24),
            file_bytes: u64_at(&raw, 32),
            memory_bytes: u64_at(&raw, 40),
        };
        if segment.file_bytes > segment.memory_bytes && segment.kind == PT_LOAD {
            return Err(self.not_elf("a segment is larger in the file than in memory"));
        }
        if segment.offset.checked_add(segment.file_bytes).is_none() {
            return Err(self.not_elf("a segment's offset overflows"));
        }
        Ok(segment)
    }

    fn read_pvh_entry(&self) -> Result<u32, BootError> {
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            let mut notes = vec![0; segment.file_bytes.min(NOTES_BYTES_MAX) as usize];
            self.source.read(&mut notes, segment.offset)?;
            if let Some(entry) = find_pvh_entry(&notes) {
                return Ok(entry);
            }
        }
        Err(BootError::NoPvhNote { path: self.source.path() })
    }
}

/// Walks a note segment: (name size, descriptor size, type, name, descriptor), each padded to 4.
fn find_pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let head = notes.get(..12)?;
        let (name_len, desc_len) = (u32_at(head, 0) as usize, u32_at(head, 4) as usize);
        let name = notes.get(12..12usize.checked_add(name_len)?)?;
        let desc_at = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let desc = notes.get(desc_at..desc_at.checked_add(desc_len)?)?;
        if u32_at(head, 8) == NOTE_PVH_ENTRY && name == b"Xen\0" && desc.len() >= 4 {
            return Some(u32_at(desc, 0));
        }
        notes = notes.get(desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut raw = Vec::new();
        raw.extend((name.len() as u32).to_le_bytes());
        raw.extend((desc.len() as u32).to_le_bytes());
        raw.extend(kind.to_le_bytes());
        for part in [name, desc] {
            raw.extend(part);
            raw.resize(raw.len().next_multiple_of(4), 0);
        }
        raw
    }

    #[test]
    fn the_entry_is_found_behind_other_notes() {
        let mut notes = note(b"GNU\0", 3, &[1; 20]);
        notes.extend(note(b"Xen\0", 6, b"linux\0"));
        notes.extend(note(b"Xen\0", NOTE_PVH_ENTRY, &0x10_0000u32.to_le_bytes()));
        assert_eq!(find_pvh_entry(&notes), Some(0x10_0000));
    }

    proptest! {
        #[test]
        fn any_notes_are_survived(notes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _found = find_pvh_entry(&notes);
        }

        #[test]
        fn any_file_is_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), valid in 0usize..3) {
            if bytes.len() >= 64 && valid > 0 {
                bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
                bytes[16..20].copy_from_slice(&[2, 0, 62, 0]);
                bytes[54..58].copy_from_slice(&[56, 0, 2, 0]);
                bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
            }
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            let source = Source::open("kernel", file.path()).unwrap();
            let _image = Image::new(source).and_then(|image| image.check_fits(1 << 30));
        }
    }
}
