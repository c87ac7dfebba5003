//! What is explored: how many nodes and VMs, who arbitrates, which faults, and which flaw is put
//! into the protocol to see it break.

use crate::words::Epoch;

/// What a node does that loses its lease; see protocol 1 of the design.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arbiter {
    /// The claim's lock and epoch decide.
    Storage,
    /// The deadline and the watchdog decide; locks are worth nothing.
    Lease,
}

/// What may go wrong, besides messages that are late, repeated or lost and nodes that are
/// suspected wrongly: those cost nothing and happen everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FaultKind {
    /// A VMM process dies.
    VmmDies,
    /// A host loses its power and boots again.
    PowerLoss,
    /// An agent dies, and another adopts its VMMs.
    AgentDies,
    /// The server gives up the locks of a client that it does not hear.
    StorageRevokes,
    /// A node is cut off, and hands a VM over.
    HandOver,
    /// A person asserts that a node is down, right or wrong.
    OperatorAsserts,
    /// A seal ends in an error, and the guest goes on; the file may look sealed.
    SealFails,
    /// A start fails for a reason of the host.
    StartFails,
    /// A VMM does not stop at its deadline.
    VmmStuck,
}

/// A deliberate mistake. Each breaks an invariant, and a test shows how.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Flaw {
    /// The old runner is granted its lease while its end is waited for.
    NoRevocation,
    /// A lost VM is started elsewhere without a proof.
    RestartBeforeProof,
    /// The guest runs without the claim's lock.
    NoClaimLock,
    /// The claim's epoch is not compared.
    NoEpochCompare,
    /// The destination starts when the source says sealed, before that is committed.
    ActivateBeforeSealed,
    /// The floor is lost with the agent.
    FloorNotDurable,
    /// An order is obeyed in whatever boot it arrives.
    OrdersWithoutBoot,
    /// An order to activate does not name the state file from which the guest is to go on.
    ActivateNamesNoFile,
    /// The watchdog proof is taken a tick too early.
    WaitTooShort,
    /// A new leader does not count its wait from its election.
    WaitIgnoresElection,
    /// The lease runs from the arrival of the grant, and not from the stamp of the request.
    LeaseFromArrival,
    /// A silent node that is heard again is taken for rebooted.
    SilenceIsReboot,
    /// A start of unknown outcome is taken for one that failed.
    UnknownIsFailed,
    /// The old runner is told released before its process has ended.
    ReleasedTooEarly,
    /// A failover resumes the file from which the lost runner was resumed.
    ConsumedFileAgain,
    /// The source goes on by itself when it is not told what became of its seal.
    SourceGoesOn,
    /// A handover leaves no record: any sealed file of the lost runner is taken.
    NoHandoverRecord,
    /// The handover record outlives the next run.
    RecordKept,
    /// A handover is called off without erasing its record.
    CalledOffWithRecord,
    /// A handover is called off although a seal of the same guest was promised.
    CalledOffAfterPromise,
}

impl Flaw {
    pub const ALL: &[Self] = &[
        Self::NoRevocation,
        Self::RestartBeforeProof,
        Self::NoClaimLock,
        Self::NoEpochCompare,
        Self::ActivateBeforeSealed,
        Self::FloorNotDurable,
        Self::OrdersWithoutBoot,
        Self::ActivateNamesNoFile,
        Self::WaitTooShort,
        Self::WaitIgnoresElection,
        Self::LeaseFromArrival,
        Self::SilenceIsReboot,
        Self::UnknownIsFailed,
        Self::ReleasedTooEarly,
        Self::ConsumedFileAgain,
        Self::SourceGoesOn,
        Self::NoHandoverRecord,
        Self::RecordKept,
        Self::CalledOffWithRecord,
        Self::CalledOffAfterPromise,
    ];
}

/// One exploration.
#[derive(Clone, Debug)]
pub struct Config {
    pub name: &'static str,
    pub arbiter: Arbiter,
    pub nodes: u8,
    pub vms: u8,
    /// The highest epoch that is given out: it bounds the attempts.
    pub epoch_max: Epoch,
    /// How many tasks a person begins: migrations, saves, stops.
    pub tasks_max: u8,
    pub faults_max: u8,
    pub faults: &'static [FaultKind],
    /// Which invariants are checked, by their names.
    pub invariants: &'static [&'static str],
    pub flaw: Option<Flaw>,
    /// Take states for one that differ in nothing that could have an effect.
    pub tidy: bool,
}

impl Config {
    pub fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    pub fn with(mut self, flaw: Flaw) -> Self {
        self.flaw = Some(flaw);
        self
    }
}
