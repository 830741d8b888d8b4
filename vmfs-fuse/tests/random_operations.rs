//! Any sequence of reads, writes, truncations, discards and mapped accesses leaves the bytes that a plain array would hold.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Images, Random, seed};
use memmap2::MmapOptions;
use rustix::fs::FallocateFlags;

struct Model {
    file: File,
    bytes: Vec<u8>,
    random: Random,
    largest: u64,
}

impl Model {
    fn open(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    fn range(&mut self, longest: u64) -> (u64, u64) {
        let offset = self.random.below(self.largest);
        let length = (self.random.below(longest) + 1).min(self.largest - offset);
        // Half of all ranges are aligned, as programs do it.
        if self.random.below(2) == 0 {
            (offset & !4095, length.next_multiple_of(4096).min(self.largest - (offset & !4095)))
        } else {
            (offset, length)
        }
    }

    fn step(&mut self, path: &Path, longest: u64) {
        let (offset, length) = self.range(longest);
        let end = offset + length;
        match self.random.below(22) {
            0..6 => self.write(offset, length),
            6..12 => self.check(offset, length),
            12 => {
                self.file.set_len(end).unwrap();
                self.bytes.resize(end as usize, 0);
            }
            13 => self.discard(offset, end, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
            14 => self.discard(offset, end, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            15 => {
                rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, length).unwrap();
                if self.bytes.len() < end as usize {
                    self.bytes.resize(end as usize, 0);
                }
            }
            16 => self.file.sync_data().unwrap(),
            17 => self.file = Model::open(path),
            18..20 => self.mapped(offset, length, true),
            _ => self.mapped(offset, length, false),
        }
        let length = self.file.metadata().unwrap().len();
        assert_eq!(length, self.bytes.len() as u64, "the size is wrong");
    }

    fn write(&mut self, offset: u64, length: u64) {
        let new = self.random.bytes(length as usize);
        self.file.write_all_at(&new, offset).unwrap();
        let end = (offset + length) as usize;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset as usize..end].copy_from_slice(&new);
    }

    #[track_caller]
    fn check(&mut self, offset: u64, length: u64) {
        let mut read = vec![0xee; length as usize];
        let mut done = 0;
        while done < read.len() {
            let count = self.file.read_at(&mut read[done..], offset + done as u64).unwrap();
            if count == 0 {
                break;
            }
            done += count;
        }
        let start = (offset as usize).min(self.bytes.len());
        let expected = &self.bytes[start..((offset + length) as usize).min(self.bytes.len())];
        assert_eq!(done, expected.len(), "bytes read at {offset}");
        let wrong = read[..done].iter().zip(expected).position(|(read, expected)| read != expected);
        if let Some(at) = wrong {
            panic!("byte {} is {:#x} and should be {:#x}", offset + at as u64, read[at], expected[at]);
        }
    }

    fn discard(&mut self, offset: u64, end: u64, flags: FallocateFlags) {
        rustix::fs::fallocate(&self.file, flags, offset, end - offset).unwrap();
        let (start, end) = ((offset as usize).min(self.bytes.len()), (end as usize).min(self.bytes.len()));
        self.bytes[start..end].fill(0);
    }

    fn mapped(&mut self, offset: u64, length: u64, write: bool) {
        let end = (offset + length).min(self.bytes.len() as u64);
        if offset >= end {
            return;
        }
        // SAFETY: nobody else changes the size of this test's file while it is mapped.
        let mut map = unsafe { MmapOptions::new().map_mut(&self.file).unwrap() };
        let range = offset as usize..end as usize;
        assert!(map[range.clone()] == self.bytes[range.clone()], "mapped bytes at {offset} are wrong");
        if write {
            let new = self.random.bytes(range.len());
            map[range.clone()].copy_from_slice(&new);
            self.bytes[range].copy_from_slice(&new);
            map.flush().unwrap();
        }
    }
}

fn sequence(largest: u64, longest: u64, steps: u32, nth: u64) {
    let seed = nth + seed();
    let images = Images::new(2, 512);
    let mount = images.mount(1);
    let path = mount.at("file");
    let mut model = Model { file: Model::open(&path), bytes: vec![], random: Random(seed), largest };
    for step in 0..steps {
        let before = std::panic::AssertUnwindSafe(&mut model);
        let result = std::panic::catch_unwind(|| {
            let model = before;
            model.0.step(&path, longest);
        });
        if let Err(panic) = result {
            eprintln!("step {step} of seed {seed}, size {}", model.bytes.len());
            std::panic::resume_unwind(panic);
        }
    }
    let all = model.bytes.len() as u64;
    model.check(0, all.max(1));
    model.file.sync_all().unwrap();
    let bytes = std::mem::take(&mut model.bytes);
    drop(model);
    mount.unmount();
    let mount = images.mount(1);
    assert!(std::fs::read(mount.at("file")).unwrap() == bytes, "after a new mount the bytes are others");
    mount.unmount();
}

#[test]
fn small_files_hold_what_an_array_holds() {
    sequence(9_000, 3_000, 1200, 11);
}

#[test]
fn middle_files_hold_what_an_array_holds() {
    sequence(400_000, 70_000, 1200, 12);
}

#[test]
fn large_files_hold_what_an_array_holds() {
    sequence(40 << 20, 3 << 20, 400, 13);
}
