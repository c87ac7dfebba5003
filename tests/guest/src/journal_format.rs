//! One record of the journal on the guest's disk, in one sector. Host tests include this file as it is,
//! so it uses `core` only and names nothing outside itself. `journal.rs` says where records go.
//!
//! All numbers are little-endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `BWJRNL02` |
//! | 8 | 8 | sequence number, from 1 |
//! | 16 | 8 | `ns` of the guest's clock when the record was made (since that boot) |
//! | 24 | 8 | the guest's `seed` |
//! | 32 | 8 | which boot of the guest wrote it: one more than the highest that the disk knew then |
//! | 40 | 8 | the checksum of the record before; 0 for the first one |
//! | 48 | 456 | filler: 57 words of SplitMix64 that depend on seed and sequence number |
//! | 504 | 8 | FNV-1a 64 of the bytes before |
//!
//! So the records are a chain. Two guests that write to one disk, or an old one that writes once
//! more after a newer one began, break it: somebody's record names one that is not there.

pub const SECTOR_BYTES: usize = 512;
pub const MAGIC: [u8; 8] = *b"BWJRNL02";

const FILLER: core::ops::Range<usize> = 48..CHECKSUM;
const CHECKSUM: usize = 504;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub seq: u64,
    pub ns: u64,
    pub seed: u64,
    pub boot: u64,
    /// The checksum of the record before.
    pub previous: u64,
}

/// Why a sector is not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRecord {
    /// All bytes are zero: nothing was ever written here.
    Blank,
    Magic,
    Checksum,
    /// The checksum is right but the filler is not: it was computed over wrong data.
    Filler,
}

pub fn encode(record: &Record) -> [u8; SECTOR_BYTES] {
    let mut sector = [0; SECTOR_BYTES];
    sector[..8].copy_from_slice(&MAGIC);
    put(&mut sector, 8, record.seq);
    put(&mut sector, 16, record.ns);
    put(&mut sector, 24, record.seed);
    put(&mut sector, 32, record.boot);
    put(&mut sector, 40, record.previous);
    for at in FILLER.step_by(8) {
        put(&mut sector, at, filler(record.seq, record.seed, at));
    }
    let checksum = fnv1a64(&sector[..CHECKSUM]);
    put(&mut sector, CHECKSUM, checksum);
    sector
}

/// What the record after this one names as the one before.
pub fn checksum(sector: &[u8; SECTOR_BYTES]) -> u64 {
    get(sector, CHECKSUM)
}

pub fn decode(sector: &[u8; SECTOR_BYTES]) -> Result<Record, BadRecord> {
    if sector.iter().all(|&byte| byte == 0) {
        return Err(BadRecord::Blank);
    }
    if sector[..8] != MAGIC {
        return Err(BadRecord::Magic);
    }
    if get(sector, CHECKSUM) != fnv1a64(&sector[..CHECKSUM]) {
        return Err(BadRecord::Checksum);
    }
    let record = Record {
        seq: get(sector, 8),
        ns: get(sector, 16),
        seed: get(sector, 24),
        boot: get(sector, 32),
        previous: get(sector, 40),
    };
    let right = |at| get(sector, at) == filler(record.seq, record.seed, at);
    if FILLER.step_by(8).all(right) { Ok(record) } else { Err(BadRecord::Filler) }
}

fn filler(seq: u64, seed: u64, at: usize) -> u64 {
    let mut z = seed
        .wrapping_add(seq.wrapping_mul(0xd134_2543_de82_ef95))
        .wrapping_add((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fnv1a64(bytes: &[u8]) -> u64 {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

fn put(sector: &mut [u8; SECTOR_BYTES], at: usize, value: u64) {
    sector[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(sector: &[u8; SECTOR_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&sector[at..at + 8]);
    u64::from_le_bytes(bytes)
}
