//! Owns interrupt routing: the legacy pins of the interrupt controllers, and one GSI per message-signalled interrupt.
//! Promises that a line's level is what its device last said, and that a message goes where the guest last pointed it.
//! Must not know which device interrupts, or why, nor (but for KVM's own implementation) who runs the guest.

use crate::error::{Error, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use parking_lot::Mutex;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A global system interrupt: the number by which KVM knows a routed interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gsi(pub u32);

/// Pins of the I/O APIC; the 8259 pair has the first 16.
pub const IOAPIC_PINS: u32 = 24;
/// Interrupt lines that PCI devices share, level-triggered: wired to the 8259s and the I/O APIC alike. They are those that SeaBIOS
/// gives to the four interrupts of a PIIX3.
pub const PCI_LINES: [Gsi; 4] = [Gsi(10), Gsi(10), Gsi(11), Gsi(11)];

/// The line of pin A of a device on PCI bus 0: neighbours have different interrupts, as on the boards that have a PIIX3.
pub fn pci_line(device: usize) -> Gsi {
    PCI_LINES[device.wrapping_sub(1) % PCI_LINES.len()]
}

/// Where a message-signalled interrupt goes: what the guest wrote into the MSI capability (PCI 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// What runs the guest, as far as interrupts and doorbells need it.
pub trait Hypervisor: Send + Sync {
    /// Sets the level of an interrupt controllers' pin.
    ///
    /// # Errors
    /// That the pin is not there, or the call failed.
    fn set_pin(&self, gsi: Gsi, level: bool) -> Result<()>;

    /// Lets each write of `event` interrupt by `gsi`.
    ///
    /// # Errors
    /// That no more events can be tied.
    fn tie_interrupt(&self, event: &EventFd, gsi: Gsi) -> Result<()>;

    /// Says where all messages go: number n by GSI [`IOAPIC_PINS`] + n. The pins keep their routes.
    ///
    /// # Errors
    /// That a message can go to no interrupt controller; the routes are then what they were.
    fn route_messages(&self, messages: &[Option<MsiMessage>]) -> Result<()>;

    /// Lets a guest's write at guest-physical `address` signal `event` in place of reaching the device.
    ///
    /// # Errors
    /// That no more events can be tied, or one is there.
    fn tie_doorbell(&self, event: &EventFd, address: u64) -> Result<()>;

    /// Takes back [`Self::tie_doorbell`]; what was not tied stays so.
    fn untie_doorbell(&self, event: &EventFd, address: u64);
}

impl Hypervisor for VmFd {
    fn set_pin(&self, gsi: Gsi, level: bool) -> Result<()> {
        self.set_irq_line(gsi.0, level).map_err(|cause| Error::kvm("KVM_IRQ_LINE", cause))
    }

    fn tie_interrupt(&self, event: &EventFd, gsi: Gsi) -> Result<()> {
        self.register_irqfd(event, gsi.0).map_err(|cause| Error::kvm("KVM_IRQFD", cause))
    }

    fn route_messages(&self, messages: &[Option<MsiMessage>]) -> Result<()> {
        let mut routes: Vec<_> = legacy_routes().map(pin_route).collect();
        for (index, message) in messages.iter().enumerate() {
            if let Some(message) = message {
                routes.push(message_route(Gsi(IOAPIC_PINS + index as u32), *message));
            }
        }
        let table = KvmIrqRouting::from_entries(&routes)
            .map_err(|cause| Error::kvm("building the table for KVM_SET_GSI_ROUTING", format!("{cause:?}")))?;
        self.set_gsi_routing(&table).map_err(|cause| Error::kvm("KVM_SET_GSI_ROUTING", cause))
    }

    fn tie_doorbell(&self, event: &EventFd, address: u64) -> Result<()> {
        self.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|cause| Error::kvm("KVM_IOEVENTFD", cause))
    }

    fn untie_doorbell(&self, event: &EventFd, address: u64) {
        // One that was never registered (after a failure half way) is not there to be taken away.
        let _ = self.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
    }
}

/// All routes of one VM.
pub struct Interrupts {
    hypervisor: Arc<dyn Hypervisor>,
    /// Route of each message GSI, from [`IOAPIC_PINS`] up.
    messages: Mutex<Vec<Option<MsiMessage>>>,
    /// How many lines hold each pin high: devices share pins, and a pin is high while any of them wants it so.
    held_high: Mutex<[u32; IOAPIC_PINS as usize]>,
}

impl Interrupts {
    /// Sets the legacy routes.
    ///
    /// # Errors
    /// What the hypervisor says against it.
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Result<Arc<Interrupts>> {
        hypervisor.route_messages(&[])?;
        Ok(Arc::new(Interrupts { hypervisor, messages: Mutex::default(), held_high: Mutex::default() }))
    }

