//! Owns the 256 bytes of a function's PCI configuration space: what they hold and which bits the guest may change.
//! Promises that read-only bits never change, whatever width and offset a write has.
//! Must not know buses, interrupts or what a function does.

use super::msix::MsixControl;
use crate::irq::MsiMessage;

/// Size of a configuration space, in bytes (PCI 3.0, 6.1).
pub const SIZE: usize = 256;

/// Register offsets of a type 0 header (PCI 3.0, 6.1) and of our MSI capability.
mod register {
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const PROGRAMMING_INTERFACE: usize = 0x09;
    pub const SUBCLASS: usize = 0x0A;
    pub const BASE_CLASS: usize = 0x0B;
    pub const CACHE_LINE_SIZE: usize = 0x0C;
    pub const LATENCY_TIMER: usize = 0x0D;
    pub const BAR_0: usize = 0x10;
    pub const SUBSYSTEM_VENDOR: usize = 0x2C;
    pub const SUBSYSTEM: usize = 0x2E;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3C;
    pub const INTERRUPT_PIN: usize = 0x3D;
    pub const MSI: usize = 0x40;
    pub const MSI_CONTROL: usize = MSI + 0x02;
    pub const MSI_ADDRESS: usize = MSI + 0x04;
    pub const MSI_ADDRESS_HIGH: usize = MSI + 0x08;
    pub const MSI_DATA: usize = MSI + 0x0C;
}

const COMMAND_IO: u16 = 1;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SYSTEM_ERROR: u16 = 1 << 8;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Bit 0 of a BAR in the space of I/O ports (PCI 3.0, 6.2.5.1).
const BAR_IS_IO: u32 = 1;
const MSI_CAPABILITY_ID: u8 = 0x05;
const MSI_ENABLE: u16 = 1;
const MSI_64_BIT: u16 = 1 << 7;
const VENDOR_CAPABILITY_ID: u8 = 0x09;
const MSIX_CAPABILITY_ID: u8 = 0x11;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const MSIX_ENABLE: u16 = 1 << 15;
/// Where capabilities go after that for MSI.
const FIRST_FREE: usize = 0x50;

/// Identification of a function: registers 00h, 02h, 08h to 0Bh, 2Ch and 2Eh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identification {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A function's configuration space.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// A set bit is one that the guest may change.
    writable: [u8; SIZE],
    /// Where there is room for the next capability.
    free: usize,
    /// Where the MSI-X capability is.
    msix: Option<usize>,
    /// Where the capability is that is a window to the registers.
    register_window: Option<usize>,
}

/// Offsets in the capability that is a window to the registers (virtio 1.2, 4.1.4 and 4.1.4.9).
mod window {
    pub const BAR: usize = 4;
    pub const OFFSET: usize = 8;
    pub const LENGTH: usize = 12;
    pub const DATA: usize = 16;
    pub const END: usize = 20;
}

/// What an access to the data of the window to the registers is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndirectAccess {
    /// The BAR that is meant.
    pub bar: u8,
    /// Offset in it.
    pub offset: u32,
    /// Bytes: 1, 2 or 4.
    pub length: usize,
}

impl ConfigSpace {
    /// A space without BARs, interrupt and capabilities.
    pub fn new(identification: Identification) -> ConfigSpace {
        let mut space =
            ConfigSpace { bytes: [0; SIZE], writable: [0; SIZE], free: FIRST_FREE, msix: None, register_window: None };
        space.put16(register::VENDOR, identification.vendor);
        space.put16(register::DEVICE, identification.device);
        space.bytes[register::REVISION] = identification.revision;
        let [base, sub, interface] = identification.class;
        space.bytes[register::BASE_CLASS] = base;
        space.bytes[register::SUBCLASS] = sub;
        space.bytes[register::PROGRAMMING_INTERFACE] = interface;
        space.put16(register::SUBSYSTEM_VENDOR, identification.subsystem_vendor);
        space.put16(register::SUBSYSTEM, identification.subsystem);
        let command =
            COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SYSTEM_ERROR | COMMAND_INTX_DISABLE;
        space.allow16(register::COMMAND, command);
        space.writable[register::CACHE_LINE_SIZE] = 0xFF;
        space.writable[register::LATENCY_TIMER] = 0xFF;
        space
    }

