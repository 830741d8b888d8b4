//! Owns the error type of building and running a machine.
//! Promises that each error names its object, its cause and the next step, in that order.
//! Must not know exit statuses or how errors are printed: that is the command's business.

use std::borrow::Cow;

/// What kind of trouble an [`Error`] reports; the edge maps it to an exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// `/dev/kvm` is absent or may not be opened, or KVM lacks a needed capability.
    Kvm,
    /// The kernel image cannot be read or booted.
    Image,
    /// Guest memory is too small, too large, or cannot be had.
    Memory,
    /// A disk cannot be opened, or another process holds it.
    Disk,
    /// The request is well formed but this version does not do it.
    Unsupported,
    /// The request itself is malformed.
    Usage,
    /// The host refused something else: a thread, an event descriptor, a file.
    Host,
}

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
#[error("{object}: {cause}{}{next}", if next.is_empty() { "" } else { ". " })]
pub struct Error {
    kind: Kind,
    object: String,
    cause: String,
    next: Cow<'static, str>,
}

/// The result of building or running a machine.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error about `object`, because of `cause`; `next` is a sentence that says what to do.
    pub fn new(
        kind: Kind,
        object: impl Into<String>,
        cause: impl std::fmt::Display,
        next: impl Into<Cow<'static, str>>,
    ) -> Error {
        Error { kind, object: object.into(), cause: cause.to_string(), next: next.into() }
    }

    /// An error whose `cause` says what to do already.
    pub(crate) fn complete(kind: Kind, object: impl Into<String>, cause: impl std::fmt::Display) -> Error {
        Error::new(kind, object, cause, "")
    }

    /// What kind of trouble this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// A KVM call that an ordinary KVM does not refuse: reported with the call's name.
    pub(crate) fn kvm(call: &'static str, cause: impl std::fmt::Display) -> Error {
        Error::new(
            Kind::Kvm,
            "/dev/kvm",
            format!("{call} failed: {cause}"),
            "Check the kernel log; the host needs a KVM with in-kernel interrupt controllers",
        )
    }

    /// A host resource that could not be had.
    pub(crate) fn host(object: impl Into<String>, cause: impl std::fmt::Display) -> Error {
        Error::new(Kind::Host, object, cause, "Check the limits on processes, threads and open files")
    }
}
