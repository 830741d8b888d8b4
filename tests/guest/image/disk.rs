//! Owns a disk behind the adapter: single SCSI commands, and streams of reads and writes with many in flight.
//! Promises that each answer is checked: status, sense and the count of bytes.
//! Must not know what a job does with the data.

pub use crate::adapter::Direction;
use crate::adapter::{Adapter, Completion, Data, LIST_BYTES, PARTS_MAX, Request};
use crate::cpu::{self, Clock};
use crate::job::DEPTH_MAX;
use crate::memory::{Arena, OutOfMemory};

/// How long a command may take, in seconds.
const LIMIT_SECONDS: u32 = 240;
const SENSE_BYTES: usize = 64;
const PAGE: usize = 4096;
/// The context of single commands.
pub const CONTEXT: u64 = u64::MAX;
/// The bit FUA in byte 1 of WRITE (10) and WRITE (16) (SBC-3).
const FORCE_UNIT_ACCESS: u8 = 0x08;
/// Size of the buffer for single commands.
pub const COMMAND_BUFFER: usize = 64 << 10;

/// Sense key, additional code and qualifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense(pub u8, pub u8, pub u8);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// GOOD, with the number of bytes moved.
    Good(u64),
    /// CHECK CONDITION.
    Check(Sense),
    /// The adapter's own status (host status), or another SCSI status.
    Other { host: u16, scsi: u16 },
    /// No completion came.
    Silence,
}

impl Answer {
    fn of(completion: &Completion, sense: &[u8]) -> Answer {
        const CHECK_CONDITION: u16 = 2;
        let has_sense = completion.sense_length >= 14 && sense[0] & 0x7F == 0x70;
        match (completion.host_status, completion.scsi_status) {
            (0, 0) => Answer::Good(completion.data_length),
            (_, CHECK_CONDITION) if has_sense => Answer::Check(Sense(sense[2] & 0xF, sense[12], sense[13])),
            (host, scsi) => Answer::Other { host, scsi },
        }
    }
}

/// A read or a write of a stream; offset and length are bytes, multiples of the logical block.
#[derive(Clone, Copy)]
pub struct Transfer {
    pub write: bool,
    pub offset: u64,
    pub length: u32,
    /// Describe the buffer by a scatter-gather list of several parts, instead of by its address.
    pub scatter: bool,
}

/// Where a stream gets its transfers from, and where they go when done.
pub trait Work {
    /// The next transfer; for a write, its data is put into `buffer`. `None` ends the stream.
    fn next(&mut self, buffer: &mut [u8]) -> Option<Transfer>;
    /// Takes a transfer that is done; `buffer` holds its data, `ticks` is what it took.
    fn done(&mut self, transfer: &Transfer, buffer: &[u8], ticks: u64);
}

/// One transfer in flight, or room for one.
struct Slot {
    buffer: &'static mut [u8],
    /// A page of sense and scatter-gather lists.
    lists: &'static mut [u8],
    flying: Option<(Transfer, u64)>,
}

/// A disk.
pub struct Disk {
    pub adapter: Adapter,
    pub clock: Clock,
    pub target: u8,
    /// Bytes in a logical block.
    pub block: u32,
    /// Bytes on the disk.
    pub capacity: u64,
    /// Writes of streams are forced: durable when they are answered.
    pub force: bool,
    command_buffer: &'static mut [u8],
    sense: &'static mut [u8],
}

impl Disk {
    /// The disk at `target`; [`Self::measure`] finds out how large it is.
    pub fn new(adapter: Adapter, clock: Clock, target: u8, arena: &mut Arena) -> Result<Disk, OutOfMemory> {
        let command_buffer = arena.take(COMMAND_BUFFER)?;
        let sense = arena.take(PAGE)?;
        Ok(Disk { adapter, clock, target, block: 512, capacity: 0, force: false, command_buffer, sense })
    }

