//! Files with later rounds: the newest version of each page comes back, and damage is noticed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use bellwether_statefile::*;
use common::*;
use proptest::prelude::*;

/// The pages of one round, by number: their seeds (0 is a page of zeros).
type Round = BTreeMap<u64, u8>;

/// A file in the making, and what its memory has to be in the end.
struct Model {
    writer: StateFileWriter,
    memories: Vec<Vec<u8>>,
    round: u32,
}

impl Model {
    fn new(directory: &Path, memories: &[Vec<u8>]) -> Self {
        let regions = regions_of(memories);
        let mut writer =
            StateFileWriter::create_with_rounds(directory, identity(), &regions).unwrap();
        for (region, memory) in memories.iter().enumerate() {
            for (index, bytes) in memory.chunks(CHUNK_SIZE as usize).enumerate() {
                let chunk = writer.layout().chunk_at(region, index as u64 * CHUNK_SIZE).unwrap();
                writer.memory().write_group(chunk, bytes).unwrap();
            }
        }
        writer.freeze_fixed().unwrap();
        Self { writer, memories: memories.to_vec(), round: 0 }
    }

    /// Appends a round in segments of at most `most` pages.
    fn append(&mut self, round: &Round, most: usize) -> Vec<SegmentRef> {
        self.round += 1;
        let pages: Vec<_> = round.iter().collect();
        let mut segments = Vec::new();
        let mut buffer = SegmentBuffer::new();
        for part in pages.chunks(most) {
            buffer.clear();
            for (page, seed) in part.iter().map(|(page, seed)| (**page, **seed)) {
                let bytes = memory(&[seed]);
                buffer.push(page, |target| target.copy_from_slice(&bytes));
                let (region, offset) = self.writer.layout().page_place(page).unwrap();
                let at = offset as usize;
                self.memories[region][at..at + PAGE].copy_from_slice(&bytes);
            }
            segments.push(self.writer.memory().append(self.round, &mut buffer).unwrap());
        }
        segments
    }

    fn seal(mut self) -> (SealedFile, Vec<Vec<u8>>) {
        self.writer.add_section("vcpu.0", 1, b"registers").unwrap();
        (self.writer.seal().unwrap(), self.memories)
    }
}

fn round(pages: &[(u64, u8)]) -> Round {
    pages.iter().copied().collect()
}

/// Two regions, the first of 70 pages; pages are rewritten twice, become zero, and come up.
fn sample(directory: &Path) -> (SealedFile, Vec<Vec<u8>>) {
    let mut pages = vec![0u8; 70];
    for page in [0, 1, 5, 40, 63, 64, 69] {
        pages[page] = page as u8 + 1;
    }
    let mut model = Model::new(directory, &[memory(&pages), memory(&[9, 0])]);
    model.append(&round(&[(1, 100), (2, 101), (40, 0), (63, 102), (64, 103), (71, 104)]), 4);
    model.append(&round(&[(2, 0), (5, 110), (64, 111)]), 4);
    model.append(&round(&[(2, 120)]), 4);
    model.seal()
}

fn open(sealed: &SealedFile) -> StateFile {
    StateFile::open(&sealed.path, &expect(sealed)).unwrap()
}

#[test]
fn the_newest_version_of_each_page_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, memories) = sample(directory.path());
    let mut file = open(&sealed);
    assert_eq!((file.header().version, file.segments().len()), (FORMAT_ROUNDS, 4));
    assert_eq!(read_all(&file).unwrap(), memories);
    assert_eq!(file.present(0).unwrap() >> 40 & 1, 0, "page 40 is zero now");
    assert!(file.newest(40).unwrap().offset.is_none() && file.newest(0).is_none());
    file.take_sections().take("vcpu.0").unwrap();
}

#[test]
fn a_file_that_was_sealed_without_a_later_round_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, memories) = Model::new(directory.path(), &[memory(&[1, 0, 3])]).seal();
    assert_eq!(read_all(&open(&sealed)).unwrap(), memories);
}

#[test]
fn a_chunk_that_was_rewritten_whole_is_not_read_at_its_fixed_place() {
    let directory = tempfile::tempdir().unwrap();
    let mut model = Model::new(directory.path(), &[memory(&[1, 0, 3])]);
    model.append(&round(&[(0, 5), (2, 6)]), 9);
    let (sealed, memories) = model.seal();
    let at = StateFile::inspect(&sealed.path).unwrap().header.data_offset;
    let file = OpenOptions::new().read(true).write(true).open(&sealed.path).unwrap();
    flip(&file, at, 0);
    assert_eq!(read_all(&open(&sealed)).unwrap(), memories);
}

