//! Owns the jobs that write and judge stamped patterns: verify, check, write, unmap, discard.
//! Promises that every sector read is compared whole, and that the first mismatches are printed with what was found.
//! Must not know rings or registers.

use crate::Tally;
use crate::console::line;
use crate::disk::{Answer, Direction, Disk, Sense, Slots, Transfer, Work};
use crate::job::{Discard, Job};
use crate::memory::Arena;
use crate::pattern::{self, Content, SECTOR, Visit};

/// How many mismatches are printed.
const MISMATCHES_PRINTED: u64 = 8;

/// The part of the disk that a job works on, as whole blocks.
#[derive(Clone, Copy)]
pub struct Range {
    pub offset: u64,
    pub blocks: u64,
    pub block: u32,
}

impl Range {
    /// What `job` asks for, cut to the disk.
    pub fn of(job: &Job, disk: &Disk) -> Range {
        let available = disk.capacity.saturating_sub(job.offset);
        let size = if job.size == 0 { available } else { job.size.min(available) };
        Range { offset: job.offset, blocks: size / u64::from(job.block), block: job.block }
    }

    /// Byte offset on the disk of block `index`.
    pub fn place(&self, index: u64) -> u64 {
        self.offset + index * u64::from(self.block)
    }

    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block)
    }
}

/// One pass over a range.
pub struct Pass {
    pub range: Range,
    pub visit: Visit,
    pub seed: u64,
    pub generation: u64,
    /// Visits done and, exclusively, the last one to do.
    pub next: u64,
    pub until: u64,
    pub mismatches: u64,
}

impl Pass {
    pub fn new(job: &Job, range: Range, pass: u64) -> Pass {
        Pass {
            range,
            visit: Visit::new(job.order, range.blocks, job.seed, pass),
            seed: job.seed,
            generation: job.generation + pass,
            next: 0,
            until: range.blocks,
            mismatches: 0,
        }
    }

    fn advance(&mut self, write: bool) -> Option<Transfer> {
        if self.next >= self.until {
            return None;
        }
        let offset = self.range.place(self.visit.block(self.next));
        // Every second transfer goes by a scatter-gather list, so that both ways are tried.
        let scatter = self.next % 2 == 1;
        self.next += 1;
        Some(Transfer { write, offset, length: self.range.block, scatter })
    }
}

/// Writes the pass's pattern.
pub struct Writer<'pass>(pub &'pass mut Pass);

impl Work for Writer<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Option<Transfer> {
        let transfer = self.0.advance(true)?;
        let first = transfer.offset / SECTOR as u64;
        pattern::fill_range(&mut buffer[..transfer.length as usize], self.0.seed, first, self.0.generation);
        Some(transfer)
    }

    fn done(&mut self, _transfer: &Transfer, _buffer: &[u8], _ticks: u64) {}
}

/// Reads and compares the pass's pattern.
pub struct Reader<'pass>(pub &'pass mut Pass);

impl Work for Reader<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Option<Transfer> {
        let transfer = self.0.advance(false)?;
        // What an earlier read left there must not pass for what this one brings.
        buffer.fill(0xA5);
        Some(transfer)
    }

    fn done(&mut self, transfer: &Transfer, buffer: &[u8], _ticks: u64) {
        let Pass { seed, generation, mismatches, .. } = &mut *self.0;
        let first = transfer.offset / SECTOR as u64;
        let data = &buffer[..transfer.length as usize];
        let Some(sector) = pattern::first_mismatch(data, *seed, first, *generation) else { return };
        *mismatches += 1;
        if *mismatches <= MISMATCHES_PRINTED {
            let at = (sector - first) as usize * SECTOR;
            let found = pattern::inspect(&data[at..at + SECTOR], *seed, sector);
            line!("mismatch sector={sector} expected_generation={generation} found={found:?}");
        }
    }
}

/// `job=verify`: write, flush, read back, compare; as many passes as asked for, each with a new generation.
pub fn verify(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    let Ok(mut slots) = Slots::new(job.depth, job.block, arena) else {
        return tally.check("memory for buffers", false);
    };
    let range = Range::of(job, disk);
    tally.check("range holds a block", range.blocks > 0);
    for pass in 0..job.passes {
        let mut pass = Pass::new(job, range, pass);
        let start = crate::cpu::ticks();
        tally.answer("write", disk.stream(&mut slots, &mut Writer(&mut pass)));
        tally.check("flush", matches!(disk.flush(), Answer::Good(_)));
        let middle = crate::cpu::ticks();
        pass.next = 0;
        tally.answer("read", disk.stream(&mut slots, &mut Reader(&mut pass)));
        tally.check("compare", pass.mismatches == 0);
        let end = crate::cpu::ticks();
        line!(
            "pass generation={} bytes={} mismatches={} write_mib_s={} read_mib_s={} interrupts={}",
            pass.generation,
            range.bytes(),
            pass.mismatches,
            rate(disk, range.bytes(), middle - start),
            rate(disk, range.bytes(), end - middle),
            disk.adapter.interrupts(),
        );
    }
}

