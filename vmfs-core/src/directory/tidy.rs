//! Owns: the list of what operations of this host could not finish, and finishing it in the background.
//! Promises: nothing on the list is needed for a right answer: readers ignore leftovers; an entry stays listed until it is done.
//! Must not know: when it is called.

use super::image::{Found, Meaning};
use super::marks::Decided;
use super::names::Names;
use super::tree::Edit;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Body;
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::ObjectState;
use crate::object::{Change, Committed};
use crate::units::LunIndex;

/// Something that an operation left behind.
#[derive(Clone)]
pub(super) enum Unfinished {
    /// `child` may carry this host's mark and may or may not still be named in `parent`.
    Mark { parent: ObjectRef, child: ObjectRef },
    /// `child` was made, but it is not known whether `parent` names it.
    Created { parent: ObjectRef, child: ObjectRef },
    /// The entry of this name may be a leftover or pending.
    Entry { directory: ObjectRef, name: Vec<u8> },
}

impl Unfinished {
    /// The LUNs that finishing it needs.
    fn luns(&self) -> Vec<LunIndex> {
        match self {
            Unfinished::Mark { parent, child } | Unfinished::Created { parent, child } => {
                vec![parent.fd.lun(), child.fd.lun()]
            }
            Unfinished::Entry { directory, .. } => vec![directory.fd.lun()],
        }
    }

    fn is(&self, other: &Unfinished) -> bool {
        match (self, other) {
            (Unfinished::Mark { child: a, .. }, Unfinished::Mark { child: b, .. })
            | (Unfinished::Created { child: a, .. }, Unfinished::Created { child: b, .. }) => a == b,
            (Unfinished::Entry { directory: a, name: n }, Unfinished::Entry { directory: b, name: m }) => {
                a == b && n == m
            }
            _ => false,
        }
    }
}

impl Names {
    pub(super) fn leave_for_later(&self, what: Unfinished) {
        let mut list = self.unfinished.borrow_mut();
        if !list.iter().any(|known| known.is(&what)) {
            list.push(what);
        }
    }

    /// An object has a new name: its body is told later. That is a hint for when its directory is lost.
    pub(super) fn hint_later(&self, object: ObjectRef, name: &[u8]) {
        self.hints.borrow_mut().insert(object.fd, (object, name.to_vec()));
    }

    /// An object has its name, on another LUN: it is made live a moment later, so that this is known when that LUN is lost.
    pub(super) fn settle_later(&self, object: ObjectRef) {
        self.unsettled.borrow_mut().insert(object.fd, object);
    }

    /// Makes new objects live, unless something has changed them since.
    async fn settle_new(&self) {
        for (fd, object) in self.unsettled.take() {
            let settled = match self.context.is_lost(fd.lun()) {
                true => Err(FsError::MissingLun { lun: fd.lun() }),
                false => self.settle(object).await,
            };
            if settled.is_err_and(|error| error.kind() == FsErrorKind::Io) {
                self.settle_later(object);
            }
        }
    }

    async fn settle(&self, what: ObjectRef) -> Result<(), FsError> {
        let object = self.objects.load(what).await?;
        let own = self.context.own_slot(what.fd.lun())?;
        while object.reference() == what && object.image().root.state == ObjectState::Creating(own) {
            let image = object.image();
            // Any change settles it, and one that comes first does too.
            let _ = self.change_root(&object, &image, |_| {}).await?;
        }
        Ok(())
    }

    /// Tells the bodies of renamed objects their names. What another host has locked, or what is gone, keeps the old one.
    async fn freshen_hints(&self) {
        let hints = self.hints.take();
        for (fd, (object, name)) in hints {
            let outcome = if self.context.is_lost(fd.lun()) {
                Err(FsError::MissingLun { lun: fd.lun() })
            } else {
                self.set_hint(object, &name).await
            };
            if outcome.is_err_and(|error| error.kind() == FsErrorKind::Io) {
                self.hints.borrow_mut().entry(fd).or_insert((object, name));
            }
        }
    }

    async fn set_hint(&self, what: ObjectRef, name: &[u8]) -> Result<(), FsError> {
        let object = Found::new(self.objects.load(what).await?, what);
        let mut patience = self.patience();
        loop {
            let image = object.image()?;
            // One that is on its way out is its remover's alone.
            let stays = matches!(image.root.state, ObjectState::Live | ObjectState::Creating(_));
            if !stays || image.body.attributes.name == name {
                return Ok(());
            }
            // Looked at after the image that the commit rests on is known: another host may have given it a later name, and then says so
            // itself, in this order or in the other.
            let Some(parent) = image.root.parent else { return Ok(()) };
            let directory = self.objects.load_any(parent).await?;
            let directory = self.load_directory(directory.reference()).await?;
            let has_it = self.entry_in(&directory, name).await?.is_some_and(|entry| entry.child == what);
            if !has_it {
                return Ok(());
            }
            let mut body = Body::clone(&image.body);
            body.attributes.name = name.to_vec();
            match self.objects.commit(&object, &image, Change { body: Some(body), ..Change::default() }).await? {
                Committed::Done => return Ok(()),
                Committed::Lost | Committed::Overtaken => patience.lost(name).await?,
            }
        }
    }

