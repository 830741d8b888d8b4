//! Owns: vmfs disk.
//! Promises: sizes are checked before the mount is asked; what was done is said in one line.
//! Must not know: how a disk is made.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use lockd::protocol::{AdminRequest, DiskKind};
use nfs_backend::url::{Url, UrlError};
use serde_json::Value;

use super::{AdminError, mounted, nfs, nfs_change};
use crate::size;
use crate::terminal::{say, say_json};

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Make a virtual disk: the descriptor X.vmdk and its data X-flat.vmdk
    #[command(after_help = "Examples:\n  vmfs disk create -s 40G -d thin /mnt/ds1/vm1/disk.vmdk\n  \
        vmfs disk create -s 40G nfs://nas/vol/ds2/vm1/disk.vmdk")]
    Create(Create),
    /// What a virtual disk is: size, kind, space
    #[command(after_help = "Example:\n  vmfs disk info --json /mnt/ds1/vm1/disk.vmdk")]
    Info(Info),
    /// Make a virtual disk larger
    #[command(after_help = "Examples:\n  vmfs disk extend -s 80G /mnt/ds1/vm1/disk.vmdk\n  \
        vmfs disk extend -s 80G nfs://nas/vol/ds2/vm1/disk.vmdk")]
    Extend(Extend),
    /// Copy a virtual disk within its volume, or from or to an NFS server
    #[command(after_help = "Examples:\n  vmfs disk clone -d thin /mnt/ds1/vm1/disk.vmdk /mnt/ds1/vm2/disk.vmdk\n  \
        vmfs disk clone /mnt/ds1/vm1/disk.vmdk nfs://nas/vol/ds2/vm1/disk.vmdk")]
    Clone(CloneDisk),
    /// Make an eagerzeroedthick disk of a thin or zeroedthick one
    #[command(after_help = "Example:\n  vmfs disk inflate /mnt/ds1/vm1/disk.vmdk")]
    Inflate(Inflate),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// Space at the first write
    #[value(name = "thin")]
    Thin,
    /// Space at creation, zeroed at the first write
    #[value(name = "zeroedthick")]
    ZeroedThick,
    /// Space at creation, zeroed at creation
    #[value(name = "eagerzeroedthick")]
    EagerZeroedThick,
}

