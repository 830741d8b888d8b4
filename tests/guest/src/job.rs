//! Owns the guest's job, as the kernel command line gives it.
//! Promises that a job that parses is one that can be tried, and that a word it does not know is refused by name.
//! Must not know how a job is done. (Compiled into the guest's image too: `core` only.)

use crate::pattern::Order;

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Print what the disk says about itself.
    Info,
    /// Write stamped patterns, flush, read them back and compare.
    Verify,
    /// Read and compare what an earlier job wrote.
    Check,
    /// Write only, and print what was acknowledged after each flush.
    Write,
    /// Measure rates.
    Bench,
    /// Discard a part and check what it and its neighbours then hold.
    Unmap,
    /// Only discard, and check that it then reads as zeros.
    Discard,
    /// Provoke errors and check status and sense.
    Errors,
    /// Post garbage, then show that the adapter works after a reset.
    Garbage,
    /// Count in memory for ever.
    Spin,
    /// Ask for a reset by the i8042.
    Reset,
    /// Execute an undefined instruction with no handler for it: a triple fault.
    Fault,
    /// Only end, with [`Job::status`].
    Exit,
}

/// What a bench job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Reads at random places.
    RandomRead,
    /// Writes at random places.
    RandomWrite,
}

impl Mix {
    /// The word that the command line has for it.
    pub fn name(self) -> &'static str {
        match self {
            Mix::Read => "read",
            Mix::Write => "write",
            Mix::RandomRead => "randread",
            Mix::RandomWrite => "randwrite",
        }
    }
}

/// The command that a discard job sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// UNMAP.
    Unmap,
    /// WRITE SAME (16) with UNMAP, of zeros that are not sent.
    WriteSame,
}

/// How the guest learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// By message signalled interrupts.
    Msi,
    /// By the INTx pin.
    Intx,
    /// By looking.
    Poll,
}

impl Interrupt {
    /// The word that the command line has for it.
    pub fn name(self) -> &'static str {
        match self {
            Interrupt::Msi => "msi",
            Interrupt::Intx => "intx",
            Interrupt::Poll => "poll",
        }
    }
}

/// A job. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// `job=`: what to do.
    pub task: Task,
    /// `target=`: SCSI target of the disk.
    pub target: u8,
    /// `seed=`: what patterns and orders are derived from.
    pub seed: u64,
    /// `generation=`: generation of the first pass; each pass adds one.
    pub generation: u64,
    /// `offset=`: where on the disk the job starts.
    pub offset: u64,
    /// `size=`: how much of the disk it works on; 0 is all of it.
    pub size: u64,
    /// `block=` or `bs=`: size of one request's data.
    pub block: u32,
    /// `depth=`: requests in flight.
    pub depth: u32,
    /// `pattern=sequential|random`: the order in which blocks are visited.
    pub order: Order,
    /// `passes=`: how often all blocks are visited.
    pub passes: u64,
    /// `flush=`: blocks written between two flushes; 0 is only at the end of a pass.
    pub flush: u64,
    /// `fua=0|1`: force unit access: each write is durable when it is answered, so that no flush is sent.
    pub force: bool,
    /// `rw=read|write|randread|randwrite`: what a bench does.
    pub mix: Mix,
    /// `by=unmap|writesame`: how a discard job discards.
    pub discard: Discard,
    /// `seconds=`: how long a bench runs.
    pub seconds: u32,
    /// `interrupt=msi|intx|poll`.
    pub interrupt: Interrupt,
    /// `status=`: the exit status of `job=exit`.
    pub status: u8,
}

impl Job {
    /// What a word that is not given stands for.
    pub const DEFAULT: Job = Job {
        task: Task::Info,
        target: 0,
        seed: 1,
        generation: 1,
        offset: 0,
        size: 0,
        block: 4096,
        depth: 16,
        order: Order::Random,
        passes: 1,
        flush: 0,
        force: false,
        mix: Mix::RandomRead,
        discard: Discard::Unmap,
        seconds: 3,
        interrupt: Interrupt::Msi,
        status: 0,
    };
}

/// Largest [`Job::block`]: 1 MiB.
pub const BLOCK_MAX: u32 = 1 << 20;
/// Largest [`Job::depth`]: what fits in 8 pages of request ring.
pub const DEPTH_MAX: u32 = 256;

/// A word of the command line that is refused, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobError<'text> {
    /// The word.
    pub word: &'text str,
    /// Why it is refused.
    pub cause: &'static str,
}

impl core::fmt::Display for JobError<'_> {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(out, "{:?}: {}", self.word, self.cause)
    }
}

