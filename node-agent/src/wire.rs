//! Between the wire and the core's values.

use bellwether_agent_core::{
    ActivateTimings, Observation, Order, SaveTimings, SealedState, Stamped, VmmSight, VmmState,
};
use bellwether_proto::{ConvertError, v1};
use bellwether_types::{Arbiter, BootId, Epoch, Handover, StateFileRef, VmId};

/// The VM that an order is about, and the order itself.
pub fn stamped(order: Option<v1::Order>, what: Order) -> Result<(VmId, Stamped), ConvertError> {
    let order = order.ok_or(ConvertError::Missing("order"))?;
    let vm = vm_id(&order.vm_id)?;
    let boot = boot_id(&order.boot_id)?;
    let epoch = Epoch(order.epoch);
    Ok((vm, Stamped { term: order.term, task: order.task, epoch, boot, order: what }))
}

fn boot_id(text: &str) -> Result<BootId, ConvertError> {
    text.parse().map_err(|_| ConvertError::Invalid {
        field: "boot_id",
        value: text.to_owned(),
        expected: "a boot id is a UUID",
    })
}

/// The hash of a state file, or none for an empty field.
pub fn state_hash(bytes: &[u8]) -> Result<Option<[u8; 32]>, ConvertError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    bytes.try_into().map(Some).map_err(|_| ConvertError::Invalid {
        field: "state_hash",
        value: format!("{} bytes", bytes.len()),
        expected: "a Blake3 hash has 32 bytes",
    })
}

pub fn vm_id(text: &str) -> Result<VmId, ConvertError> {
    text.parse().map_err(|_| ConvertError::Invalid {
        field: "vm_id",
        value: text.to_owned(),
        expected: "a VM id is a UUID",
    })
}

pub fn arbiter(word: &str) -> Result<Arbiter, ConvertError> {
    Arbiter::from_word(word).ok_or_else(|| ConvertError::Invalid {
        field: "arbiter",
        value: word.to_owned(),
        expected: "give storage or lease",
    })
}

pub fn state_file(file: Option<v1::StateFile>) -> Result<StateFileRef, ConvertError> {
    StateFileRef::try_from(file.ok_or(ConvertError::Missing("file"))?)
}

/// What a VMM said of itself.
pub fn sight(status: &v1::VmmStatus) -> Result<VmmSight, ConvertError> {
    let state = VmmState::from_word(&status.state).ok_or_else(|| ConvertError::Invalid {
        field: "state",
        value: status.state.clone(),
        expected: "this agent knows the states of vmm.proto",
    })?;
    Ok(VmmSight {
        state,
        epoch: Epoch(status.epoch),
        locked: status.locked,
        reason: status.reason.clone(),
        memory_loaded_bytes: status.memory_loaded_bytes,
        memory_total_bytes: status.memory_total_bytes,
        sealed: status.sealed.clone().map(sealed_state).transpose()?,
        handover: status.handover.clone().map(Handover::try_from).transpose()?,
    })
}

fn sealed_state(sealed: v1::SealedState) -> Result<SealedState, ConvertError> {
    let timings = save_timings(sealed.timings.unwrap_or_default());
    Ok(SealedState { file: state_file(sealed.file)?, timings })
}

/// The answer to a save.
pub fn saved(reply: v1::SaveReply) -> Result<SealedState, ConvertError> {
    let timings = save_timings(reply.timings.unwrap_or_default());
    Ok(SealedState { file: state_file(reply.file)?, timings })
}

fn save_timings(timings: v1::SaveTimings) -> SaveTimings {
    SaveTimings {
        stop_us: timings.stop_us,
        save_us: timings.save_us,
        seal_us: timings.seal_us,
        bytes_written: timings.bytes_written,
        stopped_at_ns: timings.stopped_at_ns,
    }
}

pub fn save_timings_out(timings: &SaveTimings) -> v1::SaveTimings {
    v1::SaveTimings {
        stop_us: timings.stop_us,
        save_us: timings.save_us,
        seal_us: timings.seal_us,
        bytes_written: timings.bytes_written,
        stopped_at_ns: timings.stopped_at_ns,
    }
}

pub fn activate_timings(timings: v1::ActivateTimings) -> ActivateTimings {
    ActivateTimings {
        lock_us: timings.lock_us,
        resume_us: timings.resume_us,
        running_at_ns: timings.running_at_ns,
    }
}

pub fn activate_timings_out(timings: &ActivateTimings) -> v1::ActivateTimings {
    v1::ActivateTimings {
        lock_us: timings.lock_us,
        resume_us: timings.resume_us,
        running_at_ns: timings.running_at_ns,
    }
}

pub fn observation(vm: VmId, observation: &Observation) -> v1::VmObservation {
    v1::VmObservation {
        vm_id: vm.to_string(),
        epoch: observation.epoch.0,
        state: observation.state.as_str().to_owned(),
        reason: observation.reason.clone(),
        memory_loaded_bytes: observation.memory_loaded_bytes,
        memory_total_bytes: observation.memory_total_bytes,
    }
}
