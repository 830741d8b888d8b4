//! Owns what a reset replaces: the VM with its vCPUs and their threads, buses, ports and the PCI bus.
//! Promises vCPUs in their state at power-on, at the image's entry, and no thread left after `end`.
//! Must not know disks, or what outlives it: memory, adapters and the serial port are lent.

use crate::bus::{Bus, BusDevice};
use crate::cmos::{self, Cmos};
use crate::config::PlacedAdapter;
use crate::control::{Control, Outcome};
use crate::error::{Error, Kind, Result};
use crate::fw_cfg::{self, FwCfg};
use crate::hba::Adapter;
use crate::irq::{self, Gsi, Interrupts};
use crate::machine::{Boot, MachineConfig};
use crate::memory::GuestRam;
use crate::pci::function::{AdapterFunction, MovableInterrupt, Place};
use crate::pci::{self, PciBus};
use crate::platform::{self, DebugPort, ExitPort, I8042, ResetControl};
use crate::serial::{self, SerialPort};
use crate::vcpu::{self, Buses, ExitCounts, Runner};
use crate::{firmware, kvm, loader};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;

/// The host's KVM device.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// GSI of COM1.
const SERIAL_GSI: Gsi = Gsi(4);

/// How often vCPUs left the guest, summed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ExitTotals {
    /// Port accesses.
    pub port: u64,
    /// Memory-mapped accesses.
    pub memory_mapped: u64,
    /// Everything else.
    pub other: u64,
}

impl ExitTotals {
    /// The sum of both.
    pub fn plus(self, other: ExitTotals) -> ExitTotals {
        ExitTotals {
            port: self.port + other.port,
            memory_mapped: self.memory_mapped + other.memory_mapped,
            other: self.other + other.other,
        }
    }
}

/// A board.
pub struct Board {
    control: Arc<Control>,
    buses: Buses,
    exits: Vec<Arc<ExitCounts>>,
    /// vCPUs that have no thread yet.
    waiting: Vec<VcpuFd>,
    threads: Vec<JoinHandle<()>>,
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    pci: Arc<PciBus>,
    rom: Option<GuestRam>,
}

