//! Owns: the thread that hears when the mount wants to move blocks of an open disk, and lets go of them.
//! Promises: "let go" is said only when nothing of this program is in flight to the range and nothing can begin; the range comes back
//!   when the mount says so; when the mount has gone nothing is learned of it any more. Must not know: why blocks move, who moves this program's data.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tokio::sync::Notify;

use super::block_on;
use super::ranges::{Ranges, Taken};
use crate::protocol::Recall;

/// Asks the mount which range it wants back now; the number is of the one that was let go, 0: none.
pub(super) type Ask = Box<dyn FnMut(u64) -> io::Result<Option<Recall>> + Send>;

/// The thread; it ends with this value.
pub(super) struct Following {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

struct Stop {
    event: OwnedFd,
    told: Notify,
}

impl Following {
    /// `event` becomes readable whenever there is something new to ask for; `ended` hangs up when the mount has ended.
    pub(super) fn start(ranges: Arc<Ranges>, event: OwnedFd, ended: OwnedFd, ask: Ask) -> io::Result<Following> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = Arc::new(Stop { event: eventfd(0, flags)?, told: Notify::new() });
        let stopping = stop.clone();
        let thread = std::thread::Builder::new()
            .name("vmfs-recalls".to_owned())
            .spawn(move || follow(&ranges, &event, &ended, &stopping, ask))?;
        Ok(Following { stop, thread: Some(thread) })
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        // The counter is far from its end, so that the write cannot fail.
        let _ = rustix::io::write(&self.stop.event, &1u64.to_ne_bytes());
        self.stop.told.notify_one();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that follows the moves of a disk panicked");
        }
    }
}

fn follow(ranges: &Arc<Ranges>, event: &OwnedFd, ended: &OwnedFd, stop: &Stop, mut ask: Ask) {
    let mut taken: Option<(u64, Taken)> = None;
    while wait(event, ended, stop) {
        loop {
            let let_go = taken.as_ref().map_or(0, |(number, _)| *number);
            // The end of the mount for this disk. What was let go may move or not: nobody asks where it lies any more.
            let Ok(wanted) = ask(let_go) else { return ranges.close() };
            let Some(Recall { number, offset, length }) = wanted else {
                taken = None;
                break;
            };
            if number == let_go {
                break;
            }
            // The one before is over; one is taken at a time.
            drop(taken.take());
            match take(ranges, offset..offset.saturating_add(length), stop) {
                Some(range) => taken = Some((number, range)),
                None => return,
            }
        }
    }
    ranges.close();
}

