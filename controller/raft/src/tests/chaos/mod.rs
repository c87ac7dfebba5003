//! openraft itself, on our store and our network, while nearly everything goes wrong.
//!
//! Controllers run in one thread under tokio's paused clock, on devices in memory that lose what was
//! not flushed, over the product's own gRPC on connections in memory. Time moves in steps of ten
//! milliseconds, and only when every writer has done what it was asked and every task waits, so that
//! nothing times out because the machine is slow. What is drawn here comes from the seed. openraft
//! draws its election timeouts itself, and its writer is a thread: a seed is therefore the same
//! schedule of faults and requests, and not the same run bit for bit.
//!
//! `cargo xtask sim --openraft --minutes N` runs seed after seed.

mod history;
mod net;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bellwether_core::Command;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;

use self::history::History;
use self::net::Net;
use crate::store::tests::device::{Device, Fault};
use crate::store::{Store, StoreOptions};
use crate::testing::command;
use crate::{ControllerNode, RaftConfig, RaftHandle};

const STEP: Duration = Duration::from_millis(10);
/// Every controller's first number; numbers are never given twice.
const FOUNDERS: u64 = 3;
const MEMBERS_MAX: usize = 5;
const WRITERS: u64 = 3;
const READERS: u64 = 1;

/// A small generator (SplitMix64).
pub struct Chance(u64);

impl Chance {
    pub fn of(seed: u64, purpose: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ purpose.rotate_left(32))
    }

    pub fn below(&mut self, n: u64) -> u64 {
        crate::store::tests::disk::random(&mut self.0) % n.max(1)
    }

    fn ms(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(low + self.below(high - low))
    }
}

/// A controller that runs.
struct Running {
    handle: RaftHandle,
    store: Store,
    device: Device,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct World {
    running: BTreeMap<u64, Running>,
    /// What the disks of those that are down hold.
    down: BTreeMap<u64, Vec<u8>>,
    history: History,
    next_id: u64,
    faults: BTreeMap<&'static str, u64>,
    over: bool,
}

#[derive(Clone)]
struct Group {
    world: Arc<Mutex<World>>,
    net: Net,
}

fn node(id: u64) -> ControllerNode {
    ControllerNode { name: format!("host-{id}"), address: "memory".into(), ..Default::default() }
}

impl Group {
    fn new(seed: u64) -> Self {
        let world = World { next_id: FOUNDERS + 1, ..World::default() };
        Self { world: Arc::new(Mutex::new(world)), net: Net::new(seed) }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Starts a controller on what its device holds.
    async fn start(&self, id: u64, image: Vec<u8>) {
        let device = Device::holding(&image);
        let options = StoreOptions {
            node_id: id,
            cache_bytes: 1 << 20,
            write_queue: 64,
            on_fatal: Arc::new(|_| {}),
        };
        let backend = device.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open_backend(backend, options));
        let store = opened.await.unwrap().unwrap();
        let mut config = RaftConfig::new(id, "/nowhere");
        (config.limits.snapshot_entries, config.limits.kept_entries) = (60, 10);
        config.on_fatal = Arc::new(|_| {});
        let net = self.net.clone();
        let connector = move |to: u64, _: ControllerNode| net.clone().connect(id, to);
        let incoming = UnboundedReceiverStream::new(self.net.listen(id));
        let handle = RaftHandle::start_on(config, connector, store.clone()).await.unwrap();
        let service = handle.service().into_server();
        let server = tokio::spawn(async move {
            let incoming = incoming.map(Ok::<_, std::io::Error>);
            // It ends with the controller.
            let _ = Server::builder().add_service(service).serve_with_incoming(incoming).await;
        });
        self.world().running.insert(id, Running { handle, store, device, server });
    }

    /// Power is lost: what was flushed stays, and any part of the rest.
    async fn crash(&self, id: u64, chance: &mut Chance) {
        let Some(running) = self.world().running.remove(&id) else { return };
        // First the device ends, so that nothing is flushed behind the picture that is taken of it.
        running.device.fail_at(0, Fault::Forever);
        self.net.close(id);
        let mut images = running.device.after_power_failure(chance.below(u64::MAX));
        let taken = images.swap_remove(chance.below(images.len() as u64) as usize);
        running.server.abort();
        // Its end is awaited, whatever it says: its disk is gone.
        let _ = running.handle.shutdown().await;
        let mut world = self.world();
        world.down.insert(id, taken);
        *world.faults.entry("crash").or_default() += 1;
    }

    async fn restart(&self, id: u64) {
        let image = self.world().down.remove(&id);
        if let Some(image) = image {
            self.start(id, image).await;
        }
    }

    /// One of those that run.
    fn any(&self, chance: &mut Chance) -> Option<(u64, RaftHandle)> {
        let world = self.world();
        let at = chance.below(world.running.len() as u64) as usize;
        world.running.iter().nth(at).map(|(id, running)| (*id, running.handle.clone()))
    }

    fn leader(&self) -> Option<(u64, RaftHandle)> {
        let world = self.world();
        let leads = |running: &&Running| running.handle.status().is_leader();
        let (id, running) = world.running.iter().find(|(_, running)| leads(running))?;
        Some((*id, running.handle.clone()))
    }

