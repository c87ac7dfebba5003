//! The state file as its users see it: round trips, damage, identity, the golden file.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bellwether_statefile::*;
use bellwether_types::{Epoch, VmId};
use common::*;
use proptest::prelude::*;
use uuid::Uuid;

fn write(directory: &Path, memories: &[Vec<u8>], sections: &[(&str, u32, &[u8])]) -> SealedFile {
    let regions = regions_of(memories);
    let mut writer = StateFileWriter::create(directory, identity(), &regions).unwrap();
    for (region, memory) in memories.iter().enumerate() {
        let group = (GROUP_CHUNKS * CHUNK_SIZE) as usize;
        for (index, bytes) in memory.chunks(group).enumerate() {
            let offset = (index * group) as u64;
            let chunk = writer.layout().chunk_at(region, offset).unwrap();
            writer.memory().write_group(chunk, bytes).unwrap();
        }
    }
    for (kind, version, bytes) in sections {
        writer.add_section(kind, *version, bytes).unwrap();
    }
    writer.seal().unwrap()
}

fn sample(directory: &Path) -> (SealedFile, Vec<Vec<u8>>) {
    let mut pages = vec![0u8; 70];
    for page in [0, 1, 5, 40, 63, 64, 69] {
        pages[page] = page as u8 + 1;
    }
    let memories = vec![memory(&pages), memory(&[9, 0])];
    let sealed =
        write(directory, &memories, &[("vcpu.0", 1, b"registers"), ("virtio-blk.0", 3, b"disk")]);
    (sealed, memories)
}

#[test]
fn a_state_file_gives_back_memory_and_sections() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, memories) = sample(directory.path());
    assert_eq!(fs::metadata(&sealed.path).unwrap().len(), sealed.len);
    let mut file = StateFile::open(&sealed.path, &expect(&sealed)).unwrap();
    assert_eq!(file.header().identity, identity());
    assert_eq!(read_all(&file).unwrap(), memories);
    let mut sections = file.take_sections();
    let disk = sections.take("virtio-blk.0").unwrap();
    assert_eq!((disk.version, disk.bytes.as_slice()), (3, b"disk".as_slice()));
    assert!(sections.take_if_present("virtio-net.0").is_none());
    sections.take("vcpu.0").unwrap();
    sections.finish().unwrap();
    let inspection = StateFile::inspect(&sealed.path).unwrap();
    assert_eq!((inspection.hash, inspection.header.sealed), (sealed.hash, true));
}

#[test]
fn zero_pages_are_holes() {
    let directory = tempfile::tempdir().unwrap();
    let mut pages = vec![0u8; 4096];
    pages[4000] = 1;
    let sealed = write(directory.path(), &[memory(&pages)], &[]);
    assert!(sealed.len > 16 << 20 && sealed.bytes_written < 64 << 10);
}

#[test]
fn each_mistaken_identity_has_its_own_error() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, _) = sample(directory.path());
    let right = expect(&sealed);
    let other_vm = Expect { vm_id: VmId::from_uuid(Uuid::nil()), ..right.clone() };
    assert!(matches!(problem(&sealed.path, &other_vm), FormatError::OtherVm { .. }));
    let other_epoch = Expect { epoch: Epoch(8), ..right.clone() };
    assert!(matches!(problem(&sealed.path, &other_epoch), FormatError::OtherGeneration { .. }));
    let other_save = Expect { generation: Some(3), ..right.clone() };
    assert!(matches!(problem(&sealed.path, &other_save), FormatError::OtherGeneration { .. }));
    let other_hash = Expect { hash: [0; 32], ..right.clone() };
    assert!(matches!(problem(&sealed.path, &other_hash), FormatError::OtherHash { .. }));
    assert!(StateFile::open(&sealed.path, &Expect { generation: None, ..right }).is_ok());
    let missing = StateFile::open(&directory.path().join("none"), &other_hash).unwrap_err();
    assert!(matches!(missing, StateFileError::Io { operation: "opening", .. }));
}

#[test]
fn an_unsealed_file_is_refused_and_goes_away_with_its_writer() {
    let directory = tempfile::tempdir().unwrap();
    let regions = [MemoryRegion { start: 0, length: PAGE_SIZE }];
    let writer = StateFileWriter::create(directory.path(), identity(), &regions).unwrap();
    let path = writer.path().to_owned();
    let Identity { vm_id, epoch, .. } = identity();
    let anything = Expect { vm_id, epoch, generation: None, hash: [0; 32] };
    assert_eq!(problem(&path, &anything), FormatError::NotSealed);
    let again = StateFileWriter::create(directory.path(), identity(), &regions).unwrap_err();
    assert!(matches!(again, StateFileError::Io { operation: "creation", .. }));
    assert!(path.exists(), "the loser must not remove the winner's file");
    drop(writer);
    assert!(!path.exists());
}

