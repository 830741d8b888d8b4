//! Owns what the command line says about a machine: sizes, disks, flags, and their checks.
//! Promises that what it hands on is well formed; each refusal names the word that is wrong.
//! Must not know how any of it is built.

use crate::error::{Error, Kind, Result};
use crate::machine::{Boot, MachineConfig};
use crate::serial::SerialSink;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::str::FromStr;

const EXAMPLE: &str = "\
Example:
  vmm run --kernel vmlinux --cmdline 'console=ttyS0 root=/dev/sda' --memory 256M \\
      --disk /mnt/ds1/vm1/disk.vmdk --disk data.img,hba=lsilogic,readonly \\
      --disk nfs://nas/vol/ds2/vm1/disk.vmdk
  vmm run --firmware /usr/share/seabios/bios-256k.bin \\
      --disk /mnt/ds1/vm1/disk.vmdk,hba=lsilogic --disk tools.iso,cdrom,hba=lsilogic

Exit status: 0 the guest ended by itself with status 0, asked for a reset under --exit-on-reset, or was stopped by a \
signal; 1 the machine was refused or failed, or the guest ended with another status; 2 usage.

A guest ends its machine by a byte written to I/O port 0xF4: 0 is success. A reset (i8042 command 0xFE, or bit 2 of the \
reset control register at port 0xCF9) starts it again, or ends it under --exit-on-reset.";

/// The command line of `vmm`.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, about = "Run virtual machines on KVM with SCSI disks", after_help = EXAMPLE)]
pub struct CommandLine {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands of `vmm`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a machine until its guest ends.
    #[command(after_help = EXAMPLE)]
    Run(RunArguments),
}

/// The flags of `vmm run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Kernel image: an uncompressed ELF file with a PVH entry note
    #[arg(long, value_name = "IMAGE", required_unless_present = "firmware")]
    pub kernel: Option<PathBuf>,

    /// Firmware image that boots from the disks, in their order: SeaBIOS, /usr/share/seabios/bios-256k.bin
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["kernel", "cmdline"])]
    pub firmware: Option<PathBuf>,

    /// Command line that the kernel gets
    #[arg(long, value_name = "STR", default_value = "")]
    pub cmdline: String,

    /// Guest memory: bytes, or with one of the suffixes K, M, G
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub memory: Size,

    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    pub cpus: u8,

    /// The disks, in the order of their SCSI targets.
    #[arg(
        long,
        value_name = "PATH[,OPTION...]",
        help = "A disk, as PATH[,hba=pvscsi|lsilogic|buslogic|virtio-scsi][,readonly][,cdrom][,serial=TEXT]; repeat it for more. PATH may be an nfs:// URL. A comma in PATH is written twice"
    )]
    pub disk: Vec<DiskConfig>,

    /// The guest's first serial port: stdio, file:PATH or none
    #[arg(long, value_name = "SINK", default_value = "stdio")]
    pub serial: SerialSink,

    /// End when the guest asks for a reset, instead of starting it again
    #[arg(long)]
    pub exit_on_reset: bool,

    /// Print how the machine ended as one line of JSON at the end of standard output
    #[arg(long)]
    pub json: bool,
}

impl RunArguments {
    /// The machine that the flags describe.
    pub fn machine(&self) -> MachineConfig {
        let boot = match (&self.firmware, &self.kernel) {
            (Some(image), _) => Boot::Firmware { image: image.clone() },
            // Without either, the command line was refused.
            (None, image) => {
                Boot::Kernel { image: image.clone().unwrap_or_default(), command_line: self.cmdline.clone() }
            }
        };
        MachineConfig {
            boot,
            memory: self.memory.0,
            cpus: self.cpus,
            disks: self.disk.clone(),
            serial: self.serial.clone(),
        }
    }
}

/// A size in bytes, written as a number with an optional suffix K, M, G or T (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Size, String> {
        let shift = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
            Some(b'K') => 10,
            Some(b'M') => 20,
            Some(b'G') => 30,
            Some(b'T') => 40,
            _ => 0,
        };
        let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
        let number: u64 =
            digits.parse().map_err(|_| "expected a number, with K, M, G or T behind it if you like".to_string())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| "more than 2^64 bytes".into())
    }
}

