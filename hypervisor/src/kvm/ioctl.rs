//! The ioctls that kvm-ioctls lacks.

use std::io;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_sregs2};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

/// `KVM_CAP_SREGS2` as a raw number: the enum of kvm-ioctls does not have it.
pub const CAP_SREGS2: libc::c_ulong = 200;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Reads the special registers with the PAE page-directory pointers.
pub fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the descriptor is a vCPU's, and the kernel writes exactly one kvm_sregs2.
    match unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) } {
        0 => Ok(sregs),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the special registers with the PAE page-directory pointers.
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the descriptor is a vCPU's, and the kernel reads exactly one kvm_sregs2.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Clears the pages of these words, the first of which is the word `first` of a slot of `slot_pages`
/// pages, in its dirty log.
pub fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    slot_pages: u64,
    first: usize,
    words: &[u64],
) -> io::Result<()> {
    let first_page = first as u64 * 64;
    let left = slot_pages.saturating_sub(first_page);
    let num_pages = u32::try_from(left.min(words.len() as u64 * 64))
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_ptr() as *mut _ };
    let log = kvm_clear_dirty_log { slot, num_pages, first_page, __bindgen_anon_1: bitmap };
    // SAFETY: the descriptor is a VM's; the kernel reads one kvm_clear_dirty_log and, through its
    // pointer, a bit for each of `num_pages` pages, rounded up to words: no more than `words` has.
    match unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
