//! Owns: reading an object.
//! Promises: what is given is one consistent state, or an error; nothing is written.
//! Must not know: names.

use std::cell::{Cell as StdCell, RefCell};
use std::rc::Rc;

use tokio::sync::Mutex;

use super::{Image, Object, Objects};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Body;
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::{ObjectState, RootCell};
use crate::format::unit::UnitRef;
use crate::format::{Cell, CellKind};
use crate::sabotage::{Sabotage, active};
use crate::units::{CellAddress, FdId, Link};

/// Reads of a body that changes all the time before that is given up.
const TRIES: u32 = 32;

impl Objects {
    /// Address of an object's root cell.
    pub fn root_address(&self, fd: FdId) -> Result<CellAddress, FsError> {
        let member = self.context.member(fd.lun())?;
        member.layout().root_cell(fd).ok_or(FsError::Stale { fd })
    }

    /// Reads and decodes a root cell, whatever its state.
    pub async fn read_root(&self, fd: FdId) -> Result<(Cell, RootCell), FsError> {
        self.context.know_block(fd.container()).await?;
        let cell = self.context.read_cell(self.root_address(fd)?).await?;
        let root = self.decode_root(fd, &cell)?;
        Ok((cell, root))
    }

    pub(super) fn decode_root(&self, fd: FdId, cell: &Cell) -> Result<RootCell, FsError> {
        let corrupt = |cause| FsError::Corrupt { structure: format!("root cell of {fd}"), cause };
        // A handle may name a cell that never was a root cell: that is a stale handle only if the block is no FD container.
        cell.expect_kind(CellKind::Root).map_err(corrupt)?;
        RootCell::decode(self.context.cell_size(), cell.payload()).map_err(corrupt)
    }

    /// The object, if this host knows it already.
    pub fn known(&self, fd: FdId) -> Option<Rc<Object>> {
        self.table.borrow().get(&fd).and_then(std::rc::Weak::upgrade)
    }

    /// The object as it is on the LUN now. [`FsError::Stale`] when its cell is free or has become another object. All other states
    /// are given: the caller decides.
    pub async fn load(&self, what: ObjectRef) -> Result<Rc<Object>, FsError> {
        let link = (!active(Sabotage::LinkIgnored)).then_some(what.link);
        let object = self.load_at(what.fd, link).await?;
        if link.is_some_and(|link| link != object.image().link()) {
            // This host itself has changed it while it was read.
            return Err(FsError::Stale { fd: what.fd });
        }
        Ok(object)
    }

    /// The object of an identity, at whatever link. [`FsError::Stale`] also for one whose making is not that far: it is nobody's parent
    /// and owns nothing but what its maker has in hand.
    pub async fn load_any(&self, fd: FdId) -> Result<Rc<Object>, FsError> {
        self.load_at(fd, None).await
    }

    async fn load_at(&self, fd: FdId, link: Option<Link>) -> Result<Rc<Object>, FsError> {
        let known = self.known(fd).map(|object| object.image());
        let image = self.read_image(fd, known.as_ref(), link).await?;
        Ok(self.adopt(fd, image))
    }

    /// The shared `Object` of an identity whose image was just read or written.
    pub(super) fn adopt(&self, fd: FdId, image: Rc<Image>) -> Rc<Object> {
        if let Some(object) = self.known(fd) {
            if object.image().cell.header().seq <= image.cell.header().seq {
                object.set_image(image);
            }
            return object;
        }
        let object = Rc::new(Object {
            fd,
            image: RefCell::new(image),
            busy: Mutex::new(()),
            held: StdCell::new(false),
            erased: StdCell::new(None),
            doubtful: StdCell::new(false),
        });
        let mut table = self.table.borrow_mut();
        if table.len() % 1024 == 1023 {
            table.retain(|_, object| object.strong_count() > 0);
        }
        table.insert(fd, Rc::downgrade(&object));
        object
    }

    /// Reads the root cell again, and the body if the root changed.
    pub async fn refresh(&self, object: &Object) -> Result<(), FsError> {
        let before = object.image();
        let image = self.read_image(object.fd, Some(&before), None).await?;
        if object.image().cell.header().seq <= image.cell.header().seq {
            object.set_image(image);
        }
        Ok(())
    }

    /// Root cell and body; `link`: of the object that is meant, if one is. A root cell that is of another one by now is not followed: it
    /// is written beside its body, so that one may not be there yet.
    async fn read_image(&self, fd: FdId, known: Option<&Rc<Image>>, link: Option<Link>) -> Result<Rc<Image>, FsError> {
        let mut failed: Option<(Cell, FsError)> = None;
        for _ in 0..TRIES {
            let sent = self.context.before_sending();
            let (cell, root) = self.read_root(fd).await?;
            if link.is_some_and(|link| link != cell.header().link) {
                return Err(FsError::Stale { fd });
            }
            if let Some(known) = known.filter(|known| known.cell == cell) {
                known.seen.set(known.seen.get().max(sent));
                return Ok(known.clone());
            }
            if root.state == ObjectState::Free {
                return Err(FsError::Stale { fd });
            }
            // The body is believed bad only if the root that references it has not changed meanwhile.
            if let Some((_, error)) = failed.take_if(|(before, _)| *before == cell) {
                let is_unfinished = link.is_none() && matches!(root.state, ObjectState::Creating(_));
                return Err(if is_unfinished { FsError::Stale { fd } } else { error });
            }
            let Some(reference) = root.body else {
                return Err(FsError::refused(FsErrorKind::Corrupt, format!("{fd} has no body; run fsck.vmfs")));
            };
            if let Some(known) = known.filter(|known| known.root.body == Some(reference)) {
                return Ok(Image::new(cell, root, known.body.clone(), sent));
            }
            match self.read_body(fd, cell.header().link, &reference).await {
                Ok(body) => return Ok(Image::new(cell, root, Rc::new(body), sent)),
                Err(error) => failed = Some((cell, error)),
            }
        }
        Err(failed.map_or(FsError::Stale { fd }, |(_, error)| error))
    }

    async fn read_body(&self, fd: FdId, link: Link, reference: &UnitRef) -> Result<Body, FsError> {
        let stream = self.space.units.read(reference, CellKind::Body, fd, link, 0).await?;
        Body::decode(self.context.cell_size(), &stream)
            .map_err(|cause| FsError::Corrupt { structure: format!("body of {fd}"), cause })
    }
}
