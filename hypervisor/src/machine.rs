//! The whole machine: KVM, memory, devices and vCPU threads, built from a specification.
//!
//! Building it takes no locks and runs nothing; the gate stays closed until [`Machine::run`].

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bellwether_memory::{GuestRam, RamError};
use bellwether_types::{Mac, NicSpec, VmId, VmSpec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::boot::{self, Boot, BootError, Entry};
use crate::devices::Bus;
use crate::devices::block::{Block, Caching, Disk, DiskError};
use crate::devices::net::{Net, Tap, TapError};
use crate::devices::pci::{ConfigPorts, PciBus, PciDevice};
use crate::devices::power::{AcpiPm, I8042};
use crate::devices::rng::Rng;
use crate::devices::serial::{Console, OutputFile, Serial};
use crate::devices::virtio::{Link, Msix, VirtioDevice, VirtioPci};
use crate::gate::{Gate, Hold};
use crate::kvm::{GuestBus, KvmError, LongMode, Vcpu, Vm};
use crate::layout;
use crate::vcpus::{EndSink, Vcpus};

/// Why a machine cannot be built or booted.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("a network card has no address")]
    NoMac,
    #[error("open the serial output {path}: {source}")]
    SerialFile { path: PathBuf, source: io::Error },
    #[error("{what}: {source}")]
    Host { what: &'static str, source: io::Error },
}

/// Where the serial output goes, besides the console's ring.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum SerialOutput {
    #[default]
    RingOnly,
    /// Appended to a file.
    File(PathBuf),
    /// The VMM's own standard output; given by the command line only.
    Stdout,
}

/// One disk as a device and its transport.
pub struct DiskUnit {
    pub block: Arc<Block>,
    pub transport: Arc<VirtioPci>,
}

/// Another device and its transport.
pub struct Unit<D> {
    pub device: Arc<D>,
    pub transport: Arc<VirtioPci>,
    slot: usize,
}

impl<D> Unit<D> {
    /// The number of its transport's section in a state file; disks count from 0 in slot 1.
    pub fn instance(&self) -> usize {
        self.slot - layout::SLOT_DISKS
    }

    fn on_bus(&self) -> (usize, Arc<dyn PciDevice>) {
        (self.slot, Arc::clone(&self.transport) as _)
    }
}

/// A machine that can boot, be restored into, run, and be saved.
pub struct Machine {
    pub spec: VmSpec,
    pub vm: Arc<Vm>,
    pub ram: Arc<GuestRam>,
    pub gate: Arc<Gate>,
    pub vcpus: Vcpus,
    pub serial: Arc<Serial>,
    pub acpi_pm: Arc<AcpiPm>,
    pub config_ports: Arc<ConfigPorts>,
    pub disks: Vec<DiskUnit>,
    pub rng: Unit<Rng>,
    pub nics: Vec<Unit<Net>>,
    /// The registers of a vCPU's saved state; asked once, it does not change.
    pub msrs: Vec<u32>,
}

impl Machine {
    /// Builds everything; `on_end` hears when the guest ends.
    pub fn build(
        spec: VmSpec,
        serial: &SerialOutput,
        caching: Caching,
        on_end: &EndSink,
    ) -> Result<Self, MachineError> {
        let gate = Arc::new(Gate::new());
        // Disks first: the cheapest to refuse.
        let open = |(index, disk)| Disk::open(index, disk, caching);
        let disks = spec.disks.iter().enumerate().map(open);
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let ram = Arc::new(GuestRam::new(spec.memory_mib << 20)?);
        let vm = Arc::new(Vm::new(&ram)?);
        let serial = Arc::new(build_serial(&vm, serial)?);
        let acpi_pm = Arc::new(AcpiPm::new(Arc::clone(&vm.irq)));
        let host = Host { vm: &vm, ram: &ram, gate: &gate };
        let disks = (layout::SLOT_DISKS..).zip(disks).map(|(slot, disk)| host.disk(disk, slot));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let rng = host.rng()?;
        let nics = (layout::SLOT_NICS..).zip(&spec.nics).map(|(slot, nic)| host.nic(nic, slot));
        let nics = nics.collect::<Result<Vec<_>, _>>()?;
        let pci = Arc::new(build_pci(&disks, &rng, &nics));
        let config_ports = Arc::new(ConfigPorts::new(Arc::clone(&pci)));
        let bus = build_bus(pci, &serial, &acpi_pm, &config_ports);
        let vcpus = build_vcpus(&vm, &spec, &gate, &bus, on_end)?;
        let msrs = vm.msrs_to_save()?;
        Ok(Self {
            spec,
            vm,
            ram,
            gate,
            vcpus,
            serial,
            acpi_pm,
            config_ports,
            disks,
            rng,
            nics,
            msrs,
        })
    }

