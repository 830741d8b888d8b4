//! `fsck.vmfs`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfs_mkfs::fsck::run(std::env::args_os())
}
