//! Owns the jobs that send single commands: what the disk says about itself, and errors that must have the right sense.
//! Promises one check for each promise of the adapter or the disk.
//! Must not know rings or registers.

use crate::Tally;
use crate::adapter::{Request, SELECTION_TIMEOUT};
use crate::console::line;
use crate::disk::{Answer, Direction, Disk, Sense};

const INVALID_FIELD: Answer = Answer::Check(Sense(5, 0x24, 0));
const INVALID_OPCODE: Answer = Answer::Check(Sense(5, 0x20, 0));
const OUT_OF_RANGE: Answer = Answer::Check(Sense(5, 0x21, 0));

/// INQUIRY, of the standard data or of a vital product data page.
fn inquiry(page: Option<u8>, length: u8) -> [u8; 6] {
    [0x12, u8::from(page.is_some()), page.unwrap_or(0), 0, length, 0]
}

/// ASCII of a reply, with anything else as dots.
struct Text<'reply>(&'reply [u8]);

impl core::fmt::Display for Text<'_> {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        use core::fmt::Write;
        self.0.iter().try_for_each(|byte| out.write_char(if (0x20..0x7F).contains(byte) { *byte as char } else { '.' }))
    }
}

/// Prints bytes in hexadecimal.
struct Hex<'reply>(&'reply [u8]);

impl core::fmt::Display for Hex<'_> {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

/// `job=info`.
pub fn info(disk: &mut Disk, tally: &mut Tally) {
    let answer = disk.command(&inquiry(None, 36), Direction::In, 36);
    tally.check("inquiry", answer == Answer::Good(36));
    let reply = &disk.data()[..36];
    line!(
        "inquiry type={} version={} vendor=\"{}\" product=\"{}\" revision=\"{}\"",
        reply[0],
        reply[2],
        Text(&reply[8..16]),
        Text(&reply[16..32]),
        Text(&reply[32..36])
    );
    line!("capacity_bytes={} block_bytes={}", disk.capacity, disk.block);
    let answer = disk.command(&inquiry(Some(0), 255), Direction::In, 255);
    let Answer::Good(length) = answer else { return tally.check("list of product data pages", false) };
    tally.check("list of product data pages", length >= 4);
    let mut pages = [0; 32];
    let listed = usize::from(disk.data()[3]).min(pages.len()).min((length as usize).saturating_sub(4));
    pages[..listed].copy_from_slice(&disk.data()[4..4 + listed]);
    for page in &pages[..listed] {
        let answer = disk.command(&inquiry(Some(*page), 255), Direction::In, 255);
        let Answer::Good(length) = answer else { return tally.check("product data page", false) };
        tally.check("product data page", disk.data()[1] == *page);
        let reply = &disk.data()[..length.min(64) as usize];
        if *page == 0x80 {
            line!("serial=\"{}\"", Text(&reply[4.min(reply.len())..]));
        } else {
            line!("page={page:02x} bytes={}", Hex(reply));
        }
    }
    let answer = disk.command(&[0x1A, 0, 0x3F, 0, 255, 0], Direction::In, 255);
    let Answer::Good(length @ 4..) = answer else { return tally.check("mode pages", false) };
    tally.check("mode pages", true);
    line!("readonly={} mode={}", disk.data()[2] >> 7, Hex(&disk.data()[..length.min(64) as usize]));
}

/// A READ or WRITE, with how many bytes of it count.
struct ReadWrite([u8; 16], usize);

impl core::ops::Deref for ReadWrite {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0[..self.1]
    }
}

/// READ(16) or WRITE(16) at a logical block; with `short`, READ(12) or WRITE(12), whose highest address is another.
fn read_write(short: bool, write: bool, lba: u64, blocks: u32) -> ReadWrite {
    let mut cdb = [0; 16];
    if short {
        cdb[0] = if write { 0xAA } else { 0xA8 };
        cdb[2..6].copy_from_slice(&u32::try_from(lba).unwrap_or(u32::MAX).to_be_bytes());
        cdb[6..10].copy_from_slice(&blocks.to_be_bytes());
        return ReadWrite(cdb, 12);
    }
    cdb[0] = if write { 0x8A } else { 0x88 };
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    ReadWrite(cdb, 16)
}

