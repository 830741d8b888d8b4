//! Owns: what the tests of all adapters have in common: plain guest memory, an interrupt line that counts, a disk that waits on demand.
//! Promises: a test that waits gives up only when what it waits for is plainly never going to happen.
//! Must not know: any adapter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use scsi::testing::MemoryDisk;
use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, DiskOptions, Geometry, Identity, StorageError};
use vm_memory::{Bytes, GuestAddress};

use super::{AdapterError, Attachment, GuestMemory, HostBusAdapter, InterruptLine};

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Line {
    pub(crate) msi: AtomicBool,
    pub(crate) messages: AtomicUsize,
    pub(crate) level: AtomicBool,
}

impl InterruptLine for Line {
    fn uses_messages(&self) -> bool {
        self.msi.load(Ordering::SeqCst)
    }

    fn raise_message(&self, _: u16) {
        self.messages.fetch_add(1, Ordering::SeqCst);
    }

    fn set_level(&self, asserted: bool) {
        self.level.store(asserted, Ordering::SeqCst);
    }

    fn number(&self) -> u8 {
        11
    }
}

/// Lets a disk's reads and writes wait until the test opens it.
#[derive(Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    waiting: AtomicUsize,
    wakers: Mutex<Vec<Waker>>,
}

impl Gate {
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        self.wakers.lock().drain(..).for_each(Waker::wake);
    }

    /// Requests that wait at the gate.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    async fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        std::future::poll_fn(|context| {
            self.wakers.lock().push(context.waker().clone());
            if self.closed.load(Ordering::SeqCst) { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
        })
        .await;
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A memory disk behind a gate.
pub(crate) struct GatedDisk {
    disk: MemoryDisk,
    gate: Arc<Gate>,
}

impl BlockDevice for GatedDisk {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn identity(&self) -> &Identity {
        self.disk.identity()
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.gate.pass().await;
        self.disk.read(position, buffer).await
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force: bool) -> Result<(), StorageError> {
        self.gate.pass().await;
        self.disk.write(position, buffer, force).await
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.disk.flush().await
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        self.disk.unmap(ranges).await
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.disk.write_zeroes(range, may_unmap).await
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.disk.block_status(range).await
    }
}

/// A disk of 256 blocks behind `gate`.
pub(crate) fn disk(target: u8, gate: &Arc<Gate>) -> Attachment<GatedDisk> {
    let gate = gate.clone();
    Attachment::new(target, DiskOptions::default(), || async {
        Ok(GatedDisk { disk: MemoryDisk::new(scsi::testing::GEOMETRY), gate })
    })
}

/// Bytes of guest memory.
pub(crate) const MEMORY: usize = 4 << 20;

/// An adapter with one disk of 256 blocks at target 0, as it is after power-on, over plain memory.
pub(crate) struct Bench<A: HostBusAdapter> {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) line: Arc<Line>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) adapter: Arc<A>,
}

impl<A: HostBusAdapter> Bench<A> {
    pub(crate) fn new(
        start: impl FnOnce(
            &str,
            Arc<GuestMemory>,
            Arc<dyn InterruptLine>,
            Vec<Attachment<GatedDisk>>,
        ) -> Result<Arc<A>, AdapterError>,
    ) -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let (line, gate) = (Arc::new(Line::default()), Arc::new(Gate::default()));
        let adapter = start("test", memory.clone(), line.clone(), vec![disk(0, &gate)]).unwrap();
        Self { memory, line, gate, adapter }
    }

    pub(crate) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn set_bytes(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Guest memory must stay as it is from now on.
    #[track_caller]
    pub(crate) fn assert_quiet(&self) {
        let before = self.bytes(0, MEMORY);
        std::thread::sleep(Duration::from_millis(50));
        assert!(self.bytes(0, MEMORY) == before, "guest memory has changed after the acknowledgement");
    }
}

impl<A: HostBusAdapter> Drop for Bench<A> {
    fn drop(&mut self) {
        self.gate.open();
        let stopped = self.adapter.stop();
        if !std::thread::panicking() {
            stopped.unwrap();
        }
    }
}

pub(crate) fn read_10(lba: u8, blocks: u8) -> [u8; 10] {
    [0x28, 0, 0, 0, 0, lba, 0, 0, blocks, 0]
}

pub(crate) fn write_10(lba: u8, blocks: u8) -> [u8; 10] {
    [0x2A, 0, 0, 0, 0, lba, 0, 0, blocks, 0]
}

/// Waits for something that happens soon; gives up only when it is plainly never going to happen.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} never came");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Long enough for an adapter's thread to hear of what the guest has asked, even on a machine that is busy with other things.
pub(crate) const HEARD: Duration = Duration::from_millis(400);

/// Does `deed` while the gate is closed, and opens the gate a while later. Returns whether `deed` returned before.
pub(crate) fn returns_before_the_gate_opens(gate: &Arc<Gate>, deed: impl FnOnce()) -> bool {
    let returned = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| {
            std::thread::sleep(HEARD);
            let early = returned.load(Ordering::SeqCst);
            gate.open();
            early
        });
        deed();
        returned.store(true, Ordering::SeqCst);
        opener.join().unwrap()
    })
}