/// MiB a second.
fn rate(disk: &Disk, bytes: u64, ticks: u64) -> u64 {
    let microseconds = disk.clock.microseconds(ticks).max(1);
    ((u128::from(bytes) * 1_000_000 / u128::from(microseconds)) >> 20) as u64
}

/// `job=check`: read and compare only.
pub fn check(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    let Ok(mut slots) = Slots::new(job.depth, job.block, arena) else {
        return tally.check("memory for buffers", false);
    };
    let range = Range::of(job, disk);
    tally.check("range holds a block", range.blocks > 0);
    let mut pass = Pass::new(job, range, 0);
    tally.answer("read", disk.stream(&mut slots, &mut Reader(&mut pass)));
    tally.check("compare", pass.mismatches == 0);
    line!("checked generation={} bytes={} mismatches={}", pass.generation, range.bytes(), pass.mismatches);
}

/// `job=write`: write only. After each flush (under `fua=1` after as many forced writes, without a flush) a line says how
/// many visits of the pass are durable, in the order of `Visit::new(pattern, blocks, seed, pass)`; what follows them may or
/// may not be on the disk.
pub fn write(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    let Ok(mut slots) = Slots::new(job.depth, job.block, arena) else {
        return tally.check("memory for buffers", false);
    };
    let range = Range::of(job, disk);
    tally.check("range holds a block", range.blocks > 0);
    let step = if job.flush == 0 { range.blocks } else { job.flush };
    line!("writing blocks={} block={} offset={}", range.blocks, range.block, range.offset);
    for number in 0..job.passes {
        let mut pass = Pass::new(job, range, number);
        while pass.next < range.blocks {
            pass.until = pass.next.saturating_add(step).min(range.blocks);
            let written = disk.stream(&mut slots, &mut Writer(&mut pass));
            let flushed = if job.force { Answer::Good(0) } else { disk.flush() };
            if written.is_err() || !matches!(flushed, Answer::Good(_)) {
                tally.answer("write", written);
                return tally.check("flush", matches!(flushed, Answer::Good(_)));
            }
            line!("flushed pass={number} generation={} blocks={}", pass.generation, pass.next);
        }
        tally.check("pass written", true);
    }
}

/// Reads the range and counts the sectors that are stamped with the pass's generation, zero, or anything else.
struct Census<'pass> {
    pass: &'pass mut Pass,
    stamped: u64,
    zero: u64,
    foreign: u64,
}

impl Work for Census<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Option<Transfer> {
        Reader(self.pass).next(buffer)
    }

    fn done(&mut self, transfer: &Transfer, buffer: &[u8], _ticks: u64) {
        let first = transfer.offset / SECTOR as u64;
        for (sector, bytes) in (first..).zip(buffer[..transfer.length as usize].chunks_exact(SECTOR)) {
            match pattern::inspect(bytes, self.pass.seed, sector) {
                Content::Stamped(generation) if generation == self.pass.generation => self.stamped += 1,
                Content::Zero => self.zero += 1,
                _ => self.foreign += 1,
            }
        }
    }
}

/// `job=unmap`: discard the middle third of the range (whole MiB), see that it reads as zeros if the disk says so and
/// that its neighbours keep their bytes, then write and verify all of it again.
pub fn unmap(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    const UNIT: u64 = 1 << 20;
    let Ok(mut slots) = Slots::new(job.depth, job.block, arena) else {
        return tally.check("memory for buffers", false);
    };
    let told = disk.provisioning();
    tally.check("the disk tells of its provisioning", told.is_ok());
    let (provisioned, reads_zero) = told.unwrap_or((false, false));
    tally.check("disk offers unmap", provisioned);
    let range = Range::of(job, disk);
    let first = (range.offset + range.bytes() / 3).next_multiple_of(UNIT);
    let last = (range.offset + range.bytes() / 3 * 2) / UNIT * UNIT;
    tally.check("range has a MiB to discard", last > first);
    if !provisioned || last <= first {
        return;
    }
    let mut pass = Pass::new(job, range, 0);
    tally.answer("write", disk.stream(&mut slots, &mut Writer(&mut pass)));
    tally.check("flush", matches!(disk.flush(), Answer::Good(_)));
    tally.check("unmap", matches!(send_unmap(disk, first, last - first), Answer::Good(_)));
    for (name, part, discarded) in [
        ("below", (range.offset, first), false),
        ("discarded", (first, last), true),
        ("above", (last, range.offset + range.bytes()), false),
    ] {
        let (start, end) = part;
        let block = u64::from(range.block);
        let start = start.next_multiple_of(block);
        let part = Range { offset: start, blocks: end.saturating_sub(start) / block, block: range.block };
        let mut pass =
            Pass { range: part, visit: Visit::new(job.order, part.blocks, job.seed, 1), ..Pass::new(job, range, 0) };
        pass.until = part.blocks;
        let mut census = Census { pass: &mut pass, stamped: 0, zero: 0, foreign: 0 };
        let read = disk.stream(&mut slots, &mut census);
        let Census { stamped, zero, foreign, .. } = census;
        tally.answer("read", read);
        line!("part={name} stamped={stamped} zero={zero} foreign={foreign}");
        let expected = match (discarded, reads_zero) {
            (false, _) => zero == 0,
            (true, true) => stamped == 0,
            (true, false) => true,
        };
        tally.check(name, expected && foreign == 0);
    }
    let beyond = disk.capacity;
    tally.check("unmap beyond the end", send_unmap(disk, beyond, UNIT) == Answer::Check(Sense(5, 0x21, 0)));
    let mut again = Pass::new(job, range, 1);
    tally.answer("write again", disk.stream(&mut slots, &mut Writer(&mut again)));
    again.next = 0;
    tally.answer("read again", disk.stream(&mut slots, &mut Reader(&mut again)));
    tally.check("compare again", again.mismatches == 0);
}

