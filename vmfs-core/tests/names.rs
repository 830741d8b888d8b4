//! Promises of names on one host: every sequence of operations gives the tree of a model, and the same tree after the next mount.

mod names_support;

use std::collections::BTreeMap;

use names_support::*;
use proptest::prelude::*;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::units::CellSize;
use vmfs_core::volume::{AttributeChange, RenameFlags, Volume};

#[derive(Clone, Debug)]
enum Op {
    Create(usize, usize),
    Mkdir(usize, usize),
    Symlink(usize, usize),
    Unlink(usize, usize),
    Rmdir(usize, usize),
    Rename(usize, usize, usize, usize, bool),
    Lookup(usize, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (0usize..4, 0usize..8);
    prop_oneof![
        4 => place().prop_map(|(d, n)| Op::Create(d, n)),
        2 => place().prop_map(|(d, n)| Op::Mkdir(d, n)),
        1 => place().prop_map(|(d, n)| Op::Symlink(d, n)),
        2 => place().prop_map(|(d, n)| Op::Unlink(d, n)),
        2 => place().prop_map(|(d, n)| Op::Rmdir(d, n)),
        5 => (place(), place(), any::<bool>()).prop_map(|((d, n), (e, m), f)| Op::Rename(d, n, e, m, f)),
        1 => place().prop_map(|(d, n)| Op::Lookup(d, n)),
    ]
}

fn name_of(n: usize) -> Vec<u8> {
    match n {
        0 => vec![0xff; 255],
        1 => b"\n \\\"".to_vec(),
        n => format!("name{n}").into_bytes(),
    }
}

/// A tree of paths.
#[derive(Default)]
struct Model(BTreeMap<Vec<u8>, ObjectType>);

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"/", name].concat()
}

impl Model {
    fn directories(&self) -> Vec<Vec<u8>> {
        let below = self.0.iter().filter(|(_, t)| **t == ObjectType::Directory).map(|(path, _)| path.clone());
        [Vec::new()].into_iter().chain(below).collect()
    }

    fn is_empty_directory(&self, path: &[u8]) -> bool {
        let inside = join(path, b"");
        !self.0.keys().any(|other| other.starts_with(&inside))
    }

    fn add(&mut self, path: Vec<u8>, object_type: ObjectType) -> Result<(), FsErrorKind> {
        if self.0.contains_key(&path) {
            return Err(FsErrorKind::Exists);
        }
        self.0.insert(path, object_type);
        Ok(())
    }

    fn unlink(&mut self, path: &[u8]) -> Result<(), FsErrorKind> {
        match self.0.get(path) {
            None => Err(FsErrorKind::NotFound),
            Some(ObjectType::Directory) => Err(FsErrorKind::IsDirectory),
            Some(_) => {
                self.0.remove(path);
                Ok(())
            }
        }
    }

    fn rmdir(&mut self, path: &[u8]) -> Result<(), FsErrorKind> {
        match self.0.get(path) {
            None => Err(FsErrorKind::NotFound),
            Some(ObjectType::Directory) if !self.is_empty_directory(path) => Err(FsErrorKind::NotEmpty),
            Some(ObjectType::Directory) => {
                self.0.remove(path);
                Ok(())
            }
            Some(_) => Err(FsErrorKind::NotDirectory),
        }
    }

    fn rename(&mut self, from: &[u8], to: &[u8], across: bool, no_replace: bool) -> Result<(), FsErrorKind> {
        let moved = *self.0.get(from).ok_or(FsErrorKind::NotFound)?;
        if across && moved == ObjectType::Directory {
            return Err(FsErrorKind::CrossDirectory);
        }
        if from == to {
            return Ok(());
        }
        let is_directory = moved == ObjectType::Directory;
        match self.0.get(to) {
            Some(_) if no_replace => return Err(FsErrorKind::Exists),
            Some(ObjectType::Directory) if !is_directory => return Err(FsErrorKind::IsDirectory),
            Some(ObjectType::Directory) if !self.is_empty_directory(to) => return Err(FsErrorKind::NotEmpty),
            Some(other) if is_directory && *other != ObjectType::Directory => return Err(FsErrorKind::NotDirectory),
            _ => {}
        }
        let inside = join(from, b"");
        let below: Vec<_> = self.0.keys().filter(|p| p.starts_with(&inside)).cloned().collect();
        for path in below {
            let object_type = self.0.remove(&path).unwrap();
            self.0.insert([to, &path[from.len()..]].concat(), object_type);
        }
        self.0.remove(from);
        self.0.insert(to.to_vec(), moved);
        Ok(())
    }
}

async fn resolve(volume: &Volume, path: &[u8]) -> ObjectRef {
    let mut at = volume.root();
    for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
        at = volume.lookup(at, name).await.unwrap().object;
    }
    at
}

