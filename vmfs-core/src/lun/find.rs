//! Owns: finding a LUN by what it says of itself, wherever it is now.
//! Promises: what is given has the identity asked for; a path is a place to look, never a name to believe.
//! Must not know: what the LUN is used for.

use std::cell::RefCell;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{Mode, OFlags, fstat, open};

use super::open::image_identity;
use super::{Lun, OpenLun, block, open_lun};
use crate::env::LocalFuture;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::DeviceIdentity;

/// The LUNs that a host reaches, beside those of the volume.
pub trait RawDevices {
    /// Opens the LUN that an administrator names, for reading; where it lies is a place to look from now on.
    fn open_path<'a>(&'a self, path: &'a str) -> LocalFuture<'a, Result<Rc<dyn Lun>, FsError>>;
    /// Opens the LUN that says this of itself, wherever it is now. `NotFound`: this host does not see it.
    fn find<'a>(
        &'a self,
        identity: &'a DeviceIdentity,
        read_only: bool,
    ) -> LocalFuture<'a, Result<Rc<dyn Lun>, FsError>>;
}

/// Looks for block devices among all of this machine, and for image files in the folders that it was told of.
#[derive(Default)]
pub struct DeviceFinder {
    folders: RefCell<Vec<PathBuf>>,
}

impl DeviceFinder {
    /// One that looks for image files in these folders.
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> DeviceFinder {
        let finder = DeviceFinder::default();
        folders.into_iter().for_each(|folder| finder.add(folder));
        finder
    }

    fn add(&self, folder: PathBuf) {
        let mut folders = self.folders.borrow_mut();
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
}

impl RawDevices for DeviceFinder {
    fn open_path<'a>(&'a self, path: &'a str) -> LocalFuture<'a, Result<Rc<dyn Lun>, FsError>> {
        Box::pin(async move {
            let how = OpenLun { read_only: true, refuse_busy_device: true };
            let lun = open_lun(path, how)?;
            if is_image(&lun.identity())
                && let Some(folder) = Path::new(path).canonicalize().ok().as_deref().and_then(Path::parent)
            {
                self.add(folder.to_owned());
            }
            Ok(lun)
        })
    }

    fn find<'a>(
        &'a self,
        identity: &'a DeviceIdentity,
        read_only: bool,
    ) -> LocalFuture<'a, Result<Rc<dyn Lun>, FsError>> {
        Box::pin(async move {
            let (wanted, folders) = (identity.clone(), self.folders.borrow().clone());
            let searched = tokio::task::spawn_blocking(move || search(&wanted, &folders)).await;
            let places = searched.map_err(|ended| FsError::refused(FsErrorKind::Io, ended.to_string()))?;
            let mut failed = None;
            for place in places {
                let Some(path) = place.to_str() else { continue };
                match open_lun(path, OpenLun { read_only, refuse_busy_device: false }) {
                    // What lies there may have been exchanged since it was looked at.
                    Ok(lun) if lun.identity() == *identity => return Ok(lun),
                    Ok(_) => {}
                    Err(error) => failed = Some(error),
                }
            }
            Err(failed.unwrap_or_else(|| self.absent(identity)))
        })
    }
}

impl DeviceFinder {
    fn absent(&self, identity: &DeviceIdentity) -> FsError {
        let named = identity.bytes().escape_ascii();
        let message = if is_image(identity) {
            let folders = self.folders.borrow();
            let looked = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ");
            format!(
                "no image file with the identity {named} is in {looked}; name its folder with mount.vmfs -o rdm_folder=DIR"
            )
        } else {
            format!("no block device of this machine has the identity {named}; attach the LUN to this host")
        };
        FsError::refused(FsErrorKind::NotFound, message)
    }
}

fn is_image(identity: &DeviceIdentity) -> bool {
    identity.bytes().starts_with(b"file:")
}

/// The places where a LUN with this identity is. What cannot be read is passed over: it is somebody else's.
fn search(identity: &DeviceIdentity, folders: &[PathBuf]) -> Vec<PathBuf> {
    if !is_image(identity) {
        return block::nodes_of(identity).unwrap_or_default();
    }
    folders.iter().flat_map(|folder| images_in(folder, identity)).collect()
}

fn images_in(folder: &Path, identity: &DeviceIdentity) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let text = String::from_utf8_lossy(identity.bytes()).into_owned();
    let may_be = |inode: u64| text.contains(&format!(":{inode:x}"));
    let files =
        entries.flatten().filter(|entry| may_be(entry.ino()) && entry.file_type().is_ok_and(|kind| kind.is_file()));
    files.map(|entry| entry.path()).filter(|path| identity_of(path).as_ref() == Some(identity)).collect()
}

fn identity_of(path: &Path) -> Option<DeviceIdentity> {
    let file: OwnedFd = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()?;
    Some(image_identity(&file, &fstat(&file).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_runtime<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    #[test]
    fn an_image_is_found_under_another_name_and_folder_and_another_file_under_its_old_name_is_not_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other");
        fs::create_dir(&other).unwrap();
        let path = folder.path().join("raw.img");
        fs::write(&path, vec![7; 8192]).unwrap();
        on_runtime(async {
            let finder = DeviceFinder::new([other.clone()]);
            let identity = finder.open_path(path.to_str().unwrap()).await.unwrap().identity();
            assert!(!identity.bytes().is_empty());
            assert_eq!(finder.find(&identity, true).await.unwrap().name(), path.to_str().unwrap());
            let moved = other.join("moved.img");
            fs::rename(&path, &moved).unwrap();
            fs::write(&path, vec![8; 8192]).unwrap();
            assert_eq!(finder.find(&identity, false).await.unwrap().name(), moved.to_str().unwrap());
            fs::remove_file(&moved).unwrap();
            // The next file may well get the inode number that became free.
            for n in 0..20 {
                fs::write(other.join(format!("new{n}.img")), vec![9; 8192]).unwrap();
            }
            let error = finder.find(&identity, true).await.err().expect("it is gone");
            assert_eq!(error.kind(), FsErrorKind::NotFound);
            assert!(error.to_string().contains("rdm_folder"), "{error}");
        });
    }

    #[test]
    fn a_block_device_that_nobody_has_is_said_to_be_absent() {
        on_runtime(async {
            let identity = DeviceIdentity::new(b"wwid:naa.0000000000000000");
            let error = DeviceFinder::default().find(&identity, true).await.err().expect("there is none");
            assert!(error.to_string().contains("attach the LUN"), "{error}");
        });
    }
}
