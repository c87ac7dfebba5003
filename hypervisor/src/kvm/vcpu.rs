//! One vCPU and its run loop's single step.

use std::sync::Arc;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::KvmError;
use super::kick::RunPage;

/// Where a guest's port and memory accesses go.
pub trait GuestBus: Send + Sync {
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// Some writes end the VM.
    fn port_write(&self, port: u16, data: &[u8]) -> Option<GuestEnd>;
    fn memory_read(&self, address: u64, data: &mut [u8]);
    fn memory_write(&self, address: u64, data: &[u8]);
}

/// How a guest ended its own life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    Shutdown,
    Reset,
    TripleFault,
    /// KVM cannot go on with this vCPU; the text names the suberror and the instruction.
    Internal(String),
}

/// What one `KVM_RUN` came back with.
#[derive(Debug)]
pub enum RunOutcome {
    /// An access was served; run again.
    Continue,
    /// A signal or `immediate_exit`. The kernel completes a port or memory access before it looks at
    /// either, so that none is pending and the state is whole.
    Interrupted,
    Ended(GuestEnd),
}

/// One vCPU with its own mapping of the page that it shares with the kernel.
pub struct Vcpu {
    pub id: u8,
    pub(super) fd: VcpuFd,
    /// What the guest was told of its processor.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    run_page: Arc<RunPage>,
    xsave_words: usize,
}

impl Vcpu {
    pub(super) fn new(id: u8, fd: VcpuFd, xsave_bytes: u32) -> Result<Self, KvmError> {
        let run_page = RunPage::map(&fd).map_err(|source| KvmError::Vcpu {
            vcpu: id,
            operation: "map its run page",
            source,
        })?;
        let xsave_words = (xsave_bytes as usize).div_ceil(4);
        Ok(Self { id, fd, cpuid: vec![], run_page: Arc::new(run_page), xsave_words })
    }

    /// What a kicker needs.
    pub fn run_page(&self) -> Arc<RunPage> {
        Arc::clone(&self.run_page)
    }

    pub(super) fn fd_xsave_words(&self) -> usize {
        self.xsave_words
    }

    /// Tells a kvm-clock guest that it was stopped on purpose. Guests without it answer EINVAL.
    pub fn note_paused(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            tracing::debug!(vcpu = self.id, %error, "no kvm-clock to tell of the pause");
        }
    }

    /// Runs the guest until its next exit and serves it.
    pub fn run(&mut self, bus: &dyn GuestBus) -> Result<RunOutcome, KvmError> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => return self.run_error(error),
        };
        let ended = match exit {
            VcpuExit::IoIn(port, data) => {
                let size = self.run_page.io_element_size();
                data.chunks_mut(size).for_each(|element| bus.port_read(port, element));
                None
            }
            VcpuExit::IoOut(port, data) => {
                let size = self.run_page.io_element_size();
                data.chunks(size).find_map(|element| bus.port_write(port, element))
            }
            VcpuExit::MmioRead(address, data) => {
                bus.memory_read(address, data);
                None
            }
            VcpuExit::MmioWrite(address, data) => {
                bus.memory_write(address, data);
                None
            }
            VcpuExit::Intr => return Ok(RunOutcome::Interrupted),
            VcpuExit::IrqWindowOpen | VcpuExit::Hlt => None,
            VcpuExit::Shutdown => Some(GuestEnd::TripleFault),
            VcpuExit::InternalError => Some(self.internal_error()),
            VcpuExit::FailEntry(reason, cpu) => Some(GuestEnd::Internal(format!(
                "the entry failed, reason {reason:#x}, host CPU {cpu}"
            ))),
            other => Some(GuestEnd::Internal(format!("exit {other:?} is not supported"))),
        };
        Ok(ended.map_or(RunOutcome::Continue, RunOutcome::Ended))
    }

    fn run_error(&self, error: kvm_ioctls::Error) -> Result<RunOutcome, KvmError> {
        match error.errno() {
            libc::EINTR | libc::EAGAIN => Ok(RunOutcome::Interrupted),
            _ => Err(KvmError::Vcpu { vcpu: self.id, operation: "run", source: error.into() }),
        }
    }

    fn internal_error(&self) -> GuestEnd {
        let suberror = self.run_page.internal_suberror();
        let name = match suberror {
            1 => "emulation failed",
            2 => "simultaneous exceptions",
            3 => "delivery of an event failed",
            4 => "unexpected exit reason",
            _ => "unknown",
        };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        GuestEnd::Internal(format!("suberror {suberror} ({name}), rip {rip:#x}, vCPU {}", self.id))
    }
}
