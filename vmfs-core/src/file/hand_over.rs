//! Owns: giving an open disk to another host without closing it in between (live migration), and taking it there.
//! Promises: when the lock goes, every write has ended and every granule is published; while it is not known who has the lock, neither
//! side moves data; the destination reads no mapping before it holds the lock. Must not know: guests, how the hosts talk.
//!
//! ```text
//! source       Writing --hand_over--> no I/O, all published --one compare-and-write--> Done           (the file is closed here)
//!                                        | refused: Writing again                  +-> Unresolved --resolve--> Source | Destination
//! destination  holder_for ---------------------------------------------------------------> accept: Writing
//! ```

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::allocate::in_doubt;
use super::files::{Files, Open, is_unlinked};
use super::open_file::{Hold, OpenFile, OpenMode};
use crate::error::{FsError, FsErrorKind};
use crate::format::root_cell::{Holder, ObjectFlags};
use crate::object::{Handed, Object};
use crate::units::Token;

/// What became of a hand-over that was not refused.
#[derive(Debug)]
#[must_use = "while it is unresolved neither side may run"]
pub enum HandOver {
    /// The destination has the lock. The file is closed on this host, which never writes to it again.
    Done,
    /// It is not known who has the lock: neither side runs the disk's guest until [`Files::resolve_hand_over`] has told.
    Unresolved(Unresolved),
}

/// A hand-over whose outcome is not known. The file moves no data meanwhile.
#[derive(Debug)]
pub struct Unresolved {
    file: Arc<OpenFile>,
    token: Token,
    /// Why it is not known.
    pub cause: FsError,
}

/// Whose the disk is after all.
#[derive(Debug)]
pub enum Resolved {
    /// This host's: it goes on with the file as before.
    Source(Arc<OpenFile>),
    /// The destination's. The file is closed here.
    Destination,
}

impl Files {
    /// Gives the lock of a disk that is open for writing to the incarnation `to` (which the destination tells by
    /// [`crate::volume::Volume::holder_for`]). The guest is paused. An error: nothing has changed, the file goes on as before.
    pub async fn hand_over(&self, file: &Arc<OpenFile>, to: Holder) -> Result<HandOver, FsError> {
        let open = self.find(file)?;
        let _turn = open.turn.lock().await;
        check_may_go(&open)?;
        let _change = open.change.lock().await;
        let handed = match self.still(&open).await {
            Ok(()) => self.objects.hand_over(&open.object, to).await,
            Err(error) => Err(error),
        };
        match handed {
            Ok(Handed::Over) => {
                self.let_go(&open, file);
                Ok(HandOver::Done)
            }
            Ok(Handed::Unknown { token, cause }) => {
                let file = file.clone();
                Ok(HandOver::Unresolved(Unresolved { file, token, cause }))
            }
            Err(error) => {
                self.go_on(&open).await?;
                Err(error)
            }
        }
    }

    /// Finds out whose the disk is. An error with the hand-over: it is still not known; ask again when the LUN answers.
    pub async fn resolve_hand_over(&self, unresolved: Unresolved) -> Result<Resolved, (Unresolved, FsError)> {
        let Unresolved { file, token, .. } = &unresolved;
        let open = match self.find(file) {
            Ok(open) => open,
            Err(error) => return Err((unresolved, error)),
        };
        let _turn = open.turn.lock().await;
        match self.objects.resolve_hand_over(&open.object, *token).await {
            Ok(true) => match self.go_on(&open).await {
                Ok(()) => Ok(Resolved::Source(unresolved.file)),
                Err(error) => Err((unresolved, error)),
            },
            Ok(false) => {
                self.let_go(&open, file);
                Ok(Resolved::Destination)
            }
            Err(error) => Err((unresolved, error)),
        }
    }

    /// Opens a disk for writing whose lock was handed to this host. `Busy`: it was not, or not yet.
    pub async fn accept(&self, object: &Rc<Object>) -> Result<Arc<OpenFile>, FsError> {
        self.objects.refresh(object).await?;
        if !self.objects.is_handed_to_own(object)? {
            let message = format!("the lock of {} was not handed over to this host (yet)", object.fd);
            return Err(FsError::refused(FsErrorKind::Busy, message));
        }
        self.open(object, OpenMode::WRITE).await
    }

    /// Ends all data I/O of the file and publishes what was written. The caller holds the change lock.
    async fn still(&self, open: &Rc<Open>) -> Result<(), FsError> {
        let shared = &open.shared;
        let hold = |hold| shared.state.write().access.hold = hold;
        // First no new writes, then no unpublished ones, then no reads.
        hold(Hold::Reading);
        shared.references.settled(&(0..u64::MAX)).await;
        self.flush_in_change(open, true).await?;
        self.give_back_unpublished(open).await?;
        if let Some(error) = shared.error.lock().take() {
            return Err(error);
        }
        hold(Hold::Nothing);
        shared.references.settled(&(0..u64::MAX)).await;
        if shared.doubt.load(Ordering::Acquire) {
            return Err(in_doubt(open));
        }
        self.release_device(shared)
    }

    /// The lock is this host's as before: the file goes on.
    async fn go_on(&self, open: &Rc<Open>) -> Result<(), FsError> {
        self.take_device(open, true).await?;
        open.shared.state.write().access.hold = Hold::Writing;
        Ok(())
    }

    /// The lock is another host's: nothing that is known of the file is believed any more.
    fn let_go(&self, open: &Rc<Open>, file: &OpenFile) {
        file.closed.store(true, Ordering::Release);
        {
            let mut state = open.shared.state.write();
            state.access.hold = Hold::Nothing;
            state.runs.clear();
        }
        open.cells.borrow_mut().clear();
        self.forget_writer(open);
    }
}

/// Only a disk that is open once, for writing, has one place to go to.
fn check_may_go(open: &Open) -> Result<(), FsError> {
    let shared = &open.shared;
    let refuse = |why: &str| Err(FsError::refused(FsErrorKind::Invalid, format!("{}: {why}", shared.fd)));
    if !shared.is_disk() || open.object.image().root.flags.contains(ObjectFlags::MULTI_WRITER) {
        return refuse("only the lock of a disk with one writer can be handed over");
    }
    if shared.hold() != Hold::Writing || !open.is_only_writer() {
        return refuse("it is handed over by the one that has it open for writing, and nobody else");
    }
    if is_unlinked(open) {
        return refuse("its name was removed");
    }
    Ok(())
}
