//! The standard configurations: small enough to be explored completely, and together complete.

use crate::config::FaultKind::{
    AgentDies, HandOver, OperatorAsserts, PowerLoss, SealFails, StartFails, StorageRevokes,
    VmmDies, VmmStuck,
};
use crate::config::{Arbiter, Config};
use crate::model::INVARIANTS;
use crate::words::Epoch;

/// Migration, save, restore and stop, with two faults at any moment.
pub const MOVES: Config = Config {
    name: "moves",
    arbiter: Arbiter::Storage,
    nodes: 2,
    vms: 1,
    epoch_max: Epoch(3),
    tasks_max: 1,
    faults_max: 2,
    faults: &[VmmDies, PowerLoss, AgentDies, SealFails, StartFails],
    invariants: &INVARIANTS,
    flaw: None,
    tidy: true,
};

/// Failover among three nodes, with two faults, a server that gives locks up and an operator who
/// may be wrong.
pub const FAILOVER: Config = Config {
    name: "failover",
    arbiter: Arbiter::Storage,
    nodes: 3,
    vms: 1,
    epoch_max: Epoch(3),
    tasks_max: 0,
    faults_max: 2,
    faults: &[VmmDies, PowerLoss, AgentDies, StorageRevokes, OperatorAsserts],
    invariants: &INVARIANTS,
    flaw: None,
    tidy: true,
};

/// The handover of a node that is cut off, during a failover or a migration.
pub const HANDOVER: Config = Config {
    name: "handover",
    arbiter: Arbiter::Storage,
    nodes: 2,
    vms: 1,
    epoch_max: Epoch(3),
    tasks_max: 1,
    faults_max: 2,
    faults: &[HandOver, VmmDies, PowerLoss, StorageRevokes],
    invariants: &INVARIANTS,
    flaw: None,
    tidy: true,
};

/// Leases, the watchdog and the leader's wait.
pub const LEASE: Config = Config {
    name: "lease",
    arbiter: Arbiter::Lease,
    nodes: 2,
    vms: 1,
    epoch_max: Epoch(3),
    tasks_max: 0,
    faults_max: 1,
    faults: &[VmmStuck, VmmDies, PowerLoss],
    invariants: &INVARIANTS,
    flaw: None,
    tidy: true,
};

/// Migration under leases.
pub const LEASE_MOVES: Config =
    Config { name: "lease moves", epoch_max: Epoch(2), tasks_max: 1, faults_max: 0, ..LEASE };

/// Two VMs that share a host, its lease and its watchdog. They are lost and proven gone, and not
/// started again: what follows a proof is in `LEASE`.
pub const LEASE_OF_TWO: Config = Config {
    name: "lease of two VMs",
    arbiter: Arbiter::Lease,
    nodes: 2,
    vms: 2,
    epoch_max: Epoch(1),
    tasks_max: 0,
    faults_max: 1,
    faults: &[VmmStuck],
    invariants: &INVARIANTS,
    flaw: None,
    tidy: true,
};

/// Two VMs that share hosts, under the storage.
pub const STORAGE_OF_TWO: Config = Config {
    name: "storage of two VMs",
    arbiter: Arbiter::Storage,
    nodes: 2,
    vms: 2,
    epoch_max: Epoch(2),
    tasks_max: 0,
    faults_max: 1,
    faults: &[PowerLoss],
    invariants: &INVARIANTS,
    flaw: None,
    tidy: true,
};

pub const ALL: [Config; 7] =
    [MOVES, FAILOVER, HANDOVER, LEASE, LEASE_MOVES, LEASE_OF_TWO, STORAGE_OF_TWO];
