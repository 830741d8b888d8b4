//! Owns: the messages of the mount's Unix socket: JSON, one message a packet, descriptors beside them.
//! Promises: foreign bytes end in an error, never in a panic; every request has exactly one final answer, after any `Progress`.
//! Must not know: sockets, what a volume does with a request.
//!
//! The socket is a SOCK_SEQPACKET at `/run/vmfs/VOLUME/HOST.sock` (or `$XDG_RUNTIME_DIR/vmfs/...`, see [`crate::server`]). It answers
//! only root and the user that mounted. The first request of a connection is [`Request::Hello`].

use serde::{Deserialize, Serialize};

/// Version of these messages; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 3;

/// Names an open file or directory of the mount: 32 hex digits on the wire. Whoever has the file open learns it by ioctl.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub [u8; 16]);

impl Serialize for Ticket {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:032x}", u128::from_be_bytes(self.0)))
    }
}

impl<'de> Deserialize<'de> for Ticket {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let ok = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = if ok { u128::from_str_radix(&text, 16).ok() } else { None };
        let number = number.ok_or_else(|| serde::de::Error::custom("a ticket has 32 hexadecimal digits"))?;
        Ok(Ticket(number.to_be_bytes()))
    }
}

/// What a session with a LUN is opened by. It can hold the passwords of the storage, so it goes over the socket only and is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pass(pub String);

impl std::fmt::Debug for Pass {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("***")
    }
}

/// A name in a directory that the client has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameIn {
    /// The directory.
    pub directory: Ticket,
    /// The name's bytes.
    pub name: Vec<u8>,
}

/// Allocation policy of a virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskKind {
    /// Space at the first write.
    Thin,
    /// Space at creation, zeroed at the first write.
    ZeroedThick,
    /// Space at creation, zeroed at creation.
    EagerZeroedThick,
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// First request of a connection.
    Hello {
        /// [`PROTOCOL_VERSION`] of the client.
        version: u32,
    },
    /// The gate page and what the client needs to know for direct access to an open disk. The answer carries three descriptors: the
    /// gate page (read only), the revoke eventfd, and the recall eventfd, which is raised when [`Request::Recalled`] has a new answer.
    Attach {
        /// The open disk.
        ticket: Ticket,
    },
    /// Which range of the disk the mount wants back, to move its blocks. Until a range is given free, a client that has let go of it
    /// has nothing in flight there and begins nothing, and it forgets where the bytes lay.
    Recalled {
        /// The open disk.
        ticket: Ticket,
        /// Number of the recall whose range the client has let go of; 0: none.
        let_go: u64,
    },
    /// A data descriptor of a LUN, made for this client. The answer carries one descriptor.
    OpenLun {
        /// The open disk.
        ticket: Ticket,
        /// Index of the LUN.
        lun: u8,
    },
    /// What the client needs for a session of its own with a LUN that has no descriptor.
    OpenSession {
        /// The open disk.
        ticket: Ticket,
        /// Index of the LUN.
        lun: u8,
    },
    /// The session is made, and registered under the mount's key. No data go over it before the answer, which says that the mount lived
    /// after that.
    ConfirmSession {
        /// The open disk.
        ticket: Ticket,
        /// Index of the LUN.
        lun: u8,
        /// Number of the session, of the answer to `OpenSession`.
        session: u64,
        /// Where it leads, as the storage says.
        place: Option<String>,
    },
    /// An administrative request.
    Administer {
        /// Which.
        what: AdminRequest,
    },
}

/// What an administrator asks a mounted volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "admin", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AdminRequest {
    /// State of volume, LUNs and hosts.
    Status,
    /// Who holds the lock of a file.
    WhyLocked {
        /// The file.
        file: NameIn,
    },
    /// Takes a lock out of the hands of a host that is gone.
    LockBreak {
        /// The file.
        file: NameIn,
        /// Name or UUID of the holder, which the administrator has made sure is down: its lease is not waited for.
        host_is_down: Option<String>,
    },
    /// Makes a virtual disk: descriptor `X.vmdk` and data `X-flat.vmdk`.
    DiskCreate {
        /// The descriptor.
        file: NameIn,
        /// Size in bytes, a multiple of 512.
        bytes: u64,
        /// Policy.
        kind: DiskKind,
    },
    /// What a virtual disk is.
    DiskInfo {
        /// The descriptor.
        file: NameIn,
    },
    /// Makes a virtual disk larger.
    DiskExtend {
        /// The descriptor.
        file: NameIn,
        /// New size in bytes.
        bytes: u64,
    },
    /// Makes an eager-zeroed thick disk of a thin or zeroed thick one.
    DiskInflate {
        /// The descriptor.
        file: NameIn,
    },
    /// Copies a virtual disk.
    DiskClone {
        /// Descriptor of the source.
        source: NameIn,
        /// Descriptor of the copy.
        destination: NameIn,
        /// Policy of the copy; `None`: as the source.
        kind: Option<DiskKind>,
    },
    /// Formats a LUN and makes it a member of the volume.
    ExtentAdd {
        /// Its absolute path.
        lun: String,
        /// Overwrite what it holds.
        force: bool,
    },
    /// Takes the space that a member LUN has gained into the volume.
    ExtentGrow {
        /// Its path, or `lunN`.
        lun: String,
    },
    /// Moves what lies on a member LUN to the others.
    ExtentDrain {
        /// Its path, or `lunN`.
        lun: String,
        /// Give it up instead, on whatever host it goes on.
        cancel: bool,
    },
    /// Takes an emptied member LUN out of the volume.
    ExtentRemove {
        /// Its path, or `lunN`.
        lun: String,
    },
    /// Makes a raw device mapping: descriptor `X.vmdk` and mapping `X-rdm.vmdk` or `X-rdmp.vmdk`.
    RdmCreate {
        /// The descriptor.
        file: NameIn,
        /// Absolute path of the device or image file, as this host knows it.
        device: String,
        /// Physical compatibility.
        physical: bool,
    },
    /// What a raw device mapping is, and where its device is now.
    RdmInfo {
        /// The descriptor.
        file: NameIn,
    },
    /// Looks through the volume for damage. Progress counts bytes.
    Scrub {
        /// Read the data of files too.
        data: bool,
        /// Most bytes read in a second; `None`: as fast as it goes.
        bytes_per_second: Option<u64>,
    },
    /// An object's structures in words.
    Dump {
        /// The file.
        file: NameIn,
    },
}

