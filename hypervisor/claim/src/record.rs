//! The claim file: two slots of 512 bytes, 4096 apart, so that a torn write can spoil only one.
//!
//! | offset in slot | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `BWCLAIM1` |
//! | 8 | 8 | serial: of two valid slots the higher one counts |
//! | 16 | 16 | VM id |
//! | 32 | 8 | epoch |
//! | 40 | 8 | node |
//! | 48 | 16 | boot id |
//! | 64 | 8 | nonce |
//! | 72 | 8 | 1 if anybody has claimed the VM yet, else 0 |
//! | 80 | 8 | 1 if the rest is a handover, else 0 |
//! | 88 | 8 | handover: the epoch whose runner sealed the VM and let go |
//! | 96 | 8 | handover: the generation in the state file's name |
//! | 104 | 8 | handover: bytes of the state file |
//! | 112 | 32 | handover: Blake3 hash that roots the state file's checksums |
//! | 144 | 360 | zero |
//! | 504 | 8 | XXH3-64 over the 504 bytes before |
//!
//! A record goes into the slot that does not count, and is durable before it is relied upon. The
//! other slot keeps the record before it: an older epoch is forgotten only after a newer one is
//! safe. A file appears under its name only when both slots are written; so a file in which no
//! slot is valid is damaged, not new.

use std::fmt;

use bellwether_types::{BootId, Epoch, Handover, NodeId, VmId};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

pub const SLOT: usize = 512;
/// Slots lie on different blocks of the storage.
pub const SLOT_OFFSETS: [u64; 2] = [0, 4096];
pub const FILE_LENGTH: usize = 4096 + SLOT;

const MAGIC: [u8; 8] = *b"BWCLAIM1";
const FIELDS: usize = 144;
const CHECKSUM_AT: usize = SLOT - 8;

/// The record does not let a claim in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denied {
    OtherVm,
    /// It is of a newer epoch, or of another start of the same one.
    Superseded,
}

/// Who claims a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClaimRecord {
    pub vm_id: VmId,
    /// The epoch of the start command.
    pub epoch: Epoch,
    pub node: NodeId,
    /// The boot of the node.
    pub boot_id: BootId,
    /// Names the start command, so that two of one epoch cannot both succeed.
    pub nonce: u64,
}

impl fmt::Display for ClaimRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm_id, epoch, node, boot_id, nonce } = self;
        write!(f, "VM {vm_id} epoch {epoch} on node {node} (boot {boot_id}, nonce {nonce:#x})")
    }
}

/// What is in a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    pub serial: u64,
    /// False in a file that has been made but in which no claim was ever granted.
    pub claimed: bool,
    pub record: ClaimRecord,
    pub handover: Option<Handover>,
}

impl Slot {
    /// Whether the record in the file lets `ours` in.
    pub fn admit(&self, ours: &ClaimRecord) -> Result<(), Denied> {
        let stored = &self.record;
        if stored.vm_id != ours.vm_id {
            return Err(Denied::OtherVm);
        }
        let same_epoch = stored.epoch == ours.epoch && stored != ours;
        match self.claimed && (stored.epoch > ours.epoch || same_epoch) {
            true => Err(Denied::Superseded),
            false => Ok(()),
        }
    }

    /// The slot that takes the place of this one, which is at `index`, and where it goes. What was
    /// handed over stays so.
    pub fn succeed(&self, index: usize, record: ClaimRecord) -> (Self, usize) {
        let serial = self.serial.saturating_add(1);
        (Self { serial, claimed: true, record, handover: self.handover }, 1 - index)
    }

