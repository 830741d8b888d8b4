//! Owns: the memory for the data of commands, shared by all sessions.
//! Promises: it is never more than the limit; who asks first is served first; one session has at most a quarter, so that others
//! always go on; in the steady state nothing is allocated, and nothing is zeroed.
//! Must not know: PDUs, commands.
//! Unsafe: a data buffer's bytes are lent as slices ([`Memory::bytes`], [`Landing::fill`]).

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::io::IoSliceMut;
use std::rc::Rc;

use scsi::DataBuffer;
use tokio::sync::{Semaphore, SemaphorePermit};

/// The unit of the limits, and the smallest buffer.
const UNIT: usize = 4096;
/// The longest transfer of one command that is given memory: the largest buffer.
pub const LONGEST_TRANSFER: usize = 32 << 20;
/// Buffers are powers of two, from `UNIT` to `LONGEST_TRANSFER`.
const SIZES: usize = (LONGEST_TRANSFER / UNIT).trailing_zeros() as usize + 1;
/// A session has at most one part in so many.
const PARTS: usize = 4;
/// The least that a pool can have: one longest transfer of one session.
pub const LEAST: usize = PARTS * LONGEST_TRANSFER;

/// The memory of all sessions.
pub struct Pool {
    limit: usize,
    free: Semaphore,
    /// Buffers that nobody uses, by their sizes.
    idle: RefCell<[Vec<Rc<DataBuffer>>; SIZES]>,
    /// Bytes of `idle`.
    spare: Cell<usize>,
}

/// What one session may have of a pool.
pub struct Share {
    pool: Rc<Pool>,
    own: Rc<Semaphore>,
}

/// Memory of one command. It goes back when the last clone is dropped; slices of its buffer must have been dropped before, or it is
/// given up.
#[derive(Clone)]
pub struct Memory {
    buffer: Rc<DataBuffer>,
    /// Where it goes back to; `None`: it is of no bytes.
    home: Option<(Rc<Pool>, Rc<Semaphore>)>,
}

/// The place of a size among the sizes.
fn class(length: usize) -> usize {
    length.div_ceil(UNIT).next_power_of_two().trailing_zeros() as usize
}

impl Pool {
    /// A pool of `limit` bytes, at least [`LEAST`].
    pub fn new(limit: usize) -> Rc<Pool> {
        let limit = limit.max(LEAST);
        let free = Semaphore::new(limit / UNIT);
        Rc::new(Pool { limit, free, idle: RefCell::default(), spare: Cell::new(0) })
    }

    /// Bytes that there can be.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes that commands have at the moment.
    pub fn used(&self) -> usize {
        self.limit - self.free.available_permits() * UNIT
    }

    /// The share of a new session.
    pub fn share(self: &Rc<Self>) -> Share {
        Share { pool: self.clone(), own: Rc::new(Semaphore::new(self.limit / PARTS / UNIT)) }
    }

    /// A buffer of a size that permits have been given for.
    fn buffer(&self, class: usize) -> Rc<DataBuffer> {
        let mut idle = self.idle.borrow_mut();
        if let Some(buffer) = idle[class].pop() {
            self.spare.set(self.spare.get() - buffer.len());
            return buffer;
        }
        // Buffers of other sizes make way: what is in use and what is idle are together within the limit.
        for others in idle.iter_mut().rev() {
            while self.used() + self.spare.get() > self.limit
                && let Some(given_up) = others.pop()
            {
                self.spare.set(self.spare.get() - given_up.len());
            }
        }
        Rc::new(DataBuffer::zeroed(UNIT << class, UNIT))
    }
}

impl Share {
    /// Memory for `length` bytes (at most [`LONGEST_TRANSFER`]), as soon as there is some. Its content is undefined.
    pub async fn take(&self, length: usize) -> Memory {
        if length == 0 {
            return Memory::nothing();
        }
        let units = 1 << class(length);
        let own = self.own.acquire_many(units).await.expect("a share is never closed");
        let all = self.pool.free.acquire_many(units).await.expect("a pool is never closed");
        self.memory(class(length), [own, all])
    }

    /// The same, if there is some at once.
    pub fn try_take(&self, length: usize) -> Option<Memory> {
        if length == 0 {
            return Some(Memory::nothing());
        }
        let units = 1 << class(length);
        let own = self.own.try_acquire_many(units).ok()?;
        let all = self.pool.free.try_acquire_many(units).ok()?;
        Some(self.memory(class(length), [own, all]))
    }

    fn memory(&self, class: usize, permits: [SemaphorePermit<'_>; 2]) -> Memory {
        // They are given back with the memory.
        permits.into_iter().for_each(SemaphorePermit::forget);
        Memory { buffer: self.pool.buffer(class), home: Some((self.pool.clone(), self.own.clone())) }
    }
}

impl Memory {
    /// Memory of no bytes.
    pub fn nothing() -> Memory {
        Memory { buffer: Rc::new(DataBuffer::empty()), home: None }
    }

    /// The first `length` bytes.
    pub fn first(&self, length: usize) -> DataBuffer {
        self.buffer.slice(0..length)
    }

    /// The place of the first `length` bytes, if there are so many.
    pub fn landing(&self, length: usize) -> Option<Landing> {
        Landing::new(&self.buffer, 0, length)
    }