/// `job=discard`: discard the range by one command after the other, flush, and see that it reads as zeros.
pub fn discard(job: &Job, disk: &mut Disk, arena: &mut Arena, tally: &mut Tally) {
    const AT_ONCE: u64 = 8 << 20;
    let Ok(mut slots) = Slots::new(job.depth, job.block, arena) else {
        return tally.check("memory for buffers", false);
    };
    let range = Range::of(job, disk);
    tally.check("range holds a block", range.blocks > 0);
    for done in (0..range.bytes()).step_by(AT_ONCE as usize) {
        let (offset, bytes) = (range.offset + done, AT_ONCE.min(range.bytes() - done));
        let answer = match job.discard {
            Discard::Unmap => send_unmap(disk, offset, bytes),
            Discard::WriteSame => send_write_same(disk, offset, bytes),
        };
        if !matches!(answer, Answer::Good(_)) {
            line!("discard offset={offset} answer={answer:?}");
        }
        tally.check("discard", matches!(answer, Answer::Good(_)));
    }
    tally.check("flush", matches!(disk.flush(), Answer::Good(_)));
    let mut pass = Pass::new(job, range, 0);
    let mut census = Census { pass: &mut pass, stamped: 0, zero: 0, foreign: 0 };
    let read = disk.stream(&mut slots, &mut census);
    let Census { stamped, zero, foreign, .. } = census;
    tally.answer("read", read);
    line!("discarded bytes={} stamped={stamped} zero={zero} foreign={foreign}", range.bytes());
    tally.check("discarded reads as zeros", zero == range.bytes() / SECTOR as u64);
}

/// WRITE SAME (16) with UNMAP and NDOB of one range, in bytes; or WRITE SAME (10) with a block of zeros.
fn send_write_same(disk: &mut Disk, offset: u64, bytes: u64) -> Answer {
    const UNMAP: u8 = 0x08;
    const NO_DATA_OUT: u8 = 0x01;
    let block = u64::from(disk.block);
    if disk.has_short_cdbs() {
        let mut cdb = [0; 10];
        (cdb[0], cdb[1]) = (0x41, UNMAP);
        cdb[2..6].copy_from_slice(&((offset / block) as u32).to_be_bytes());
        cdb[7..9].copy_from_slice(&((bytes / block) as u16).to_be_bytes());
        let length = disk.block as usize;
        disk.data()[..length].fill(0);
        return disk.command(&cdb, Direction::Out, length);
    }
    let mut cdb = [0; 16];
    (cdb[0], cdb[1]) = (0x93, UNMAP | NO_DATA_OUT);
    cdb[2..10].copy_from_slice(&(offset / block).to_be_bytes());
    cdb[10..14].copy_from_slice(&((bytes / block) as u32).to_be_bytes());
    disk.command(&cdb, Direction::None, 0)
}

/// UNMAP of one range, in bytes.
fn send_unmap(disk: &mut Disk, offset: u64, bytes: u64) -> Answer {
    const LIST: usize = 24;
    let block = u64::from(disk.block);
    let list = &mut disk.data()[..LIST];
    list.fill(0);
    list[..2].copy_from_slice(&(LIST as u16 - 2).to_be_bytes());
    list[2..4].copy_from_slice(&16u16.to_be_bytes());
    list[8..16].copy_from_slice(&(offset / block).to_be_bytes());
    list[16..20].copy_from_slice(&((bytes / block) as u32).to_be_bytes());
    let mut cdb = [0; 10];
    (cdb[0], cdb[8]) = (0x42, LIST as u8);
    disk.command(&cdb, Direction::Out, LIST)
}
