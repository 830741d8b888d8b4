//! The test guest's image. Owns the way from the first compiled instruction to the last line on COM1.
//! Promises a last line `guest: N passed, N failed` and an exit status, whatever goes wrong.
//! Must not know registers: those are in `cpu`, `pci` and the adapters' drivers.
#![no_std]
#![no_main]

mod adapter;
mod bench;
mod buslogic;
mod commands;
mod console;
mod cpu;
mod disk;
mod garbage;
#[path = "../src/job.rs"]
mod job;
mod lsilogic;
mod memory;
#[allow(dead_code, reason = "shared with tests on the host, which use the rest of it")]
#[path = "../src/pattern.rs"]
mod pattern;
mod pci;
mod pvscsi;
mod verify;
mod virtio_scsi;

use adapter::{Adapter, AttachError};
use console::line;
use disk::{Answer, Disk};
use job::{Job, Task};
use memory::{Arena, StartInfo};

/// Where `job=spin` counts; see the library's `SPIN_COUNTER`.
const SPIN_COUNTER: u64 = 0x9000;

/// Checks that passed and failed so far.
pub struct Tally {
    passed: u32,
    failed: u32,
}

impl Tally {
    /// Counts one check; a failed one is printed.
    pub fn check(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
            line!("failed={name}");
        }
    }

    /// Counts the end of a stream; a bad one is printed with the answer that ended it.
    fn answer(&mut self, name: &str, result: Result<(), Answer>) {
        if let Err(answer) = result {
            line!("{name}: answer={answer:?}");
        }
        self.check(name, result.is_ok());
    }
}

/// Entered from `boot.s` at CPL3, with interrupts on.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: &'static StartInfo) -> ! {
    let mut tally = Tally { passed: 0, failed: 0 };
    let mut status = 1;
    match Job::parse(start_info.command_line()) {
        Ok(job) => {
            status = job.status;
            run(&job, Arena::new(start_info), &mut tally);
        }
        Err(error) => {
            line!("error=command line: {error}");
            tally.failed += 1;
        }
    }
    finish(&tally, status)
}

fn run(job: &Job, mut arena: Arena, tally: &mut Tally) {
    match job.task {
        Task::Spin => spin(),
        Task::Reset => cpu::out8(0x64, 0xFE),
        Task::Fault => cpu::triple_fault(),
        Task::Exit => {}
        _ => match open_disk(job, &mut arena) {
            Ok(mut disk) => run_on_disk(job, &mut disk, &mut arena, tally),
            Err(cause) => {
                line!("error={cause}");
                tally.failed += 1;
            }
        },
    }
}

fn open_disk(job: &Job, arena: &mut Arena) -> Result<Disk, Trouble> {
    let clock = cpu::Clock::calibrate();
    cpu::start_interrupts();
    let adapter = Adapter::attach(job.interrupt, arena).map_err(Trouble::Adapter)?;
    let (name, device) = (adapter.name(), adapter.function().device());
    line!("adapter={name} device={device} interrupt={}", adapter.interrupt().name());
    let mut disk = Disk::new(adapter, clock, job.target, arena).map_err(|_| Trouble::Memory)?;
    disk.measure().map_err(Trouble::Disk)?;
    disk.force = job.force;
    Ok(disk)
}

/// Why a job on a disk cannot start.
enum Trouble {
    Adapter(AttachError),
    Memory,
    Disk(Answer),
}

impl core::fmt::Display for Trouble {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Trouble::Adapter(cause) => write!(out, "the adapter cannot be used: {cause:?}"),
            Trouble::Memory => write!(out, "not enough memory"),
            Trouble::Disk(answer) => write!(out, "the disk does not tell its capacity: {answer:?}"),
        }
    }
}

fn run_on_disk(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    if !job.block.is_multiple_of(disk.block) || !job.offset.is_multiple_of(u64::from(disk.block)) {
        line!("error=block and offset must be multiples of the disk's {} bytes", disk.block);
        return tally.check("block size", false);
    }
    match job.task {
        Task::Info => commands::info(disk, tally),
        Task::Verify => verify::verify(job, disk, arena, tally),
        Task::Check => verify::check(job, disk, arena, tally),
        Task::Write => verify::write(job, disk, arena, tally),
        Task::Bench => bench::bench(job, disk, arena, tally),
        Task::Unmap => verify::unmap(job, disk, arena, tally),
        Task::Discard => verify::discard(job, disk, arena, tally),
        Task::Errors => commands::errors(disk, tally),
        Task::Garbage => garbage::garbage(job, disk, arena, tally),
        Task::Spin | Task::Reset | Task::Fault | Task::Exit => {}
    }
}

/// Prints the last line and ends the machine: with 1 if a check failed, else with `status`.
fn finish(tally: &Tally, status: u8) -> ! {
    line!("guest: {} passed, {} failed", tally.passed, tally.failed);
    cpu::exit(if tally.failed > 0 { 1 } else { status })
}

fn spin() -> ! {
    line!("spinning");
    let counter = SPIN_COUNTER as *mut u64;
    loop {
        // SAFETY: low RAM that neither the loader nor this program uses for anything else.
        unsafe { counter.write_volatile(counter.read_volatile().wrapping_add(1)) };
    }
}

/// Entered from `boot.s` after an exception that nobody expected.
#[unsafe(no_mangle)]
extern "C" fn guest_fault(vector: u64, error: u64, instruction: u64, address: u64) -> ! {
    line!("error=exception {vector}, code {error:#x}, at {instruction:#x}, address {address:#x}");
    finish(&Tally { passed: 0, failed: 1 }, 1)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    line!("error={info}");
    finish(&Tally { passed: 0, failed: 1 }, 1)
}
