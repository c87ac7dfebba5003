//! One machine: a QEMU process that is a host with its own kernel, power, network cards,
//! watchdog and disks. It needs no KVM: the processor that it has, AMD-V included, is emulated.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::fabric::{Network, mac};
use crate::supply::{Power, Supply};
use crate::wire::PORT_NAME;

/// Room for translated code, for each machine. QEMU's default is a gigabyte.
const TRANSLATION_MIB: u32 = 192;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Node,
    Storage,
}

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Spec {
    pub name: String,
    pub index: u8,
    pub role: Role,
    pub memory_mib: u32,
    pub processors: u32,
}

/// The files that all machines boot from.
#[derive(Clone, Debug)]
pub struct Image {
    /// With `vmlinux`, `initrd` and `root.ext4`.
    pub base: PathBuf,
    pub layer: PathBuf,
}

pub struct Machine {
    pub spec: Spec,
    image: Image,
    /// Where its sockets are.
    directory: PathBuf,
    disk: PathBuf,
    supply: Supply,
}

impl Machine {
    pub fn new(spec: Spec, image: Image, directory: &Path, disk: PathBuf) -> Self {
        let directory = directory.to_owned();
        Self { spec, image, directory, disk, supply: Supply::default() }
    }

    pub fn power(&self) -> Power {
        self.supply.power()
    }

    pub fn supply(&self) -> Supply {
        self.supply.clone()
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        socket(&self.directory, &self.spec.name, name)
    }

    /// Switches it on. The lab listens at the sockets already.
    pub fn switch_on(&mut self) -> Result<()> {
        if self.power() != Power::Off {
            bail!("{} is switched on already", self.spec.name);
        }
        let log = self.socket("qemu.log");
        let log = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        // A session of its own: Ctrl-C at a terminal is for the lab, and the scheduler gives each
        // session its share. The machine dies with the thread that started it, so with the lab.
        let process = Command::new("setsid")
            .args(["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(self.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("start qemu-system-x86_64 for {}", self.spec.name))?;
        self.supply.feed(process);
        Ok(())
    }

    /// What QEMU said before it ended by itself.
    pub fn last_words(&self) -> String {
        std::fs::read_to_string(self.socket("qemu.log")).unwrap_or_default().trim().to_owned()
    }

    /// Pulls the plug.
    pub fn switch_off(&mut self) -> Result<()> {
        self.supply.cut().with_context(|| format!("switch {} off", self.spec.name))
    }

    /// Stops the whole machine between two instructions: as a host does that hangs.
    pub fn freeze(&mut self) -> Result<()> {
        self.signal(true, Signal::STOP)
    }

    pub fn thaw(&mut self) -> Result<()> {
        self.signal(false, Signal::CONT)
    }

    fn signal(&mut self, freezes: bool, signal: Signal) -> Result<()> {
        let sent = self.supply.stand_still(freezes, |pid| {
            let pid = Pid::from_raw(pid as i32).context("a machine without a process")?;
            Ok(kill_process(pid, signal)?)
        });
        sent.with_context(|| self.spec.name.clone())
    }

    fn arguments(&self) -> Vec<String> {
        let mut words = vec![
            format!("-accel tcg,thread=multi,tb-size={TRANSLATION_MIB}"),
            // Its KVM is AMD-V with nested paging, whatever this machine's processor is.
            "-cpu max,+svm,+npt -machine q35,usb=off,vmport=off".to_owned(),
            "-nodefaults -no-user-config -display none".to_owned(),
            format!("-m {} -smp {}", self.spec.memory_mib, self.spec.processors),
            "-device virtio-rng-pci -device i6300esb -action watchdog=reset".to_owned(),
        ];
        words.push(self.ports());
        words.extend(Network::ALL.map(|network| self.card(network)));
        let mut arguments: Vec<String> =
            words.iter().flat_map(|line| line.split(' ')).map(str::to_owned).collect();
        // These may contain spaces.
        arguments.extend(self.drives());
        arguments.extend(self.kernel());
        arguments
    }

    /// The serial console, the log, the control channel, and QEMU's own monitor.
    fn ports(&self) -> String {
        let socket = |name| self.socket(name).display().to_string();
        format!(
            "-chardev socket,id=console,path={} -serial chardev:console -device virtio-serial-pci \
             -chardev socket,id=log,path={} -device virtconsole,chardev=log \
             -chardev socket,id=agent,path={} -device virtserialport,chardev=agent,name={PORT_NAME} \
             -qmp unix:{},server=on,wait=off",
            socket("console"),
            socket("log"),
            socket("agent"),
            socket("qmp"),
        )
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
    }

    fn card(&self, network: Network) -> String {
        let name = network.name();
        let mac = mac(network, self.spec.index).map(|byte| format!("{byte:02x}")).join(":");
        let socket = self.socket(name);
        format!(
            "-netdev stream,id={name},server=off,addr.type=unix,addr.path={} \
             -device virtio-net-pci,netdev={name},mac={mac},romfile=",
            socket.display()
        )
    }

    fn drives(&self) -> Vec<String> {
        let shared = "readonly=on,file.locking=off";
        let base = self.image.base.join("root.ext4");
        [(&base, shared), (&self.image.layer, shared), (&self.disk, "discard=unmap")]
            .into_iter()
            .enumerate()
            .flat_map(|(at, (file, options))| {
                // A comma ends a value here, unless it is doubled.
                let file = file.display().to_string().replace(',', ",,");
                [
                    "-drive".to_owned(),
                    format!("file={file},format=raw,if=none,id=disk{at},{options}"),
                    "-device".to_owned(),
                    format!("virtio-blk-pci,drive=disk{at}"),
                ]
            })
            .collect()
    }

    fn kernel(&self) -> Vec<String> {
        let role = match self.spec.role {
            Role::Node => "node",
            Role::Storage => "storage",
        };
        let line = format!(
            "console=ttyS0 quiet loglevel=4 panic=1 mitigations=off net.ifnames=0 no_timer_check \
             tsc=reliable lab.name={} lab.index={} lab.role={role}",
            self.spec.name, self.spec.index
        );
        let file = |name: &str| self.image.base.join(name).display().to_string();
        ["-kernel", &file("vmlinux"), "-initrd", &file("initrd"), "-append", &line]
            .map(str::to_owned)
            .to_vec()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.switch_off();
    }
}

/// The socket of a machine.
pub fn socket(directory: &Path, host: &str, name: &str) -> PathBuf {
    directory.join(format!("{host}.{name}"))
}
