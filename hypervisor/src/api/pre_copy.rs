//! Pre-copy on the wire: what is asked, and the stream of its progress.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bellwether_memory::Piece;
use bellwether_proto::v1::{
    ChunkPiece, MemoryPiece, PreCopyProgress, PreCopyRequest, SegmentPiece, memory_piece,
};
use bellwether_statefile::{ChunkEntry, SegmentRef};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use crate::precopy::{Limits, Options, Phase, Progress, Watched};

/// Messages that wait for a slow reader.
pub const QUEUE: usize = 4;
/// The least time between two messages of one phase.
const PACE: Duration = Duration::from_millis(20);
/// Pieces in one message: about 100 KiB.
const PIECES_MAX: usize = 1024;

const DOWNTIME_MS: u32 = 50;
const ROUNDS_MAX: u32 = 30;
const TIME_MAX_MS: u64 = 600_000;
/// Later rounds may append this many times the memory, with room for small guests that are busy.
const APPEND_FACTOR: u64 = 4;
const APPEND_BYTES_MIN: u64 = 4 << 30;

/// Checks what is asked, and puts the defaults in.
pub fn to_options(request: PreCopyRequest) -> Result<Options, Status> {
    if request.directory.is_empty() {
        return Err(Status::invalid_argument("the field `directory` is missing"));
    }
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    let downtime_ms = or(request.downtime_ms.into(), DOWNTIME_MS.into());
    Ok(Options {
        directory: PathBuf::from(request.directory),
        generation: request.generation,
        limits: Limits {
            downtime: Duration::from_millis(downtime_ms),
            rounds_max: if request.rounds_max == 0 { ROUNDS_MAX } else { request.rounds_max },
            append_factor: APPEND_FACTOR,
            append_bytes_min: APPEND_BYTES_MIN,
            time_max: Duration::from_millis(or(request.time_max_ms, TIME_MAX_MS)),
        },
        finish_anyway: request.finish_anyway,
        rate_bytes_per_s: (request.rate_bytes_per_s > 0).then_some(request.rate_bytes_per_s),
    })
}

/// The numbers, without pieces.
pub fn to_progress(progress: &Progress) -> PreCopyProgress {
    let (phase, converged, reason) = match &progress.phase {
        Phase::Copying => ("copying", false, ""),
        Phase::Ready { converged } => ("ready", *converged, ""),
        Phase::Saving => ("saving", false, ""),
        Phase::Ended(reason) => ("ended", false, reason.as_str()),
    };
    PreCopyProgress {
        phase: phase.into(),
        converged,
        reason: reason.into(),
        round: progress.round,
        memory_bytes: progress.memory_bytes,
        bytes_written: progress.bytes_written,
        residue_bytes: progress.residue_bytes,
        dirty_bytes_per_s: progress.dirty_bytes_per_s,
        bandwidth_bytes_per_s: progress.bandwidth_bytes_per_s,
        outage_us: progress.outage_us,
        elapsed_us: progress.elapsed_us,
        pieces: vec![],
        path: progress.path.display().to_string(),
        epoch: progress.epoch,
        generation: progress.generation,
    }
}

/// Sends progress until the pre-copy has ended or the reader goes away.
pub async fn send_progress(
    watched: Arc<Watched>,
    with_pieces: bool,
    to: mpsc::Sender<Result<PreCopyProgress, Status>>,
) {
    let mut changes = watched.watch();
    let mut told = 0;
    let mut last = None;
    loop {
        let progress = changes.borrow_and_update().clone();
        let mut message = to_progress(&progress);
        // Pieces come a thousand times a second; who does not want them need not hear of each.
        let is_news = last.as_ref() != Some(&message);
        last = Some(message.clone());
        let mut pieces = if with_pieces { progress.pieces - told } else { 0 };
        if is_news || pieces > 0 {
            loop {
                let part = watched.pieces_from(told, pieces.min(PIECES_MAX));
                told += part.len();
                pieces -= part.len();
                message.pieces = part.into_iter().map(from_piece).collect();
                if to.send(Ok(message.clone())).await.is_err() {
                    return;
                }
                if pieces == 0 {
                    break;
                }
            }
        }
        if progress.phase.is_last() {
            return;
        }
        tokio::select! {
            is_open = next_news(&mut changes, &progress) => if !is_open { return },
            () = to.closed() => return,
        }
    }
}

/// Waits until there is more to tell, and at least [`PACE`], so that pieces come together: a peer
/// refuses a flood of small messages. A new phase is told at once. False if no more will come.
async fn next_news(changes: &mut watch::Receiver<Progress>, told: &Progress) -> bool {
    let is_other_phase = |now: &Progress| now.phase != told.phase;
    // Either outcome ends the pause.
    drop(tokio::time::timeout(PACE, changes.wait_for(is_other_phase)).await);
    changes.wait_for(|now| now != told).await.is_ok()
}

/// Checks what a destination is told.
pub fn to_pieces(pieces: Vec<MemoryPiece>) -> Result<Vec<Piece>, Status> {
    let bad = || Status::invalid_argument("a piece of memory is empty or contradicts itself");
    let piece = |piece: MemoryPiece| match piece.piece.ok_or_else(bad)? {
        memory_piece::Piece::Chunks(ChunkPiece { first, present, checksum }) => {
            if present.is_empty() || present.len() != checksum.len() {
                return Err(bad());
            }
            let entry = |(present, checksum)| ChunkEntry { present, checksum };
            let entries = present.into_iter().zip(checksum).map(entry).collect();
            Ok(Piece::Chunks { first, entries })
        }
        memory_piece::Piece::Segment(SegmentPiece { offset, round, pages, checksum }) => {
            Ok(Piece::Segment(SegmentRef { offset, round, pages, checksum }))
        }
    };
    pieces.into_iter().map(piece).collect()
}

fn from_piece(piece: Piece) -> MemoryPiece {
    let piece = match piece {
        Piece::Chunks { first, entries } => memory_piece::Piece::Chunks(ChunkPiece {
            first,
            present: entries.iter().map(|entry| entry.present).collect(),
            checksum: entries.iter().map(|entry| entry.checksum).collect(),
        }),
        Piece::Segment(SegmentRef { offset, round, pages, checksum }) => {
            memory_piece::Piece::Segment(SegmentPiece { offset, round, pages, checksum })
        }
    };
    MemoryPiece { piece: Some(piece) }
}