    fn is_over(&self) -> bool {
        self.world().over
    }

    /// Moves time on for so long, as described at the module.
    async fn pass(&self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while tokio::time::Instant::now() < end {
            self.settle().await;
            tokio::time::advance(STEP).await;
        }
    }

    /// Until no task runs and no writer has anything to do.
    async fn settle(&self) {
        let mut before = u64::MAX;
        loop {
            for _ in 0..16 {
                tokio::task::yield_now().await;
            }
            let stores: Vec<(Store, Device)> = {
                let world = self.world();
                let running = world.running.values();
                running.map(|it| (it.store.clone(), it.device.clone())).collect()
            };
            // While this thread blocks, the paused clock stands still.
            let operations = tokio::task::spawn_blocking(move || {
                let settle = |(store, device): &(Store, Device)| {
                    store.settle();
                    device.operations()
                };
                stores.iter().map(settle).sum::<u64>()
            });
            let operations = operations.await.unwrap();
            if operations == before {
                return;
            }
            before = operations;
        }
    }
}

/// Asks controllers to write, as fast as answers come and a little slower.
async fn write(group: Group, mut chance: Chance) {
    while !group.is_over() {
        let target = if chance.below(4) == 0 { group.any(&mut chance) } else { group.leader() };
        let Some((_, handle)) = target else {
            tokio::time::sleep(chance.ms(20, 200)).await;
            continue;
        };
        let number = group.world().history.called();
        let proposal = Command { at: number, ..command(number) };
        let answer = handle.propose(proposal).await;
        {
            let mut world = group.world();
            match answer {
                Ok(_) => world.history.done(number),
                Err(error) if error.is_outcome_unknown() => world.history.unknown += 1,
                Err(_) => world.history.nothing_done(number),
            }
        }
        tokio::time::sleep(chance.ms(20, 250)).await;
    }
}

/// Asks controllers to confirm that they lead, and looks at what they show.
async fn read(group: Group, mut chance: Chance) {
    while !group.is_over() {
        if let Some((id, handle)) = group.any(&mut chance) {
            let asked = group.world().history.now();
            let confirmed = handle.confirm_leadership().await;
            let view = handle.view();
            let history = &mut group.world().history;
            match confirmed {
                Ok(confirmed) => {
                    history.led(confirmed.term, id);
                    assert!(view.includes(confirmed.read_index));
                    history.read(asked, &view);
                }
                Err(_) => history.look(&view),
            }
        }
        tokio::time::sleep(chance.ms(30, 300)).await;
    }
}

/// One fault after the other; each ends by itself.
async fn break_things(group: Group, mut chance: Chance) {
    while !group.is_over() {
        tokio::time::sleep(chance.ms(300, 3_000)).await;
        let lasts = chance.ms(100, 6_000);
        let kind = chance.below(8);
        match kind {
            0..=2 => crash_some(&group, &mut chance, lasts).await,
            3 | 4 => cut_some(&group, &mut chance, lasts).await,
            5 => {
                group.net.set_delay_ms_max(400);
                tokio::time::sleep(lasts).await;
                group.net.heal();
                count(&group, "slow");
            }
            6 => hand_over(&group, &mut chance).await,
            _ => change_members(&group, &mut chance).await,
        }
    }
}

fn count(group: &Group, what: &'static str) {
    *group.world().faults.entry(what).or_default() += 1;
}

/// One, two or all lose power, and come back one after the other.
async fn crash_some(group: &Group, chance: &mut Chance, lasts: Duration) {
    let many = [1, 1, 1, 2, 9][chance.below(5) as usize];
    let ids: Vec<u64> = group.world().running.keys().copied().collect();
    let first = chance.below(ids.len() as u64) as usize;
    let chosen: Vec<u64> =
        ids.iter().cycle().skip(first).take(many.min(ids.len())).copied().collect();
    for id in &chosen {
        group.crash(*id, chance).await;
    }
    tokio::time::sleep(lasts).await;
    for id in chosen {
        group.restart(id).await;
        tokio::time::sleep(chance.ms(0, 500)).await;
    }
}

/// One is cut off from the others, both ways or one.
async fn cut_some(group: &Group, chance: &mut Chance, lasts: Duration) {
    let Some((id, _)) = group.any(chance) else { return };
    let id = group.leader().filter(|_| chance.below(2) == 0).map_or(id, |(leader, _)| leader);
    let ways = chance.below(3);
    for other in 1..group.world().next_id {
        if ways != 1 {
            group.net.cut(id, other);
        }
        if ways != 2 {
            group.net.cut(other, id);
        }
    }
    count(group, "cut");
    tokio::time::sleep(lasts).await;
    group.net.heal();
}

async fn hand_over(group: &Group, chance: &mut Chance) {
    let (Some((_, leader)), Some((to, _))) = (group.leader(), group.any(chance)) else { return };
    // It may fail as anything may here.
    let _ = leader.transfer_leadership(to).await;
    let _ = leader.trigger_snapshot().await;
    count(group, "handover");
}

/// A new controller joins, or one that is there leaves for good.
async fn change_members(group: &Group, chance: &mut Chance) {
    let Some((_, leader)) = group.leader() else { return };
    let voters: Vec<u64> = leader.status().voters.keys().copied().collect();
    if voters.len() < MEMBERS_MAX && chance.below(2) == 0 {
        let id = {
            let mut world = group.world();
            world.next_id += 1;
            world.next_id - 1
        };
        group.start(id, Vec::new()).await;
        let _ = leader.add_voter(id, node(id)).await;
        count(group, "join");
    } else if voters.len() > 3 {
        let id = voters[chance.below(voters.len() as u64) as usize];
        if leader.remove_member(id).await.is_ok() {
            count(group, "leave");
        }
    }
}

/// What a run met.
#[derive(Debug)]
struct Met {
    acknowledged: u64,
    unknown: u64,
    refused: u64,
    reads: u64,
    terms: u64,
    faults: BTreeMap<&'static str, u64>,
}

/// One seed: so many seconds of virtual time with faults, then peace, then all must be there.
fn run(seed: u64, seconds: u64) -> Met {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(live(seed, Duration::from_secs(seconds)))
}

async fn live(seed: u64, time: Duration) -> Met {
    let group = Group::new(seed);
    found(&group).await;
    let mut tasks = Vec::new();
    for lane in 0..WRITERS {
        tasks.push(tokio::spawn(write(group.clone(), Chance::of(seed, 10 + lane))));
    }
    for lane in 0..READERS {
        tasks.push(tokio::spawn(read(group.clone(), Chance::of(seed, 20 + lane))));
    }
    tasks.push(tokio::spawn(break_things(group.clone(), Chance::of(seed, 2))));
    group.pass(time).await;
    group.world().over = true;
    finish(&group, tasks).await
}

/// Runs something of the group's while time goes on.
async fn while_time_passes<T: Send + 'static>(
    group: &Group,
    what: &str,
    work: impl Future<Output = T> + Send + 'static,
) -> T {
    let work = tokio::spawn(work);
    for _ in 0..6_000 {
        if work.is_finished() {
            return work.await.unwrap();
        }
        group.pass(STEP).await;
    }
    panic!("{what} did not happen within a minute of virtual time");
}