async fn apply(volume: &Volume, model: &mut Model, op: &Op) -> (Result<(), FsErrorKind>, Result<(), FsError>) {
    let directories = model.directories();
    let directory = |d: usize| directories[d % directories.len()].clone();
    let at = async |d: usize| resolve(volume, &directory(d)).await;
    match *op {
        Op::Create(d, n) => {
            let real = create(volume, at(d).await, &name_of(n)).await.map(drop);
            (model.add(join(&directory(d), &name_of(n)), ObjectType::File), real)
        }
        Op::Mkdir(d, n) => {
            let real = mkdir(volume, at(d).await, &name_of(n)).await.map(drop);
            (model.add(join(&directory(d), &name_of(n)), ObjectType::Directory), real)
        }
        Op::Symlink(d, n) => {
            let real = volume.symlink(at(d).await, &name_of(n), b"../target", 1, 2).await.map(drop);
            (model.add(join(&directory(d), &name_of(n)), ObjectType::Symlink), real)
        }
        Op::Unlink(d, n) => {
            let real = volume.unlink(at(d).await, &name_of(n)).await.map(drop);
            (model.unlink(&join(&directory(d), &name_of(n))), real)
        }
        Op::Rmdir(d, n) => {
            let real = volume.remove_directory(at(d).await, &name_of(n)).await.map(drop);
            (model.rmdir(&join(&directory(d), &name_of(n))), real)
        }
        Op::Rename(d, n, e, m, no_replace) => {
            let flags = RenameFlags { no_replace, exchange: false };
            let (from, to) = (directory(d), directory(e));
            let real = volume.rename(at(d).await, &name_of(n), at(e).await, &name_of(m), flags).await.map(drop);
            (model.rename(&join(&from, &name_of(n)), &join(&to, &name_of(m)), from != to, no_replace), real)
        }
        Op::Lookup(d, n) => {
            let real = volume.lookup(at(d).await, &name_of(n)).await.map(drop);
            let there = model.0.contains_key(&join(&directory(d), &name_of(n)));
            (if there { Ok(()) } else { Err(FsErrorKind::NotFound) }, real)
        }
    }
}

fn run(seed: u64, cell_size: CellSize, disks: usize, ops: &[Op]) {
    let (sim, disks) = world(seed, disks, cell_size);
    let mut model = Model::default();
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        for op in ops {
            let (expected, real) = apply(&volume, &mut model, op).await;
            assert_eq!(real.as_ref().map_err(FsError::kind).copied(), expected, "{op:?}: {real:?}");
        }
        assert_eq!(tree(&volume, volume.root()).await, model.0);
        volume.unmount().await.unwrap();
        let (volume, _) = mount(&sim, &disks, 2).await;
        assert_eq!(tree(&volume, volume.root()).await, model.0);
        let status = volume.status().await;
        assert!(status.warnings.is_empty() && status.unfinished == 0, "{status:?}");
        assert!(status.luns.iter().all(|lun| lun.hosts.len() == 1 && lun.hosts[0].own), "{status:?}");
        volume.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_sequence_of_operations_gives_the_tree_of_a_model_before_and_after_the_next_mount(
        seed: u64, large: bool, disks in 1usize..3, ops in prop::collection::vec(op(), 1..120),
    ) {
        run(seed, if large { CellSize::B4096 } else { CellSize::B512 }, disks, &ops);
    }
}

