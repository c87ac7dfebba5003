//! The ioctls that kvm-ioctls lacks.

use std::io;

use kvm_bindings::{KVMIO, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

/// `KVM_CAP_SREGS2` as a raw number: the enum of kvm-ioctls does not have it.
pub const CAP_SREGS2: libc::c_ulong = 200;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

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
