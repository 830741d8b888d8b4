//! Owns: the memory of callers that data of the target go straight into.
//! Promises: it is written only while its owner lends it, and only for the command that it was lent for.
//! Must not know: PDUs, sockets.
//!
//! The one file of this crate with unsafe code: a slice is lent to whichever thread receives, over a pointer behind a lock. The owner
//! takes the pointer back before its own borrow ends, also when it unwinds.
#![allow(unsafe_code)]

use parking_lot::Mutex;

/// A place that at most one slice is lent to at a time.
#[derive(Default)]
pub(super) struct Landing(Mutex<Option<Lent>>);

struct Lent {
    tag: u32,
    at: *mut u8,
    length: usize,
}

// SAFETY: the pointer is used only under the lock of `Landing`, and it stands for a `&mut [u8]`, which may be sent.
unsafe impl Send for Lent {}

/// Takes the slice back.
struct Withdraw<'a>(&'a Landing);

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        // Waits for who is writing into it.
        *self.0.0.lock() = None;
    }
}

impl Landing {
    /// Runs `work` while `memory` can be written by [`Landing::with`] under this tag.
    pub fn lend<R>(&self, tag: u32, memory: &mut [u8], work: impl FnOnce() -> R) -> R {
        *self.0.lock() = Some(Lent { tag, at: memory.as_mut_ptr(), length: memory.len() });
        let _withdraw = Withdraw(self);
        work()
    }

    /// Runs `work` on the memory from `offset` on, if it is lent under this tag and so long.
    pub fn with<R>(&self, tag: u32, offset: usize, work: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let lent = self.0.lock();
        let lent = lent.as_ref().filter(|lent| lent.tag == tag && offset <= lent.length)?;
        // SAFETY: `lend` has made it of a slice whose borrow lasts until the place was emptied under the lock that is held here. The owner
        // does not touch the slice meanwhile, and the lock keeps all others away.
        let memory = unsafe { std::slice::from_raw_parts_mut(lent.at.add(offset), lent.length - offset) };
        Some(work(memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_written_only_while_it_is_lent_and_under_its_tag() {
        let landing = Landing::default();
        let mut memory = [0; 4];
        landing.lend(7, &mut memory, || {
            assert!(landing.with(8, 0, |_| ()).is_none(), "another tag");
            assert!(landing.with(7, 5, |_| ()).is_none(), "beyond");
            std::thread::scope(|scope| {
                scope.spawn(|| landing.with(7, 2, |memory| memory.fill(9)).unwrap());
            });
        });
        assert_eq!(memory, [0, 0, 9, 9]);
        assert!(landing.with(7, 0, |_| ()).is_none(), "taken back");
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            landing.lend(9, &mut [0; 4], || panic!("the owner unwinds"));
        }));
        assert!(unwound.is_err() && landing.with(9, 0, |_| ()).is_none(), "taken back when unwinding");
    }
}
