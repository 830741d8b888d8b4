//! Owns: the volumes that runs begin with: formatted and filled once, then copied.
//! Promises: every run of a kind begins with the same bytes.
//! Must not know: what runs do.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use engine::disk::descriptor::AdapterType;
use engine::disk::{self, DiskSpec};
use engine::error::FsError;
use engine::file::OpenMode;
use engine::format::body::DiskFormat;
use engine::format::dirent::ObjectRef;
use engine::format::header::{LeaseTimes, LunHeader};
use engine::format::layout::{HEADER_OFFSET, LunLayout, header_cell};
use engine::format::{Cell, CellContext, cell};
use engine::lun::Lun;
use engine::mkfs::MkfsOptions;
use engine::sim::{HostNo, MemoryDisk, Sim, Snapshot, format_disks};
use engine::slot::HostIdentity;
use engine::units::{BlockSize, CellSize, Uuid};
use engine::volume::{MountOptions, NewFile, Stat, Volume};

use super::plan::{CLOCK_PPM, DISKS, SECTORS};
use super::stamp::SECTOR;
use super::witness::Start;

/// Bytes of a LUN.
const LUN_BYTES: u64 = 64 << 20;
/// Bytes of a block.
const BLOCK_BYTES: u64 = 64 << 10;
/// Blocks that are left free on a volume that is nearly full.
const LEFT_FREE: u64 = 14;
/// Lease parameters: short ones, so that a takeover takes little virtual time, and clocks that differ much.
pub const LEASE: LeaseTimes = LeaseTimes { lease_ms: 3000, renew_ms: 500, margin_ms: 1000, clock_ppm: CLOCK_PPM };

/// What decides the first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// Cells of 4096 bytes.
    pub large_cells: bool,
    /// LUNs.
    pub luns: usize,
    /// Only some blocks are free.
    pub nearly_full: bool,
}

/// A volume as runs begin with it.
pub struct Fresh {
    /// Its cell size.
    pub cell_size: CellSize,
    snapshots: Vec<Snapshot>,
    /// For the witness.
    pub start: Start,
    /// The two directories.
    pub directories: [ObjectRef; 2],
    /// The virtual disks.
    pub disks: Vec<Stat>,
}

thread_local! {
    static FRESH: RefCell<BTreeMap<Kind, Rc<Fresh>>> = const { RefCell::new(BTreeMap::new()) };
}

/// The volume of a kind; made at the thread's first call.
pub fn fresh(kind: Kind) -> Rc<Fresh> {
    if let Some(known) = FRESH.with_borrow(|all| all.get(&kind).cloned()) {
        return known;
    }
    let made = Rc::new(make(kind));
    FRESH.with_borrow_mut(|all| all.insert(kind, made.clone()));
    made
}

impl Fresh {
    /// LUNs with the first bytes.
    pub fn disks(&self) -> Vec<MemoryDisk> {
        let each = self.snapshots.iter().enumerate().map(|(nth, snapshot)| {
            let disk = empty(nth, self.cell_size);
            disk.restore(snapshot);
            disk
        });
        each.collect()
    }
}

fn empty(nth: usize, cell_size: CellSize) -> MemoryDisk {
    MemoryDisk::new(&format!("lun{nth}"), LUN_BYTES, Some(cell_size))
}

/// How a host of this number mounts.
pub fn mount_options(number: u32) -> MountOptions {
    let host = HostIdentity { host: Uuid([number as u8; 16]), boot: Uuid([1; 16]), name: format!("host{number}") };
    MountOptions { read_only: false, host, slot_hint: None, degraded: false }
}

/// A new file, exclusively.
pub fn new_file() -> NewFile {
    NewFile { object_type: engine::format::root_cell::ObjectType::File, mode: 0o644, uid: 7, gid: 8, exclusive: true }
}

fn make(kind: Kind) -> Fresh {
    let sim = Sim::new(1);
    let cell_size = if kind.large_cells { CellSize::B4096 } else { CellSize::B512 };
    let disks: Vec<MemoryDisk> = (0..kind.luns).map(|nth| empty(nth, cell_size)).collect();
    let options = MkfsOptions {
        label: "simulated".into(),
        block_size: BlockSize::from_bytes(BLOCK_BYTES).expect("a legal block size"),
        cell_size: Some(cell_size),
        lease: LEASE,
        ..MkfsOptions::default()
    };
    let (directories, found) = sim
        .block_on(async {
            format_disks(&sim, &disks, options).await?;
            let luns = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(&sim, HostNo(1)) }).collect();
            let volume = Volume::mount(luns, mount_options(250), sim.env(HostNo(1))).await?;
            let made = furnish(&volume, kind.nearly_full).await?;
            volume.unmount().await?;
            Ok::<_, FsError>(made)
        })
        .unwrap_or_else(|error| panic!("a fresh volume cannot be made: {error}"));
    sim.end();
    let mut layouts = Vec::new();
    let mut context = None;
    for disk in &disks {
        let (found, layout) = layout_of(disk, cell_size);
        context = Some(found);
        layouts.push(layout);
    }
    let start = Start::of(context.expect("there is a LUN"), layouts, &disks);
    Fresh { cell_size, snapshots: disks.iter().map(MemoryDisk::snapshot).collect(), start, directories, disks: found }
}

async fn furnish(volume: &Volume, nearly_full: bool) -> Result<([ObjectRef; 2], Vec<Stat>), FsError> {
    let root = volume.root();
    let one = volume.make_directory(root, b"one", 0o755, 0, 0).await?.object;
    let two = volume.make_directory(root, b"two", 0o755, 0, 0).await?.object;
    let mut disks = Vec::new();
    for nth in 0..DISKS {
        let format = if nth == 0 { DiskFormat::Thin } else { DiskFormat::ZeroedThick };
        let spec = DiskSpec {
            size: u64::from(SECTORS) * SECTOR as u64,
            format,
            adapter: AdapterType::default(),
            multi_writer: false,
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        disk::create(volume, root, format!("k{nth}.vmdk").as_bytes(), spec, &mut |_| ()).await?;
        disks.push(volume.lookup(root, format!("k{nth}-flat.vmdk").as_bytes()).await?);
    }
    if nearly_full {
        let (_, file) = volume.create(root, b"filler", new_file(), Some(OpenMode::WRITE)).await?;
        let file = file.expect("it was asked to be open");
        let blocks = volume.statfs().await.free_blocks.saturating_sub(LEFT_FREE);
        volume.files().allocate_range(&file, 0..blocks * BLOCK_BYTES, false).await?;
        volume.close(file).await?;
    }
    Ok(([one, two], disks))
}

fn layout_of(disk: &MemoryDisk, cell_size: CellSize) -> (CellContext, LunLayout) {
    let bytes = disk.peek(HEADER_OFFSET, 4096);
    let (context, lun) = cell::probe(HEADER_OFFSET, &bytes).expect("a fresh volume has a header");
    let cell = Cell::decode(&context, header_cell(lun), &bytes[..cell_size.bytes()]).expect("the header is sound");
    let header = LunHeader::decode(cell_size, cell.payload()).expect("the header is sound");
    let layout = LunLayout { lun, cell_size, block_size: header.block_size, segments: header.segments };
    (context, layout)
}
