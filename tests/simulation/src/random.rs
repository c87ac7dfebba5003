//! The scenario of a seed: a cluster, and a minute in which nearly everything goes wrong.

use std::collections::BTreeMap;

use bellwether_types::{ClusterPatch, Failback, RestartPolicy, Strength};

use crate::rng::Rng;
use crate::scenario::{
    Cluster, Equipment, Event, Fault, NodeSize, Opening, PowerSwitch, Request, Scenario, Timed,
    VmSetup, Watchdog,
};
use crate::storage::StorageKind;

impl Scenario {
    /// The scenario of a seed: a cluster, and a minute in which nearly everything goes wrong.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::of(seed, "scenario");
        let cluster = cluster(&mut rng);
        let calm_ms = 8_000;
        let heal_at_ms = calm_ms + rng.within(30_000, 80_000);
        let mut events = Vec::new();
        let faults = rng.within(4, 24);
        let requests = rng.within(4, 20);
        for _ in 0..faults {
            let at_ms = rng.within(calm_ms, heal_at_ms - 2_000);
            events.push(Timed { at_ms, event: Event::Fault(fault(&mut rng, &cluster)) });
        }
        for _ in 0..requests {
            let at_ms = rng.within(calm_ms - 2_000, heal_at_ms);
            events.push(Timed { at_ms, event: Event::Request(request(&mut rng, &cluster)) });
        }
        // Somebody looks all the time, right after changes above all.
        for _ in 0..rng.within(8, 24) {
            let near = rng.pick(&events).map_or(calm_ms, |timed| timed.at_ms);
            let at_ms = (near + rng.below(3_000)).min(heal_at_ms);
            if let Some(vm) = rng.pick(&cluster.vms) {
                let request = Request::Show { vm: vm.name.clone() };
                events.push(Timed { at_ms, event: Event::Request(request) });
            }
        }
        // A person asserts that a node is down while it is: the one proof that rests on a word.
        let downs: Vec<Timed> = events.iter().filter_map(|it| assertion(&mut rng, it)).collect();
        events.extend(downs);
        let mut cluster = cluster;
        fencing(seed, &mut cluster, &mut events, (calm_ms, heal_at_ms));
        doubtful_starts(seed, &cluster, &mut events, (calm_ms, heal_at_ms));
        slow_quorum(seed, &cluster, &mut events, (calm_ms, heal_at_ms));
        events.sort_by_key(|timed| timed.at_ms);
        let (opening, settle_ms_max) = (Opening::AtOnce, Some(240_000));
        Self { seed, cluster, events, opening, heal_at_ms, settle_ms_max }
    }
}

/// Where VMs are under the lease arbiter, hosts have watchdogs and power switches of all kinds, and are
/// lost for longer. A generator of its own, so that all else is as without.
fn fencing(seed: u64, cluster: &mut Cluster, events: &mut Vec<Timed>, times: (u64, u64)) {
    let mut rng = Rng::of(seed, "fencing");
    let leased: Vec<String> =
        cluster.vms.iter().filter(|vm| vm.lease_arbiter).map(|vm| vm.name.clone()).collect();
    if leased.is_empty() {
        return;
    }
    for node in 1..=cluster.nodes {
        let equipment = Equipment { watchdog: watchdog(&mut rng), switch: switch(&mut rng) };
        cluster.other_equipment.insert(node, equipment);
    }
    if rng.below(4) == 0 {
        // Up to what the formulas allow.
        cluster.drift_ppm = i64::try_from(rng.below(80_000)).unwrap_or(0);
    }
    for _ in 0..rng.within(1, 4) {
        let at_ms = rng.within(times.0, times.1 - 2_000);
        let node = rng.within(1, cluster.nodes);
        let for_ms = rng.within(2_000, 30_000);
        let fault = match rng.below(8) {
            0 => Fault::Freeze { node, for_ms },
            1 | 2 => Fault::Split { side: vec![node], for_ms },
            3 => Fault::KillFencer { node, for_ms: for_ms / 4 },
            4 => Fault::Disarm { node, for_ms },
            5 => Fault::Power { node, for_ms },
            6 => Fault::CutStorage { node, for_ms },
            _ => {
                let vm = rng.pick(&leased).cloned().unwrap_or_default();
                Fault::StopVmm { vm, for_ms }
            }
        };
        // A host that does not reach the storage is most interesting when nobody hears it.
        if let Fault::CutStorage { .. } = fault {
            let at_ms = at_ms + rng.below(3_000);
            let event = Event::Fault(Fault::Split { side: vec![node], for_ms });
            events.push(Timed { at_ms: at_ms.min(times.1 - 1), event });
        }
        events.push(Timed { at_ms, event: Event::Fault(fault) });
    }
}

