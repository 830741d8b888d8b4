//! Owns: writes that are done as a whole or not at all (WRITE ATOMIC), on disks that promise nothing of that kind: a journal beside them.
//! Promises: once the disk is served again, with the same journal, all of such a write is on it or nothing of it, whatever ended the
//! daemon or the machine; what anybody has written after it is never undone.
//! Must not know: targets, LUNs, commands.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, Space, StorageError};

/// The most bytes of one atomic write.
pub const MOST: u32 = 1 << 20;
/// What a journal with an unfinished write begins with; one without begins with zeros, or is empty.
const MAGIC: &[u8; 8] = b"ATOMIC-1";
/// Bytes before the data: magic, the disk's NAA identifier, first byte and length of the write, checksum of it all.
const HEADER: usize = 48;
/// A disk changes in whole sectors.
const SECTOR: usize = 512;

/// Why a disk cannot be used with its journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be used.
    #[error("{}: {source}; check the folder of --state-dir", path.display())]
    File {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The write that it holds cannot be finished.
    #[error("{}: the unfinished write that it holds cannot be finished: {source}; repair the disk and start again", path.display())]
    Disk {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: StorageError,
    },
}

/// A write that was begun.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    naa: [u8; 16],
    position: u64,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// The journal of one disk.
struct Journal {
    file: Arc<File>,
    /// One write at a time; whether the journal keeps one that could neither be finished nor undone.
    turn: tokio::sync::Mutex<bool>,
}

/// A disk with a journal, or without one: then it promises what the disk itself does.
pub struct Journaled<D> {
    disk: D,
    journal: Option<Journal>,
}

impl<D> Journaled<D> {
    /// A disk without a journal.
    pub fn without(disk: D) -> Self {
        Self { disk, journal: None }
    }
}

impl<D: BlockDevice> Journaled<D> {
    /// A disk whose journal is in `folder`, in a file of the disk's own identifier. A write that it holds is finished first.
    ///
    /// # Errors
    /// [`JournalError`]
    pub async fn open(disk: D, folder: &Path) -> Result<Self, JournalError> {
        let name: String = disk.identity().naa.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = folder.join(format!("{name}.atomic"));
        let told = |source| JournalError::File { path: path.clone(), source };
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = options.map_err(told)?;
        let found = read_entry(&file).map_err(told)?;
        if let Some(entry) = found {
            let finished = finish(&disk, &entry).await;
            let is_done = finished.map_err(|source| JournalError::Disk { path: path.clone(), source })?;
            match is_done {
                true => {
                    tracing::info!(journal = %path.display(), position = entry.position, "an atomic write is finished")
                }
                false => tracing::warn!(
                    journal = %path.display(),
                    position = entry.position,
                    "an atomic write stays unfinished: what it was to change has been changed by others since"
                ),
            }
            clear(&file).map_err(told)?;
        }
        let journal = Journal { file: Arc::new(file), turn: tokio::sync::Mutex::default() };
        Ok(Self { disk, journal: Some(journal) })
    }

    /// The disk.
    pub fn disk(&self) -> &D {
        &self.disk
    }
}

impl Entry {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + 2 * self.new.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.naa);
        bytes.extend_from_slice(&self.position.to_le_bytes());
        bytes.extend_from_slice(&(self.new.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&self.old);
        bytes.extend_from_slice(&self.new);
        let sum = iscsi::pdu::digest(&bytes);
        bytes[HEADER - 8..HEADER - 4].copy_from_slice(&sum);
        bytes
    }

    /// What `bytes` hold: none if they are no whole entry, as after a crash while it was written.
    fn decode(mut bytes: Vec<u8>) -> Option<Entry> {
        let header: [u8; HEADER] = *bytes.first_chunk()?;
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let (position, length) = (number(24), usize::try_from(number(32)).ok()?);
        let whole =
            header.starts_with(MAGIC) && length > 0 && length <= MOST as usize && bytes.len() >= HEADER + 2 * length;
        if !whole {
            return None;
        }
        bytes.truncate(HEADER + 2 * length);
        bytes[HEADER - 8..HEADER].fill(0);
        if header[HEADER - 8..HEADER - 4] != iscsi::pdu::digest(&bytes) {
            return None;
        }
        let mut naa = [0; 16];
        naa.copy_from_slice(&header[8..24]);
        let new = bytes.split_off(HEADER + length);
        Some(Entry { naa, position, old: bytes.split_off(HEADER), new })
    }
}

fn read_entry(file: &File) -> io::Result<Option<Entry>> {
    let length = file.metadata()?.len().min((HEADER + 2 * MOST as usize) as u64);
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(Entry::decode(bytes))
}

/// From now on there is no entry, even if power fails.
fn clear(file: &File) -> io::Result<()> {
    file.write_all_at(&[0; MAGIC.len()], 0)?;
    file.sync_data()
}

