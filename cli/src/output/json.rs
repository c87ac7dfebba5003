//! Results as JSON. The keys are those of the proto messages, and they are stable.
//!
//! Each message is taken apart by name here, so that a field added to the contract does not compile
//! until somebody has decided how it appears.

use bellwether_proto::v1;
use serde_json::{Value, json};

/// The JSON form of a message.
pub trait ToJson {
    fn to_json(&self) -> Value;
}

impl<T: ToJson> ToJson for Vec<T> {
    fn to_json(&self) -> Value {
        self.iter().map(ToJson::to_json).collect()
    }
}

impl<T: ToJson> ToJson for Option<T> {
    fn to_json(&self) -> Value {
        self.as_ref().map_or(Value::Null, ToJson::to_json)
    }
}

impl ToJson for v1::ClusterStatus {
    fn to_json(&self) -> Value {
        let Self {
            cluster_id,
            name,
            storage,
            leader,
            term,
            last_applied,
            controllers,
            nodes_online,
            nodes_total,
            vms_running,
            vms_total,
            settings,
        } = self;
        json!({
            "cluster_id": cluster_id, "name": name, "storage": storage, "leader": leader,
            "term": term, "last_applied": last_applied, "controllers": controllers.to_json(),
            "nodes_online": nodes_online, "nodes_total": nodes_total,
            "vms_running": vms_running, "vms_total": vms_total, "settings": settings.to_json(),
        })
    }
}

impl ToJson for v1::ClusterSettings {
    fn to_json(&self) -> Value {
        let Self {
            reserve_nodes,
            quarantine_exits,
            quarantine_window_s,
            quarantine_s,
            pre_copy_mib_s,
        } = self;
        json!({
            "reserve_nodes": reserve_nodes, "quarantine_exits": quarantine_exits,
            "quarantine_window_s": quarantine_window_s, "quarantine_s": quarantine_s,
            "pre_copy_mib_s": pre_copy_mib_s,
        })
    }
}

impl ToJson for v1::ControllerStatus {
    fn to_json(&self) -> Value {
        let Self { member, leader, voter, matched } = self;
        json!({ "member": member.to_json(), "leader": leader, "voter": voter, "matched": matched })
    }
}

impl ToJson for v1::Member {
    fn to_json(&self) -> Value {
        let Self { id, name, address, ports } = self;
        json!({ "id": id, "name": name, "address": address, "ports": ports.to_json() })
    }
}

impl ToJson for v1::Ports {
    fn to_json(&self) -> Value {
        let Self { api, raft, join, agent } = self;
        json!({ "api": api, "raft": raft, "join": join, "agent": agent })
    }
}

impl ToJson for v1::Node {
    fn to_json(&self) -> Value {
        let Self {
            id,
            name,
            address,
            phase,
            boot_id,
            memory_mib,
            memory_used_mib,
            vcpus,
            vcpus_used,
            version,
            vms,
            heard_ms_ago,
            reason,
            quarantine_left_s,
            losses,
            proofs,
        } = self;
        json!({
            "id": id, "name": name, "address": address, "phase": phase, "boot_id": boot_id,
            "memory_mib": memory_mib, "memory_used_mib": memory_used_mib,
            "vcpus": vcpus, "vcpus_used": vcpus_used, "version": version, "vms": vms,
            "heard_ms_ago": heard_ms_ago, "reason": reason,
            "quarantine_left_s": quarantine_left_s, "losses": losses,
            "proofs": proofs.to_json(),
        })
    }
}

impl ToJson for v1::ProofOutlook {
    fn to_json(&self) -> Value {
        let Self { proof, arbiter, after_ms, text } = self;
        json!({ "proof": proof, "arbiter": arbiter, "after_ms": after_ms, "text": text })
    }
}

impl ToJson for v1::Vm {
    fn to_json(&self) -> Value {
        let Self {
            id,
            spec,
            desired,
            state,
            reason,
            epoch,
            node,
            task,
            state_file,
            arbiter,
            fence_proof,
            pending,
            rules,
        } = self;
        json!({
            "id": id, "spec": spec.to_json(), "desired": desired, "state": state,
            "reason": reason, "epoch": epoch, "node": node, "task": task,
            "state_file": state_file.to_json(), "arbiter": arbiter, "fence_proof": fence_proof,
            "pending": pending, "rules": rules.to_json(),
        })
    }
}