    /// Gives the function a 32-bit memory BAR of `size` bytes (a power of two, at least 16) at `address`, and turns memory
    /// decoding and bus mastering on, as firmware does.
    pub fn set_memory_bar(&mut self, index: u8, size: u32, address: u32) {
        assert!(index < 6 && size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        let offset = register::BAR_0 + 4 * usize::from(index);
        self.put32(offset, address);
        self.writable[offset..offset + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        let command = self.get16(register::COMMAND) | COMMAND_MEMORY | COMMAND_BUS_MASTER;
        self.put16(register::COMMAND, command);
    }

    /// Gives the function an I/O BAR of `size` ports (a power of two, 4 to 256) at `address`, and turns port decoding and bus
    /// mastering on, as firmware does.
    pub fn set_io_bar(&mut self, index: u8, size: u32, address: u32) {
        assert!(index < 6 && size.is_power_of_two() && (4..=256).contains(&size) && address.is_multiple_of(size));
        let offset = register::BAR_0 + 4 * usize::from(index);
        self.put32(offset, address | BAR_IS_IO);
        self.writable[offset..offset + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.writable[register::COMMAND] |= COMMAND_IO as u8;
        let command = self.get16(register::COMMAND) | COMMAND_IO | COMMAND_BUS_MASTER;
        self.put16(register::COMMAND, command);
    }

    /// Gives the function the pin INTA#, which firmware routed to interrupt `line`.
    pub fn set_interrupt(&mut self, line: u8) {
        self.bytes[register::INTERRUPT_PIN] = 1;
        self.bytes[register::INTERRUPT_LINE] = line;
        self.writable[register::INTERRUPT_LINE] = 0xFF;
    }

    /// Gives the function a 64-bit MSI capability with one vector (PCI 3.0, 6.8.1).
    pub fn set_msi(&mut self) {
        self.put16(register::STATUS, STATUS_CAPABILITIES);
        self.bytes[register::CAPABILITIES] = register::MSI as u8;
        self.bytes[register::MSI] = MSI_CAPABILITY_ID;
        self.put16(register::MSI_CONTROL, MSI_64_BIT);
        self.allow16(register::MSI_CONTROL, MSI_ENABLE);
        self.writable[register::MSI_ADDRESS..register::MSI_ADDRESS + 4].copy_from_slice(&(!3u32).to_le_bytes());
        self.writable[register::MSI_ADDRESS_HIGH..register::MSI_ADDRESS_HIGH + 4].fill(0xFF);
        self.allow16(register::MSI_DATA, 0xFFFF);
    }

    /// Gives the function an MSI-X capability with `vectors` (1 to 2048), whose table is at the start of memory BAR `bar` and whose
    /// pending bits are `pending` bytes into it (PCI 3.0, 6.8.2).
    pub fn set_msix(&mut self, vectors: u16, bar: u8, pending: u32) {
        assert!((1..=2048).contains(&vectors) && pending.is_multiple_of(8));
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(bar).to_le_bytes());
        body[6..10].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let place = self.add_capability(MSIX_CAPABILITY_ID, &body);
        self.allow16(place + 2, MSIX_ENABLE | MSIX_FUNCTION_MASK);
        self.msix = Some(place);
    }

    /// Appends vendor-specific capabilities, each given from its length byte on (PCI 3.0, appendix H); number `register_window` of
    /// them is a window to the registers.
    pub fn add_vendor_capabilities(&mut self, capabilities: &[&[u8]], register_window: Option<usize>) {
        for (number, capability) in capabilities.iter().enumerate() {
            let place = self.add_capability(VENDOR_CAPABILITY_ID, capability);
            if register_window == Some(number) {
                assert!(capability.len() == window::END - 2, "a window to the registers has {} bytes", window::END);
                self.writable[place + window::BAR] = 0xFF;
                self.writable[place + window::OFFSET..place + window::END].fill(0xFF);
                self.register_window = Some(place);
            }
        }
    }

    /// Appends a capability with `body` behind its two bytes of header; the newest one comes first in the list. Returns its place.
    fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let place = self.free;
        let end = place + 2 + body.len();
        assert!(end <= SIZE, "no room for a capability");
        self.bytes[place] = id;
        self.bytes[place + 1] = self.bytes[register::CAPABILITIES];
        self.bytes[place + 2..end].copy_from_slice(body);
        self.bytes[register::CAPABILITIES] = place as u8;
        self.put16(register::STATUS, self.get16(register::STATUS) | STATUS_CAPABILITIES);
        self.free = end.next_multiple_of(4);
        place
    }

    /// Reads `data.len()` bytes at `offset`; beyond the space they are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + index).copied().unwrap_or(0xFF);
        }
    }

    /// Writes what may be written of `data` at `offset`.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate().take_while(|(index, _)| offset + index < SIZE) {
            let mask = self.writable[offset + index];
            let old = &mut self.bytes[offset + index];
            *old = (*old & !mask) | (byte & mask);
        }
    }

    /// What an access of `length` bytes at `offset` does to the registers: something, if it touches the data of the window to them and
    /// what the guest has said of it makes sense.
    pub fn indirect_access(&self, offset: usize, length: usize) -> Option<IndirectAccess> {
        let place = self.register_window?;
        if offset >= place + window::END || offset + length <= place + window::DATA {
            return None;
        }
        let access = IndirectAccess {
            bar: self.bytes[place + window::BAR],
            offset: self.get32(place + window::OFFSET),
            length: self.get32(place + window::LENGTH) as usize,
        };
        (matches!(access.length, 1 | 2 | 4) && access.offset.is_multiple_of(access.length as u32)).then_some(access)
    }

    /// The data of the window to the registers.
    pub fn indirect_data(&mut self) -> Option<&mut [u8]> {
        let place = self.register_window?;
        Some(&mut self.bytes[place + window::DATA..place + window::END])
    }

    /// Where memory BAR `index` decodes, if the guest has memory decoding on.
    pub fn decoded_memory_bar(&self, index: u8) -> Option<u32> {
        let address = self.get32(register::BAR_0 + 4 * usize::from(index));
        (self.get16(register::COMMAND) & COMMAND_MEMORY != 0 && address != 0).then_some(address)
    }

    /// Where I/O BAR `index` decodes, if the guest has port decoding on. A PC has 64 Ki ports.
    pub fn decoded_io_bar(&self, index: u8) -> Option<u32> {
        let address = self.get32(register::BAR_0 + 4 * usize::from(index)) & !3;
        (self.get16(register::COMMAND) & COMMAND_IO != 0 && (1..0x1_0000).contains(&address)).then_some(address)
    }

    /// May the function read and write guest memory, and send messages?
    pub fn bus_master(&self) -> bool {
        self.get16(register::COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Has the guest forbidden the function its INTx pin?
    pub fn intx_disabled(&self) -> bool {
        self.get16(register::COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    /// Where the guest wants the function's message, if it has MSI enabled.
    pub fn msi(&self) -> Option<MsiMessage> {
        let enabled = self.get16(register::MSI_CONTROL) & MSI_ENABLE != 0;
        let high = u64::from(self.get32(register::MSI_ADDRESS_HIGH));
        enabled.then(|| MsiMessage {
            address: high << 32 | u64::from(self.get32(register::MSI_ADDRESS)),
            data: u32::from(self.get16(register::MSI_DATA)),
        })
    }

    /// What the guest has written into the MSI-X capability; all off if there is none.
    pub fn msix(&self) -> MsixControl {
        let control = self.msix.map_or(0, |place| self.get16(place + 2));
        MsixControl { enabled: control & MSIX_ENABLE != 0, masked: control & MSIX_FUNCTION_MASK != 0 }
    }

    /// Shows in the status register whether the function wants an INTx interrupt.
    pub fn show_interrupt(&mut self, pending: bool) {
        let status = self.get16(register::STATUS) & !STATUS_INTERRUPT;
        self.put16(register::STATUS, if pending { status | STATUS_INTERRUPT } else { status });
    }

    fn get16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn get32(&self, offset: usize) -> u32 {
        u32::from(self.get16(offset)) | u32::from(self.get16(offset + 2)) << 16
    }

    fn put16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn allow16(&mut self, offset: usize, mask: u16) {
        self.writable[offset..offset + 2].copy_from_slice(&mask.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identification {
            vendor: 0x15AD,
            device: 0x07C0,
            revision: 2,
            class: [1, 7, 0],
            subsystem_vendor: 0x15AD,
            subsystem: 0x07C0,
        });
        space.set_memory_bar(0, 0x8000, 0xE000_0000);
        space.set_interrupt(10);
        space.set_msi();
        space
    }

    fn read32(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn registers_read_as_the_standard_lays_them_out() {
        let space = space();
        assert_eq!(read32(&space, 0x00), 0x07C0_15AD);
        assert_eq!(read32(&space, 0x04), 0x0010_0006, "capabilities list; memory and bus master on");
        assert_eq!(read32(&space, 0x08), 0x0107_0002);
        assert_eq!(read32(&space, 0x10), 0xE000_0000);
        assert_eq!(read32(&space, 0x2C), 0x07C0_15AD);
        assert_eq!(read32(&space, 0x34), 0x40);
        assert_eq!(read32(&space, 0x3C), 0x0000_010A);
        assert_eq!(read32(&space, 0x40), 0x0080_0005);
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones() {
        let mut space = space();
        space.write(0x10, &[0xFF; 4]);
        assert_eq!(read32(&space, 0x10), 0xFFFF_8000);
        space.write(0x10, &0xE123_8000u32.to_le_bytes());
        assert_eq!(space.decoded_memory_bar(0), Some(0xE123_8000));
        space.write(0x04, &[0]);
        assert_eq!(space.decoded_memory_bar(0), None);
    }

    #[test]
    fn vendor_capabilities_are_a_list_with_the_others() {
        let mut space = space();
        space.add_vendor_capabilities(&[&[5, 1, 2], &[4, 9]], None);
        let mut seen = Vec::new();
        let mut at = space.bytes[0x34];
        while at != 0 {
            seen.push((at, space.bytes[usize::from(at)]));
            at = space.bytes[usize::from(at) + 1];
        }
        assert_eq!(seen, [(0x58, 9), (0x50, 9), (0x40, 5)]);
        assert_eq!((space.bytes[0x52..0x55].to_vec(), space.bytes[0x5A..0x5C].to_vec()), (vec![5, 1, 2], vec![4, 9]));
    }

    #[test]
    fn the_guest_changes_but_two_bits_of_the_msix_capability() {
        let mut space = space();
        space.set_msix(7, 1, 0x800);
        assert_eq!((read32(&space, 0x34) as u8, read32(&space, 0x50)), (0x50, 0x0006_4011));
        assert_eq!((read32(&space, 0x54), read32(&space, 0x58)), (1, 0x801));
        assert_eq!(space.msix(), MsixControl::default());
        space.write(0x50, &[0xFF; 12]);
        assert_eq!((read32(&space, 0x50), read32(&space, 0x54)), (0xC006_4011, 1));
        assert_eq!(space.msix(), MsixControl { enabled: true, masked: true });
    }

    #[test]
    fn a_window_to_the_registers_says_what_its_data_do() {
        let mut space = space();
        let mut capability = [0; 18];
        capability[0] = 20;
        space.add_vendor_capabilities(&[&[4, 9], &capability], Some(1));
        let place = 0x54;
        assert_eq!(space.indirect_access(place + 16, 4), None, "no length yet");
        space.write(place + 4, &[3]);
        space.write(place + 8, &0x1234u32.to_le_bytes());
        for (length, fits) in [(1u32, true), (2, true), (4, true), (3, false), (8, false), (u32::MAX, false)] {
            space.write(place + 12, &length.to_le_bytes());
            let expected = fits.then_some(IndirectAccess { bar: 3, offset: 0x1234, length: length as usize });
            assert_eq!(space.indirect_access(place + 16, 4), expected);
            assert_eq!(space.indirect_access(place + 19, 1), expected);
            assert_eq!((space.indirect_access(place + 12, 4), space.indirect_access(place + 20, 4)), (None, None));
        }
        space.write(place + 8, &0x1235u32.to_le_bytes());
        space.write(place + 12, &2u32.to_le_bytes());
        assert_eq!(space.indirect_access(place + 16, 2), None, "not aligned");
        space.indirect_data().expect("data").copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(read32(&space, place + 16), 0x0403_0201);
    }

    #[test]
    fn an_io_bar_says_so_and_decodes_only_where_a_pc_has_ports() {
        let mut space = space();
        space.set_io_bar(1, 256, 0xC000);
        assert_eq!((read32(&space, 0x14), space.decoded_io_bar(1)), (0xC001, Some(0xC000)));
        space.write(0x14, &[0xFF; 4]);
        assert_eq!((read32(&space, 0x14), space.decoded_io_bar(1)), (0xFFFF_FF01, None));
        space.write(0x14, &0x1200u32.to_le_bytes());
        assert_eq!(space.decoded_io_bar(1), Some(0x1200));
        space.write(0x04, &[6]);
        assert_eq!(space.decoded_io_bar(1), None);
    }

    #[test]
    fn an_enabled_message_is_what_the_guest_wrote() {
        let mut space = space();
        space.write(0x44, &0xFEE0_0003u32.to_le_bytes());
        space.write(0x48, &1u32.to_le_bytes());
        space.write(0x4C, &0x4041u16.to_le_bytes());
        assert_eq!(space.msi(), None);
        space.write(0x42, &[1]);
        assert_eq!(space.msi(), Some(MsiMessage { address: 0x1_FEE0_0000, data: 0x4041 }));
    }

    proptest! {
        #[test]
        fn no_write_changes_a_read_only_bit(
            writes in prop::collection::vec((0usize..300, prop::collection::vec(any::<u8>(), 0..9)), 0..50),
        ) {
            let (before, mut space) = (space(), space());
            for (offset, data) in writes {
                space.write(offset, &data);
            }
            for offset in 0..SIZE {
                prop_assert_eq!((space.bytes[offset] ^ before.bytes[offset]) & !space.writable[offset], 0);
            }
        }
    }
}
