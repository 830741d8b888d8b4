//! Owns: the command line of mount.vmfs, its own and that of mount(8).
//! Promises: what was typed becomes a [`Mount`] or an error that names the wrong word; nothing is looked up on the system.
//! Must not know: volumes, FUSE, whether the paths exist.

use std::path::PathBuf;

use clap::Parser;
use vmfs_core::units::Uuid;

/// Most worker threads.
const MAX_THREADS: u16 = 256;

const AFTER_HELP: &str = "\
Examples:
  mount.vmfs /dev/sdb,/dev/sdc /mnt/ds1
  mount.vmfs lun0.img,lun1.img /mnt/ds1 --foreground --host-name esx-a
  mount.vmfs /dev/sdb /mnt/ds1 -o watch=/dev/disk/by-id/wwn-*
  mount.vmfs lun0.img /mnt/ds1 -o watch=/luns,format-blank,grow
  mount -t vmfs -o ro /dev/sdb /mnt/ds1
  mount.vmfs -o degraded /dev/sdc /mnt/ds1       a LUN is lost: what lies wholly on the others
  fstab: /dev/sdb,/dev/sdc  /mnt/ds1  vmfs  _netdev,allow_other  0  0

Options of -o: ro, rw, degraded (also when LUNs are missing), allow_other, default_permissions, nonempty, host_id=UUID,
host_name=NAME, threads=N, log=FILE, foreground,
lockd=auto|SOCKET|no (who keeps this host's slots: vmfs-lockd when it runs, a certain one, or the mount itself),
watch=PATH (a LUN, a directory or a pattern with * and ? in its last part; where to look for LUNs that other hosts add; repeatable),
format-blank (format and add blank LUNs that appear where watch says), grow (grow with LUNs that become larger),
rdm_folder=DIR (where image files of raw device mappings are looked for; may be repeated),
and the generic ones of mount(8) (nosuid, nodev, noexec, noatime, _netdev, nofail, defaults, x-...).

A path with a comma in it is written with \\, in place of the comma.
Unmount with umount(8) or by SIGTERM. Exit status: 0 mounted (or, in the foreground, unmounted cleanly), 1 refused or failed, 2 usage.";

/// Mounts a VMFS volume.
#[derive(Parser, Debug)]
#[command(name = "mount.vmfs", version, after_help = AFTER_HELP)]
struct Arguments {
    /// LUNs of the volume, separated by commas, in any order: image files or block devices
    #[arg(value_name = "LUN[,LUN...]")]
    luns: String,
    /// Where to mount: an empty directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Mount options, as for mount(8); may be given several times
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// UUID of this host [default: derived from /etc/machine-id]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    host_id: Option<Uuid>,
    /// Name of this host, for people [default: the machine's name]
    #[arg(long, value_name = "NAME")]
    host_name: Option<String>,
    /// Worker threads that move data
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_THREADS)))]
    threads: Option<u16>,
    /// Append the log to this file [default: standard error in the foreground, else the system log]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Log more
    #[arg(short, long)]
    verbose: bool,
    /// Ignored, as mount(8) asks: be tolerant of options (they are looked at all the same)
    #[arg(short = 's', hide = true)]
    sloppy: bool,
    /// Ignored: there is no /etc/mtab to write
    #[arg(short = 'n', hide = true)]
    no_mtab: bool,
    /// Type, as mount(8) may pass it
    #[arg(short = 't', hide = true, value_name = "TYPE")]
    file_system_type: Option<String>,
    /// Internal: the daemon tells its parent on standard output when the volume is mounted
    #[arg(long, hide = true)]
    tell_parent: bool,
}

/// Who is to keep the mount's slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Lockd {
    /// The daemon at the default socket when it answers, else the mount itself.
    #[default]
    Auto,
    /// The mount itself.
    No,
    /// The daemon at this socket; none there: no mount.
    At(PathBuf),
}

/// A mount that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Paths or URLs of the LUNs.
    pub luns: Vec<String>,
    /// As typed, for the mount table.
    pub source: String,
    /// Mount point.
    pub directory: PathBuf,
    /// Read-only.
    pub read_only: bool,
    /// Other users may use the mount.
    pub allow_other: bool,
    /// The mount point need not be empty.
    pub nonempty: bool,
    /// Mount also when members are missing.
    pub degraded: bool,
    /// Kernel flags that were asked for.
    pub flags: Vec<fuser::MountOption>,
    /// Stay in the foreground.
    pub foreground: bool,
    /// This process is the daemon of a parent that waits.
    pub tell_parent: bool,
    /// Host UUID.
    pub host_id: Option<Uuid>,
    /// Host name.
    pub host_name: Option<String>,
    /// Worker threads.
    pub threads: Option<u16>,
    /// Log file.
    pub log: Option<PathBuf>,
    /// Who is to keep the slots.
    pub lockd: Lockd,
    /// Folders in which the image files of raw device mappings are looked for.
    pub raw_folders: Vec<PathBuf>,
    /// Log more.
    pub verbose: bool,
    /// Where to look for LUNs that other hosts add: paths, directories, patterns.
    pub watched: Vec<PathBuf>,
    /// Blank LUNs that appear there are formatted and added.
    pub format_blank: bool,
    /// LUNs that become larger grow the volume.
    pub grow: bool,
}

