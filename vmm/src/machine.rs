//! Owns a whole machine: memory, vCPUs and their threads, buses and devices, from power-on to the end.
//! Promises that a stopped machine has no thread left and has given back its disks.
//! Must not know command lines, signals or what is printed.

use crate::bus::{Bus, BusDevice};
use crate::console::InputCarrier;
use crate::control::{Control, Outcome};
use crate::error::{Error, Kind, Result};
use crate::hba::{Adapter, InterruptLine};
use crate::irq::{Gsi, Interrupts, PCI_LINES};
use crate::memory::{self, GuestRam};
use crate::pci::function::{AdapterFunction, FunctionInterrupt};
use crate::pci::{self, PciBus};
use crate::platform::{self, ExitPort, I8042, ResetControl};
use crate::serial::{self, SerialPort, SerialSink};
use crate::vcpu::{self, Buses, ExitCounts, Runner};
use crate::{kvm, loader};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;

/// The host's KVM device.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// GSI of COM1.
const SERIAL_GSI: Gsi = Gsi(4);

/// What a machine consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// The kernel image, an ELF file with a PVH note.
    pub kernel: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// The disks, in the order of their SCSI targets.
    pub disks: Vec<crate::config::DiskConfig>,
    /// Where COM1's output goes.
    pub serial: SerialSink,
}

/// How often a machine's vCPUs left the guest, summed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ExitTotals {
    /// Port accesses.
    pub port: u64,
    /// Memory-mapped accesses.
    pub memory_mapped: u64,
    /// Everything else.
    pub other: u64,
}

/// A machine: built, then started, then stopped. Dropping it stops it.
pub struct Machine {
    ram: GuestRam,
    control: Arc<Control>,
    buses: Buses,
    serial: Arc<SerialPort>,
    adapters: Vec<Adapter>,
    exits: Vec<Arc<ExitCounts>>,
    waiting: Vec<VcpuFd>,
    threads: Vec<JoinHandle<()>>,
    input: Option<InputCarrier>,
    carries_input: bool,
    _vm: Arc<VmFd>,
}

