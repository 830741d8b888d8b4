//! Owns: the statuses of NFSv4.1 (RFC 8881, 15.1) that decide what is done next. Must not know: calls.

use crate::error::Status;

/// NFS4ERR_EXPIRED.
const EXPIRED: Status = Status(10011);
/// NFS4ERR_GRACE.
const GRACE: Status = Status(10013);
/// NFS4ERR_STALE_STATEID.
const STALE_STATEID: Status = Status(10023);
/// NFS4ERR_OLD_STATEID.
const OLD_STATEID: Status = Status(10024);
/// NFS4ERR_BAD_STATEID.
const BAD_STATEID: Status = Status(10025);
/// NFS4ERR_ADMIN_REVOKED.
const ADMIN_REVOKED: Status = Status(10047);
/// NFS4ERR_BADSESSION.
const BAD_SESSION: Status = Status(10052);
/// NFS4ERR_BADSLOT.
const BAD_SLOT: Status = Status(10053);
/// NFS4ERR_SEQ_FALSE_RETRY.
const SEQ_FALSE_RETRY: Status = Status(10076);
/// NFS4ERR_BAD_HIGH_SLOT.
const BAD_HIGH_SLOT: Status = Status(10077);
/// NFS4ERR_DEADSESSION.
const DEAD_SESSION: Status = Status(10078);
/// NFS4ERR_SHARE_DENIED: somebody has it open in a way that forbids this.
pub(super) const SHARE_DENIED: Status = Status(10015);
/// NFS4ERR_STALE_CLIENTID: the server does not know the client any more.
pub(super) const STALE_CLIENT: Status = Status(10022);
/// NFS4ERR_COMPLETE_ALREADY.
pub(super) const COMPLETE_ALREADY: Status = Status(10054);
/// NFS4ERR_CONN_NOT_BOUND_TO_SESSION.
pub(super) const NOT_BOUND: Status = Status(10055);
/// NFS4ERR_SEQ_MISORDERED.
pub(super) const SEQ_MISORDERED: Status = Status(10063);
/// NFS4ERR_RETRY_UNCACHED_REP: it was done, its reply was not kept.
pub(super) const UNCACHED: Status = Status(10068);

/// What a status asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The same again later.
    Busy,
    /// Another session.
    Session,
    /// Another state: the open file that the request belongs to is none any more.
    State,
    /// Another slot.
    Slot,
    /// It is the answer.
    Final,
}

/// Judges a status.
pub(super) fn judge(status: Status) -> Verdict {
    match status {
        Status::JUKEBOX | GRACE => Verdict::Busy,
        BAD_SESSION | DEAD_SESSION => Verdict::Session,
        EXPIRED | STALE_STATEID | OLD_STATEID | BAD_STATEID | ADMIN_REVOKED => Verdict::State,
        BAD_SLOT | SEQ_FALSE_RETRY | BAD_HIGH_SLOT | SEQ_MISORDERED => Verdict::Slot,
        _ => Verdict::Final,
    }
}

/// A session that has ended, as an error.
pub(super) fn dead_session() -> Status {
    DEAD_SESSION
}
