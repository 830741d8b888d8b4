//! Promises of file data: what is written is read, what is not written is zero, space has one owner, on any path and after any sequence.

mod data_world;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use data_world::{Host, Model, World};
use proptest::prelude::*;
use vmfs_core::file::{Mover, OpenFile, OpenMode};
use vmfs_core::format::body::Content;
use vmfs_core::object::Object;
use vmfs_core::units::CellSize;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Step {
    Write { offset: u64, length: usize, fill: u8, by_actor: bool },
    Read { offset: u64, length: usize, by_actor: bool },
    SetSize(u64),
    Punch(u64, u64),
    Zero(u64, u64),
    Allocate(u64, u64, bool),
    Seek(u64),
    Flush,
    Reopen,
    Remount,
}

/// Offsets around the start, around the border of two pointer blocks (64 KiB blocks, 52 MiB) and between.
fn offset() -> impl Strategy<Value = u64> {
    let border = 832 * 64 * KIB;
    let aligned = prop_oneof![
        6 => 0..300 * KIB,
        1 => 0..8 * KIB,
        2 => border - 200 * KIB..border + 200 * KIB,
    ];
    (aligned, prop::sample::select(vec![1u64, 512, 4096, 65_536])).prop_map(|(at, unit)| at - at % unit)
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![1..600u64, prop::sample::select(vec![512, 4096, 8192, 65_536, 131_072]), 1..200 * KIB,]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (offset(), length(), 1..255u8, prop::bool::weighted(0.3)).prop_map(|(offset, length, fill, by_actor)| {
            Step::Write { offset, length: length as usize, fill, by_actor }
        }),
        6 => (offset(), length(), any::<bool>())
            .prop_map(|(offset, length, by_actor)| Step::Read { offset, length: length as usize, by_actor }),
        4 => prop_oneof![offset(), Just(0)].prop_map(Step::SetSize),
        3 => (offset(), length()).prop_map(|(o, l)| Step::Punch(o, l)),
        2 => (offset(), length()).prop_map(|(o, l)| Step::Zero(o, l)),
        2 => (offset(), length(), any::<bool>()).prop_map(|(o, l, keep)| Step::Allocate(o, l, keep)),
        2 => offset().prop_map(Step::Seek),
        3 => Just(Step::Flush),
        2 => Just(Step::Reopen),
        1 => Just(Step::Remount),
    ]
}

/// Bytes that tell where they belong.
fn pattern(offset: u64, length: usize, fill: u8) -> Vec<u8> {
    (0..length as u64).map(|n| fill.wrapping_add(((offset + n) % 251) as u8) | 1).collect()
}

struct Run {
    world: World,
    host: Option<Host>,
    mover: Mover,
    object: Rc<Object>,
    file: Option<Arc<OpenFile>>,
    model: Model,
}

impl Run {
    async fn begin(world: World) -> Run {
        let host = world.mount(1).await;
        let object = host.create("f").await;
        let file = host.open(&object, OpenMode::WRITE).await.unwrap();
        Run { mover: host.mover(), world, host: Some(host), object, file: Some(file), model: Model::default() }
    }

    async fn step(&mut self, step: &Step) {
        let (host, file) = (self.host.as_ref().unwrap(), self.file.clone().unwrap());
        match *step {
            Step::Write { offset, length, fill, by_actor } => {
                let bytes = pattern(offset, length, fill);
                let mut done = 0;
                while done < length {
                    let (at, rest) = (offset + done as u64, &bytes[done..]);
                    done += match by_actor {
                        true => host.files.write(&file, at, rest).await.unwrap(),
                        false => host.write(&mut self.mover, &file, at, rest).await.unwrap(),
                    };
                }
                self.model.write(offset, &bytes);
            }
            Step::Read { offset, length, by_actor } => self.compare(offset, length, by_actor).await,
            Step::SetSize(size) => {
                host.files.set_size(&file, size).await.unwrap();
                self.model.set_size(size);
            }
            Step::Punch(offset, length) => {
                host.files.punch(&file, offset..offset + length).await.unwrap();
                self.model.zero(offset, length);
            }
            Step::Zero(offset, length) => {
                host.files.zero_range(&file, offset..offset + length, false).await.unwrap();
                self.model.zero(offset, length);
                self.model.set_size(self.model.size.max(offset + length));
            }
            Step::Allocate(offset, length, keep) => {
                host.files.allocate_range(&file, offset..offset + length, keep).await.unwrap();
                if !keep {
                    self.model.set_size(self.model.size.max(offset + length));
                }
            }
            Step::Seek(offset) => self.seek(offset).await,
            Step::Flush => host.files.flush(&file).await.unwrap(),
            Step::Reopen => {
                drop(file);
                self.close().await;
                self.open().await;
            }
            Step::Remount => {
                drop(file);
                self.close().await;
                self.remount().await;
                self.open().await;
            }
        }
        let file = self.file.as_ref().unwrap();
        assert_eq!(file.size(), self.model.size);
        assert_eq!(file.references_held(), 0);
    }

    async fn close(&mut self) {
        let file = self.file.take().unwrap();
        self.host.as_ref().unwrap().files.close(file).await.unwrap();
    }

    async fn open(&mut self) {
        let host = self.host.as_ref().unwrap();
        self.file = Some(host.open(&self.object, OpenMode::WRITE).await.unwrap());
    }

    async fn remount(&mut self) {
        let fd = self.object.fd;
        self.host.take().unwrap().unmount().await;
        let host = self.world.mount(1).await;
        self.object = host.load(fd).await;
        self.mover = host.mover();
        self.host = Some(host);
    }