impl Machine {
    /// Builds a machine with its image loaded and its disks open; no vCPU runs yet.
    ///
    /// # Errors
    /// An [`Error`] of any kind but for [`Kind::Usage`], about the first thing that could not be had.
    pub fn new(config: &MachineConfig) -> Result<Machine> {
        kvm::install_kick_handler()?;
        let kvm = kvm::open(Path::new(KVM_DEVICE))?;
        check_cpus(&kvm, config.cpus)?;
        let ram = memory::allocate(config.memory)?;
        let boot = loader::load(&ram, &config.kernel, &config.command_line)?;
        let vm = Arc::new(kvm::create_vm(&kvm, &ram)?);
        let interrupts = Interrupts::new(Arc::clone(&vm))?;
        let control = Control::new(usize::from(config.cpus));
        let buses = Buses { port: Arc::default(), memory_mapped: Arc::default() };
        let serial = Arc::new(SerialPort::new(interrupts.edge(SERIAL_GSI)?, config.serial.open()?));
        let pci = Arc::new(PciBus::new(Arc::new(ResetControl(Arc::clone(&control)))));
        add_ports(&buses.port, &control, &serial, &pci)?;
        let mut waiting = Vec::new();
        for index in 0..config.cpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(|cause| Error::kvm("KVM_CREATE_VCPU", cause))?;
            vcpu.set_cpuid2(&vcpu::cpuid(&kvm, index)?).map_err(|cause| Error::kvm("KVM_SET_CPUID2", cause))?;
            if index == 0 {
                vcpu::set_pvh_state(&vcpu, boot.entry, boot.start_info)?;
                vcpu::set_virtual_wire(&vcpu)?;
            }
            waiting.push(vcpu);
        }
        let exits = (0..config.cpus).map(|_| Arc::default()).collect();
        let mut machine = Machine {
            ram,
            control,
            buses,
            serial,
            adapters: Vec::new(),
            exits,
            waiting,
            threads: Vec::new(),
            input: None,
            carries_input: config.serial == SerialSink::Stdio,
            _vm: Arc::clone(&vm),
        };
        let platform = Platform { vm, interrupts, pci };
        Ok(machine)
    }

    /// Lets the vCPUs run for the first time.
    ///
    /// # Errors
    /// [`Kind::Host`] when a thread cannot be had; the machine can then only be stopped.
    pub fn start(&mut self) -> Result<()> {
        if self.carries_input {
            self.input = Some(InputCarrier::start(Arc::clone(&self.serial))?);
        }
        for (index, vcpu) in self.waiting.drain(..).enumerate() {
            let runner = Runner {
                index,
                vcpu,
                control: Arc::clone(&self.control),
                buses: self.buses.clone(),
                ram: self.ram.clone(),
                exits: Arc::clone(&self.exits[index]),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || runner.run())
                .map_err(|cause| Error::host(format!("thread of vCPU {index}"), cause))?;
            self.threads.push(thread);
        }
        self.control.resume();
        Ok(())
    }

    /// Makes all vCPUs leave the guest and waits until they have; disks and their queues go on.
    pub fn pause(&self) {
        self.control.pause();
    }

    /// Lets paused vCPUs run again.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Waits until the machine ends and says why. It must have been started.
    pub fn wait(&self) -> Outcome {
        self.control.wait()
    }

    /// The control, by which another thread can end the machine.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How often vCPUs left the guest so far.
    pub fn exits(&self) -> ExitTotals {
        self.exits.iter().fold(ExitTotals::default(), |sum, exits| ExitTotals {
            port: sum.port + exits.port.load(Relaxed),
            memory_mapped: sum.memory_mapped + exits.memory_mapped.load(Relaxed),
            other: sum.other + exits.other.load(Relaxed),
        })
    }

    /// Ends the machine: no vCPU runs, no request is in flight, disks are flushed and given back. Once is enough; a
    /// second call does nothing.
    ///
    /// # Errors
    /// [`Kind::Disk`] with the first disk that could not be flushed; everything else is ended all the same.
    pub fn stop(&mut self) -> Result<()> {
        self.control.finish(Outcome::Stopped);
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended too, and has said so through the control.
            let _ = thread.join();
        }
        self.input = None;
        let mut result = Ok(());
        for adapter in self.adapters.drain(..) {
            if let Err(cause) = adapter.stop() {
                let next = "Check the disk and the space on its file system";
                result = result.and(Err(Error::new(Kind::Disk, "SCSI adapter", cause, next)));
            }
        }
        self.serial.flush();
        result
    }

    /// Puts the adapter that `make` makes on the PCI bus.
    ///
    /// # Errors
    /// What `make` says, or that the host has no room for the adapter.
    fn add_adapter(
        &mut self,
        platform: &Platform,
        make: impl FnOnce(Arc<GuestRam>, Arc<dyn InterruptLine>) -> Result<Adapter>,
    ) -> Result<()> {
        let index = self.adapters.len();
        let Platform { vm, interrupts, pci } = platform;
        let gsi = PCI_LINES[index % PCI_LINES.len()];
        let interrupt = Arc::new(FunctionInterrupt::new(interrupts.line(gsi), interrupts.message()?));
        let adapter = make(Arc::new(self.ram.clone()), interrupt.clone())?;
        self.adapters.push(Arc::clone(&adapter));
        let bus = Arc::clone(&self.buses.memory_mapped);
        let function = AdapterFunction::new(adapter, interrupt, gsi, pci, bus, Arc::clone(vm))?;
        pci.insert(pci::FIRST_ADAPTER_DEVICE + index, function);
        Ok(())
    }
}

/// What adapters are built into.
struct Platform {
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    pci: Arc<PciBus>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a machine was dropped without being stopped");
        }
    }
}

fn check_cpus(kvm: &Kvm, cpus: u8) -> Result<()> {
    let most = kvm.get_max_vcpus();
    if cpus == 0 || usize::from(cpus) > most {
        let cause = format!("KVM takes 1 to {most} vCPUs here");
        return Err(Error::new(Kind::Kvm, format!("{cpus} vCPUs"), cause, "Give another number to --cpus"));
    }
    Ok(())
}

fn add_ports(bus: &Bus, control: &Arc<Control>, serial: &Arc<SerialPort>, pci: &Arc<PciBus>) -> Result<()> {
    let devices: [(u64, u64, Arc<dyn BusDevice>); 4] = [
        (serial::COM1_PORT, serial::COM1_PORTS, serial.clone()),
        (platform::I8042_PORT, platform::I8042_PORTS, Arc::new(I8042(Arc::clone(control)))),
        (platform::EXIT_PORT, 1, Arc::new(ExitPort(Arc::clone(control)))),
        (pci::CONFIG_PORT, pci::CONFIG_PORTS, pci.clone()),
    ];
    for (start, length, device) in devices {
        bus.insert(start, length, device).map_err(|cause| Error::host("I/O ports", cause))?;
    }
    Ok(())
}
