//! Owns: the memory of callers that data of the target go straight into.
//! Promises: it is written only while its owner lends it, and only for the command that it was lent for.
//! Must not know: PDUs, sockets.
//!
//! Unsafe: a slice is lent to whichever thread receives, over a pointer behind a lock. The owner
//! takes the pointer back before its own borrow ends, also when it unwinds.
#![allow(unsafe_code)]

use parking_lot::Mutex;

/// A place that at most one slice is lent to at a time.
#[derive(Default)]
pub(super) struct Landing(Mutex<Option<Lent>>);

struct Lent {
    tag: u32,
    memory: Memory,
}

enum Memory {
    /// Of a caller who waits.
    Borrowed { at: *mut u8, length: usize },
    /// Of a command that no thread waits for: it lies here until it is over.
    Owned(Vec<u8>),
}

// SAFETY: a pointer is used only under the lock of `Landing`, and it stands for a `&mut [u8]`, which may be sent.
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
        let borrowed = Memory::Borrowed { at: memory.as_mut_ptr(), length: memory.len() };
        *self.0.lock() = Some(Lent { tag, memory: borrowed });
        let _withdraw = Withdraw(self);
        work()
    }

    /// Leaves `memory` here, where [`Landing::with`] writes into it under this tag until [`Landing::take`].
    pub fn put(&self, tag: u32, memory: Vec<u8>) {
        *self.0.lock() = Some(Lent { tag, memory: Memory::Owned(memory) });
    }

    /// Takes back what was left here; empty if nothing was.
    pub fn take(&self) -> Vec<u8> {
        match self.0.lock().take() {
            Some(Lent { memory: Memory::Owned(memory), .. }) => memory,
            _ => Vec::new(),
        }
    }

    /// Runs `work` on the memory from `offset` on, if it is lent under this tag and so long.
    pub fn with<R>(&self, tag: u32, offset: usize, work: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let mut lent = self.0.lock();
        let lent = lent.as_mut().filter(|lent| lent.tag == tag)?;
        match &mut lent.memory {
            Memory::Owned(memory) => memory.get_mut(offset..).map(work),
            Memory::Borrowed { at, length } if offset <= *length => {
                // SAFETY: `lend` has made it of a slice whose borrow lasts until the place was emptied under the lock that is held here.
                // The owner does not touch the slice meanwhile, and the lock keeps all others away.
                let memory = unsafe { std::slice::from_raw_parts_mut(at.add(offset), *length - offset) };
                Some(work(memory))
            }
            Memory::Borrowed { .. } => None,
        }
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
        landing.put(8, vec![0; 2]);
        assert!(landing.with(7, 0, |_| ()).is_none() && landing.with(8, 3, |_| ()).is_none());
        landing.with(8, 1, |memory| memory.fill(5)).unwrap();
        assert_eq!((landing.take(), landing.take()), (vec![0, 5], vec![]));
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            landing.lend(9, &mut [0; 4], || panic!("the owner unwinds"));
        }));
        assert!(unwound.is_err() && landing.with(9, 0, |_| ()).is_none(), "taken back when unwinding");
    }
}