impl Kind {
    fn wire(self) -> DiskKind {
        match self {
            Kind::Thin => DiskKind::Thin,
            Kind::ZeroedThick => DiskKind::ZeroedThick,
            Kind::EagerZeroedThick => DiskKind::EagerZeroedThick,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Size: K, M, G and T are powers of 1024
    #[arg(short, long, value_parser = parse_disk_size)]
    size: u64,
    /// Kind [default: zeroedthick; on NFS thin]
    #[arg(short = 'd', long = "disk-format", value_enum)]
    kind: Option<Kind>,
    /// Descriptor, on a mounted volume, or an nfs:// URL
    #[arg(value_name = "PATH.vmdk", value_parser = parse_descriptor)]
    path: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct Info {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Descriptor, on a mounted volume, or an nfs:// URL
    #[arg(value_name = "PATH.vmdk")]
    path: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct Extend {
    /// New size of the whole disk: K, M, G and T are powers of 1024
    #[arg(short, long, value_parser = parse_disk_size)]
    size: u64,
    /// Descriptor, on a mounted volume, or an nfs:// URL
    #[arg(value_name = "PATH.vmdk")]
    path: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CloneDisk {
    /// Kind of the copy [default: as the source; from or to NFS thin]
    #[arg(short = 'd', long = "disk-format", value_enum)]
    kind: Option<Kind>,
    /// Descriptor of the source, or an nfs:// URL
    #[arg(value_name = "SOURCE.vmdk")]
    source: PathBuf,
    /// Descriptor of the copy, on the same mounted volume, or an nfs:// URL. One of the two is on NFS: on any mounted volume
    #[arg(value_name = "COPY.vmdk", value_parser = parse_descriptor)]
    destination: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct Inflate {
    /// Descriptor, on a mounted volume, or an nfs:// URL
    #[arg(value_name = "PATH.vmdk")]
    path: PathBuf,
}

fn parse_disk_size(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    match bytes {
        0 => Err("a disk has at least one sector of 512 bytes".to_owned()),
        _ if bytes % 512 != 0 => Err(format!("{text} is no multiple of 512 bytes, the size of a sector")),
        _ => Ok(bytes),
    }
}

pub(super) fn parse_descriptor(text: &str) -> Result<PathBuf, String> {
    if Url::is_url(text) {
        let url: Url = text.parse().map_err(|error: UrlError| error.to_string())?;
        return parse_descriptor(&url.name).map(|_| PathBuf::from(text));
    }
    let path = PathBuf::from(text);
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    match path.extension() {
        Some(extension)
            if extension == "vmdk" && ["-flat", "-rdm", "-rdmp"].iter().any(|ending| stem.ends_with(ending)) =>
        {
            Err("X-flat.vmdk (or -rdm, -rdmp) is a disk's data; name the descriptor X.vmdk, both are made".to_owned())
        }
        Some(extension) if extension == "vmdk" => Ok(path),
        _ => Err("the name of a disk ends in .vmdk".to_owned()),
    }
}

pub(super) fn run(command: DiskCommand) -> Result<(), AdminError> {
    match command {
        DiskCommand::Create(create) => {
            match nfs::url_of(&create.path)? {
                Some(url) => nfs::create(&url, create.size, create.kind.map(Kind::wire))?,
                None => {
                    let file = mounted::name(&create.path)?;
                    let kind = create.kind.unwrap_or(Kind::ZeroedThick).wire();
                    let what = AdminRequest::DiskCreate { file: file.name, bytes: create.size, kind };
                    mounted::ask(&file.directory, &create.path, what, "creating")?;
                }
            }
            say(format!("{}: created, {}", create.path.display(), size::show(create.size)));
            Ok(())
        }
        DiskCommand::Info(info) => {
            let value = match nfs::url_of(&info.path)? {
                Some(url) => nfs::info(&url)?,
                None => ask_of(&info.path, |file| AdminRequest::DiskInfo { file }, "looking")?,
            };
            if info.json {
                say_json(&value)
            } else {
                say_facts(&value)
            }
            Ok(())
        }
        DiskCommand::Extend(extend) => {
            let bytes = extend.size;
            match nfs::url_of(&extend.path)? {
                Some(url) => nfs_change::extend(&url, bytes)?,
                None => drop(ask_of(&extend.path, |file| AdminRequest::DiskExtend { file, bytes }, "extending")?),
            }
            say(format!("{}: extended to {}", extend.path.display(), size::show(bytes)));
            Ok(())
        }
        DiskCommand::Inflate(inflate) => {
            match nfs::url_of(&inflate.path)? {
                Some(url) => nfs_change::inflate(&url)?,
                None => drop(ask_of(&inflate.path, |file| AdminRequest::DiskInflate { file }, "inflating")?),
            }
            say(format!("{}: inflated", inflate.path.display()));
            Ok(())
        }
        DiskCommand::Clone(clone) => clone_disk(&clone),
    }
}

fn ask_of(
    path: &Path,
    what: impl FnOnce(lockd::protocol::NameIn) -> AdminRequest,
    doing: &'static str,
) -> Result<Value, AdminError> {
    let file = mounted::name(path)?;
    mounted::ask(&file.directory, path, what(file.name), doing)
}

fn clone_disk(clone: &CloneDisk) -> Result<(), AdminError> {
    if nfs::url_of(&clone.source)?.is_some() || nfs::url_of(&clone.destination)?.is_some() {
        nfs::clone(&clone.source, &clone.destination, clone.kind.map(Kind::wire))?;
        say(format!("{}: copied to {}", clone.source.display(), clone.destination.display()));
        return Ok(());
    }
    let source = mounted::name(&clone.source)?;
    let destination = mounted::name(&clone.destination)?;
    if source.directory.volume() != destination.directory.volume() {
        return Err(AdminError(format!(
            "{} and {} are on different mounts; a clone stays within one: use qemu-img convert",
            clone.source.display(),
            clone.destination.display()
        )));
    }
    let kind = clone.kind.map(Kind::wire);
    let what = AdminRequest::DiskClone { source: source.name, destination: destination.name, kind };
    mounted::ask(&destination.directory, &clone.source, what, "copying")?;
    say(format!("{}: copied to {}", clone.source.display(), clone.destination.display()));
    Ok(())
}

/// Facts of an answer, one a line; sizes as people read them.
pub(super) fn say_facts(value: &Value) {
    let Some(facts) = value.as_object() else { return say(value) };
    let width = facts.keys().map(String::len).max().unwrap_or(0);
    for (key, fact) in facts {
        let text = match fact {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            Value::Number(number) if key.ends_with("bytes") => {
                number.as_u64().map_or(number.to_string(), |bytes| format!("{} ({bytes} bytes)", size::show(bytes)))
            }
            other => other.to_string(),
        };
        say(format!("{:width$}  {text}", key.replace('_', " ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_checked_before_the_mount_is_asked() {
        assert_eq!(parse_disk_size("1G"), Ok(1 << 30));
        assert!(parse_disk_size("0").is_err() && parse_disk_size("1000").is_err() && parse_disk_size("x").is_err());
        assert!(parse_descriptor("/m/a.vmdk").is_ok() && parse_descriptor("/m/a").is_err());
        assert!(parse_descriptor("nfs://h/e/a.vmdk?mountport=5").is_ok() && parse_descriptor("nfs://h/e/a").is_err());
        assert!(parse_descriptor("nfs://h/e/a-flat.vmdk").is_err() && parse_descriptor("nfs://h").is_err());
        assert!(parse_descriptor("/m/a-flat.vmdk").unwrap_err().contains("descriptor"));
    }
}
