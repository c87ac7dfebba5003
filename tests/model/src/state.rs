//! One state of the model: what is replicated, what is on each node, what is on the storage, what
//! is on its way, and which clocks run.

use crate::set::Set;
use crate::words::{Boot, Epoch, NodeId, VmId};

/// The most nodes that a configuration can have.
pub const NODES_MAX: usize = 3;
/// The most VMs.
pub const VMS_MAX: usize = 2;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    pub nodes: [Node; NODES_MAX],
    pub vms: Vec<Vm>,
    /// How many tasks a person may still begin, and how many faults may still happen.
    pub tasks_left: u8,
    pub faults_left: u8,
}

/// A host, and what the controllers hold of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Node {
    pub boot: Boot,
    /// Replicated: the boot that registered last.
    pub known_boot: Boot,
    /// Replicated: not heard from. It may still be running its VMs.
    pub unknown: bool,
    pub renewal: Renewal,
    /// Ticks since the stamp of the newest grant that arrived; none after the watchdog's bound.
    pub granted: Option<u8>,
    /// The leader's clock: ticks since it last granted this node anything, or came to lead.
    pub quiet: u8,
}

/// The newest lease request of a node; answers to older ones count for nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Renewal {
    #[default]
    None,
    /// Stamped so many ticks ago.
    Asked { age: u8 },
    /// The leader's answer is on its way, and names what the node may run.
    Granted { age: u8, names: [Option<Epoch>; VMS_MAX] },
}

/// Everything about one VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Vm {
    /// Replicated: who may run it, the highest epoch given out, and the task that owns it.
    pub place: Place,
    pub epoch: Epoch,
    pub task: Option<Task>,
    pub agents: [Agent; NODES_MAX],
    pub claim: Claim,
    pub files: Files,
    /// Every order that was ever given and could still be obeyed: each may arrive late, twice or
    /// never.
    pub orders: Set<Order>,
    /// Answers to the task's step, on their way to the leader.
    pub answers: Set<Answer>,
    /// A person asserted that the runner of this epoch is down, and may have been wrong.
    pub asserted: Option<Epoch>,
    /// A state file was resumed that was not the VM any more, or before the state said so.
    pub misused: bool,
    /// A VM that was to go on from a state file booted from its disks.
    pub cold: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Runner {
    pub node: NodeId,
    pub epoch: Epoch,
    pub boot: Boot,
}

/// As in `controller/core/src/state.rs`. A state file is named by the epoch that sealed it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    Stopped,
    Runner(Runner),
    Sealed { file: Epoch, sealer: Option<Runner> },
    Revoked(Runner),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Attempt {
    pub node: NodeId,
    pub epoch: Epoch,
}

/// As in `controller/core/src/task.rs`; `Abandon` takes no time here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Step {
    Choose,
    Prepare(Attempt),
    TakeOver(Attempt),
    Seal(Option<Attempt>),
    Load(Attempt),
    Activate { attempt: Attempt, from: Option<Runner>, file: Option<Epoch> },
    Reap(Attempt),
    ClaimBack { source: Attempt, sealed: Epoch },
    Release(Runner),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    Start,
    Restore,
    Failover,
    Migrate,
    Save,
    Stop,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Task {
    pub kind: Kind,
    pub step: Step,
}

/// What a node's agent keeps of one VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Agent {
    /// The highest epoch that was released in this boot.
    pub floor: Epoch,
    pub vmm: Option<Vmm>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// Prepared; perhaps locked, perhaps loaded.
    Idle,
    /// Told to start: it takes the locks, and runs.
    Starting,
    Running,
    Sealed,
    /// The process is gone, and its agent knows.
    Ended,
}

/// One VMM process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Vmm {
    pub epoch: Epoch,
    pub phase: Phase,
    /// It holds the claim and the disks.
    pub locked: bool,
    /// The storage took its locks away: its writes fail. `overtaken`: another guest ran since.
    pub cut: bool,
    pub overtaken: bool,
    pub loaded: Option<Epoch>,
    pub may_have_run: bool,
    /// A start went unanswered, so that a later refusal proves nothing.
    pub start_lost: bool,
    /// Its agent was cut off and hands it over.
    pub handing: bool,
    /// The leader was, or may have been, told that it is sealed.
    pub promised: bool,
    /// Ticks since the stamp of the newest grant that names its epoch; none after the deadline.
    pub lease: Option<u8>,
    /// It does not stop at the deadline: only the watchdog ends it.
    pub stuck: bool,
}

