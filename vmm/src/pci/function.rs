//! Owns an adapter's place on the PCI bus: its configuration space, where its registers decode, how it interrupts.
//! Promises that registers and doorbells follow the BAR, and that interrupts follow the command and MSI registers.
//! Must not know which adapter it carries.

use super::config_space::{ConfigSpace, Identification, IndirectAccess};
use super::msix::{self, VectorTable};
use super::{ConfigAccess, PciBus};
use crate::bus::{Bus, BusDevice};
use crate::error::{Error, Kind, Result};
use crate::hba::{Adapter, Bar, BarKind, Doorbell, InterruptLine};
use crate::irq::{self, Hypervisor, Interrupts, IrqLine, MsiVector};
use crate::vcpu::Buses;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};

/// A function's way to the interrupt controllers, by its pin or by its messages.
pub struct FunctionInterrupt {
    line: IrqLine,
    /// One for MSI, or one for each entry of the MSI-X table.
    vectors: Vec<MsiVector>,
    mode: AtomicU8,
    bus_master: AtomicBool,
    pin: Mutex<Pin>,
    table: Mutex<VectorTable>,
}

/// How the guest wants to be interrupted.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pin,
    Msi,
    Msix,
}

/// What the pin's level depends on.
#[derive(Default)]
struct Pin {
    asserted: bool,
    allowed: bool,
}

impl FunctionInterrupt {
    /// An interrupt through `line` or `vectors`, all still off; `table` is the size of the MSI-X table.
    fn new(line: IrqLine, vectors: Vec<MsiVector>, table: u16) -> FunctionInterrupt {
        FunctionInterrupt {
            line,
            vectors,
            mode: AtomicU8::new(Mode::Pin as u8),
            bus_master: AtomicBool::new(false),
            pin: Mutex::default(),
            table: Mutex::new(VectorTable::new(table)),
        }
    }

    /// Follows what the guest has written into the configuration space.
    fn follow(&self, space: &ConfigSpace) {
        let (message, msix) = (space.msi(), space.msix());
        let mode = match message {
            _ if msix.enabled => Mode::Msix,
            Some(_) => Mode::Msi,
            None => Mode::Pin,
        };
        self.bus_master.store(space.bus_master(), SeqCst);
        {
            let mut table = self.table.lock();
            table.set_control(msix);
            if mode != Mode::Msix {
                self.vectors.iter().enumerate().for_each(|(number, vector)| {
                    vector.point(message.filter(|_| number == 0));
                });
            }
            self.mode.store(mode as u8, SeqCst);
            self.release(&mut table);
        }
        let mut pin = self.pin.lock();
        pin.allowed = mode == Mode::Pin && !space.intx_disabled();
        self.line.set(pin.asserted && pin.allowed);
    }

    /// Points the vectors of the table that are let through, and sends what waited for that.
    fn release(&self, table: &mut VectorTable) {
        for (number, vector) in self.vectors.iter().enumerate() {
            if let Some(message) = table.message(number) {
                vector.point(Some(message));
            }
        }
        while let Some(number) = table.take_released() {
            self.send(number);
        }
    }

    fn send(&self, vector: usize) {
        if self.bus_master.load(SeqCst)
            && let Some(vector) = self.vectors.get(vector)
        {
            vector.fire();
        }
    }

    fn asserted(&self) -> bool {
        self.pin.lock().asserted
    }
}

impl InterruptLine for FunctionInterrupt {
    fn uses_messages(&self) -> bool {
        self.mode.load(SeqCst) != Mode::Pin as u8
    }

