//! Owns: the messages of ONC RPC version 2 (RFC 5531): headers of calls, what a reply says before its results.
//! Promises: foreign bytes give a typed error. Must not know: sockets, programs.

use crate::xdr::{Reader, Writer, XdrError, padding};

/// Longest body of a verifier (RFC 5531, 8.2).
const MAX_AUTH: usize = 400;
const CALL: u32 = 0;
const REPLY: u32 = 1;
const RPC_VERSION: u32 = 2;
const AUTH_NONE: u32 = 0;
const AUTH_SYS: u32 = 1;

/// A remote procedure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Procedure {
    /// Program number.
    pub program: u32,
    /// Version of the program.
    pub version: u32,
    /// Procedure number.
    pub number: u32,
    /// Name for messages.
    pub name: &'static str,
}

/// Who calls: AUTH_SYS (RFC 5531, appendix A).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credential {
    /// Name of the machine, at most 255 bytes.
    pub machine: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Credential {
    /// This process, on this machine.
    pub fn of_this_process() -> Self {
        let machine = rustix::system::uname().nodename().to_string_lossy().chars().take(63).collect();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { machine, uid, gid }
    }

    /// The credential's body: stamp, machine, uid, gid, no further groups.
    pub fn encoded(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.put_u32(0);
        body.put_opaque(self.machine.as_bytes());
        body.put_u32(self.uid);
        body.put_u32(self.gid);
        body.put_u32(0);
        body
    }
}

/// Writes a call's record mark (to be completed by [`finish_record`]) and header. `credential` is an encoded body.
pub fn begin_call(record: &mut Vec<u8>, xid: u32, procedure: Procedure, credential: &[u8]) {
    record.clear();
    record.put_u32(0);
    record.put_u32(xid);
    for word in [CALL, RPC_VERSION, procedure.program, procedure.version, procedure.number, AUTH_SYS] {
        record.put_u32(word);
    }
    record.put_opaque(credential);
    record.put_u32(AUTH_NONE);
    record.put_u32(0);
}

/// Completes the record mark (RFC 5531, 11): one last fragment of all that follows it, and of `attached` bytes more with their padding.
pub fn finish_record(record: &mut [u8], attached: usize) {
    let mark = 0x8000_0000 | (record.len() - 4 + attached + padding(attached)) as u32;
    record[..4].copy_from_slice(&mark.to_be_bytes());
}

/// What the RPC layer says of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was carried out: so many bytes of the message come before the results.
    Accepted(usize),
    /// It was not.
    Denied(&'static str),
}

/// The transaction that a message belongs to, if it is a reply.
pub fn xid_of(message: &[u8]) -> Result<u32, XdrError> {
    let mut reader = Reader::new(message);
    let xid = reader.u32()?;
    match reader.u32()? {
        REPLY => Ok(xid),
        other => Err(XdrError::Value(other)),
    }
}

/// Reads the header of a reply.
pub fn verdict(message: &[u8]) -> Result<Verdict, XdrError> {
    let mut reader = Reader::new(message);
    let (_xid, kind) = (reader.u32()?, reader.u32()?);
    if kind != REPLY {
        return Err(XdrError::Value(kind));
    }
    match reader.u32()? {
        0 => {
            let _flavor = reader.u32()?;
            reader.opaque(MAX_AUTH)?;
            Ok(match reader.u32()? {
                0 => Verdict::Accepted(message.len() - reader.rest().len()),
                1 => Verdict::Denied("it does not have this program"),
                2 => Verdict::Denied("it does not have this version of the program"),
                3 => Verdict::Denied("it does not have this procedure"),
                4 => Verdict::Denied("it cannot read the arguments"),
                5 => Verdict::Denied("it has an error of its own"),
                other => return Err(XdrError::Value(other)),
            })
        }
        1 => Ok(match reader.u32()? {
            0 => Verdict::Denied("it does not speak RPC version 2"),
            1 => Verdict::Denied(match reader.u32()? {
                5 => "it wants a stronger authentication than AUTH_SYS",
                _ => "it does not accept the credential",
            }),
            other => return Err(XdrError::Value(other)),
        }),
        other => Err(XdrError::Value(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_call_has_the_bytes_of_the_standard() {
        let credential = Credential { machine: "m".into(), uid: 1, gid: 2 }.encoded();
        let mut record = vec![9];
        begin_call(&mut record, 7, Procedure { program: 100_003, version: 3, number: 0, name: "NULL" }, &credential);
        finish_record(&mut record, 0);
        #[rustfmt::skip]
        assert_eq!(record, [
            0x80, 0, 0, 64, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0x86, 0xA3, 0, 0, 0, 3, 0, 0, 0, 0,
            0, 0, 0, 1, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 1, b'm', 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0,
        ]);
    }

    #[test]
    fn replies_are_told_apart() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
        assert_eq!(verdict(&words(&[7, 1, 0, 0, 0, 0, 42])), Ok(Verdict::Accepted(24)));
        assert!(matches!(verdict(&words(&[7, 1, 0, 0, 0, 3])), Ok(Verdict::Denied(_))));
        assert!(matches!(verdict(&words(&[7, 1, 1, 1, 5])), Ok(Verdict::Denied(_))));
        assert_eq!(verdict(&words(&[7, 0])), Err(XdrError::Value(0)));
        assert_eq!(verdict(&words(&[7, 1, 0, 0, 401])), Err(XdrError::TooLong(401, 400)));
        assert_eq!(xid_of(&words(&[7, 1])), Ok(7));
    }

    proptest! {
        #[test]
        fn no_reply_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0u32..2, state in 0u32..3) {
            let _ = verdict(&bytes);
            let mut likely = [1u32, kind, state].map(u32::to_be_bytes).concat();
            likely.extend(&bytes);
            if let Ok(Verdict::Accepted(at)) = verdict(&likely) {
                prop_assert!(at <= likely.len());
            }
        }
    }
}
