//! `mount.vmfs`: mounts a VMFS volume by FUSE; also the helper of mount(8) for the type `vmfs`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfs_fuse::command::run()
}
