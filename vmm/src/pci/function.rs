//! Owns an adapter's place on the PCI bus: its configuration space, where its registers decode, how it interrupts.
//! Promises that registers and doorbells follow the BAR, and that interrupts follow the command and MSI registers.
//! Must not know which adapter it carries.

use super::config_space::{ConfigSpace, Identification, IndirectAccess};
use super::{ConfigAccess, PciBus};
use crate::bus::BusDevice;
use crate::error::{Error, Kind, Result};
use crate::hba::{Adapter, Bar, BarKind, Doorbell, InterruptLine};
use crate::irq::{Gsi, IrqLine, MsiVector};
use crate::vcpu::Buses;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A function's way to the interrupt controllers, by its pin or by its message.
pub struct FunctionInterrupt {
    line: IrqLine,
    vector: MsiVector,
    msi_enabled: AtomicBool,
    bus_master: AtomicBool,
    pin: Mutex<Pin>,
}

/// What the pin's level depends on.
#[derive(Default)]
struct Pin {
    asserted: bool,
    allowed: bool,
}

impl FunctionInterrupt {
    /// An interrupt through `line` or `vector`, both still off.
    pub fn new(line: IrqLine, vector: MsiVector) -> FunctionInterrupt {
        let off = || AtomicBool::new(false);
        FunctionInterrupt { line, vector, msi_enabled: off(), bus_master: off(), pin: Mutex::default() }
    }

    /// Follows what the guest has written into the configuration space.
    fn follow(&self, space: &ConfigSpace) {
        let message = space.msi();
        self.vector.point(message);
        self.msi_enabled.store(message.is_some(), SeqCst);
        self.bus_master.store(space.bus_master(), SeqCst);
        let mut pin = self.pin.lock();
        pin.allowed = message.is_none() && !space.intx_disabled();
        self.line.set(pin.asserted && pin.allowed);
    }

    fn asserted(&self) -> bool {
        self.pin.lock().asserted
    }
}

impl InterruptLine for FunctionInterrupt {
    fn msi_enabled(&self) -> bool {
        self.msi_enabled.load(SeqCst)
    }

    fn raise_msi(&self) {
        if self.msi_enabled.load(SeqCst) && self.bus_master.load(SeqCst) {
            self.vector.fire();
        }
    }

    fn set_level(&self, asserted: bool) {
        let mut pin = self.pin.lock();
        pin.asserted = asserted;
        self.line.set(pin.asserted && pin.allowed);
    }

    fn number(&self) -> u8 {
        self.line.gsi().0 as u8
    }
}

/// The way to interrupt that an adapter keeps for its life, while the machine behind it may be built anew.
#[derive(Default)]
pub struct MovableInterrupt {
    target: RwLock<Option<Arc<FunctionInterrupt>>>,
}

impl MovableInterrupt {
    /// Sends the adapter's interrupts through `target` from now on.
    pub fn move_to(&self, target: Arc<FunctionInterrupt>) {
        *self.target.write() = Some(target);
    }
}

impl InterruptLine for MovableInterrupt {
    fn msi_enabled(&self) -> bool {
        self.target.read().as_ref().is_some_and(|target| target.msi_enabled())
    }

    fn raise_msi(&self) {
        if let Some(target) = self.target.read().as_ref() {
            target.raise_msi();
        }
    }

    fn set_level(&self, asserted: bool) {
        if let Some(target) = self.target.read().as_ref() {
            target.set_level(asserted);
        }
    }

    fn number(&self) -> u8 {
        self.target.read().as_ref().map_or(0, |target| target.number())
    }
}

/// The registers of an adapter, as a device on a bus.
struct Registers(Adapter);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// Configuration space, and where the registers decode at present: one address for each BAR.
struct State {
    space: ConfigSpace,
    decoded: Vec<Option<u32>>,
}

/// An adapter on the PCI bus.
pub struct AdapterFunction {
    adapter: Adapter,
    interrupt: Arc<FunctionInterrupt>,
    doorbells: Vec<Doorbell>,
    bars: &'static [Bar],
    buses: Buses,
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

impl AdapterFunction {
    /// Builds the configuration space of `adapter`, programs its BARs from the bus's windows and its interrupt line with
    /// `gsi`, and lets its registers and doorbells decode there.
    ///
    /// # Errors
    /// [`Kind::Host`] when a window is full, the doorbells cannot be had, or KVM takes no more of them.
    pub fn new(
        adapter: Adapter,
        interrupt: Arc<FunctionInterrupt>,
        gsi: Gsi,
        pci: &PciBus,
        buses: Buses,
        vm: Arc<VmFd>,
    ) -> Result<Arc<AdapterFunction>> {
        let identity = adapter.pci_identity();
        let mut space = ConfigSpace::new(Identification {
            vendor: identity.vendor,
            device: identity.device,
            revision: identity.revision,
            class: identity.class,
            subsystem_vendor: identity.subsystem_vendor,
            subsystem: identity.subsystem,
        });
        for bar in identity.bars {
            let (free, window) = match bar.kind {
                BarKind::Memory => (pci.allocate_memory(bar.size), "PCI memory window"),
                BarKind::Io => (pci.allocate_ports(bar.size), "PCI port window"),
            };
            let address = free.ok_or_else(|| {
                let cause = format!("no {} bytes are free for an adapter's registers", bar.size);
                Error::new(Kind::Host, window, cause, "Give the machine fewer adapters")
            })?;
            match bar.kind {
                BarKind::Memory => space.set_memory_bar(bar.index, bar.size, address),
                BarKind::Io => space.set_io_bar(bar.index, bar.size, address),
            }
        }
        space.set_interrupt(gsi.0 as u8);
        if identity.msi_vectors > 0 {
            space.set_msi();
        }
        space.add_vendor_capabilities(identity.vendor_capabilities, identity.register_window);
        let doorbells = adapter.doorbells().map_err(|cause| Error::host("doorbells of an adapter", cause))?;
        let decoded = vec![None; identity.bars.len()];
        let function = AdapterFunction {
            adapter,
            interrupt,
            doorbells,
            bars: identity.bars,
            buses,
            vm,
            state: Mutex::new(State { space, decoded }),
        };
        function.follow(&mut function.state.lock())?;
        Ok(Arc::new(function))
    }

