//! Owns: reading the LUNs of a volume for a check, with a small cache.
//! Promises: reads only; memory is bounded; a place that cannot be read is asked for once.
//! Must not know: what cells mean.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use crate::buf::AlignedBuf;
use crate::format::{Cell, CellContext, FormatError};
use crate::lun::{Lun, LunError};
use crate::units::{CellAddress, LunIndex};

/// Bytes of a cached piece.
const PIECE: u64 = 64 << 10;
/// Pieces of each of the two generations of the cache: 32 MiB in all.
const GENERATION: usize = 256;

/// Why a cell was not had.
pub(super) enum Unread {
    /// It fails its checks.
    Damaged(FormatError),
    /// The LUN did not give it. `None`: that was said before.
    Failed(Option<LunError>),
    /// The LUN was not given.
    Missing,
}

/// Reads cells of the LUNs of one volume.
pub(super) struct Reader {
    pub context: CellContext,
    luns: BTreeMap<LunIndex, Rc<dyn Lun>>,
    young: HashMap<(LunIndex, u64), Rc<AlignedBuf>>,
    old: HashMap<(LunIndex, u64), Rc<AlignedBuf>>,
    failed: HashSet<(LunIndex, u64)>,
}

impl Reader {
    pub fn new(context: CellContext, luns: BTreeMap<LunIndex, Rc<dyn Lun>>) -> Reader {
        Reader { context, luns, young: HashMap::new(), old: HashMap::new(), failed: HashSet::new() }
    }

    /// Reads one cell and checks magic, version, checksum, volume and address.
    pub async fn cell(&mut self, at: CellAddress) -> Result<Cell, Unread> {
        let piece = self.piece(at).await?;
        let from = (at.offset % PIECE) as usize;
        let size = self.context.cell_size.bytes();
        let available = piece.len().saturating_sub(from);
        let image = piece.get(from..from + size).ok_or(Unread::Damaged(FormatError::Length {
            structure: "LUN",
            needed: size,
            available,
        }))?;
        Cell::decode(&self.context, at, image).map_err(Unread::Damaged)
    }

    async fn piece(&mut self, at: CellAddress) -> Result<Rc<AlignedBuf>, Unread> {
        let key = (at.lun, at.offset / PIECE);
        if let Some(piece) = self.young.get(&key) {
            return Ok(piece.clone());
        }
        let piece = match self.old.remove(&key) {
            Some(piece) => piece,
            None => {
                if self.failed.contains(&key) {
                    return Err(Unread::Failed(None));
                }
                let read = self.span(at.lun, key.1 * PIECE, PIECE as usize).await;
                if let Err(Unread::Failed(_)) = &read {
                    self.failed.insert(key);
                }
                Rc::new(read?)
            }
        };
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, piece.clone());
        Ok(piece)
    }

    /// Reads a range, cut at the end of the LUN; `offset` is a multiple of 4096.
    pub async fn span(&self, lun: LunIndex, offset: u64, length: usize) -> Result<AlignedBuf, Unread> {
        let Some(lun) = self.luns.get(&lun) else { return Err(Unread::Missing) };
        let alignment = lun.alignment() as u64;
        let end = (offset + length as u64).next_multiple_of(alignment).min(lun.bytes() - lun.bytes() % alignment);
        if end <= offset {
            return Ok(AlignedBuf::zeroed(0));
        }
        let mut buf = lun.read(offset, (end - offset) as usize).await.map_err(|error| Unread::Failed(Some(error)))?;
        buf.truncate(length);
        Ok(buf)
    }
}
