//! Owns: a mount in memory behind the real client library, with files as LUNs.
//! Promises: free space is full of old bytes, and so is space that was given back; neighbouring granules lie on different LUNs.
//! Must not know: the storage under test.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lockd::client::{Access, DirectFile, DiskParts, Lun, MountCalls, Withdrawn};
use lockd::ioctl::{Run, RunPage, state};
use parking_lot::Mutex;
use scsi::Identity;
use tempfile::NamedTempFile;
use vmfs_core::env::Instant;
use vmfs_core::gate::GatePage;
use vmfs_core::units::{Generation, LunIndex};

use crate::Supervisor;
use crate::vmfs::{Appearance, VmfsDisk};

/// Bytes of a granule.
pub const GRANULE: u64 = 16 << 10;
/// Granules of the disk.
pub const GRANULES: u64 = 64;
/// Bytes of the disk.
pub const SIZE: u64 = GRANULE * GRANULES;
/// What lies on a LUN before anybody writes.
const OLD: u8 = 0xEE;
const FOREVER: Instant = Instant(u64::MAX / 2);
const GENERATION: Generation = Generation(7);

#[derive(Clone, Copy)]
struct Place {
    lun: usize,
    offset: u64,
    published: bool,
}

/// What the mount knows.
#[derive(Default)]
struct Known {
    granules: HashMap<u64, Place>,
    grants: HashMap<u64, Vec<(u64, Place)>>,
    next_grant: u64,
    next_offset: u64,
    /// Granules that are in use or granted.
    used: u64,
    room: u64,
    counts: Counts,
    errno: Option<i32>,
    withdrawn: Option<Withdrawn>,
}

/// How often the mount was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub allocations: u64,
    pub flushes: u64,
    pub punches: u64,
}

/// A volume of two LUNs with one disk.
pub struct World {
    known: Mutex<Known>,
    page: GatePage,
    luns: [NamedTempFile; 2],
    /// What disks told: `freeze`, `thaw`, or the cause of a loss.
    pub told: Mutex<Vec<String>>,
    pub ending: AtomicBool,
}

fn lun_index(lun: usize) -> LunIndex {
    LunIndex::new(lun as u8 * 3 + 1).unwrap()
}

impl World {
    pub fn new() -> Arc<World> {
        let luns = [(); 2].map(|()| {
            let file = NamedTempFile::new().unwrap();
            file.as_file().write_all_at(&vec![OLD; 4 * SIZE as usize], 0).unwrap();
            file
        });
        let known = Mutex::new(Known { room: GRANULES, ..Known::default() });
        let (page, told, ending) = (GatePage::in_process(), Mutex::default(), AtomicBool::new(false));
        let world = Arc::new(World { known, page, luns, told, ending });
        world.open_gate();
        world
    }

    pub fn open_gate(&self) {
        (0..2).for_each(|lun| self.open_gate_of(lun));
    }

    pub fn open_gate_of(&self, lun: usize) {
        self.page.extend(lun_index(lun), GENERATION, FOREVER, 0);
    }

    pub fn close_gate_of(&self, lun: usize) {
        self.page.extend(lun_index(lun), GENERATION, Instant(0), 0);
    }

    pub fn poison(&self, lun: usize) {
        self.page.poison(lun_index(lun), GENERATION);
    }

    pub fn withdraw(&self, cause: Withdrawn) {
        self.known.lock().withdrawn = Some(cause);
    }

    /// The mount's calls fail from now on, or not any more.
    pub fn fail(&self, errno: Option<i32>) {
        self.known.lock().errno = errno;
    }

    /// Granules that the volume has in all.
    pub fn set_room(&self, granules: u64) {
        self.known.lock().room = granules;
    }

    pub fn used(&self) -> u64 {
        self.known.lock().used
    }

    pub fn counts(&self) -> Counts {
        self.known.lock().counts
    }

    /// Opens the disk; LUN 0 vouches for its lock.
    pub fn open(self: &Arc<World>, how: &How) -> VmfsDisk {
        let lun = |number: usize| {
            let writable = !how.read_only_luns.contains(&number);
            let file: File = OpenOptions::new().read(true).write(writable).open(self.luns[number].path()).unwrap();
            let (index, name) = (lun_index(number), format!("lun{number}"));
            Lun {
                access: Access::Descriptor(file.into()),
                alignment: how.alignment,
                name,
                index,
                generation: GENERATION,
            }
        };
        let parts = DiskParts {
            luns: vec![lun(0), lun(1)],
            mount: Box::new(Mount(self.clone())),
            path: "/mnt/disk-flat.vmdk".into(),
            writable: !how.read_only,
            size: SIZE,
            granule: GRANULE,
            block: 16 * GRANULE,
            gate: self.page.gate(),
            lock_lun: lun_index(0),
        };
        let identity = Identity { serial: "S".into(), naa: [0x60; 16] };
        let appearance = Appearance { identity, length: None, thin: how.thin };
        VmfsDisk::new(DirectFile::from_parts(parts).unwrap(), appearance, Arc::new(Ears(self.clone()))).unwrap()
    }