/// A LUN as a client may use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LunAccess {
    /// Index in the volume.
    pub index: u8,
    /// Generation of the host's slot there when the file was opened: what the gate is asked with. 0: no slot (read-only mount).
    pub generation: u64,
    /// Alignment of offset, length and memory of direct I/O, in bytes.
    pub alignment: u32,
    /// The LUN has a descriptor to pass.
    pub has_descriptor: bool,
    /// The LUN is reached by a session of the client's own.
    pub has_session: bool,
    /// Path or URL as given to mount, for messages.
    pub name: String,
}

/// What a client needs for direct access to an open disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// LUN whose lease vouches for the disk's lock.
    pub lock_lun: u8,
    /// Every active LUN.
    pub luns: Vec<LunAccess>,
}

/// A range of a disk that the mount wants back for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recall {
    /// Names it, never 0.
    pub number: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// What the mount answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// To `Hello`.
    Welcome {
        /// [`PROTOCOL_VERSION`] of the mount.
        version: u32,
        /// Volume UUID.
        volume: String,
        /// Host UUID.
        host: String,
    },
    /// To `Attach`.
    Attached {
        /// What was asked for.
        attachment: Attachment,
    },
    /// To `OpenLun`.
    LunOpened,
    /// To `OpenSession`.
    SessionOpened {
        /// Names it.
        session: u64,
        /// For `luns::Session::open`.
        pass: Pass,
    },
    /// To `ConfirmSession`.
    SessionConfirmed,
    /// To `Recalled`.
    Recalled {
        /// What is wanted now; `None`: nothing, every range is free.
        recall: Option<Recall>,
    },
    /// On the way to an administrative answer.
    Progress {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// To an administrative request: a JSON value whose shape `docs/` of the command describes.
    Done {
        /// The facts.
        value: serde_json::Value,
    },
    /// The request was refused or failed.
    Refused {
        /// errno(3).
        errno: i32,
        /// Object, cause, next step.
        message: String,
    },
}

/// The bytes of a message.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages have string keys only")
}

/// The message in `bytes`.
pub fn decode<'de, M: Deserialize<'de>>(bytes: &'de [u8]) -> Result<M, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("a message that makes no sense: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_has_the_form_that_is_documented() {
        let ticket = Ticket([0xab; 16]);
        let text = String::from_utf8(encode(&Request::OpenLun { ticket, lun: 2 })).unwrap();
        assert_eq!(text, format!(r#"{{"request":"open-lun","ticket":"{}","lun":2}}"#, "ab".repeat(16)));
        assert_eq!(decode::<Request>(text.as_bytes()), Ok(Request::OpenLun { ticket, lun: 2 }));
        assert!(decode::<Request>(br#"{"request":"open-lun","ticket":"xy","lun":2}"#).is_err());
        assert!(decode::<Request>(br#"{"request":"hello","version":1,"more":1}"#).is_err());
        let answer = Answer::SessionOpened { session: 5, pass: Pass("secret".to_owned()) };
        assert_eq!(decode::<Answer>(&encode(&answer)), Ok(answer.clone()));
        assert!(!format!("{answer:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Answer>(&bytes);
        }

        #[test]
        fn names_of_any_bytes_survive(name: Vec<u8>, ticket: [u8; 16]) {
            let what = AdminRequest::Dump { file: NameIn { directory: Ticket(ticket), name } };
            let request = Request::Administer { what };
            prop_assert_eq!(decode::<Request>(&encode(&request)).unwrap(), request);
        }
    }
}
