//! Owns the loading of a kernel image by the PVH boot protocol, and the boot data that the guest then finds.
//! Promises that every header field is checked before it is used: an image is foreign bytes.
//! Must not know KVM or vCPUs: it hands out where to start.

use crate::error::{Error, Kind, Result};
use crate::memory::{self, GuestRam};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, little_endian::U16, little_endian::U32, little_endian::U64,
};

/// Where the start information lies; the memory map and the command line lie behind it, all below the image.
const START_INFO: u32 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line and its closing NUL, in bytes.
pub const COMMAND_LINE_MAX: usize = 0x1_0000;
/// End of the low RAM that the memory map lists: what a PC has below its extended BIOS data area.
const LOW_MEMORY_END: u64 = 0x9_F000;
/// Where extended memory starts, and the lowest address of an image.
const HIGH_MEMORY_START: u64 = 0x10_0000;

/// `hvm_start_info` version 1 (Xen, include/public/arch-x86/hvm/start_info.h).
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    module_count: U32,
    module_list: U64,
    command_line: U64,
    acpi_root: U64,
    memory_map: U64,
    memory_map_entries: U32,
    reserved: U32,
}

/// An entry of the memory map (same source).
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MemoryMapEntry {
    address: U64,
    size: U64,
    kind: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<StartInfo>() == 56 && size_of::<MemoryMapEntry>() == 24);

const START_INFO_MAGIC: u32 = 0x336E_C578;
const MEMORY_KIND_RAM: u32 = 1;

/// Where the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootEntry {
    /// Physical address of the image's 32-bit entry.
    pub entry: u32,
    /// Physical address of the start information, for EBX.
    pub start_info: u32,
}

/// Loads the image at `path` into `ram` with `command_line`.
///
/// # Errors
/// [`Kind::Image`] when the file cannot be read, is no 64-bit ELF image with a PVH note, or does not fit;
/// [`Kind::Usage`] when the command line is too long or holds a NUL.
pub fn load(ram: &GuestRam, path: &Path, command_line: &str) -> Result<BootEntry> {
    let object = || format!("kernel image {}", path.display());
    let refuse = |cause: String, next: &'static str| Error::new(Kind::Image, object(), cause, next);
    let unreachable = |cause: std::io::Error| refuse(cause.to_string(), "Check the path given to --kernel");
    // Looked at before it is opened: to open a pipe would wait for its other end.
    if !path.metadata().map_err(unreachable)?.is_file() {
        return Err(refuse("it is no regular file".into(), "Give --kernel an uncompressed kernel (vmlinux)"));
    }
    let mut file = File::open(path).map_err(unreachable)?;
    check_headers(&mut file, ram).map_err(|Refusal { cause, next }| refuse(cause, next))?;
    let loaded: KernelLoaderResult = Elf::load(ram, None, &mut file, None)
        .map_err(|cause| refuse(cause.to_string(), "Check that the image is complete"))?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => u32::try_from(entry.raw_value()).ok(),
        _ => None,
    };
    let entry = entry.ok_or_else(|| {
        refuse(
            "it has no PVH entry note".into(),
            "Build the kernel with CONFIG_PVH=y and give the uncompressed vmlinux",
        )
    })?;
    if !ram.address_in_range(GuestAddress(entry.into())) {
        return Err(refuse(format!("its entry {entry:#x} lies outside of guest memory"), "Give a larger --memory"));
    }
    write_boot_data(ram, command_line)?;
    Ok(BootEntry { entry, start_info: START_INFO })
}

/// Why an image is refused, and what to do about it.
struct Refusal {
    cause: String,
    next: &'static str,
}

/// The fields of an ELF64 header that are checked (System V ABI, chapter 4).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ElfHeader {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    header_size: U16,
    program_header_size: U16,
    program_header_count: U16,
    section_header_size: U16,
    section_header_count: U16,
    section_names: U16,
}

/// An ELF64 program header (same source, chapter 5).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    physical_address: U64,
    file_size: U64,
    memory_size: U64,
    alignment: U64,
}

const _: () = assert!(size_of::<ElfHeader>() == 64 && size_of::<ProgramHeader>() == 56);

