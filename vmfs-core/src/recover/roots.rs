//! Owns: recovery in one FD container.
//! Promises: every root cell of it is re-stamped, so that no creation, mark or lock of the incarnation lands there any more.
//! Must not know: how a mark is decided (the names do that).

use super::Recovery;
use crate::cas::{CasOutcome, CellChange};
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::ObjectRef;
use crate::format::layout::roots_per_container;
use crate::format::root_cell::{ObjectState, ObjectType, RootCell};
use crate::format::{Cell, CellKind};
use crate::units::{BlockAddress, FdId};

/// Root cells re-stamped with one batch.
const BATCH: usize = 64;
/// Times that a cell is re-stamped again because its read was torn or another host changed it.
const TRIES: u32 = 64;

/// What the root cells of a container ask for.
#[derive(Default)]
struct FoundRoots {
    /// Objects that carry a mark of the incarnation.
    marked: Vec<ObjectRef>,
    /// Directories, in which a move may have left an entry.
    directories: Vec<ObjectRef>,
}

impl Recovery<'_> {
    pub(super) async fn fd_container(&mut self, container: BlockAddress) -> Result<(), FsError> {
        let layout = &self.member.layout();
        let count = roots_per_container(layout.cell_size, layout.block_size) as usize;
        let missing = || FsError::refused(FsErrorKind::Corrupt, format!("there is no FD container {container}"));
        let first = FdId::new(container, 0).and_then(|fd| layout.root_cell(fd)).ok_or_else(missing)?;
        let cells = self.context().io.read_span(&self.member.lun, first, count).await?;
        self.still_claimed().await?;
        self.context().prove_live([container.lun]).await?;
        let mut found = FoundRoots::default();
        let mut nth = 0;
        for batch in cells.chunks(BATCH) {
            let sound: Vec<(u16, Cell)> = batch
                .iter()
                .enumerate()
                .filter_map(|(step, cell)| Some(((nth + step) as u16, cell.as_ref().ok()?.clone())))
                .collect();
            let torn = batch.iter().enumerate().filter(|(_, cell)| cell.is_err()).map(|(step, _)| (nth + step) as u16);
            let mut again: Vec<u16> = torn.collect();
            let by = self.context().own_slot(container.lun)?;
            let pairs = sound
                .iter()
                .map(|(_, cell)| (cell.clone(), self.context().io.successor(cell, CellChange::same(cell), by)))
                .collect();
            for ((number, cell), outcome) in sound.iter().zip(self.context().cas_pairs(pairs).await) {
                match outcome? {
                    CasOutcome::Applied(_) => self.sort(&mut found, container, *number, cell)?,
                    CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => again.push(*number),
                    CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
                }
            }
            for number in again {
                self.restamped_alone(&mut found, container, number).await?;
            }
            nth += batch.len();
        }
        for directory in found.directories {
            self.parts.names.tidy_directory(directory).await?;
        }
        for object in found.marked {
            self.done.marks += u64::from(self.parts.names.settle_mark_of(object, self.dead).await?);
        }
        Ok(())
    }

    /// Notes what there is to do about the object in a root cell.
    fn sort(&self, found: &mut FoundRoots, container: BlockAddress, number: u16, cell: &Cell) -> Result<(), FsError> {
        let fd = FdId::new(container, number)
            .ok_or_else(|| FsError::refused(FsErrorKind::Corrupt, format!("{container} has no root cell {number}")))?;
        let corrupt = |cause| FsError::Corrupt { structure: format!("root cell of {fd}"), cause };
        cell.expect_kind(CellKind::Root).map_err(corrupt)?;
        let root = RootCell::decode(self.context().cell_size(), cell.payload()).map_err(corrupt)?;
        let object = ObjectRef { fd, link: cell.header().link };
        match root.state {
            ObjectState::Creating(by) | ObjectState::Unlinking(by) | ObjectState::Unlinked(by) if by == self.dead => {
                found.marked.push(object);
            }
            ObjectState::Creating(_) | ObjectState::Live if root.object_type == Some(ObjectType::Directory) => {
                found.directories.push(object);
            }
            _ => {}
        }
        Ok(())
    }

    async fn restamped_alone(
        &self,
        found: &mut FoundRoots,
        container: BlockAddress,
        number: u16,
    ) -> Result<(), FsError> {
        let address = FdId::new(container, number).and_then(|fd| self.member.layout().root_cell(fd));
        let Some(address) = address else { return Ok(()) };
        for _ in 0..TRIES {
            let cell = self.context().read_cell(address).await?;
            self.context().prove_live([container.lun]).await?;
            match self.context().cas(&cell, CellChange::same(&cell)).await? {
                CasOutcome::Applied(_) => return self.sort(found, container, number, &cell),
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        let message = format!("root cell {address} is changed by other hosts all the time; try again");
        Err(FsError::refused(FsErrorKind::Busy, message))
    }
}
