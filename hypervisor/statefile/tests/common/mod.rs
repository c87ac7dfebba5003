//! What the tests of state files share.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bellwether_statefile::*;
use bellwether_types::{Epoch, VmId};
use uuid::Uuid;

pub const PAGE: usize = PAGE_SIZE as usize;

pub fn identity() -> Identity {
    let vm_id = VmId::from_uuid(Uuid::from_u128(0x0189_0a5d_ac96_774b_bcce_b302_099a_8057));
    Identity { vm_id, epoch: Epoch(7), generation: 2 }
}

pub fn expect(sealed: &SealedFile) -> Expect {
    let Identity { vm_id, epoch, generation } = identity();
    Expect { vm_id, epoch, generation: Some(generation), hash: sealed.hash }
}

/// The memory of a region: of each page, all zero or a pattern that starts with its seed.
pub fn memory(pages: &[u8]) -> Vec<u8> {
    let page = |seed: &u8| {
        (0..PAGE)
            .map(|i| if *seed == 0 { 0 } else { seed.wrapping_add(i as u8) })
            .collect::<Vec<_>>()
    };
    pages.iter().flat_map(page).collect()
}

pub fn regions_of(memories: &[Vec<u8>]) -> Vec<MemoryRegion> {
    let region = |(index, memory): (usize, &Vec<u8>)| MemoryRegion {
        start: (index as u64) << 32,
        length: memory.len() as u64,
    };
    memories.iter().enumerate().map(region).collect()
}

/// All memory of a file, chunk by chunk, or the first failure.
pub fn read_all(file: &StateFile) -> Result<Vec<Vec<u8>>, ChunkFailure> {
    let mut memories: Vec<Vec<u8>> =
        file.header().regions.iter().map(|r| vec![0; r.length as usize]).collect();
    let mut buffer = AlignedBuf::new(CHUNK_SIZE as usize);
    for chunk in 0..file.layout().chunk_count() {
        let place = file.layout().place(chunk).unwrap();
        file.read_group(chunk, 1, &mut buffer)?;
        for (first, count) in chunk::runs(file.present(chunk).unwrap()) {
            let (from, to) = (first * PAGE, (first + count) * PAGE);
            let at = place.offset as usize;
            memories[place.region][at + from..at + to]
                .copy_from_slice(&buffer.as_slice()[from..to]);
        }
    }
    Ok(memories)
}

pub fn problem(path: &Path, expect: &Expect) -> FormatError {
    StateFile::open(path, expect).unwrap_err().problem().expect("a format problem").clone()
}

pub fn flip(file: &File, at: u64, bit: u32) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
}
