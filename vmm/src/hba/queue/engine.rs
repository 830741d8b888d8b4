//! Owns: the queue's thread as other threads see it: starting it, asking it, ending it.
//! Promises: whoever waits for a reply gets one, or learns that the thread has ended.
//! Must not know: registers, rings, requests.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use scsi::BlockDevice;
use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use super::control::Control;
use super::tasks::{Queue, Shared};
use super::{Model, OWN_TARGET};
use crate::hba::attachment::Attachment;
use crate::hba::{AdapterError, GuestMemory};

/// Entries of the io_uring submission queue: one for each request that runs, and some.
const URING_ENTRIES: u32 = 512;

/// A queue with its thread, over storage of type `D`, which lives on that thread.
pub(crate) struct Engine<M: Model, D> {
    shared: Arc<Shared<M, D>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<M: Model, D: BlockDevice + 'static> Engine<M, D> {
    /// Starts the thread, named `name`, and plugs `disks` in, which are opened there.
    ///
    /// # Errors
    /// [`AdapterError`]: no thread or ring, or the first disk that could not be opened.
    pub(crate) fn start(
        name: &str,
        memory: Arc<GuestMemory>,
        model: Arc<M>,
        disks: Vec<Attachment<D>>,
    ) -> Result<Self, AdapterError> {
        let setup = |what| move |source| AdapterError::Setup { what, source };
        let doorbell = EventFd::new(0).map_err(setup("the doorbell"))?;
        let shared = Arc::new(Shared::new(doorbell, model));
        let (ready, is_ready) = sync_channel(1);
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run_thread(memory, for_thread, ready))
            .map_err(setup("the queue's thread"))?;
        let engine = Self { shared, thread: Mutex::new(Some(thread)) };
        is_ready.recv().map_err(|_| AdapterError::ThreadLost)?.map_err(setup("the io_uring"))?;
        for disk in disks {
            engine.attach(disk)?;
        }
        Ok(engine)
    }

    /// What the adapter's threads share.
    pub(crate) fn model(&self) -> &Arc<M> {
        &self.shared.model
    }

    /// Wakes the queue's thread.
    pub(crate) fn ring(&self) {
        self.shared.ring();
    }

    /// An event whose writing wakes the queue's thread.
    pub(crate) fn doorbell(&self) -> std::io::Result<EventFd> {
        self.shared.doorbell.try_clone()
    }

    /// Has the queue's thread carry out a call, and waits for its reply; `None` if the thread has ended.
    pub(crate) fn call(&self, call: M::Call) -> Option<M::Reply> {
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Call(call, Some(reply)));
        replied.recv().ok()
    }

    /// Has the queue's thread carry out a call when it comes to it.
    pub(crate) fn post_call(&self, call: M::Call) {
        self.shared.send(Control::Call(call, None));
    }

    /// Plugs a disk in, also while the guest runs.
    ///
    /// # Errors
    /// [`AdapterError`]: no such target number, it is taken, or the storage could not be opened.
    pub(crate) fn attach(&self, disk: Attachment<D>) -> Result<(), AdapterError> {
        let target = disk.target;
        if target >= M::TARGETS || target == OWN_TARGET {
            return Err(AdapterError::NoTarget { target, last: M::TARGETS - 1 });
        }
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Attach(disk, reply));
        replied.recv().map_err(|_| AdapterError::ThreadLost)?
    }

    /// Pulls a disk out: its requests end, it is flushed and closed.
    ///
    /// # Errors
    /// [`AdapterError`]: there is none, or its last flush failed (it is gone all the same).
    pub(crate) fn detach(&self, target: u8) -> Result<(), AdapterError> {
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Detach(target, reply));
        replied.recv().map_err(|_| AdapterError::ThreadLost)?
    }

    /// Has the engine been stopped?
    pub(crate) fn is_stopped(&self) -> bool {
        self.thread.lock().is_none()
    }

    /// Ends all work; see [`crate::hba::HostBusAdapter::stop`].
    pub(crate) fn stop(&self) -> Result<(), AdapterError> {
        let Some(thread) = self.thread.lock().take() else { return Ok(()) };
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Stop(reply));
        let result = replied.recv().map_err(|_| AdapterError::ThreadLost).and_then(|result| result);
        thread.join().map_err(|_| AdapterError::ThreadLost).and(result)
    }
}

impl<M: Model, D> Drop for Engine<M, D> {
    fn drop(&mut self) {
        if self.thread.get_mut().take().is_some() {
            let (reply, _) = sync_channel(1);
            self.shared.send(Control::Stop(reply));
        }
    }
}

/// The queue's thread.
fn run_thread<M: Model, D: BlockDevice + 'static>(
    memory: Arc<GuestMemory>,
    shared: Arc<Shared<M, D>>,
    ready: SyncSender<std::io::Result<()>>,
) {
    struct End<M: Model, D>(Arc<Shared<M, D>>);
    impl<M: Model, D> Drop for End<M, D> {
        fn drop(&mut self) {
            self.0.end();
        }
    }
    let _end = End(shared.clone());
    let runtime = match tokio_uring::Runtime::new(tokio_uring::builder().entries(URING_ENTRIES)) {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let queue = Rc::new(Queue::new(memory, shared));
    if let Err(error) = runtime.block_on(queue.run()) {
        error!(%error, "the {} queue cannot read its doorbell; the adapter is dead", M::NAME);
    }
}