    /// The bytes `start..start + length`.
    pub fn bytes(&self, start: usize, length: usize) -> &[u8] {
        let part = self.buffer.slice(start..start + length);
        let Some(segment) = part.as_single() else { return &[] };
        // SAFETY: the segment lies in this buffer's allocation, initialised when it was made, which lives as long as `self`. It is
        // asked for when the command that writes to it has ended, and before the memory is lent again: nobody writes to it.
        unsafe { std::slice::from_raw_parts(segment.pointer().as_ptr(), segment.length()) }
    }
}

/// A part of a command's memory, for data that are still coming. The memory is not lent again while it exists.
pub struct Landing(DataBuffer);

impl Landing {
    /// The bytes `start..start + length` of `buffer`, if it has them in one piece.
    pub fn new(buffer: &DataBuffer, start: usize, length: usize) -> Option<Landing> {
        let end = start.checked_add(length).filter(|end| *end <= buffer.len())?;
        let part = buffer.slice(start..end);
        part.as_single().is_some().then_some(Landing(part))
    }

    /// Puts `bytes` at `offset`.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        self.0.copy_from(offset, bytes);
    }

    /// Lends all bytes from `offset` on to `with`, which puts something in.
    pub fn fill<T>(&self, offset: usize, with: impl FnOnce(IoSliceMut<'_>) -> T) -> T {
        let rest = self.0.slice(offset..self.0.len());
        let Some(segment) = rest.as_single() else { return with(IoSliceMut::new(&mut [])) };
        // SAFETY: the segment lies in an allocation, initialised when it was made, which lives as long as `self`. The command that it
        // belongs to waits for just these data, so the kernel does not use it, and no other code of this thread, which is the only one
        // that has the buffer, runs before `with` returns.
        with(IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(segment.pointer().as_ptr(), segment.length()) }))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some((pool, own)) = &self.home else { return };
        if Rc::strong_count(&self.buffer) > 1 {
            return;
        }
        let units = self.buffer.len() / UNIT;
        if self.buffer.is_unique() {
            pool.spare.set(pool.spare.get() + self.buffer.len());
            pool.idle.borrow_mut()[class(self.buffer.len())].push(self.buffer.clone());
        }
        own.add_permits(units);
        pool.free.add_permits(units);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_back_is_lent_again_as_it_is() {
        let pool = Pool::new(LEAST);
        let share = pool.share();
        let memory = share.try_take(5000).unwrap();
        memory.first(3).copy_from(0, b"abc");
        let address = memory.first(8192).as_single().unwrap().pointer();
        assert_eq!(pool.used(), 8192);
        drop(memory);
        assert_eq!(pool.used(), 0);
        let again = share.try_take(8192).unwrap();
        assert_eq!(again.first(8192).as_single().unwrap().pointer(), address);
        assert_eq!(again.bytes(1, 2), b"bc");
    }

    #[test]
    fn memory_that_somebody_still_holds_is_not_lent_again() {
        let pool = Pool::new(LEAST);
        let share = pool.share();
        let memory = share.try_take(4096).unwrap();
        let held = memory.first(4096);
        drop(memory);
        let other = share.try_take(4096).unwrap();
        assert_ne!(other.first(1).as_single().unwrap().pointer(), held.as_single().unwrap().pointer());
    }

    #[test]
    fn what_lands_is_in_its_place_and_the_memory_is_not_lent_again_before() {
        let pool = Pool::new(LEAST);
        let share = pool.share();
        let memory = share.try_take(4096).unwrap();
        assert!(memory.landing(4097).is_none() && Memory::nothing().landing(1).is_none());
        let landing = memory.landing(100).unwrap();
        landing.put(0, b"abc");
        assert_eq!(
            landing.fill(3, |mut rest| {
                rest[..2].copy_from_slice(b"de");
                rest.len()
            }),
            97
        );
        assert_eq!(memory.bytes(0, 5), b"abcde");
        let address = memory.first(1).as_single().unwrap().pointer();
        drop(memory);
        assert_ne!(share.try_take(4096).unwrap().first(1).as_single().unwrap().pointer(), address);
        assert!(Landing::new(&DataBuffer::zeroed(8, 8), usize::MAX, 2).is_none());
    }

    #[test]
    fn no_session_takes_more_than_its_share_and_all_together_no_more_than_the_limit() {
        let pool = Pool::new(LEAST);
        let shares: Vec<_> = (0..5).map(|_| pool.share()).collect();
        let mut taken: Vec<_> = shares.iter().take(4).map(|share| share.try_take(LONGEST_TRANSFER).unwrap()).collect();
        assert!(shares[0].try_take(1).is_none(), "its share is used up");
        assert!(shares[4].try_take(1).is_none(), "the pool is used up");
        assert_eq!(pool.used(), pool.limit());
        taken.pop();
        // Small buffers take the place of the large one that is idle.
        let small: Vec<_> = (0..10).map(|_| shares[4].try_take(100).unwrap()).collect();
        assert!(pool.used() + pool.spare.get() <= pool.limit());
        drop((taken, small));
        assert_eq!(pool.used(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_waits_is_served_in_order_when_something_comes_back() {
        let pool = Pool::new(LEAST);
        let shares: Vec<_> = (0..6).map(|_| pool.share()).collect();
        let mut taken: Vec<_> = shares.iter().take(4).map(|share| share.try_take(LONGEST_TRANSFER).unwrap()).collect();
        let mut large = Box::pin(shares[4].take(LONGEST_TRANSFER));
        let mut small = Box::pin(shares[5].take(1));
        let waits = std::time::Duration::from_millis(1);
        assert!(tokio::time::timeout(waits, &mut large).await.is_err());
        assert!(tokio::time::timeout(waits, &mut small).await.is_err());
        taken.pop();
        let large = large.await;
        assert!(tokio::time::timeout(waits, &mut small).await.is_err(), "it came later");
        drop(large);
        small.await;
    }
}
