//! Owns: finding the mount of a path, and naming files to its socket.
//! Promises: a request names a directory that the caller could open, never a path that could mean another file by then.
//! Must not know: what the requests do.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Connection, ConnectionError, DirectError, DirectErrorKind, io_error};
use crate::ioctl::{self, VolumeAnswer};
use crate::protocol::{NameIn, Ticket};

/// An open directory of a mount; its tickets are good while it lives.
pub struct MountedDirectory {
    path: PathBuf,
    answer: VolumeAnswer,
    _open: File,
}

impl MountedDirectory {
    /// Opens a directory that lies on a mount; kind `NotVmfs` elsewhere.
    pub fn open(path: &Path) -> Result<MountedDirectory, DirectError> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let open = File::open(path).map_err(|error| io_error(path, "opening it", &error))?;
        let answer = ask(path, &open)?;
        Ok(MountedDirectory { path: path.to_owned(), answer, _open: open })
    }

    /// Opens the directory of a file and gives the file's name in it.
    pub fn of_file(path: &Path) -> Result<(MountedDirectory, NameIn), DirectError> {
        let refuse = || DirectError {
            kind: DirectErrorKind::Io,
            path: path.to_owned(),
            message: "this path does not end in a file's name".to_owned(),
            errno: Some(libc::EINVAL),
        };
        let name = path.file_name().ok_or_else(refuse)?.as_bytes().to_vec();
        let directory = MountedDirectory::open(path.parent().ok_or_else(refuse)?)?;
        let name = NameIn { directory: directory.ticket(), name };
        Ok((directory, name))
    }

    /// Names this directory to the socket.
    pub fn ticket(&self) -> Ticket {
        Ticket(self.answer.ticket)
    }

    /// UUIDs of the volume and of the mount's host: directories of one mount have both in common.
    pub fn volume(&self) -> ([u8; 16], [u8; 16]) {
        (self.answer.volume, self.answer.host)
    }

    /// Connects to the mount's socket.
    pub fn connect(&self) -> Result<Connection, DirectError> {
        connect(&self.path, &self.answer).map_err(|error| connection_error(&self.path, &error))
    }
}

/// Calls GET_VOLUME; kind `NotVmfs` when nobody of this file system answers.
pub(super) fn ask(path: &Path, open: &File) -> Result<VolumeAnswer, DirectError> {
    ioctl::get_volume(open).map_err(|error| {
        let foreign =
            matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP));
        if !foreign {
            return io_error(path, "asking which volume it is on", &error);
        }
        let message = "it is on no mounted VMFS volume".to_owned();
        DirectError { kind: DirectErrorKind::NotVmfs, path: path.to_owned(), message, errno: Some(libc::ENOTTY) }
    })
}

pub(super) fn connect(path: &Path, answer: &VolumeAnswer) -> Result<Connection, ConnectionError> {
    let length = usize::from(answer.socket_path_length.get()).min(answer.socket_path.len());
    if length == 0 {
        let what = format!("the mount of {} has no socket: its log says why", path.display());
        return Err(ConnectionError::Protocol(what));
    }
    Connection::open(Path::new(std::ffi::OsStr::from_bytes(&answer.socket_path[..length])))
}

pub(super) fn connection_error(path: &Path, error: &ConnectionError) -> DirectError {
    let errno = error.raw_os_error();
    DirectError { kind: super::kind_of(errno), path: path.to_owned(), message: error.to_string(), errno }
}
