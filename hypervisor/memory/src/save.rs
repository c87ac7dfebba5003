//! Saving guest memory into a state file.
//!
//! The threads take pieces of up to 1 MiB in order, skip what the memfd never allocated
//! (`SEEK_DATA`), leave out zero pages, sum the rest, and write it straight from guest memory with
//! O_DIRECT. `SEEK_HOLE` is not used: on memory in use it walks to the end of the data, page by
//! page, before the first byte can be written. The price is that a hole inside a 256 KiB chunk
//! that has data is read, and so allocated.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bellwether_statefile::{CHUNK_SIZE, GROUP_CHUNKS, Layout, StateFileError, StateFileWriter};

use crate::ram::{Content, GuestRam, RamError};

/// How to save.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Writer threads, at least one.
    pub threads: usize,
    /// Bypass the page cache where the file system takes it.
    pub direct: bool,
}

impl Default for SaveOptions {
    fn default() -> Self {
        // More threads than cores, even on small hosts: while some wait for the storage, others sum.
        Self { threads: 4, direct: true }
    }
}

/// What a save has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SaveStats {
    /// All guest memory.
    pub memory_bytes: u64,
    /// The pages that are in the file.
    pub present_pages: u64,
    /// What was written, gaps included.
    pub written_bytes: u64,
    /// System calls that wrote.
    pub requests: u64,
    /// Whether the file system took O_DIRECT.
    pub direct: bool,
    pub elapsed: Duration,
}

/// Guest memory could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(
        "save of guest memory: it is still being loaded from its own state file; wait for that"
    )]
    StillLoading,
    #[error("save of guest memory: its load has failed, so there is no whole memory to save")]
    LoadFailed,
    #[error("save of guest memory: state file {path} was made for other memory regions")]
    OtherMemory { path: String },
    #[error("save of guest memory: {0}")]
    File(#[from] StateFileError),
    #[error("save of guest memory: {0}")]
    Ram(#[from] RamError),
}

/// Writes all guest memory into the file; returns when it is written, not when it is durable (the
/// seal sees to that).
///
/// The VM must be stopped and its devices drained: no vCPU, no device thread and nobody else may
/// write to guest memory meanwhile. Memory that changes all the same gets a wrong checksum, and
/// the file will not restore.
pub fn save_memory(
    ram: &GuestRam,
    writer: &mut StateFileWriter,
    options: &SaveOptions,
) -> Result<SaveStats, SaveError> {
    let started = Instant::now();
    match ram.content() {
        Content::Whole => {}
        Content::Loading => return Err(SaveError::StillLoading),
        Content::Failed => return Err(SaveError::LoadFailed),
    }
    if Layout::new(&ram.regions()).as_ref() != Ok(writer.layout()) {
        return Err(SaveError::OtherMemory { path: writer.path().display().to_string() });
    }
    if !options.direct {
        writer.refuse_direct();
    }
    let before = writer.counts();
    let save = Save { ram, writer, position: Mutex::new(Some(0)), pages: AtomicU64::new(0) };
    run_workers(&save, options.threads.max(1))?;
    let present_pages = save.pages.into_inner();
    let counts = writer.counts();
    Ok(SaveStats {
        memory_bytes: ram.size(),
        present_pages,
        written_bytes: counts.bytes - before.bytes,
        requests: counts.requests - before.requests,
        direct: counts.direct,
        elapsed: started.elapsed(),
    })
}

struct Save<'a> {
    ram: &'a GuestRam,
    writer: &'a StateFileWriter,
    /// The offset in the memfd from which nobody has taken anything yet; `None` at the end, or
    /// after an error, which stops all threads.
    position: Mutex<Option<u64>>,
    pages: AtomicU64,
}

/// A stretch of one region, at most [`GROUP_CHUNKS`] chunks, that starts with a chunk.
struct Group {
    region: usize,
    offset: u64,
    length: u64,
    first_chunk: u64,
}

fn run_workers(save: &Save<'_>, threads: usize) -> Result<(), SaveError> {
    thread::scope(|scope| {
        // The calling thread is a worker too, so that a host without threads left can still save.
        let spawn = |_| {
            let builder = thread::Builder::new().name("save".to_owned());
            builder.spawn_scoped(scope, || save.work()).ok()
        };
        let helpers: Vec<_> = (1..threads).map_while(spawn).collect();
        let mut outcome = save.work();
        for helper in helpers {
            outcome = outcome.and(helper.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        }
        outcome
    })
}

impl Save<'_> {
    fn work(&self) -> Result<(), SaveError> {
        loop {
            match self.next_group().and_then(|group| group.map(|g| self.write(&g)).transpose()) {
                Ok(Some(())) => {}
                Ok(None) => return Ok(()),
                Err(error) => {
                    *self.lock() = None;
                    return Err(error);
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<u64>> {
        self.position.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes the next stretch that has data.
    fn next_group(&self) -> Result<Option<Group>, SaveError> {
        let mut position = self.lock();
        let Some(from) = *position else { return Ok(None) };
        *position = None;
        let Some(data) = self.ram.next_data(from)? else { return Ok(None) };
        let regions = self.ram.mapped();
        let Some(region) = regions.partition_point(|r| r.file_offset <= data).checked_sub(1) else {
            return Ok(None);
        };
        let place = &regions[region];
        let offset = (data - place.file_offset) / CHUNK_SIZE * CHUNK_SIZE;
        let Some(first_chunk) = self.writer.layout().chunk_at(region, offset) else {
            return Ok(None);
        };
        let length = (place.guest.length - offset).min(GROUP_CHUNKS * CHUNK_SIZE);
        *position = Some(place.file_offset + offset + length);
        Ok(Some(Group { region, offset, length, first_chunk }))
    }

    fn write(&self, group: &Group) -> Result<(), SaveError> {
        // SAFETY: `save_memory` demands that nobody writes to guest memory meanwhile.
        let memory = unsafe { self.ram.slice(group.region, group.offset, group.length) };
        let pages = self.writer.memory().write_group(group.first_chunk, memory)?;
        self.pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }
}
