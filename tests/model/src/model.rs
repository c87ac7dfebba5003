//! The model for the checker: initial state, transitions, properties.

use std::sync::Arc;

use stateright::{Model, Property};

use crate::action::{Action, Commit, Proof, VmmAct};
use crate::agents::is_named;
use crate::commits::is_expected;
use crate::config::{Arbiter, Config, FaultKind, Flaw};
use crate::marks::{Mark, Marks};
use crate::state::{
    Agent, Answer, Claim, Files, Kind, NODES_MAX, Node, Phase, Place, Renewal, Runner, State, Step,
    Vm, Vmm,
};
use crate::words::{Boot, Epoch, NodeId, VmId};

/// The protocol under one configuration.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub config: Config,
    marks: Arc<Marks>,
}

pub const ONE_WRITER: &str = "1: one writer";
pub const RESUMED_ONCE: &str = "3: a state file resumes at most once, and only when it may";
pub const UNKNOWN_IS_NOT_DEAD: &str = "4: who runs is the runner that the state names";

pub const MEMORY_KEPT: &str = "2: what is resumed from a file does not boot instead";

pub const INVARIANTS: [&str; 4] = [ONE_WRITER, MEMORY_KEPT, RESUMED_ONCE, UNKNOWN_IS_NOT_DEAD];

impl Protocol {
    pub fn new(config: Config) -> Self {
        Self { config, marks: Arc::default() }
    }

    pub fn marks(&self) -> Arc<Marks> {
        Arc::clone(&self.marks)
    }

    pub(crate) fn mark(&self, mark: Mark) {
        self.marks.note(mark);
    }

    pub(crate) fn node_ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (1..=self.config.nodes).map(NodeId)
    }

    /// Every VM runs on node 1, under epoch 1.
    fn running_vm(&self) -> Vm {
        let (node, epoch) = (NodeId(1), Epoch(1));
        let exact = self.config.arbiter == Arbiter::Storage;
        let mut vm = Vm {
            place: Place::Runner(Runner { node, epoch, boot: Boot(0) }),
            epoch,
            task: None,
            agents: [Agent::default(); NODES_MAX],
            claim: Claim { epoch, holder: Some(node).filter(|_| exact), handed: None },
            files: Files::default(),
            orders: Default::default(),
            answers: Default::default(),
            asserted: None,
            misused: false,
            cold: false,
        };
        vm.agent_mut(node).vmm = Some(Vmm {
            phase: Phase::Running,
            locked: exact,
            may_have_run: true,
            lease: Some(0).filter(|_| !exact),
            ..Vmm::preparing(epoch)
        });
        vm
    }

    /// The first invariant of those that are checked that a state breaks.
    pub fn broken(&self, s: &State) -> Option<&'static str> {
        self.config.invariants.iter().copied().find(|invariant| match *invariant {
            ONE_WRITER => !has_one_writer(self, s),
            MEMORY_KEPT => s.vms.iter().any(|vm| vm.cold),
            RESUMED_ONCE => s.vms.iter().any(|vm| vm.misused),
            _ => !writers_are_named(self, s),
        })
    }

    fn commits(&self, s: &State, id: VmId, actions: &mut Vec<Action>) {
        let vm = s.vm(id);
        let mut add = |commit| actions.push(Action::Commit(id, commit));
        let Some(task) = vm.task else {
            add(Commit::RunnerLost);
            let kinds: &[Kind] = match vm.place {
                Place::Stopped => &[Kind::Start],
                Place::Sealed { .. } => &[Kind::Restore],
                Place::Revoked(_) => &[Kind::Failover],
                Place::Runner(_) if s.tasks_left == 0 => &[],
                Place::Runner(_) => &[Kind::Migrate, Kind::Save, Kind::Stop],
            };
            kinds.iter().map(|kind| Commit::BeginTask(*kind)).for_each(add);
            return;
        };
        if !matches!(vm.place, Place::Stopped | Place::Revoked(_)) {
            add(Commit::RunnerLost);
        }
        match task.step {
            Step::Choose => {
                self.node_ids().map(Commit::Chosen).for_each(&mut add);
                if matches!(vm.place, Place::Revoked(_)) {
                    add(Commit::GiveRelease);
                    add(Commit::Reinstated);
                    add(Commit::Proven(Proof::Rebooted));
                }
            }
            Step::Prepare(_) | Step::TakeOver(_) | Step::Load(_) | Step::Seal(_) => {
                add(Commit::Failed);
            }
            Step::Activate { .. } | Step::ClaimBack { .. } => {
                add(Commit::Failed);
                add(Commit::TimedOut);
            }
            Step::Reap(_) | Step::Release(_) => {}
        }
        for answer in vm.answers.iter() {
            match *answer {
                Answer::Prepared => add(Commit::Prepared),
                Answer::Held { handed } => add(Commit::Held { handed }),
                Answer::Sealed => add(Commit::Sealed),
                Answer::Loaded => add(Commit::Loaded),
                Answer::Activated => add(Commit::Activated),
                Answer::ClaimedBack => add(Commit::ClaimedBack),
                Answer::Released => add(Commit::Released),
                Answer::Fenced => add(Commit::Proven(Proof::Watchdog)),
                Answer::NotSealed | Answer::NeverRan => {}
            }
        }
    }

    fn node_actions(&self, s: &State, node: NodeId, actions: &mut Vec<Action>) {
        let it = s.node(node);
        if it.unknown {
            actions.push(Action::NodeOnline(node));
        } else if is_counted_on(s, node) {
            actions.push(Action::NodeUnknown(node));
        }
        if it.known_boot != it.boot {
            actions.push(Action::RegisterNode(node, it.boot));
        }
        if self.config.arbiter == Arbiter::Lease {
            match it.renewal {
                Renewal::None => actions.push(Action::Ask(node)),
                Renewal::Asked { .. } => {
                    actions.extend([Action::Ask(node), Action::Grant(node)]);
                }
                Renewal::Granted { .. } => {
                    actions.extend([Action::Ask(node), Action::GrantArrives(node)]);
                }
            }
        }
    }

    fn vm_actions(&self, s: &State, id: VmId, actions: &mut Vec<Action>) {
        self.commits(s, id, actions);
        let vm = s.vm(id);
        actions.extend(vm.orders.iter().map(|order| Action::Deliver(id, *order)));
        for node in self.node_ids() {
            let Some(vmm) = vm.vmm(node) else { continue };
            if !is_expected(vm, node, vmm.epoch) {
                actions.push(Action::ReleaseStray(id, node, vmm.epoch));
            }
            let acts: &[VmmAct] = match vmm.phase {
                Phase::Starting => &[VmmAct::Run, VmmAct::GiveUp],
                Phase::Sealed if vmm.handing => {
                    &[VmmAct::HandOverRecord, VmmAct::LetGo, VmmAct::CallOff]
                }
                Phase::Sealed if self.config.has(Flaw::SourceGoesOn) => &[VmmAct::GoOn],
                _ => &[],
            };
            actions.extend(acts.iter().map(|act| Action::Vmm(id, node, *act)));
        }
        if s.faults_left > 0 {
            for node in self.node_ids() {
                // A host's loss is everybody's: it is written down once.
                let once = |kind: &&FaultKind| **kind != FaultKind::PowerLoss || id == VmId(0);
                let kinds = self.config.faults.iter().filter(once);
                actions.extend(kinds.map(|kind| Action::Fault(id, node, *kind)));
            }
        }
    }

    fn apply(&self, s: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Commit(id, commit) => self.commit(s, id, commit),
            Action::NodeUnknown(node) => {
                s.node_mut(node).unknown = true;
                Some(())
            }
            Action::NodeOnline(node) => {
                // Only the boot that registered last can be heard again.
                (s.node(node).boot == s.node(node).known_boot).then_some(())?;
                s.node_mut(node).unknown = false;
                Some(())
            }
            Action::RegisterNode(node, boot) => {
                let it = s.node_mut(node);
                (it.known_boot, it.unknown) = (boot, false);
                Some(())
            }
            Action::ReleaseStray(id, node, epoch) => self.release_stray(s, id, node, epoch),
            Action::Deliver(id, order) => self.deliver(s, id, order),
            Action::Vmm(id, node, act) => self.act(s, id, node, act),
            Action::Fault(id, node, kind) => self.fault(s, id, node, kind),
            Action::LeaderLost => self.leader_lost(s),
            Action::Tick => self.tick(s),
            Action::Ask(node) => self.ask(s, node),
            Action::Grant(node) => self.grant(s, node),
            Action::GrantArrives(node) => self.grant_arrives(s, node),
        }
    }
}

