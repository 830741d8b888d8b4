//! A program on a host: it works on files of a mount as it is told, in a process of its own, so that it can be stopped and killed.

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::program::serve()
}