    pub fn encode(&self) -> [u8; SLOT] {
        let r = &self.record;
        let (vm_id, boot_id) = (r.vm_id.uuid(), r.boot_id.uuid());
        let none = Handover { epoch: Epoch(0), generation: 0, bytes: 0, hash: [0; 32] };
        let handover = self.handover.unwrap_or(none);
        let fields: [&[u8]; 13] = [
            &MAGIC,
            &self.serial.to_le_bytes(),
            vm_id.as_bytes(),
            &r.epoch.0.to_le_bytes(),
            &r.node.0.to_le_bytes(),
            boot_id.as_bytes(),
            &r.nonce.to_le_bytes(),
            &u64::from(self.claimed).to_le_bytes(),
            &u64::from(self.handover.is_some()).to_le_bytes(),
            &handover.epoch.0.to_le_bytes(),
            &handover.generation.to_le_bytes(),
            &handover.bytes.to_le_bytes(),
            &handover.hash,
        ];
        let mut slot = [0; SLOT];
        slot[..FIELDS].copy_from_slice(&fields.concat());
        let checksum = xxh3_64(&slot[..CHECKSUM_AT]);
        slot[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    /// The slot, if it is whole. Never panics.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let covered = bytes.get(..CHECKSUM_AT)?;
        if covered.get(..8)? != MAGIC || word(bytes, CHECKSUM_AT)? != xxh3_64(covered) {
            return None;
        }
        Some(Self {
            serial: word(covered, 8)?,
            claimed: word(covered, 72)? != 0,
            record: ClaimRecord {
                vm_id: VmId::from_uuid(uuid_at(covered, 16)?),
                epoch: Epoch(word(covered, 32)?),
                node: NodeId(word(covered, 40)?),
                boot_id: BootId::from_uuid(uuid_at(covered, 48)?),
                nonce: word(covered, 64)?,
            },
            handover: match word(covered, 80)? {
                0 => None,
                _ => Some(Handover {
                    epoch: Epoch(word(covered, 88)?),
                    generation: word(covered, 96)?,
                    bytes: word(covered, 104)?,
                    hash: covered.get(112..144)?.try_into().ok()?,
                }),
            },
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn uuid_at(bytes: &[u8], at: usize) -> Option<Uuid> {
    Uuid::from_slice(bytes.get(at..at + 16)?).ok()
}

/// The slot that counts, and its index; `None` if neither is whole.
pub fn current(file: &[u8]) -> Option<(Slot, usize)> {
    let slot = |index: usize| {
        let start = SLOT_OFFSETS[index] as usize;
        Some((Slot::decode(file.get(start..start + SLOT)?)?, index))
    };
    [slot(0), slot(1)].into_iter().flatten().max_by_key(|(slot, _)| slot.serial)
}

/// The bytes of a file in which nobody has claimed anything yet.
pub fn unclaimed_file(record: &ClaimRecord) -> Vec<u8> {
    let record = ClaimRecord { epoch: Epoch(0), node: NodeId(0), nonce: 0, ..*record };
    let mut file = vec![0; FILE_LENGTH];
    for (serial, offset) in SLOT_OFFSETS.into_iter().enumerate() {
        let slot = Slot { serial: serial as u64 + 1, claimed: false, record, handover: None };
        file[offset as usize..offset as usize + SLOT].copy_from_slice(&slot.encode());
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(epoch: u64) -> ClaimRecord {
        ClaimRecord {
            vm_id: VmId::from_uuid(Uuid::from_u128(5)),
            epoch: Epoch(epoch),
            node: NodeId(2),
            boot_id: BootId::from_uuid(Uuid::from_u128(6)),
            nonce: 77,
        }
    }

    #[test]
    fn the_newer_slot_counts_and_a_torn_one_gives_way() {
        let mut file = unclaimed_file(&record(9));
        let (fresh, index) = current(&file).unwrap();
        assert_eq!((fresh.claimed, fresh.record.epoch, index), (false, Epoch(0), 1));
        let newer = Slot {
            serial: 3,
            claimed: true,
            record: record(9),
            handover: Some(Handover { epoch: Epoch(9), generation: 2, bytes: 3, hash: [4; 32] }),
        };
        file[..SLOT].copy_from_slice(&newer.encode());
        assert_eq!(current(&file), Some((newer, 0)));
        for torn in 0..SLOT {
            let mut file = file.clone();
            file[torn] ^= 0x10;
            assert_eq!(current(&file), Some((fresh, 1)), "byte {torn}");
        }
    }

    #[test]
    fn anything_else_is_not_a_claim_file() {
        assert_eq!(current(b""), None);
        assert_eq!(current(&[0; FILE_LENGTH]), None);
        assert_eq!(current(&unclaimed_file(&record(1))[..100]), None);
    }
}
