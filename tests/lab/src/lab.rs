//! A lab that is up: its machines, its networks, and what can be done to them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::channel::{Channel, Heard};
use crate::console::Console;
use crate::door::{self, Hands, Request};
use crate::fabric::{Direction, Fabric, Network, mac};
use crate::machine::{Image, Machine, Role, Spec, socket};
use crate::monitor::Monitor;
use crate::supply::{Manner, Panel, Power};
use crate::timeline::{LAB, Timeline};
use crate::traces::Traces;
use crate::watch::Watch;
use crate::wire::Outcome;

/// The name of the host that serves the shared storage.
pub const STORAGE: &str = "storage";
/// Networks and names have room for so many.
pub const NODES_MAX: u8 = 5;
/// From power on to the agent's hello. Four hosts that boot at once on two idle cores need half
/// a minute; on a machine on which everybody compiles they need five.
pub const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// Nothing but a reset ends a host that hangs; this is what the lab tells its agent there.
const HANG_LIMIT: Duration = Duration::from_secs(3600);
/// Setting a clock, on a host that still boots.
const CLOCK_LIMIT: Duration = Duration::from_secs(60);

/// How a lab is made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub nodes: u8,
    pub image: Image,
    /// For disks and logs; made anew.
    pub directory: PathBuf,
}

pub struct Lab {
    hosts: BTreeMap<String, Host>,
    fabric: Fabric,
    /// Short, because the address of a socket is.
    sockets: PathBuf,
    directory: PathBuf,
    pub timeline: Timeline,
    pub watch: Watch,
    cuts: BTreeMap<(String, Network), &'static str>,
    /// Hosts that hang, and the boot that does.
    hung: BTreeMap<String, Option<String>>,
    panel: Panel,
    traces: Traces,
}

struct Host {
    machine: Machine,
    channel: Channel,
    console: Console,
    monitor: Monitor,
}

impl Lab {
    /// Makes the lab. All its machines are off.
    pub fn make(plan: &Plan) -> Result<Self> {
        if plan.nodes == 0 || plan.nodes > NODES_MAX {
            bail!("a lab has 1 to {NODES_MAX} nodes");
        }
        let directory = &plan.directory;
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let sockets = std::env::temp_dir().join(format!("bw-lab-{}", std::process::id()));
        let traces = Traces::default();
        traces.remove_at_signals()?;
        traces.add(sockets.clone());
        fs::create_dir_all(&sockets).with_context(|| format!("make {}", sockets.display()))?;
        let mut lab = Self {
            hosts: BTreeMap::new(),
            fabric: Fabric::default(),
            sockets,
            directory: directory.clone(),
            timeline: Timeline::create(&directory.join("timeline.log"))?,
            watch: Watch::default(),
            cuts: BTreeMap::new(),
            hung: BTreeMap::new(),
            panel: Panel::default(),
            traces,
        };
        lab.add(plan, Role::Storage, STORAGE.to_owned(), 100)?;
        for index in 1..=plan.nodes {
            lab.add(plan, Role::Node, format!("node{index}"), index)?;
        }
        Ok(lab)
    }

    fn add(&mut self, plan: &Plan, role: Role, name: String, index: u8) -> Result<()> {
        let (memory_mib, disk_mib) = match role {
            Role::Storage => (448, 1024),
            Role::Node => (768, 512),
        };
        let spec = Spec { name: name.clone(), index, role, memory_mib, processors: 1 };
        let disk = self.directory.join(format!("{name}.disk"));
        self.traces.add(disk.clone());
        make_disk(&disk, disk_mib)?;
        for network in Network::ALL {
            let socket = socket(&self.sockets, &name, network.name());
            self.fabric.attach(network, &name, mac(network, index), &socket)?;
        }
        // Its journal comes over a second console, on which nobody types.
        Console::listen(&name, &socket(&self.sockets, &name, "log"), &self.timeline)?;
        let console = socket(&self.sockets, &name, "console");
        let console = Console::listen(&name, &console, &self.timeline)?;
        let agent = socket(&self.sockets, &name, "agent");
        let (timeline, watch, panel) =
            (self.timeline.clone(), self.watch.clone(), self.panel.clone());
        let channel = Channel::listen(&name, &agent, Heard { timeline, watch, panel })?;
        let machine = Machine::new(spec, plan.image.clone(), &self.sockets, disk);
        self.panel.add(&name, machine.supply());
        self.hosts.insert(name, Host { machine, channel, console, monitor: Monitor::default() });
        Ok(())
    }

