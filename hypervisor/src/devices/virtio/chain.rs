//! A chain of descriptors, copied out of guest memory once and then checked.
//!
//! Everything in it comes from a guest: it can be too long, loop, end early, mix directions or point
//! anywhere. What is no chain breaks the queue; where its pieces lie is checked when they are used.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::GuestAddress;

use crate::GuestMemory;

/// No driver uses more for one request: it is the size of the largest queue, and what the block
/// device says of itself.
pub const PIECES_MAX: u16 = 256;

/// A piece of guest memory that a driver names; it may be anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub address: GuestAddress,
    pub len: u32,
}

/// What a driver gives for one request: what the device reads, and what it writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Under which it is given back.
    pub head: u16,
    pub readable: Vec<Piece>,
    pub writable: Vec<Piece>,
}

/// These descriptors are no chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("a chain of descriptors loops, leaves its table or guest memory, or is too long")]
    Broken,
    #[error("a readable descriptor follows a writable one")]
    Order,
}

impl Chain {
    /// Reads every descriptor once.
    pub fn read<M>(chain: DescriptorChain<M>) -> Result<Self, ChainError>
    where
        M: Deref<Target = GuestMemory>,
    {
        let mut pieces = Self { head: chain.head_index(), ..Self::default() };
        let mut ended = false;
        // The iterator is bounded by the queue's size, or by the size of one indirect table.
        for (count, descriptor) in chain.enumerate() {
            if count >= usize::from(PIECES_MAX) {
                return Err(ChainError::Broken);
            }
            let piece = Piece { address: descriptor.addr(), len: descriptor.len() };
            if descriptor.is_write_only() {
                pieces.writable.push(piece);
            } else if pieces.writable.is_empty() {
                pieces.readable.push(piece);
            } else {
                return Err(ChainError::Order);
            }
            ended = !descriptor.has_next();
        }
        // It stops silently where the chain breaks: the last descriptor then promised another.
        if ended { Ok(pieces) } else { Err(ChainError::Broken) }
    }
}