    fn raise_message(&self, vector: u16) {
        let mode = self.mode.load(SeqCst);
        if mode == Mode::Msi as u8 {
            self.send(0);
        } else if mode == Mode::Msix as u8 {
            let mut table = self.table.lock();
            if table.raise(vector.into()) {
                self.send(vector.into());
            }
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

/// The MSI-X table, as a device on a bus.
impl BusDevice for FunctionInterrupt {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.table.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut table = self.table.lock();
        table.write(offset, data);
        self.release(&mut table);
    }
}

/// The way to interrupt that an adapter keeps for its life, while the machine behind it may be built anew.
#[derive(Default)]
pub struct MovableInterrupt {
    target: RwLock<Option<Arc<FunctionInterrupt>>>,
}

impl MovableInterrupt {
    /// Sends the adapter's interrupts through `target` from now on.
    fn move_to(&self, target: Arc<FunctionInterrupt>) {
        *self.target.write() = Some(target);
    }
}

impl InterruptLine for MovableInterrupt {
    fn uses_messages(&self) -> bool {
        self.target.read().as_ref().is_some_and(|target| target.uses_messages())
    }

    fn raise_message(&self, vector: u16) {
        if let Some(target) = self.target.read().as_ref() {
            target.raise_message(vector);
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

/// A memory or port window of the function: what a BAR shows.
struct Window {
    bar: Bar,
    device: Arc<dyn BusDevice>,
    /// It shows the registers, and not the MSI-X table.
    is_registers: bool,
}

/// Configuration space, and where the windows decode at present: one address for each.
struct State {
    space: ConfigSpace,
    decoded: Vec<Option<u32>>,
}

/// Where an adapter is put.
pub struct Place<'a> {
    /// Device number on the PCI bus.
    pub device: usize,
    /// The bus, which has the windows for BARs.
    pub pci: &'a PciBus,
    /// What the windows decode on.
    pub buses: Buses,
    /// Where pin and messages go.
    pub interrupts: &'a Arc<Interrupts>,
}

/// An adapter on the PCI bus.
pub struct AdapterFunction {
    adapter: Adapter,
    interrupt: Arc<FunctionInterrupt>,
    doorbells: Vec<Doorbell>,
    windows: Vec<Window>,
    buses: Buses,
    hypervisor: Arc<dyn Hypervisor>,
    state: Mutex<State>,
}

impl AdapterFunction {
    /// Builds the configuration space of `adapter`, programs its BARs from the bus's windows and its interrupt line as firmware would,
    /// lets its registers and doorbells decode there, and its interrupts, which it sends through `interrupt`, end at `place`.
    ///
    /// # Errors
    /// [`Kind::Host`] when a window is full, the doorbells cannot be had, or the hypervisor takes no more of them.
    pub fn new(
        adapter: Adapter,
        place: Place<'_>,
        hypervisor: Arc<dyn Hypervisor>,
        interrupt: &MovableInterrupt,
    ) -> Result<Arc<AdapterFunction>> {
        let identity = adapter.pci_identity();
        let gsi = irq::pci_line(place.device);
        let table = identity.msix.map_or(0, |msix| msix.vectors);
        let messages = table.max(identity.msi_vectors.into());
        let vectors = (0..messages).map(|_| place.interrupts.message()).collect::<Result<_>>()?;
        let line = Arc::new(FunctionInterrupt::new(place.interrupts.line(gsi), vectors, table));

        let mut space = ConfigSpace::new(Identification {
            vendor: identity.vendor,
            device: identity.device,
            revision: identity.revision,
            class: identity.class,
            subsystem_vendor: identity.subsystem_vendor,
            subsystem: identity.subsystem,
        });
        let registers: Arc<dyn BusDevice> = Arc::new(Registers(Arc::clone(&adapter)));
        let shown = |bar: &Bar| Window { bar: *bar, device: Arc::clone(&registers), is_registers: true };
        let mut windows: Vec<Window> = identity.bars.iter().map(shown).collect();
        if let Some(msix) = identity.msix {
            let bar = Bar { index: msix.bar, kind: BarKind::Memory, size: msix::WINDOW_SIZE };
            windows.push(Window { bar, device: line.clone(), is_registers: false });
        }
        for Window { bar, .. } in &windows {
            program(&mut space, bar, place.pci)?;
        }
        space.set_interrupt(gsi.0 as u8);
        if identity.msi_vectors > 0 {
            space.set_msi();
        }
        space.add_vendor_capabilities(identity.vendor_capabilities, identity.register_window);
        if let Some(msix) = identity.msix {
            space.set_msix(msix.vectors, msix.bar, msix::PENDING_OFFSET);
        }
        let doorbells = adapter.doorbells().map_err(|cause| Error::host("doorbells of an adapter", cause))?;
        interrupt.move_to(Arc::clone(&line));
        let decoded = vec![None; windows.len()];
        let function = AdapterFunction {
            adapter,
            interrupt: line,
            doorbells,
            windows,
            buses: place.buses,
            hypervisor,
            state: Mutex::new(State { space, decoded }),
        };
        function.follow(&mut function.state.lock())?;
        Ok(Arc::new(function))
    }

    /// What BAR `index` shows, whether or not it decodes at present: for a guest that is not reached by addresses.
    pub fn window(&self, index: u8) -> Option<&dyn BusDevice> {
        self.windows.iter().find(|window| window.bar.index == index).map(|window| &*window.device)
    }

    /// Makes decoding and interrupts agree with the configuration space.
    fn follow(&self, state: &mut State) -> Result<()> {
        self.interrupt.follow(&state.space);
        let State { space, decoded } = state;
        let wanted = |window: &Window| match window.bar.kind {
            BarKind::Memory => space.decoded_memory_bar(window.bar.index),
            BarKind::Io => space.decoded_io_bar(window.bar.index),
        };
        // All that move leave before any arrives: they may change places.
        for (window, decoded) in self.windows.iter().zip(decoded.iter_mut()) {
            if let Some(address) = decoded.take_if(|address| wanted(window) != Some(*address)) {
                self.hide(window, address);
            }
        }
        for (window, decoded) in self.windows.iter().zip(decoded.iter_mut()) {
            if let Some(address) = wanted(window).filter(|_| decoded.is_none()) {
                self.show(window, address)?;
                *decoded = Some(address);
            }
        }
        Ok(())
    }

    /// Lets a window and, with registers in memory, the doorbells decode at `address`; on an error nothing of it decodes.
    fn show(&self, window: &Window, address: u32) -> Result<()> {
        self.bus(window)
            .insert(address.into(), window.bar.size.into(), Arc::clone(&window.device))
            .map_err(|cause| Error::host("registers of an adapter", cause))?;
        for (doorbell, place) in self.doorbells_at(window, address) {
            if let Err(error) = self.hypervisor.tie_doorbell(&doorbell.event, place) {
                self.hide(window, address);
                return Err(error);
            }
        }
        Ok(())
    }

    fn hide(&self, window: &Window, address: u32) {
        self.bus(window).remove(address.into());
        for (doorbell, place) in self.doorbells_at(window, address) {
            self.hypervisor.untie_doorbell(&doorbell.event, place);
        }
    }

    fn bus(&self, window: &Window) -> &Bus {
        if window.bar.kind == BarKind::Memory { &self.buses.memory_mapped } else { &self.buses.port }
    }

    /// What an access to the configuration space does to the registers, if the BAR that it names shows them.
    fn indirect_access(&self, offset: usize, length: usize) -> Option<IndirectAccess> {
        let access = self.state.lock().space.indirect_access(offset, length)?;
        let shows = |Window { bar, is_registers, .. }: &Window| {
            *is_registers && bar.index == access.bar && access.offset < bar.size
        };
        self.windows.iter().any(shows).then_some(access)
    }

    /// The doorbells that decode with a window at `address`, and where.
    fn doorbells_at(&self, window: &Window, address: u32) -> impl Iterator<Item = (&Doorbell, u64)> {
        let has_doorbells = window.is_registers && window.bar.kind == BarKind::Memory;
        let place = move |doorbell: &Doorbell| u64::from(address) + doorbell.offset;
        self.doorbells.iter().filter(move |_| has_doorbells).map(move |doorbell| (doorbell, place(doorbell)))
    }
}

/// Gives a BAR a free address, as firmware does.
fn program(space: &mut ConfigSpace, bar: &Bar, pci: &PciBus) -> Result<()> {
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
    Ok(())
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