#[test]
fn a_name_has_1_to_255_bytes_of_any_value_but_slash_and_nul() {
    let (sim, disks) = world(1, 1, CellSize::B512);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let root = volume.root();
        let mut made = 0;
        for byte in (1..=255u8).filter(|b| *b != b'/' && *b != b'.') {
            create(&volume, root, &[byte]).await.unwrap();
            made += 1;
        }
        create(&volume, root, &[b'n'; 255]).await.unwrap();
        assert_eq!(list(&volume, root, 10).await.len(), made + 1);
        let kind = async |name: &[u8]| create(&volume, root, name).await.unwrap_err().kind();
        assert_eq!(kind(&[b'n'; 256]).await, FsErrorKind::NameTooLong);
        assert_eq!(kind(b"").await, FsErrorKind::NotFound);
        for name in [b"a/b".as_slice(), b"a\0b", b".", b".."] {
            assert_eq!(kind(name).await, FsErrorKind::Invalid);
        }
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn a_directory_of_100000_names_finds_lists_and_removes_them() {
    let cell_size = CellSize::B4096;
    let sim = vmfs_core::sim::Sim::new(5);
    let disks = [vmfs_core::sim::MemoryDisk::new("lun", 4 << 30, Some(cell_size))];
    sim.block_on(vmfs_core::sim::format_disks(
        &sim,
        &disks,
        MkfsOptions { cell_size: Some(cell_size), ..MkfsOptions::default() },
    ))
    .unwrap();
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let directory = mkdir(&volume, volume.root(), b"many").await.unwrap().object;
        let name = |n: u32| format!("file-{n:06}.log").into_bytes();
        for n in 0..100_000 {
            create(&volume, directory, &name(n)).await.unwrap();
        }
        let listed = list(&volume, directory, 1000).await;
        assert_eq!(listed.len(), 100_000);
        assert_eq!(volume.stat(directory).await.unwrap().attributes.size, 100_000);
        for n in (0..100_000).step_by(997) {
            assert_eq!(volume.lookup(directory, &name(n)).await.unwrap().object, listed[&name(n)].0);
        }
        for n in (0..100_000).filter(|n| n % 10 != 0) {
            if n % 50 == 1 {
                volume.unlink(directory, &name(n)).await.unwrap();
            }
        }
        assert_eq!(list(&volume, directory, 999).await.len(), 98_000);
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn a_reader_of_a_directory_gets_each_name_that_stays_exactly_once_while_others_come_and_go() {
    for cell_size in [CellSize::B512, CellSize::B4096] {
        let (sim, disks) = world(3, 1, cell_size);
        sim.block_on(async {
            let (volume, _) = mount(&sim, &disks, 1).await;
            let root = volume.root();
            let stays = |n: u32| format!("a-name-that-stays-where-it-is-{n}").into_bytes();
            for n in 0..400 {
                create(&volume, root, &stays(n)).await.unwrap();
            }
            let (mut seen, mut cookie, mut turn) = (BTreeMap::new(), 0, 0u32);
            loop {
                let entries = volume.read_directory(root, cookie, 11).await.unwrap();
                for entry in &entries {
                    cookie = entry.cookie;
                    *seen.entry(entry.name.clone()).or_insert(0) += 1;
                }
                if entries.len() < 11 {
                    break;
                }
                for n in 0..8 {
                    create(&volume, root, format!("comes-{turn}-{n}").as_bytes()).await.unwrap();
                }
                if turn > 2 {
                    volume.unlink(root, format!("comes-{}-3", turn - 2).as_bytes()).await.unwrap();
                }
                turn += 1;
            }
            assert!((0..400).all(|n| seen[&stays(n)] == 1));
            assert!(seen.values().all(|times| *times == 1));
            volume.unmount().await.unwrap();
        });
        sim.end();
    }
}

#[test]
fn attributes_and_symbolic_links_are_kept() {
    let (sim, disks) = world(4, 2, CellSize::B512);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let root = volume.root();
        let link = volume.symlink(root, b"link", &[b't'; 4095], 3, 4).await.unwrap();
        assert_eq!(link.attributes.size, 4095);
        let kind = async |target: &[u8]| volume.symlink(root, b"x", target, 0, 0).await.unwrap_err().kind();
        assert_eq!(kind(&[b't'; 4096]).await, FsErrorKind::NameTooLong);
        assert_eq!(kind(b"").await, FsErrorKind::NotFound);
        let file = create(&volume, root, b"file").await.unwrap();
        assert_eq!(volume.read_link(file.object).await.unwrap_err().kind(), FsErrorKind::Invalid);
        let change = AttributeChange {
            mode: Some(0o4711),
            uid: Some(11),
            gid: Some(12),
            accessed_ns: Some(-5),
            modified_ns: Some(6),
            size: None,
        };
        volume.set_attributes(file.object, change).await.unwrap();
        volume.unmount().await.unwrap();
        let (volume, _) = mount(&sim, &disks, 2).await;
        assert_eq!(volume.read_link(link.object).await.unwrap(), [b't'; 4095]);
        let a = volume.lookup(root, b"file").await.unwrap().attributes;
        assert_eq!((a.mode, a.uid, a.gid, a.accessed_ns, a.modified_ns), (0o4711, 11, 12, -5, 6));
        assert_eq!(volume.lookup(file.object, b"x").await.unwrap_err().kind(), FsErrorKind::NotDirectory);
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn a_directory_made_under_the_root_goes_to_the_lun_with_the_most_room_and_its_files_follow_it() {
    let (sim, disks) = world(7, 3, CellSize::B512);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let mut luns = std::collections::BTreeSet::new();
        for n in 0..12 {
            let directory = mkdir(&volume, volume.root(), format!("vm{n}").as_bytes()).await.unwrap().object;
            let file = create(&volume, directory, b"disk").await.unwrap().object;
            let below = mkdir(&volume, directory, b"below").await.unwrap().object;
            assert_eq!((file.fd.lun(), below.fd.lun()), (directory.fd.lun(), directory.fd.lun()));
            luns.insert(directory.fd.lun());
        }
        assert_eq!(luns.len(), 3, "directories are spread");
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn an_uncontended_creation_in_a_known_directory_takes_three_round_trips() {
    use std::time::Duration;
    let (sim, disks) = world(6, 1, CellSize::B512);
    sim.block_on(async {
        let (volume, paths) = mount(&sim, &disks, 1).await;
        for n in 0..5 {
            create(&volume, volume.root(), format!("warm{n}").as_bytes()).await.unwrap();
        }
        let trip = Duration::from_millis(1);
        paths[0].set_latency(trip / 2, trip / 2);
        let start = sim.now();
        create(&volume, volume.root(), b"measured").await.unwrap();
        let trips = (sim.now() - start) / trip.as_nanos() as u64;
        assert!(trips <= 3, "{trips} round trips");
        paths[0].set_latency(Duration::ZERO, Duration::ZERO);
        volume.unmount().await.unwrap();
    });
    sim.end();
}