#[test]
fn segments_that_are_known_are_not_read_again_unless_the_table_says_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, memories) = sample(directory.path());
    let tail = TailFile::open(&sealed.path, &identity()).unwrap();
    let mut known = HashMap::new();
    for at in open(&sealed).segments() {
        let (segment, _) = tail.read_segment(at).unwrap();
        known.insert(at.offset, segment);
    }
    // A head that nobody reads can be damaged; one that differs from the table is read.
    let at = open(&sealed).segments()[0];
    let file = OpenOptions::new().read(true).write(true).open(&sealed.path).unwrap();
    flip(&file, at.offset + 60, 1);
    let again = StateFile::open_knowing(&sealed.path, &expect(&sealed), known.clone()).unwrap();
    assert_eq!(read_all(&again).unwrap(), memories);
    known.get_mut(&at.offset).unwrap().at.checksum ^= 1;
    let error = StateFile::open_knowing(&sealed.path, &expect(&sealed), known).unwrap_err();
    assert!(matches!(error.problem(), Some(FormatError::SegmentDamaged { .. })), "{error}");
}

#[test]
fn a_tail_reads_what_it_is_told_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let mut model = Model::new(directory.path(), &[memory(&[1, 0, 3])]);
    let segment = model.append(&round(&[(0, 7), (1, 8), (2, 0)]), 9)[0];
    let path = model.writer.path().to_owned();
    let tail = TailFile::open(&path, &identity()).unwrap();
    let mut buffer = AlignedBuf::new(CHUNK_SIZE as usize);
    let entry = model.writer.chunk_entry(0).unwrap();
    tail.read_chunks(0, &[entry], &mut buffer).unwrap();
    assert_eq!(&buffer.as_slice()[..PAGE], &memory(&[1])[..]);
    let wrong = ChunkEntry { checksum: 5, ..entry };
    let error = tail.read_chunks(0, &[wrong], &mut buffer).unwrap_err().error;
    assert_eq!(error.problem(), Some(&FormatError::ChunkDamaged { chunk: 0 }));
    assert!(tail.read_chunks(1, &[entry], &mut buffer).is_err());
    let (read, data) = tail.read_segment(&segment).unwrap();
    assert_eq!(read.pages.len(), 3);
    assert_eq!(data.as_slice(), memory(&[7, 8]));
    let foreign = Identity { generation: 9, ..identity() };
    let error = TailFile::open(&path, &foreign).unwrap_err();
    assert!(matches!(error.problem(), Some(FormatError::OtherGeneration { .. })));
    let torn = SegmentRef { offset: segment.offset + PAGE_SIZE, ..segment };
    assert!(tail.read_segment(&torn).is_err());
    let beyond = SegmentRef { offset: 1 << 40, ..segment };
    assert!(tail.read_segment(&beyond).is_err());
    let absurd = SegmentRef { pages: u32::MAX, offset: u64::MAX, ..segment };
    assert!(tail.read_segment(&absurd).is_err());
}

#[test]
#[should_panic(expected = "pages go into segments")]
fn a_frozen_table_takes_no_chunk() {
    let directory = tempfile::tempdir().unwrap();
    let model = Model::new(directory.path(), &[memory(&[1])]);
    let _written = model.writer.memory().write_group(0, &memory(&[2]));
}

/// Whether a byte is looked at: all but padding, absent pages and superseded pages.
fn covered(file: &StateFile, at: u64) -> bool {
    let header = file.header();
    let tables = [&header.chunk_table, &header.section_table];
    let in_table = tables.iter().any(|t| (t.offset..t.offset + t.length).contains(&at));
    let in_head = file.segments().iter().any(|segment| {
        let length = 64 + 16 * u64::from(segment.pages);
        (segment.offset..segment.offset + length).contains(&at)
    });
    let pages = 0..file.layout().page_count();
    let in_page = pages
        .filter_map(|page| file.newest(page)?.offset)
        .any(|offset| (offset..offset + PAGE_SIZE).contains(&at));
    (4096..8192).contains(&at) || in_table || in_head || in_page
}

