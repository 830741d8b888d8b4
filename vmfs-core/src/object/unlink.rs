//! Owns: the end of an object: unlinking, unlinked, free.
//! Promises: its name goes between `unlinking` and `unlinked`; its cell is free only after its space is.
//! Must not know: directories, mappings: the caller removes the name and frees blocks and units.

use std::rc::Rc;

use super::{Image, Object, Objects};
use crate::alloc::units::{UnitEdit, UnitUse};
use crate::cas::{CasOutcome, CellChange};
use crate::context::Moment;
use crate::error::{FsError, FsErrorKind};
use crate::format::Cell;
use crate::format::root_cell::{HoldMode, ObjectState, RootCell};
use crate::format::table_entry::EntryKind;
use crate::units::FdId;

const TRIES: u32 = 64;

impl Objects {
    /// Marks an object whose name is about to go. From the image `expected` only, when given (an empty directory): `Ok(false)` when
    /// that is not the image any more. `Busy` when another host holds its lock.
    pub async fn begin_unlink(&self, object: &Object, expected: Option<&Rc<Image>>) -> Result<bool, FsError> {
        let by = self.context.own_slot(object.fd.lun())?;
        self.change_state(object, expected, true, |root| match root.state {
            ObjectState::Live | ObjectState::Creating(_) => Some(ObjectState::Unlinking(by)),
            ObjectState::Unlinking(marked) if marked == by => Some(ObjectState::Unlinking(by)),
            _ => None,
        })
        .await
    }

    /// The name stays after all.
    pub async fn cancel_unlink(&self, object: &Object) -> Result<(), FsError> {
        let by = self.context.own_slot(object.fd.lun())?;
        self.change_state(object, None, false, |root| {
            (root.state == ObjectState::Unlinking(by)).then_some(ObjectState::Live)
        })
        .await
        .map(|_| ())
    }

    /// The name is gone: the object lives on only for those who have it open on this host.
    pub async fn mark_unlinked(&self, object: &Object) -> Result<(), FsError> {
        let by = self.context.own_slot(object.fd.lun())?;
        let unlinked = |root: &RootCell| match root.state {
            ObjectState::Free => None,
            _ => Some(ObjectState::Unlinked(by)),
        };
        self.change_state(object, None, false, unlinked).await.map(|_| ())
    }

    async fn change_state(
        &self,
        object: &Object,
        expected: Option<&Rc<Image>>,
        refuse_locked: bool,
        next: impl Fn(&RootCell) -> Option<ObjectState>,
    ) -> Result<bool, FsError> {
        let _busy = object.busy.lock().await;
        self.space.roots.note(object.fd).await?;
        for _ in 0..TRIES {
            let image = object.image();
            if expected.is_some_and(|expected| !Rc::ptr_eq(expected, &image)) {
                return Ok(false);
            }
            if refuse_locked && image.root.lock.mode != HoldMode::Free && !self.check_may_write(object, &image).await? {
                continue;
            }
            let Some(state) = next(&image.root) else { return Err(FsError::Stale { fd: object.fd }) };
            let root = RootCell { state, ..image.root.clone() };
            if self.change_root_unlinked(object, &image, root).await? {
                return Ok(true);
            }
        }
        let message = format!("{}: other hosts changed it {TRIES} times in a row; try again", object.fd);
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    /// As `change_root`, and an object that is gone by then is no error of the reading.
    async fn change_root_unlinked(&self, object: &Object, image: &Rc<Image>, root: RootCell) -> Result<bool, FsError> {
        self.context.prove_live([object.fd.lun()]).await?;
        let change = CellChange::payload(&image.cell, root.encode());
        let sent = self.context.before_sending();
        match self.context.cas(&image.cell, change).await? {
            CasOutcome::Applied(cell) => {
                object.set_image(Image::new(cell, root, image.body.clone(), sent));
                Ok(true)
            }
            CasOutcome::Lost(cell) | CasOutcome::Overtaken(cell) => {
                let root = self.decode_root(object.fd, &cell)?;
                if root == image.root {
                    // A re-stamp: everything else is as it was.
                    object.set_image(Image::new(cell, root, image.body.clone(), sent));
                } else {
                    self.refresh(object).await?;
                }
                Ok(false)
            }
            CasOutcome::NotDone(error) => Err(error.into()),
            CasOutcome::Unknown(error) => {
                object.doubtful.set(true);
                Err(error.into())
            }
        }
    }

    /// Frees the root cell and the body of an unlinked object; its blocks and other units were freed before. The lock goes with it.
    pub async fn free(&self, object: &Object) -> Result<(), FsError> {
        let _busy = object.busy.lock().await;
        let mut image = object.image();
        let ObjectState::Unlinked(_) = image.root.state else {
            let message = format!("{} still has a name; this is a bug, nothing was freed", object.fd);
            return Err(FsError::refused(FsErrorKind::Invalid, message));
        };
        let body =
            image.root.body.map(|body| UnitUse { at: body.at, owner: object.fd, kind: EntryKind::Body, index: 0 });
        let marks: Vec<(UnitUse, UnitEdit)> = body.iter().map(|unit| (*unit, UnitEdit::Retire)).collect();
        self.space.units.edit(&marks, None).await?;
        let freed = RootCell::free(image.root.lock.token);
        for _ in 0..TRIES {
            let moment = self.context.now();
            self.context.prove_live([object.fd.lun()]).await?;
            match self.context.cas(&image.cell, CellChange::payload(&image.cell, freed.encode())).await? {
                CasOutcome::Applied(cell) => {
                    self.freed(object, cell, moment, body).await;
                    return Ok(());
                }
                CasOutcome::Lost(cell) | CasOutcome::Overtaken(cell) => {
                    let root = self.decode_root(object.fd, &cell)?;
                    if root == freed && cell.header().link == image.link() {
                        self.freed(object, cell, moment, body).await;
                        return Ok(());
                    }
                    if root != image.root {
                        break;
                    }
                    // A re-stamp: everything else is as it was.
                    image = Image::new(cell, root, image.body.clone(), moment);
                    object.set_image(image.clone());
                }
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        // Only recovery of this incarnation changes the cell of an unlinked object.
        self.context.member(object.fd.lun())?.set_unresolved();
        let message = format!("{}: its root cell was changed while it was freed; left to recovery", object.fd);
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    /// Frees the root cell of an object that never had a name nor a body, from this very image. False: somebody changed it first.
    pub(crate) async fn free_unnamed(&self, fd: FdId, cell: &Cell, root: &RootCell) -> Result<bool, FsError> {
        self.space.roots.note(fd).await?;
        self.context.prove_live([fd.lun()]).await?;
        let freed = RootCell::free(root.lock.token);
        match self.context.cas(cell, CellChange::payload(cell, freed.encode())).await? {
            CasOutcome::Applied(_) => {
                self.table.borrow_mut().remove(&fd);
                Ok(true)
            }
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => Ok(false),
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
        }
    }

    async fn freed(&self, object: &Object, cell: Cell, moment: Moment, body: Option<UnitUse>) {
        object.held.set(false);
        self.kept_locks.borrow_mut().remove(&object.fd);
        self.table.borrow_mut().remove(&object.fd);
        self.space.roots.give_back(object.fd, cell, moment).await;
        self.defer(body);
    }
}