    /// Makes decoding and interrupts agree with the configuration space.
    fn follow(&self, state: &mut State) -> Result<()> {
        self.interrupt.follow(&state.space);
        let State { space, decoded } = state;
        let wanted = |bar: &Bar| match bar.kind {
            BarKind::Memory => space.decoded_memory_bar(bar.index),
            BarKind::Io => space.decoded_io_bar(bar.index),
        };
        // All that move leave before any arrives: they may change places.
        for (bar, decoded) in self.bars.iter().zip(decoded.iter_mut()) {
            if let Some(address) = decoded.take_if(|address| wanted(bar) != Some(*address)) {
                self.hide(bar, address);
            }
        }
        for (bar, decoded) in self.bars.iter().zip(decoded.iter_mut()) {
            if let Some(address) = wanted(bar).filter(|_| decoded.is_none()) {
                self.show(bar, address)?;
                *decoded = Some(address);
            }
        }
        Ok(())
    }

    /// Lets registers and, in memory, doorbells decode at `address`; on an error nothing of the BAR decodes.
    fn show(&self, bar: &Bar, address: u32) -> Result<()> {
        let registers = Arc::new(Registers(Arc::clone(&self.adapter)));
        let bus = if bar.kind == BarKind::Memory { &self.buses.memory_mapped } else { &self.buses.port };
        bus.insert(address.into(), bar.size.into(), registers)
            .map_err(|cause| Error::host("registers of an adapter", cause))?;
        for (doorbell, place) in self.doorbells_at(bar, address) {
            if let Err(cause) = self.vm.register_ioevent(&doorbell.event, &place, NoDatamatch) {
                self.hide(bar, address);
                return Err(Error::kvm("KVM_IOEVENTFD", cause));
            }
        }
        Ok(())
    }

    fn hide(&self, bar: &Bar, address: u32) {
        let bus = if bar.kind == BarKind::Memory { &self.buses.memory_mapped } else { &self.buses.port };
        bus.remove(address.into());
        for (doorbell, place) in self.doorbells_at(bar, address) {
            // One that was never registered (after a failure half way) is not there to be taken away.
            let _ = self.vm.unregister_ioevent(&doorbell.event, &place, NoDatamatch);
        }
    }

    /// What an access to the configuration space does to the registers, if the BAR that it names shows them.
    fn indirect_access(&self, offset: usize, length: usize) -> Option<IndirectAccess> {
        let access = self.state.lock().space.indirect_access(offset, length)?;
        self.bars.iter().any(|bar| bar.index == access.bar && access.offset < bar.size).then_some(access)
    }

    /// The doorbells that decode with a BAR at `address`.
    fn doorbells_at(&self, bar: &Bar, address: u32) -> impl Iterator<Item = (&Doorbell, IoEventAddress)> {
        let in_memory = bar.kind == BarKind::Memory;
        let place = move |doorbell: &Doorbell| IoEventAddress::Mmio(u64::from(address) + doorbell.offset);
        self.doorbells.iter().filter(move |_| in_memory).map(move |doorbell| (doorbell, place(doorbell)))
    }
}

impl ConfigAccess for AdapterFunction {
    fn read(&self, offset: usize, data: &mut [u8]) {
        let access = self.indirect_access(offset, data.len());
        let mut state = if let Some(access) = access {
            let mut bytes = [0; 4];
            self.adapter.read(access.offset.into(), &mut bytes[..access.length]);
            let mut state = self.state.lock();
            if let Some(data) = state.space.indirect_data() {
                data.copy_from_slice(&bytes);
            }
            state
        } else {
            self.state.lock()
        };
        state.space.show_interrupt(self.interrupt.asserted());
        state.space.read(offset, data);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        let mut state = self.state.lock();
        state.space.write(offset, data);
        if let Err(error) = self.follow(&mut state) {
            tracing::debug!(%error, "the guest moved an adapter's registers to where they cannot decode");
        }
        let mut bytes = [0; 4];
        if let Some(data) = state.space.indirect_data() {
            bytes.copy_from_slice(data);
        }
        // A register write may wait, and may interrupt.
        drop(state);
        if let Some(access) = self.indirect_access(offset, data.len()) {
            self.adapter.write(access.offset.into(), &bytes[..access.length]);
        }
    }
}
