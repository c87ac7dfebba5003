//! Random faults in random order, then peace: VMs never run twice, and always come back.

use bellwether_types::{NodeId, TaskId, VmId};

use super::model::{Fate, Model, Phase};
use crate::state::Desired;
use crate::{Outcome, Place, TaskKind};

/// A small generator (xorshift64*), so that a run is its seed.
pub struct Chance(pub u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let len = u64::try_from(from.len()).unwrap();
        (len > 0).then(|| from[usize::try_from(self.below(len)).unwrap()])
    }
}

fn fate(chance: &mut Chance) -> Fate {
    match chance.below(12) {
        0 => Fate::Lost,
        1 => Fate::AnswerLost,
        2 => Fate::Refused,
        3 => Fate::Slow,
        _ => Fate::Done,
    }
}

fn fault(model: &mut Model, chance: &mut Chance) {
    let nodes: Vec<NodeId> = model.hosts.keys().copied().collect();
    let node = chance.pick(&nodes).unwrap();
    match chance.below(11) {
        0 => model.power_off(node),
        1 | 2 => model.power_on(node),
        3 => model.hosts.get_mut(&node).unwrap().agent ^= true,
        4 => model.hosts.get_mut(&node).unwrap().connected ^= true,
        5 => {
            let vmms: Vec<_> = model.hosts[&node].vmms.keys().copied().collect();
            if let Some((vm, epoch)) = chance.pick(&vmms) {
                model.kill_vmm(node, vm, epoch);
            }
        }
        6 => model.hosts.get_mut(&node).unwrap().orders ^= true,
        7 => model.deliver_late_seal(),
        8 => end_a_seal(model, chance, node),
        _ => {}
    }
}

fn end_a_seal(model: &mut Model, chance: &mut Chance, node: NodeId) {
    let vmms = model.hosts[&node].vmms.iter();
    let sealing: Vec<_> =
        vmms.filter(|(_, vmm)| vmm.phase == Phase::Sealing).map(|(key, _)| *key).collect();
    if let Some((vm, epoch)) = chance.pick(&sealing) {
        let good = chance.below(4) > 0;
        model.end_seal(node, vm, epoch, good);
    }
}

fn request(model: &mut Model, chance: &mut Chance, vms: &[VmId]) {
    let kinds = [
        TaskKind::Start,
        TaskKind::Migrate,
        TaskKind::Migrate,
        TaskKind::Migrate,
        TaskKind::Save,
        TaskKind::Restore,
        TaskKind::Stop,
        TaskKind::Shutdown,
    ];
    let (vm, kind) = (chance.pick(vms).unwrap(), chance.pick(&kinds).unwrap());
    model.begin(vm, kind);
}

fn storm(model: &mut Model, chance: &mut Chance, vms: &[VmId], steps: usize) {
    for _ in 0..steps {
        model.now += chance.below(400);
        match chance.below(20) {
            0 => fault(model, chance),
            1 => request(model, chance, vms),
            2..=5 => {
                let nodes: Vec<NodeId> = model.hosts.keys().copied().collect();
                model.report(chance.pick(&nodes).unwrap());
            }
            6 | 7 => model.plan(),
            _ => {
                let tasks: Vec<TaskId> = model.state.active_tasks().map(|task| task.id).collect();
                if let Some(task) = chance.pick(&tasks) {
                    let fate = fate(chance);
                    model.step(task, fate);
                }
            }
        }
        model.check();
    }
}

fn heal(model: &mut Model) {
    let nodes: Vec<NodeId> = model.hosts.keys().copied().collect();
    for node in nodes {
        model.power_on(node);
        let host = model.hosts.get_mut(&node).unwrap();
        (host.agent, host.connected, host.orders) = (true, true, true);
        let vmms: Vec<_> = host.vmms.keys().copied().collect();
        vmms.iter().for_each(|(vm, epoch)| model.end_seal(node, *vm, *epoch, epoch.0 % 3 > 0));
    }
    model.settle(800);
}

fn check_peace(model: &Model, vms: &[VmId], seed: u64) {
    for vm in vms {
        let record = &model.state.vms[vm];
        assert_eq!(
            record.task,
            None,
            "seed {seed}: {:?}",
            model.state.tasks.get(&record.task.unwrap())
        );
        let running = model.running(*vm);
        match record.desired {
            Desired::Running => {
                let Place::Runner(runner) = &record.place else {
                    panic!("seed {seed}: wanted running, is {:?}", record.place)
                };
                assert_eq!(running, [(runner.node, runner.epoch)], "seed {seed}");
            }
            Desired::Stopped => {
                assert_eq!((&record.place, running.len()), (&Place::Stopped, 0), "seed {seed}");
            }
            Desired::Saved => {
                assert!(matches!(record.place, Place::Sealed { .. }), "seed {seed}");
                assert_eq!(running, [], "seed {seed}");
            }
        }
    }
    let vmms = model.hosts.values().flat_map(|host| host.vmms.values());
    let left = vmms.filter(|vmm| vmm.phase != Phase::Running).count();
    assert_eq!(left, 0, "seed {seed}: strays are left");
}

fn run(seed: u64) {
    let mut chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut model = Model::new(3);
    let vms: Vec<VmId> = ["a", "b"].iter().map(|name| model.create(name)).collect();
    for vm in &vms {
        assert!(matches!(model.begin(*vm, TaskKind::Start), Outcome::Task(_)));
    }
    model.settle(4);
    storm(&mut model, &mut chance, &vms, 400);
    heal(&mut model);
    check_peace(&model, &vms, seed);
}

#[test]
fn vms_never_run_twice_and_always_come_back() {
    let (first, count) = match std::env::var("BELLWETHER_SEED") {
        Ok(seed) => (seed.parse().unwrap(), 1),
        Err(_) => (1, 400),
    };
    for seed in first..first + count {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(
            result.is_ok(),
            "replay: BELLWETHER_SEED={seed} cargo test -p bellwether-core random"
        );
    }
}
