//! A read or a write of a guest allocates nothing on its way from the doorbell through the adapter, the device server and
//! the ring to the file and back.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use scsi::DiskOptions;
use storage::DiskSource;
use vm_memory::{Bytes, GuestAddress};
use vmm::hba::pvscsi::PvScsi;
use vmm::hba::{Attachment, GuestMemory, HostBusAdapter, InterruptLine, OpenError};
use vmm::supervision::Supervision;

/// Counts the allocations of all threads but the guest's.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_GUEST: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::Relaxed) && !IS_GUEST.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct NoInterrupts;

impl InterruptLine for NoInterrupts {
    fn uses_messages(&self) -> bool {
        true
    }

    fn raise_message(&self, _: u16) {}

    fn set_level(&self, _asserted: bool) {}

    fn number(&self) -> u8 {
        0
    }
}

const STATE: u64 = 0x1000;
const REQUESTS: u64 = 0x2000;
const COMPLETIONS: u64 = 0x3000;
const DATA: u64 = 0x10000;

/// A guest in plain memory with one disk of 16 MiB and rings of one page each.
struct Guest {
    memory: Arc<GuestMemory>,
    adapter: Arc<PvScsi<storage::Storage>>,
    produced: u32,
}

impl Guest {
    fn new(path: std::path::PathBuf) -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let source = DiskSource { path, read_only: false, cached: false, serial: None };
        let disk = Attachment::new(0, DiskOptions::default(), move || async move {
            storage::open(source, Arc::new(Supervision::default())).await.map_err(|error| Box::new(error) as OpenError)
        });
        let adapter = PvScsi::start("hot-path", memory.clone(), Arc::new(NoInterrupts), vec![disk]).unwrap();
        let mut words = vec![0u32; 133];
        words[..4].copy_from_slice(&[3, 1, 1, (STATE >> 12) as u32]);
        (words[5], words[69]) = ((REQUESTS >> 12) as u32, (COMPLETIONS >> 12) as u32);
        adapter.write(0, &words[0].to_le_bytes());
        for word in &words[1..] {
            adapter.write(4, &word.to_le_bytes());
        }
        Self { memory, adapter, produced: 0 }
    }

    /// Runs `count` commands at once, each of one page; returns how many did not end well.
    fn run(&mut self, opcode: u8, count: u32) -> u32 {
        for number in 0..count {
            let mut request = [0u8; 128];
            request[0x08..0x10].copy_from_slice(&(DATA + u64::from(number) * 4096).to_le_bytes());
            request[0x10..0x18].copy_from_slice(&4096u64.to_le_bytes());
            request[0x24] = if opcode == 0x2A { 0x10 } else { 0x08 };
            request[0x28] = opcode;
            request[0x2D] = (number * 8) as u8;
            request[0x30] = 8;
            request[0x38] = 10;
            let slot = u64::from(self.produced.wrapping_add(number) & 31);
            self.memory.write_slice(&request, GuestAddress(REQUESTS + slot * 128)).unwrap();
        }
        let first = self.produced;
        self.produced = first.wrapping_add(count);
        self.memory.store(self.produced, GuestAddress(STATE), Ordering::Release).unwrap();
        self.adapter.write(0x4018, &[0; 4]);
        while self.memory.load::<u32>(GuestAddress(STATE + 0x0C), Ordering::Acquire).unwrap() != self.produced {
            std::thread::yield_now();
        }
        self.memory.store(self.produced, GuestAddress(STATE + 0x10), Ordering::Release).unwrap();
        (first..self.produced)
            .filter(|index| {
                let entry = GuestAddress(COMPLETIONS + u64::from(index & 127) * 32 + 0x14);
                self.memory.read_obj::<u32>(entry).unwrap() != 0
            })
            .count() as u32
    }
}

#[test]
fn reads_and_writes_of_a_guest_allocate_nothing() {
    IS_GUEST.set(true);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(16 << 20).unwrap();
    COUNTING.store(true, Ordering::SeqCst);
    let mut guest = Guest::new(path);
    COUNTING.store(false, Ordering::SeqCst);
    assert_ne!(ALLOCATIONS.swap(0, Ordering::SeqCst), 0, "the adapter's thread is not counted");
    assert_eq!(guest.run(0x28, 1), 1, "the first command reports that power is on");
    for _ in 0..8 {
        assert_eq!((guest.run(0x2A, 32), guest.run(0x28, 32), guest.run(0x28, 1)), (0, 0, 0));
    }
    COUNTING.store(true, Ordering::SeqCst);
    let mut failed = 0;
    for _ in 0..200 {
        failed += guest.run(0x2A, 32) + guest.run(0x28, 32) + guest.run(0x28, 1);
    }
    COUNTING.store(false, Ordering::SeqCst);
    assert_eq!((failed, ALLOCATIONS.load(Ordering::SeqCst)), (0, 0));
    guest.adapter.stop().unwrap();
}
