//! Owns garbage for the LSI Logic adapter: frames, lists, handshakes and registers that no driver would write.
//! Promises that each piece is answered, faults the adapter, or is forgotten by a reset.
//! Must not know why the adapter survives.

use super::{BYTES, NOWHERE, Ordeal, read_write};
use crate::adapter::Adapter;
use crate::console::line;
use crate::lsilogic::{LsiLogic, register};
use crate::pattern;

/// A request frame.
type Frame = [u8; 128];

/// All of it.
pub fn garbage(ordeal: &mut Ordeal<'_>, lists: &mut [u8]) {
    ordeal.spoilt_frames();
    ordeal.spoilt_lists(lists);
    ordeal.lost_frames();
    ordeal.handshakes();
    ordeal.random_frames();
    ordeal.window();
}

fn put(frame: &mut Frame, offset: usize, value: u32) {
    frame[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

impl Ordeal<'_> {
    fn lsilogic(&mut self) -> &mut LsiLogic {
        match &mut self.disk.adapter {
            Adapter::LsiLogic(adapter) => adapter,
            _ => panic!("garbage for LSI Logic with another adapter"),
        }
    }

    /// A READ of the known block, to be spoilt.
    fn frame(&mut self) -> Frame {
        let mut frame = [0; 128];
        (frame[0], frame[4], frame[5]) = (self.disk.target, 10, 64);
        frame[0x18..0x22].copy_from_slice(&read_write(self.disk, false));
        put(&mut frame, 0x14, 2 << 24);
        put(&mut frame, 0x28, BYTES as u32);
        put(&mut frame, 0x30, 0xD1 << 24 | BYTES as u32);
        put(&mut frame, 0x34, self.disk.data_address() as u32);
        frame
    }

    /// Posts a spoilt frame, which must be replied to by a message if `must_fail`.
    fn post_frame(&mut self, name: &str, frame: &Frame, must_fail: bool) {
        const LOOKS: u32 = 10_000_000;
        self.lsilogic().post(0, frame);
        let adapter = self.lsilogic();
        let reply = (0..LOOKS).map(|_| adapter.read(register::REPLY_FIFO)).find(|reply| *reply != u32::MAX);
        let fine = reply.is_some_and(|reply| !must_fail || reply >> 31 == 1);
        if !fine {
            line!("{name}: reply={reply:?}");
        }
        self.tally.check(name, fine);
        self.alive(name);
    }

    fn spoilt_frames(&mut self) {
        let good = self.frame();
        let mut post = |name: &str, must_fail: bool, spoil: &dyn Fn(&mut Frame)| {
            let mut frame = good;
            spoil(&mut frame);
            self.post_frame(name, &frame, must_fail);
        };
        post("a good frame", false, &|_| {});
        post("data beyond memory", true, &|frame| put(frame, 0x34, 0xFFFF_F000));
        post("data in the device gap", true, &|frame| put(frame, 0x34, 0xFEE0_0000));
        post("length without end", true, &|frame| put(frame, 0x28, u32::MAX));
        post("length zero", true, &|frame| put(frame, 0x28, 0));
        post("no CDB", true, &|frame| frame[4] = 0);
        post("CDB longer than its field", true, &|frame| frame[4] = 255);
        post("direction that is none", true, &|frame| put(frame, 0x14, 3 << 24));
        post("attribute that is none", true, &|frame| put(frame, 0x14, 2 << 24 | 7 << 8));
        post("bus that is not there", true, &|frame| frame[1] = 9);
        post("target out of range", true, &|frame| frame[0] = 200);
        post("logical unit of ones", true, &|frame| frame[0x0C..0x14].fill(0xFF));
        post("context of ones", true, &|frame| put(frame, 0x08, u32::MAX));
        post("chain outside of the frame", false, &|frame| frame[2] = 255);
        post("transaction element", true, &|frame| put(frame, 0x30, 0x81 << 24 | BYTES as u32));
        post("sense beyond memory", true, &|frame| {
            frame[0x18] = 0xC1;
            put(frame, 0x2C, 0xFFFF_FFF0);
        });
        for function in [0x02, 0x09, 0x0A, 0x15, 0x17, 0x7F, 0xFF] {
            post("function of another kind", true, &|frame| frame[3] = function);
        }
        post("page into nowhere", true, &|frame| {
            (frame[0], frame[3]) = (1, 4);
            put(frame, 0x14, 0x0903_0000);
            put(frame, 0x1C, 0xD3 << 24 | 0xFF);
            put(frame, 0x20, NOWHERE as u32);
            put(frame, 0x24, (NOWHERE >> 32) as u32);
        });
    }

    /// Lists whose chains loop, end nowhere, or never describe anything.
    fn spoilt_lists(&mut self, memory: &mut [u8]) {
        let start = memory.as_ptr() as u32;
        let mut element = |index: usize, head: u32, address: u32| {
            memory[8 * index..8 * index + 4].copy_from_slice(&head.to_le_bytes());
            memory[8 * index + 4..8 * index + 8].copy_from_slice(&address.to_le_bytes());
        };
        let chain = 0x30 << 24 | 64;
        element(0, chain, start); // 0: to itself
        element(8, chain, start + 8 * 16); // 8 and 16: to each other
        element(16, chain, start + 8 * 8);
        element(24, chain, 0xFFFF_F000); // 24: to nowhere
        element(32, 0x90 << 24 | 512, start); // 32: the last of its segment, and no chain
        (40..2000).for_each(|index| element(index, 0x10 << 24, start)); // 40: nothing, often; then what memory holds
        for (name, first) in [
            ("chain to itself", 0),
            ("chains in a ring", 8),
            ("chain to nowhere", 24),
            ("list too short", 32),
            ("empty parts", 40),
        ] {
            let mut frame = self.frame();
            put(&mut frame, 0x30, chain);
            put(&mut frame, 0x34, start + 8 * first);
            self.post_frame(name, &frame, true);
        }
    }

    /// Frames where there is no memory: the adapter must fault, and come back.
    fn lost_frames(&mut self) {
        const LOOKS: u32 = 10_000_000;
        const FAULT: u32 = 4;
        for address in [0xFFFF_F000, 0xFEE0_0000, 0xC000_0000] {
            let adapter = self.lsilogic();
            adapter.write(register::REQUEST_FIFO, address);
            let faulted = (0..LOOKS).any(|_| adapter.read(register::DOORBELL) >> 28 == FAULT);
            self.tally.check("a frame outside memory is a fault", faulted);
            self.alive("frame outside memory");
        }
        for address in [0xFFFF_F000u32, 0xC000_0000] {
            // All frames that the adapter has are lost ones.
            let adapter = self.lsilogic();
            adapter.write(register::DOORBELL, 0x40 << 24);
            (0..2000).for_each(|_| adapter.write(register::REPLY_FIFO, address));
            let mut reply = [0; 64];
            adapter.handshake(&[0x0200_0004, 0x0001_1000, 0, 80, 0, 0], &mut reply);
            let mut frame = self.frame();
            frame[0] = 200;
            let adapter = self.lsilogic();
            adapter.post(0, &frame);
            let faulted = (0..LOOKS).any(|_| adapter.read(register::DOORBELL) >> 28 == FAULT);
            self.tally.check("a reply frame outside memory is a fault", faulted);
            self.alive("reply frame outside memory");
        }
        for _ in 0..3000 {
            self.lsilogic().write(register::REQUEST_FIFO, 0xFFFF_F000);
        }
        self.alive("more frames than the FIFO holds");
    }

    /// Handshakes that are too long, too short, broken off, or full of ones.
    fn handshakes(&mut self) {
        for words in [0, 1, 3, 33, 64, 255] {
            for sent in [0, 1, words, words + 40] {
                let adapter = self.lsilogic();
                adapter.write(register::DOORBELL, 0x42 << 24 | words << 16);
                (0..sent).for_each(|_| adapter.write(register::DOORBELL, u32::MAX));
                adapter.read(register::DOORBELL);
            }
            self.alive("handshake that is none");
        }
    }

    /// Frames of random bytes, many with a known function.
    fn random_frames(&mut self) {
        let mut random = self.job.seed;
        for _ in 0..40 {
            for index in 0..32 {
                let mut frame = [0; 128];
                for byte in &mut frame {
                    random = pattern::mix(random);
                    *byte = random as u8;
                }
                // Data and pages go where nothing is: frames of this driver are not to be hit by chance.
                (frame[3], frame[7]) = (frame[3] & 0x0F, 0);
                put(&mut frame, 0x24, 0xFFFF_FFFF);
                put(&mut frame, 0x2C, 0xFFFF_0000);
                put(&mut frame, 0x34, 0xFFFF_0000);
                frame[0x33] = 0xD1;
                frame[0x1F] = 0xD3;
                // Not a command that changes the known block.
                frame[0x18] = 0x28;
                self.lsilogic().post(index, &frame);
            }
            self.alive("random frames");
        }
    }

    fn window(&mut self) {
        const WINDOW: u64 = 0x2_0000;
        for offset in (0x48..WINDOW).step_by(0x7FC) {
            self.lsilogic().read(offset);
            self.lsilogic().write(offset, u32::MAX);
        }
        for offset in (0..0x48).step_by(4) {
            self.lsilogic().write(offset, u32::MAX);
            self.lsilogic().write(offset, 0);
        }
        self.alive("registers overwritten");
        let size = self.lsilogic().function.memory_bar_size(1);
        self.tally.check("BAR is sized and put back", u64::from(size) == WINDOW);
        self.alive("BAR sized");
    }
}
