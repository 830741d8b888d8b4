//! Owns: the command vmfs: its subcommands and their exit status.
//! Promises: 0 done, 1 refused or failed, 2 usage; facts go to standard output, everything else to standard error.
//! Must not know: how a mount or a LUN answers.

mod disk;
mod dump;
mod extent;
mod lock;
mod mounted;
mod nfs;
mod nfs_change;
mod probe;
mod rdm;
mod report;
mod resignature;
mod scrub;
mod status;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::terminal::{FAILED, USAGE, fail, usage};

const AFTER_HELP: &str = "\
Examples:
  vmfs disk create -s 40G -d thin /mnt/ds1/vm1/disk.vmdk
  vmfs disk create -s 40G nfs://nas/vol/ds2/vm1/disk.vmdk
  vmfs rdm create --virtual /dev/sdx /mnt/ds1/vm1/raw.vmdk
  vmfs why-locked /mnt/ds1/vm1/disk.vmdk
  vmfs status --json /mnt/ds1
  vmfs extent add /dev/sdc /mnt/ds1
  vmfs scrub /mnt/ds1
  vmfs probe-lun /dev/sdc
  vmfs resignature /dev/sdd /dev/sde      a clone or snapshot becomes a volume of its own
  vmfs dump --lun /dev/sdb header
  vmfs COMMAND --help                     shows an example for each command

Exit status: 0 done, 1 refused or failed, 2 usage.";

/// Administers VMFS volumes.
#[derive(Debug, Parser)]
#[command(name = "vmfs", version, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Virtual disks: create, look at, extend, copy, inflate
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Raw device mappings: LUNs outside of the volume as disks of it
    #[command(subcommand)]
    Rdm(rdm::RdmCommand),
    /// State of volumes: LUNs, space, hosts, what is wrong
    Status(status::StatusArguments),
    /// Who holds the lock of a file, since when, and when it could be taken
    WhyLocked(lock::LockArguments),
    /// Locks: break one whose holder is gone
    #[command(subcommand)]
    Lock(lock::LockCommand),
    /// What a LUN can do for a volume that hosts share
    ProbeLun(probe::ProbeArguments),
    /// Look through a mounted volume for damage, while hosts work on it
    Scrub(scrub::ScrubArguments),
    /// Make a clone or array snapshot of a volume's LUNs a volume of its own
    Resignature(resignature::ResignatureArguments),
    /// Structures in words: of a file, or of cells of a LUN
    Dump(dump::DumpArguments),
    /// Hosts by their heartbeats
    #[command(subcommand)]
    Heartbeat(status::HeartbeatCommand),
    /// Extents (member LUNs) of a volume: list, add while it is mounted
    #[command(subcommand)]
    Extent(extent::ExtentCommand),
}

/// Why a command was refused or failed: object, cause, next step.
#[derive(Debug)]
pub struct AdminError(String);

impl std::fmt::Display for AdminError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for AdminError {
    fn from(message: String) -> AdminError {
        AdminError(message)
    }
}

impl From<vmfs_core::error::FsError> for AdminError {
    fn from(error: vmfs_core::error::FsError) -> AdminError {
        AdminError(error.to_string())
    }
}

impl From<lockd::client::DirectError> for AdminError {
    fn from(error: lockd::client::DirectError) -> AdminError {
        AdminError(error.to_string())
    }
}

/// Runs the command and gives its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error, USAGE),
    };
    let done = match arguments.command {
        Command::Disk(command) => disk::run(command),
        Command::Rdm(command) => rdm::run(command),
        Command::Status(arguments) => status::run(&arguments),
        Command::WhyLocked(arguments) => lock::run(&arguments),
        Command::Lock(lock::LockCommand::Break(arguments)) => lock::break_lock(arguments),
        Command::Scrub(arguments) => match scrub::run(&arguments) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::from(FAILED),
            Err(error) => Err(error),
        },
        Command::ProbeLun(arguments) => probe::run(&arguments),
        Command::Resignature(arguments) => resignature::run(&arguments),
        Command::Dump(arguments) => dump::run(&arguments),
        Command::Heartbeat(status::HeartbeatCommand::List(arguments)) => status::heartbeats(&arguments),
        Command::Extent(command) => extent::run(&command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail("vmfs", error, FAILED),
    }
}
