//! A guest in plain memory: it drives registers and mailboxes the way drivers do, without KVM.

use std::cell::Cell;

use super::super::BusLogic;
use crate::hba::HostBusAdapter;
pub(super) use crate::hba::testing::{
    Bench, GatedDisk, HEARD, MEMORY, disk, eventually, read_10, returns_before_the_gate_opens, write_10,
};

pub(super) const MAILBOXES: u64 = 0x1_0000;
pub(super) const CCBS: u64 = 0x4_0000;
pub(super) const SENSE: u64 = 0x8_0000;
pub(super) const LISTS: u64 = 0x9_0000;
pub(super) const DATA: u64 = 0x10_0000;
/// Outgoing mailboxes, and incoming ones.
pub(super) const COUNT: u8 = 8;

/// An incoming mailbox: the CCB's address, host status, SCSI status, completion code.
pub(super) type Arrival = (u64, u8, u8, u8);

/// A CCB of 32 bits with extended units as a test writes it down.
#[derive(Clone)]
pub(super) struct Ccb {
    pub(super) opcode: u8,
    pub(super) flags: u8,
    pub(super) target: u8,
    pub(super) lun: u8,
    pub(super) cdb: Vec<u8>,
    pub(super) length: u32,
    pub(super) data: u32,
    pub(super) sense_length: u8,
    pub(super) sense: u32,
}

pub(super) const IN: u8 = 1 << 3;
pub(super) const OUT: u8 = 2 << 3;
pub(super) const NO_DATA: u8 = 3 << 3;

impl Ccb {
    pub(super) fn new(cdb: &[u8]) -> Self {
        let (cdb, sense) = (cdb.to_vec(), SENSE as u32);
        Self { opcode: 0, flags: 0, target: 0, lun: 0, cdb, length: 0, data: 0, sense_length: 96, sense }
    }

    pub(super) fn data(mut self, flags: u8, address: u64, length: u32) -> Self {
        (self.flags, self.data, self.length) = (flags, address as u32, length);
        self
    }

    pub(super) fn opcode(mut self, opcode: u8) -> Self {
        self.opcode = opcode;
        self
    }

    pub(super) fn target(mut self, target: u8) -> Self {
        self.target = target;
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.opcode, self.flags, self.cdb.len() as u8, self.sense_length];
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.data.to_le_bytes());
        bytes.extend([0, 0, 0xAA, 0xAA, self.target, self.lun]);
        bytes.extend(&self.cdb[..self.cdb.len().min(12)]);
        bytes.resize(0x24, 0);
        bytes.extend(self.sense.to_le_bytes());
        bytes
    }
}

/// A scatter/gather list.
pub(super) fn list(parts: &[(u64, u32)]) -> Vec<u8> {
    parts
        .iter()
        .flat_map(|(address, length)| [length.to_le_bytes(), (*address as u32).to_le_bytes()].concat())
        .collect()
}

/// The guest with its adapter.
pub(super) struct Guest {
    bench: Bench<BusLogic<GatedDisk>>,
    outgoing: Cell<u64>,
    incoming: Cell<u64>,
}

impl Guest {
    /// An adapter with one disk of 256 blocks at target 0, in its state after power-on.
    pub(super) fn new() -> Self {
        Self { bench: Bench::new(BusLogic::start), outgoing: Cell::default(), incoming: Cell::default() }
    }

    /// The same with mailboxes, and the power-on attention taken.
    pub(super) fn ready() -> Self {
        let guest = Self::new();
        guest.bring_up();
        assert_eq!(guest.run(0, &Ccb::new(&[0; 6])), (0, 2, 4));
        guest
    }

    /// What a driver does after a reset.
    pub(super) fn bring_up(&self) {
        self.set_bytes(MAILBOXES, &[0; 16 * COUNT as usize]);
        self.outgoing.set(0);
        self.incoming.set(0);
        self.command(&[&[0x81, COUNT][..], &(MAILBOXES as u32).to_le_bytes()].concat(), 0);
        self.command(&[0x8F, 1], 0);
        self.command(&[0x96, 1], 0);
        assert_eq!(self.read(0), 0x10);
    }

