//! Owns the job that posts garbage: what no driver would write, to whichever adapter there is.
//! Promises that after each of it the adapter is reset, and that it then reads a block whose content is known.
//! Must not know why the adapter survives.

mod buslogic;
mod lsilogic;
mod pvscsi;
mod virtio_scsi;

use crate::adapter::{Adapter, Data, Request};
use crate::console::line;
use crate::disk::{Answer, Direction, Disk};
use crate::job::Job;
use crate::memory::Arena;
use crate::pattern;
use crate::{Tally, cpu};

/// How long an answer to garbage may take, in seconds.
const PATIENCE_SECONDS: u32 = 120;
/// An address that no guest of ours has RAM at.
const NOWHERE: u64 = 0x0000_7FFF_FFFF_F000;
const BYTES: usize = 4096;

/// `job=garbage`. Writes the first 8 KiB of the disk.
pub fn garbage(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    let Ok(lists) = arena.take(4 * BYTES) else { return tally.check("memory for lists", false) };
    pattern::fill_range(&mut disk.data()[..BYTES], job.seed, 0, job.generation);
    let written = disk.command(&read_write(disk, true), Direction::Out, BYTES);
    tally.check("write of the known block", matches!(written, Answer::Good(_)));
    let mut bench = Ordeal { job, disk, tally };
    bench.alive("start");
    match bench.disk.adapter {
        Adapter::Pvscsi(_) => pvscsi::garbage(&mut bench, lists),
        Adapter::LsiLogic(_) => lsilogic::garbage(&mut bench, lists),
        Adapter::BusLogic(_) => buslogic::garbage(&mut bench, lists),
        Adapter::VirtioScsi(_) => virtio_scsi::garbage(&mut bench, lists),
    }
    bench.configuration();
    bench.reset_in_flight(lists);
}

/// READ(10) or WRITE(10) of the first 4 KiB.
fn read_write(disk: &Disk, write: bool) -> [u8; 10] {
    let blocks = (BYTES as u32 / disk.block.max(1)) as u8;
    [if write { 0x2A } else { 0x28 }, 0, 0, 0, 0, 0, 0, 0, blocks, 0]
}

struct Ordeal<'run> {
    job: &'run Job,
    disk: &'run mut Disk,
    tally: &'run mut Tally,
}

impl Ordeal<'_> {
    /// Resets the adapter, gives it fresh rings, and reads the known block.
    fn alive(&mut self, after: &str) {
        let restarted = self.disk.adapter.restart();
        // A reset may leave unit attentions.
        let ready = (0..4).any(|_| matches!(self.disk.command(&[0; 6], Direction::None, 0), Answer::Good(_)));
        self.disk.data()[..BYTES].fill(0);
        let answer = self.disk.command(&read_write(self.disk, false), Direction::In, BYTES);
        let same = pattern::first_mismatch(&self.disk.data()[..BYTES], self.job.seed, 0, self.job.generation).is_none();
        let alive = restarted && ready && answer == Answer::Good(BYTES as u64) && same;
        if !alive {
            line!("after={after}: restarted={restarted} ready={ready} read={answer:?} same={same}");
        }
        self.tally.check(after, alive);
    }

    /// BARs where no BAR belongs, messages to nowhere, and ones in every configuration register.
    fn configuration(&mut self) {
        let function = self.disk.adapter.function();
        let bar = self.disk.adapter.memory_bar();
        for address in [0, 0x0010_0000, 0xC000_0000, 0xFEC0_0000, 0xFEE0_0000, 0xFFFF_8000] {
            function.set_memory_bar(bar, address);
            self.alive_again("BAR at another place");
        }
        for offset in (0..=252).step_by(4) {
            function.write(offset, u32::MAX);
            // A message to nowhere is what the adapter has now; a completion must not hurt.
            self.disk.adapter.kick(true);
        }
        self.alive_again("configuration space of ones");
        for offset in (0..=252).step_by(4) {
            function.write(offset, 0);
        }
        self.alive_again("configuration space of zeros");
    }

    /// Configures the function again, then [`Self::alive`].
    fn alive_again(&mut self, after: &str) {
        self.disk.adapter.function().disable_msi();
        let configured = self.disk.adapter.configure();
        self.tally.check("configured again", configured);
        self.alive(after);
    }

    /// A reset with requests in flight: nothing may be written to memory afterwards.
    fn reset_in_flight(&mut self, memory: &mut [u8]) {
        const ROUNDS: u32 = 20;
        const SETTLE_SECONDS_PART: u64 = 200;
        let mut touched = 0;
        for _ in 0..ROUNDS {
            let request = self.disk.request(&read_write(self.disk, false), Direction::In);
            let request = Request { data: Data::whole(memory.as_ptr() as u64, BYTES as u32), ..request };
            for context in 0..64 {
                self.disk.adapter.submit(&Request { context, ..request });
            }
            self.disk.adapter.kick(true);
            self.disk.adapter.reset();
            memory.fill(0x5A);
            let until = cpu::ticks() + self.disk.clock.ticks_of_seconds(1) / SETTLE_SECONDS_PART;
            while cpu::ticks() < until {
                core::hint::spin_loop();
            }
            // SAFETY: volatile, since it is the adapter's writes that are looked for; the slice is this function's.
            touched += u32::from(memory.iter().any(|byte| unsafe { (&raw const *byte).read_volatile() } != 0x5A));
            self.disk.adapter.restart();
        }
        self.tally.check("no late write after a reset", touched == 0);
        self.alive("reset with requests in flight");
    }
}
