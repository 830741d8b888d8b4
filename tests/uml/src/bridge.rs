//! Owns: one connection of a User-Mode Linux: its requests, and its driver's accesses to configuration space and registers.
//! Promises: an access is answered before the driver goes on; one that makes no sense reads as ones and writes nothing.
//! Must not know: which adapter it is.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_queue::QueueT;
use vmm::config::DiskConfig;
use vmm::control::Control;
use vmm::irq::Interrupts;
use vmm::pci::function::{AdapterFunction, MovableInterrupt, Place};
use vmm::pci::{ConfigAccess, FIRST_ADAPTER_DEVICE, PciBus};
use vmm::platform::ResetControl;
use vmm::vcpu::Buses;

use crate::adapter::Pluggable;
use crate::requests;
use crate::vhost_user::{BackChannel, Connection, FEATURES, MemoryMap, Message, PROTOCOL_FEATURES, nonsense, request};
use crate::wires::{COMMANDS, Command, NOTICES, Rings, Wires};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Operations of linux/virtio_pcidev.h that a driver starts.
mod operation {
    pub const CONFIG_READ: u8 = 1;
    pub const CONFIG_WRITE: u8 = 2;
    pub const REGISTER_READ: u8 = 3;
    pub const REGISTER_WRITE: u8 = 4;
    pub const REGISTER_FILL: u8 = 5;
}

/// Bytes of a command before its data: operation, BAR, two reserved, size, address.
const COMMAND_HEADER: usize = 16;

/// The device: an adapter in its place on a PCI bus that has nothing else.
struct Device {
    adapter: Arc<Pluggable>,
    function: Arc<AdapterFunction>,
}

/// Serves one User-Mode Linux until it goes.
pub fn serve(stream: UnixStream, disks: Vec<DiskConfig>, requests: Option<PathBuf>) -> Result<(), Failure> {
    let mut connection = Connection::new(stream);
    let rings = Arc::new(Mutex::new(Rings::default()));
    let mut map = None;
    let mut device: Option<Device> = None;
    while let Some(mut message) = connection.receive()? {
        match message.request {
            request::GET_FEATURES => connection.reply(message.request, FEATURES)?,
            request::GET_PROTOCOL_FEATURES => connection.reply(message.request, PROTOCOL_FEATURES)?,
            request::SET_MEMORY_TABLE => {
                let table = map.insert(MemoryMap::new(&mut message)?);
                rings.lock().set_memory(table.memory.clone());
                if device.is_none() {
                    device = Some(plug_in(table, &disks, &rings)?);
                    if let (Some(device), Some(directory)) = (&device, &requests) {
                        requests::watch(directory.clone(), Arc::clone(&device.adapter))?;
                    }
                }
            }
            request::SET_BACK_CHANNEL => {
                let file = message.file.take().ok_or_else(|| nonsense("a back channel without a file".to_owned()))?;
                rings.lock().set_channel(BackChannel::new(file));
            }
            request::SET_RING_SIZE | request::SET_RING_ADDRESSES | request::SET_RING_BASE => {
                set_up_ring(&mut rings.lock(), &message, map.as_ref())?;
            }
            request::RING_KICK => match (message.word(0)?, &device) {
                (COMMANDS, Some(device)) => device.carry_out(&rings)?,
                (NOTICES, _) => rings.lock().flush()?,
                (ring, _) => return Err(nonsense(format!("ring {ring} is kicked, and is not there")).into()),
            },
            _ => {}
        }
        let is_answered = matches!(message.request, request::GET_FEATURES | request::GET_PROTOCOL_FEATURES);
        if message.needs_reply && !is_answered {
            connection.reply(message.request, 0)?;
        }
    }
    device.map_or(Ok(()), |device| Ok(device.adapter.stop()?))
}

fn set_up_ring(rings: &mut Rings, message: &Message, map: Option<&MemoryMap>) -> Result<(), Failure> {
    let queue = rings.queue(message.word(0)?)?;
    match message.request {
        request::SET_RING_SIZE => {
            let size = u16::try_from(message.word(4)?).map_err(|cause| nonsense(format!("size of a ring: {cause}")))?;
            queue.try_set_size(size)?;
        }
        request::SET_RING_BASE if message.word(4)? != 0 => {
            return Err(nonsense("a ring that has been used before".to_owned()).into());
        }
        request::SET_RING_BASE => {}
        _ => {
            let map = map.ok_or_else(|| nonsense("rings before memory".to_owned()))?;
            let address = |offset: usize| map.guest_address(message.long(offset)?);
            queue.try_set_desc_table_address(address(8)?)?;
            queue.try_set_used_ring_address(address(16)?)?;
            queue.try_set_avail_ring_address(address(24)?)?;
            queue.set_ready(true);
        }
    }
    Ok(())
}

