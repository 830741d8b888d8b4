//! A guest in plain memory: it drives registers and rings the way drivers do, without KVM.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::super::PvScsi;
use super::super::entries::*;
use super::super::registers::{KICK_NON_RW_IO, KICK_RW_IO};
use crate::hba::HostBusAdapter;
pub(super) use crate::hba::testing::{
    Bench, GatedDisk, MEMORY, disk, eventually, read_10, returns_before_the_gate_opens, write_10,
};

pub(super) const STATE: u64 = 0x1000;
pub(super) const REQUESTS: u64 = 0x10000;
pub(super) const COMPLETIONS: u64 = 0x40000;
pub(super) const MESSAGES: u64 = 0x70000;
pub(super) const SENSE: u64 = 0x80000;
pub(super) const DATA: u64 = 0x100000;

/// A request as a test writes it down.
#[derive(Clone)]
pub(super) struct Io {
    pub(super) context: u64,
    pub(super) target: u8,
    pub(super) lun: u8,
    pub(super) cdb: Vec<u8>,
    pub(super) address: u64,
    pub(super) length: u64,
    pub(super) flags: u32,
    pub(super) sense_address: u64,
}

impl Io {
    /// A command without data to target 0.
    pub(super) fn new(context: u64, cdb: &[u8]) -> Self {
        Self {
            context,
            target: 0,
            lun: 0,
            cdb: cdb.to_vec(),
            address: 0,
            length: 0,
            flags: FLAG_NO_DATA,
            sense_address: SENSE,
        }
    }

    pub(super) fn into_guest(mut self, address: u64, length: u64) -> Self {
        (self.address, self.length, self.flags) = (address, length, FLAG_TO_HOST);
        self
    }

    pub(super) fn out_of_guest(mut self, address: u64, length: u64) -> Self {
        (self.address, self.length, self.flags) = (address, length, FLAG_TO_DEVICE);
        self
    }

    pub(super) fn for_target(mut self, target: u8) -> Self {
        self.target = target;
        self
    }
}

/// The guest with its adapter.
pub(super) struct Guest {
    bench: Bench<PvScsi<GatedDisk>>,
    consumer: u32,
}

impl Guest {
    /// An adapter with one disk of 256 blocks at target 0; rings are not set up yet.
    pub(super) fn new() -> Self {
        Self { bench: Bench::new(PvScsi::start), consumer: 0 }
    }

    /// The same with rings of one page each, interrupts unmasked, and the power-on attention taken.
    pub(super) fn ready() -> Self {
        let mut guest = Self::new();
        guest.set_up_rings(1);
        guest.write(0x2010, 0xF);
        let attention = guest.run(Io::new(0, &[0; 6]));
        assert_eq!(attention.scsi_status.get(), 2);
        guest
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        self.adapter.write(offset, &value.to_le_bytes());
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.adapter.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a command with its data words; returns COMMAND_STATUS.
    pub(super) fn command(&self, number: u32, words: &[u32]) -> u32 {
        self.write(0, number);
        for &word in words {
            self.write(4, word);
        }
        self.read(8)
    }

    /// SETUP_RINGS with so many pages for each ring.
    pub(super) fn set_up_rings(&mut self, pages: u32) -> u32 {
        let mut words = vec![0; 132];
        words[..3].copy_from_slice(&[pages, pages, (STATE >> 12) as u32]);
        for page in 0..pages as usize {
            words[4 + 2 * page] = (REQUESTS >> 12) as u32 + page as u32;
            words[68 + 2 * page] = (COMPLETIONS >> 12) as u32 + page as u32;
        }
        self.consumer = 0;
        self.memory.write_slice(&[0; 4096], GuestAddress(STATE)).unwrap();
        self.command(3, &words)
    }

    pub(super) fn state(&self, field: u64) -> u32 {
        self.memory.load(GuestAddress(STATE + field), Ordering::Acquire).unwrap()
    }

    pub(super) fn set_state(&self, field: u64, value: u32) {
        self.memory.store(value, GuestAddress(STATE + field), Ordering::Release).unwrap();
    }

    /// Puts a request into the ring without a kick.
    pub(super) fn put(&self, io: &Io) {
        let mut descriptor = Descriptor::read_from_bytes(&[0; REQUEST_SIZE]).unwrap();
        descriptor.context.set(io.context);
        descriptor.data_address.set(io.address);
        descriptor.data_length.set(io.length);
        descriptor.sense_address.set(io.sense_address);
        descriptor.sense_length.set(96);
        descriptor.flags.set(io.flags);
        descriptor.cdb[..io.cdb.len()].copy_from_slice(&io.cdb);
        descriptor.cdb_length = io.cdb.len() as u8;
        descriptor.lun[1] = io.lun;
        descriptor.tag = 0x20;
        descriptor.target = io.target;
        let producer = self.state(0);
        let slot = u64::from(producer & ((1 << self.state(8)) - 1));
        let address = GuestAddress(REQUESTS + slot * REQUEST_SIZE as u64);
        self.memory.write_slice(descriptor.as_bytes(), address).unwrap();
        self.set_state(0, producer.wrapping_add(1));
    }

    pub(super) fn kick(&self) {
        self.write(KICK_RW_IO, 0);
    }

    /// Takes the next completion if there is one.
    pub(super) fn take(&mut self) -> Option<CompletionEntry> {
        if self.state(0x0C) == self.consumer {
            return None;
        }
        let slot = u64::from(self.consumer & ((1 << self.state(0x14)) - 1));
        let mut bytes = [0; COMPLETION_SIZE];
        self.memory.read_slice(&mut bytes, GuestAddress(COMPLETIONS + slot * COMPLETION_SIZE as u64)).unwrap();
        self.consumer = self.consumer.wrapping_add(1);
        self.set_state(0x10, self.consumer);
        Some(CompletionEntry::read_from_bytes(&bytes).unwrap())
    }

    /// Waits for the next completion.
    pub(super) fn wait(&mut self) -> CompletionEntry {
        let mut taken = None;
        eventually("a completion", || {
            taken = self.take();
            taken.is_some()
        });
        taken.unwrap()
    }

    /// One request from kick to completion.
    pub(super) fn run(&mut self, io: Io) -> CompletionEntry {
        self.put(&io);
        self.write(KICK_NON_RW_IO, 0);
        let completion = self.wait();
        assert_eq!(completion.context.get(), io.context);
        completion
    }
}

impl std::ops::Deref for Guest {
    type Target = Bench<PvScsi<GatedDisk>>;

    fn deref(&self) -> &Self::Target {
        &self.bench
    }
}
