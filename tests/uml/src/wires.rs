//! Owns: how an adapter's interrupts reach User-Mode Linux: as messages on the ring that the driver keeps filled for them.
//! Promises: a message waits for a buffer; none is lost.
//! Must not know: adapters, configuration spaces.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm::error::{Error, Kind, Result};
use vmm::irq::{Gsi, Hypervisor, IOAPIC_PINS, MsiMessage};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::vhost_user::BackChannel;

/// The ring on which the driver asks, and that on which it is told.
pub const COMMANDS: u32 = 0;
pub const NOTICES: u32 = 1;
/// Operations of linux/virtio_pcidev.h that a device starts.
const OPERATION_MSI: u8 = 7;

/// The rings, as far as they have been set up.
#[derive(Default)]
pub struct Rings {
    queues: [Option<Queue>; 2],
    memory: Option<GuestMemoryMmap<()>>,
    channel: Option<BackChannel>,
    /// Data of messages that wait for a buffer.
    waiting: VecDeque<u32>,
}

impl Rings {
    /// Memory in which the rings are.
    pub fn set_memory(&mut self, memory: GuestMemoryMmap<()>) {
        self.memory = Some(memory);
    }

    /// Where the driver is called.
    pub fn set_channel(&mut self, channel: BackChannel) {
        self.channel = Some(channel);
    }

    /// Queue `index`, made if need be.
    pub fn queue(&mut self, index: u32) -> io::Result<&mut Queue> {
        let place = self.queues.get_mut(index as usize);
        let place = place.ok_or_else(|| crate::vhost_user::nonsense(format!("there is no ring {index}")))?;
        if place.is_none() {
            *place = Some(Queue::new(1024).map_err(broken)?);
        }
        place.as_mut().ok_or_else(|| broken("no queue"))
    }

    /// The next command: its chain's number, what the driver wrote, and how much it wants to read.
    pub fn take_command(&mut self) -> io::Result<Option<Command>> {
        let Some(memory) = self.memory.clone() else { return Ok(None) };
        let queue = self.queue(COMMANDS)?;
        let Some(chain) = queue.pop_descriptor_chain(&memory) else { return Ok(None) };
        let head = chain.head_index();
        let mut reader = chain.clone().reader(&memory).map_err(broken)?;
        let mut written = vec![0; reader.available_bytes()];
        io::Read::read_exact(&mut reader, &mut written)?;
        let room = chain.clone().writer(&memory).map_err(broken)?.available_bytes();
        let answer_at = chain.writable().next().map(|descriptor| descriptor.addr());
        Ok(Some(Command { head, written, room, answer_at }))
    }

    /// Gives a command back with its answer.
    pub fn answer(&mut self, command: &Command, answer: &[u8]) -> io::Result<()> {
        let memory = self.memory.clone().ok_or_else(|| broken("no memory"))?;
        if let Some(address) = command.answer_at.filter(|_| !answer.is_empty()) {
            memory.write_slice(answer, address).map_err(broken)?;
        }
        self.give(COMMANDS, &memory, command.head, answer.len() as u32)
    }

    /// Sends what waits, as far as there are buffers for it.
    pub fn flush(&mut self) -> io::Result<()> {
        let Some(memory) = self.memory.clone() else { return Ok(()) };
        while let Some(&data) = self.waiting.front() {
            let queue = self.queue(NOTICES)?;
            let Some(chain) = queue.pop_descriptor_chain(&memory) else { return Ok(()) };
            let head = chain.head_index();
            let mut message = [0; 20];
            message[0] = OPERATION_MSI;
            message[4..8].copy_from_slice(&4u32.to_le_bytes());
            message[16..].copy_from_slice(&data.to_le_bytes());
            let mut writer = chain.writer(&memory).map_err(broken)?;
            io::Write::write_all(&mut writer, &message)?;
            self.waiting.pop_front();
            self.give(NOTICES, &memory, head, message.len() as u32)?;
        }
        Ok(())
    }

    fn give(&mut self, index: u32, memory: &GuestMemoryMmap<()>, head: u16, written: u32) -> io::Result<()> {
        let queue = self.queue(index)?;
        queue.add_used(memory, head, written).map_err(broken)?;
        if queue.needs_notification(memory).map_err(broken)? {
            let channel = self.channel.as_mut().ok_or_else(|| broken("no back channel"))?;
            channel.call(index)?;
        }
        Ok(())
    }
}

/// A command of the driver.
pub struct Command {
    head: u16,
    /// What it wrote.
    pub written: Vec<u8>,
    /// How many bytes it wants to read.
    pub room: usize,
    answer_at: Option<vm_memory::GuestAddress>,
}

fn broken(cause: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("a ring cannot be used: {cause}"))
}

/// The way of an adapter's interrupts.
pub struct Wires {
    rings: Arc<Mutex<Rings>>,
    routes: Arc<Mutex<Vec<Option<MsiMessage>>>>,
}

impl Wires {
    /// Through these rings.
    pub fn new(rings: Arc<Mutex<Rings>>) -> Wires {
        Wires { rings, routes: Arc::default() }
    }
}

impl Hypervisor for Wires {
    fn set_pin(&self, gsi: Gsi, level: bool) -> Result<()> {
        if level {
            // User-Mode Linux refuses its drivers the pin: they use messages.
            tracing::warn!(gsi = gsi.0, "an interrupt by the pin reaches nobody");
        }
        Ok(())
    }

    fn tie_interrupt(&self, event: &EventFd, gsi: Gsi) -> Result<()> {
        let Some(number) = gsi.0.checked_sub(IOAPIC_PINS) else { return Ok(()) };
        let failed = |cause: io::Error| Error::new(Kind::Host, "event of an interrupt", cause, "See ulimit -n and -u");
        let event = event.try_clone().map_err(failed)?;
        let epoll = Epoll::new().map_err(failed)?;
        let wanted = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), wanted).map_err(failed)?;
        let (rings, routes) = (Arc::clone(&self.rings), Arc::clone(&self.routes));
        let carry = move || {
            loop {
                // An interrupted wait is none; and another message may have come already: both are one, as in an interrupt controller.
                if epoll.wait(-1, &mut [EpollEvent::default()]).is_err() || event.read().is_err() {
                    continue;
                }
                let message = routes.lock().get(number as usize).copied().flatten();
                let Some(message) = message else { continue };
                let mut rings = rings.lock();
                rings.waiting.push_back(message.data);
                if let Err(error) = rings.flush() {
                    tracing::error!(%error, "an interrupt cannot be sent");
                    return;
                }
            }
        };
        std::thread::Builder::new().name(format!("message{number}")).spawn(carry).map(drop).map_err(failed)
    }

    fn route_messages(&self, messages: &[Option<MsiMessage>]) -> Result<()> {
        *self.routes.lock() = messages.to_vec();
        Ok(())
    }

    fn tie_doorbell(&self, _: &EventFd, _: u64) -> Result<()> {
        // Every register access comes as a command: the adapter rings its own doorbell.
        Ok(())
    }

    fn untie_doorbell(&self, _: &EventFd, _: u64) {}
}
