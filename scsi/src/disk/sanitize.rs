//! Owns: SANITIZE (SBC-4, 5.30): making everything that was ever written unreadable.
//! Promises: from its start to its end the medium is out of reach; a failure stays until EXIT FAILURE MODE or another attempt.
//! Must not know: when and where its future is polled.

use super::{Disk, first_bytes, write_failure};
use crate::block_device::{BlockDevice, ByteRange};
use crate::cdb::{Cdb, SanitizeAction};
use crate::data_buffer::DataBuffer;
use crate::sense::{Failure, Sense};

/// Bytes that are overwritten at a time.
const CHUNK: u64 = 1 << 20;

/// Where the unit's sanitize operation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    /// There is none.
    #[default]
    Idle,
    /// It goes on.
    Running,
    /// It has failed.
    Failed {
        /// EXIT FAILURE MODE may end this state.
        unrestricted: bool,
    },
}

/// A sanitize operation that has begun.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    /// What to write: one block, or nothing for zeros.
    pattern: Vec<u8>,
    /// The inverted pattern is written in between.
    invert: bool,
    count: u8,
    unrestricted: bool,
}

impl<D: BlockDevice> Disk<D> {
    /// What goes on during a sanitize operation, and after one that failed (SBC-4, 4.11.2).
    pub(super) fn check_sanitize(&self, cdb: &Cdb) -> Result<(), Failure> {
        let sense = match self.sanitize.get() {
            State::Idle => return Ok(()),
            State::Running => Sense::SANITIZING,
            State::Failed { .. } if matches!(cdb, Cdb::Sanitize { .. }) => return Ok(()),
            State::Failed { .. } => Sense::SANITIZE_FAILED,
        };
        let harmless =
            matches!(cdb, Cdb::Inquiry { .. } | Cdb::LogSense { .. } | Cdb::ReportSupportedOperationCodes { .. });
        if harmless { Ok(()) } else { Err(sense.into()) }
    }

    /// Checks a SANITIZE command and begins what it asks for; `None` if that is nothing.
    pub(crate) fn prepare_sanitize(
        &self,
        action: SanitizeAction,
        unrestricted: bool,
        length: usize,
        out: &DataBuffer,
    ) -> Result<Option<Work>, Failure> {
        let geometry = self.device.geometry();
        if action != SanitizeAction::Overwrite && length != 0 {
            return Err(Sense::cdb_field(7, Some(7)).into());
        }
        let work = match action {
            SanitizeAction::ExitFailureMode => {
                return match self.sanitize.get() {
                    State::Failed { unrestricted: false } => Err(Sense::cdb_field(1, Some(4)).into()),
                    _ => {
                        self.sanitize.set(State::Idle);
                        Ok(None)
                    }
                };
            }
            SanitizeAction::BlockErase => Work { pattern: Vec::new(), invert: false, count: 1, unrestricted },
            SanitizeAction::Overwrite => {
                let block = geometry.logical_block as usize;
                if length <= 4 || length > 4 + block {
                    return Err(Sense::cdb_field(7, Some(7)).into());
                }
                let list = first_bytes(out, length as u64)?.to_vec();
                parse_overwrite(&list, block, unrestricted)?
            }
        };
        self.check_writable(&geometry)?;
        if self.stopped.get() {
            return Err(Sense::STOPPED.into());
        }
        self.sanitize.set(State::Running);
        Ok(Some(work))
    }

    /// Carries out what [`Disk::prepare_sanitize`] has begun. Aborts and resets do not end it.
    pub(crate) async fn sanitize(&self, work: Work) -> Result<(), Failure> {
        let result = self.overwrite_all(&work).await;
        self.sanitize.set(match result {
            Ok(()) => State::Idle,
            Err(_) => State::Failed { unrestricted: work.unrestricted },
        });
        result
    }

    async fn overwrite_all(&self, work: &Work) -> Result<(), Failure> {
        let geometry = self.device.geometry();
        let all = ByteRange { start: 0, length: geometry.bytes() };
        let _held = self.ranges.exclusive(all).await;
        let mut pattern = work.pattern.clone();
        for pass in 0..work.count {
            if pass != 0 && work.invert {
                pattern.iter_mut().for_each(|byte| *byte = !*byte);
            }
            let mut done = 0;
            while done < all.length {
                let part = ByteRange { start: done, length: CHUNK.min(all.length - done) };
                if pattern.is_empty() {
                    self.device.write_zeroes(part, geometry.thin).await.map_err(write_failure(&geometry))?;
                } else {
                    self.write_pattern(part, &pattern, None, &geometry).await?;
                }
                done += part.length;
            }
        }
        self.device.flush().await.map_err(write_failure(&geometry))
    }
}

/// The parameter list of OVERWRITE: count, and a pattern that is repeated over the block.
fn parse_overwrite(list: &[u8], block: usize, unrestricted: bool) -> Result<Work, Sense> {
    let count = list[0] & 0x1F;
    if list[0] & 0x60 != 0 || list[1] != 0 || count == 0 {
        return Err(Sense::parameter_field(0));
    }
    let pattern = &list[4..];
    let announced = usize::from(u16::from_be_bytes([list[2], list[3]]));
    if announced == 0 || announced > block || announced != pattern.len() {
        return Err(Sense::parameter_field(2));
    }
    let pattern = pattern.iter().copied().cycle().take(block).collect();
    Ok(Work { pattern, invert: list[0] & 0x80 != 0, count, unrestricted })
}