impl Board {
    /// Loads the image into `ram` and builds a VM around it.
    ///
    /// # Errors
    /// An [`Error`] about the first thing that could not be had.
    pub fn new(kvm: &Kvm, ram: &GuestRam, config: &MachineConfig, serial: &Arc<SerialPort>) -> Result<Board> {
        check_cpus(kvm, config.cpus)?;
        let (entry, rom) = match &config.boot {
            Boot::Kernel { image, command_line } => (Some(loader::load(ram, image, command_line)?), None),
            Boot::Firmware { image } => (None, Some(firmware::load(ram, image)?)),
        };
        let vm = Arc::new(kvm::create_vm(kvm, ram)?);
        if let Some(rom) = &rom {
            kvm::add_rom(&vm, ram, rom)?;
        }
        let interrupts = Interrupts::new(vm.clone())?;
        // As firmware would.
        kvm::set_level_triggered(&vm, irq::PCI_LINES.map(|line| line.0))?;
        serial.reset(interrupts.edge(SERIAL_GSI)?);
        let control = Control::new(usize::from(config.cpus));
        let buses = Buses { port: Arc::default(), memory_mapped: Arc::default() };
        let pci = Arc::new(PciBus::new(Arc::new(ResetControl(Arc::clone(&control)))));
        add_ports(&buses.port, &control, serial, &pci, config)?;
        if rom.is_some() {
            add_firmware_configuration(&buses.port, config)?;
        }
        let mut waiting = Vec::new();
        for index in 0..config.cpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(|cause| Error::kvm("KVM_CREATE_VCPU", cause))?;
            vcpu.set_cpuid2(&vcpu::cpuid(kvm, index)?).map_err(|cause| Error::kvm("KVM_SET_CPUID2", cause))?;
            // Without an entry it starts as a processor does at power-on, in firmware.
            if let (0, Some(boot)) = (index, &entry) {
                vcpu::set_pvh_state(&vcpu, boot.entry, boot.start_info)?;
                vcpu::set_virtual_wire(&vcpu)?;
            }
            waiting.push(vcpu);
        }
        let exits = (0..config.cpus).map(|_| Arc::default()).collect();
        Ok(Board { control, buses, exits, waiting, threads: Vec::new(), vm, interrupts, pci, rom })
    }

    /// Puts `adapter` on the PCI bus as number `index` and lets `interrupt` end here.
    ///
    /// # Errors
    /// That KVM or the PCI memory window has no room for the adapter.
    pub fn plug(&self, index: usize, adapter: Adapter, interrupt: &MovableInterrupt) -> Result<()> {
        let device = pci::FIRST_ADAPTER_DEVICE + index;
        let place = Place { device, interrupts: &self.interrupts, pci: &self.pci, buses: self.buses.clone() };
        let function = AdapterFunction::new(adapter, place, self.vm.clone(), interrupt)?;
        self.pci.insert(device, function);
        Ok(())
    }

    /// Gives each vCPU its thread and lets them run.
    ///
    /// # Errors
    /// [`Kind::Host`] when a thread cannot be had; the board can then only be ended.
    pub fn start(&mut self, ram: &GuestRam) -> Result<()> {
        for (index, vcpu) in self.waiting.drain(..).enumerate() {
            let runner = Runner {
                index,
                vcpu,
                control: Arc::clone(&self.control),
                buses: self.buses.clone(),
                ram: ram.clone(),
                rom: self.rom.clone(),
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

    /// The control of this board's vCPUs.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// How often the vCPUs left the guest so far.
    pub fn exits(&self) -> ExitTotals {
        self.exits.iter().fold(ExitTotals::default(), |sum, exits| {
            sum.plus(ExitTotals {
                port: exits.port.load(Relaxed),
                memory_mapped: exits.memory_mapped.load(Relaxed),
                other: exits.other.load(Relaxed),
            })
        })
    }

    /// Ends the vCPUs and joins their threads; once is enough.
    pub fn end(&mut self) {
        self.control.finish(Outcome::Stopped);
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended too, and has said so through the control.
            let _ = thread.join();
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

fn add_ports(
    bus: &Bus,
    control: &Arc<Control>,
    serial: &Arc<SerialPort>,
    pci: &Arc<PciBus>,
    config: &MachineConfig,
) -> Result<()> {
    let keyboard = match config.boot {
        Boot::Kernel { .. } => platform::I8042_IDLE,
        Boot::Firmware { .. } => platform::I8042_ABSENT,
    };
    let devices: [(u64, u64, Arc<dyn BusDevice>); 5] = [
        (cmos::CMOS_PORT, cmos::CMOS_PORTS, Arc::new(Cmos::new(config.memory))),
        (serial::COM1_PORT, serial::COM1_PORTS, serial.clone()),
        (
            platform::I8042_PORT,
            platform::I8042_PORTS,
            Arc::new(I8042 { control: Arc::clone(control), status: keyboard }),
        ),
        (platform::EXIT_PORT, 1, Arc::new(ExitPort(Arc::clone(control)))),
        (pci::CONFIG_PORT, pci::CONFIG_PORTS, pci.clone()),
    ];
    insert_all(bus, devices)
}

fn insert_all(bus: &Bus, devices: impl IntoIterator<Item = (u64, u64, Arc<dyn BusDevice>)>) -> Result<()> {
    for (start, length, device) in devices {
        bus.insert(start, length, device).map_err(|cause| Error::host("I/O ports", cause))?;
    }
    Ok(())
}

/// Tells firmware of the machine: processors, memory, where its own output goes, and the disks in the order of booting.
fn add_firmware_configuration(bus: &Bus, config: &MachineConfig) -> Result<()> {
    /// Firmware's menu is not waited for, nor is a disk that may come later: there is no keyboard to ask for either.
    const NO_MENU: [u8; 2] = [0; 2];
    const NO_RETRY: [u8; 4] = [0xFF; 4];
    let order = boot_order(&crate::config::adapters(&config.disks)?);
    let files = vec![
        ("bootorder", order.into_bytes()),
        ("etc/boot-fail-wait", NO_RETRY.to_vec()),
        ("etc/e820", firmware::memory_map(config.memory)),
        ("etc/sercon-port", serial::COM1_PORT.to_le_bytes().to_vec()),
        ("etc/show-boot-menu", NO_MENU.to_vec()),
    ];
    let devices: [(u64, u64, Arc<dyn BusDevice>); 2] = [
        (platform::DEBUG_PORT, 1, Arc::new(DebugPort::default())),
        (fw_cfg::FW_CFG_PORT, fw_cfg::FW_CFG_PORTS, Arc::new(FwCfg::new(config.cpus, files))),
    ];
    insert_all(bus, devices)
}

/// The disks as Open Firmware paths, a line each, as SeaBIOS compares them with what it finds.
fn boot_order(adapters: &[PlacedAdapter]) -> String {
    let mut disks: Vec<_> = adapters
        .iter()
        .enumerate()
        .flat_map(|(index, adapter)| adapter.disks.iter().map(move |disk| (disk.number, index, disk.target)))
        .collect();
    disks.sort();
    let line = |(_, index, target): (usize, usize, u8)| {
        let device = pci::FIRST_ADAPTER_DEVICE + index;
        format!("/pci@i0cf8/scsi@{device:x}/channel@0/disk@{target:x},0\n")
    };
    disks.into_iter().map(line).chain(["\0".to_string()]).collect()
}
