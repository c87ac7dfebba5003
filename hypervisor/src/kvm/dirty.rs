//! KVM's log of the pages that the guest writes, switched on for the time of a pre-copy.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` reading the log clears nothing: pages are cleared, and
//! write-protected again, when the copier asks for it, right before it copies them; and all pages
//! count as dirty at first, so that switching the log on costs nothing. Without it, switching on
//! protects all memory, and reading the log clears and protects all that it gives.

use std::io;
use std::sync::Arc;

use bellwether_memory::{DirtyLog, GuestRam};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::ioctl::clear_dirty_log;
use super::vm::{Slot, Vm, set_slot};
use super::{KvmError, call};

/// Who clears the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The copier, page by page.
    Manual,
    /// KVM, whenever the log is read.
    OnRead,
}

/// The log, on until this is dropped.
pub struct KvmDirtyLog {
    fd: Arc<VmFd>,
    slots: Vec<Slot>,
    protection: Protection,
    // The slots name its addresses, also when the log is switched off.
    _ram: Arc<GuestRam>,
}

impl Vm {
    /// Switches the log on, as the host can.
    pub fn start_dirty_log(&self) -> Result<KvmDirtyLog, KvmError> {
        let offered = self.kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let offered = u32::try_from(offered).unwrap_or(0);
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let manual = offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        self.start_dirty_log_with(if manual { offered & wanted } else { 0 })
    }

    /// Switches the log on as on a host that has no manual protection.
    pub fn start_dirty_log_on_read(&self) -> Result<KvmDirtyLog, KvmError> {
        self.start_dirty_log_with(0)
    }

    fn start_dirty_log_with(&self, manual: u32) -> Result<KvmDirtyLog, KvmError> {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [u64::from(manual), 0, 0, 0],
            ..Default::default()
        };
        let set = self.fd.enable_cap(&cap).map_err(call("set the protection of the dirty log"));
        // A host that does not know the capability protects on read.
        let protection = match set {
            Ok(()) if manual != 0 => Protection::Manual,
            Err(error) if manual != 0 => return Err(error),
            _ => Protection::OnRead,
        };
        // From here on the drop of the log switches it off, also if only some slots are logged.
        let log = KvmDirtyLog {
            fd: Arc::clone(&self.fd),
            slots: self.slots(),
            protection,
            _ram: Arc::clone(&self.ram),
        };
        for slot in &log.slots {
            set_slot(&log.fd, slot, KVM_MEM_LOG_DIRTY_PAGES)?;
        }
        Ok(log)
    }
}

impl KvmDirtyLog {
    pub fn protection(&self) -> Protection {
        self.protection
    }

    fn slot(&self, region: usize) -> io::Result<&Slot> {
        self.slots.get(region).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

impl DirtyLog for KvmDirtyLog {
    fn collect(&self, region: usize, words: &mut [u64]) -> io::Result<()> {
        let slot = self.slot(region)?;
        let log = self.fd.get_dirty_log(slot.index, slot.length as usize)?;
        for (word, logged) in words.iter_mut().zip(log) {
            *word |= logged;
        }
        Ok(())
    }

    fn clear(&self, region: usize, first: usize, words: &[u64]) -> io::Result<()> {
        if self.protection == Protection::OnRead {
            return Ok(());
        }
        let slot = self.slot(region)?;
        clear_dirty_log(&self.fd, slot.index, slot.length / 4096, first, words)
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Err(error) = set_slot(&self.fd, slot, 0) {
                tracing::warn!(%error, slot = slot.index, "the dirty log stays on");
            }
        }
    }
}
