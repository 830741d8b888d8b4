//! Promises of `vmm run --firmware`: SeaBIOS (of Debian's package `seabios`) boots from the disks of a machine, in their order.

use super::{Finished, MIB, Setup};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// A boot sector that reads the block behind it by INT 13h. If the last byte of the block's first sector is not zero, it prints the block
/// by INT 10h and ends the machine; else it makes it one, writes the sector back, and resets the machine.
const BOOT_SECTOR: [u8; 91] = [
    0x31, 0xC0, // xor ax, ax
    0x8E, 0xD8, // mov ds, ax
    0x8E, 0xC0, // mov es, ax
    0x8E, 0xD0, // mov ss, ax
    0xBC, 0x00, 0x7C, // mov sp, 7C00h
    0xBE, 0x4B, 0x7C, // mov si, packet
    0xB4, 0x42, // mov ah, 42h: extended read from the drive in DL
    0xCD, 0x13, // int 13h
    0x72, 0x30, // jc failed
    0x80, 0x3E, 0xFF, 0x7F, 0x00, // cmp byte [7FFFh], 0
    0x75, 0x14, // jne print
    0xFE, 0x06, 0xFF, 0x7F, // inc byte [7FFFh]
    0xB8, 0x00, 0x43, // mov ax, 4300h: extended write
    0xCD, 0x13, // int 13h
    0x72, 0x1E, // jc failed
    0xBA, 0xF9, 0x0C, // mov dx, CF9h
    0xB0, 0x06, // mov al, 6
    0xEE, // out dx, al
    0xF4, // hlt
    0xEB, 0xFD, // jmp to it
    0xBE, 0x00, 0x7E, // print: mov si, 7E00h
    0xFC, // cld
    0xAC, // next: lodsb
    0x84, 0xC0, // test al, al
    0x74, 0x08, // jz done
    0xB4, 0x0E, // mov ah, 0Eh: print AL
    0x31, 0xDB, // xor bx, bx
    0xCD, 0x10, // int 10h
    0xEB, 0xF3, // jmp next
    0xB0, 0x00, // done: mov al, 0
    0xEB, 0x02, // jmp exit
    0xB0, 0x01, // failed: mov al, 1
    0xE6, 0xF4, // exit: out F4h, al
    0xF4, // hlt
    0xEB, 0xFD, // jmp to it
    // packet: its size, one block, to 0000:7E00, from block 1
    0x10, 0x00, 0x01, 0x00, 0x00, 0x7E, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// Where the last byte of the sector lies that the boot sector looks at, in its block.
const FLAG: usize = 511;

/// A disk that prints `text` when it is booted. (SeaBIOS sends its last few characters to the serial port only with the next ones.)
fn bootable(setup: &Setup, name: &str, text: &str) -> PathBuf {
    let mut disk = vec![0; 4 * MIB as usize];
    disk[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    disk[512..512 + text.len()].copy_from_slice(text.as_bytes());
    disk[512 + FLAG] = 1;
    fs::write(setup.path(name), disk).expect("disk written");
    setup.path(name)
}

/// A CD-ROM image that prints `text` when it is booted: a boot record, its catalogue (El Torito 1.0, sections 2.0 to 2.2), the sector
/// and the block that it reads.
fn bootable_cd(setup: &Setup, name: &str, text: &str) -> PathBuf {
    const BLOCK: usize = 2048;
    const CATALOGUE: u8 = 19;
    const IMAGE: u8 = 20;
    let mut medium = vec![0; 24 * BLOCK];
    let mut put = |block: usize, offset: usize, bytes: &[u8]| {
        medium[block * BLOCK + offset..][..bytes.len()].copy_from_slice(bytes);
    };
    put(1, 0, text.as_bytes());
    put(1, FLAG, &[1]);
    put(17, 0, b"\0CD001\x01EL TORITO SPECIFICATION");
    put(17, 0x47, &[CATALOGUE]);
    put(CATALOGUE.into(), 0, &[1, 0]);
    put(CATALOGUE.into(), 0x1E, &[0x55, 0xAA]);
    // Bootable without emulation: one sector, to the usual segment.
    put(CATALOGUE.into(), 0x20, &[0x88, 0, 0, 0, 0, 0, 1, 0, IMAGE]);
    put(IMAGE.into(), 0, &BOOT_SECTOR);
    fs::write(setup.path(name), medium).expect("medium written");
    setup.path(name)
}

fn run(arguments: &[&str]) -> Finished {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["run", "--memory", "32M"]).args(arguments).stdin(Stdio::null());
    Finished::of(command.output().expect("vmm starts"))
}

#[test]
fn seabios_boots_the_first_disk_writes_to_it_and_boots_it_again_after_a_reset() {
    let setup = Setup::new(MIB);
    for (first, second) in [("virtio-scsi", "lsilogic"), ("lsilogic", "pvscsi"), ("pvscsi", "virtio-scsi")] {
        let disk =
            |hba: &str| bootable(&setup, &format!("{hba}.img"), &format!("\r\nbooted from {hba} by firmware\r\n"));
        let paths = [disk(first), disk(second)];
        let mut content = fs::read(&paths[0]).expect("disk");
        content[512 + FLAG] = 0;
        fs::write(&paths[0], &content).expect("disk written");
        let [one, two] =
            [format!("{},hba={first}", paths[0].display()), format!("{},hba={second}", paths[1].display())];
        let run = run(&["--firmware", SEABIOS, "--json", "--disk", &one, "--disk", &two]);
        assert_eq!(run.status, Some(0), "{run:?}");
        assert!(run.output.contains("SeaBIOS (version ") && run.output.contains("\"resets\":1,"), "{run:?}");
        assert!(run.output.contains(&format!("booted from {first}")), "{run:?}");
        assert!(!run.output.contains(&format!("booted from {second}")), "{run:?}");
        content[512 + FLAG] = 1;
        assert!(fs::read(&paths[0]).expect("disk") == content, "{first}: the one byte, and no other");
    }
}

#[test]
fn seabios_boots_a_cd_rom_on_each_adapter_that_it_has_a_driver_for() {
    let setup = Setup::new(MIB);
    let disk = bootable(&setup, "disk.img", "\r\nbooted from the disk\r\n");
    for hba in ["virtio-scsi", "lsilogic", "pvscsi"] {
        let medium = bootable_cd(&setup, "medium.iso", &format!("\r\nbooted a CD on {hba} by firmware\r\n"));
        let medium = format!("{},cdrom,hba={hba}", medium.display());
        let disk = format!("{},hba={hba}", disk.display());
        let run = run(&["--firmware", SEABIOS, "--cpus", "2", "--disk", &medium, "--disk", &disk]);
        assert_eq!(run.status, Some(0), "{run:?}");
        assert!(run.output.contains(&format!("booted a CD on {hba}")), "{run:?}");
        assert!(!run.output.contains("booted from the disk"), "{run:?}");
    }
}

#[test]
fn firmware_that_cannot_be_had_is_refused() {
    let setup = Setup::new(MIB);
    let path = |name: &str| setup.path(name).to_str().expect("UTF-8").to_string();
    for (arguments, status, named) in [
        (vec!["--firmware".into(), path("missing.bin")], 1, "missing.bin"),
        (vec!["--firmware".into(), path("guest.elf")], 1, "64 to 256 KiB"),
        (vec!["--firmware".into(), path("disk.img"), "--kernel".into(), path("guest.elf")], 2, "--kernel"),
        (vec!["--firmware".into(), path("disk.img"), "--cmdline".into(), "quiet".into()], 2, "--cmdline"),
        (vec![], 2, "--kernel"),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let run = run(&arguments);
        assert_eq!(run.status, Some(status), "{arguments:?}: {run:?}");
        assert!(run.errors.contains(named) && !run.errors.contains("panicked"), "{arguments:?}: {run:?}");
    }
}
