//! Owns: how blocks of a file are taken back from programs that move the file's data themselves.
//! Promises: after a recall nothing of these programs is in flight to the range, and nothing begins until it is over.
//! Must not know: who these programs are, how they are told.

use std::cell::RefCell;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::files::{Files, Open};
use crate::env::LocalFuture;
use crate::error::{FsError, FsErrorKind};
use crate::units::FdId;

/// How long a program has to finish what it has in flight: one that stands still must not hold up everything.
const PATIENCE: Duration = Duration::from_secs(30);

/// The programs beside this one that move the data of open files themselves.
pub trait Borrowers {
    /// Has every program that may know where bytes of `range` of `fd` lie forget it, and ends when nothing of them is in flight there.
    /// From the call on no other program is told places of `fd`. Dropping the future takes the wish back.
    fn recall(&self, fd: FdId, range: Range<u64>) -> LocalFuture<'static, Result<Box<dyn Recalled>, FsError>>;
}

/// A range that was taken back. When it is dropped, the programs may ask again where its bytes lie.
pub trait Recalled {
    /// Where the bytes lie is in doubt: who was recalled has to give up the whole file.
    fn give_up(self: Box<Self>);
}

/// The borrowers of a mount, if it has some.
pub(super) type BorrowersCell = RefCell<Option<Rc<dyn Borrowers>>>;

impl Files {
    /// Tells who the programs are that move data of files themselves.
    pub fn set_borrowers(&self, borrowers: Rc<dyn Borrowers>) {
        *self.borrowers.borrow_mut() = Some(borrowers);
    }

    /// Takes a range of a file back. The caller holds no lock that a program's request could need.
    pub(super) async fn recall(&self, open: &Open, range: Range<u64>) -> Result<Back, FsError> {
        let fd = open.shared.fd;
        let Some(borrowers) = self.borrowers.borrow().clone() else { return Ok(Back(None)) };
        let recalled = borrowers.recall(fd, range);
        match select(recalled, pin!(self.context.env().sleep(PATIENCE))).await {
            Either::Left((recalled, _)) => recalled.map(|range| Back(Some(range))),
            Either::Right(_) => {
                let message = format!(
                    "{fd} is used by a program that moves its data itself (a running VM), and that has not finished within {} s: \
                     it stands still, or its storage does; repeat",
                    PATIENCE.as_secs()
                );
                Err(FsError::refused(FsErrorKind::Busy, message))
            }
        }
    }
}

/// A range that was taken back from whoever had it.
pub(super) struct Back(Option<Box<dyn Recalled>>);

impl Back {
    /// Lets the programs have the range again, unless this mount itself does not write to the file any more.
    pub(super) fn finish(self, open: &Open) {
        if open.shared.doubt.load(Ordering::Acquire)
            && let Some(range) = self.0
        {
            range.give_up();
        }
    }
}