impl ToJson for v1::VmRules {
    fn to_json(&self) -> Value {
        let Self {
            preferred_owners,
            failback,
            anti_affinity,
            start_after,
            restarts_max,
            restarts_period_s,
            pre_copy,
            downtime_ms,
        } = self;
        json!({
            "preferred_owners": preferred_owners, "failback": failback,
            "anti_affinity": anti_affinity, "start_after": start_after,
            "restarts_max": restarts_max, "restarts_period_s": restarts_period_s,
            "pre_copy": pre_copy, "downtime_ms": downtime_ms,
        })
    }
}

impl ToJson for v1::VmSpec {
    fn to_json(&self) -> Value {
        let Self {
            name,
            vcpus,
            memory_mib,
            kernel,
            initrd,
            cmdline,
            disks,
            nics,
            possible_owners,
            priority,
            restart,
        } = self;
        json!({
            "name": name, "vcpus": vcpus, "memory_mib": memory_mib, "kernel": kernel,
            "initrd": initrd, "cmdline": cmdline, "disks": disks.to_json(), "nics": nics.to_json(),
            "possible_owners": possible_owners,
            "priority": priority, "restart": restart,
        })
    }
}

impl ToJson for v1::Nic {
    fn to_json(&self) -> Value {
        let Self { bridge, mac } = self;
        json!({ "bridge": bridge, "mac": mac })
    }
}

impl ToJson for v1::Disk {
    fn to_json(&self) -> Value {
        let Self { path, format, read_only } = self;
        json!({ "path": path, "format": format, "read_only": read_only })
    }
}

impl ToJson for v1::StateFile {
    fn to_json(&self) -> Value {
        let Self { path, hash, epoch, bytes } = self;
        json!({ "path": path, "hash": hex(hash), "epoch": epoch, "bytes": bytes })
    }
}

impl ToJson for v1::Task {
    fn to_json(&self) -> Value {
        let Self {
            id,
            kind,
            vm_id,
            vm_name,
            step,
            outcome,
            error,
            created_at_ms,
            ended_at_ms,
            source,
            destination,
            requested_by,
            measures,
            fence_proof,
            log,
        } = self;
        json!({
            "id": id, "kind": kind, "vm_id": vm_id, "vm_name": vm_name, "step": step,
            "outcome": outcome, "error": error, "created_at_ms": created_at_ms,
            "ended_at_ms": ended_at_ms, "source": source, "destination": destination,
            "requested_by": requested_by, "measures": measures, "fence_proof": fence_proof,
            "log": log.to_json(),
        })
    }
}

impl ToJson for v1::TaskLine {
    fn to_json(&self) -> Value {
        let Self { at_ms, text } = self;
        json!({ "at_ms": at_ms, "text": text })
    }
}

impl ToJson for v1::Finding {
    fn to_json(&self) -> Value {
        let Self { node, check, verdict, text } = self;
        json!({ "node": node, "check": check, "verdict": verdict, "text": text })
    }
}

impl ToJson for v1::Event {
    fn to_json(&self) -> Value {
        let Self { seq, at_ms, level, vm, node, task, text } = self;
        json!({
            "seq": seq, "at_ms": at_ms, "level": level, "vm": vm, "node": node, "task": task,
            "text": text,
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_contract_and_nothing_is_left_out() {
        let vm = v1::Vm {
            id: "1".into(),
            spec: Some(v1::VmSpec { name: "web".into(), ..Default::default() }),
            state_file: Some(v1::StateFile { hash: vec![0, 255], ..Default::default() }),
            ..Default::default()
        };
        let value = vm.to_json();
        assert_eq!(value["spec"]["name"], "web");
        assert_eq!(value["state_file"]["hash"], "00ff");
        assert_eq!(v1::Vm::default().to_json()["state_file"], Value::Null);
        assert_eq!(vec![v1::Event::default()].to_json().as_array().map(Vec::len), Some(1));
        assert_eq!(v1::Node::default().to_json()["heard_ms_ago"], Value::Null);
    }
}