/// Starts whose answers are lost, of guests that end before anybody asks again.
fn doubtful_starts(seed: u64, cluster: &Cluster, events: &mut Vec<Timed>, times: (u64, u64)) {
    let mut rng = Rng::of(seed, "doubtful starts");
    for _ in 0..rng.below(4) {
        let Some(vm) = rng.pick(&cluster.vms).map(|vm| vm.name.clone()) else { return };
        let stop_ms = rng.within(times.0, times.1 - 8_000);
        let start_ms = stop_ms + rng.within(2_000, 5_000);
        let loss_permille = 200 + u32::try_from(rng.below(300)).unwrap_or(0);
        let for_ms = rng.within(50, 500);
        let weather = Fault::Weather { loss_permille, repeat_permille: 0, extra_ms: 0, for_ms };
        let end = match rng.below(3) {
            0 => Fault::KillVmm { vm: vm.clone() },
            1 => Fault::GuestCrash { vm: vm.clone() },
            _ => Fault::GuestShutdown { vm: vm.clone() },
        };
        let end_ms = (start_ms + rng.within(100, 3_000)).min(times.1 - 1);
        let start = Request::Start { vm: vm.clone(), node: None };
        events.extend([
            Timed { at_ms: stop_ms, event: Event::Request(Request::Stop { vm }) },
            Timed { at_ms: start_ms, event: Event::Request(start) },
            Timed { at_ms: start_ms + rng.within(5, 40), event: Event::Fault(weather) },
            Timed { at_ms: end_ms, event: Event::Fault(end) },
        ]);
    }
}

/// A leader that leads on and gets nothing committed for a while: it has to propose again what may
/// have been committed before.
fn slow_quorum(seed: u64, cluster: &Cluster, events: &mut Vec<Timed>, times: (u64, u64)) {
    let mut rng = Rng::of(seed, "slow quorum");
    for _ in 0..rng.below(2) {
        let at_ms = rng.within(times.0, times.1 - 12_000);
        // As long as a proposal is waited for, and longer.
        let (quick, for_ms) = (rng.within(1, cluster.controllers), rng.within(10_200, 14_000));
        for id in (1..=cluster.controllers).filter(|id| *id != quick) {
            let for_ms = for_ms + rng.below(300);
            events.push(Timed { at_ms, event: Event::Fault(Fault::StopController { id, for_ms }) });
        }
        for _ in 0..2 {
            let Some(vm) = rng.pick(&cluster.vms).map(|vm| vm.name.clone()) else { return };
            let begins_ms = at_ms - rng.below(1_000);
            let request = Request::Migrate { vm, node: None };
            events.push(Timed { at_ms: begins_ms, event: Event::Request(request) });
        }
    }
}

fn watchdog(rng: &mut Rng) -> Option<Watchdog> {
    match rng.below(8) {
        0..=4 => Some(Watchdog::Hardware { period_ms: 5_000 }),
        // The waiting time does not cover it.
        5 => Some(Watchdog::Hardware { period_ms: 30_000 }),
        6 => Some(Watchdog::Software { period_ms: 5_000 }),
        _ => None,
    }
}

fn switch(rng: &mut Rng) -> Option<PowerSwitch> {
    match rng.below(10) {
        0 | 1 => Some(PowerSwitch::Works),
        2 => Some(PowerSwitch::Fails),
        3 => Some(PowerSwitch::Hangs),
        4 => Some(PowerSwitch::Lies),
        _ => None,
    }
}

fn assertion(rng: &mut Rng, timed: &Timed) -> Option<Timed> {
    let Event::Fault(Fault::Power { node, for_ms }) = timed.event else { return None };
    let at_ms = timed.at_ms + rng.within(2_000, 8_000);
    let event = Event::Request(Request::ConfirmDown { node });
    (for_ms > 5_000 && rng.below(4) == 0).then_some(Timed { at_ms, event })
}

fn cluster(rng: &mut Rng) -> Cluster {
    let nodes = rng.within(3, 4);
    let storage = match rng.below(2) {
        0 => StorageKind::OneKernel,
        _ => StorageKind::Network { lease_ms: rng.within(4_000, 12_000) },
    };
    let vms = rng.within(2, 4);
    let mut vms: Vec<VmSetup> =
        (0..vms).map(|number| vm(rng, nodes, &format!("vm{number}"))).collect();
    rules(rng, nodes, &mut vms);
    let reserve_nodes = (rng.below(5) == 0).then_some(1);
    Cluster {
        nodes,
        controllers: 3,
        storage,
        vms,
        size: NodeSize { memory_mib: rng.within(2, 4) * 512, vcpus: 64 },
        other_sizes: Default::default(),
        settings: ClusterPatch { reserve_nodes, ..ClusterPatch::default() },
        handover_after_ms: rng.within(1_000, 8_000),
        drift_ppm: i64::try_from(rng.below(500)).unwrap_or(0),
        equipment: Equipment::default(),
        other_equipment: BTreeMap::new(),
    }
}

