//! Owns PCI bus 0: configuration mechanism 1, the host bridge, and where each function sits.
//! Promises that an absent function reads as ones, and that functions get BARs as firmware would program them.
//! Must not know what a function does behind its configuration space.

pub mod config_space;
pub mod function;
pub mod msix;

use crate::bus::BusDevice;
use crate::memory::PCI_MEMORY_WINDOW;
use config_space::{ConfigSpace, Identification};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// First port of configuration mechanism 1: address at 0xCF8, data at 0xCFC (PCI 3.0, 3.2.2.3.2).
pub const CONFIG_PORT: u64 = 0xCF8;
/// How many ports it has.
pub const CONFIG_PORTS: u64 = 8;
/// I/O ports that firmware hands out to functions: above those of any chipset device.
const PCI_PORT_WINDOW: std::ops::Range<u32> = 0xC000..0x1_0000;
/// Devices on a bus.
pub const DEVICES: usize = 32;
/// The device number of the first adapter; the numbers below are the chipset's.
pub const FIRST_ADAPTER_DEVICE: usize = 16;

/// The configuration space of a function, as the guest reaches it.
pub trait ConfigAccess: Send + Sync {
    /// Reads `data.len()` bytes at `offset`; they never cross a double word.
    fn read(&self, offset: usize, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&self, offset: usize, data: &[u8]);
}

/// A function that consists of its configuration space only.
struct Passive(Mutex<ConfigSpace>);

impl ConfigAccess for Passive {
    fn read(&self, offset: usize, data: &mut [u8]) {
        self.0.lock().read(offset, data);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        self.0.lock().write(offset, data);
    }
}

/// The host bridge: an Intel 440FX (8086:1237) as QEMU's PC has it, which guests know best.
fn host_bridge() -> ConfigSpace {
    ConfigSpace::new(Identification {
        vendor: 0x8086,
        device: 0x1237,
        revision: 2,
        class: [0x06, 0x00, 0x00],
        subsystem_vendor: 0x1AF4,
        subsystem: 0x1100,
    })
}

/// Bus 0 and the ports by which its configuration spaces are reached.
pub struct PciBus {
    address: AtomicU32,
    functions: RwLock<[Option<Arc<dyn ConfigAccess>>; DEVICES]>,
    /// What lies beside the configuration address: the chipset's reset control register, one byte at 0xCF9.
    reset_control: Arc<dyn BusDevice>,
    next_memory: Mutex<u64>,
    next_port: Mutex<u32>,
}

impl PciBus {
    /// A bus with the host bridge at device 0.
    pub fn new(reset_control: Arc<dyn BusDevice>) -> PciBus {
        let mut functions = [const { None }; DEVICES];
        functions[0] = Some(Arc::new(Passive(Mutex::new(host_bridge()))) as Arc<dyn ConfigAccess>);
        PciBus {
            address: AtomicU32::new(0),
            functions: RwLock::new(functions),
            reset_control,
            next_memory: Mutex::new(PCI_MEMORY_WINDOW.start),
            next_port: Mutex::new(PCI_PORT_WINDOW.start),
        }
    }

    /// Puts function 0 of `device` on the bus.
    pub fn insert(&self, device: usize, function: Arc<dyn ConfigAccess>) {
        self.functions.write()[device] = Some(function);
    }

    /// A free, naturally aligned range of `size` bytes (a power of two) in the memory window; `None` when it is full.
    pub fn allocate_memory(&self, size: u32) -> Option<u32> {
        let size = u64::from(size);
        let mut next = self.next_memory.lock();
        let start = next.next_multiple_of(size);
        let end = start.checked_add(size).filter(|end| *end <= PCI_MEMORY_WINDOW.end)?;
        *next = end;
        u32::try_from(start).ok()
    }

    /// A free, naturally aligned range of `size` ports (a power of two) in the port window; `None` when it is full.
    pub fn allocate_ports(&self, size: u32) -> Option<u32> {
        let mut next = self.next_port.lock();
        let start = next.next_multiple_of(size);
        *next = start.checked_add(size).filter(|end| *end <= PCI_PORT_WINDOW.end)?;
        Some(start)
    }

