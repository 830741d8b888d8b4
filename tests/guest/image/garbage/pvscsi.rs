//! Owns garbage for the PVSCSI adapter: descriptors, lists, indices, commands and registers that no driver would write.
//! Promises that each piece is answered or forgotten by a reset.
//! Must not know why the adapter survives.

use super::{BYTES, NOWHERE, Ordeal, PATIENCE_SECONDS, read_write};
use crate::adapter::Adapter;
use crate::console::line;
use crate::disk::{Answer, CONTEXT};
use crate::pvscsi::{COMMAND_FAILED, Pvscsi, REQUESTS, Request, command, flag};

/// All of it.
pub fn garbage(ordeal: &mut Ordeal<'_>, lists: &mut [u8]) {
    ordeal.descriptors();
    ordeal.lists(lists);
    ordeal.indices();
    ordeal.rings();
    ordeal.commands();
    ordeal.registers();
}

impl Ordeal<'_> {
    fn pvscsi(&mut self) -> &mut Pvscsi {
        match &mut self.disk.adapter {
            Adapter::Pvscsi(adapter) => adapter,
            _ => panic!("garbage for PVSCSI with another adapter"),
        }
    }

    /// A READ of the known block, to be spoilt.
    fn read(&mut self) -> Request {
        self.request(false)
    }

    /// A READ or WRITE of the known block.
    fn request(&mut self, write: bool) -> Request {
        let mut cdb = [0; 16];
        cdb[..10].copy_from_slice(&read_write(self.disk, write));
        Request {
            context: CONTEXT,
            data_address: self.disk.data_address(),
            data_length: BYTES as u64,
            flags: if write { flag::TO_DEVICE } else { flag::TO_HOST },
            cdb,
            cdb_length: 10,
            target: self.disk.target,
            ..Request::EMPTY
        }
    }

    /// Posts a spoilt request, which must be answered, and not by GOOD if `must_fail`.
    fn post(&mut self, name: &str, request: &Request, must_fail: bool) {
        self.pvscsi().submit_raw(request);
        let answer = self.disk.answer_within(PATIENCE_SECONDS);
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
        let write = Request { data_address: NOWHERE, ..self.request(true) };
        let bad_opcode = Request {
            sense_address: NOWHERE,
            sense_length: 64,
            cdb: [0xC1; 16],
            cdb_length: 6,
            data_length: 0,
            flags: flag::NO_DATA,
            ..read
        };
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
            self.pvscsi().claim_producer(ahead);
            self.pvscsi().kick(true);
            self.pvscsi().kick(false);
            self.alive("producer that lies");
        }
        for index in [1, 1 << 16, 1 << 31, u32::MAX] {
            self.pvscsi().claim_consumer(index);
            let request = self.read();
            self.pvscsi().submit_raw(&request);
            self.pvscsi().kick(true);
            self.alive("consumer that lies");
        }
        for word in [u32::MAX, 0x8000_0000, 31] {
            self.pvscsi().scribble_state(word);
            self.pvscsi().kick(true);
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
            self.pvscsi().command(command::ADAPTER_RESET, &[]);
            let mut data = [0; 132];
            (data[0], data[1]) = (requests, completions);
            (data[2], data[3]) = (state as u32, (state >> 32) as u32);
            for pair in data[4..].chunks_exact_mut(2) {
                (pair[0], pair[1]) = (ring as u32, (ring >> 32) as u32);
            }
            self.pvscsi().begin_command(command::SETUP_RINGS, &data);
            self.pvscsi().kick(true);
            self.pvscsi().kick(false);
            self.alive(name);
        }
    }

    /// Commands that do not exist, come half, or name what is not there.
    fn commands(&mut self) {
        for number in [0, 2, 9, 11, 0x8000_0000, u32::MAX] {
            let status = self.pvscsi().command(number, &[0xFFFF_FFFF; 3]);
            self.tally.check("unknown command is refused", status == COMMAND_FAILED);
        }
        self.alive("unknown commands");
        for (number, words) in
            [(command::SETUP_RINGS, 131), (command::ABORT, 3), (command::RESET_DEVICE, 2), (7, 5), (8, 33)]
        {
            self.pvscsi().begin_command(number, &[0xFFFF_FFFF; 131][..words]);
            self.alive("command that comes half");
        }
        for (number, words) in
            [(command::ABORT, 4), (command::RESET_DEVICE, 3), (command::RESET_BUS, 0), (7, 6), (8, 34), (10, 1)]
        {
            self.pvscsi().begin_command(number, &[0xFFFF_FFFF; 34][..words]);
            self.alive("command that names nothing");
        }
        self.pvscsi().command(command::ADAPTER_RESET, &[]);
        self.pvscsi().kick(true);
        self.pvscsi().kick(false);
        self.alive("kick without rings");
    }

    fn registers(&mut self) {
        const WINDOW: u64 = 0x8000;
        for offset in (0x10..WINDOW).step_by(0x3FC) {
            self.pvscsi().read(offset);
            self.pvscsi().write(offset, 0xFFFF_FFFF);
        }
        self.alive("registers overwritten");
        let size = self.pvscsi().function.memory_bar_size(0);
        self.tally.check("BAR is sized and put back", u64::from(size) == WINDOW);
        self.alive("BAR sized");
    }
}
