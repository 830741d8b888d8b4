//! Owns: stateids (RFC 8881, 8.2), and OPEN's arguments and results. Must not know: sessions.

use super::attributes::{Mask, skip_mask};
use crate::nfs3::{FileHandle, Verifier};
use crate::xdr::{Reader, Writer, XdrError};

/// OPEN4_SHARE_ACCESS_WRITE.
pub(super) const ACCESS_WRITE: u32 = 2;
/// OPEN4_SHARE_ACCESS_BOTH.
pub(super) const ACCESS_BOTH: u32 = 3;
/// OPEN4_SHARE_ACCESS_WANT_NO_DELEG.
const WANT_NO_DELEGATION: u32 = 0x0400;
/// OPEN4_SHARE_DENY_NONE.
pub(super) const DENY_NONE: u32 = 0;
/// OPEN4_SHARE_DENY_WRITE.
pub(super) const DENY_WRITE: u32 = 2;
const MODE: u32 = 0o644;
/// Longest name of a person in an access control entry that is passed over.
const MAX_WHO: usize = 1024;

/// What the server knows an open file of a client by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateId {
    /// Version; 0: the current one.
    pub sequence: u32,
    /// The state.
    pub other: [u8; 12],
}

impl StateId {
    /// Of nobody: the special stateid of zeros (8.2.3).
    pub const ANONYMOUS: StateId = StateId { sequence: 0, other: [0; 12] };

    /// The same state, whatever its version is.
    pub fn current(self) -> Self {
        Self { sequence: 0, ..self }
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self { sequence: reader.u32()?, other: reader.array()? })
    }

    pub(super) fn write(&self, to: &mut Vec<u8>) {
        to.put_u32(self.sequence);
        to.extend_from_slice(&self.other);
    }
}

/// What OPEN is to open.
#[derive(Clone, Copy, Debug)]
pub(super) enum Claim<'a> {
    /// A file that is there (CLAIM_FH).
    File(&'a FileHandle),
    /// A file that was open before the server was started again (CLAIM_PREVIOUS).
    Previous(&'a FileHandle),
    /// A name of a directory; the file is made if there is none (UNCHECKED4).
    Name(&'a FileHandle, &'a str),
    /// A name of a directory; it must be new, or have been made with the same verifier (EXCLUSIVE4_1).
    New(&'a FileHandle, &'a str, Verifier),
}

/// An OPEN.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open<'a> {
    pub client: u64,
    pub owner: &'a [u8],
    pub access: u32,
    pub deny: u32,
    pub claim: Claim<'a>,
}

impl Open<'_> {
    /// The handle that is the current one before it.
    pub fn handle(&self) -> &FileHandle {
        match self.claim {
            Claim::File(handle) | Claim::Previous(handle) | Claim::Name(handle, _) | Claim::New(handle, ..) => handle,
        }
    }

    /// OPEN4args.
    pub fn write(&self, to: &mut Vec<u8>) {
        const CREATE: u32 = 1;
        for word in [0, self.access | WANT_NO_DELEGATION, self.deny] {
            to.put_u32(word);
        }
        to.put_u64(self.client);
        to.put_opaque(self.owner);
        let attributes = |to: &mut Vec<u8>| {
            Mask::of(&[super::attributes::MODE]).write(to);
            to.put_opaque(&MODE.to_be_bytes());
        };
        match self.claim {
            Claim::File(_) => [0, 4].iter().for_each(|word| to.put_u32(*word)),
            Claim::Previous(_) => [0, 1, 0].iter().for_each(|word| to.put_u32(*word)),
            Claim::Name(_, name) => {
                [CREATE, 0].iter().for_each(|word| to.put_u32(*word));
                attributes(to);
                to.put_u32(0);
                to.put_opaque(name.as_bytes());
            }
            Claim::New(_, name, verifier) => {
                [CREATE, 3].iter().for_each(|word| to.put_u32(*word));
                to.extend_from_slice(&verifier);
                attributes(to);
                to.put_u32(0);
                to.put_opaque(name.as_bytes());
            }
        }
    }
}

/// OPEN4resok: the state. A delegation, which nobody asked for, is an error.
pub(super) fn read_opened(reader: &mut Reader<'_>) -> Result<StateId, XdrError> {
    let state = StateId::read(reader)?;
    skip_change(reader)?;
    let _flags = reader.u32()?;
    skip_mask(reader)?;
    match reader.u32()? {
        0 => {}
        3 => {
            // OPEN_DELEGATE_NONE_EXT: two of the reasons come with a boolean.
            if matches!(reader.u32()?, 1 | 2) {
                reader.bool()?;
            }
        }
        delegation @ 1..=2 => {
            StateId::read(reader)?;
            reader.bool()?;
            reader.opaque(MAX_WHO)?;
            return Err(XdrError::Value(delegation));
        }
        other => return Err(XdrError::Value(other)),
    }
    Ok(state)
}

/// change_info4.
pub(super) fn skip_change(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    reader.bool()?;
    reader.u64()?;
    reader.u64().map(drop)
}
