//! Owns: first writes: space from the mount, whole granules written around the guest's bytes, and the word that they are there.
//! Promises: one request fills a granule, others wait; space that could not be filled goes back; no bytes that were on the LUN
//! before can ever show. Must not know: how the mount finds space.

use std::sync::Arc;

use lockd::client::{DirectFile, Grant, GrantPiece};
use scsi::{DataBuffer, StorageError};
use vmfs_core::gate::GateState;

use super::moving::OWN_ALIGNMENT;
use super::{VmfsDisk, blocking};
use crate::file::failure;

/// The most bytes of one first write.
const FILL_AT_MOST: usize = 16 << 20;

impl VmfsDisk {
    /// Writes `data`, or a part of its start, to byte `position`, which has no space yet. Returns how many bytes are done; the
    /// range has to be looked at again for the rest.
    pub(super) async fn fill(&self, position: u64, data: &DataBuffer) -> Result<usize, StorageError> {
        let data = data.slice(0..data.len().min(FILL_AT_MOST));
        let length = data.len() as u64;
        let granule = self.file.granule_bytes();
        let granules = position - position % granule..(position + length).next_multiple_of(granule);
        let Some(_fill) = self.fills.begin(granules).await else { return Ok(0) };
        self.keeper.pass(None).await?;
        let file = self.file.clone();
        let asked = DirectFile::allocate_for(file, position, length);
        match blocking(move || lockd::client::block_on(asked)).await {
            Ok(Some(grant)) => self.fill_grant(grant, position, &data).await,
            Ok(None) => Ok(0),
            Err(error) => self.wait_or_fail(position, &error).await.map(|()| 0),
        }
    }

    async fn fill_grant(
        &self,
        grant: Grant<Arc<DirectFile>>,
        position: u64,
        data: &DataBuffer,
    ) -> Result<usize, StorageError> {
        for piece in grant.pieces() {
            if let Err(error) = self.fill_piece(piece, position, data).await {
                // Nothing of it is being written any more, and nothing of it is reachable.
                blocking(move || drop(grant)).await;
                return Err(error);
            }
        }
        let mut end = position;
        for piece in grant.pieces() {
            if piece.file_offset <= end {
                end = end.max(piece.file_offset + piece.length);
            }
        }
        let done = end.min(position + data.len() as u64) - position;
        blocking(move || grant.filled()).await.map_err(|error| self.refused(position, &error))?;
        Ok(done as usize)
    }

    /// Writes one piece of a grant: the guest's bytes with zeros around them.
    async fn fill_piece(&self, piece: &GrantPiece, position: u64, data: &DataBuffer) -> Result<(), StorageError> {
        let piece_end = piece.file_offset + piece.length;
        let start = position.clamp(piece.file_offset, piece_end);
        let end = (position + data.len() as u64).clamp(start, piece_end);
        let part = match end - start {
            0 => DataBuffer::empty(),
            _ => data.slice((start - position) as usize..(end - position) as usize),
        };
        let lun = self.lun(piece.lun).map_err(failure(start))?;
        let part = if part.is_aligned(lun.alignment) {
            part
        } else {
            let bounce = DataBuffer::zeroed(part.len(), OWN_ALIGNMENT);
            bounce.copy_from_buffer(&part);
            bounce
        };
        let (before, after) = ((start - piece.file_offset) as usize, (piece_end - end) as usize);
        loop {
            self.keeper.pass(Some(piece.lun)).await?;
            match self.write_padded(piece.lun, piece.offset, (before, &part, after)).await {
                Ok(()) => return Ok(()),
                Err(error) if self.keeper.state(piece.lun) == GateState::Open && !self.is_shut_out(&error) => {
                    return Err(failure(start)(error));
                }
                // It has ended, so it may be sent again when the gate is open.
                Err(_) => {}
            }
        }
    }
}