fn flip_is_noticed(sealed: &SealedFile, memories: &[Vec<u8>], at: u64, bit: u32) {
    let must_fail = covered(&open(sealed), at);
    let file = OpenOptions::new().read(true).write(true).open(&sealed.path).unwrap();
    flip(&file, at, bit);
    let outcome = StateFile::open(&sealed.path, &expect(sealed))
        .map_err(|error| error.to_string())
        .and_then(|file| read_all(&file).map_err(|error| error.to_string()));
    flip(&file, at, bit);
    if let Ok(found) = &outcome {
        assert_eq!(found, memories, "wrong memory was given out");
    }
    assert!(outcome.is_err() || !must_fail, "bit {bit} of byte {at} flipped unnoticed");
}

#[test]
fn every_bit_of_a_head_and_of_the_tables_counts() {
    let directory = tempfile::tempdir().unwrap();
    let (sealed, memories) = sample(directory.path());
    let file = open(&sealed);
    let heads = file
        .segments()
        .iter()
        .flat_map(|segment| segment.offset..segment.offset + 64 + 16 * u64::from(segment.pages));
    // The segment table lies right before the section table, which the seal names.
    let table = file.header().section_table.offset - 24 * file.segments().len() as u64;
    for at in heads.chain(table..sealed.len).collect::<Vec<_>>() {
        flip_is_noticed(&sealed, &memories, at, (at % 8) as u32);
    }
}

/// Rounds of random pages for 80 pages of memory in two regions.
fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let page = (0u64..82, prop_oneof![1 => Just(0u8), 3 => 1u8..]);
    let round = proptest::collection::vec(page, 1..40).prop_map(|pages| round(&pages));
    proptest::collection::vec(round, 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_rounds_give_the_memory_of_the_model(
        first in proptest::collection::vec(prop_oneof![Just(0u8), 1u8..], 66..=66),
        second in proptest::collection::vec(prop_oneof![Just(0u8), 1u8..], 16..=16),
        rounds in rounds(), most in 1usize..30,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut model = Model::new(directory.path(), &[memory(&first), memory(&second)]);
        for round in &rounds {
            model.append(round, most);
        }
        let (sealed, memories) = model.seal();
        prop_assert_eq!(read_all(&open(&sealed)).unwrap(), memories);
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
        let (sealed, _) = sample(directory.path());
        let file = OpenOptions::new().write(true).open(&sealed.path).unwrap();
        file.set_len((sealed.len as f64 * place) as u64).unwrap();
        prop_assert!(StateFile::open(&sealed.path, &expect(&sealed)).is_err());
    }
}

/// The hash of the golden file of format 2.
const GOLDEN_HASH: &str = "e1b63cb0340ac03e0d26a213cf85608f4524cc909d10c5c9801915bb7bd27470";

fn golden_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2.state")
}

fn golden(directory: &Path) -> (SealedFile, Vec<Vec<u8>>) {
    let memories = [memory(&[0, 17, 0, 0, 42, 43]), memory(&[0, 99])];
    let mut model = Model::new(directory, &memories);
    model.append(&round(&[(1, 18), (4, 0), (6, 7)]), 2);
    model.append(&round(&[(1, 19), (3, 20)]), 2);
    model.seal()
}

#[test]
fn the_golden_file_of_format_2_still_opens() {
    let directory = tempfile::tempdir().unwrap();
    let Inspection { header, hash } = StateFile::inspect(&golden_path()).unwrap();
    assert_eq!((header.identity, header.version), (identity(), FORMAT_ROUNDS));
    assert_eq!(hash.map(|byte| format!("{byte:02x}")).concat(), GOLDEN_HASH);
    let (sealed, memories) = golden(directory.path());
    let mut file = StateFile::open(&golden_path(), &Expect { hash, ..expect(&sealed) }).unwrap();
    assert_eq!(read_all(&file).unwrap(), memories);
    assert_eq!(file.take_sections().take("vcpu.0").unwrap().bytes, b"registers");
    // The bytes of a format never change.
    assert!(fs::read(&sealed.path).unwrap() == fs::read(golden_path()).unwrap());
}

/// Makes a new golden file, when a new format comes: `cargo test -- --ignored make_golden`.
#[test]
#[ignore = "writes into the source tree; only for a new format version"]
fn make_golden_file() {
    let directory = tempfile::tempdir().unwrap();
    fs::copy(golden(directory.path()).0.path, golden_path()).unwrap();
}