fn plug_in(map: &MemoryMap, disks: &[DiskConfig], rings: &Arc<Mutex<Rings>>) -> Result<Device, Failure> {
    let wires = Arc::new(Wires::new(Arc::clone(rings)));
    let interrupt = Arc::new(MovableInterrupt::default());
    let adapter = Arc::new(Pluggable::start(Arc::new(map.memory.clone()), interrupt.clone(), disks)?);
    let interrupts = Interrupts::new(wires.clone())?;
    let pci = PciBus::new(Arc::new(ResetControl(Control::new(0))));
    let buses = Buses { port: Arc::default(), memory_mapped: Arc::default() };
    let place = Place { device: FIRST_ADAPTER_DEVICE, pci: &pci, buses, interrupts: &interrupts };
    let function = AdapterFunction::new(adapter.adapter(), place, wires, &interrupt)?;
    Ok(Device { adapter, function })
}

impl Device {
    /// Carries out all commands that the driver has given. The rings are not locked meanwhile: a register write may interrupt.
    fn carry_out(&self, rings: &Mutex<Rings>) -> io::Result<()> {
        loop {
            let Some(command) = rings.lock().take_command()? else { return Ok(()) };
            let answer = self.access(&command);
            rings.lock().answer(&command, &answer)?;
        }
    }

    fn access(&self, command: &Command) -> Vec<u8> {
        let mut answer = vec![0xFF; command.room];
        let Some((header, data)) = command.written.split_first_chunk::<COMMAND_HEADER>() else { return answer };
        let [operation, bar, _, _, size @ .., _, _, _, _, _, _, _, _] = *header;
        let size = u32::from_le_bytes(size) as usize;
        let address = header[8..].iter().rev().fold(0, |address, byte| address << 8 | u64::from(*byte));
        let most = if matches!(operation, operation::CONFIG_READ | operation::CONFIG_WRITE) { 4 } else { 8 };
        let window = self.function.window(bar);
        match operation {
            operation::CONFIG_READ => in_pieces(address, answer.len().min(size), most, |at, piece| {
                self.function.read(at as usize, &mut answer[piece]);
            }),
            operation::CONFIG_WRITE => in_pieces(address, data.len().min(size), most, |at, piece| {
                self.function.write(at as usize, &data[piece]);
            }),
            operation::REGISTER_READ => in_pieces(address, answer.len().min(size), most, |at, piece| {
                if let Some(window) = window {
                    window.read(at, &mut answer[piece]);
                }
            }),
            operation::REGISTER_WRITE => in_pieces(address, data.len().min(size), most, |at, piece| {
                if let Some(window) = window {
                    window.write(at, &data[piece]);
                }
            }),
            operation::REGISTER_FILL => in_pieces(address, size, most, |at, piece| {
                if let (Some(window), Some(byte)) = (window, data.first()) {
                    window.write(at, &[*byte; 8][..piece.len()]);
                }
            }),
            _ => tracing::warn!(operation, "an unknown operation"),
        }
        answer
    }
}

/// Calls `one` for each naturally aligned piece of at most `most` bytes, with its address and its place in the data.
fn in_pieces(address: u64, length: usize, most: usize, mut one: impl FnMut(u64, std::ops::Range<usize>)) {
    let mut done = 0;
    while done < length {
        let at = address.wrapping_add(done as u64);
        let mut piece = most;
        while piece > length - done || !at.is_multiple_of(piece as u64) {
            piece /= 2;
        }
        one(at, done..done + piece);
        done += piece;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_split_at_their_natural_alignment() {
        let mut pieces = Vec::new();
        in_pieces(0x0E, 15, 8, |at, piece| pieces.push((at, piece.start, piece.len())));
        assert_eq!(pieces, [(0x0E, 0, 2), (0x10, 2, 8), (0x18, 10, 4), (0x1C, 14, 1)]);
        in_pieces(0, 0, 8, |_, _| panic!("nothing to do"));
    }
}
