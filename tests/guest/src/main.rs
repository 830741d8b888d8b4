//! Owns the command `test-guest`, which writes the guest's image to a file.
//! Promises a whole image or an error that names the file.
//! Must not know what the image does.
#![forbid(unsafe_code)]

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// Write the image of the bare-metal test guest to a file
#[derive(Parser)]
#[command(
    name = "test-guest",
    version,
    after_help = "Example:\n  test-guest --output guest.elf\n  vmm run --kernel guest.elf --cmdline 'job=info' --disk disk.img"
)]
struct CommandLine {
    /// File to write, made or overwritten
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
}

fn main() -> ExitCode {
    let CommandLine { output } = CommandLine::parse();
    match std::fs::write(&output, test_guest::IMAGE) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("test-guest: {}: {cause}. Give --output a path that can be written", output.display());
            ExitCode::FAILURE
        }
    }
}
