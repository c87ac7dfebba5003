//! Forgets what can have no effect any more, so that states that differ in nothing else are one.
//!
//! Every rule says why what it forgets is without effect. A rule that a flaw would make wrong is
//! left out under that flaw.

use crate::config::{FaultKind, Flaw};
use crate::model::{Protocol, is_counted_on};
use crate::state::{Agent, Order, OrderKind, Phase, Place, Renewal, Runner, State, Step, Vm};
use crate::words::{Boot, Epoch, NodeId};

impl Protocol {
    pub(crate) fn tidy(&self, s: &mut State) {
        for node in self.node_ids() {
            if !is_counted_on(s, node) {
                (s.node_mut(node).unknown, s.node_mut(node).quiet) = (false, 0);
            }
            tidy_lease(s, node);
        }
        let boots = s.nodes.map(|node| node.boot);
        let handovers = self.config.faults.contains(&FaultKind::HandOver);
        for vm in &mut s.vms {
            self.tidy_orders(vm, &boots);
            self.tidy_agents(vm);
            if !handovers {
                // Only a handover asks whether a seal was promised.
                let vmms = vm.agents.iter_mut().filter_map(|agent| agent.vmm.as_mut());
                vmms.for_each(|vmm| vmm.promised = false);
            }
            self.tidy_files(vm);
        }
        if !self.config.has(Flaw::OrdersWithoutBoot) {
            self.node_ids().for_each(|node| renumber_boots(s, node));
        }
    }

    /// Orders that no agent will ever obey.
    fn tidy_orders(&self, vm: &mut Vm, boots: &[Boot]) {
        if self.config.has(Flaw::OrdersWithoutBoot) || self.config.has(Flaw::FloorNotDurable) {
            return;
        }
        let (agents, task, place) = (vm.agents, vm.task, vm.place);
        let to_come: Vec<Order> =
            vm.orders.iter().filter(|order| order.kind == OrderKind::Prepare).copied().collect();
        vm.orders.retain(|order| {
            let agent = &agents[order.node.index()];
            let waits = task.is_some_and(|task| waits_for(&task.step, &place, order));
            boots[order.node.index()] == order.boot && can_act(agent, order, &to_come, waits)
        });
    }

    /// A VMM that has ended and may have run is no more than a floor: no order of its epoch is
    /// obeyed. And a floor is no more than the orders that it forbids, which are gone: only
    /// `Prepare` makes a VMM, and none is given twice under one epoch.
    fn tidy_agents(&self, vm: &mut Vm) {
        if self.config.has(Flaw::OrdersWithoutBoot) || self.config.has(Flaw::FloorNotDurable) {
            return;
        }
        let place = vm.place;
        let claimable = |sealed: Epoch| {
            let of_it = |kind| kind == OrderKind::ClaimBack { sealed };
            matches!(place, Place::Sealed { sealer: Some(it), .. } if it.epoch == sealed)
                || vm.orders.iter().any(|order| of_it(order.kind))
        };
        let mut agents = vm.agents;
        for agent in &mut agents {
            let Some(vmm) = agent.vmm else { continue };
            if vmm.phase == Phase::Ended && vmm.may_have_run && !claimable(vmm.epoch) {
                *agent = Agent { vmm: None, floor: vmm.epoch };
            }
        }
        vm.orders.retain(|order| {
            let below = agents[order.node.index()].floor >= order.epoch;
            order.kind == OrderKind::Release || !below
        });
        for agent in &mut agents {
            agent.floor = Epoch(0);
        }
        vm.agents = agents;
    }

    /// Files that nothing names are loaded by nobody.
    fn tidy_files(&self, vm: &mut Vm) {
        if self.config.has(Flaw::NoHandoverRecord) || self.config.has(Flaw::ConsumedFileAgain) {
            return;
        }
        let placed = match vm.place {
            Place::Sealed { file, .. } => Some(file),
            _ => None,
        };
        let loading = vm.orders.iter().filter_map(|order| match order.kind {
            OrderKind::Load { file } => Some(file),
            _ => None,
        });
        let retried = vm.task.and_then(|task| match task.step {
            Step::Activate { file, .. } => file,
            Step::ClaimBack { sealed, .. } => Some(sealed),
            _ => None,
        });
        let sealed_here = vm.agents.iter().filter_map(|agent| agent.vmm);
        let sealed_here = sealed_here.filter(|vmm| vmm.phase == Phase::Sealed).map(|vmm| vmm.epoch);
        let named: Vec<Epoch> = loading
            .chain(sealed_here)
            .chain(placed)
            .chain(retried)
            .chain(vm.claim.handed)
            .collect();
        vm.files.keep(&named);
    }
}

/// A lease matters where a guest runs or may begin to, and a grant if it names one that is there.
fn tidy_lease(s: &mut State, id: NodeId) {
    let begun = |vm: &Vm| {
        vm.vmm(id).filter(|vmm| !matches!(vmm.phase, Phase::Idle | Phase::Ended)).map(|it| it.epoch)
    };
    let epochs: Vec<Option<Epoch>> = s.vms.iter().map(begun).collect();
    let node = s.node_mut(id);
    if epochs.iter().all(Option::is_none) {
        (node.renewal, node.granted) = (Renewal::None, None);
    }
    if let Renewal::Granted { names, .. } = &mut node.renewal {
        for (name, epoch) in names.iter_mut().zip(epochs) {
            *name = name.filter(|name| Some(*name) == epoch);
        }
    }
}

