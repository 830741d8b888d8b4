//! Owns: the records of persistent reservations on this machine's file system, one file for each LUN.
//! Promises: a record is replaced as a whole and durably; after a crash the old one or the new one is there.
//! Must not know: what is in a record.

use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;

use scsi::{BlockDevice, Lun, ReservationStore, RestoreError, StoreError, Target};

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be read.
    #[error("{}: {source}; check the folder of --state-dir", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no record, or damaged.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: RestoreError,
    },
}

/// Keeps the record of one LUN.
pub struct FileStore {
    path: PathBuf,
    saved: Option<Vec<u8>>,
}

impl FileStore {
    /// Reads what was saved of LUN `lun` of `target`, if anything was.
    ///
    /// # Errors
    /// [`RecordError::Read`]
    pub fn open(folder: &Path, target: &str, lun: Lun) -> Result<FileStore, RecordError> {
        let path = folder.join(format!("{target}.lun{}.reservations", lun.0));
        match fs::read(&path) {
            Ok(saved) => Ok(FileStore { path, saved: Some(saved) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder.is_dir() => {
                Ok(FileStore { path, saved: None })
            }
            Err(source) => Err(RecordError::Read { path, source }),
        }
    }

    /// Whether what was saved can be restored.
    ///
    /// # Errors
    /// [`RecordError::Damaged`]
    pub fn check(&self) -> Result<(), RecordError> {
        let checked = self.saved.as_deref().map_or(Ok(()), scsi::check_record);
        checked.map_err(|source| RecordError::Damaged { path: self.path.clone(), source })
    }

    /// Restores the reservations of a unit, and keeps them from now on.
    ///
    /// # Errors
    /// [`RecordError::Damaged`]: whether hosts rely on reservations nobody knows, so nothing is served.
    pub fn keep_for<D: BlockDevice + 'static>(mut self, units: &Target<D>, lun: Lun) -> Result<(), RecordError> {
        let (saved, path) = (self.saved.take(), self.path.clone());
        let restored = units.keep_reservations(lun, Rc::new(self), saved.as_deref());
        restored.map_err(|source| RecordError::Damaged { path, source })
    }

    fn replace(&self, record: &[u8]) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let new = PathBuf::from(name);
        let mut file = File::create(&new)?;
        file.write_all(record)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl ReservationStore for FileStore {
    /// A few hundred bytes and rare: the thread waits for them.
    fn save<'a>(&'a self, record: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>> {
        Box::pin(async move { self.replace(record).map_err(|source| StoreError { source }) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_there_again_and_replaces_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let store = |lun| FileStore::open(folder.path(), "iqn.2026-01.test:a", Lun(lun)).unwrap();
        assert_eq!(store(0).saved, None);
        store(0).replace(b"one").unwrap();
        store(1).replace(b"other").unwrap();
        store(0).replace(b"two").unwrap();
        assert_eq!(store(0).saved.as_deref(), Some(&b"two"[..]));
        assert_eq!(store(1).saved.as_deref(), Some(&b"other"[..]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = FileStore::open(Path::new("/nowhere/at/all"), "iqn.a", Lun(0)).err().unwrap().to_string();
        assert!(error.contains("/nowhere/at/all") && error.contains("--state-dir"), "{error}");
    }
}
