//! Owns the way to PCI configuration spaces on bus 0, by configuration mechanism 1.
//! Promises to touch no function but the one that was looked for.
//! Must not know what the function does.

use crate::cpu::{in32, out32};

const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;
/// Capability id of message signalled interrupts.
const MSI: u8 = 0x05;

/// Function 0 of a device on bus 0.
#[derive(Clone, Copy)]
pub struct Function {
    device: u32,
}

impl Function {
    /// The first function with these ids.
    pub fn find(vendor: u16, device_id: u16) -> Option<Function> {
        let wanted = u32::from(vendor) | u32::from(device_id) << 16;
        (0..32).map(|device| Function { device }).find(|function| function.read(0) == wanted)
    }

    /// Device number on bus 0.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Reads the double word at `offset`, a multiple of four.
    pub fn read(&self, offset: u8) -> u32 {
        self.select(offset);
        in32(CONFIG_DATA)
    }

    /// Writes the double word at `offset`, a multiple of four.
    pub fn write(&self, offset: u8, value: u32) {
        self.select(offset);
        out32(CONFIG_DATA, value);
    }

    fn select(&self, offset: u8) {
        out32(CONFIG_ADDRESS, 1 << 31 | self.device << 11 | u32::from(offset & 0xFC));
    }

    /// Address of 32-bit memory BAR `index`; `None` if it is none or was not programmed.
    pub fn memory_bar(&self, index: u8) -> Option<u64> {
        let value = self.read(0x10 + 4 * index);
        (value & 0xF == 0 && value >= 0xC000_0000).then_some(u64::from(value))
    }

    /// First port of I/O BAR `index`; `None` if it is none or was not programmed.
    pub fn port_bar(&self, index: u8) -> Option<u16> {
        let value = self.read(0x10 + 4 * index);
        (value & 3 == 1 && value > 3).then_some((value & !3) as u16)
    }

    /// Programs I/O BAR `index`, and lets the function decode ports.
    pub fn set_port_bar(&self, index: u8, port: u16) {
        self.write(0x10 + 4 * index, u32::from(port) | 1);
        self.write(0x04, self.read(0x04) & 0xFFFF | 1);
    }

    /// Programs 32-bit memory BAR `index`.
    pub fn set_memory_bar(&self, index: u8, address: u64) {
        self.write(0x10 + 4 * index, address as u32);
    }

    /// Size of memory BAR `index`, found by writing ones; the BAR is put back.
    pub fn memory_bar_size(&self, index: u8) -> u32 {
        let offset = 0x10 + 4 * index;
        let before = self.read(offset);
        self.write(offset, u32::MAX);
        let size = !(self.read(offset) & !0xF);
        self.write(offset, before);
        size.wrapping_add(1)
    }

    /// Lets the function decode memory and master the bus; its INTx pin is allowed or not.
    pub fn enable(&self, intx: bool) {
        let command = self.read(0x04) & 0xFFFF & !(1 << 10);
        self.write(0x04, command | 1 << 1 | 1 << 2 | if intx { 0 } else { 1 << 10 });
    }

    /// The interrupt line that firmware routed the pin to.
    pub fn interrupt_line(&self) -> u8 {
        self.read(0x3C) as u8
    }

    /// Offset of the first capability `id` for which `fits`.
    fn capability(&self, id: u8, fits: impl Fn(u8) -> bool) -> Option<u8> {
        const LIST_MAX: usize = 48;
        let has_list = self.read(0x04) >> 16 & 1 << 4 != 0;
        let mut offset = if has_list { self.read(0x34) as u8 & 0xFC } else { 0 };
        for _ in 0..LIST_MAX {
            if offset == 0 {
                break;
            }
            let header = self.read(offset);
            if header as u8 == id && fits(offset) {
                return Some(offset);
            }
            offset = (header >> 8) as u8 & 0xFC;
        }
        None
    }

    /// Where the area `kind` of a virtio device is in its BAR 0 (virtio 1.2, 4.1.4).
    pub fn vendor_area(&self, kind: u8) -> Option<u32> {
        const VENDOR_SPECIFIC: u8 = 0x09;
        let fits = |offset| self.read(offset) >> 24 == u32::from(kind) && self.read(offset + 4) as u8 == 0;
        self.capability(VENDOR_SPECIFIC, fits).map(|offset| self.read(offset + 8))
    }

    /// Points the window that the configuration space has to the registers of a virtio device at `length` bytes from `offset` on in BAR
    /// 0 (virtio 1.2, 4.1.4.9); where its data are, or `None` if there is no such window.
    pub fn point_window(&self, offset: u32, length: u32) -> Option<u8> {
        const VENDOR_SPECIFIC: u8 = 0x09;
        const WINDOW: u32 = 5;
        let place = self.capability(VENDOR_SPECIFIC, |offset| self.read(offset) >> 24 == WINDOW)?;
        self.write(place + 4, 0);
        self.write(place + 8, offset);
        self.write(place + 12, length);
        Some(place + 16)
    }

    /// Turns the function's MSI off, if it has it.
    pub fn disable_msi(&self) {
        if let Some(offset) = self.capability(MSI, |_| true) {
            let control = self.read(offset) >> 16;
            self.write(offset, (control & !1) << 16);
        }
    }

    /// Has the function's MSI sent to `vector` of processor 0; false if it has no such capability.
    pub fn enable_msi(&self, vector: u8) -> bool {
        let Some(offset) = self.capability(MSI, |_| true) else { return false };
        let control = self.read(offset) >> 16;
        let wide = control & 1 << 7 != 0;
        self.write(offset + 4, 0xFEE0_0000);
        if wide {
            self.write(offset + 8, 0);
        }
        self.write(offset + if wide { 12 } else { 8 }, u32::from(vector));
        self.write(offset, (control | 1) << 16);
        true
    }
}
