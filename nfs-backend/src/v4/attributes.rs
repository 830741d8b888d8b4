//! Owns: attributes of NFSv4.1 (RFC 8881, 5): which are asked for, and their values.
//! Promises: foreign bytes give an error, never a panic. Must not know: calls.

use crate::nfs3::{Attributes, FileKind, Time};
use crate::xdr::{Reader, Writer, XdrError};

const TYPE: u32 = 1;
pub(super) const SIZE: u32 = 4;
const FSID: u32 = 8;
const LEASE_TIME: u32 = 10;
const FILEID: u32 = 20;
const MAX_READ: u32 = 30;
const MAX_WRITE: u32 = 31;
pub(super) const MODE: u32 = 33;
const LINKS: u32 = 35;
const OWNER: u32 = 36;
const OWNER_GROUP: u32 = 37;
const SPACE_AVAILABLE: u32 = 42;
const SPACE_FREE: u32 = 43;
const SPACE_TOTAL: u32 = 44;
const SPACE_USED: u32 = 45;
const TIME_ACCESS: u32 = 47;
const TIME_METADATA: u32 = 52;
const TIME_MODIFY: u32 = 53;
/// Words of a mask that attributes are known of.
const WORDS: usize = 2;
/// Longest text of an owner.
const MAX_OWNER: usize = 1024;
/// Longest attribute list.
const MAX_LIST: usize = 8 << 10;

/// What a file's attributes are asked by.
pub(super) const OF_FILE: Mask = Mask::of(&[
    TYPE,
    SIZE,
    FSID,
    FILEID,
    MODE,
    LINKS,
    OWNER,
    OWNER_GROUP,
    SPACE_USED,
    TIME_ACCESS,
    TIME_METADATA,
    TIME_MODIFY,
]);
/// Limits of the server.
pub(super) const OF_SERVER: Mask = Mask::of(&[LEASE_TIME, MAX_READ, MAX_WRITE]);
/// Space of the file system.
pub(super) const OF_SPACE: Mask = Mask::of(&[SPACE_AVAILABLE, SPACE_FREE, SPACE_TOTAL]);

/// A set of attributes (bitmap4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mask([u32; WORDS]);

impl Mask {
    pub const fn of(attributes: &[u32]) -> Mask {
        let mut words = [0; WORDS];
        let mut nth = 0;
        while nth < attributes.len() {
            words[attributes[nth] as usize / 32] |= 1 << (attributes[nth] % 32);
            nth += 1;
        }
        Mask(words)
    }

    pub fn write(&self, to: &mut Vec<u8>) {
        to.put_u32(WORDS as u32);
        self.0.iter().for_each(|word| to.put_u32(*word));
    }

    fn has(&self, attribute: u32) -> bool {
        self.0[attribute as usize / 32] & 1 << (attribute % 32) != 0
    }

    fn read(reader: &mut Reader<'_>) -> Result<Mask, XdrError> {
        let mut words = [0; WORDS];
        let count = reader.u32()?;
        if count > 8 {
            return Err(XdrError::TooLong(count, 8));
        }
        for nth in 0..count as usize {
            let word = reader.u32()?;
            match words.get_mut(nth) {
                Some(known) => *known = word,
                None if word == 0 => {}
                None => return Err(XdrError::Value(word)),
            }
        }
        Ok(Mask(words))
    }
}

/// Passes over a mask.
pub(super) fn skip_mask(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    Mask::read(reader).map(drop)
}

/// The values that a server has given, whichever were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Values {
    pub kind: Option<u32>,
    pub size: Option<u64>,
    pub fsid: u64,
    pub lease: Option<u32>,
    pub fileid: Option<u64>,
    pub most_read: Option<u64>,
    pub most_write: Option<u64>,
    pub mode: u32,
    pub links: u32,
    pub owner: Option<u32>,
    pub group: Option<u32>,
    pub available: u64,
    pub free: u64,
    pub total: u64,
    pub used: Option<u64>,
    pub accessed: Time,
    pub changed: Time,
    pub modified: Time,
}

/// Numbers of users come as text; a name has none here.
fn read_id(reader: &mut Reader<'_>) -> Result<Option<u32>, XdrError> {
    Ok(reader.text(MAX_OWNER)?.parse().ok())
}

fn read_time(reader: &mut Reader<'_>) -> Result<Time, XdrError> {
    let (seconds, nanoseconds) = (reader.u64()?, reader.u32()?);
    Ok(Time { seconds: seconds as u32, nanoseconds })
}

