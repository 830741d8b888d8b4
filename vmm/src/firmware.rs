//! Owns the loading of a firmware image (SeaBIOS) to where a PC has it: below 4 GiB, and its end once more below 1 MiB.
//! Promises that a file which cannot be one is refused by name.
//! Must not know KVM, vCPUs, or what the firmware does.

use crate::error::{Error, Kind, Result};
use crate::memory::{self, DEVICE_GAP_END, GuestRam};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress};

/// Sizes of images, in bytes: at least the BIOS area of a PC, at most what lies between the local APIC and 4 GiB here.
const SIZES: std::ops::RangeInclusive<usize> = 64 << 10..=256 << 10;
/// End of the BIOS area, where the copy ends.
const LOW_END: u64 = 0x10_0000;
/// The most of an image that is copied there.
const LOW_SIZE: usize = 128 << 10;

/// Loads the image at `path`: its last 128 KiB into `ram`, and all of it into memory of its own, which is returned: read-only
/// memory that ends at 4 GiB.
///
/// # Errors
/// [`Kind::Image`] when the file cannot be read or has a size that no such image has.
pub fn load(ram: &GuestRam, path: &Path) -> Result<GuestRam> {
    let refuse = |cause: String, next: &'static str| {
        Error::new(Kind::Image, format!("firmware image {}", path.display()), cause, next)
    };
    let unreachable = |cause: std::io::Error| refuse(cause.to_string(), "Check the path given to --firmware");
    // Looked at before it is opened: to open a pipe would wait for its other end.
    if !path.metadata().map_err(unreachable)?.is_file() {
        return Err(refuse("it is no regular file".into(), "Give --firmware an image such as SeaBIOS's bios-256k.bin"));
    }
    let mut image = Vec::new();
    let file = File::open(path).map_err(unreachable)?;
    file.take(*SIZES.end() as u64 + 1).read_to_end(&mut image).map_err(unreachable)?;
    if !SIZES.contains(&image.len()) || !image.len().is_multiple_of(4096) {
        let cause = "its size is not 64 to 256 KiB in pages of 4 KiB".to_string();
        return Err(refuse(cause, "Give --firmware an image such as SeaBIOS's bios-256k.bin"));
    }
    let no_room = |cause: &dyn std::fmt::Display| refuse(cause.to_string(), "Give a larger --memory");
    let low = &image[image.len().saturating_sub(LOW_SIZE)..];
    ram.write_slice(low, GuestAddress(LOW_END - low.len() as u64)).map_err(|cause| no_room(&cause))?;
    let start = GuestAddress(DEVICE_GAP_END - image.len() as u64);
    let rom = GuestRam::from_ranges(&[(start, image.len())]).map_err(|cause| no_room(&cause))?;
    rom.write_slice(&image, start).map_err(|cause| no_room(&cause))?;
    Ok(rom)
}

/// The memory map that firmware asks for ("etc/e820"): for each range of RAM its start, its length and kind 1.
pub fn memory_map(ram_bytes: u64) -> Vec<u8> {
    const RAM: u32 = 1;
    let entry =
        |(start, length): (u64, u64)| [&start.to_le_bytes()[..], &length.to_le_bytes(), &RAM.to_le_bytes()].concat();
    memory::ranges(ram_bytes).into_iter().flat_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    #[test]
    fn an_image_ends_at_four_gigabytes_and_its_end_at_one_megabyte() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let image: Vec<u8> = (0..256 << 10).map(|index: u32| (index >> 9) as u8).collect();
        std::fs::write(file.path(), &image).expect("written");
        let ram = memory::allocate(16 << 20).expect("RAM");
        let rom = load(&ram, file.path()).expect("loaded");
        assert_eq!(rom.last_addr().0, 0xFFFF_FFFF);
        let mut bytes = vec![0; image.len()];
        rom.read_slice(&mut bytes, GuestAddress(0xFFFC_0000)).expect("ROM");
        assert!(bytes == image);
        let mut low = vec![0; 128 << 10];
        ram.read_slice(&mut low, GuestAddress(0xE_0000)).expect("RAM");
        assert!(low == image[128 << 10..]);
    }

    #[test]
    fn files_that_are_no_image_are_refused_by_name() {
        let ram = memory::allocate(16 << 20).expect("RAM");
        let file = tempfile::NamedTempFile::new().expect("file");
        for size in [0, 512, (64 << 10) - 4096, (64 << 10) + 1, (256 << 10) + 4096, 1 << 40] {
            file.as_file().set_len(size).expect("sized");
            let error = load(&ram, file.path()).expect_err("refused");
            assert_eq!(error.kind(), Kind::Image);
            assert!(error.to_string().contains(file.path().to_str().expect("UTF-8")), "{error}");
        }
        assert_eq!(load(&ram, Path::new("/")).expect_err("a folder").kind(), Kind::Image);
    }

    #[test]
    fn the_memory_map_leaves_the_device_gap_out() {
        let map = memory_map((3 << 30) + 4096);
        assert_eq!(map.len(), 40);
        assert_eq!(map[..20], *b"\0\0\0\0\0\0\0\0\0\0\0\xC0\0\0\0\0\x01\0\0\0");
        assert_eq!(map[20..], *b"\0\0\0\0\x01\0\0\0\0\x10\0\0\0\0\0\0\x01\0\0\0");
    }
}