fn begin(file: &File, entry: &[u8]) -> io::Result<()> {
    file.write_all_at(entry, 0)?;
    file.sync_data()
}

/// Finishes a write of which any sectors, or none, are on the disk. `false`: somebody has written there since, and it is left alone.
async fn finish<D: BlockDevice>(disk: &D, entry: &Entry) -> Result<bool, StorageError> {
    let range = ByteRange { start: entry.position, length: entry.new.len() as u64 };
    if entry.naa != disk.identity().naa || disk.geometry().check_write(range.start, range.length).is_err() {
        return Ok(false);
    }
    let now = DataBuffer::zeroed(entry.new.len(), 4096);
    disk.read(entry.position, &now).await?;
    let now = now.to_vec();
    let sectors = now.chunks(SECTOR).zip(entry.old.chunks(SECTOR)).zip(entry.new.chunks(SECTOR));
    if !sectors.into_iter().all(|((now, old), new)| now == old || now == new) {
        return Ok(false);
    }
    disk.write(entry.position, &aligned(&entry.new), true).await?;
    Ok(true)
}

fn aligned(bytes: &[u8]) -> DataBuffer {
    let buffer = DataBuffer::zeroed(bytes.len(), 4096);
    buffer.copy_from(0, bytes);
    buffer
}

impl Journal {
    /// Does `work` with the file, while the thread goes on with other things.
    async fn with(&self, work: impl FnOnce(&File) -> io::Result<()> + Send + 'static) -> io::Result<()> {
        let file = self.file.clone();
        tokio::task::spawn_blocking(move || work(&file)).await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    async fn write<D: BlockDevice>(&self, disk: &D, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        let failed = |error: io::Error| {
            tracing::error!(%error, position, "the journal of a disk failed");
            StorageError::Medium { position, errno: error.raw_os_error().unwrap_or(0) }
        };
        let mut keeps_one = self.turn.lock().await;
        if *keeps_one {
            tracing::error!(
                position,
                "no atomic write until the daemon is started again: it then finishes the one that failed"
            );
            return Err(StorageError::Medium { position, errno: 0 });
        }
        // What is there has to be durable, or a crash could leave a third thing beside the old and the new one.
        let before = DataBuffer::zeroed(buffer.len(), 4096);
        disk.read(position, &before).await?;
        disk.flush().await?;
        let naa = disk.identity().naa;
        let entry = Entry { naa, position, old: before.to_vec(), new: buffer.to_vec() }.encode();
        self.with(move |file| begin(file, &entry)).await.map_err(failed)?;
        if let Err(error) = disk.write(position, buffer, true).await {
            // Back to what was there. If even that fails the entry stays, and no other takes its place, so that the next start finishes it.
            *keeps_one = disk.write(position, &before, true).await.is_err();
            if !*keeps_one {
                self.with(clear).await.map_err(failed)?;
            }
            return Err(error);
        }
        self.with(clear).await.map_err(failed)
    }
}

impl<D: BlockDevice> BlockDevice for Journaled<D> {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn identity(&self) -> &Identity {
        self.disk.identity()
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.disk.read(position, buffer).await
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        self.disk.write(position, buffer, force_unit_access).await
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

    fn atomic_write_bytes(&self) -> u32 {
        if self.journal.is_some() { MOST } else { self.disk.atomic_write_bytes() }
    }

    async fn write_atomic(
        &self,
        position: u64,
        buffer: &DataBuffer,
        force_unit_access: bool,
    ) -> Result<(), StorageError> {
        match &self.journal {
            // Rare: in a box it does not make the state of other commands larger.
            Some(journal) => Box::pin(journal.write(&self.disk, position, buffer)).await,
            None => self.disk.write_atomic(position, buffer, force_unit_access).await,
        }
    }