    /// The function that the configuration address names, and the offset of `port` in its space.
    fn selected(&self, port: u64) -> Option<(Arc<dyn ConfigAccess>, usize)> {
        const ENABLE: u32 = 1 << 31;
        let address = self.address.load(SeqCst);
        let (bus, device, function) = (address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 7);
        if address & ENABLE == 0 || bus != 0 || function != 0 {
            return None;
        }
        let found = self.functions.read()[device as usize].clone()?;
        Some((found, (address & 0xFC) as usize + (port - 4) as usize))
    }
}

impl BusDevice for PciBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.load(SeqCst).to_le_bytes()),
            (1, 1) => self.reset_control.read(0, data),
            (4.., _) => {
                if let Some((function, offset)) = self.selected(offset) {
                    function.read(offset, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address.store(u32::from_le_bytes([a, b, c, d]), SeqCst),
            (1, [_]) => self.reset_control.write(0, data),
            (4.., _) => {
                if let Some((function, offset)) = self.selected(offset) {
                    function.write(offset, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Control, Outcome};
    use crate::platform::ResetControl;
    use proptest::prelude::*;

    fn read(bus: &PciBus, address: u32, port: u64, bytes: usize) -> u32 {
        bus.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        bus.read(4 + port, &mut data[..bytes]);
        u32::from_le_bytes(data)
    }

    fn new_bus() -> PciBus {
        PciBus::new(Arc::new(ResetControl(Control::new(0))))
    }

    #[test]
    fn the_host_bridge_is_found_in_any_width_and_absent_functions_read_as_ones() {
        let bus = new_bus();
        assert_eq!(read(&bus, 0x8000_0000, 0, 4), 0x1237_8086);
        assert_eq!(read(&bus, 0x8000_0000, 2, 2), 0x1237);
        assert_eq!(read(&bus, 0x8000_0008, 3, 1), 0x06);
        for absent in [0x0000_0000, 0x8000_0800, 0x8000_0100, 0x8001_0000] {
            assert_eq!(read(&bus, absent, 0, 4), u32::MAX, "{absent:#x}");
        }
    }

    #[test]
    fn a_byte_at_0xcf9_is_the_reset_control_and_not_the_address() {
        let control = Control::new(0);
        let bus = PciBus::new(Arc::new(ResetControl(control.clone())));
        bus.write(0, &0x8000_0000u32.to_le_bytes());
        bus.write(1, &[0x06]);
        assert_eq!(control.wait(), Outcome::Reset);
        let mut address = [0; 4];
        bus.read(0, &mut address);
        assert_eq!(u32::from_le_bytes(address), 0x8000_0000);
    }

    #[test]
    fn memory_is_handed_out_aligned_until_the_window_is_full() {
        let bus = new_bus();
        assert_eq!(bus.allocate_memory(0x1000), Some(0xE000_0000));
        assert_eq!(bus.allocate_memory(0x8000), Some(0xE000_8000));
        assert_eq!(bus.allocate_memory(0x4000_0000), None);
        assert_eq!(bus.allocate_memory(0x8000), Some(0xE001_0000));
    }

    #[test]
    fn ports_are_handed_out_aligned_until_the_window_is_full() {
        let bus = new_bus();
        assert_eq!((bus.allocate_ports(32), bus.allocate_ports(256)), (Some(0xC000), Some(0xC100)));
        assert_eq!(bus.allocate_ports(0x4000), None);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_is_answered(
            accesses in prop::collection::vec((0u64..8, prop::collection::vec(any::<u8>(), 1..5)), 0..64),
        ) {
            let bus = new_bus();
            for (offset, mut data) in accesses {
                data.truncate(8 - offset as usize);
                bus.write(offset, &data);
                bus.read(offset, &mut data);
            }
        }
    }
}