    /// Clears unit attentions and asks for the capacity.
    pub fn measure(&mut self) -> Result<(), Answer> {
        const TRIES: u32 = 4;
        for _ in 0..TRIES {
            match self.command(&[0; 6], Direction::None, 0) {
                Answer::Check(Sense(6, _, _)) => {}
                _ => break,
            }
        }
        const INVALID_OPCODE: Answer = Answer::Check(Sense(5, 0x20, 0));
        let long = if self.has_short_cdbs() { INVALID_OPCODE } else { self.read_capacity() };
        // Where the adapter has no room for it, or a CD-ROM drive does not know it.
        let short = long == INVALID_OPCODE;
        let answer = match short {
            true => self.command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], Direction::In, 8), // READ CAPACITY(10)
            false => long,
        };
        match answer {
            Answer::Good(bytes) if bytes >= if short { 8 } else { 12 } => {}
            answer => return Err(answer),
        }
        let word =
            |reply: &[u8], at: usize| u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]]);
        let reply = self.data();
        let (last, block) = match short {
            true => (u64::from(word(reply, 0)), word(reply, 4)),
            false => (u64::from(word(reply, 0)) << 32 | u64::from(word(reply, 4)), word(reply, 8)),
        };
        self.block = block;
        self.capacity = last.saturating_add(1).saturating_mul(u64::from(self.block));
        Ok(())
    }

    /// Are CDBs of 16 bytes longer than the adapter takes?
    pub fn has_short_cdbs(&self) -> bool {
        self.adapter.longest_cdb() < 16
    }

    /// READ CAPACITY(16).
    fn read_capacity(&mut self) -> Answer {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (0x9E, 0x10, 32);
        self.command(&cdb, Direction::In, 32)
    }

    /// Does the disk take UNMAP, and do unmapped blocks read as zeros? By READ CAPACITY(16), or by the page of logical block
    /// provisioning where that is too long.
    pub fn provisioning(&mut self) -> Result<(bool, bool), Answer> {
        let (answer, enough) = match self.has_short_cdbs() {
            true => (self.command(&[0x12, 1, 0xB2, 0, 64, 0], Direction::In, 64), 8),
            false => (self.read_capacity(), 32),
        };
        match answer {
            Answer::Good(bytes) if bytes >= enough => {}
            answer => return Err(answer),
        }
        let (byte, zeros) = if self.has_short_cdbs() { (self.data()[5], 0x1C) } else { (self.data()[14], 0x40) };
        Ok((byte & 0x80 != 0, byte & zeros != 0))
    }

    /// Address of what a single command moves.
    pub fn data_address(&self) -> u64 {
        self.command_buffer.as_ptr() as u64
    }

    /// What a single command moves; fill it before, read it afterwards.
    pub fn data(&mut self) -> &mut [u8] {
        self.command_buffer
    }

    /// Does one command with `length` bytes of [`Self::data`] and waits for its end.
    pub fn command(&mut self, cdb: &[u8], direction: Direction, length: usize) -> Answer {
        let mut request = self.request(cdb, direction);
        if length > 0 {
            request.data = Data::whole(self.data_address(), length as u32);
        }
        self.execute(&request)
    }

    /// A request with `cdb` for this disk, with room for sense and without data yet.
    pub fn request(&self, cdb: &[u8], direction: Direction) -> Request {
        let mut request = Request {
            context: 0,
            target: self.target,
            lun: 0,
            cdb: [0; 16],
            cdb_length: cdb.len() as u8,
            direction,
            data: Data::NONE,
            lists: self.sense.as_ptr() as u64 + (PAGE - LIST_BYTES) as u64,
            sense_address: self.sense.as_ptr() as u64,
            sense_length: SENSE_BYTES as u8,
        };
        request.cdb[..cdb.len()].copy_from_slice(cdb);
        request
    }

    /// Sends `request` under a context of its own and waits for its end.
    pub fn execute(&mut self, request: &Request) -> Answer {
        self.sense[..SENSE_BYTES].fill(0);
        if !self.adapter.submit(&Request { context: CONTEXT, ..*request }) {
            return Answer::Silence;
        }
        self.answer_within(LIMIT_SECONDS)
    }

    /// Kicks, and waits at most `seconds` for the answer to a request that was submitted under [`CONTEXT`].
    pub fn answer_within(&mut self, seconds: u32) -> Answer {
        self.adapter.kick(false);
        let deadline = cpu::ticks() + self.clock.ticks_of_seconds(seconds);
        while let Some(completion) = self.adapter.wait(deadline) {
            if completion.context == CONTEXT {
                return Answer::of(&completion, self.sense);
            }
        }
        Answer::Silence
    }

    fn deadline(&self) -> u64 {
        cpu::ticks() + self.clock.ticks_of_seconds(LIMIT_SECONDS)
    }

    /// SYNCHRONIZE CACHE(10) of the whole disk.
    pub fn flush(&mut self) -> Answer {
        let mut cdb = [0; 10];
        cdb[0] = 0x35;
        self.command(&cdb, Direction::None, 0)
    }

    fn transfer_request(&self, transfer: &Transfer, slot: &Slot, context: u64) -> Request {
        let direction = if transfer.write { Direction::Out } else { Direction::In };
        let (mut cdb, length) = transfer_cdb(transfer, self.block);
        if transfer.write && self.force {
            cdb[1] |= FORCE_UNIT_ACCESS;
        }
        let mut request = self.request(&cdb[..length], direction);
        request.context = context;
        let buffer = slot.buffer.as_ptr() as u64;
        request.data =
            if transfer.scatter { scatter(buffer, transfer.length) } else { Data::whole(buffer, transfer.length) };
        request.sense_address = slot.lists.as_ptr() as u64;
        request.lists = request.sense_address + (PAGE - LIST_BYTES) as u64;
        request
    }

    /// Does all transfers of `work`, as many at a time as there are slots.
    ///
    /// The first answer that is not GOOD, or moves another number of bytes than asked for, ends the stream: nothing new
    /// is sent, what is in flight is waited for, and the answer is returned.
    pub fn stream(&mut self, slots: &mut Slots, work: &mut impl Work) -> Result<(), Answer> {
        let slots = &mut slots.0;
        let mut trouble = None;
        let mut exhausted = false;
        let mut flying = 0;
        loop {
            let mut sent = false;
            for (context, slot) in slots.iter_mut().flatten().enumerate() {
                if exhausted || trouble.is_some() || slot.flying.is_some() {
                    continue;
                }
                let Some(transfer) = work.next(slot.buffer) else {
                    exhausted = true;
                    break;
                };
                let request = self.transfer_request(&transfer, slot, context as u64);
                if self.adapter.submit(&request) {
                    slot.flying = Some((transfer, cpu::ticks()));
                    flying += 1;
                    sent = true;
                } else {
                    trouble = Some(Answer::Silence);
                }
            }
            if sent {
                self.adapter.kick(true);
            }
            if flying == 0 {
                return trouble.map_or(Ok(()), Err);
            }
            let mut next = self.adapter.wait(self.deadline());
            if next.is_none() {
                return Err(Answer::Silence);
            }
            while let Some(completion) = next {
                flying -= usize::from(reap(slots, &completion, work, &mut trouble));
                next = self.adapter.poll();
            }
        }
    }
}

