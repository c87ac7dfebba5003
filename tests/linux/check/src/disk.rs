//! A disk with a content that is known: block N of generation G is a function of N and G.
//!
//! Several threads read and write blocks of their own, past the kernel's cache, so that requests of
//! all kinds are under way at any time. Each remembers what it wrote last, and finds it again.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::memory::mix;

/// Past the cache; such requests are aligned in memory and on the disk.
const O_DIRECT: i32 = 0x4000;
const BLOCK_BYTES: usize = 16 << 10;
const THREADS: u64 = 4;
/// How many requests there are between two flushes of one thread, and between two ticks of all.
const STEPS_PER_FLUSH: u64 = 16;
const STEPS_PER_TICK: u64 = 64;

#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

impl Block {
    fn new() -> Box<Self> {
        Box::new(Self([0; BLOCK_BYTES]))
    }

    /// Number, generation, and words that follow from both; generation 0 was never written.
    fn fill(&mut self, number: u64, generation: u64) {
        if generation == 0 {
            self.0.fill(0);
            return;
        }
        for (at, word) in (0..).zip(self.0.chunks_exact_mut(8)) {
            word.copy_from_slice(&word_of(number, generation, at).to_le_bytes());
        }
    }

    fn word(&self, at: u64) -> u64 {
        let at = at as usize * 8;
        self.0[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// The generation that the whole block is of.
    fn generation(&self, number: u64) -> Result<u64, String> {
        let generation = self.word(1);
        let mut wanted = Self::new();
        wanted.fill(number, generation);
        match (0..BLOCK_BYTES as u64 / 8).find(|&at| self.word(at) != wanted.word(at)) {
            None => Ok(generation),
            Some(at) => Err(format!(
                "word {at} of block {number} is {:#x}, not {:#x} of generation {generation}",
                self.word(at),
                wanted.word(at)
            )),
        }
    }
}

fn word_of(number: u64, generation: u64, at: u64) -> u64 {
    match at {
        0 => number,
        1 => generation,
        _ => mix(number << 40 ^ generation << 12 ^ at),
    }
}

fn count_blocks(file: &File, path: &str) -> Result<u64, String> {
    use std::io::{Seek, SeekFrom};
    let end = (&*file).seek(SeekFrom::End(0)).map_err(|error| format!("{path}: {error}"))?;
    Ok(end / BLOCK_BYTES as u64)
}

/// Works on a disk whose content is lost, for ever.
pub fn load(path: &str) -> Result<(), String> {
    let open = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path);
    let file = Arc::new(open.map_err(|error| format!("open {path}: {error}"))?);
    let blocks = count_blocks(&file, path)?;
    println!("check: {blocks} blocks of {path}, {THREADS} threads");
    let steps = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (file, steps) = (Arc::clone(&file), Arc::clone(&steps));
            let mut part = Part::new(file, thread, blocks);
            thread::spawn(move || part.work(&|| tick(&steps)))
        })
        .collect();
    for worker in workers {
        worker.join().map_err(|_| "a thread has panicked".to_owned())??;
    }
    Ok(())
}

fn tick(steps: &AtomicU64) {
    let done = steps.fetch_add(1, Ordering::SeqCst) + 1;
    if done.is_multiple_of(STEPS_PER_TICK) {
        println!("tick {} requests={done}", done / STEPS_PER_TICK);
    }
}

/// One thread's blocks: each whose number is `thread` modulo the number of threads.
struct Part {
    file: Arc<File>,
    thread: u64,
    generations: Vec<u64>,
    block: Box<Block>,
}

impl Part {
    fn new(file: Arc<File>, thread: u64, blocks: u64) -> Self {
        let count = (blocks - thread).div_ceil(THREADS) as usize;
        Self { file, thread, generations: vec![0; count], block: Block::new() }
    }

    fn work(&mut self, told: &dyn Fn()) -> Result<(), String> {
        for index in 0..self.generations.len() {
            self.write(index)?;
        }
        for step in 1_u64.. {
            let chance = mix(self.thread << 48 ^ step);
            let index = (chance >> 8) as usize % self.generations.len();
            if chance.is_multiple_of(2) {
                self.write(index)?
            } else {
                self.check(index)?
            }
            if step.is_multiple_of(STEPS_PER_FLUSH) {
                self.file.sync_data().map_err(|error| format!("flush: {error}"))?;
            }
            told();
        }
        Ok(())
    }

    fn place(&self, index: usize) -> (u64, u64) {
        let number = index as u64 * THREADS + self.thread;
        (number, number * BLOCK_BYTES as u64)
    }

    fn write(&mut self, index: usize) -> Result<(), String> {
        let (number, offset) = self.place(index);
        self.generations[index] += 1;
        self.block.fill(number, self.generations[index]);
        let done = self.file.write_all_at(&self.block.0, offset);
        done.map_err(|error| format!("write block {number}: {error}"))
    }

    fn check(&mut self, index: usize) -> Result<(), String> {
        let (number, offset) = self.place(index);
        let done = self.file.read_exact_at(&mut self.block.0, offset);
        done.map_err(|error| format!("read block {number}: {error}"))?;
        let (found, wanted) = (self.block.generation(number)?, self.generations[index]);
        match found == wanted {
            true => Ok(()),
            false => Err(format!("block {number} is of generation {found}, not {wanted}")),
        }
    }
}

/// Whether each block of a disk that `load` worked on is whole; for the host, when the guest is off.
pub fn verify(path: &str) -> Result<(), String> {
    let file = File::open(path).map_err(|error| format!("open {path}: {error}"))?;
    let blocks = count_blocks(&file, path)?;
    let (mut block, mut latest) = (Block::new(), 0);
    for number in 0..blocks {
        let done = file.read_exact_at(&mut block.0, number * BLOCK_BYTES as u64);
        done.map_err(|error| format!("read block {number}: {error}"))?;
        let generation = block.generation(number)?;
        if generation == 0 {
            return Err(format!("block {number} was never written"));
        }
        latest = latest.max(generation);
    }
    println!("check: {blocks} blocks are whole; the latest generation is {latest}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(path: &std::path::Path) -> Part {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        file.set_len(8 * BLOCK_BYTES as u64).unwrap();
        Part::new(Arc::new(file), 1, 8)
    }

    fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("check-{}-{name}", std::process::id()));
        std::fs::write(&path, []).unwrap();
        path
    }

    #[test]
    fn a_lost_write_and_a_torn_block_are_found() {
        let path = scratch("lost");
        let mut part = part(&path);
        part.write(1).unwrap();
        part.check(1).unwrap();
        let old = std::fs::read(&path).unwrap();
        part.write(1).unwrap();
        part.check(1).unwrap();
        std::fs::write(&path, &old).unwrap();
        let lost = part.check(1).unwrap_err();
        assert_eq!(lost, "block 5 is of generation 1, not 2");
        part.file.write_all_at(&[7], 5 * BLOCK_BYTES as u64 + 9000).unwrap();
        assert!(part.check(1).unwrap_err().contains("word 1125 of block 5"));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_disk_is_whole_when_each_block_was_written_once() {
        let path = scratch("whole");
        let mut part = part(&path);
        assert_eq!(verify(path.to_str().unwrap()), Err("block 0 was never written".into()));
        for thread in 0..THREADS {
            part.thread = thread;
            for index in 0..2 {
                part.write(index).unwrap();
            }
        }
        assert_eq!(verify(path.to_str().unwrap()), Ok(()));
        std::fs::remove_file(path).unwrap();
    }
}