    /// The disk's bytes. After a crash only what is published is there.
    pub fn image(&self, after_crash: bool) -> Vec<u8> {
        let mut image = vec![0; SIZE as usize];
        for (granule, place) in &self.known.lock().granules {
            if place.published || !after_crash {
                let start = (granule * GRANULE) as usize;
                let bytes = &mut image[start..start + GRANULE as usize];
                self.luns[place.lun].as_file().read_exact_at(bytes, place.offset).unwrap();
            }
        }
        image
    }

    pub fn told(&self) -> Vec<String> {
        self.told.lock().clone()
    }
}

/// How to open the disk.
pub struct How {
    pub alignment: u32,
    pub thin: bool,
    pub read_only: bool,
    pub read_only_luns: Vec<usize>,
}

impl Default for How {
    fn default() -> Self {
        How { alignment: 512, thin: true, read_only: false, read_only_luns: Vec::new() }
    }
}

struct Ears(Arc<World>);

impl Supervisor for Ears {
    fn freeze(&self, _disk: &Path) {
        self.0.told.lock().push("freeze".into());
    }

    fn thaw(&self, _disk: &Path) {
        self.0.told.lock().push("thaw".into());
    }

    fn lost(&self, disk: &Path, cause: &str) {
        assert_eq!(disk, Path::new("/mnt/disk-flat.vmdk"));
        self.0.told.lock().push(cause.into());
    }

    fn is_ending(&self) -> bool {
        self.0.ending.load(Ordering::SeqCst)
    }
}

struct Mount(Arc<World>);

impl Mount {
    fn check(known: &Known) -> io::Result<()> {
        known.errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }
}

fn push(page: &mut RunPage, granule: u64, kind: u32, place: Option<Place>) {
    let (lun, offset) = place.map_or((0, 0), |place| (u32::from(lun_index(place.lun).get()), place.offset));
    let run = Run {
        offset: (granule * GRANULE).into(),
        length: GRANULE.into(),
        lun_offset: offset.into(),
        lun: lun.into(),
        state: kind.into(),
    };
    assert!(page.push(run));
}

fn granules(page: &RunPage) -> std::ops::Range<u64> {
    let end = (page.offset.get() + page.length.get()).min(SIZE);
    page.offset.get() / GRANULE..end.div_ceil(GRANULE)
}

impl MountCalls for Mount {
    fn extents(&self, page: &mut RunPage) -> io::Result<()> {
        let known = self.0.known.lock();
        Self::check(&known)?;
        for granule in granules(page) {
            let place = known.granules.get(&granule).copied();
            push(page, granule, if place.is_some() { state::DATA } else { state::ZERO }, place);
        }
        Ok(())
    }

    fn allocate(&self, page: &mut RunPage) -> io::Result<()> {
        let mut known = self.0.known.lock();
        Self::check(&known)?;
        known.counts.allocations += 1;
        let wanted: Vec<u64> = granules(page).take_while(|granule| !known.granules.contains_key(granule)).collect();
        let room = known.room.saturating_sub(known.used) as usize;
        if !wanted.is_empty() && room == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let mut granted = Vec::new();
        for granule in wanted.into_iter().take(room) {
            let place = Place { lun: (granule % 2) as usize, offset: known.next_offset, published: false };
            known.next_offset += GRANULE;
            granted.push((granule, place));
            push(page, granule, state::FILL, Some(place));
        }
        known.used += granted.len() as u64;
        if !granted.is_empty() {
            known.next_grant += 1;
            page.epoch_or_grant = known.next_grant.into();
            let number = known.next_grant;
            known.grants.insert(number, granted);
        }
        Ok(())
    }

    fn filled(&self, grant: u64, written: bool) -> io::Result<()> {
        let mut known = self.0.known.lock();
        let granted = known.grants.remove(&grant).expect("a grant ends once");
        match written {
            true => granted.into_iter().for_each(|(granule, place)| {
                assert!(known.granules.insert(granule, place).is_none(), "granule {granule} has two places");
            }),
            false => known.used -= granted.len() as u64,
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut known = self.0.known.lock();
        Self::check(&known)?;
        known.counts.flushes += 1;
        known.granules.values_mut().for_each(|place| place.published = true);
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut known = self.0.known.lock();
        Self::check(&known)?;
        assert_eq!((offset % GRANULE, length % GRANULE), (0, 0));
        known.counts.punches += 1;
        for granule in offset / GRANULE..(offset + length) / GRANULE {
            if let Some(place) = known.granules.remove(&granule) {
                known.used -= 1;
                let old = [OLD; GRANULE as usize];
                self.0.luns[place.lun].as_file().write_all_at(&old, place.offset)?;
            }
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(SIZE)
    }

    fn withdrawn(&self) -> Option<Withdrawn> {
        self.0.known.lock().withdrawn
    }
}
