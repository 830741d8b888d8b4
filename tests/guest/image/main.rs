//! The test guest's image. Owns the way from the first compiled instruction to the last line on COM1.
//! Promises a last line `guest: N passed, N failed` and an exit status, whatever goes wrong.
//! Must not know registers: those are in `cpu`, `pci` and `pvscsi`.
#![no_std]
#![no_main]

mod console;
mod cpu;
#[path = "../src/job.rs"]
mod job;
mod memory;
#[allow(dead_code, reason = "shared with tests on the host, which use the rest of it")]
#[path = "../src/pattern.rs"]
mod pattern;

use console::line;
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

fn run(job: &Job, _arena: Arena, tally: &mut Tally) {
    match job.task {
        Task::Spin => spin(),
        Task::Reset => cpu::out8(0x64, 0xFE),
        Task::Fault => cpu::triple_fault(),
        Task::Exit => {}
        _ => tally.check("not yet", false),
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