#[test]
fn a_torn_sealed_header_leaves_an_unsealed_file() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, _) = sample(directory.path());
    let file = OpenOptions::new().write(true).open(&sealed.path).unwrap();
    file.write_all_at(&[0; 512], 4096 + 1024).unwrap();
    file.write_all_at(&[1; 512], 4096 + 512).unwrap();
    assert_eq!(problem(&sealed.path, &expect(&sealed)), FormatError::NotSealed);
}

#[test]
fn a_grown_file_and_a_foreign_file_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, _) = sample(directory.path());
    let file = OpenOptions::new().append(true).open(&sealed.path).unwrap();
    file.set_len(sealed.len + 1).unwrap();
    let wrong = FormatError::WrongLength { found: sealed.len + 1, expected: sealed.len };
    assert_eq!(problem(&sealed.path, &expect(&sealed)), wrong);
    let foreign = directory.path().join("foreign");
    fs::write(&foreign, b"#!/bin/sh\n").unwrap();
    assert_eq!(problem(&foreign, &expect(&sealed)), FormatError::NotAStateFile);
}

/// Whoever may write to the storage must not lead a VMM to another file, or make it wait.
#[test]
fn only_a_regular_file_under_its_own_name_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, _) = sample(directory.path());
    let (link, pipe) = (directory.path().join("link"), directory.path().join("pipe"));
    std::os::unix::fs::symlink(&sealed.path, &link).unwrap();
    let error = StateFile::open(&link, &expect(&sealed)).unwrap_err();
    assert!(matches!(error, StateFileError::Io { .. }), "{error}");
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert_eq!(problem(&pipe, &expect(&sealed)), FormatError::NotAStateFile);
    assert!(StateFile::inspect(directory.path()).is_err());
}

#[test]
fn bad_requests_of_a_writer_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let regions = [MemoryRegion { start: 0, length: 2 * CHUNK_SIZE }];
    let mut writer = StateFileWriter::create(directory.path(), identity(), &regions).unwrap();
    writer.add_section("a", 1, b"").unwrap();
    assert!(writer.add_section("a", 1, b"").is_err());
    assert!(writer.add_section("", 1, b"").is_err());
    let chunk = vec![0; CHUNK_SIZE as usize];
    assert!(writer.memory().write_group(2, &chunk).is_err());
    assert!(writer.memory().write_group(0, &chunk[1..]).is_err());
    assert!(writer.memory().write_group(1, &[chunk.as_slice(), &chunk].concat()).is_err());
    assert!(writer.memory().write_group(1, &chunk).is_ok());
}

/// What must be noticed when it changes: everything but the unused slot, padding, absent pages.
fn covered(file: &StateFile, at: u64) -> bool {
    let header = file.header();
    let tables = [&header.chunk_table, &header.section_table];
    let in_table = tables.iter().any(|t| (t.offset..t.offset + t.length).contains(&at));
    let sections = header.data_offset + header.data_length..header.file_length;
    let in_page = (0..file.layout().chunk_count()).any(|chunk| {
        let place = file.layout().place(chunk).unwrap();
        let offset = at.wrapping_sub(place.file_offset);
        let present = file.chunk(chunk).unwrap().present;
        offset < place.length && present >> (offset / PAGE_SIZE) & 1 == 1
    });
    (4096..8192).contains(&at) || in_table || sections.contains(&at) || in_page
}

/// Opens and reads a file; damage of any kind is an error.
fn verify(path: &Path, expect: &Expect, memories: &[Vec<u8>]) -> Result<(), String> {
    let mut file = StateFile::open(path, expect).map_err(|error| error.to_string())?;
    let found = read_all(&file).map_err(|error| error.to_string())?;
    assert_eq!(found, memories, "wrong memory was given out");
    let mut sections = file.take_sections();
    assert_eq!(sections.take("vcpu.0").unwrap().bytes, b"registers");
    assert_eq!(sections.take("virtio-blk.0").unwrap().bytes, b"disk");
    Ok(())
}

/// Flips a bit, verifies, and flips it back.
fn flip_is_noticed(sealed: &SealedFile, memories: &[Vec<u8>], at: u64, bit: u32) {
    let intact = StateFile::open(&sealed.path, &expect(sealed)).unwrap();
    let must_fail = covered(&intact, at);
    let file = OpenOptions::new().read(true).write(true).open(&sealed.path).unwrap();
    flip(&file, at, bit);
    let outcome = verify(&sealed.path, &expect(sealed), memories);
    flip(&file, at, bit);
    assert!(outcome.is_err() || !must_fail, "bit {bit} of byte {at} flipped unnoticed");
}

