//! The order of the API: what was told to callers, held against the one order that the log is.
//!
//! An operation is called and returns; in between it has to take effect at one point. For a write
//! that point is its entry in the log, for a read the entry up to which the state that was read had
//! been applied. What is checked at every event:
//!
//! ```text
//!   acknowledged   its entry stands where it was told, once, behind everything that had been told to
//!                  anybody before it was called
//!   refused with
//!   nothing done   it never has an entry, before or after
//!   unknown        if it has an entry, then behind what had been told before it was called
//!   read           what was read is what the log makes of the VM up to that entry, and that is behind
//!                  everything that had been told before it was called
//! ```
//!
//! Since every point lies behind what was told before the call, and is known when the call returns,
//! the log is a single order that agrees with real time: the API is linearizable (Herlihy and Wing
//! 1990). A request that the network repeats is nobody's operation.

use std::collections::BTreeMap;

use bellwether_core::Vm;
use bellwether_types::VmId;

/// One operation, from the call on.
struct Operation {
    /// The last entry that had been told to anybody when it was called.
    floor: u64,
    entry: Option<u64>,
    /// The caller was told that nothing was done.
    undone: bool,
}

/// See the module. Each check says what is wrong.
#[derive(Default)]
pub struct Order {
    operations: BTreeMap<u64, Operation>,
    told: u64,
    last: u64,
    /// Each VM as it was from an entry on.
    history: BTreeMap<VmId, Vec<(u64, Option<Vm>)>>,
    pub reads: u64,
}

pub type Checked = Result<(), String>;

impl Order {
    /// An operation begins.
    pub fn called(&mut self) -> u64 {
        let number = self.operations.len() as u64 + 1;
        let operation = Operation { floor: self.told, entry: None, undone: false };
        self.operations.insert(number, operation);
        number
    }

    /// An entry was committed, on behalf of this operation.
    pub fn entered(&mut self, index: u64, by: Option<u64>) -> Checked {
        self.last = index;
        let Some(operation) = by.and_then(|by| self.operations.get_mut(&by)) else { return Ok(()) };
        let (floor, before) = (operation.floor, operation.entry.replace(index));
        if operation.undone {
            return Err(format!("the API told that nothing was done, and entry {index} does it"));
        }
        if let Some(before) = before {
            return Err(format!("one operation has two entries, {before} and {index}"));
        }
        check_order(index, floor)
    }

    /// The VMs that were ever there.
    pub fn known(&self) -> impl Iterator<Item = VmId> {
        self.history.keys().copied()
    }

    /// A VM is so from this entry on.
    pub fn changed(&mut self, index: u64, vm: VmId, now: Option<&Vm>) {
        let known = self.history.entry(vm).or_default();
        if known.last().and_then(|(_, vm)| vm.as_ref()) != now {
            known.push((index, now.cloned()));
        }
    }

    /// The caller was told the outcome of this entry.
    pub fn acknowledged(&mut self, operation: u64, index: u64) -> Checked {
        self.told = self.told.max(index);
        let Some(operation) = self.operations.get(&operation) else { return Ok(()) };
        match operation.entry {
            Some(entry) if entry == index => check_order(index, operation.floor),
            Some(entry) => Err(format!("entry {index} was told to the caller of entry {entry}")),
            None => Err(format!("entry {index} was told, and is not committed as such")),
        }
    }

    /// The caller was told that nothing was done.
    pub fn undone(&mut self, operation: u64) -> Checked {
        let Some(operation) = self.operations.get_mut(&operation) else { return Ok(()) };
        operation.undone = true;
        match operation.entry {
            None => Ok(()),
            Some(entry) => {
                Err(format!("the API told that nothing was done, and entry {entry} did it"))
            }
        }
    }

    /// The caller was told how a VM is, by a state that had applied this entry.
    pub fn read(&mut self, operation: u64, index: u64, id: VmId, vm: Option<&Vm>) -> Checked {
        self.reads += 1;
        self.told = self.told.max(index);
        let floor = self.operations.get(&operation).map_or(0, |operation| operation.floor);
        if index > self.last {
            return Err(format!("a read saw entry {index}, and {} is the last", self.last));
        }
        let history = self.history.get(&id).map(Vec::as_slice).unwrap_or_default();
        let then = history.iter().rev().find(|(since, _)| *since <= index);
        if then.and_then(|(_, vm)| vm.as_ref()) != vm {
            return Err(format!("a read saw VM {id} otherwise than entry {index} leaves it"));
        }
        if index < floor {
            return Err(format!(
                "a stale read: it saw entry {index}, and entry {floor} had been told before it was \
                 asked"
            ));
        }
        Ok(())
    }
}

fn check_order(index: u64, floor: u64) -> Checked {
    match index > floor {
        true => Ok(()),
        false => {
            Err(format!("entry {index} belongs to an operation that was called after {floor}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_binds_whoever_asks_later() {
        let mut order = Order::default();
        let write = order.called();
        order.entered(1, Some(write)).unwrap();
        let beside = order.called();
        order.acknowledged(write, 1).unwrap();
        let id = VmId::MIN;
        // It was asked before the write was told, so either answer will do.
        order.read(beside, 0, id, None).unwrap();
        let later = order.called();
        assert!(order.read(later, 0, id, None).unwrap_err().contains("stale read"));
        assert!(order.read(later, 9, id, None).is_err());
        order.read(later, 1, id, None).unwrap();
    }

    #[test]
    fn nothing_done_means_never() {
        let mut order = Order::default();
        let (refused, unknown, lost) = (order.called(), order.called(), order.called());
        order.undone(refused).unwrap();
        assert!(order.entered(1, Some(refused)).unwrap_err().contains("nothing was done"));
        order.entered(2, Some(unknown)).unwrap();
        assert!(order.entered(3, Some(unknown)).unwrap_err().contains("two entries"));
        assert!(order.undone(unknown).is_err());
        assert!(order.acknowledged(lost, 4).unwrap_err().contains("not committed"));
    }
}