fn vm(rng: &mut Rng, nodes: u64, name: &str) -> VmSetup {
    let mut vm = VmSetup::new(name);
    vm.rules.priority = Some(u32::try_from(rng.below(3)).unwrap_or(0));
    vm.lease_arbiter = rng.below(4) == 0;
    if rng.below(8) == 0 {
        vm.rules.restart = Some(RestartPolicy::Never);
    }
    if rng.below(6) == 0 {
        let first = rng.within(1, nodes);
        vm.rules.owners = Some(vec![first, first % nodes + 1]);
    }
    vm
}

/// Rules between VMs, such that all of them can run when all is well.
fn rules(rng: &mut Rng, nodes: u64, vms: &mut [VmSetup]) {
    if rng.below(3) == 0 {
        let strength = if rng.below(2) == 0 { Strength::Hard } else { Strength::Soft };
        for vm in vms.iter_mut().take(2) {
            vm.rules.apart = Some(BTreeMap::from([("pair".to_owned(), strength)]));
        }
    }
    if rng.below(4) == 0
        && let [first, .., last] = vms
    {
        last.rules.after = Some(vec![first.name.clone()]);
    }
    for vm in vms {
        if rng.below(5) == 0 {
            let owners = vm.rules.owners.clone().unwrap_or_else(|| (1..=nodes).collect());
            vm.rules.prefer = rng.pick(&owners).map(|node| vec![*node]);
            vm.rules.failback = Some(Failback::Immediately);
        }
    }
}

fn duration(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.within(100, 1_500),
        1 | 2 => rng.within(1_500, 8_000),
        _ => rng.within(8_000, 30_000),
    }
}

fn fault(rng: &mut Rng, cluster: &Cluster) -> Fault {
    let node = rng.within(1, cluster.nodes);
    let id = rng.within(1, cluster.controllers);
    let vm = rng.pick(&cluster.vms).map(|vm| vm.name.clone()).unwrap_or_default();
    let for_ms = duration(rng);
    match rng.below(26) {
        0 | 1 => Fault::Power { node, for_ms },
        2 => Fault::Freeze { node, for_ms },
        3 => Fault::Suspend { node, for_ms },
        4..=6 => Fault::KillAgent { node, for_ms },
        7 | 8 => Fault::KillController { id, for_ms },
        9 | 10 => Fault::KillVmm { vm },
        11 => Fault::StopAgent { node, for_ms },
        12 => Fault::StopController { id, for_ms },
        13 => Fault::StopVmm { vm, for_ms },
        14 | 15 => {
            let to = rng.within(1, cluster.nodes - 1);
            let to = if to >= node { to + 1 } else { to };
            Fault::Cut { from: node, to, both: rng.below(2) == 0, for_ms }
        }
        16 | 17 => Fault::Split { side: vec![node], for_ms },
        18 => Fault::CutStorage { node, for_ms },
        19 | 20 => Fault::Weather {
            loss_permille: u32::try_from(rng.below(80)).unwrap_or(0),
            repeat_permille: u32::try_from(rng.below(150)).unwrap_or(0),
            extra_ms: rng.below(3_000),
            for_ms,
        },
        21 => Fault::StorageFull { for_ms },
        22 => match rng.below(2) {
            0 => Fault::StorageError { for_ms: for_ms.min(3_000) },
            _ => Fault::RuntimeFull { node, for_ms },
        },
        23 => Fault::Clock {
            node,
            jump_ms: 3_600_000 - i64::try_from(rng.below(7_200_000)).unwrap_or(0),
        },
        24 => Fault::GuestCrash { vm },
        _ => Fault::GuestShutdown { vm },
    }
}

fn request(rng: &mut Rng, cluster: &Cluster) -> Request {
    let node = rng.within(1, cluster.nodes);
    let vm = rng.pick(&cluster.vms).map(|vm| vm.name.clone()).unwrap_or_default();
    let named = (rng.below(3) == 0).then_some(node);
    match rng.below(22) {
        0..=6 => Request::Migrate { vm, node: named },
        7..=9 => Request::Save { vm },
        10..=12 => Request::Restore { vm },
        13 | 14 => Request::Start { vm, node: named },
        15 => Request::Stop { vm },
        16 => Request::Shutdown { vm },
        17 => Request::Pause { vm },
        18 => Request::Resume { vm },
        19 => Request::Drain { node },
        20 => Request::Undrain { node },
        _ => Request::Delete { vm },
    }
}
