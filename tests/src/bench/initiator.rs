//! Owns: the initiator as a VM uses it, on a disk of a volume on an iSCSI LUN, beside libiscsi on a bare LUN of the same target.
//! Promises: both take turns at one daemon, with the same sizes and depths; the disk's data do not go through the mount.
//! Must not know: how ratios are reported.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use scsi::{BlockDevice, DataBuffer};
use storage::{DiskSource, Storage, Supervisor};

use super::iscsi::{IMAGE_BYTES, IscsiWorkload, Load, build_load, by_libiscsi, fill};
use crate::harness::{Luns, Mount, command, folder, run};
use crate::machines::disk;
use crate::random::Random;
use crate::targets::launch;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A disk of a volume, as `vmm` opens it.
    Disk,
    /// libiscsi.
    Libiscsi,
}

/// Both, ready. Fields are dropped in order: what lies on top goes first.
pub struct InitiatorBench {
    load: PathBuf,
    bare: String,
    disk: PathBuf,
    mount: Option<Mount>,
    _luns: Luns,
    daemon: Child,
}

impl Drop for InitiatorBench {
    fn drop(&mut self) {
        if let Some(mount) = self.mount.take() {
            mount.unmount();
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Nobody runs a machine here.
struct Bystander;

impl Supervisor for Bystander {
    fn freeze(&self, _: &Path) {}

    fn thaw(&self, _: &Path) {}

    fn lost(&self, disk: &Path, cause: &str) {
        eprintln!("{}: {cause}", disk.display());
    }

    fn is_ending(&self) -> bool {
        false
    }
}

impl InitiatorBench {
    /// Makes the images in `folder`, starts the daemon, makes the volume and fills its disk.
    pub fn new(at: &Path) -> io::Result<InitiatorBench> {
        let load = build_load(at)?;
        let (bare, volume) = (at.join("bare.img"), at.join("volume.img"));
        fill(&bare)?;
        File::create(&volume)?.set_len(2 * IMAGE_BYTES)?;
        let target = |name: &str, image: &Path| format!("iqn.2026-01.test:{name}={},thin", image.display());
        let arguments =
            ["--portal", "127.0.0.1:0", "--target", &target("bare", &bare), "--target", &target("volume", &volume)];
        let (daemon, portals) = launch(at, &arguments.map(str::to_owned));
        let url = |name: &str| format!("iscsi://{}/iqn.2026-01.test:{name}/0", portals[0]);
        let luns = Luns::elsewhere(folder(), &[url("volume")]);
        run(command("mkfs.vmfs").args(["-L", "bench"]).args(luns.images()));
        let mount = luns.mount(1);
        let path = disk(&mount, "disk.vmdk", &IMAGE_BYTES.to_string(), "eagerzeroedthick");
        let mut flat = File::options().write(true).open(mount.at("disk-flat.vmdk"))?;
        let piece = vec![0x3c; 4 << 20];
        for _ in 0..IMAGE_BYTES / piece.len() as u64 {
            flat.write_all(&piece)?;
        }
        flat.sync_all()?;
        Ok(InitiatorBench { load, bare: url("bare"), disk: path, mount: Some(mount), _luns: luns, daemon })
    }

    /// Loads one of them for `time`.
    pub fn measure(&self, by: By, work: &IscsiWorkload, time: Duration, seed: u64) -> io::Result<Load> {
        match by {
            By::Libiscsi => by_libiscsi(&self.load, &self.bare, work, time, seed),
            By::Disk => by_disk(self.disk.clone(), *work, time, seed),
        }
    }
}

struct Work {
    disk: Storage,
    work: IscsiWorkload,
    next: Cell<u64>,
    random: RefCell<Random>,
    end: Instant,
    done: Cell<u64>,
}

fn by_disk(path: PathBuf, work: IscsiWorkload, time: Duration, seed: u64) -> io::Result<Load> {
    tokio_uring::start(async move {
        let source = DiskSource { path, read_only: false, cached: false, serial: None };
        let disk = storage::open(source, Arc::new(Bystander)).await.map_err(io::Error::other)?;
        if !matches!(disk, Storage::Vmfs(_)) {
            return Err(io::Error::other("the data of the disk go through the mount"));
        }
        // What the disk learns of where it lies is not measured.
        let first = DataBuffer::zeroed(4096, 4096);
        for at in (0..IMAGE_BYTES).step_by(16 << 20) {
            disk.read(at, &first).await.map_err(io::Error::other)?;
        }
        let (start, random) = (Instant::now(), RefCell::new(Random::new(seed)));
        let shared = Rc::new(Work { disk, work, next: Cell::new(0), random, end: start + time, done: Cell::new(0) });
        let tasks: Vec<_> = (0..work.depth).map(|_| tokio_uring::spawn(one_in_flight(shared.clone()))).collect();
        for task in tasks {
            task.await.map_err(io::Error::other)??;
        }
        let commands = shared.done.get();
        Ok(Load {
            commands,
            seconds: start.elapsed().as_secs_f64(),
            least: commands,
            most: commands,
            ..Load::default()
        })
    })
}

async fn one_in_flight(shared: Rc<Work>) -> io::Result<()> {
    let (work, buffer) = (&shared.work, DataBuffer::zeroed(shared.work.block as usize, 4096));
    let blocks = IMAGE_BYTES / work.block;
    while Instant::now() < shared.end {
        let nth = match work.random {
            true => shared.random.borrow_mut().below(blocks),
            false => shared.next.replace(shared.next.get() + 1) % blocks,
        };
        let moved = match work.writes {
            true => shared.disk.write(nth * work.block, &buffer, false).await,
            false => shared.disk.read(nth * work.block, &buffer).await,
        };
        moved.map_err(io::Error::other)?;
        shared.done.set(shared.done.get() + 1);
    }
    Ok(())
}