#[test]
fn every_bit_of_header_tables_and_sections_counts() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, memories) = sample(directory.path());
    let header = StateFile::inspect(&sealed.path).unwrap().header;
    let tail = header.data_offset + header.data_length..header.file_length;
    let fields = (4096..4096 + 200).chain(8180..8192);
    let table = header.chunk_table.offset..header.chunk_table.offset + header.chunk_table.length;
    for at in fields.chain(table).chain(tail) {
        flip_is_noticed(&sealed, &memories, at, (at % 8) as u32);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn round_trip(
        first in proptest::collection::vec(prop_oneof![3 => Just(0u8), 1 => 1u8..], 1..300),
        second in proptest::collection::vec(prop_oneof![1 => Just(0u8), 3 => 1u8..], 1..80),
        payload in proptest::collection::vec(any::<u8>(), 0..5000),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let memories = vec![memory(&first), memory(&second)];
        let sealed = write(directory.path(), &memories, &[("device", 5, &payload)]);
        let mut file = StateFile::open(&sealed.path, &expect(&sealed)).unwrap();
        prop_assert_eq!(read_all(&file).unwrap(), memories);
        prop_assert_eq!(file.take_sections().take("device").unwrap().bytes, payload);
    }

    #[test]
    fn any_bit_flip_is_noticed(place in 0.0f64..1.0, bit in 0u32..8) {
        let directory = tempfile::tempdir().unwrap();
        let (sealed, memories) = sample(directory.path());
        let at = ((sealed.len as f64 * place) as u64).min(sealed.len - 1);
        flip_is_noticed(&sealed, &memories, at, bit);
    }

    #[test]
    fn any_truncation_is_noticed(place in 0.0f64..1.0) {
        let directory = tempfile::tempdir().unwrap();
        let (sealed, memories) = sample(directory.path());
        let file = OpenOptions::new().write(true).open(&sealed.path).unwrap();
        file.set_len((sealed.len as f64 * place) as u64).unwrap();
        prop_assert!(verify(&sealed.path, &expect(&sealed), &memories).is_err());
    }

    #[test]
    fn a_file_of_random_bytes_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..20000)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        prop_assert!(StateFile::inspect(file.path()).is_err());
    }
}

/// The hash of the golden file, as replicated state would keep it.
const GOLDEN_HASH: &str = "7e4af99fab0400ae4742216c2a901301942cfcd9fef92ccf09ea5220b9e19977";

fn golden_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1.state")
}

fn golden_memories() -> Vec<Vec<u8>> {
    vec![memory(&[0, 17, 0, 0, 42, 43]), memory(&[0, 99])]
}

#[test]
fn the_golden_file_of_format_1_still_opens() {
    let Inspection { header, hash } = StateFile::inspect(&golden_path()).unwrap();
    let Identity { vm_id, epoch, generation } = identity();
    assert_eq!(header.identity, identity());
    assert_eq!(hash.map(|byte| format!("{byte:02x}")).concat(), GOLDEN_HASH);
    let expect = Expect { vm_id, epoch, generation: Some(generation), hash };
    let mut file = StateFile::open(&golden_path(), &expect).unwrap();
    assert_eq!(read_all(&file).unwrap(), golden_memories());
    let mut sections = file.take_sections();
    assert_eq!(sections.take("vcpu.0").unwrap().bytes, b"registers");
    assert_eq!(sections.take("virtio-blk.0").unwrap().version, 3);
    sections.finish().unwrap();
}

/// The bytes of a format never change: what is written today equals the golden file.
#[test]
fn the_format_writes_the_golden_file() {
    let directory = tempfile::tempdir().unwrap();
    let sections: [(&str, u32, &[u8]); 2] =
        [("vcpu.0", 1, b"registers"), ("virtio-blk.0", 3, b"disk")];
    let sealed = write(directory.path(), &golden_memories(), &sections);
    assert!(fs::read(&sealed.path).unwrap() == fs::read(golden_path()).unwrap());
}

/// Makes a new golden file, when a new format comes: `cargo test -- --ignored make_golden`.
#[test]
#[ignore = "writes into the source tree; only for a new format version"]
fn make_golden_file() {
    let directory = tempfile::tempdir().unwrap();
    let sections: [(&str, u32, &[u8]); 2] =
        [("vcpu.0", 1, b"registers"), ("virtio-blk.0", 3, b"disk")];
    let sealed = write(directory.path(), &golden_memories(), &sections);
    fs::copy(sealed.path, golden_path()).unwrap();
}