impl Values {
    /// fattr4, of which nothing may have been given that is not in `asked`.
    pub fn read(reader: &mut Reader<'_>, asked: Mask) -> Result<Values, XdrError> {
        let mask = Mask::read(reader)?;
        if let Some(word) = mask.0.iter().zip(asked.0).map(|(given, asked)| given & !asked).find(|word| *word != 0) {
            return Err(XdrError::Value(word));
        }
        let mut list = Reader::new(reader.opaque(MAX_LIST)?);
        let mut values = Values::default();
        for attribute in (0..32 * WORDS as u32).filter(|attribute| mask.has(*attribute)) {
            let list = &mut list;
            match attribute {
                TYPE => values.kind = Some(list.u32()?),
                SIZE => values.size = Some(list.u64()?),
                FSID => values.fsid = list.u64()? ^ list.u64()?.rotate_left(32),
                LEASE_TIME => values.lease = Some(list.u32()?),
                FILEID => values.fileid = Some(list.u64()?),
                MAX_READ => values.most_read = Some(list.u64()?),
                MAX_WRITE => values.most_write = Some(list.u64()?),
                MODE => values.mode = list.u32()?,
                LINKS => values.links = list.u32()?,
                OWNER => values.owner = read_id(list)?,
                OWNER_GROUP => values.group = read_id(list)?,
                SPACE_AVAILABLE => values.available = list.u64()?,
                SPACE_FREE => values.free = list.u64()?,
                SPACE_TOTAL => values.total = list.u64()?,
                SPACE_USED => values.used = Some(list.u64()?),
                TIME_ACCESS => values.accessed = read_time(list)?,
                TIME_METADATA => values.changed = read_time(list)?,
                TIME_MODIFY => values.modified = read_time(list)?,
                other => return Err(XdrError::Value(other)),
            }
        }
        match list.rest().is_empty() {
            true => Ok(values),
            false => Err(XdrError::Value(list.rest().len() as u32)),
        }
    }

    /// The attributes of a file: kind, size and number have to be there.
    pub fn of_file(&self) -> Result<Attributes, XdrError> {
        let (Some(kind), Some(size), Some(fileid)) = (self.kind, self.size, self.fileid) else {
            return Err(XdrError::Short);
        };
        let kind = match kind {
            1 => FileKind::Regular,
            2 => FileKind::Directory,
            3..=9 => FileKind::Other,
            other => return Err(XdrError::Value(other)),
        };
        Ok(Attributes {
            kind,
            mode: self.mode,
            links: self.links,
            uid: self.owner.unwrap_or(u32::MAX),
            gid: self.group.unwrap_or(u32::MAX),
            size,
            used: self.used.unwrap_or(size),
            fsid: self.fsid,
            fileid,
            accessed: self.accessed,
            modified: self.modified,
            changed: self.changed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_have_the_bytes_of_the_standard() {
        // type, size, fileid; 1 << 1 | 1 << 4 | 1 << 20.
        let bytes = [
            [0, 0, 0, 1, 0, 0x10, 0, 0x12, 0, 0, 0, 20].as_slice(),
            &[0, 0, 0, 1],
            &[0, 0, 0, 0, 0, 0, 2, 0],
            &[0, 0, 0, 0, 0, 0, 0, 9],
        ]
        .concat();
        let values = Values::read(&mut Reader::new(&bytes), OF_FILE).expect("whole");
        let attributes = values.of_file().expect("all that is needed");
        assert_eq!((attributes.kind, attributes.size, attributes.fileid), (FileKind::Regular, 512, 9));
        assert_eq!(Values::read(&mut Reader::new(&bytes), OF_SPACE), Err(XdrError::Value(0x0010_0012)));
        let mut mask = Vec::new();
        Mask::of(&[MODE]).write(&mut mask);
        assert_eq!(mask, [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), known: bool) {
            let likely = [&[0, 0, 0, 2, 0, 0x10, 1, 0x12, 0, 0x30, 0x20, 0x3A, 0, 0, 0, 100][..], &bytes].concat();
            let bytes = if known { &likely } else { &bytes };
            for asked in [OF_FILE, OF_SERVER, OF_SPACE] {
                if let Ok(values) = Values::read(&mut Reader::new(bytes), asked) {
                    let _ = values.of_file();
                }
            }
        }
    }
}
