//! Puts an adapter of the VMM, on the real storage path, on the PCI bus of a User-Mode Linux.
//!
//! User-Mode Linux reaches PCI devices as vhost-user back ends (its driver virt-pci; messages: linux/virtio_pcidev.h). So Linux's own
//! drivers, with all of user space above them, drive the same adapter code that KVM guests see. One connection is one device; the program
//! ends with it.
#![deny(unsafe_code)]

mod adapter;
mod bridge;
mod requests;
mod stall;
mod vhost_user;
mod wires;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vmm::config::DiskConfig;

/// Show an adapter with disks to a User-Mode Linux
#[derive(Debug, Parser)]
#[command(after_help = "Example:
  uml-hba --socket /tmp/hba --disk /mnt/ds1/vm/disk.vmdk,hba=pvscsi &
  linux mem=256M virtio_uml.device=/tmp/hba:1234 root=/dev/root rootfstype=hostfs")]
struct Arguments {
    /// Where User-Mode Linux connects
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// A disk as `vmm run --disk` takes it; all of the same hba
    #[arg(long, value_name = "PATH[,OPTION...]", required = true)]
    disk: Vec<DiskConfig>,

    /// Directory in which requests to plug, unplug and stall are looked for
    #[arg(long, value_name = "DIRECTORY")]
    requests: Option<PathBuf>,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_env_filter(filter()).with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("uml-hba: {error}");
            ExitCode::FAILURE
        }
    }
}

fn filter() -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into())
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let listener = UnixListener::bind(&arguments.socket)
        .map_err(|cause| format!("cannot listen at {}: {cause}; remove what is there", arguments.socket.display()))?;
    let (stream, _) = listener.accept()?;
    bridge::serve(stream, arguments.disk.clone(), arguments.requests.clone())
}