/// `job=errors`.
pub fn errors(disk: &mut Disk, tally: &mut Tally) {
    let blocks = disk.capacity / u64::from(disk.block);
    let one = disk.block as usize;
    let short = disk.has_short_cdbs();
    let read_write = |write, lba, blocks| read_write(short, write, lba, blocks);
    let mut expect = |name: &str, disk: &mut Disk, cdb: &[u8], direction, length, expected: Answer| {
        let answer = disk.command(cdb, direction, length);
        if answer != expected {
            line!("{name}: expected={expected:?} answer={answer:?}");
        }
        tally.check(name, answer == expected);
    };
    let (into, out, none) = (Direction::In, Direction::Out, Direction::None);
    expect("read at the end", disk, &read_write(false, blocks, 1), into, one, OUT_OF_RANGE);
    expect("read across the end", disk, &read_write(false, blocks - 1, 2), into, 2 * one, OUT_OF_RANGE);
    expect("read at the last address", disk, &read_write(false, u64::MAX, 1), into, one, OUT_OF_RANGE);
    expect("write at the end", disk, &read_write(true, blocks, 1), out, one, OUT_OF_RANGE);
    expect("the last block", disk, &read_write(false, blocks - 1, 1), into, one, Answer::Good(one as u64));
    expect("no blocks", disk, &read_write(false, 0, 0), none, 0, Answer::Good(0));
    expect("unknown opcode", disk, &[0xC1, 0, 0, 0, 0, 0], none, 0, INVALID_OPCODE);
    expect("inquiry with page but no EVPD", disk, &[0x12, 0, 0x80, 0, 36, 0], into, 36, INVALID_FIELD);
    expect("unknown product data page", disk, &inquiry(Some(0xEE), 36), into, 36, INVALID_FIELD);
    expect("unknown mode page", disk, &[0x1A, 0, 0x2F, 0, 36, 0], into, 36, INVALID_FIELD);
    expect("short inquiry", disk, &inquiry(None, 5), into, 5, Answer::Good(5));
    expect("unit is ready", disk, &[0; 6], none, 0, Answer::Good(0));
    let generous = disk.command(&inquiry(None, 255), into, 255);
    tally.check("inquiry into a generous buffer", matches!(generous, Answer::Good(36..255)));
    absent(disk, tally);
    completion_ring_full(disk, tally);
}

/// Targets and logical units that are not there.
fn absent(disk: &mut Disk, tally: &mut Tally) {
    let target = disk.target;
    for (name, absent) in [("absent target", 15), ("the adapter's own target", 7), ("target out of range", 200)] {
        let request = Request { target: absent, ..disk.request(&[0; 6], Direction::None) };
        let answer = disk.execute(&request);
        tally.check(name, matches!(answer, Answer::Other { host: SELECTION_TIMEOUT, .. }) && absent != target);
    }
    let request = Request { lun: 1, ..disk.request(&[0; 6], Direction::None) };
    let answer = disk.execute(&request);
    tally.check("absent logical unit", !matches!(answer, Answer::Good(_) | Answer::Silence));
}

/// More failing requests than the adapter has room to answer while nobody takes completions: the rest must wait, not be lost.
fn completion_ring_full(disk: &mut Disk, tally: &mut Tally) {
    const MOST: usize = 512;
    let wanted = disk.adapter.patience().min(MOST as u32);
    let request = disk.request(&[0xC1; 6], Direction::None);
    let mut sent = 0;
    let mut deadline = crate::cpu::ticks() + disk.clock.ticks_of_seconds(120);
    while sent < wanted && crate::cpu::ticks() < deadline {
        // There is room again as the adapter takes requests; completions are left where they are.
        if disk.adapter.submit(&Request { context: u64::from(sent), ..request }) {
            sent += 1;
        } else {
            disk.adapter.kick(false);
        }
    }
    disk.adapter.kick(false);
    tally.check("requests are taken while completions wait", sent == wanted);
    let mut seen = [false; MOST];
    deadline = crate::cpu::ticks() + disk.clock.ticks_of_seconds(120);
    let mut answered = 0;
    while answered < sent {
        let Some(completion) = disk.adapter.wait(deadline) else { break };
        if let Some(seen) = seen.get_mut(completion.context as usize) {
            answered += u32::from(!core::mem::replace(seen, true));
        }
        disk.adapter.kick(false);
    }
    line!("completion_ring_full sent={sent} answered={answered}");
    tally.check("no completion is lost or doubled", answered == sent && disk.adapter.poll().is_none());
}