    fn space(&self) -> Option<Space> {
        self.disk.space()
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.disk.block_status(range).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use scsi::testing::{GEOMETRY, MemoryDisk};

    const LENGTH: usize = 4 * SECTOR;

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    fn entry() -> Entry {
        let naa = MemoryDisk::new(GEOMETRY).identity().naa;
        Entry { naa, position: 2 * SECTOR as u64, old: vec![1; LENGTH], new: vec![2; LENGTH] }
    }

    /// A disk whose sectors from the second one on are each filled with one of `sectors`.
    fn disk(sectors: &[u8]) -> MemoryDisk {
        let disk = MemoryDisk::new(GEOMETRY);
        let bytes: Vec<u8> = sectors.iter().flat_map(|byte| [*byte; SECTOR]).collect();
        run(disk.write(entry().position, &DataBuffer::from_bytes(&bytes), false)).unwrap();
        disk
    }

    /// What the sectors hold after the disk was opened with `journal` in its folder.
    fn reopened(disk: MemoryDisk, journal: &[u8]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let name: String = disk.identity().naa.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = folder.path().join(name + ".atomic");
        std::fs::write(&path, journal).unwrap();
        let opened = run(Journaled::open(disk, folder.path())).unwrap();
        assert_eq!(read_entry(&File::open(&path).unwrap()).unwrap(), None, "nothing is left to do");
        opened.disk().bytes()[entry().position as usize..][..LENGTH].iter().step_by(SECTOR).copied().collect()
    }

    #[test]
    fn a_write_leaves_its_data_and_an_empty_journal() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(&[1; 4]);
        run(async {
            let disk = Journaled::open(disk, folder.path()).await.unwrap();
            assert_eq!(disk.atomic_write_bytes(), MOST);
            disk.write_atomic(entry().position, &DataBuffer::from_bytes(&entry().new), false).await.unwrap();
            assert!(disk.disk().bytes()[entry().position as usize..][..LENGTH] == entry().new);
            assert_eq!(disk.disk().forced_writes(), 1, "it is durable before the journal forgets it");
            assert_eq!(read_entry(&disk.journal.as_ref().unwrap().file).unwrap(), None);
        });
        assert_eq!(Journaled::without(MemoryDisk::new(GEOMETRY)).atomic_write_bytes(), 0);
    }

    #[test]
    fn a_write_that_fails_in_its_middle_is_undone() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(&[1; 4]);
        run(async {
            let disk = Journaled::open(disk, folder.path()).await.unwrap();
            let data = DataBuffer::from_bytes(&entry().new);
            disk.disk().tear_writes(1);
            disk.write_atomic(entry().position, &data, false).await.unwrap_err();
            assert!(disk.disk().bytes()[entry().position as usize..][..LENGTH] == entry().old);
            disk.write_atomic(entry().position, &data, false).await.unwrap();
            assert!(disk.disk().bytes()[entry().position as usize..][..LENGTH] == entry().new);
        });
    }

    #[test]
    fn a_write_that_cannot_be_undone_keeps_its_place_in_the_journal_until_the_next_start_finishes_it() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(&[1; 4]);
        run(async {
            let disk = Journaled::open(disk, folder.path()).await.unwrap();
            let data = DataBuffer::from_bytes(&entry().new);
            disk.disk().tear_writes(2);
            disk.write_atomic(entry().position, &data, false).await.unwrap_err();
            disk.write_atomic(0, &data, false).await.unwrap_err();
            assert!(disk.disk().bytes()[..entry().position as usize].iter().all(|byte| *byte == 0), "nothing is begun");
            let disk = Journaled::open(disk.disk, folder.path()).await.unwrap();
            assert!(disk.disk().bytes()[entry().position as usize..][..LENGTH] == entry().new);
            disk.write_atomic(0, &data, false).await.unwrap();
        });
    }

    #[test]
    fn the_journal_of_another_disk_is_not_carried_out() {
        let other = Entry { naa: [9; 16], ..entry() }.encode();
        assert_eq!(reopened(disk(&[1, 2, 1, 2]), &other), [1, 2, 1, 2]);
        let beyond = Entry { position: u64::MAX - 511, ..entry() }.encode();
        assert_eq!(reopened(disk(&[1; 4]), &beyond), [1; 4]);
    }

    #[test]
    fn what_others_have_written_since_is_not_undone() {
        assert_eq!(reopened(disk(&[1, 2, 3, 2]), &entry().encode()), [1, 2, 3, 2]);
    }

    proptest! {
        #[test]
        fn a_crash_at_any_moment_leaves_all_or_nothing(cut in 0usize..=HEADER + 2 * LENGTH, torn in prop::array::uniform4(1u8..=2)) {
            let whole = entry().encode();
            // While the entry was written the disk was untouched.
            let expected = if cut == whole.len() { [2; 4] } else { [1; 4] };
            prop_assert_eq!(reopened(disk(&[1; 4]), &whole[..cut]), expected);
            // Later any of its sectors may have been written.
            prop_assert_eq!(reopened(disk(&torn), &whole), [2; 4]);
        }

        #[test]
        fn a_damaged_entry_is_none(at in 0usize..HEADER + 2 * LENGTH, flip in 1u8..) {
            let mut bytes = entry().encode();
            bytes[at] ^= flip;
            let is_unused = (HEADER - 4..HEADER).contains(&at);
            prop_assert_eq!(Entry::decode(bytes), is_unused.then(entry));
        }

        #[test]
        fn any_bytes_are_an_entry_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200), named: bool) {
            let mut bytes = bytes;
            if named {
                bytes.splice(0..0, MAGIC.iter().copied());
            }
            let _ = Entry::decode(bytes);
        }
    }
}
