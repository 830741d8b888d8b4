//! The command vmfs-lockd; everything is in [`lockd::keeper::command`].

fn main() -> std::process::ExitCode {
    lockd::keeper::command::run(std::env::args_os())
}