/// Whether the task waits for an answer to this order, so that giving it again has an effect.
fn waits_for(step: &Step, place: &Place, order: &Order) -> bool {
    let it = (order.node, order.epoch);
    let of = |runner: &Runner| (runner.node, runner.epoch) == it;
    match (step, order.kind) {
        (Step::Prepare(at), OrderKind::Prepare)
        | (Step::TakeOver(at), OrderKind::TakeOver)
        | (Step::Load(at), OrderKind::Load { .. })
        | (Step::Activate { attempt: at, .. }, OrderKind::Activate { .. })
        | (Step::Reap(at), OrderKind::Release)
        | (Step::ClaimBack { source: at, .. }, OrderKind::ClaimBack { .. }) => {
            (at.node, at.epoch) == it
        }
        (Step::Seal(_), OrderKind::Seal { .. }) => matches!(place, Place::Runner(it) if of(it)),
        (Step::Release(runner), OrderKind::Release) => of(runner),
        (Step::Choose, OrderKind::Release) => matches!(place, Place::Revoked(it) if of(it)),
        _ => false,
    }
}

/// Whether an order can still change anything on its node, or be answered there where the leader
/// `waits` for that. `to_come` are the `Prepare`s that may still arrive.
fn can_act(agent: &Agent, order: &Order, to_come: &[Order], waits: bool) -> bool {
    let here = |other: &&Order| other.node == order.node;
    if order.kind == OrderKind::Release {
        let later = to_come.iter().filter(here).any(|other| other.epoch <= order.epoch);
        return waits || later || agent.vmm.is_some_and(|vmm| vmm.epoch <= order.epoch);
    }
    if agent.floor >= order.epoch || agent.vmm.is_some_and(|vmm| vmm.epoch > order.epoch) {
        return false;
    }
    let vmm = agent.vmm.filter(|vmm| vmm.epoch == order.epoch);
    let later = to_come.iter().filter(here).any(|other| other.epoch == order.epoch);
    match (order.kind, vmm) {
        (OrderKind::Prepare, None) => true,
        (OrderKind::Prepare, Some(vmm)) => waits || !vmm.may_have_run,
        (OrderKind::ClaimBack { sealed }, None) => agent.vmm.is_some_and(|vmm| vmm.epoch == sealed),
        (OrderKind::ClaimBack { .. }, Some(_)) => waits,
        (_, None) => later,
        (OrderKind::TakeOver, Some(vmm)) => waits || !(vmm.may_have_run || vmm.locked),
        (OrderKind::Load { .. }, Some(vmm)) => waits || !(vmm.may_have_run || vmm.loaded.is_some()),
        (OrderKind::Activate { .. }, Some(vmm)) => {
            let over = matches!(vmm.phase, Phase::Running | Phase::Sealed);
            waits || !(over || (vmm.phase == Phase::Ended && vmm.may_have_run))
        }
        (OrderKind::Seal { .. } | OrderKind::Release, Some(vmm)) => vmm.phase != Phase::Ended,
    }
}

/// Boots matter by being the same or not: they are numbered anew, in their order.
fn renumber_boots(s: &mut State, node: NodeId) {
    let mut named = vec![s.node(node).boot, s.node(node).known_boot];
    each_boot(s, node, |boot| named.push(*boot));
    named.sort_unstable();
    named.dedup();
    let rank = |boot: &mut Boot| {
        let lower = named.iter().filter(|other| **other < *boot).count();
        boot.0 = u8::try_from(lower).unwrap_or(u8::MAX);
    };
    each_boot(s, node, rank);
    let it = s.node_mut(node);
    rank(&mut it.boot);
    rank(&mut it.known_boot);
    let boot = it.boot;
    for vm in &mut s.vms {
        if vm.orders.iter().any(|order| order.node == node && order.boot != boot) {
            vm.orders.map(|order| {
                if order.node == node {
                    order.boot = boot;
                }
            });
        }
    }
}

/// The boots of a node that replicated state names. Orders name the present one only.
fn each_boot(s: &mut State, node: NodeId, mut visit: impl FnMut(&mut Boot)) {
    let mut runner = |runner: &mut Runner| {
        if runner.node == node {
            visit(&mut runner.boot);
        }
    };
    for vm in &mut s.vms {
        match &mut vm.place {
            Place::Runner(it) | Place::Revoked(it) | Place::Sealed { sealer: Some(it), .. } => {
                runner(it);
            }
            Place::Stopped | Place::Sealed { sealer: None, .. } => {}
        }
        let step = vm.task.as_mut().map(|task| &mut task.step);
        if let Some(Step::Activate { from: Some(it), .. } | Step::Release(it)) = step {
            runner(it);
        }
    }
}