fn parse_uuid(text: &str) -> Result<Uuid, String> {
    let nil = Uuid::default();
    Uuid::parse(text).filter(|uuid| *uuid != nil).ok_or_else(|| "a UUID has 32 hexadecimal digits, not all zero".into())
}

/// Parses a command line, program name first. The error prints itself and knows its exit status.
pub fn parse<I, T>(arguments: I) -> Result<Mount, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<std::ffi::OsString> + Clone,
{
    let arguments = Arguments::try_parse_from(arguments)?;
    let usage = |text: String| {
        use clap::CommandFactory;
        Arguments::command().error(clap::error::ErrorKind::ValueValidation, text)
    };
    let luns = split_luns(&arguments.luns).map_err(usage)?;
    let mut mount = Mount {
        luns,
        source: arguments.luns,
        directory: arguments.directory,
        read_only: false,
        allow_other: false,
        nonempty: false,
        degraded: false,
        flags: Vec::new(),
        foreground: arguments.foreground,
        tell_parent: arguments.tell_parent,
        host_id: arguments.host_id,
        host_name: arguments.host_name,
        threads: arguments.threads,
        log: arguments.log,
        lockd: Lockd::Auto,
        raw_folders: Vec::new(),
        verbose: arguments.verbose,
        watched: Vec::new(),
        format_blank: false,
        grow: false,
    };
    for option in arguments.options.iter().flat_map(|list| list.split(',')).filter(|option| !option.is_empty()) {
        apply(&mut mount, option).map_err(usage)?;
    }
    if mount.host_name.as_ref().is_some_and(String::is_empty) {
        return Err(usage("the host's name is empty".to_owned()));
    }
    if mount.format_blank && mount.watched.is_empty() {
        return Err(usage("format-blank needs watch=PATH: only what that names is formatted".to_owned()));
    }
    if mount.read_only && (mount.format_blank || mount.grow) {
        return Err(usage("format-blank and grow change the volume: they cannot be given with ro".to_owned()));
    }
    Ok(mount)
}

fn split_luns(text: &str) -> Result<Vec<String>, String> {
    let mut luns = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        let last = luns.len() - 1;
        match c {
            '\\' if matches!(characters.peek(), Some(',' | '\\')) => luns[last].extend(characters.next()),
            ',' => luns.push(String::new()),
            other => luns[last].push(other),
        }
    }
    if luns.iter().any(String::is_empty) { Err(format!("a LUN without a name in {text:?}")) } else { Ok(luns) }
}

