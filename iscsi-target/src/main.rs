//! The command iscsi-target; everything is in [`iscsi_target::command`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    iscsi_target::command::run(std::env::args_os())
}