/// Checks that the program headers are few, lie in the file, and that what they load lies in `ram`. The loader crate
/// trusts offsets and sizes; after this it may.
fn check_headers(file: &mut File, ram: &GuestRam) -> std::result::Result<(), Refusal> {
    const INCOMPLETE: &str = "Check that the file is a complete, uncompressed kernel image";
    const PROGRAM_HEADERS_MAX: u16 = 64;
    const NOTES_MAX: u64 = 64 << 10;
    let unreadable = |cause: std::io::Error| match cause.kind() {
        ErrorKind::UnexpectedEof => Refusal { cause: "it ends before its headers do".into(), next: INCOMPLETE },
        _ => Refusal { cause: cause.to_string(), next: INCOMPLETE },
    };
    let size = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    file.rewind().map_err(unreadable)?;
    let mut header = ElfHeader::new_zeroed();
    file.read_exact(header.as_mut_bytes()).map_err(unreadable)?;
    if header.ident[..4] != *b"\x7fELF" {
        let (cause, next) = if header.ident[..2] == *b"MZ" {
            ("it is a compressed kernel (bzImage)", "Give the uncompressed vmlinux of the same build")
        } else {
            ("it is no ELF image", "Give an uncompressed kernel (vmlinux) with a PVH entry note")
        };
        return Err(Refusal { cause: cause.into(), next });
    }
    let count = header.program_header_count.get();
    if header.ident[4] != 2 || usize::from(header.program_header_size) != size_of::<ProgramHeader>() {
        return Err(Refusal { cause: "it is no 64-bit ELF image".into(), next: INCOMPLETE });
    }
    if count > PROGRAM_HEADERS_MAX {
        let cause = format!("it has {count} program headers, more than {PROGRAM_HEADERS_MAX}");
        return Err(Refusal { cause, next: INCOMPLETE });
    }
    file.seek(SeekFrom::Start(header.program_headers.get())).map_err(unreadable)?;
    for index in 0..count {
        const LOAD: u32 = 1;
        const NOTE: u32 = 4;
        let mut segment = ProgramHeader::new_zeroed();
        file.read_exact(segment.as_mut_bytes()).map_err(unreadable)?;
        let bytes = segment.file_size.get();
        let in_file = segment.offset.get().checked_add(bytes).is_some_and(|end| end <= size);
        if matches!(segment.kind.get(), LOAD | NOTE) && !in_file {
            return Err(Refusal { cause: format!("segment {index} lies beyond its end"), next: INCOMPLETE });
        }
        if segment.kind == NOTE && bytes > NOTES_MAX {
            let cause = format!("its notes take {bytes} bytes, more than {NOTES_MAX}");
            return Err(Refusal { cause, next: INCOMPLETE });
        }
        if segment.kind == LOAD && segment.memory_size.get() > 0 {
            check_load_range(index, &segment, ram)?;
        }
    }
    Ok(())
}

fn check_load_range(index: u16, segment: &ProgramHeader, ram: &GuestRam) -> std::result::Result<(), Refusal> {
    let start = segment.physical_address.get();
    let length = segment.memory_size.get();
    let fits = segment.file_size <= segment.memory_size
        && start >= HIGH_MEMORY_START
        && usize::try_from(length).is_ok_and(|length| ram.check_range(GuestAddress(start), length));
    if fits {
        return Ok(());
    }
    let cause = format!("segment {index} wants {length:#x} bytes at {start:#x}, outside of guest memory above 1 MiB");
    let next =
        if start < HIGH_MEMORY_START { "Check that it is a kernel and no program" } else { "Give a larger --memory" };
    Err(Refusal { cause, next })
}

fn write_boot_data(ram: &GuestRam, command_line: &str) -> Result<()> {
    let usage = |cause: String| Error::new(Kind::Usage, "kernel command line", cause, "Give a shorter --cmdline");
    if command_line.len() >= COMMAND_LINE_MAX {
        return Err(usage(format!("{} bytes, more than {}", command_line.len(), COMMAND_LINE_MAX - 1)));
    }
    if command_line.contains('\0') {
        return Err(usage("it holds a NUL byte".into()));
    }
    let map = memory_map(ram);
    let start_info = StartInfo {
        magic: START_INFO_MAGIC.into(),
        version: 1.into(),
        flags: 0.into(),
        module_count: 0.into(),
        module_list: 0.into(),
        command_line: COMMAND_LINE.into(),
        acpi_root: 0.into(),
        memory_map: MEMORY_MAP.into(),
        memory_map_entries: (map.len() as u32).into(),
        reserved: 0.into(),
    };
    let command_line = [command_line.as_bytes(), b"\0"].concat();
    let parts: [(&[u8], u64); 3] =
        [(start_info.as_bytes(), START_INFO.into()), (map.as_bytes(), MEMORY_MAP), (&command_line, COMMAND_LINE)];
    for (bytes, address) in parts {
        ram.write_slice(bytes, GuestAddress(address))
            .map_err(|cause| Error::new(Kind::Memory, "boot data", cause, "Give a larger --memory"))?;
    }
    Ok(())
}