    pub(super) fn write(&self, register: u64, value: u8) {
        self.adapter.write(register, &[value]);
    }

    pub(super) fn read(&self, register: u64) -> u8 {
        let mut byte = [0];
        self.adapter.read(register, &mut byte);
        byte[0]
    }

    /// A reset as drivers wait for it.
    pub(super) fn reset(&self, how: u8) {
        self.write(0, how);
        assert_eq!([self.read(0), self.read(0)], [0x80, 0x30]);
    }

    /// A command and its reply of `length` bytes, in the way of both drivers; its interrupt, and those before it, are acknowledged.
    pub(super) fn command(&self, bytes: &[u8], length: usize) -> Vec<u8> {
        assert_eq!(self.read(0) & 0x18, 0x10, "ready and not busy");
        bytes.iter().for_each(|byte| self.write(1, *byte));
        let mut reply = Vec::new();
        while self.read(0) & 0x04 != 0 {
            assert_eq!(self.read(2) & 0x04, 0, "not complete while there is a reply");
            reply.push(self.read(1));
        }
        assert_eq!((reply.len(), self.read(0) & 0x11), (length, 0x10), "{bytes:02x?}");
        while self.read(2) != 0 {
            self.write(0, 0x20);
        }
        reply
    }

    /// Writes a CCB as number `number` without starting it; returns its address.
    pub(super) fn put(&self, number: u64, ccb: &Ccb) -> u64 {
        let address = CCBS + 64 * number;
        self.set_bytes(address, &ccb.bytes());
        address
    }

    /// Uses the next outgoing mailbox for the CCB at `address`.
    pub(super) fn send(&self, address: u64, action: u8) {
        let number = self.outgoing.replace((self.outgoing.get() + 1) % u64::from(COUNT));
        let mailbox = MAILBOXES + 8 * number;
        eventually("a free mailbox", || self.bytes(mailbox + 7, 1) == [0]);
        self.set_bytes(mailbox, &(address as u32).to_le_bytes());
        self.set_bytes(mailbox + 7, &[action]);
        self.write(1, 0x02);
    }

    /// Starts a CCB as number `number`.
    pub(super) fn start(&self, number: u64, ccb: &Ccb) -> u64 {
        let address = self.put(number, ccb);
        self.send(address, 1);
        address
    }

    /// Takes what the next incoming mailbox holds, if it holds something.
    pub(super) fn take(&self) -> Option<Arrival> {
        let mailbox = MAILBOXES + 8 * (u64::from(COUNT) + self.incoming.get());
        let bytes = self.bytes(mailbox, 8);
        if bytes[7] == 0 {
            return None;
        }
        self.set_bytes(mailbox + 7, &[0]);
        self.incoming.set((self.incoming.get() + 1) % u64::from(COUNT));
        Some((u32::from_le_bytes(bytes[..4].try_into().unwrap()).into(), bytes[4], bytes[5], bytes[7]))
    }

    pub(super) fn wait(&self) -> Arrival {
        let mut taken = None;
        eventually("an incoming mailbox", || {
            taken = self.take();
            taken.is_some()
        });
        taken.unwrap()
    }

    /// One CCB from its start to its end: host status, SCSI status, completion code; the CCB says the same.
    pub(super) fn run(&self, number: u64, ccb: &Ccb) -> (u8, u8, u8) {
        let address = self.start(number, ccb);
        let (of, host, scsi, completion) = self.wait();
        assert_eq!((of, self.bytes(address + 0x0E, 2)), (address, vec![host, scsi]));
        (host, scsi, completion)
    }
}

impl std::ops::Deref for Guest {
    type Target = Bench<BusLogic<GatedDisk>>;

    fn deref(&self) -> &Self::Target {
        &self.bench
    }
}