    /// Loads the kernel and sets the boot processor on its entry.
    pub fn prepare_boot(&self) -> Result<(), MachineError> {
        let spec = &self.spec;
        self.disks.iter().try_for_each(|unit| unit.block.disk().check_format())?;
        let boot = Boot {
            kernel: &spec.kernel,
            initrd: spec.initrd.as_deref(),
            cmdline: &spec.cmdline,
            vcpus: spec.vcpus as u8,
        };
        let entry = boot::load(self.ram.memory(), &boot)?;
        for (index, vcpu) in self.vcpus.stopped().enumerate() {
            vcpu.set_memory_types()?;
            if index == 0 {
                set_entry(&vcpu, entry)?;
            }
        }
        Ok(())
    }

    /// Wakes the devices and opens the gate.
    pub fn run(&self) {
        self.wake_devices();
        self.gate.release(Hold::NotStarted);
    }

    /// Before the guest goes on after a stop: tells its clock, and kicks the serial port, and every
    /// queue both ways.
    pub fn wake_devices(&self) {
        for vcpu in self.vcpus.idle() {
            vcpu.note_paused();
        }
        self.serial.kick();
        for transport in self.transports() {
            transport.kick();
        }
        for nic in &self.nics {
            nic.device.connect();
        }
    }
}

/// The other processors wait for the boot processor to wake them.
fn set_entry(vcpu: &Vcpu, entry: Entry) -> Result<(), KvmError> {
    match entry {
        Entry::Pvh { address, start_info } => vcpu.set_pvh_entry(address, start_info),
        Entry::Linux { address, boot_params } => vcpu.set_long_mode_entry(&LongMode {
            address,
            argument: boot_params,
            page_tables: layout::PAGE_TABLES,
            gdt: layout::GDT,
            gdt_limit: boot::GDT_LIMIT,
        }),
    }
}

impl Machine {
    fn transports(&self) -> impl Iterator<Item = &VirtioPci> {
        let disks = self.disks.iter().map(|unit| &unit.transport);
        let nics = self.nics.iter().map(|unit| &unit.transport);
        disks.chain([&self.rng.transport]).chain(nics).map(AsRef::as_ref)
    }
}

fn build_pci(disks: &[DiskUnit], rng: &Unit<Rng>, nics: &[Unit<Net>]) -> PciBus {
    let disks = disks.iter().map(|unit| Arc::clone(&unit.transport) as Arc<dyn PciDevice>);
    let mut devices: Vec<_> = (layout::SLOT_DISKS..).zip(disks).collect();
    devices.push(rng.on_bus());
    devices.extend(nics.iter().map(Unit::on_bus));
    PciBus::new(devices)
}

/// What every virtio device is built on.
struct Host<'a> {
    vm: &'a Arc<Vm>,
    ram: &'a GuestRam,
    gate: &'a Arc<Gate>,
}