async fn found(group: &Group) {
    let there = group.clone();
    let founding = async move {
        there.start(1, Vec::new()).await;
        let first = there.any(&mut Chance(1)).unwrap().1;
        first.initialize_single(node(1)).await.unwrap();
        first.watch_status().wait_for(|status| status.is_leader()).await.unwrap();
        for id in 2..=FOUNDERS {
            there.start(id, Vec::new()).await;
            first.add_voter(id, node(id)).await.unwrap();
        }
    };
    while_time_passes(group, "the founding", founding).await;
}

/// All faults are over: a leader is found, and has everything that anybody was told.
async fn finish(group: &Group, tasks: Vec<JoinHandle<()>>) -> Met {
    let there = group.clone();
    let ending = async move {
        for task in tasks {
            task.await.unwrap();
        }
        there.net.heal();
        let down: Vec<u64> = there.world().down.keys().copied().collect();
        for id in down {
            there.restart(id).await;
        }
        loop {
            let number = there.world().history.called();
            let Some((_, leader)) = there.leader() else {
                tokio::time::sleep(STEP).await;
                continue;
            };
            if leader.propose(Command { at: number, ..command(number) }).await.is_ok() {
                there.world().history.done(number);
                return leader.view();
            }
        }
    };
    let view = while_time_passes(group, "a write after all faults", ending).await;
    let mut world = group.world();
    world.history.finish(&view);
    Met {
        acknowledged: world.history.acknowledged,
        unknown: world.history.unknown,
        refused: world.history.refused,
        reads: world.history.reads,
        terms: view.last_applied.map_or(0, |at| at.term),
        faults: std::mem::take(&mut world.faults),
    }
}

#[test]
fn a_group_keeps_its_word_while_everything_goes_wrong() {
    // Short, because openraft and gRPC are not optimised in tests.
    let met = run(1, 10);
    assert!(met.acknowledged > 30 && met.reads > 3, "{met:?}");
    assert!(met.faults.values().sum::<u64>() > 0, "{met:?}");
}

/// `cargo xtask sim --openraft` runs this one.
#[test]
#[ignore = "runs for as long as it is told to"]
fn seed_after_seed() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seconds = number("BELLWETHER_CHAOS_SECONDS").unwrap_or(60);
    let first = number("BELLWETHER_CHAOS_SEED").unwrap_or(1);
    let begun = std::time::Instant::now();
    for seed in first.. {
        if begun.elapsed().as_secs() >= seconds {
            break;
        }
        let Met { acknowledged, unknown, refused, reads, terms, faults } = run(seed, 60);
        println!(
            "seed {seed}: {acknowledged} writes acknowledged, {refused} refused, {unknown} unknown; \
             {reads} reads, {terms} terms, faults {faults:?}"
        );
    }
}