    /// Lets other processes in: they find the lab by its directory.
    pub fn open_door(&self, requests: Sender<Request>) -> Result<()> {
        let hands: Hands = self
            .hosts
            .iter()
            .map(|(name, host)| (name.clone(), (host.channel.clone(), host.console.clone())))
            .collect();
        let socket = self.sockets.join("door");
        door::open(&socket, hands, requests)?;
        self.traces.add(door::notice_path(&self.directory));
        door::announce(&self.directory, &socket)
    }

    /// The timeline goes as well at the end: there is nothing to look up in it.
    pub fn forget_timeline(&self) {
        self.traces.add(self.timeline.path().to_owned());
    }

    /// All hosts, the storage host included.
    pub fn hosts(&self) -> Vec<String> {
        self.hosts.keys().cloned().collect()
    }

    pub fn nodes(&self) -> Vec<String> {
        self.hosts.keys().filter(|name| *name != STORAGE).cloned().collect()
    }

    pub fn power(&mut self, host: &str) -> Result<Power> {
        Ok(self.host(host)?.machine.power())
    }

    /// Whether a host runs and its network for administration is whole.
    pub fn is_well(&mut self, host: &str) -> bool {
        !self.cuts.contains_key(&(host.to_owned(), Network::Management))
            && self.power(host).is_ok_and(|power| power == Power::On)
            && !self.hangs(host)
    }

    /// Whether it hangs still: a reset ends that, and its next boot tells.
    fn hangs(&self, host: &str) -> bool {
        let now = self.hosts.get(host).and_then(|host| host.channel.boot_id());
        self.hung.get(host).is_some_and(|boot| *boot == now)
    }

    /// The cables that are cut, for people.
    pub fn cuts_of(&self, host: &str) -> Vec<String> {
        let own = self.cuts.iter().filter(|((name, _), _)| name == host);
        own.map(|((_, network), direction)| format!("{} {direction}", network.name())).collect()
    }

    /// Switches a host on and does not wait for it.
    pub fn switch_on(&mut self, host: &str) -> Result<()> {
        self.note(&format!("power on {host}"));
        let timeline = self.timeline.clone();
        let own = self.host(host)?;
        own.machine.switch_on()?;
        own.monitor.follow(host, &own.machine.socket("qmp"), &timeline)
    }

    /// When the watchdog of a host has fired so far.
    pub fn watchdog_fired(&mut self, host: &str) -> Result<Vec<Duration>> {
        Ok(self.host(host)?.monitor.fired())
    }

    /// The host has gone down by itself, and comes up again.
    pub fn await_next_boot(&mut self, host: &str) -> Result<()> {
        let channel = self.host(host)?.channel.clone();
        if !channel.await_end(BOOT_LIMIT) {
            bail!("{host} did not go down within {} s", BOOT_LIMIT.as_secs());
        }
        self.await_boot(host)
    }

    pub fn await_boot(&mut self, host: &str) -> Result<()> {
        let started = self.timeline.now();
        let boot_id = loop {
            let machine = self.host(host)?;
            if let Some(boot_id) = machine.channel.await_boot(Duration::from_secs(1)) {
                break boot_id;
            }
            if machine.machine.power() == Power::Off {
                bail!("the machine of {host} ended: {}", machine.machine.last_words());
            }
            if self.timeline.now() - started > BOOT_LIMIT {
                bail!("{host} did not come up within {} s", BOOT_LIMIT.as_secs());
            }
        };
        self.set_clock(host)?;
        let took = (self.timeline.now() - started).as_secs_f64();
        self.note(&format!("{host} is up, boot {boot_id} (waited {took:.1} s)"));
        Ok(())
    }

    /// A machine's own clock tells whole seconds only.
    pub fn set_clock(&self, host: &str) -> Result<()> {
        let now = self.timeline.wall_ms();
        let at = format!("@{}.{:03}", now / 1000, now % 1000);
        self.exec_ok(host, &["date", "-s", &at], CLOCK_LIMIT).map(drop)
    }

    /// How the power switch of a host behaves from here on.
    pub fn set_switch(&self, host: &str, manner: Manner) {
        self.note(&format!("the power switch of {host}: {manner:?}"));
        self.panel.set(host, manner);
    }

    pub fn switch_off(&mut self, host: &str) -> Result<()> {
        self.note(&format!("power off {host}"));
        self.host(host)?.machine.switch_off()
    }