fn apply(mount: &mut Mount, option: &str) -> Result<(), String> {
    use fuser::MountOption as Flag;
    let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
    let value = |what: &str| value.filter(|v| !v.is_empty()).ok_or_else(|| format!("the option {name} needs {what}"));
    // Of two flags that exclude each other the later one counts, as with mount(8).
    let mut flag = |set: Flag, unset: Flag| {
        mount.flags.retain(|other| *other != set && *other != unset);
        mount.flags.push(set);
    };
    match name {
        "ro" => mount.read_only = true,
        "rw" => mount.read_only = false,
        "allow_other" => mount.allow_other = true,
        "nonempty" => mount.nonempty = true,
        "degraded" => mount.degraded = true,
        "foreground" => mount.foreground = true,
        "host_id" => mount.host_id = Some(parse_uuid(value("a UUID")?).map_err(|why| format!("host_id: {why}"))?),
        "host_name" => mount.host_name = Some(value("a name")?.to_owned()),
        "lockd" => {
            mount.lockd = match value("auto, no or a socket's path")? {
                "auto" => Lockd::Auto,
                "no" => Lockd::No,
                path if path.starts_with('/') => Lockd::At(PathBuf::from(path)),
                other => return Err(format!("lockd={other}: say auto, no, or the absolute path of its socket")),
            };
        }
        "rdm_folder" => mount.raw_folders.push(PathBuf::from(value("a folder")?)),
        "log" => mount.log = Some(PathBuf::from(value("a file")?)),
        "threads" => {
            let number = value("a number")?.parse().ok().filter(|n| (1..=MAX_THREADS).contains(n));
            mount.threads = Some(number.ok_or_else(|| format!("threads is a number from 1 to {MAX_THREADS}"))?);
        }
        "format-blank" | "format_blank" => mount.format_blank = true,
        "grow" => mount.grow = true,
        "watch" => mount.watched.push(PathBuf::from(value("a path")?)),
        "suid" => flag(Flag::Suid, Flag::NoSuid),
        "nosuid" => flag(Flag::NoSuid, Flag::Suid),
        "dev" => flag(Flag::Dev, Flag::NoDev),
        "nodev" => flag(Flag::NoDev, Flag::Dev),
        "exec" => flag(Flag::Exec, Flag::NoExec),
        "noexec" => flag(Flag::NoExec, Flag::Exec),
        "atime" | "strictatime" => flag(Flag::Atime, Flag::NoAtime),
        "noatime" => flag(Flag::NoAtime, Flag::Atime),
        "sync" => flag(Flag::Sync, Flag::Async),
        "async" => flag(Flag::Async, Flag::Sync),
        "dirsync" => mount.flags.push(Flag::DirSync),
        "remount" => {
            return Err("a mounted volume cannot be changed by remount: unmount it and mount it again".to_owned());
        }
        "defaults"
        | "default_permissions"
        | "auto"
        | "noauto"
        | "user"
        | "nouser"
        | "users"
        | "owner"
        | "group"
        | "nofail"
        | "_netdev"
        | "relatime"
        | "norelatime"
        | "nostrictatime"
        | "diratime"
        | "nodiratime"
        | "lazytime"
        | "nolazytime"
        | "iversion"
        | "noiversion"
        | "silent"
        | "loud"
        | "comment" => {}
        other if other.starts_with("x-") || other.starts_with("X-") => {}
        other => return Err(format!("unknown mount option {other:?}; mount.vmfs --help lists the known ones")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(words: &[&str]) -> Mount {
        parse(std::iter::once(&"mount.vmfs").chain(words)).unwrap_or_else(|error| panic!("{error}"))
    }

    fn usage(words: &[&str]) -> String {
        let error = parse(std::iter::once(&"mount.vmfs").chain(words)).expect_err("it is wrong");
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn the_own_command_line_is_understood() {
        let id = "00000000-0000-0000-0000-0000000000ab";
        let mount =
            parsed(&["a.img,b.img", "/m", "--foreground", "--host-id", id, "--host-name", "x", "--threads", "8"]);
        assert_eq!(mount.luns, ["a.img", "b.img"]);
        assert_eq!((mount.foreground, mount.host_id, mount.threads), (true, Uuid::parse(id), Some(8)));
        assert_eq!(parsed(&["a\\,b.img,c", "/m"]).luns, ["a,b.img", "c"]);
    }

    #[test]
    fn the_convention_of_mount_8_is_understood() {
        let mount =
            parsed(&["/dev/sdb", "/m", "-s", "-n", "-v", "-o", "rw,noatime,_netdev,defaults,x-systemd.automount,ro"]);
        assert!(mount.read_only && mount.verbose && !mount.foreground);
        assert_eq!(mount.flags, [fuser::MountOption::NoAtime]);
        assert!(parsed(&["/dev/sdb", "/m", "-o", "degraded"]).degraded && !mount.degraded);
        let mount = parsed(&["/dev/sdb", "/m", "-o", "rdm_folder=/a", "-o", "rdm_folder=b"]);
        assert_eq!(mount.raw_folders, [PathBuf::from("/a"), PathBuf::from("b")]);
        let mount = parsed(&["/dev/sdb", "/m", "-o", "nosuid,suid,host_name=h,threads=3,log=/l", "-t", "vmfs"]);
        assert_eq!(mount.flags, [fuser::MountOption::Suid]);
        assert_eq!(mount.lockd, Lockd::Auto);
        assert_eq!(parsed(&["a", "/m", "-o", "lockd=no"]).lockd, Lockd::No);
        assert_eq!(parsed(&["a", "/m", "-o", "lockd=/run/x.sock"]).lockd, Lockd::At(PathBuf::from("/run/x.sock")));
        assert_eq!((mount.host_name.as_deref(), mount.threads), (Some("h"), Some(3)));
    }

    #[test]
    fn wrong_words_are_named() {
        assert!(usage(&["a", "/m", "-o", "bogus"]).contains("bogus"));
        assert!(usage(&["a,,b", "/m"]).contains("a,,b"));
        assert!(usage(&["a", "/m", "-o", "threads=0"]).contains("threads"));
        assert!(usage(&["a", "/m", "-o", "host_id=12"]).contains("host_id"));
        assert!(usage(&["a", "/m", "-o", "lockd=maybe"]).contains("lockd=maybe"));
        assert!(usage(&["a", "/m", "-o", "format-blank"]).contains("watch"));
        assert!(usage(&["a", "/m", "-o", "ro,grow"]).contains("ro"));
        let mount = parsed(&["a", "/m", "-o", "watch=/l,format-blank,grow"]);
        assert!(mount.format_blank && mount.grow);
        assert!(usage(&["a", "/m", "-o", "remount"]).contains("remount"));
        assert!(usage(&["a", "/m", "--host-id", "zz"]).contains("UUID"));
        assert!(usage(&["a"]).contains("DIR"));
        usage(&["--no-such-flag"]);
    }

    proptest! {
        #[test]
        fn any_words_are_accepted_or_refused_and_never_panic(words in prop::collection::vec(".{0,20}", 0..6), options in ".{0,40}") {
            let all = words.iter().cloned().chain(["-o".to_owned(), options]);
            let _ = parse(std::iter::once("mount.vmfs".to_owned()).chain(all));
        }
    }
}