/// The SCSI adapters that a disk can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HbaKind {
    /// VMware paravirtual SCSI.
    Pvscsi,
    /// LSI Logic 53C1030.
    LsiLogic,
    /// BusLogic BT-958.
    BusLogic,
    /// virtio-scsi.
    VirtioScsi,
}

impl HbaKind {
    const NAMES: [(&'static str, HbaKind); 4] = [
        ("pvscsi", HbaKind::Pvscsi),
        ("lsilogic", HbaKind::LsiLogic),
        ("buslogic", HbaKind::BusLogic),
        ("virtio-scsi", HbaKind::VirtioScsi),
    ];

    /// How many target numbers an adapter of this kind has, its own included.
    fn targets(self) -> u8 {
        match self {
            HbaKind::Pvscsi | HbaKind::VirtioScsi => 65,
            HbaKind::LsiLogic | HbaKind::BusLogic => 16,
        }
    }

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, kind)| *kind == self).map_or("pvscsi", |(name, _)| name)
    }
}

/// One `--disk`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The disk's file.
    pub path: PathBuf,
    /// The adapter that it hangs on.
    pub hba: HbaKind,
    /// The guest may not write to it.
    pub readonly: bool,
    /// It is the medium of a CD-ROM drive: an ISO image, in blocks of 2048 bytes, which no guest writes to.
    pub cdrom: bool,
    /// The serial number that it shows, if not one derived from its file.
    pub serial: Option<String>,
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DiskConfig, String> {
        let mut words = split_at_commas(text).into_iter();
        let path = words.next().filter(|path| !path.is_empty()).ok_or("the path is empty")?;
        let mut disk =
            DiskConfig { path: path.into(), hba: HbaKind::Pvscsi, readonly: false, cdrom: false, serial: None };
        for word in words {
            match word.split_once('=') {
                None if word == "readonly" => disk.readonly = true,
                None if word == "cdrom" => (disk.cdrom, disk.readonly) = (true, true),
                Some(("hba", name)) => {
                    let known = HbaKind::NAMES.iter().find(|(known, _)| *known == name);
                    let names = HbaKind::NAMES.map(|(name, _)| name).join(", ");
                    disk.hba = known.ok_or_else(|| format!("no adapter {name:?}; there are {names}"))?.1;
                }
                Some(("serial", serial)) => disk.serial = Some(checked_serial(serial)?),
                _ => {
                    return Err(format!(
                        "unknown option {word:?}; there are hba=NAME, readonly, cdrom and serial=TEXT"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// A serial number for VPD page 80h: printable ASCII, as SPC asks for, and short enough for one page.
fn checked_serial(serial: &str) -> std::result::Result<String, String> {
    const SERIAL_MAX: usize = 64;
    let printable = serial.bytes().all(|byte| (0x20..0x7F).contains(&byte));
    if serial.is_empty() || serial.len() > SERIAL_MAX || !printable {
        return Err(format!("the serial number must be 1 to {SERIAL_MAX} printable ASCII characters"));
    }
    Ok(serial.into())
}

/// Splits at single commas; a doubled comma stands for one that belongs to the text.
fn split_at_commas(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, words.last_mut()) {
            (',', Some(word)) if characters.next_if_eq(&',').is_some() => word.push(','),
            (',', _) => words.push(String::new()),
            (other, Some(word)) => word.push(other),
            (_, None) => {}
        }
    }
    words
}

/// A disk with its place on the adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedDisk {
    /// SCSI target number.
    pub target: u8,
    /// Its place among the disks of the machine, from 0 on.
    pub number: usize,
    /// The disk.
    pub disk: DiskConfig,
}

/// An adapter with its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedAdapter {
    /// Which one it is.
    pub hba: HbaKind,
    /// Its disks, in the order of their targets.
    pub disks: Vec<PlacedDisk>,
}

/// The host adapter's own target number, which no disk gets.
const ADAPTER_TARGET: u8 = 7;
/// Most adapters of one machine.
const ADAPTERS: usize = 4;

/// Places `disks` on adapters: each gets the next free target of an adapter of the kind it asks for, and where that is full,
/// or not there yet, a new one. Without a disk there is no adapter.
///
/// # Errors
/// [`Kind::Unsupported`] for more adapters than a machine takes.
pub fn adapters(disks: &[DiskConfig]) -> Result<Vec<PlacedAdapter>> {
    let mut adapters: Vec<PlacedAdapter> = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let object = || format!("disk {}", disk.path.display());
        let targets = disk.hba.targets();
        // Targets are given in order, so the next free one follows from how many are taken.
        let next = |adapter: &PlacedAdapter| {
            let mut targets = (0..targets).filter(|target| *target != ADAPTER_TARGET);
            targets.nth(adapter.disks.len())
        };
        let free = adapters
            .iter_mut()
            .filter(|adapter| adapter.hba == disk.hba)
            .find_map(|adapter| next(adapter).map(|target| (adapter, target)));
        if let Some((adapter, target)) = free {
            adapter.disks.push(PlacedDisk { target, number, disk: disk.clone() });
            continue;
        }
        if adapters.len() == ADAPTERS {
            let cause = format!("it needs one more adapter, and a machine has {ADAPTERS} at most");
            return Err(Error::new(Kind::Unsupported, object(), cause, "Give fewer disks, or fewer kinds of adapters"));
        }
        adapters
            .push(PlacedAdapter { hba: disk.hba, disks: vec![PlacedDisk { target: 0, number, disk: disk.clone() }] });
    }
    Ok(adapters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use proptest::prelude::*;

    fn disk(text: &str) -> std::result::Result<DiskConfig, String> {
        text.parse()
    }

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn a_disk_is_read_with_its_options_in_any_order() {
        let plain = disk("a.img").expect("plain");
        assert_eq!((plain.hba, plain.readonly, plain.serial), (HbaKind::Pvscsi, false, None));
        let full = disk("a,,b.img,serial=S 1,readonly,hba=lsilogic").expect("full");
        assert_eq!(full.path, PathBuf::from("a,b.img"));
        let medium = disk("a.iso,cdrom").expect("a medium");
        assert_eq!((medium.cdrom, medium.readonly, full.cdrom), (true, true, false));
        assert_eq!((full.hba, full.readonly, full.serial.as_deref()), (HbaKind::LsiLogic, true, Some("S 1")));
    }

    #[test]
    fn a_wrong_word_is_named() {
        for (text, named) in [
            ("", "path is empty"),
            (",readonly", "path is empty"),
            ("a,ro", "\"ro\""),
            ("a,hba=ide", "\"ide\""),
            ("a,serial=", "serial number"),
            ("a,serial=\u{e9}", "serial number"),
        ] {
            let error = disk(text).expect_err(text);
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn disks_fill_the_adapters_of_their_kind_and_then_new_ones() {
        let pvscsi = disk("a").expect("parsed");
        let lsi = disk("b,hba=lsilogic").expect("parsed");
        let mut disks = vec![pvscsi.clone(); 65];
        disks.splice(1..1, vec![lsi.clone(); 16]);
        let placed = adapters(&disks).expect("they fit");
        let kinds: Vec<_> = placed.iter().map(|adapter| (adapter.hba, adapter.disks.len())).collect();
        let expected = [HbaKind::Pvscsi, HbaKind::LsiLogic, HbaKind::LsiLogic, HbaKind::Pvscsi];
        assert_eq!(kinds, expected.into_iter().zip([64, 15, 1, 1]).collect::<Vec<_>>());
        let targets = |adapter: &PlacedAdapter| adapter.disks.iter().map(|disk| disk.target).collect::<Vec<_>>();
        assert_eq!(targets(&placed[1]), [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert!(placed.iter().all(|adapter| !targets(adapter).contains(&7)));
        assert_eq!(adapters(&vec![lsi; 61]).expect_err("refused").kind(), Kind::Unsupported);
        assert_eq!(adapters(&vec![pvscsi; 64 * 4 + 1]).expect_err("refused").kind(), Kind::Unsupported);
    }

    #[test]
    fn sizes_take_suffixes_and_refuse_the_rest() {
        for (text, bytes) in [("4096", 4096), ("64k", 64 << 10), ("256M", 256 << 20), ("2G", 2 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
        for text in ["", "M", "-1", "1.5G", "99999999999G", "12Q", "é"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<DiskConfig>();
            let _ = text.parse::<Size>();
        }
    }
}
