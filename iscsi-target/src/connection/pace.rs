//! Owns: how a connection waits for its next bytes.
//! Promises: where the last waits were short, the thread looks for them for a moment before it sleeps, for one connection at a time and
//! only while the ring has nothing under way; a silent connection costs nothing.
//! Must not know: PDUs.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use super::socket::Socket;

/// Time to look. To sleep and to be woken takes a good part of it.
const LOOK: Duration = Duration::from_micros(50);
/// Short waits in a row after which the next one is expected to be short too.
const STEADY: u32 = 8;

thread_local! {
    /// Some connection of this thread looks.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// Ends the look, however that comes about.
struct Looking;

impl Looking {
    fn begin() -> Option<Looking> {
        (!LOOKING.replace(true)).then_some(Looking)
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        LOOKING.set(false);
    }
}

/// How long the last waits were.
#[derive(Debug, Default)]
pub struct Pace {
    /// Short ones in a row.
    short: u32,
}

impl Pace {
    /// Waits until `socket` has something to read.
    ///
    /// # Errors
    /// Of the operating system.
    pub async fn wait(&mut self, socket: &Socket) -> io::Result<()> {
        let began = Instant::now();
        if self.short >= STEADY
            && let Some(_looking) = Looking::begin()
        {
            // What is to be submitted to the ring is submitted when the thread sleeps: then it has to.
            while storage::transfers_under_way() == 0 && began.elapsed() < LOOK && !socket.is_readable() {
                tokio::task::yield_now().await;
            }
        }
        socket.readable().await?;
        self.note(began.elapsed());
        Ok(())
    }

    fn note(&mut self, waited: Duration) {
        self.short = if waited < LOOK { (self.short + 1).min(STEADY) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_long_wait_ends_the_looking() {
        let mut pace = Pace::default();
        (0..STEADY).for_each(|_| pace.note(LOOK / 2));
        assert_eq!(pace.short, STEADY);
        pace.note(LOOK);
        assert_eq!(pace.short, 0);
    }

    #[test]
    fn one_looks_at_a_time() {
        let first = Looking::begin();
        assert!(first.is_some() && Looking::begin().is_none());
        drop(first);
        assert!(Looking::begin().is_some());
    }
}
