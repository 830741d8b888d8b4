//! Owns the job that measures rates and latencies.
//! Promises counts of transfers that were done within the time asked for, none estimated.
//! Must not know rings or registers.

use crate::console::line;
use crate::disk::{Disk, Slots, Transfer, Work};
use crate::job::{Job, Mix};
use crate::memory::Arena;
use crate::pattern::{self, SECTOR};
use crate::verify::Range;
use crate::{Tally, cpu};

/// Latencies are counted in buckets of powers of two of ticks, each cut in four.
const BUCKETS: usize = 64 * 4;

struct Bench {
    range: Range,
    mix: Mix,
    random: u64,
    next: u64,
    end: u64,
    done: u64,
    sum: u64,
    worst: u64,
    buckets: [u32; BUCKETS],
}

fn bucket(ticks: u64) -> usize {
    let exponent = 63 - ticks.max(4).leading_zeros();
    (exponent * 4) as usize + (ticks.max(4) >> (exponent - 2) & 3) as usize
}

/// The lower edge of a bucket, in ticks.
fn edge(bucket: usize) -> u64 {
    let (exponent, quarter) = (bucket as u32 / 4, bucket as u64 % 4);
    (4 + quarter) << exponent.saturating_sub(2)
}

impl Bench {
    /// The latency that `part` of 1000 transfers stayed below, in ticks, to a quarter of a power of two.
    fn quantile(&self, part: u64) -> u64 {
        let mut left = self.done * part / 1000;
        for (index, count) in self.buckets.iter().enumerate() {
            if left < u64::from(*count) {
                return edge(index + 1);
            }
            left -= u64::from(*count);
        }
        self.worst
    }
}

impl Work for Bench {
    fn next(&mut self, buffer: &mut [u8]) -> Option<Transfer> {
        if cpu::ticks() >= self.end || self.range.blocks == 0 {
            return None;
        }
        let index = match self.mix {
            Mix::Read | Mix::Write => self.next,
            Mix::RandomRead | Mix::RandomWrite => {
                self.random = pattern::mix(self.random);
                self.random
            }
        };
        self.next += 1;
        let offset = self.range.place(index % self.range.blocks);
        let write = matches!(self.mix, Mix::Write | Mix::RandomWrite);
        if write {
            // A fresh stamp in one sector keeps data from being the same each time, at little cost.
            pattern::fill_range(&mut buffer[..SECTOR], self.next, offset / SECTOR as u64, self.next);
        }
        Some(Transfer { write, offset, length: self.range.block, scatter: false })
    }

    fn done(&mut self, _transfer: &Transfer, _buffer: &[u8], ticks: u64) {
        self.done += 1;
        self.sum += ticks;
        self.worst = self.worst.max(ticks);
        self.buckets[bucket(ticks).min(BUCKETS - 1)] += 1;
    }
}

/// `job=bench`.
pub fn bench(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    let Ok(mut slots) = Slots::new(job.depth, job.block, arena) else {
        return tally.check("memory for buffers", false);
    };
    let range = Range::of(job, disk);
    let start = cpu::ticks();
    let interrupts = disk.adapter.interrupts();
    let mut bench = Bench {
        range,
        mix: job.mix,
        random: job.seed,
        next: 0,
        end: start + disk.clock.ticks_of_seconds(job.seconds),
        done: 0,
        sum: 0,
        worst: 0,
        buckets: [0; BUCKETS],
    };
    tally.answer("transfers", disk.stream(&mut slots, &mut bench));
    tally.check("something was transferred", bench.done > 0);
    let microseconds = disk.clock.microseconds(cpu::ticks() - start).max(1);
    let per_second = |count: u64| (u128::from(count) * 1_000_000 / u128::from(microseconds)) as u64;
    let time = |ticks| disk.clock.microseconds(ticks);
    line!(
        "bench rw={} bs={} depth={} ops={} iops={} kib_s={} us_mean={} us_p50={} us_p99={} us_max={} interrupts={}",
        job.mix.name(),
        job.block,
        job.depth,
        bench.done,
        per_second(bench.done),
        per_second(bench.done * u64::from(job.block)) >> 10,
        time(bench.sum / bench.done.max(1)),
        time(bench.quantile(500)),
        time(bench.quantile(990)),
        time(bench.worst),
        disk.adapter.interrupts() - interrupts,
    );
}
