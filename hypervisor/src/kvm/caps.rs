//! What this host's KVM can do.

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::KvmError;
use super::ioctl::CAP_SREGS2;

/// The optional abilities of one KVM, recorded in the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub nested_state_bytes: u32,
    pub tsc_control: bool,
    pub get_tsc_khz: bool,
    pub clock_flags: u32,
    pub kvmclock_ctrl: bool,
    pub xsave_bytes: u32,
    pub sregs2: bool,
    pub tsc_deadline_timer: bool,
}

/// Without these no machine of ours can be built.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

impl Capabilities {
    /// Refuses a KVM that lacks what is needed, and records what is optional.
    pub fn probe(kvm: &Kvm) -> Result<Self, KvmError> {
        let version = kvm.get_api_version();
        if version != 12 {
            return Err(KvmError::ApiVersion(version));
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Missing(name));
        }
        let number = |cap| u32::try_from(kvm.check_extension_int(cap)).unwrap_or(0);
        Ok(Self {
            nested_state_bytes: number(Cap::NestedState),
            tsc_control: kvm.check_extension(Cap::TscControl),
            get_tsc_khz: kvm.check_extension(Cap::GetTscKhz),
            clock_flags: number(Cap::AdjustClock),
            kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
            xsave_bytes: number(Cap::Xsave2).max(4096),
            sregs2: kvm.check_extension_raw(CAP_SREGS2) > 0,
            tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }
}