    /// A level-triggered line into `gsi`, one of the I/O APIC's pins; low at first.
    pub fn line(self: &Arc<Self>, gsi: Gsi) -> IrqLine {
        assert!(gsi.0 < IOAPIC_PINS, "GSI {} is no pin of the I/O APIC", gsi.0);
        IrqLine { interrupts: Arc::clone(self), gsi, high: Mutex::new(false) }
    }

    /// An event whose writing interrupts by the edge-triggered pin `gsi`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Host`] or [`crate::error::Kind::Kvm`] when the event cannot be had or tied.
    pub fn edge(&self, gsi: Gsi) -> Result<EventFd> {
        let event = new_event()?;
        self.hypervisor.tie_interrupt(&event, gsi)?;
        Ok(event)
    }

    /// A new message-signalled interrupt, pointing nowhere.
    ///
    /// # Errors
    /// As [`Self::edge`].
    pub fn message(self: &Arc<Self>) -> Result<MsiVector> {
        let mut messages = self.messages.lock();
        let index = messages.len();
        let gsi = Gsi(IOAPIC_PINS + index as u32);
        let event = self.edge(gsi)?;
        messages.push(None);
        Ok(MsiVector { interrupts: Arc::clone(self), index, event })
    }

    /// Counts one line more, or less, that holds `gsi` high, and tells the controllers when that changes its level.
    fn hold(&self, gsi: Gsi, level: bool) {
        let mut held_high = self.held_high.lock();
        let holders = &mut held_high[gsi.0 as usize];
        *holders = if level { *holders + 1 } else { *holders - 1 };
        if *holders == u32::from(level)
            && let Err(error) = self.hypervisor.set_pin(gsi, level)
        {
            tracing::error!(gsi = gsi.0, level, %error, "the guest may miss an interrupt");
        }
    }
}

fn new_event() -> Result<EventFd> {
    EventFd::new(EFD_NONBLOCK).map_err(|cause| Error::host("event descriptor for an interrupt", cause))
}

/// The routes of a PC, as (GSI, chip, pin): GSIs 0 to 15 to both 8259s and the I/O APIC, 16 to 23 to the I/O APIC; the
/// timer, GSI 0, is the latter's pin 2.
fn legacy_routes() -> impl Iterator<Item = (u32, u32, u32)> {
    let master = (0..8).map(|gsi| (gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    let slave = (8..16).map(|gsi| (gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
    let ioapic = (0..IOAPIC_PINS).map(|gsi| (gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    master.chain(slave).chain(ioapic).filter(|(gsi, _, _)| *gsi != 2)
}

fn pin_route((gsi, irqchip, pin): (u32, u32, u32)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message_route(gsi: Gsi, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: gsi.0, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// A level-triggered interrupt line.
pub struct IrqLine {
    interrupts: Arc<Interrupts>,
    gsi: Gsi,
    high: Mutex<bool>,
}

impl IrqLine {
    /// The pin that it leads to.
    pub fn gsi(&self) -> Gsi {
        self.gsi
    }

    /// Sets the line's level; telling it the level that it has costs nothing.
    pub fn set(&self, level: bool) {
        let mut high = self.high.lock();
        if *high != level {
            *high = level;
            self.interrupts.hold(self.gsi, level);
        }
    }
}

/// A message-signalled interrupt, fired without leaving the kernel's fast path.
pub struct MsiVector {
    interrupts: Arc<Interrupts>,
    index: usize,
    event: EventFd,
}

impl MsiVector {
    /// Points the interrupt at `message`, or nowhere. A message that KVM refuses (a guest can write anything) points
    /// nowhere, and is logged.
    pub fn point(&self, message: Option<MsiMessage>) {
        let mut messages = self.interrupts.messages.lock();
        if messages[self.index] == message {
            return;
        }
        messages[self.index] = message;
        if let Err(error) = self.interrupts.hypervisor.route_messages(&messages) {
            tracing::debug!(?message, %error, "the guest's MSI message is refused");
            messages[self.index] = None;
            if let Err(error) = self.interrupts.hypervisor.route_messages(&messages) {
                tracing::error!(%error, "interrupt routes could not be set back");
            }
        }
    }

    /// Interrupts the guest.
    pub fn fire(&self) {
        if let Err(cause) = self.event.write(1) {
            tracing::error!(%cause, "an interrupt could not be signalled");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_legacy_pin_is_routed_and_the_timer_is_on_pin_two() {
        let pins = |chip| -> Vec<(u32, u32)> {
            legacy_routes().filter(|route| route.1 == chip).map(|(gsi, _, pin)| (gsi, pin)).collect()
        };
        let ioapic = pins(KVM_IRQCHIP_IOAPIC);
        assert_eq!(ioapic.len(), 23);
        assert!(ioapic.contains(&(0, 2)) && ioapic.contains(&(10, 10)) && ioapic.contains(&(23, 23)));
        assert_eq!(pins(KVM_IRQCHIP_PIC_MASTER).len() + pins(KVM_IRQCHIP_PIC_SLAVE).len(), 15);
        assert!(pins(KVM_IRQCHIP_PIC_SLAVE).contains(&(11, 3)));
    }
}
