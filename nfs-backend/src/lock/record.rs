//! Owns: what is in a lock file: 84 bytes, as many as ESX rewrites (`docs/NFS.md` has the table).
//! Promises: foreign bytes give a verdict, never a panic; what is written is read back the same.
//! Must not know: servers, time.

/// Bytes of a record.
pub const RECORD: usize = 84;
const MAGIC: [u8; 8] = *b"VMFSNFSL";
const VERSION: u32 = 1;
/// Bytes for the host's name.
const HOST: usize = 32;

/// Who takes locks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Name of the host.
    pub host: String,
    /// Process id.
    pub process: u32,
}

impl Owner {
    /// This process.
    pub fn this_process() -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { host, process: std::process::id() }
    }
}

/// A record: who holds the lock, and his latest sign of life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Grows with each renewal.
    pub counter: u64,
    /// Random, one for each time that the lock is taken.
    pub incarnation: [u8; 16],
    /// Process id on that host.
    pub process: u32,
    /// When the lock was taken, in seconds since 1970 by the holder's clock. For people only.
    pub since: u64,
    /// Name of the host, at most 32 bytes.
    pub host: String,
}

/// What is in a lock file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: its maker has not written his record yet.
    Empty,
    /// A record.
    Record(Record),
    /// A record that was written in part, or is of a later version.
    Damaged,
    /// Something else than a record of this program.
    Foreign,
}

impl Record {
    /// A name's longest beginning that a record has room for.
    pub fn fitting(host: &str) -> String {
        let mut end = host.len().min(HOST);
        while !host.is_char_boundary(end) {
            end -= 1;
        }
        host[..end].replace('\0', "?")
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        let host = Self::fitting(&self.host);
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.process.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.counter.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.incarnation);
        bytes[40..48].copy_from_slice(&self.since.to_le_bytes());
        bytes[48..48 + host.len()].copy_from_slice(host.as_bytes());
        let sum = crc32c::crc32c(&bytes[..80]);
        bytes[80..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

impl Content {
    /// What these bytes of a whole file are.
    pub fn of(bytes: &[u8]) -> Content {
        if bytes.iter().all(|byte| *byte == 0) {
            return Content::Empty;
        }
        if !bytes.starts_with(&MAGIC) {
            return Content::Foreign;
        }
        Self::decode(bytes).map_or(Content::Damaged, Content::Record)
    }

    fn decode(bytes: &[u8]) -> Option<Record> {
        let bytes: &[u8; RECORD] = bytes.try_into().ok()?;
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(number(at)) | u64::from(number(at + 4)) << 32;
        if number(8) != VERSION || number(80) != crc32c::crc32c(&bytes[..80]) {
            return None;
        }
        let host = &bytes[48..48 + HOST];
        let end = host.iter().position(|byte| *byte == 0).unwrap_or(HOST);
        let mut incarnation = [0; 16];
        incarnation.copy_from_slice(&bytes[24..40]);
        let host = std::str::from_utf8(&host[..end]).ok()?.to_owned();
        Some(Record { counter: long(16), incarnation, process: number(12), since: long(40), host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_has_the_documented_bytes() {
        let record = Record { counter: 0x0102, incarnation: [7; 16], process: 5, since: 9, host: "esx-a".into() };
        let mut expected = Vec::from(*b"VMFSNFSL\x01\0\0\0\x05\0\0\0\x02\x01\0\0\0\0\0\0");
        expected.extend([7; 16]);
        expected.extend(*b"\x09\0\0\0\0\0\0\0esx-a");
        expected.resize(80, 0);
        assert_eq!(record.encode()[..80], expected);
        // CRC-32C of the 80 bytes, by an independent bitwise computation.
        let mut crc = !0u32;
        for byte in expected {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 };
            }
        }
        assert_eq!(record.encode()[80..], (!crc).to_le_bytes());
    }

    #[test]
    fn contents_are_told_apart() {
        let record = Record { counter: 1, incarnation: [1; 16], process: 1, since: 1, host: "h".into() };
        let mut bytes = record.encode();
        assert_eq!(Content::of(&bytes), Content::Record(record));
        bytes[30] ^= 1;
        assert_eq!(Content::of(&bytes), Content::Damaged);
        assert_eq!(Content::of(&bytes[..40]), Content::Damaged);
        assert_eq!(Content::of(b""), Content::Empty);
        assert_eq!(Content::of(&[0; RECORD]), Content::Empty);
        assert_eq!(Content::of(b"esx-host.example.com"), Content::Foreign);
    }

    proptest! {
        #[test]
        fn records_are_read_back(counter: u64, incarnation: [u8; 16], process: u32, since: u64, host in "\\PC{0,40}") {
            let record = Record { counter, incarnation, process, since, host: Record::fitting(&host) };
            prop_assert_eq!(Content::of(&record.encode()), Content::Record(record));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), magic: bool) {
            let bytes = if magic { [&MAGIC[..], &bytes].concat() } else { bytes };
            let _ = Content::of(&bytes);
        }
    }
}