/// Whether the state counts on a node for some VM: only then does its silence matter.
pub(crate) fn is_counted_on(s: &State, node: NodeId) -> bool {
    s.vms.iter().any(|vm| match vm.place {
        Place::Runner(runner) | Place::Revoked(runner) => runner.node == node,
        Place::Sealed { sealer, .. } => sealer.is_some_and(|sealer| sealer.node == node),
        Place::Stopped => false,
    })
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let leased = self.config.arbiter == Arbiter::Lease;
        let node = Node { granted: Some(0).filter(|_| leased), ..Node::default() };
        let vms = (0..self.config.vms).map(|_| self.running_vm()).collect();
        let (tasks_left, faults_left) = (self.config.tasks_max, self.config.faults_max);
        vec![State { nodes: [node; NODES_MAX], vms, tasks_left, faults_left }]
    }

    fn actions(&self, s: &State, actions: &mut Vec<Action>) {
        for id in s.vm_ids() {
            self.vm_actions(s, id, actions);
            if self.config.arbiter == Arbiter::Lease {
                actions.push(Action::Commit(id, Commit::Fence));
            }
        }
        for node in self.node_ids() {
            self.node_actions(s, node, actions);
        }
        // What a leader knows besides is answers on their way, and those may be late for ever.
        if self.config.arbiter == Arbiter::Lease {
            actions.extend([Action::LeaderLost, Action::Tick]);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        self.apply(&mut next, action)?;
        if self.config.tidy {
            self.tidy(&mut next);
        }
        Some(next)
    }

    /// One property for all: the search ends at the first state that breaks any of them, and so with
    /// the shortest way to it.
    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("the invariants hold", |model, s| model.broken(s).is_none())]
    }
}

fn has_one_writer(model: &Protocol, s: &State) -> bool {
    s.vms.iter().all(|vm| {
        let vmms = vm.agents.iter().filter_map(|agent| agent.vmm.as_ref());
        vmms.filter(|vmm| model.writes(vmm)).count() <= 1
    })
}

/// Wherever a guest writes, the replicated state names it, revoked or not: nobody else was made the
/// runner without a proof, and no proof was false. An operator's word may be; then the locks hold.
fn writers_are_named(model: &Protocol, s: &State) -> bool {
    s.vms.iter().all(|vm| {
        model.node_ids().all(|node| {
            vm.vmm(node).filter(|vmm| model.writes(vmm)).is_none_or(|vmm| {
                is_named(&vm.place, node, vmm.epoch) || vm.asserted == Some(vmm.epoch)
            })
        })
    })
}
