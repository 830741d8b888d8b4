//! Owns the guest's physical address map: where RAM lies and where devices may lie.
//! Promises RAM below 3 GiB and, beyond that, from 4 GiB up; the gap is the devices'.
//! Must not know KVM, devices or what the guest keeps in its memory.

use crate::error::{Error, Kind, Result};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// The guest's RAM, shared by vCPUs, devices and the loader.
pub type GuestRam = GuestMemoryMmap<()>;

/// First address of the device gap below 4 GiB: RAM beyond it moves above 4 GiB.
pub const DEVICE_GAP_START: u64 = 0xC000_0000;
/// First address above the device gap.
pub const DEVICE_GAP_END: u64 = 0x1_0000_0000;
/// Window from which memory BARs are programmed: below the I/O APIC at 0xFEC0_0000.
pub const PCI_MEMORY_WINDOW: std::ops::Range<u64> = 0xE000_0000..0xFEC0_0000;
/// Smallest RAM that holds the boot data and an image at 1 MiB, in bytes.
pub const MEMORY_MIN: u64 = 4 << 20;

/// The RAM ranges of a guest with `bytes` of memory, as (start, length), lowest first.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= DEVICE_GAP_START {
        vec![(0, bytes)]
    } else {
        vec![(0, DEVICE_GAP_START), (DEVICE_GAP_END, bytes - DEVICE_GAP_START)]
    }
}

/// Maps `bytes` of zeroed guest RAM. The host hands out pages as they are touched.
///
/// # Errors
/// [`Kind::Memory`] when the size is no multiple of 4 KiB, below [`MEMORY_MIN`], beyond the host's memory and swap
/// together, or refused by the host.
pub fn allocate(bytes: u64) -> Result<GuestRam> {
    let object = || format!("guest memory of {} MiB", bytes >> 20);
    if bytes < MEMORY_MIN || !bytes.is_multiple_of(4096) {
        let cause = format!("{bytes} bytes is below {MEMORY_MIN} or no multiple of 4096");
        return Err(Error::new(Kind::Memory, "guest memory", cause, "Give --memory at least 4M in whole 4 KiB pages"));
    }
    let host = host_memory();
    if bytes > host {
        let cause = format!("the host has {} MiB of memory and swap", host >> 20);
        return Err(Error::new(Kind::Memory, object(), cause, "Give a smaller --memory, or add memory to the host"));
    }
    let mut wanted = Vec::new();
    for (start, length) in ranges(bytes) {
        let length = usize::try_from(length)
            .map_err(|cause| Error::new(Kind::Memory, object(), cause, "Give a smaller --memory"))?;
        wanted.push((GuestAddress(start), length));
    }
    GuestRam::from_ranges(&wanted)
        .map_err(|cause| Error::new(Kind::Memory, object(), cause, "Give a smaller --memory, or free memory"))
}

/// The host's RAM and swap together, in bytes.
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    (info.totalram as u64).saturating_add(info.totalswap as u64).saturating_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    #[test]
    fn ram_never_covers_the_device_gap() {
        for bytes in [4 << 20, 1 << 30, DEVICE_GAP_START, DEVICE_GAP_START + 4096, 64 << 30] {
            let ranges = ranges(bytes);
            assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), bytes);
            for (start, length) in ranges {
                assert!(start + length <= DEVICE_GAP_START || start >= DEVICE_GAP_END);
            }
        }
    }

    #[test]
    fn sizes_that_cannot_be_had_are_refused_by_name() {
        for bytes in [0, 4095, (4 << 20) + 1, 1 << 60] {
            let error = allocate(bytes).expect_err("refused");
            assert_eq!(error.kind(), Kind::Memory, "{error}");
        }
        assert_eq!(allocate(16 << 20).expect("16 MiB").last_addr().0, (16 << 20) - 1);
    }
}
