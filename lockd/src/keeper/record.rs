//! Owns: the daemon's state file: which slots it keeps, good for one boot.
//! Promises: replaced as a whole or not at all; a file of another boot, of another version or with another checksum is not believed.
//! Must not know: whether the slots still are what the file says: whoever reads it looks at them first.
//!
//! One line of header, `vmfs-lockd VERSION CRC32C LENGTH`, and LENGTH bytes of JSON that the checksum covers.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::messages::{Id, LunPlace, MountIdentity, Times};

const NAME: &str = "vmfs-lockd";
const VERSION: u32 = 1;

/// A slot that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSlot {
    /// Where.
    pub lun: LunPlace,
    /// Lease parameters.
    pub lease: Times,
    /// The slot.
    pub slot: u8,
    /// Its generation.
    pub generation: u64,
}

/// A mount and its slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMount {
    /// The mount.
    pub mount: MountIdentity,
    /// Its slots.
    pub slots: Vec<KeptSlot>,
}

/// All that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Boot id of the machine that wrote it.
    pub boot: Id,
    /// The mounts.
    pub mounts: Vec<KeptMount>,
}

/// Why a state file is not believed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read.
    #[error("{}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It does not pass its checks.
    #[error("{} is no state file of this release ({why}); the mounts that are still there tell what they have", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// The bytes of a state file.
pub fn encode(record: &Record) -> Vec<u8> {
    let body = serde_json::to_vec(record).expect("records have string keys only");
    let mut bytes = format!("{NAME} {VERSION} {:08x} {}\n", crc32c::crc32c(&body), body.len()).into_bytes();
    bytes.extend(body);
    bytes
}

/// What the bytes of a state file say.
pub fn decode(bytes: &[u8]) -> Result<Record, String> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no header line")?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| "its header line is no text")?;
    let body = &bytes[end + 1..];
    let expected = format!("{NAME} {VERSION} {:08x} {}", crc32c::crc32c(body), body.len());
    if header != expected {
        return Err(format!("header {header:?}, expected {expected:?}"));
    }
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

/// Replaces the state file.
pub fn save(path: &Path, record: &Record) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&encode(record))?;
    file.sync_data()?;
    fs::rename(&new, path)
}

/// Reads the state file; `None` when there is none or it is of another boot: every slot of that one is dead.
pub fn load(path: &Path, boot: Id) -> Result<Option<Record>, RecordError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(RecordError::Unreadable { path: path.to_owned(), cause }),
    };
    let record = decode(&bytes).map_err(|why| RecordError::Broken { path: path.to_owned(), why })?;
    Ok((record.boot == boot).then_some(record))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmfs_core::units::Uuid;

    use super::*;

    fn record() -> Record {
        let id = |byte| Id(Uuid([byte; 16]));
        let mount = MountIdentity {
            volume: id(1),
            cell_bytes: 512,
            incarnation: u64::MAX,
            host: id(2),
            boot: id(3),
            host_name: "esx-a".to_owned(),
            program: "mount.vmfs, process 7".to_owned(),
        };
        let lun = LunPlace { index: 1, uuid: id(4), path: "/dev/sdb".to_owned(), window: None };
        let lease = Times { lease_ms: 10_000, renew_ms: 1000, margin_ms: 3000, clock_ppm: 200 };
        Record {
            boot: id(3),
            mounts: vec![KeptMount { mount, slots: vec![KeptSlot { lun, lease, slot: 5, generation: 9 }] }],
        }
    }

    #[test]
    fn a_state_file_is_read_back_within_its_boot_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lockd.state");
        assert!(load(&path, record().boot).unwrap().is_none());
        save(&path, &record()).unwrap();
        assert_eq!(load(&path, record().boot).unwrap(), Some(record()));
        assert_eq!(load(&path, Id(Uuid([9; 16]))).unwrap(), None);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = encode(&record());
        for nth in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[nth] ^= 1;
            assert!(decode(&broken).is_err(), "byte {nth}");
            assert!(decode(&bytes[..nth]).is_err(), "cut at {nth}");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
