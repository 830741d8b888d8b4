//! `vmfs`, the administrator's command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfs_mkfs::admin::run(std::env::args_os())
}
