//! Owns garbage for the BusLogic adapter: CCBs, lists, mailboxes, commands and registers that no driver would write.
//! Promises that each piece is answered, stops the mailboxes, or is forgotten by a reset.
//! Must not know why the adapter survives.

use super::{BYTES, Ordeal, read_write};
use crate::adapter::Adapter;
use crate::buslogic::{BusLogic, CCB_BYTES, MAILBOXES, register};
use crate::console::line;
use crate::pattern;

/// A CCB.
type Ccb = [u8; CCB_BYTES];

/// How often an incoming mailbox is looked at before it is given up.
const LOOKS: u32 = 100_000_000;
const SUCCESS: u8 = 1;

/// All of it.
pub fn garbage(ordeal: &mut Ordeal<'_>, lists: &mut [u8]) {
    ordeal.spoilt_ccbs(lists);
    ordeal.lost_ccbs();
    ordeal.spoilt_mailboxes();
    ordeal.all_commands();
    ordeal.random_ccbs();
    ordeal.byte_window();
}

fn put(ccb: &mut Ccb, offset: usize, value: u32) {
    ccb[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

impl Ordeal<'_> {
    fn buslogic(&mut self) -> &mut BusLogic {
        match &mut self.disk.adapter {
            Adapter::BusLogic(adapter) => adapter,
            _ => panic!("garbage for BusLogic with another adapter"),
        }
    }

    /// A READ of the known block, to be spoilt.
    fn ccb(&mut self) -> Ccb {
        let mut ccb = [0; CCB_BYTES];
        (ccb[0x01], ccb[0x02], ccb[0x03], ccb[0x10]) = (1 << 3, 10, 1, self.disk.target);
        ccb[0x12..0x1C].copy_from_slice(&read_write(self.disk, false));
        put(&mut ccb, 0x04, BYTES as u32);
        put(&mut ccb, 0x08, self.disk.data_address() as u32);
        ccb
    }

    /// Sends an address and waits for what comes back: the completion code, or 0 if nothing does.
    fn send(&mut self, address: u32, action: u8) -> u8 {
        let adapter = self.buslogic();
        adapter.send(address, action);
        adapter.kick();
        (0..LOOKS).find_map(|_| adapter.take()).map_or(0, |(_, code)| code)
    }

    fn spoilt_ccbs(&mut self, lists: &mut [u8]) {
        let list = lists.as_ptr() as u32;
        for (element, [length, address]) in lists.chunks_exact_mut(8).zip([[512, 0xFFFF_F000u32], [u32::MAX, list]]) {
            element[..4].copy_from_slice(&length.to_le_bytes());
            element[4..].copy_from_slice(&address.to_le_bytes());
        }
        let good = self.ccb();
        let mut start = |name: &str, must_fail: bool, spoil: &dyn Fn(&mut Ccb)| {
            let mut ccb = good;
            spoil(&mut ccb);
            let adapter = self.buslogic();
            adapter.put_ccb(0, &ccb);
            let address = adapter.ccb(0) as u32;
            let code = self.send(address, 1);
            let fine = code != 0 && (!must_fail || code != SUCCESS);
            if !fine {
                line!("{name}: code={code}");
            }
            self.tally.check(name, fine);
            self.alive(name);
        };
        start("a good CCB", false, &|_| {});
        start("data beyond memory", true, &|ccb| put(ccb, 0x08, 0xFFFF_F000));
        start("data in the device gap", true, &|ccb| put(ccb, 0x08, 0xFEE0_0000));
        start("length without end", true, &|ccb| put(ccb, 0x04, u32::MAX));
        start("length zero", false, &|ccb| put(ccb, 0x04, 0));
        start("no CDB", true, &|ccb| ccb[0x02] = 0);
        start("CDB longer than its field", true, &|ccb| ccb[0x02] = 255);
        start("target out of range", true, &|ccb| ccb[0x10] = 200);
        start("logical unit of ones", true, &|ccb| ccb[0x11] = 0xFF);
        start("tag of a kind that is none", true, &|ccb| ccb[0x01] |= 0xE0);
        start("direction none", false, &|ccb| ccb[0x01] = 3 << 3);
        start("direction out", false, &|ccb| ccb[0x01] = 2 << 3);
        start("sense beyond memory", true, &|ccb| {
            (ccb[0x03], ccb[0x12]) = (255, 0xC1);
            put(ccb, 0x24, 0xFFFF_FFF0);
        });
        for opcode in [0x01, 0x05, 0x10, 0x7F, 0x80, 0x82, 0xFF] {
            start("operation that is none", true, &|ccb| ccb[0x00] = opcode);
        }
        for (name, address, length) in [
            ("list beyond memory", 0xFFFF_FF00, 64),
            ("list at the end of addresses", 0xFFFF_FFF8, 64),
            ("list with an element beyond memory", list, 8),
            ("list with an element without end", list + 8, 8),
            ("list of half an element", list, 12),
            ("list without end", list, 0xFFFF_FFF8),
        ] {
            start(name, true, &|ccb| {
                ccb[0x00] = 4;
                put(ccb, 0x04, length);
                put(ccb, 0x08, address);
            });
        }
    }

    /// CCBs where there is no memory, to be started and to be aborted.
    fn lost_ccbs(&mut self) {
        const NOT_FOUND: u8 = 3;
        const ERROR: u8 = 4;
        for address in [0xFFFF_F000, 0xFFFF_FFFF, 0xFEE0_0000, 0xC000_0000] {
            let (started, aborted) = (self.send(address, 1), self.send(address, 2));
            self.tally.check("a CCB outside of memory is told", (started, aborted) == (ERROR, NOT_FOUND));
            self.alive("CCB outside of memory");
        }
    }

    /// Mailboxes where there is no memory, where something else is, and codes that are none.
    fn spoilt_mailboxes(&mut self) {
        let mut reply = [0; 256];
        for base in [0xFFFF_F000u32, 0xFFFF_FFFF, 0xFEE0_0000, 0xC000_0000] {
            for opcode in [0x81, 0x01] {
                let [a, b, c, d] = base.to_le_bytes();
                let adapter = self.buslogic();
                let bytes = [opcode, 255, a, b, c, d];
                adapter.command(&bytes[..if opcode == 1 { 5 } else { 6 }], &mut reply);
                (0..4).for_each(|_| adapter.kick());
                self.alive("mailboxes outside of memory");
            }
        }
        for action in [3, 9, 255] {
            let adapter = self.buslogic();
            (0..MAILBOXES).for_each(|_| {
                adapter.send(0xFFFF_F000, action);
            });
            adapter.kick();
            self.alive("actions that are none");
        }
        for strict in [0, 1] {
            let adapter = self.buslogic();
            adapter.command(&[0x8F, strict], &mut reply);
            for _ in 0..2000 {
                adapter.send(0xC000_0000, 2);
                adapter.kick();
            }
            self.alive("more aborts than incoming mailboxes");
        }
    }

    /// All codes, with parameters of zeros, of ones and of what comes.
    fn all_commands(&mut self) {
        for code in 0..=u8::MAX {
            for fill in [0, 1, 0xFF] {
                let adapter = self.buslogic();
                adapter.write(register::COMMAND, code);
                (0..8).for_each(|_| adapter.write(register::COMMAND, fill));
                (0..8).for_each(|_| {
                    adapter.read(register::COMMAND);
                });
            }
            if code % 32 == 31 {
                self.alive("commands with parameters of anything");
            }
        }
        for how in [0x40, 0x10, 0xFF, 0x0F] {
            self.buslogic().write(register::CONTROL, how);
            self.alive("resets of all kinds");
        }
    }

    /// CCBs of random bytes, many with a known operation.
    fn random_ccbs(&mut self) {
        let mut random = self.job.seed;
        for _ in 0..20 {
            for index in 0..32 {
                let mut ccb = [0; CCB_BYTES];
                for byte in &mut ccb {
                    random = pattern::mix(random);
                    *byte = random as u8;
                }
                ccb[0x00] &= 0x07;
                (ccb[0x02], ccb[0x10]) = (ccb[0x02] % 13, ccb[0x10] & 1);
                // Data and sense go where nothing is: memory of this driver is not to be hit by chance.
                put(&mut ccb, 0x08, 0xFFFF_0000);
                put(&mut ccb, 0x24, 0xFFFF_0000);
                // Not a command that changes the known block.
                ccb[0x12] = 0x28;
                let adapter = self.buslogic();
                adapter.put_ccb(index, &ccb);
                adapter.send(adapter.ccb(index) as u32, 1 + (random >> 8) as u8 % 2);
            }
            self.buslogic().kick();
            self.alive("random CCBs");
        }
    }

    fn byte_window(&mut self) {
        const WINDOW: u32 = 32;
        let adapter = self.buslogic();
        let same = [register::CONTROL, register::INTERRUPT, register::GEOMETRY]
            .into_iter()
            .all(|offset| adapter.read_memory(offset) == adapter.read(offset));
        self.tally.check("the window in memory shows the same registers", same);
        let adapter = self.buslogic();
        for offset in 0..WINDOW as u16 {
            adapter.write(offset, u8::MAX);
            adapter.write(offset, 0);
            adapter.read(offset);
        }
        self.alive("registers overwritten");
        let size = self.buslogic().function.memory_bar_size(1);
        self.tally.check("BAR is sized and put back", size == WINDOW);
        self.alive("BAR sized");
    }
}
