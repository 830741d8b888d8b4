//! Owns the job that posts garbage: descriptors, lists, indices, commands and registers that no driver would write.
//! Promises that after each of them the adapter is reset, and that it then reads a block whose content is known.
//! Must not know why the adapter survives.

use crate::console::line;
use crate::disk::{Answer, Direction, Disk};
use crate::job::Job;
use crate::memory::Arena;
use crate::pattern;
use crate::pvscsi::{COMMAND_FAILED, REQUESTS, Request, command, flag};
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
    bench.descriptors();
    bench.lists(lists);
    bench.indices();
    bench.rings();
    bench.commands();
    bench.registers();
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

    /// A READ of the known block, to be spoilt.
    fn read(&self) -> Request {
        let mut request = self.disk.request(&read_write(self.disk, false), Direction::In);
        request.data_address = self.disk.data_address();
        request.data_length = BYTES as u64;
        request
    }

    /// Posts a spoilt request, which must be answered, and not by GOOD if `must_fail`.
    fn post(&mut self, name: &str, request: &Request, must_fail: bool) {
        let answer = self.disk.execute_within(request, PATIENCE_SECONDS);
        let fine = answer != Answer::Silence && !(must_fail && matches!(answer, Answer::Good(_)));
        if !fine {
            line!("{name}: answer={answer:?}");
        }
        self.tally.check(name, fine);
        self.alive(name);
    }

    fn descriptors(&mut self) {
        let read = self.read();
        let known = self.disk.data_address();
        let write =
            Request { flags: flag::TO_DEVICE, ..self.disk.request(&read_write(self.disk, true), Direction::Out) };
        let write = Request { data_address: NOWHERE, data_length: BYTES as u64, ..write };
        let bad_opcode = Request { sense_address: NOWHERE, ..self.disk.request(&[0xC1; 6], Direction::None) };
        for (name, request, must_fail) in [
            ("data beyond memory", Request { data_address: NOWHERE, ..read }, true),
            ("data that wraps", Request { data_address: u64::MAX - 100, ..read }, true),
            ("data in the device gap", Request { data_address: 0xFEE0_0000, ..read }, true),
            ("write from beyond memory", write, true),
            ("length without end", Request { data_length: u64::MAX, ..read }, false),
            ("length zero", Request { data_length: 0, ..read }, false),
            ("no CDB", Request { cdb_length: 0, ..read }, false),
            ("CDB longer than its field", Request { cdb_length: 255, ..read }, false),
            ("CDB out of band", Request { flags: read.flags | flag::OUT_OF_BAND_CDB, ..read }, true),
            ("both directions", Request { flags: flag::TO_HOST | flag::TO_DEVICE, ..read }, false),
            ("read without data", Request { flags: flag::NO_DATA, ..read }, false),
            ("all flags", Request { flags: u32::MAX, ..read }, true),
            ("sense beyond memory", bad_opcode, true),
            ("sense without end", Request { sense_address: known, sense_length: u32::MAX, ..bad_opcode }, true),
            ("bus that is not there", Request { bus: 9, ..read }, false),
            ("logical unit of ones", Request { lun: [0xFF; 8], ..read }, true),
            ("tag of ones", Request { tag: 0xFF, vcpu_hint: u16::MAX, reserved: [0xFF; 58], ..read }, false),
        ] {
            self.post(name, &request, must_fail);
        }
    }

    /// Scatter-gather lists: chains that loop, that end nowhere, that never describe anything.
    fn lists(&mut self, memory: &mut [u8]) {
        const CHAIN: u32 = 1;
        let start = memory.as_ptr() as u64;
        let known = self.disk.data_address();
        let mut put = |index: usize, address: u64, length: u32, flags: u32| {
            let element = &mut memory[16 * index..16 * (index + 1)];
            element[..8].copy_from_slice(&address.to_le_bytes());
            element[8..12].copy_from_slice(&length.to_le_bytes());
            element[12..].copy_from_slice(&flags.to_le_bytes());
        };
        put(0, start, 0, CHAIN); // 0: to itself
        put(16, start + 16 * 32, 0, CHAIN); // 16 and 32: to each other
        put(32, start + 16 * 16, 0, CHAIN);
        put(48, NOWHERE, 0, CHAIN); // 48: to nowhere
        put(64, known, 512, 0); // 64: a part, then beyond memory
        put(65, NOWHERE, BYTES as u32, 0);
        (80..1024).for_each(|index| put(index, known, 0, 0)); // 80: nothing, often; then whatever memory holds
        for (name, first) in
            [("chain to itself", 0), ("chains in a ring", 16), ("chain to nowhere", 48), ("part nowhere", 64)]
        {
            let request =
                Request { data_address: start + 16 * first, flags: flag::TO_HOST | flag::SG_LIST, ..self.read() };
            self.post(name, &request, true);
        }
        for (name, address) in
            [("empty parts", start + 16 * 80), ("list beyond memory", NOWHERE), ("list that wraps", u64::MAX - 7)]
        {
            let request = Request { data_address: address, flags: flag::TO_HOST | flag::SG_LIST, ..self.read() };
            self.post(name, &request, address != start + 16 * 80);
        }
    }

    /// Ring indices that lie.
    fn indices(&mut self) {
        for ahead in [REQUESTS + 1, 1 << 20, 1 << 31, u32::MAX] {
            self.disk.adapter.claim_producer(ahead);
            self.disk.adapter.kick(true);
            self.disk.adapter.kick(false);
            self.alive("producer that lies");
        }
        for index in [1, 1 << 16, 1 << 31, u32::MAX] {
            self.disk.adapter.claim_consumer(index);
            let request = self.read();
            self.disk.adapter.submit(&request);
            self.disk.adapter.kick(true);
            self.alive("consumer that lies");
        }
        for word in [u32::MAX, 0x8000_0000, 31] {
            self.disk.adapter.scribble_state(word);
            self.disk.adapter.kick(true);
            self.alive("state page overwritten");
        }
    }

    /// SETUP_RINGS with sizes and pages that cannot be.
    fn rings(&mut self) {
        let page = self.disk.data_address() >> 12;
        let nowhere = NOWHERE >> 12;
        for (name, requests, completions, state, ring) in [
            ("rings of no pages", 0, 0, page, page),
            ("rings of too many pages", 33, 33, page, page),
            ("rings without end", u32::MAX, u32::MAX, page, page),
            ("state beyond memory", 1, 1, nowhere, page),
            ("rings beyond memory", 1, 1, page, nowhere),
            ("rings at the last page number", 1, 1, page, u64::MAX),
            ("rings on one page", 1, 1, page, page),
        ] {
            self.disk.adapter.command(command::ADAPTER_RESET, &[]);
            let mut data = [0; 132];
            (data[0], data[1]) = (requests, completions);
            (data[2], data[3]) = (state as u32, (state >> 32) as u32);
            for pair in data[4..].chunks_exact_mut(2) {
                (pair[0], pair[1]) = (ring as u32, (ring >> 32) as u32);
            }
            self.disk.adapter.begin_command(command::SETUP_RINGS, &data);
            self.disk.adapter.kick(true);
            self.disk.adapter.kick(false);
            self.alive(name);
        }
    }

    /// Commands that do not exist, come half, or name what is not there.
    fn commands(&mut self) {
        for number in [0, 2, 9, 11, 0x8000_0000, u32::MAX] {
            let status = self.disk.adapter.command(number, &[0xFFFF_FFFF; 3]);
            self.tally.check("unknown command is refused", status == COMMAND_FAILED);
        }
        self.alive("unknown commands");
        for (number, words) in
            [(command::SETUP_RINGS, 131), (command::ABORT, 3), (command::RESET_DEVICE, 2), (7, 5), (8, 33)]
        {
            self.disk.adapter.begin_command(number, &[0xFFFF_FFFF; 131][..words]);
            self.alive("command that comes half");
        }
        for (number, words) in
            [(command::ABORT, 4), (command::RESET_DEVICE, 3), (command::RESET_BUS, 0), (7, 6), (8, 34), (10, 1)]
        {
            self.disk.adapter.begin_command(number, &[0xFFFF_FFFF; 34][..words]);
            self.alive("command that names nothing");
        }
        self.disk.adapter.command(command::ADAPTER_RESET, &[]);
        self.disk.adapter.kick(true);
        self.disk.adapter.kick(false);
        self.alive("kick without rings");
    }

    fn registers(&mut self) {
        const WINDOW: u64 = 0x8000;
        for offset in (0x10..WINDOW).step_by(0x3FC) {
            self.disk.adapter.read(offset);
            self.disk.adapter.write(offset, 0xFFFF_FFFF);
        }
        self.alive("registers overwritten");
        let size = self.disk.adapter.function.memory_bar_size(0);
        self.tally.check("BAR is sized and put back", u64::from(size) == WINDOW);
        self.alive("BAR sized");
    }

    /// BARs where no BAR belongs, messages to nowhere, and ones in every configuration register.
    fn configuration(&mut self) {
        let function = self.disk.adapter.function;
        for address in [0, 0x0010_0000, 0xC000_0000, 0xFEC0_0000, 0xFEE0_0000, 0xFFFF_8000] {
            function.set_memory_bar(0, address);
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
        self.disk.adapter.function.disable_msi();
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
            let request = Request { data_address: memory.as_ptr() as u64, ..self.read() };
            for context in 0..64 {
                self.disk.adapter.submit(&Request { context, ..request });
            }
            self.disk.adapter.kick(true);
            self.disk.adapter.command(command::ADAPTER_RESET, &[]);
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