    /// How much waits to be tidied.
    pub fn unfinished(&self) -> usize {
        self.unfinished.borrow().len()
    }

    /// Tries once to finish what is listed, but what needs a lost LUN; what fails stays listed. Gives the last error.
    pub async fn tidy(&self) -> Result<(), FsError> {
        let _one = self.tidying.lock().await;
        self.freshen_hints().await;
        self.settle_new().await;
        let list = std::mem::take(&mut *self.unfinished.borrow_mut());
        let mut result = Ok(());
        for what in list {
            if what.luns().into_iter().any(|lun| self.context.is_lost(lun)) {
                self.leave_for_later(what);
                continue;
            }
            match self.finish(&what).await {
                Ok(()) => {}
                // The directory or the object is gone, and with it what was left there.
                Err(error) if error.kind() == FsErrorKind::Stale => {}
                Err(error) => {
                    self.leave_for_later(what);
                    result = Err(error);
                }
            }
        }
        result
    }

    async fn finish(&self, what: &Unfinished) -> Result<(), FsError> {
        match what {
            Unfinished::Mark { parent, child } => {
                let _guard = self.lock_directories(&[parent.fd]).await;
                let directory = Found::new(self.objects.load(*parent).await?, *parent);
                let child = Found::new(self.objects.load(*child).await?, *child);
                self.finish_mark(&directory, &child).await
            }
            Unfinished::Created { parent, child } => {
                let _guard = self.lock_directories(&[parent.fd]).await;
                let finished = async {
                    let directory = Found::new(self.objects.load(*parent).await?, *parent);
                    self.finish_creation(&directory, *child).await
                };
                match finished.await {
                    // A directory was empty when it went: no change of it can give the child its name any more.
                    Err(error) if error.kind() == FsErrorKind::Stale => self.take_back(*child).await,
                    finished => finished,
                }
            }
            Unfinished::Entry { directory, name } => {
                let _guard = self.lock_directories(&[directory.fd]).await;
                let directory = self.load_directory(*directory).await?;
                self.finish_entry(&directory, name).await
            }
        }
    }

    async fn finish_mark(&self, directory: &Found, child: &Found) -> Result<(), FsError> {
        let ObjectState::Unlinking(mark) = child.image()?.root.state else {
            return Ok(());
        };
        if self.context.own_slot(child.fd.lun())? != mark {
            return Ok(());
        }
        match self.decide_mark(directory, child, &mut self.patience()).await? {
            Decided::Restored | Decided::Removed | Decided::Other => Ok(()),
        }
    }

    /// A creation whose commit ended unknown: after a re-stamp it cannot land any more; named or not decides.
    async fn finish_creation(&self, directory: &Found, child: ObjectRef) -> Result<(), FsError> {
        let mut patience = self.patience();
        while !self.restamp(directory).await? {
            patience.lost(b"").await?;
        }
        loop {
            let image = directory.image()?;
            match self.entry_naming(directory, &image, |entry| entry.child == child).await {
                Err(error) => self.changed_since(directory, &image, error).await?,
                Ok(Some(_)) => return Ok(()),
                Ok(None) => break,
            }
        }
        self.take_back(child).await
    }

    /// Frees a new object of this incarnation that has no name for certain, unless somebody has changed it.
    async fn take_back(&self, child: ObjectRef) -> Result<(), FsError> {
        let object = self.objects.load(child).await?;
        let image = object.image();
        if let ObjectState::Creating(mark) = image.root.state
            && self.context.own_slot(child.fd.lun())? == mark
        {
            self.finish_removal(&object);
        }
        Ok(())
    }

    /// Takes a leftover out, settles an entry of a move that was begun; anything else stays. The directory's lock is held.
    pub(super) async fn finish_entry(&self, directory: &Found, name: &[u8]) -> Result<(), FsError> {
        let mut patience = self.patience();
        loop {
            let resolved = self.resolve(directory, name).await?;
            match resolved.meaning {
                Meaning::Nothing => return Ok(()),
                Meaning::Object { entry, child } if entry.pending.is_none() => {
                    if !entry.leaving {
                        return Ok(());
                    }
                    self.settle_leaving(directory, &resolved.image, &entry, &child, &patience).await?;
                }
                Meaning::Dead(entry) if entry.pending.is_none() => {
                    let edits = [Edit::Remove(entry.name)];
                    if matches!(
                        self.commit_edits(directory, &resolved.image, &edits, &patience).await?,
                        Committed::Done
                    ) {
                        return Ok(());
                    }
                }
                Meaning::Object { entry, .. } | Meaning::Dead(entry) => {
                    self.settle_pending(directory, &resolved.image, &entry, &mut patience).await?;
                }
            }
            patience.lost(name).await?;
        }
    }
}
