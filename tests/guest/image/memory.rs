//! Owns the memory behind the image: buffers and rings are cut from it, once, and never given back.
//! Promises ranges that are zeroed, aligned, disjoint and identity-mapped: address and physical address are one number.
//! Must not know what the ranges are for.

use crate::cpu;

/// `hvm_start_info` version 1, as far as this program reads it (Xen, hvm/start_info.h).
#[repr(C)]
pub struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    module_list: u64,
    command_line: u64,
    acpi_root: u64,
    memory_map: u64,
    memory_map_entries: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// What the identity map covers.
const MAPPED: u64 = 1 << 30;
const KIND_RAM: u32 = 1;

impl StartInfo {
    /// The kernel command line; empty if it is no UTF-8.
    pub fn command_line(&self) -> &'static str {
        // SAFETY: the boot protocol puts a NUL-terminated string there, which nothing changes afterwards.
        let text = unsafe { core::ffi::CStr::from_ptr(self.command_line as *const core::ffi::c_char) };
        text.to_str().unwrap_or("")
    }

    /// The end of the RAM that holds the image, or of the identity map if that comes first.
    fn end_of_ram(&self) -> u64 {
        // SAFETY: the boot protocol puts that many entries there, which nothing changes afterwards.
        let map = unsafe {
            core::slice::from_raw_parts(self.memory_map as *const MemoryMapEntry, self.memory_map_entries as usize)
        };
        let image = cpu::end_of_image();
        let holder = map
            .iter()
            .find(|entry| entry.kind == KIND_RAM && entry.address <= image && image < entry.address + entry.size);
        holder.map_or(image, |entry| entry.address + entry.size).min(MAPPED)
    }
}

/// Free memory.
pub struct Arena {
    next: u64,
    end: u64,
}

/// There is not as much memory left as was asked for.
#[derive(Debug)]
pub struct OutOfMemory;

impl Arena {
    /// All memory behind the image.
    pub fn new(start_info: &StartInfo) -> Arena {
        Arena { next: cpu::end_of_image(), end: start_info.end_of_ram() }
    }

    /// Cuts off `bytes`, aligned to a page.
    pub fn take(&mut self, bytes: usize) -> Result<&'static mut [u8], OutOfMemory> {
        let start = self.next.next_multiple_of(4096);
        let end = start.checked_add(bytes as u64).filter(|end| *end <= self.end).ok_or(OutOfMemory)?;
        self.next = end;
        // SAFETY: RAM beyond the image, identity-mapped, given out once; fresh memory of the machine is zero.
        Ok(unsafe { core::slice::from_raw_parts_mut(start as *mut u8, bytes) })
    }
}
