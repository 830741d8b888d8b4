//! Owns: VERIFY and WRITE AND VERIFY.
//! Promises: comparing needs bounded memory.
//! Must not know: CDB layouts.

use super::{Data, Disk, first_bytes, read_failure};
use crate::block_device::{BlockDevice, ByteRange, Geometry};
use crate::cdb::{Blocks, ByteCheck};
use crate::data_buffer::DataBuffer;
use crate::sense::{Failure, Sense};

/// Bytes read at a time for comparing.
const CHUNK: usize = 256 << 10;
/// Alignment of scratch memory: what O_DIRECT wants at most.
const ALIGNMENT: usize = 4096;

impl<D: BlockDevice> Disk<D> {
    pub(super) async fn verify(&self, blocks: Blocks, check: ByteCheck, out: &DataBuffer) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        let range = self.transfer_range(blocks, &geometry)?;
        if range.length == 0 {
            return Ok(0);
        }
        match check {
            ByteCheck::Medium => {
                self.read_through(range, &geometry).await?;
                Ok(0)
            }
            ByteCheck::Compare => {
                let expected = first_bytes(out, range.length)?;
                self.compare(range, &expected, &geometry).await?;
                Ok(range.length)
            }
            ByteCheck::CompareSame => {
                let block = u64::from(geometry.logical_block);
                let expected = first_bytes(out, block)?;
                self.compare(range, &expected, &geometry).await?;
                Ok(block)
            }
        }
    }

    pub(super) async fn write_and_verify(
        &self,
        blocks: Blocks,
        check: ByteCheck,
        data: Data<'_>,
    ) -> Result<u64, Failure> {
        if check == ByteCheck::CompareSame {
            return Err(Sense::cdb_field(1, Some(2)).into());
        }
        let wanted = self.write(blocks, true, data).await?;
        let block = u64::from(self.device.geometry().logical_block);
        let written = wanted.min(data.out.len() as u64) / block;
        self.verify(Blocks { lba: blocks.lba, count: written }, check, data.out).await?;
        Ok(wanted)
    }

    /// Reads a range for nothing but the errors.
    async fn read_through(&self, range: ByteRange, geometry: &Geometry) -> Result<(), Failure> {
        let scratch = DataBuffer::zeroed(CHUNK.min(range.length as usize), ALIGNMENT);
        let mut done = 0;
        while done < range.length {
            let length = (scratch.len() as u64).min(range.length - done);
            let part = scratch.slice(0..length as usize);
            self.device.read(range.start + done, &part).await.map_err(read_failure(geometry))?;
            done += length;
        }
        Ok(())
    }

    /// Compares a range with `expected`, which is repeated if it is shorter than the range.
    pub(super) async fn compare(
        &self,
        range: ByteRange,
        expected: &DataBuffer,
        geometry: &Geometry,
    ) -> Result<(), Failure> {
        let chunk = CHUNK.min(range.length as usize);
        let scratch = DataBuffer::zeroed(chunk, ALIGNMENT);
        let (mut wanted, mut found) = (vec![0; chunk], vec![0; chunk]);
        let mut done = 0;
        while done < range.length {
            let length = (chunk as u64).min(range.length - done) as usize;
            let part = scratch.slice(0..length);
            self.device.read(range.start + done, &part).await.map_err(read_failure(geometry))?;
            part.copy_to(0, &mut found[..length]);
            copy_repeated(expected, done as usize, &mut wanted[..length]);
            if let Some(at) = wanted[..length].iter().zip(&found[..length]).position(|(want, have)| want != have) {
                return Err(Sense::MISCOMPARE.with_information(done + at as u64).into());
            }
            done += length as u64;
        }
        Ok(())
    }
}

/// Fills `target` with the bytes of `source` from `offset` on, over and over.
fn copy_repeated(source: &DataBuffer, offset: usize, target: &mut [u8]) {
    let mut filled = 0;
    while filled < target.len() {
        let start = (offset + filled) % source.len();
        let length = (source.len() - start).min(target.len() - filled);
        source.copy_to(start, &mut target[filled..filled + length]);
        filled += length;
    }
}
