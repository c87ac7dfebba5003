//! Parsing a descriptor chain into a request.
//!
//! Everything here comes from a guest. What can still be answered becomes a request that fails; what
//! cannot even carry a status byte breaks the queue.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use super::SECTOR_BYTES;
use crate::GuestMemory;
use crate::devices::virtio::{Chain, ChainError, Piece};

const HEADER_BYTES: u32 = 16;
/// One request moves at most this much: more than any driver asks for.
pub const DATA_BYTES_MAX: u64 = 64 << 20;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// From this byte of the disk into the pieces.
    Read {
        offset: u64,
    },
    /// From the pieces to this byte of the disk.
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    /// A type that this device does not know.
    Unsupported,
    /// It can be answered, but not done.
    Invalid(&'static str),
}

/// A request that can be answered: its status byte is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub kind: RequestKind,
    pub data: Vec<Piece>,
    pub status: GuestAddress,
}

/// What a chain turned out to be, with the head under which it is returned.
pub struct Parsed {
    pub head: u16,
    pub request: Result<Request, RequestError>,
}

/// The chain cannot even be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("there is no writable byte for the status")]
    NoStatus,
}

/// Reads the chain once and decides what it asks for on a disk of `sectors`.
pub fn parse<M>(chain: DescriptorChain<M>, memory: &GuestMemory, sectors: u64) -> Parsed
where
    M: Deref<Target = GuestMemory>,
{
    let head = chain.head_index();
    let chain = Chain::read(chain).map_err(RequestError::from);
    Parsed { head, request: chain.and_then(|chain| to_request(chain, memory, sectors)) }
}

fn to_request(
    mut chain: Chain,
    memory: &GuestMemory,
    sectors: u64,
) -> Result<Request, RequestError> {
    let status = take_last_byte(&mut chain.writable).ok_or(RequestError::NoStatus)?;
    let (kind, data) = match read_header(&mut chain.readable, memory) {
        Some((TYPE_IN, sector)) => (None, (chain.writable, sector, false)),
        Some((TYPE_OUT, sector)) => (None, (chain.readable, sector, true)),
        Some((TYPE_FLUSH, _)) => (Some(RequestKind::Flush), (vec![], 0, false)),
        Some((TYPE_GET_ID, _)) => (Some(RequestKind::GetId), (chain.writable, 0, false)),
        Some(_) => (Some(RequestKind::Unsupported), (vec![], 0, false)),
        None => (Some(RequestKind::Invalid("the header cannot be read")), (vec![], 0, false)),
    };
    let (pieces, sector, is_write) = data;
    let kind = kind.unwrap_or_else(|| transfer(&pieces, sector, sectors, is_write));
    Ok(Request { kind, data: pieces, status })
}

/// Checks a transfer against the disk's size.
fn transfer(pieces: &[Piece], sector: u64, sectors: u64, is_write: bool) -> RequestKind {
    let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return RequestKind::Invalid("the data is not whole sectors");
    }
    if bytes > DATA_BYTES_MAX {
        return RequestKind::Invalid("the data is too large");
    }
    let end = sector.checked_add(bytes / SECTOR_BYTES);
    if end.is_none_or(|end| end > sectors) {
        return RequestKind::Invalid("the data lies beyond the disk's end");
    }
    let offset = sector * SECTOR_BYTES;
    if is_write { RequestKind::Write { offset } } else { RequestKind::Read { offset } }
}

/// Takes type and sector from the front of the readable pieces, however they are cut.
fn read_header(pieces: &mut Vec<Piece>, memory: &GuestMemory) -> Option<(u32, u64)> {
    let mut header = [0; HEADER_BYTES as usize];
    let mut filled = 0;
    while filled < header.len() {
        let piece = pieces.first_mut()?;
        let len = (piece.len as usize).min(header.len() - filled);
        memory.read_slice(&mut header[filled..filled + len], piece.address).ok()?;
        filled += len;
        piece.address = GuestAddress(piece.address.0.checked_add(len as u64)?);
        piece.len -= len as u32;
        if piece.len == 0 {
            pieces.remove(0);
        }
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    Some((u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector)))
}

/// The address of the last writable byte, taken out of the pieces.
fn take_last_byte(pieces: &mut Vec<Piece>) -> Option<GuestAddress> {
    while pieces.last().is_some_and(|piece| piece.len == 0) {
        pieces.pop();
    }
    let last = pieces.last_mut()?;
    last.len -= 1;
    let address = last.address.0.checked_add(u64::from(last.len)).map(GuestAddress)?;
    if last.len == 0 {
        pieces.pop();
    }
    Some(address)
}
