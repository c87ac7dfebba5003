//! A lab that is up: its machines, its networks, and what can be done to them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::channel::Channel;
use crate::fabric::{Direction, Fabric, Network, mac};
use crate::machine::{Image, Machine, Power, Role, Spec, socket};
use crate::timeline::{LAB, Timeline};
use crate::watch::Watch;
use crate::wire::Outcome;

/// The name of the host that serves the shared storage.
pub const STORAGE: &str = "storage";
/// Networks and names have room for so many.
pub const NODES_MAX: u8 = 5;
/// From power on to the agent's hello. Three hosts that boot at once on two cores need half a minute.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);

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
}

struct Host {
    machine: Machine,
    channel: Channel,
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
        fs::create_dir_all(&sockets).with_context(|| format!("make {}", sockets.display()))?;
        let mut lab = Self {
            hosts: BTreeMap::new(),
            fabric: Fabric::default(),
            sockets,
            directory: directory.clone(),
            timeline: Timeline::create(&directory.join("timeline.log"))?,
            watch: Watch::default(),
            cuts: BTreeMap::new(),
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
        make_disk(&disk, disk_mib)?;
        for network in Network::ALL {
            let socket = socket(&self.sockets, &name, network.name());
            self.fabric.attach(network, &name, mac(network, index), &socket)?;
        }
        for port in ["console", "log"] {
            record(&name, &socket(&self.sockets, &name, port), &self.timeline)?;
        }
        let agent = socket(&self.sockets, &name, "agent");
        let channel = Channel::listen(&name, &agent, &self.timeline, &self.watch)?;
        let machine = Machine::new(spec, plan.image.clone(), &self.sockets, disk);
        self.hosts.insert(name, Host { machine, channel });
        Ok(())
    }

    pub fn directory(&self) -> &Path {
        &self.directory
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
    }

    /// The cables that are cut, for people.
    pub fn cuts_of(&self, host: &str) -> Vec<String> {
        let own = self.cuts.iter().filter(|((name, _), _)| name == host);
        own.map(|((_, network), direction)| format!("{} {direction}", network.name())).collect()
    }

    /// Switches a host on and does not wait for it.
    pub fn switch_on(&mut self, host: &str) -> Result<()> {
        self.note(&format!("power on {host}"));
        self.host(host)?.machine.switch_on()
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
        let took = (self.timeline.now() - started).as_secs_f64();
        self.note(&format!("{host} is up, boot {boot_id} (waited {took:.1} s)"));
        Ok(())
    }

    pub fn switch_off(&mut self, host: &str) -> Result<()> {
        self.note(&format!("power off {host}"));
        self.host(host)?.machine.switch_off()
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
        let _ = fs::remove_dir_all(&self.sockets);
        for name in self.hosts.keys() {
            let _ = fs::remove_file(self.directory.join(format!("{name}.disk")));
        }
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

/// Puts what a host says on one of its ports into the timeline.
fn record(host: &str, socket: &Path, timeline: &Timeline) -> Result<()> {
    let listener =
        UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    let (host, timeline) = (host.to_owned(), timeline.clone());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(stream).split(b'\n');
            while let Some(Ok(line)) = lines.next() {
                let line = String::from_utf8_lossy(&line);
                let line = line.trim_end();
                if !line.is_empty() {
                    timeline.note(&host, line);
                }
            }
        }
    });
    Ok(())
}
