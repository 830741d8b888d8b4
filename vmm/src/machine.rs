//! Owns a whole machine: memory, disks and the board they are plugged into, from power-on over resets to the end.
//! Promises that a stopped machine has no thread left and has given back its disks, which a reset does not.
//! Must not know command lines, signals or what is printed.

use crate::board::{Board, ExitTotals, KVM_DEVICE};
use crate::config::DiskConfig;
use crate::console::InputCarrier;
use crate::control::{Control, Outcome};
use crate::error::{Error, Kind, Result};
use crate::hba::{Adapter, InterruptLine};
use crate::memory::{self, GuestRam};
use crate::pci::function::MovableInterrupt;
use crate::serial::{SerialPort, SerialSink};
use crate::supervision::Supervision;
use crate::{disks, kvm};
use kvm_ioctls::Kvm;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a machine runs first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// A kernel, which is loaded into memory.
    Kernel {
        /// The image, an ELF file with a PVH note.
        image: PathBuf,
        /// The command line that it gets.
        command_line: String,
    },
    /// Firmware, which finds out by itself what to boot from the disks, in their order.
    Firmware {
        /// The image: SeaBIOS for a PC with an i440FX.
        image: PathBuf,
    },
}

/// What a machine consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// What runs first.
    pub boot: Boot,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// The disks, in the order of their SCSI targets.
    pub disks: Vec<DiskConfig>,
    /// Where COM1's output goes.
    pub serial: SerialSink,
}

/// An adapter, and the way to interrupt that it was made with.
struct Plugged {
    adapter: Adapter,
    interrupt: Arc<MovableInterrupt>,
}

/// A machine: built, then started, then stopped. Dropping it stops it.
pub struct Machine {
    config: MachineConfig,
    kvm: Kvm,
    ram: GuestRam,
    serial: Arc<SerialPort>,
    input: Option<InputCarrier>,
    adapters: Vec<Plugged>,
    board: Board,
    supervision: Arc<Supervision>,
    /// Exits of boards that a reset has replaced.
    earlier_exits: ExitTotals,
    started: bool,
}

impl Machine {
    /// Builds a machine with its image loaded and its disks open; no vCPU runs yet.
    ///
    /// # Errors
    /// An [`Error`] about the first thing that could not be had.
    pub fn new(config: &MachineConfig) -> Result<Machine> {
        let adapters = crate::config::adapters(&config.disks)?;
        let mut machine = Machine::without_disks(config)?;
        disks::refuse_doubles(&config.disks)?;
        for (index, adapter) in adapters.into_iter().enumerate() {
            let supervision = Arc::clone(&machine.supervision);
            machine.add_adapter(|ram, interrupt| disks::start_adapter(index, adapter, ram, interrupt, &supervision))?;
        }
        Ok(machine)
    }

    /// As [`Self::new`], leaving the disks out: [`Self::add_adapter`] brings others.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn without_disks(config: &MachineConfig) -> Result<Machine> {
        kvm::install_kick_handler()?;
        let kvm = kvm::open(Path::new(KVM_DEVICE))?;
        let ram = memory::allocate(config.memory)?;
        let serial = Arc::new(SerialPort::new()?);
        let board = Board::new(&kvm, &ram, config, &serial)?;
        let supervision = Arc::new(Supervision::default());
        supervision.govern(board.control());
        Ok(Machine {
            config: config.clone(),
            kvm,
            ram,
            serial,
            input: None,
            adapters: Vec::new(),
            board,
            supervision,
            earlier_exits: ExitTotals::default(),
            started: false,
        })
    }

    /// Puts the adapter that `make` makes, from guest memory and its way to interrupt, on the PCI bus. Adapters are
    /// added before [`Self::start`].
    ///
    /// # Errors
    /// What `make` says, or that the host has no room for the adapter.
    pub fn add_adapter(
        &mut self,
        make: impl FnOnce(Arc<GuestRam>, Arc<dyn InterruptLine>) -> Result<Adapter>,
    ) -> Result<()> {
        let interrupt = Arc::new(MovableInterrupt::default());
        let adapter = make(Arc::new(self.ram.clone()), interrupt.clone())?;
        let index = self.adapters.len();
        self.adapters.push(Plugged { adapter: Arc::clone(&adapter), interrupt: Arc::clone(&interrupt) });
        self.board.plug(index, adapter, &interrupt)
    }

    /// Lets the vCPUs run for the first time, or again after [`Self::reset`]. The first time it opens the serial port's
    /// sink: not earlier, so that a machine which is refused its disks leaves another one's output alone.
    ///
    /// # Errors
    /// [`Kind::Host`] when the sink or a thread cannot be had; the machine can then only be stopped.
    pub fn start(&mut self) -> Result<()> {
        if !self.started {
            self.serial.write_to(self.config.serial.open()?);
            self.started = true;
            if self.config.serial == SerialSink::Stdio {
                self.input = Some(InputCarrier::start(Arc::clone(&self.serial))?);
            }
        }
        self.board.start(&self.ram)
    }

    /// Puts a machine that has ended back to its state at power-on, with the image loaded anew. Disks stay open and
    /// locked; requests in flight end without a trace in memory. [`Self::start`] comes next.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn reset(&mut self) -> Result<()> {
        self.board.end();
        self.earlier_exits = self.exits();
        for plugged in &self.adapters {
            plugged.adapter.reset();
        }
        kvm::clear(&self.ram)?;
        self.board = Board::new(&self.kvm, &self.ram, &self.config, &self.serial)?;
        self.supervision.govern(self.board.control());
        for (index, plugged) in self.adapters.iter().enumerate() {
            self.board.plug(index, Arc::clone(&plugged.adapter), &plugged.interrupt)?;
        }
        Ok(())
    }

    /// Makes all vCPUs leave the guest and waits until they have; disks and their queues go on. A register write that is
    /// under way is waited for too, and the reset of an adapter takes as long as the storage takes for what is in flight.
    pub fn pause(&self) {
        self.board.control().pause();
    }

    /// Lets paused vCPUs run again.
    pub fn resume(&self) {
        self.board.control().resume();
    }

    /// Does a disk whose lock cannot be renewed at the moment keep the vCPUs from running?
    pub fn is_frozen(&self) -> bool {
        self.supervision.is_frozen()
    }

    /// Waits until the machine ends and says why. It must have been started.
    pub fn wait(&self) -> Outcome {
        self.board.control().wait()
    }

    /// The control, by which another thread can end the machine. A reset makes a new one.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(self.board.control())
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How often vCPUs left the guest so far.
    pub fn exits(&self) -> ExitTotals {
        self.earlier_exits.plus(self.board.exits())
    }

    /// Ends the machine: no vCPU runs, no request is in flight, disks are flushed and given back. Once is enough; a
    /// second call does nothing.
    ///
    /// # Errors
    /// [`Kind::Disk`] with the first disk that could not be flushed; everything else is ended all the same.
    pub fn stop(&mut self) -> Result<()> {
        self.board.end();
        self.input = None;
        let mut result = Ok(());
        for plugged in self.adapters.drain(..) {
            if let Err(cause) = plugged.adapter.stop() {
                let next = "Check the disk and the space on its file system";
                result = result.and(Err(Error::new(Kind::Disk, "SCSI adapter", cause, next)));
            }
        }
        self.serial.flush();
        result
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a machine was dropped without being stopped");
        }
    }
}