/// Hands a completion to its slot; false if it belongs to none.
fn reap(
    slots: &mut [Option<Slot>],
    completion: &Completion,
    work: &mut impl Work,
    trouble: &mut Option<Answer>,
) -> bool {
    let slot = usize::try_from(completion.context).ok().and_then(|context| slots.get_mut(context)?.as_mut());
    let Some((slot, (transfer, since))) = slot.and_then(|slot| slot.flying.take().map(|flying| (slot, flying))) else {
        trouble.get_or_insert(Answer::Other { host: u16::MAX, scsi: u16::MAX });
        return false;
    };
    match Answer::of(completion, slot.lists) {
        Answer::Good(bytes) if bytes == u64::from(transfer.length) => {
            work.done(&transfer, slot.buffer, cpu::ticks() - since);
        }
        answer => {
            trouble.get_or_insert(answer);
        }
    }
    true
}

/// Buffers for a stream.
pub struct Slots([Option<Slot>; DEPTH_MAX as usize]);

impl Slots {
    /// `depth` slots with buffers of `block` bytes.
    pub fn new(depth: u32, block: u32, arena: &mut Arena) -> Result<Slots, OutOfMemory> {
        let mut slots = [const { None }; DEPTH_MAX as usize];
        for slot in slots.iter_mut().take(depth as usize) {
            *slot = Some(Slot { buffer: arena.take(block as usize)?, lists: arena.take(PAGE)?, flying: None });
        }
        Ok(Slots(slots))
    }
}

/// READ or WRITE, of 10 bytes where that reaches, else of 16.
fn transfer_cdb(transfer: &Transfer, block: u32) -> ([u8; 16], usize) {
    let (lba, count) = (transfer.offset / u64::from(block), transfer.length / block);
    let mut cdb = [0; 16];
    if let (Ok(lba), Ok(count)) = (u32::try_from(lba), u16::try_from(count)) {
        cdb[0] = if transfer.write { 0x2A } else { 0x28 };
        cdb[2..6].copy_from_slice(&lba.to_be_bytes());
        cdb[7..9].copy_from_slice(&count.to_be_bytes());
        return (cdb, 10);
    }
    cdb[0] = if transfer.write { 0x8A } else { 0x88 };
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&count.to_be_bytes());
    (cdb, 16)
}

/// The first `length` bytes of a buffer in uneven parts: a sixteenth, two sixteenths and so on; the last one takes the rest.
fn scatter(buffer: u64, length: u32) -> Data {
    let mut data = Data::NONE;
    let mut at = 0;
    for part in 1..=PARTS_MAX as u32 {
        let bytes = if part == PARTS_MAX as u32 { length - at } else { length / 16 * part };
        data.push(buffer + u64::from(at), bytes);
        at += bytes;
    }
    data
}