    /// In order: services are stopped, file systems unmounted. Waits for the next boot.
    pub fn reboot(&mut self, host: &str) -> Result<()> {
        self.note(&format!("reboot {host}"));
        self.exec_ok(host, &["systemctl", "reboot"], BOOT_LIMIT)?;
        self.await_next_boot(host)
    }

    /// The kernel runs nothing any more but a program that does nothing, at the highest priority;
    /// its devices, the watchdog among them, go on. Only a reset or a power cut ends it.
    pub fn hang(&mut self, host: &str) -> Result<()> {
        self.note(&format!("hang {host}"));
        let busy = "echo -1 >/proc/sys/kernel/sched_rt_runtime_us; \
                    exec chrt --fifo 99 sh -c 'while :; do :; done'";
        let channel = self.host(host)?.channel.clone();
        self.hung.insert(host.to_owned(), channel.boot_id());
        channel.begin(&["sh", "-c", busy], HANG_LIMIT)
    }

    pub fn freeze(&mut self, host: &str) -> Result<()> {
        self.note(&format!("freeze {host}"));
        self.host(host)?.machine.freeze()
    }

    pub fn thaw(&mut self, host: &str) -> Result<()> {
        self.note(&format!("thaw {host}"));
        self.host(host)?.machine.thaw()
    }

    pub fn cut(&mut self, network: Network, host: &str, direction: Direction) -> Result<()> {
        let word = match direction {
            Direction::In => "in",
            Direction::Out => "out",
            Direction::Both => "both",
        };
        self.note(&format!("cut {} {host} {word}", network.name()));
        self.fabric.set_cut(network, host, direction, true)?;
        self.cuts.insert((host.to_owned(), network), word);
        Ok(())
    }

    pub fn heal(&mut self, network: Network, host: &str) -> Result<()> {
        let lost = self.fabric.lost(network, host)?;
        self.note(&format!("heal {} {host} ({lost} frames lost so far)", network.name()));
        self.fabric.set_cut(network, host, Direction::Both, false)?;
        self.cuts.remove(&(host.to_owned(), network));
        Ok(())
    }

    /// Everything is plugged in, switched on and not frozen.
    pub fn heal_all(&mut self) -> Result<()> {
        self.fabric.heal_all();
        self.cuts.clear();
        let mut booting = Vec::new();
        for host in self.hosts() {
            if self.hangs(&host) {
                self.switch_off(&host)?;
            }
            self.hung.remove(&host);
            match self.power(&host)? {
                Power::Frozen => self.thaw(&host)?,
                Power::Off => {
                    self.switch_on(&host)?;
                    booting.push(host);
                }
                Power::On => {}
            }
        }
        booting.iter().try_for_each(|host| self.await_boot(host))
    }

    /// Runs a program in a host, whatever its networks do.
    pub fn exec(&self, host: &str, argv: &[&str], input: &str, limit: Duration) -> Result<Outcome> {
        let host = self.hosts.get(host).with_context(|| no_such_host(host))?;
        host.channel.run(argv, input, limit)
    }

    /// The same with a program that has to succeed; returns its output.
    pub fn exec_ok(&self, host: &str, argv: &[&str], limit: Duration) -> Result<String> {
        self.exec_input(host, argv, "", limit)
    }

    pub fn exec_input(
        &self,
        host: &str,
        argv: &[&str],
        input: &str,
        limit: Duration,
    ) -> Result<String> {
        let outcome = self.exec(host, argv, input, limit)?;
        match outcome.code {
            0 => Ok(outcome.stdout),
            code => {
                bail!("`{}` in {host} ended with {code}: {}", argv.join(" "), outcome.stderr.trim())
            }
        }
    }

    pub fn note(&self, text: &str) {
        self.timeline.note(LAB, text);
    }

    fn host(&mut self, name: &str) -> Result<&mut Host> {
        self.hosts.get_mut(name).with_context(|| no_such_host(name))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in self.hosts.values_mut() {
            let _ = host.machine.switch_off();
        }
        self.traces.remove();
    }
}

fn no_such_host(name: &str) -> String {
    format!("the lab has no host `{name}`; `lab list` shows them")
}

fn make_disk(path: &Path, mib: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(mib << 20)?;
    let made =
        Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0"]).arg(path).output();
    let made = made.context("start mke2fs")?;
    match made.status.success() {
        true => Ok(()),
        false => bail!("mke2fs {}: {}", path.display(), String::from_utf8_lossy(&made.stderr)),
    }
}