/// The memory map: RAM but for the legacy hole from [`LOW_MEMORY_END`] to 1 MiB.
fn memory_map(ram: &GuestRam) -> Vec<MemoryMapEntry> {
    let entry = |start: u64, end: u64| MemoryMapEntry {
        address: start.into(),
        size: (end - start).into(),
        kind: MEMORY_KIND_RAM.into(),
        reserved: 0.into(),
    };
    let bytes = ram.iter().map(vm_memory::GuestMemoryRegion::len).sum();
    let mut map = vec![entry(0, LOW_MEMORY_END)];
    for (start, length) in memory::ranges(bytes) {
        map.push(entry(start.max(HIGH_MEMORY_START), start + length));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn load_bytes(image: &[u8], command_line: &str) -> Result<BootEntry> {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        file.write_all(image).expect("written");
        let ram = memory::allocate(64 << 20).expect("RAM");
        load(&ram, file.path(), command_line)
    }

    #[test]
    fn the_guest_finds_its_command_line_and_memory_map_where_the_protocol_says() {
        let ram = memory::allocate(64 << 20).expect("RAM");
        write_boot_data(&ram, "job=info").expect("fits");
        let word = |address| ram.read_obj::<u64>(GuestAddress(address)).expect("RAM");
        assert_eq!(word(0x6000) as u32, 0x336E_C578);
        let mut text = [0; 9];
        ram.read_slice(&mut text, GuestAddress(word(0x6018))).expect("RAM");
        assert_eq!(&text, b"job=info\0");
        let map = word(0x6028);
        assert_eq!(word(0x6030) as u32, 2);
        assert_eq!((word(map), word(map + 8), word(map + 16)), (0, 0x9F000, 1));
        assert_eq!((word(map + 24), word(map + 32), word(map + 40)), (0x10_0000, (64 << 20) - 0x10_0000, 1));
    }

    #[test]
    fn images_that_cannot_boot_are_refused_with_the_reason() {
        let mut compressed = vec![0; 4096];
        compressed[..2].copy_from_slice(b"MZ");
        let mut no_note = test_guest::IMAGE.to_vec();
        let header = no_note.windows(4).position(|bytes| bytes == b"Xen\0").expect("note");
        no_note[header] = b'x';
        for (image, expected) in [
            (&b""[..], "complete"),
            (b"not an ELF image, but long enough to hold a header of sixty-four bytes", "no ELF"),
            (&compressed, "bzImage"),
            (&no_note, "PVH"),
            (&test_guest::IMAGE[..test_guest::IMAGE.len() / 2], "beyond its end"),
        ] {
            let error = load_bytes(image, "").expect_err("refused");
            assert_eq!(error.kind(), Kind::Image);
            assert!(error.to_string().contains(expected), "{error}");
        }
        assert!(load(&memory::allocate(64 << 20).expect("RAM"), Path::new("/nonexistent"), "").is_err());
    }

    #[test]
    fn command_lines_that_do_not_fit_are_refused() {
        for text in ["x".repeat(COMMAND_LINE_MAX), "a\0b".into()] {
            assert_eq!(load_bytes(test_guest::IMAGE, &text).expect_err("refused").kind(), Kind::Usage);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn damaged_images_are_loaded_or_refused_but_never_panic(
            damage in prop::collection::vec((prop_oneof![0usize..0xB0, 0x1000usize..0x1014], any::<u8>()), 1..6),
        ) {
            // The file header with both program headers, and the note.
            let mut image = test_guest::IMAGE.to_vec();
            for (offset, byte) in damage {
                image[offset] = byte;
            }
            let _ = load_bytes(&image, "");
        }
    }
}
