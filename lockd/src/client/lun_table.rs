//! Owns: the LUNs behind an open disk; some may come while it is open.
//! Promises: a lookup takes no lock and allocates nothing; a position means the same LUN for ever.
//! Must not know: where a LUN comes from.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::Mutex;
use vmfs_core::units::LunIndex;

use super::direct::Lun;

const NOWHERE: u8 = u8::MAX;
/// Positions: one for each LUN that a volume can have.
const MOST: usize = NOWHERE as usize;

pub(super) struct LunTable {
    luns: Box<[OnceLock<Lun>]>,
    count: AtomicUsize,
    /// LUN index -> position.
    positions: [AtomicU8; 256],
    /// Held by whoever asks for more.
    pub(super) growing: Mutex<()>,
}

impl LunTable {
    /// A table of these. `Err`: a LUN that is named twice.
    pub(super) fn new(luns: Vec<Lun>) -> Result<LunTable, LunIndex> {
        let table = LunTable {
            luns: (0..MOST).map(|_| OnceLock::new()).collect(),
            count: AtomicUsize::new(0),
            positions: std::array::from_fn(|_| AtomicU8::new(NOWHERE)),
            growing: Mutex::new(()),
        };
        for lun in luns {
            let index = lun.index;
            if !table.push(lun) {
                return Err(index);
            }
        }
        Ok(table)
    }

    /// Adds a LUN; false: it is there already. Only under `growing`, or while nobody else has the table.
    pub(super) fn push(&self, lun: Lun) -> bool {
        let (index, position) = (usize::from(lun.index.get()), self.count.load(Ordering::Relaxed));
        if position >= MOST || self.positions[index].load(Ordering::Relaxed) != NOWHERE {
            return false;
        }
        let added = self.luns[position].set(lun).is_ok();
        self.count.store(position + 1, Ordering::Release);
        self.positions[index].store(position as u8, Ordering::Release);
        added
    }

    /// Where the LUN of an index is.
    pub(super) fn position(&self, index: u8) -> Option<usize> {
        let position = self.positions[usize::from(index)].load(Ordering::Acquire);
        (position != NOWHERE).then_some(position.into())
    }

    /// The LUN at a position.
    pub(super) fn get(&self, position: usize) -> Option<&Lun> {
        self.luns.get(position)?.get()
    }

    /// All, by position.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Lun> {
        self.luns[..self.count.load(Ordering::Acquire)].iter().filter_map(OnceLock::get)
    }
}