    async fn compare(&mut self, offset: u64, length: usize, by_actor: bool) {
        let (host, file) = (self.host.as_ref().unwrap(), self.file.as_ref().unwrap());
        let found = match by_actor {
            true => host.files.read(file, offset, length).await.unwrap(),
            false => host.read(&mut self.mover, file, offset, length).await.unwrap(),
        };
        same(&found, &self.model.read(offset, length), offset);
    }

    /// A hole reads as zeros, and what is not zero is data.
    async fn seek(&mut self, offset: u64) {
        let (host, file) = (self.host.as_ref().unwrap(), self.file.as_ref().unwrap());
        let hole = host.files.seek_hole(file, offset).await.unwrap();
        let data = host.files.seek_data(file, offset).await.unwrap();
        if offset >= self.model.size {
            assert_eq!((data, hole), (None, None));
            return;
        }
        let hole = hole.unwrap();
        let data_end = data.unwrap_or(self.model.size);
        assert!(hole >= offset && hole <= self.model.size && data_end >= offset);
        assert!(hole == offset || data == Some(offset));
        let length = (data_end - offset).min(MIB) as usize;
        assert!(self.model.read(offset, length).iter().all(|byte| *byte == 0), "bytes in a hole at {offset}");
    }

    /// Everything is there for another mount that has no lock, and every data block is named by exactly one pointer.
    async fn end(mut self) {
        self.close().await;
        self.remount().await;
        let host = self.host.as_ref().unwrap();
        let file = host.open(&self.object, OpenMode::READ).await.unwrap();
        let attributes = &self.object.image().body.attributes;
        assert_eq!(attributes.size, self.model.size);
        let mut at = 0;
        while at < self.model.size {
            let found = host.files.read(&file, at, MIB as usize).await.unwrap();
            same(&found, &self.model.read(at, MIB as usize), at);
            at += MIB;
            if at == 2 * MIB && self.model.size > 45 * MIB {
                at = 45 * MIB;
            }
        }
        let pointed = pointers_of(host, &self.object).await;
        assert_eq!(attributes.blocks, pointed.len() as u64);
        host.files.close(file).await.unwrap();
        let owned: BTreeMap<(u8, u64), u32> = self
            .world
            .owned_blocks()
            .into_iter()
            .map(|(at, (fd, index, _))| {
                assert_eq!(fd, self.object.fd.get());
                (at, index)
            })
            .collect();
        assert_eq!(owned, pointed, "blocks owned by the file, and blocks that it reaches");
    }
}

/// Blocks that an object's pointers name, with their place in the file.
async fn pointers_of(host: &Host, object: &Rc<Object>) -> BTreeMap<(u8, u64), u32> {
    use vmfs_core::mapping::publish::pointers;
    let image = object.image();
    let mut found = BTreeMap::new();
    let Content::Mapped(vmfs_core::format::body::MappingRoot::PointerBlocks(units)) = &image.body.content else {
        return found;
    };
    for (pb, unit) in units.iter().enumerate().filter_map(|(pb, unit)| unit.map(|unit| (pb, unit))) {
        for nth in 0..host.context.cell_size().cells_per_unit() {
            let at = host.space.units.cell_of(unit, nth).unwrap();
            let cell = host.context.read_cell(at).await.unwrap();
            for (n, pointer) in pointers(host.context.cell_size(), cell.payload()).unwrap().into_iter().enumerate() {
                if let Some(pointer) = pointer {
                    let index = host.shape().first_block(pb as u32) + nth as u64 * host.shape().per_cell() + n as u64;
                    let twice = found.insert((pointer.at.lun.get(), pointer.at.block.get()), index as u32);
                    assert_eq!(twice, None, "a block is named twice");
                }
            }
        }
    }
    found
}

fn same(found: &[u8], expected: &[u8], offset: u64) {
    assert_eq!(found.len(), expected.len(), "bytes read at {offset}");
    if let Some(at) = (0..found.len()).find(|n| found[*n] != expected[*n]) {
        panic!("byte {} is {:#x}, expected {:#x}", offset + at as u64, found[at], expected[at]);
    }
}

fn any_sequence(cell_size: CellSize, steps: &[Step]) {
    let world = World::new(1, 2, 256 * MIB, cell_size, 64 * KIB);
    let sim = world.sim.clone();
    sim.block_on(async {
        let mut run = Run::begin(world).await;
        for step in steps {
            run.step(step).await;
        }
        run.end().await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_gives_the_bytes_of_a_model_with_512_byte_cells(steps in prop::collection::vec(step(), 1..40)) {
        any_sequence(CellSize::B512, &steps);
    }

    #[test]
    fn any_sequence_gives_the_bytes_of_a_model_with_4096_byte_cells(steps in prop::collection::vec(step(), 1..40)) {
        any_sequence(CellSize::B4096, &steps);
    }
}

#[test]
fn a_block_taken_ahead_is_not_taken_a_second_time() {
    // A cut leaves blocks behind that were taken ahead; the next writer in order came to the same places and forgot them.
    let write = |offset, length| Step::Write { offset, length, fill: 1, by_actor: false };
    let steps = [write(65_536, 1), write(81_920, 49_153), write(0, 1), Step::SetSize(0), write(65_536, 1)];
    any_sequence(CellSize::B512, &steps);
}

#[test]
fn a_punch_that_begins_behind_the_end_of_the_file_ends() {
    let steps = [
        Step::Write { offset: 0, length: 100, fill: 1, by_actor: false },
        Step::Allocate(0, 70_000, true),
        Step::Write { offset: 0, length: 8192, fill: 1, by_actor: true },
        Step::SetSize(4200),
        Step::Punch(5000, 2000),
        Step::Punch(4100, 2000),
    ];
    any_sequence(CellSize::B512, &steps);
}
