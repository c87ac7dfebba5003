//! The standard configurations: small enough to be explored completely, and together complete.

use crate::config::FaultKind::{
    AgentDies, HandOver, OperatorAsserts, PowerLoss, SealFails, StartFails, StorageRevokes,
    VmmDies, VmmStuck,
};
use crate::config::{Arbiter, Config};
use crate::words::Epoch;

/// Migration, save, restore and stop, with one fault at any moment.
pub const MOVES: Config = Config {
    name: "moves",
    arbiter: Arbiter::Storage,
    nodes: 2,
    vms: 1,
    epoch_max: Epoch(3),
    tasks_max: 1,
    faults_max: 1,
    faults: &[VmmDies, PowerLoss, AgentDies, SealFails, StartFails],
    flaw: None,
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
    flaw: None,
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
    faults: &[HandOver, VmmDies],
    flaw: None,
};

/// Leases, the watchdog and the leader's wait.
pub const LEASE: Config = Config {
    name: "lease",
    arbiter: Arbiter::Lease,
    nodes: 2,
    vms: 1,
    epoch_max: Epoch(2),
    tasks_max: 0,
    faults_max: 1,
    faults: &[VmmStuck, VmmDies, PowerLoss],
    flaw: None,
};

/// Migration under leases.
pub const LEASE_MOVES: Config =
    Config { name: "lease moves", epoch_max: Epoch(2), tasks_max: 1, faults_max: 0, ..LEASE };

/// Two VMs that share hosts, leases and watchdogs.
pub const LEASE_OF_TWO: Config = Config {
    name: "lease of two VMs",
    arbiter: Arbiter::Lease,
    nodes: 2,
    vms: 2,
    epoch_max: Epoch(2),
    tasks_max: 0,
    faults_max: 1,
    faults: &[VmmStuck],
    flaw: None,
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
    flaw: None,
};

pub const ALL: [Config; 7] =
    [MOVES, FAILOVER, HANDOVER, LEASE, LEASE_MOVES, LEASE_OF_TWO, STORAGE_OF_TWO];
