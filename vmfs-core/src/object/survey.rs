//! Owns: looking through all root cells of a LUN.
//! Promises: every object that was there all the while is given once; nothing is written. A cell that cannot be read is passed over.
//! Must not know: what is looked for.

use super::Objects;
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::layout::roots_per_container;
use crate::format::root_cell::{ObjectState, RootCell};
use crate::units::{BlockAddress, FdId, Link, LunIndex};

/// Block table cells looked through for containers in one step.
const SCAN_CELLS: usize = 1024;

/// An object as its root cell shows it.
pub(crate) struct Surveyed {
    /// Identity.
    pub fd: FdId,
    /// Link counter.
    pub link: Link,
    /// The root cell.
    pub root: RootCell,
}

impl Objects {
    /// Gives the objects of a LUN that have a name or may have one to `each`, until that returns false.
    pub(crate) async fn survey(&self, lun: LunIndex, each: &mut dyn FnMut(Surveyed) -> bool) -> Result<(), FsError> {
        let blocks = &self.space.blocks;
        if !blocks.count(lun).complete {
            let mut from = Some(0);
            while let Some(at) = from {
                from = blocks.scan(lun, at, SCAN_CELLS).await?;
            }
        }
        let containers: Vec<BlockAddress> =
            blocks.containers().fds.borrow().iter().filter(|at| at.lun == lun).copied().collect();
        for container in containers {
            if !self.survey_container(container, each).await? {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn survey_container(
        &self,
        container: BlockAddress,
        each: &mut dyn FnMut(Surveyed) -> bool,
    ) -> Result<bool, FsError> {
        let member = self.context.member(container.lun)?;
        let count = roots_per_container(member.layout().cell_size, member.layout().block_size);
        let first = FdId::new(container, 0).and_then(|fd| member.layout().root_cell(fd));
        let missing = || FsError::refused(FsErrorKind::Corrupt, format!("there is no FD container {container}"));
        let cells = self.context.io.read_span(&member.lun, first.ok_or_else(missing)?, count as usize).await?;
        for (nth, cell) in cells.into_iter().enumerate() {
            let fd = FdId::new(container, nth as u16).ok_or_else(missing)?;
            // A read that is torn by a change, or a damaged cell, which fsck finds.
            let Ok(cell) = cell else { continue };
            if cell.expect_kind(CellKind::Root).is_err() {
                continue;
            }
            let Ok(root) = RootCell::decode(member.layout().cell_size, cell.payload()) else { continue };
            let is_gone = matches!(root.state, ObjectState::Free | ObjectState::Unlinked(_));
            if !is_gone && !each(Surveyed { fd, link: cell.header().link, root }) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
