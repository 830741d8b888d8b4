//! Owns: the gate page as memory that processes share: a sealed memfd and its mappings.
//! Promises: the page keeps its size for ever; whoever got it from [`SharedGateMemory::read_only_descriptor`] cannot write it.
//! Must not know: what the words mean (`vmfs_core::gate`), who renews leases.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use vmfs_core::gate::{GATE_BYTES, GATE_WORDS, GateMemory};

/// The writer's mapping of a gate page, and the descriptor to pass on.
pub struct SharedGateMemory {
    mapping: MmapRaw,
    descriptor: OwnedFd,
}

/// A reader's mapping of a gate page that another process writes.
pub struct ReadOnlyGateMemory {
    mapping: memmap2::Mmap,
}

impl SharedGateMemory {
    /// A page of zeros in a new memfd whose size is sealed.
    pub fn create() -> io::Result<SharedGateMemory> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let descriptor = rustix::fs::memfd_create("vmfs-gate", flags)?;
        rustix::fs::ftruncate(&descriptor, GATE_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = MmapOptions::new().len(GATE_BYTES).map_raw(&descriptor)?;
        Ok(SharedGateMemory { mapping, descriptor })
    }

    /// The page behind a descriptor that the other writer passed ([`SharedGateMemory::descriptor`]). Refuses a file that is too small or
    /// that could shrink under the mapping.
    pub fn map(descriptor: OwnedFd) -> io::Result<SharedGateMemory> {
        check(descriptor.as_fd())?;
        let mapping = MmapOptions::new().len(GATE_BYTES).map_raw(&descriptor)?;
        Ok(SharedGateMemory { mapping, descriptor })
    }

    /// The page's descriptor, for another process that writes it too.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// A new open file of the page that can be read and mapped for reading only.
    pub fn read_only_descriptor(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.descriptor.as_fd().as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

impl ReadOnlyGateMemory {
    /// Maps the page behind `descriptor`. Refuses a file that is too small or that could shrink under the mapping.
    pub fn map(descriptor: BorrowedFd<'_>) -> io::Result<ReadOnlyGateMemory> {
        check(descriptor)?;
        // SAFETY: the file is a memfd that is sealed against shrinking, so no access can fault. Other processes change it,
        // which is why it is read only through the atomics below and never as a slice of bytes.
        let mapping = unsafe { MmapOptions::new().len(GATE_BYTES).map(&descriptor)? };
        Ok(ReadOnlyGateMemory { mapping })
    }
}

/// Refuses what is no sealed page.
fn check(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("gate page: {what}")));
    if rustix::fs::fstat(descriptor)?.st_size < GATE_BYTES as i64 {
        return refuse("the shared memory is too small");
    }
    if !rustix::fs::fcntl_get_seals(descriptor)?.contains(SealFlags::SHRINK) {
        return refuse("the size of the shared memory is not sealed");
    }
    Ok(())
}

impl GateMemory for SharedGateMemory {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, GATE_BYTES long and lives as long as `self`; all accesses of this process are
        // atomic, those of others too.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast::<AtomicU64>(), GATE_WORDS) }
    }
}

impl GateMemory for ReadOnlyGateMemory {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, GATE_BYTES long and lives as long as `self`. The trait's readers only load,
        // and 64-bit atomic loads are plain loads on the 64-bit processors this runs on, also from read-only memory.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().cast::<AtomicU64>(), GATE_WORDS) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmfs_core::env::Instant;
    use vmfs_core::gate::{Gate, GatePage, GateState};
    use vmfs_core::units::{Generation, LunIndex};

    use super::*;

    #[test]
    fn a_reader_sees_what_the_writer_publishes_and_cannot_write() {
        let lun = LunIndex::new(3).unwrap();
        let memory = Arc::new(SharedGateMemory::create().unwrap());
        let page = GatePage::create(memory.clone()).unwrap();
        let descriptor = memory.read_only_descriptor().unwrap();
        let gate = Gate::open(Arc::new(ReadOnlyGateMemory::map(descriptor.as_fd()).unwrap())).unwrap();
        assert_eq!(gate.state(lun, Generation(5), Instant(1)), GateState::Frozen);
        page.extend(lun, Generation(5), Instant(100), 10);
        assert_eq!(gate.state(lun, Generation(5), Instant(1)), GateState::Open);
        page.poison(lun, Generation(5));
        assert_eq!(gate.state(lun, Generation(5), Instant(1)), GateState::Poisoned);
        assert!(MmapOptions::new().len(GATE_BYTES).map_raw(&descriptor).is_err());
        assert!(rustix::fs::ftruncate(&descriptor, 0).is_err());
    }

    #[test]
    fn memory_that_could_shrink_or_is_too_small_is_refused() {
        let unsealed = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        assert!(ReadOnlyGateMemory::map(unsealed.as_fd()).is_err());
        rustix::fs::ftruncate(&unsealed, GATE_BYTES as u64).unwrap();
        let error = ReadOnlyGateMemory::map(unsealed.as_fd()).err().unwrap();
        assert!(error.to_string().contains("sealed"), "{error}");
    }
}
