//! Owns: reading a unit through its reference.
//! Promises: what is read is what was committed under the reference, or an error.
//! Must not know: what the stream means.

use super::units::Units;
use crate::error::FsError;
use crate::format::unit::UnitRef;
use crate::format::{Cell, CellKind, FormatError};
use crate::units::{FdId, Link};

/// Reads of a unit that fails its checks before that is believed.
const READ_TRIES: u32 = 3;

impl Units {
    /// Reads the stream of an immutable unit. A check that fails is read again twice; the caller reads the root again before it
    /// believes the error, for the unit may have been dropped meanwhile.
    pub async fn read(
        &self,
        reference: &UnitRef,
        kind: CellKind,
        owner: FdId,
        link: Link,
        index: u32,
    ) -> Result<Vec<u8>, FsError> {
        self.know(reference.at).await?;
        let member = self.context.member(reference.at.lun)?;
        let first = self.cell_of(reference.at, 0)?;
        let mut tries = 0;
        loop {
            let cells = self.context.io.read_span(&member.lun, first, reference.used_cells.into()).await?;
            match stream_of(cells, reference, kind, owner, link, index) {
                Ok(stream) => return Ok(stream),
                Err(cause) => {
                    tries += 1;
                    if tries == READ_TRIES {
                        return Err(FsError::Corrupt {
                            structure: format!("{kind:?} unit {} of {owner}", reference.at),
                            cause,
                        });
                    }
                }
            }
        }
    }
}

fn stream_of(
    cells: Vec<Result<Cell, FormatError>>,
    reference: &UnitRef,
    kind: CellKind,
    owner: FdId,
    link: Link,
    index: u32,
) -> Result<Vec<u8>, FormatError> {
    let mut crc = 0;
    let mut stream = Vec::new();
    for cell in cells {
        let cell = cell?;
        cell.expect_kind(kind)?;
        cell.expect_owner(owner, link, index)?;
        crc = crc32c::crc32c_append(crc, cell.image());
        stream.extend_from_slice(cell.payload());
    }
    if crc != reference.crc {
        return Err(FormatError::Value { structure: "unit", field: "crc32c", value: crc.into() });
    }
    Ok(stream)
}
