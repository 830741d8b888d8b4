//! Owns: what the start of a byte range of a disk is: up to a few runs on LUNs, or zeros, or not known.
//! Promises: no allocation; each run comes with its reference.
//! Must not know: gates, rings, requests.

use lockd::client::{DirectFile, Segment};
use vmfs_core::mapping::epoch::RunRef;

/// Runs that are moved at a time.
pub(super) const BATCH: usize = 4;

/// Bytes on one LUN. They are not taken away while this lives.
pub(super) struct Piece {
    pub(super) lun: usize,
    /// First byte on the LUN.
    pub(super) offset: u64,
    /// First byte, counted from the start of the range.
    pub(super) start: usize,
    /// Bytes.
    pub(super) length: usize,
    _reference: RunRef,
}

/// Runs that follow one another.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) pieces: [Option<Piece>; BATCH],
    pub(super) count: usize,
    /// Bytes of all of them.
    pub(super) length: u64,
}

/// What a range begins with; lengths in bytes.
pub(super) enum Stretch {
    Data(Batch),
    Zero(u64),
    Unknown(u64),
}

/// Looks at the start of a range that is not empty.
pub(super) fn stretch(file: &DirectFile, position: u64, length: u64) -> Stretch {
    let mut found: Option<Stretch> = None;
    let mut ended = false;
    file.resolve(position, length, &mut |segment| {
        if ended {
            return;
        }
        match (&mut found, segment) {
            (None, Segment::Zero { length }) => found = Some(Stretch::Zero(length)),
            (None, Segment::Unknown { length }) => found = Some(Stretch::Unknown(length)),
            (Some(Stretch::Zero(all)), Segment::Zero { length }) => *all += length,
            (Some(Stretch::Unknown(all)), Segment::Unknown { length }) => *all += length,
            (None | Some(Stretch::Data(_)), Segment::Data { lun, offset, length, reference }) => {
                let Stretch::Data(batch) = found.get_or_insert_with(|| Stretch::Data(Batch::default())) else { return };
                let piece =
                    Piece { lun, offset, start: batch.length as usize, length: length as usize, _reference: reference };
                batch.pieces[batch.count] = Some(piece);
                batch.count += 1;
                batch.length += length;
                ended = batch.count == BATCH;
            }
            _ => ended = true,
        }
    });
    found.unwrap_or(Stretch::Unknown(length))
}
