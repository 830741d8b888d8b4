//! Owns the command `test-guest`: writes the guest's image to a file, and checks on the host what a guest wrote.
//! Promises exit status 0 (done, all as stamped), 1 (refused, failed or a mismatch) or 2 (usage).
//! Must not know what the image does.
#![forbid(unsafe_code)]

use clap::{Args, Parser};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use test_guest::job;
use test_guest::pattern::{self, SECTOR};

const EXAMPLE: &str = "\
Example:
  test-guest --output guest.elf
  vmm run --kernel guest.elf --cmdline 'job=verify size=64M seed=7' --disk disk.img
  test-guest --verify disk.img --size 64M --seed 7";

/// Write the image of the bare-metal test guest, or check on the host what a guest wrote
#[derive(Parser)]
#[command(name = "test-guest", version, after_help = EXAMPLE)]
struct CommandLine {
    #[command(flatten)]
    what: What,

    /// With --verify: where on the disk the guest's job started
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    offset: u64,

    /// With --verify: how much the job wrote; 0 is up to the end of the file
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    size: u64,

    /// With --verify: the job's seed
    #[arg(long, value_name = "N", default_value_t = job::Job::DEFAULT.seed)]
    seed: u64,

    /// With --verify: the generation of the job's last pass
    #[arg(long, value_name = "N", default_value_t = job::Job::DEFAULT.generation)]
    generation: u64,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct What {
    /// File to write the image to, made or overwritten
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,

    /// Disk or image whose stamped sectors are checked
    #[arg(long, value_name = "PATH")]
    verify: Option<PathBuf>,
}

/// A size as the guest's jobs have it: a multiple of 512, with a suffix if you like.
fn bytes(text: &str) -> Result<u64, &'static str> {
    job::sectors(text)
}

fn main() -> ExitCode {
    let command = CommandLine::parse();
    let result = match (&command.what.output, &command.what.verify) {
        (Some(output), _) => std::fs::write(output, test_guest::IMAGE)
            .map_err(|cause| format!("{}: {cause}. Give --output a path that can be written", output.display())),
        (_, Some(path)) => verify(path, &command),
        (None, None) => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("test-guest: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the range and compares every sector with its stamp.
fn verify(path: &Path, command: &CommandLine) -> Result<(), String> {
    let unreadable = |cause: io::Error| format!("{}: {cause}. Check the path, --offset and --size", path.display());
    let mut file = File::open(path).map_err(unreadable)?;
    let end = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let size = if command.size == 0 { end.saturating_sub(command.offset) } else { command.size };
    file.seek(SeekFrom::Start(command.offset)).map_err(unreadable)?;
    let mut chunk = vec![0; 1 << 20];
    let mut done = 0;
    while done < size {
        let length = (size - done).min(chunk.len() as u64) as usize / SECTOR * SECTOR;
        if length == 0 {
            break;
        }
        let data = &mut chunk[..length];
        file.read_exact(data).map_err(unreadable)?;
        let first = (command.offset + done) / SECTOR as u64;
        if let Some(sector) = pattern::first_mismatch(data, command.seed, first, command.generation) {
            let at = (sector - first) as usize * SECTOR;
            let found = pattern::inspect(&data[at..at + SECTOR], command.seed, sector);
            return Err(format!(
                "{}: sector {sector} (byte {}) does not carry seed {} and generation {}: {found:?}. Check the disk's \
                 way from guest to file",
                path.display(),
                sector * SECTOR as u64,
                command.seed,
                command.generation
            ));
        }
        done += length as u64;
    }
    if done == 0 {
        return Err(format!("{}: there is no sector to check. Check --offset and --size", path.display()));
    }
    println!(
        "{}: {done} bytes from {} on carry seed {} and generation {}",
        path.display(),
        command.offset,
        command.seed,
        command.generation
    );
    Ok(())
}
