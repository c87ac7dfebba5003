//! Between the wire's messages and the VMM's own types.

use std::path::PathBuf;

use bellwether_memory::Progress;
use bellwether_proto::v1;
use bellwether_types::{BootId, NodeId, VmSpec};
use tonic::Status;

use super::pre_copy;
use crate::board::{Sealed, View};
use crate::driver::{Activated, CreateConfig, Kind, VmmError};
use crate::lease::Arbiter;
use crate::locks::host_boot_id;
use crate::machine::SerialOutput;

impl From<VmmError> for Status {
    fn from(error: VmmError) -> Self {
        let text = error.to_string();
        match error.kind() {
            Kind::Invalid => Self::invalid_argument(text),
            Kind::NotFound => Self::not_found(text),
            Kind::Precondition => Self::failed_precondition(text),
            Kind::Aborted => Self::aborted(text),
            Kind::Exhausted => Self::resource_exhausted(text),
            Kind::DataLoss => Self::data_loss(text),
            Kind::Internal => Self::internal(text),
        }
    }
}

/// Checks a request to create a machine, once.
pub fn to_config(request: v1::CreateRequest) -> Result<CreateConfig, Status> {
    let spec =
        request.spec.ok_or_else(|| Status::invalid_argument("the field `spec` is missing"))?;
    let vm_id = request.vm_id.parse().map_err(|_| invalid("vm_id", &request.vm_id))?;
    let boot_id: BootId = match request.boot_id.as_str() {
        "" => host_boot_id(),
        text => text.parse().map_err(|_| invalid("boot_id", text))?,
    };
    let arbiter = match request.arbiter.as_str() {
        "storage" => Arbiter::Storage,
        "lease" => Arbiter::Lease,
        "none" => Arbiter::None,
        other => return Err(invalid("arbiter", other)),
    };
    Ok(CreateConfig {
        vm_id,
        spec: VmSpec::try_from(spec)?,
        claim_path: path(request.claim_path),
        node_id: NodeId(request.node_id),
        boot_id,
        arbiter,
        lease_path: path(request.lease_path),
        serial: path(request.serial_path).map_or(SerialOutput::RingOnly, SerialOutput::File),
    })
}

fn invalid(field: &str, value: &str) -> Status {
    let expected = match field {
        "arbiter" => "storage, lease or none",
        _ => "a UUID",
    };
    Status::invalid_argument(format!(
        "the field `{field}` has the value `{value}`; give {expected}"
    ))
}

fn path(text: String) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

/// The status as of now.
pub fn to_status(view: &View) -> v1::VmmStatus {
    let (state, reason) = view.shown();
    let memory = view.memory.as_ref().map(|memory| memory.progress());
    let (memory_loaded_bytes, memory_total_bytes) = loaded_and_total(view, memory);
    v1::VmmStatus {
        vm_id: view.vm_id.clone(),
        epoch: view.epoch,
        state: state.into(),
        reason,
        locked: view.locked,
        lease_deadline_ns: view.lease.as_ref().map_or(0, |lease| lease.deadline_ns()),
        memory_loaded_bytes,
        memory_total_bytes,
        vcpu_exits: view.machine.as_ref().map_or(0, |machine| machine.vcpus.exits()),
        pid: std::process::id(),
        sealed: view.sealed.as_ref().map(|sealed| v1::SealedState {
            file: Some((&sealed.file).into()),
            timings: Some(to_timings(sealed)),
        }),
        memory_ahead_bytes: view.ahead_bytes,
        handover: view.handover.map(v1::Handover::from),
        pre_copy: view.pre_copy.as_ref().map(|watched| pre_copy::to_progress(&watched.now())),
    }
}

/// Without a load all memory is in place.
fn loaded_and_total(view: &View, progress: Option<Progress>) -> (u64, u64) {
    match (progress, &view.machine) {
        (Some(progress), _) => (progress.loaded_bytes, progress.total_bytes),
        (None, Some(machine)) => (machine.ram.size(), machine.ram.size()),
        (None, None) => (0, 0),
    }
}

pub fn to_timings(sealed: &Sealed) -> v1::SaveTimings {
    v1::SaveTimings {
        stop_us: sealed.times.stop_us,
        save_us: sealed.times.save_us,
        seal_us: sealed.times.seal_us,
        bytes_written: sealed.bytes_written,
        stopped_at_ns: sealed.times.stopped_at_ns,
    }
}

pub fn to_activated(activated: Activated) -> v1::ActivateTimings {
    v1::ActivateTimings {
        lock_us: activated.lock_us,
        resume_us: activated.resume_us,
        running_at_ns: activated.running_at_ns,
    }
}