impl Vmm {
    pub fn preparing(epoch: Epoch) -> Self {
        Self {
            epoch,
            phase: Phase::Idle,
            locked: false,
            cut: false,
            overtaken: false,
            loaded: None,
            may_have_run: false,
            start_lost: false,
            handing: false,
            promised: false,
            lease: None,
            stuck: false,
        }
    }

    /// The process is gone; what its agent knows of it stays.
    pub fn ended(self) -> Self {
        let Self { epoch, may_have_run, .. } = self;
        Self { phase: Phase::Ended, may_have_run, ..Self::preparing(epoch) }
    }
}

/// The claim file: its lock and its record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Claim {
    /// The highest epoch that ever held it.
    pub epoch: Epoch,
    pub holder: Option<NodeId>,
    /// The handover record: the file in which the last guest that ran was sealed. Later claims
    /// carry it on, until one lets a guest run.
    pub handed: Option<Epoch>,
}

/// The state files on the storage.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Files {
    /// A bit for each epoch whose file looks sealed.
    sealed: u8,
    /// The file that still is the VM: no guest has run since it was sealed.
    pub fresh: Option<Epoch>,
}

impl Files {
    pub fn seal(&mut self, epoch: Epoch) {
        self.sealed |= 1 << epoch.0;
    }

    /// The file that was sealed under the highest epoch.
    pub fn last_sealed(&self) -> Option<Epoch> {
        let highest = u8::BITS.checked_sub(self.sealed.leading_zeros() + 1)?;
        u8::try_from(highest).ok().map(Epoch)
    }

    pub fn keep(&mut self, named: &[Epoch]) {
        self.sealed &= named.iter().fold(0, |bits, epoch| bits | 1 << epoch.0);
    }

    pub fn is_sealed(&self, epoch: Epoch) -> bool {
        self.sealed & (1 << epoch.0) != 0
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum OrderKind {
    Prepare,
    TakeOver,
    Load {
        file: Epoch,
    },
    /// With the file from which it is to go on.
    Activate {
        file: Option<Epoch>,
    },
    Seal {
        load_at: Option<Attempt>,
    },
    ClaimBack {
        sealed: Epoch,
    },
    Release,
}

/// An order to an agent, for one boot of its node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Order {
    pub node: NodeId,
    pub epoch: Epoch,
    pub kind: OrderKind,
    pub boot: Boot,
}

/// An answer to the step at which the task stands; the step gives node and epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Answer {
    Prepared,
    Held {
        handed: Option<Epoch>,
    },
    Sealed,
    Loaded,
    Activated,
    ClaimedBack,
    Released,
    /// The seal failed, and the guest goes on.
    NotSealed,
    /// The guest has not run under this epoch, and never will.
    NeverRan,
    /// The watchdog's bound has passed: decided, not yet committed.
    Fenced,
}

impl State {
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    pub fn vm_mut(&mut self, id: VmId) -> &mut Vm {
        &mut self.vms[usize::from(id.0)]
    }

    pub fn vm(&self, id: VmId) -> &Vm {
        &self.vms[usize::from(id.0)]
    }

    pub fn vm_ids(&self) -> impl Iterator<Item = VmId> + use<> {
        (0..u8::try_from(self.vms.len()).unwrap_or(u8::MAX)).map(VmId)
    }

    /// The runner's node is not heard from, or has rebooted since.
    pub fn is_lost(&self, runner: &Runner) -> bool {
        let node = self.node(runner.node);
        node.unknown || node.known_boot != runner.boot
    }
}

impl Vm {
    pub fn agent(&self, node: NodeId) -> &Agent {
        &self.agents[node.index()]
    }

    pub fn agent_mut(&mut self, node: NodeId) -> &mut Agent {
        &mut self.agents[node.index()]
    }

    pub fn vmm(&self, node: NodeId) -> Option<&Vmm> {
        self.agent(node).vmm.as_ref()
    }

    pub fn vmm_mut(&mut self, node: NodeId) -> Option<&mut Vmm> {
        self.agent_mut(node).vmm.as_mut()
    }

    /// The VMM process on a node ends, however it ends: the kernel frees its locks.
    pub fn end_process(&mut self, node: NodeId) {
        if self.claim.holder == Some(node) {
            self.claim.holder = None;
        }
        let agent = self.agent_mut(node);
        agent.vmm = agent.vmm.map(Vmm::ended);
    }

    /// The VMM is gone, reaped, and its epoch at or below the floor.
    pub fn release(&mut self, node: NodeId, up_to: Epoch) {
        self.end_process(node);
        let agent = self.agent_mut(node);
        agent.vmm = None;
        agent.floor = agent.floor.max(up_to);
    }
}
