//! Owns: the undo file of a repair: what stood where something was overwritten.
//! Promises: a record is durable before its range is overwritten; a record that was cut off at the end is none.
//! Must not know: what a repair does.
//!
//! ```text
//! "VMFSUNDO" 1u32  volume[16]  count u32  lun_uuid[16] * count
//! then records: lun u32  length u32  offset u64  crc32c u32 (over the 16 bytes before and the bytes)  bytes
//! ```
//! All numbers are little-endian. The last record is written back first.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::repair::UndoLog;
use vmfs_core::units::Uuid;

const MAGIC: &[u8; 8] = b"VMFSUNDO";
const VERSION: u32 = 1;
/// Bytes of a record in front of the overwritten bytes.
const RECORD_HEAD: u64 = 20;
/// Longest record that is believed.
const LONGEST: u32 = 64 << 20;

fn failed(path: &Path, doing: &str, cause: &io::Error) -> FsError {
    FsError::refused(FsErrorKind::Io, format!("undo file {}: {doing}: {cause}", path.display()))
}

fn foreign(path: &Path, why: &str) -> FsError {
    FsError::refused(FsErrorKind::Invalid, format!("{} is no undo file of this repair: {why}", path.display()))
}

/// An undo file that is being written.
pub(super) struct UndoWriter {
    path: PathBuf,
    file: RefCell<File>,
}

impl UndoWriter {
    /// Makes a new file for these LUNs, each {volume, LUN UUID}. One that exists is refused: it undoes something else.
    pub fn create(path: &Path, luns: &[(Uuid, Uuid)]) -> Result<UndoWriter, FsError> {
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = opened.map_err(|cause| failed(path, "creating it (give a new name)", &cause))?;
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend(luns[0].0.0);
        head.extend((luns.len() as u32).to_le_bytes());
        luns.iter().for_each(|(_, lun)| head.extend(lun.0));
        let written = file.write_all(&head).and_then(|()| file.sync_all());
        written.map_err(|cause| failed(path, "writing", &cause))?;
        Ok(UndoWriter { path: path.to_owned(), file: RefCell::new(file) })
    }
}

fn head_of(lun: u32, length: u32, offset: u64) -> Vec<u8> {
    [&lun.to_le_bytes()[..], &length.to_le_bytes(), &offset.to_le_bytes()].concat()
}

impl UndoLog for UndoWriter {
    fn before(&self, lun: usize, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
        let mut record = head_of(lun as u32, bytes.len() as u32, offset);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record), bytes);
        record.extend(crc.to_le_bytes());
        record.extend(bytes);
        let mut file = self.file.borrow_mut();
        let written = file.write_all(&record).and_then(|()| file.sync_data());
        written.map_err(|cause| failed(&self.path, "writing", &cause))
    }
}

/// An undo file that is read: its records from the last to the first.
pub(super) struct UndoReader {
    path: PathBuf,
    file: File,
    /// For each LUN of the file its place among those given.
    luns: Vec<usize>,
    /// Where each record begins, the last at the end.
    records: Vec<(u64, u32)>,
}

impl UndoReader {
    /// Reads where its records are; `luns` are the given ones, each {volume, LUN UUID}.
    pub fn open(path: &Path, luns: &[(Uuid, Uuid)]) -> Result<UndoReader, FsError> {
        let mut file = File::open(path).map_err(|cause| failed(path, "opening", &cause))?;
        let size = file.seek(SeekFrom::End(0)).map_err(|cause| failed(path, "reading", &cause))?;
        file.rewind().map_err(|cause| failed(path, "reading", &cause))?;
        let mut head = [0; 32];
        file.read_exact(&mut head).map_err(|_| foreign(path, "it is too short"))?;
        if head[..8] != *MAGIC || head[8..12] != VERSION.to_le_bytes() {
            return Err(foreign(path, "it does not begin like one"));
        }
        let volume = Uuid(head[12..28].try_into().expect("16 bytes"));
        if luns.iter().any(|(of, _)| *of != volume) {
            return Err(foreign(path, &format!("it is of volume {volume}; give the LUNs of that volume")));
        }
        let count = u32::from_le_bytes(head[28..].try_into().expect("4 bytes"));
        let mut places = Vec::new();
        for _ in 0..count.min(254) {
            let mut uuid = [0; 16];
            file.read_exact(&mut uuid).map_err(|_| foreign(path, "it is too short"))?;
            let place = luns.iter().position(|(_, lun)| lun.0 == uuid);
            let missing = || foreign(path, &format!("LUN {} was not given; give all LUNs of the repair", Uuid(uuid)));
            places.push(place.ok_or_else(missing)?);
        }
        let mut reader = UndoReader { path: path.to_owned(), file, luns: places, records: Vec::new() };
        let mut at = 32 + 16 * u64::from(count);
        while let Some(length) = reader.length_at(at, size)? {
            reader.records.push((at, length));
            at += RECORD_HEAD + u64::from(length);
        }
        Ok(reader)
    }

    /// Length of the bytes of the record at a place; `None`: no whole record is there.
    fn length_at(&self, at: u64, size: u64) -> Result<Option<u32>, FsError> {
        if at + RECORD_HEAD > size {
            return Ok(None);
        }
        let mut head = [0; RECORD_HEAD as usize];
        self.file.read_exact_at(&mut head, at).map_err(|cause| failed(&self.path, "reading", &cause))?;
        let length = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes"));
        if length > LONGEST || at + RECORD_HEAD + u64::from(length) > size {
            return Ok(None);
        }
        let whole = self.record(at, length).is_ok();
        match whole {
            true => Ok(Some(length)),
            // Cut off at the very end: its range was not overwritten yet.
            false if at + RECORD_HEAD + u64::from(length) == size => Ok(None),
            false => Err(foreign(&self.path, &format!("the record at byte {at} is damaged; nothing was written back"))),
        }
    }

    fn record(&self, at: u64, length: u32) -> Result<(usize, u64, Vec<u8>), FsError> {
        let mut bytes = vec![0; RECORD_HEAD as usize + length as usize];
        self.file.read_exact_at(&mut bytes, at).map_err(|cause| failed(&self.path, "reading", &cause))?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..16]), &bytes[RECORD_HEAD as usize..]);
        let lun = u32::from_le_bytes(bytes[..4].try_into().expect("4 bytes"));
        let place = self.luns.get(lun as usize);
        match place {
            Some(place) if bytes[16..20] == crc.to_le_bytes() => {
                let offset = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
                Ok((*place, offset, bytes.split_off(RECORD_HEAD as usize)))
            }
            _ => Err(foreign(&self.path, "a record fails its checksum")),
        }
    }
}

impl Iterator for UndoReader {
    type Item = Result<(usize, u64, Vec<u8>), FsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (at, length) = self.records.pop()?;
        Some(self.record(at, length))
    }
}