/// Waits for something to ask for; false: it is over.
fn wait(event: &OwnedFd, ended: &OwnedFd, stop: &Stop) -> bool {
    loop {
        let mut events = [
            PollFd::new(event, PollFlags::IN),
            PollFd::new(&stop.event, PollFlags::IN),
            PollFd::new(ended, PollFlags::RDHUP),
        ];
        match poll(&mut events, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        let gone = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
        if !events[1].revents().is_empty() || events[2].revents().intersects(gone) {
            return false;
        }
        if events[0].revents().contains(PollFlags::IN) {
            // Read before the mount is asked: what comes later raises it again. Nothing there means that it was read before.
            let _ = rustix::io::read(event, &mut [0u8; 8]);
            return true;
        }
    }
}

/// Takes a range away; `None`: it is over.
fn take(ranges: &Arc<Ranges>, range: Range<u64>, stop: &Stop) -> Option<Taken> {
    block_on(async {
        let mut stopped = pin!(stop.told.notified());
        tokio::select! {
            taken = ranges.take(range) => Some(taken),
            () = &mut stopped => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::{Duration, Instant};

    use parking_lot::Mutex;

    use super::*;
    use crate::client::runs::Known;

    /// A mount that wants ranges back, one after another.
    #[derive(Default)]
    struct Mount {
        wanted: Mutex<VecDeque<Recall>>,
        let_go: Mutex<Vec<u64>>,
    }

    struct World {
        mount: Arc<Mount>,
        ranges: Arc<Ranges>,
        event: OwnedFd,
        other_end: Option<OwnedFd>,
        following: Option<Following>,
    }

    const DATA: Known = Known::Data { lun: 1, offset: 4096 };

    fn world() -> World {
        let (mount, ranges) = (Arc::new(Mount::default()), Arc::new(Ranges::default()));
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (end, other_end) = std::os::unix::net::UnixStream::pair().unwrap();
        let asked = mount.clone();
        let ask: Ask = Box::new(move |let_go| {
            if let_go != 0 {
                asked.let_go.lock().push(let_go);
            }
            Ok(asked.wanted.lock().front().cloned())
        });
        ranges.cache.write().set(0..1 << 20, DATA);
        let following = Following::start(ranges.clone(), event.try_clone().unwrap(), end.into(), ask).unwrap();
        World { mount, ranges, event, other_end: Some(other_end.into()), following: Some(following) }
    }

    impl World {
        fn change(&self, change: impl FnOnce(&mut VecDeque<Recall>)) {
            change(&mut self.mount.wanted.lock());
            rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
        }

        fn known(&self, at: u64) -> Known {
            self.ranges.cache.read().at(at, 1 << 20).0
        }
    }

    #[track_caller]
    fn wait_for(what: &str, is_so: impl Fn() -> bool) {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_range_is_let_go_when_nothing_is_in_flight_and_comes_back_without_what_was_learned_meanwhile() {
        let world = world();
        let in_flight = world.ranges.references.take(4096);
        world.change(|wanted| wanted.push_back(Recall { number: 7, offset: 0, length: 8192 }));
        wait_for("the range is unknown to new requests", || world.known(4096) == Known::Unknown);
        assert_eq!(world.known(8192), Known::Data { lun: 1, offset: 4096 + 8192 });
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(*world.mount.let_go.lock(), [0u64; 0], "a request is in flight");
        drop(in_flight);
        wait_for("it is let go", || *world.mount.let_go.lock() == [7]);
        // An answer that the mount gave before it moved the blocks.
        world.ranges.cache.write().learn(0..8192, DATA);
        assert_eq!(world.known(0), Known::Unknown);
        // The next window begins at once.
        world.change(|wanted| *wanted = [Recall { number: 8, offset: 8192, length: 8192 }].into());
        wait_for("the next one is let go", || world.mount.let_go.lock().last() == Some(&8));
        assert_eq!((world.known(0), world.known(8192)), (Known::Unknown, Known::Unknown));
        world.change(VecDeque::clear);
        wait_for("it is over", || !world.ranges.cache.read().is_changing(&(0..1 << 20)));
        assert_eq!((world.known(0), world.known(8192)), (Known::Unknown, Known::Unknown));
        world.ranges.cache.write().learn(0..1 << 20, Known::Zero);
        assert_eq!((world.known(0), world.known(16384)), (Known::Zero, Known::Data { lun: 1, offset: 4096 + 16384 }));
    }

    #[test]
    fn the_thread_ends_with_its_disk_and_with_the_mount_also_while_something_is_in_flight() {
        let mut world = world();
        let in_flight = world.ranges.references.take(0);
        world.change(|wanted| wanted.push_back(Recall { number: 1, offset: 0, length: 4096 }));
        wait_for("the range is unknown to new requests", || world.known(0) == Known::Unknown);
        drop(world.following.take());
        assert_eq!(*world.mount.let_go.lock(), [0u64; 0]);
        drop(in_flight);
        let mut other = super::tests::world();
        other.change(|wanted| wanted.push_back(Recall { number: 1, offset: 0, length: 4096 }));
        wait_for("it is let go", || *other.mount.let_go.lock() == [1]);
        drop(other.other_end.take());
        wait_for("a mount that has gone holds nothing", || !other.ranges.cache.read().is_changing(&(0..4096)));
        assert!(other.ranges.is_closed(), "and answers nothing that could be believed");
    }
}