impl<'text> JobError<'text> {
    fn new(word: &'text str, cause: &'static str) -> JobError<'text> {
        JobError { word, cause }
    }
}

impl Job {
    /// Reads a job from `key=value` words with white space between them.
    ///
    /// # Errors
    /// [`JobError`] with the first word that is unknown, malformed or out of range.
    pub fn parse(text: &str) -> Result<Job, JobError<'_>> {
        let mut job = Job::DEFAULT;
        for word in text.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or(JobError::new(word, "expected key=value"))?;
            job.take(key, value).map_err(|cause| JobError::new(word, cause))?;
        }
        Ok(job)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "job" => self.task = task(value)?,
            "target" => self.target = number(value, 0..=u64::from(u8::MAX))? as u8,
            "seed" => self.seed = number(value, 0..=u64::MAX)?,
            "generation" => self.generation = number(value, 0..=u64::MAX >> 1)?,
            "offset" => self.offset = sectors(value)?,
            "size" => self.size = sectors(value)?,
            "block" | "bs" => self.block = in_sectors(number(value, 512..=u64::from(BLOCK_MAX))?)? as u32,
            "depth" => self.depth = number(value, 1..=u64::from(DEPTH_MAX))? as u32,
            "pattern" => self.order = order(value)?,
            "passes" => self.passes = number(value, 1..=1_000_000)?,
            "flush" => self.flush = number(value, 0..=u64::MAX)?,
            "fua" => self.force = number(value, 0..=1)? == 1,
            "rw" => self.mix = mix(value)?,
            "by" => self.discard = discard(value)?,
            "seconds" => self.seconds = number(value, 1..=3600)? as u32,
            "interrupt" => self.interrupt = interrupt(value)?,
            "status" => self.status = number(value, 0..=u64::from(u8::MAX))? as u8,
            _ => return Err("unknown key"),
        }
        Ok(())
    }
}

/// A number with an optional suffix k, m or g (powers of 1024), in `range`.
fn number(text: &str, range: core::ops::RangeInclusive<u64>) -> Result<u64, &'static str> {
    let shift = match text.as_bytes().last().map(u8::to_ascii_lowercase) {
        Some(b'k') => 10,
        Some(b'm') => 20,
        Some(b'g') => 30,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    let number: u64 = digits.parse().map_err(|_| "expected a number")?;
    let number = number.checked_mul(1 << shift).ok_or("the number is too large")?;
    if range.contains(&number) { Ok(number) } else { Err("the number is out of range") }
}

/// A size as a job's words have it: a number of bytes with an optional suffix, a multiple of 512.
///
/// # Errors
/// Why it is none.
pub fn sectors(text: &str) -> Result<u64, &'static str> {
    in_sectors(number(text, 0..=u64::MAX >> 1)?)
}

fn in_sectors(bytes: u64) -> Result<u64, &'static str> {
    if bytes.is_multiple_of(512) { Ok(bytes) } else { Err("expected a multiple of 512") }
}

fn task(text: &str) -> Result<Task, &'static str> {
    Ok(match text {
        "info" => Task::Info,
        "verify" => Task::Verify,
        "check" => Task::Check,
        "write" => Task::Write,
        "bench" => Task::Bench,
        "unmap" => Task::Unmap,
        "discard" => Task::Discard,
        "errors" => Task::Errors,
        "garbage" => Task::Garbage,
        "spin" => Task::Spin,
        "reset" => Task::Reset,
        "fault" => Task::Fault,
        "exit" => Task::Exit,
        _ => return Err("unknown job"),
    })
}

fn order(text: &str) -> Result<Order, &'static str> {
    match text {
        "sequential" => Ok(Order::Sequential),
        "random" => Ok(Order::Random),
        _ => Err("expected sequential or random"),
    }
}

fn mix(text: &str) -> Result<Mix, &'static str> {
    let all = [Mix::Read, Mix::Write, Mix::RandomRead, Mix::RandomWrite];
    all.into_iter().find(|mix| mix.name() == text).ok_or("expected read, write, randread or randwrite")
}

fn discard(text: &str) -> Result<Discard, &'static str> {
    match text {
        "unmap" => Ok(Discard::Unmap),
        "writesame" => Ok(Discard::WriteSame),
        _ => Err("expected unmap or writesame"),
    }
}

fn interrupt(text: &str) -> Result<Interrupt, &'static str> {
    let all = [Interrupt::Msi, Interrupt::Intx, Interrupt::Poll];
    all.into_iter().find(|interrupt| interrupt.name() == text).ok_or("expected msi, intx or poll")
}