impl Host<'_> {
    fn link(&self, queues: usize) -> Result<Arc<Link>, KvmError> {
        Ok(Link::new(Msix::new(Arc::clone(&self.vm.irq), queues + 1)?, queues))
    }

    fn transport(
        &self,
        device: Arc<dyn VirtioDevice>,
        link: Arc<Link>,
        slot: usize,
    ) -> Result<Arc<VirtioPci>, KvmError> {
        let memory = self.ram.memory().clone();
        Ok(Arc::new(VirtioPci::new(device, link, Arc::clone(self.vm), memory, slot)?))
    }

    fn disk(&self, disk: Disk, slot: usize) -> Result<DiskUnit, MachineError> {
        let link = self.link(1)?;
        let (memory, gate) = (self.ram.memory().clone(), Arc::clone(self.gate));
        let block = Block::new(disk, memory, gate, Arc::clone(&link));
        let block = Arc::new(block.map_err(host("start a disk's worker"))?);
        let transport = self.transport(Arc::clone(&block) as _, link, slot)?;
        Ok(DiskUnit { block, transport })
    }

    fn rng(&self) -> Result<Unit<Rng>, MachineError> {
        let (link, slot) = (self.link(1)?, layout::SLOT_RNG);
        let (memory, gate) = (self.ram.memory().clone(), Arc::clone(self.gate));
        let rng = Rng::new(memory, gate, Arc::clone(&link));
        let device = Arc::new(rng.map_err(host("start the entropy device"))?);
        let transport = self.transport(Arc::clone(&device) as _, link, slot)?;
        Ok(Unit { device, transport, slot })
    }

    fn nic(&self, spec: &NicSpec, slot: usize) -> Result<Unit<Net>, MachineError> {
        let mac = spec.mac.ok_or(MachineError::NoMac)?;
        let tap = Tap::plug(&spec.bridge)?;
        let link = self.link(2)?;
        let (memory, gate) = (self.ram.memory().clone(), Arc::clone(self.gate));
        let net = Net::new(tap, mac, memory, gate, Arc::clone(&link));
        let device = Arc::new(net.map_err(host("start a network card"))?);
        let transport = self.transport(Arc::clone(&device) as _, link, slot)?;
        Ok(Unit { device, transport, slot })
    }
}

/// Gives each network card that has none the address that its VM has for it.
pub fn with_addresses(mut spec: VmSpec, vm: VmId) -> VmSpec {
    for (index, nic) in (0..).zip(&mut spec.nics) {
        nic.mac.get_or_insert_with(|| Mac::of(vm, index));
    }
    spec
}

fn host(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

fn build_serial(vm: &Vm, output: &SerialOutput) -> Result<Serial, MachineError> {
    let file = match output {
        SerialOutput::RingOnly => None,
        SerialOutput::File(path) => {
            let file = File::options().create(true).append(true).open(path);
            let file =
                file.map_err(|source| MachineError::SerialFile { path: path.clone(), source })?;
            Some(OutputFile { file, unbuffered: false })
        }
        SerialOutput::Stdout => {
            let stdout = rustix::io::dup(rustix::stdio::stdout());
            let file = stdout.map_err(|error| host("use standard output")(error.into()))?;
            Some(OutputFile { file: File::from(file), unbuffered: true })
        }
    };
    let interrupt = EventFd::new(EFD_NONBLOCK).map_err(host("create the serial interrupt"))?;
    vm.irq.add_line(&interrupt, layout::SERIAL_IRQ)?;
    Ok(Serial::new(interrupt, Arc::new(Console::new(file))))
}

fn build_bus(
    pci: Arc<PciBus>,
    serial: &Arc<Serial>,
    acpi_pm: &Arc<AcpiPm>,
    config_ports: &Arc<ConfigPorts>,
) -> Arc<dyn GuestBus> {
    let mut bus = Bus::new(pci);
    let serial_ports = layout::SERIAL_PORT..layout::SERIAL_PORT + 8;
    bus.attach(serial_ports, Arc::clone(serial) as _);
    bus.attach(layout::PM1_EVENT_PORT..layout::PM1_CONTROL_PORT + 2, Arc::clone(acpi_pm) as _);
    bus.attach(ConfigPorts::PORTS, Arc::clone(config_ports) as _);
    bus.attach(0x60..0x65, Arc::new(I8042));
    Arc::new(bus)
}

fn build_vcpus(
    vm: &Vm,
    spec: &VmSpec,
    gate: &Arc<Gate>,
    bus: &Arc<dyn GuestBus>,
    on_end: &EndSink,
) -> Result<Vcpus, MachineError> {
    let count = spec.vcpus as u8;
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for id in 0..count {
        let mut vcpu = vm.create_vcpu(id)?;
        vcpu.set_cpuid(vm.guest_cpuid(id, count)?)?;
        vcpus.push(vcpu);
    }
    Vcpus::start(vcpus, gate, bus, on_end).map_err(host("start a vCPU's thread"))
}
