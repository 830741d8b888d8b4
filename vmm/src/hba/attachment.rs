//! Owns: disks on their way to an adapter.
//! Promises: storage is opened on the thread that will use it.
//! Must not know: adapters, what stores the blocks.

use std::pin::Pin;

use scsi::DiskOptions;

/// Any error of a storage back end; it names the file and the next step.
pub type OpenError = Box<dyn std::error::Error + Send + Sync>;

/// Opens a disk's storage on the queue's thread, where it then stays.
pub type Opener<D> = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<D, OpenError>>>> + Send>;

/// A disk to be plugged in.
pub struct Attachment<D> {
    /// SCSI target number; not 7 (the adapter's own).
    pub target: u8,
    /// How the disk shows itself.
    pub options: DiskOptions,
    /// Opens its storage.
    pub open: Opener<D>,
}

impl<D> Attachment<D> {
    /// A disk at `target` over the storage that the future of `open` gives.
    pub fn new<F>(target: u8, options: DiskOptions, open: impl FnOnce() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<D, OpenError>> + 'static,
    {
        Self { target, options, open: Box::new(move || Box::pin(open())) }
    }
}
