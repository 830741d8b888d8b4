//! Owns: the facts about a mounted volume as JSON, for the administrator's command.
//! Promises: the shapes below stay as they are; numbers are in bytes, times in seconds since 1970 or as named.
//! Must not know: how the facts are found.

use serde_json::{Value, json};
use vmfs_core::lun::Reservation;
use vmfs_core::volume::{
    Affected, BrokenLock, HostStatus, LunStatus, MissingLun, ScrubReport, Takeover, VolumeStatus, WhyLocked,
};

/// Characters of a text of a scrub's report.
const LONGEST_TEXT: usize = 160;

/// `vmfs status`.
pub fn status(status: &VolumeStatus, open_files: usize) -> Value {
    json!({
        "volume": status.info.uuid.to_string(),
        "label": status.info.label,
        "block_bytes": status.info.block_size.bytes(),
        "cell_bytes": status.info.cell_size.bytes(),
        "lock_mode": format!("{:?}", status.info.lock_mode),
        "read_only": status.info.read_only,
        "lease_ms": status.info.lease.lease_ms,
        "renew_ms": status.info.lease.renew_ms,
        "margin_ms": status.info.lease.margin_ms,
        "open_files": open_files,
        "fenced": status.fenced,
        "slots_kept_by": status.keeper,
        "unfinished": status.unfinished,
        "takeovers": status.takeovers.iter().map(takeover).collect::<Vec<_>>(),
        "warnings": status.warnings,
        "luns": status.luns.iter().map(lun).collect::<Vec<_>>(),
        "missing": status.missing.iter().map(missing).collect::<Vec<_>>(),
        "affected": affected(&status.affected),
    })
}

fn missing(lun: &MissingLun) -> Value {
    json!({ "index": lun.index.get(), "uuid": lun.uuid.to_string(), "bytes": lun.bytes, "identity": lun.identity })
}

/// What lost LUNs hurt. A path that is not valid UTF-8 has its other bytes escaped.
pub fn affected(affected: &Affected) -> Value {
    let objects = affected.objects.iter().map(|object| {
        json!({
            "fd": object.fd.to_string(),
            "type": object.object_type.map(|of| format!("{of:?}")),
            "lost": format!("{:?}", object.part),
            "path": object.path.as_ref().map(|path| shown(path)),
        })
    });
    json!({
        "luns": affected.luns.iter().map(|lun| lun.get()).collect::<Vec<_>>(),
        "objects": objects.collect::<Vec<_>>(),
        "cut": affected.cut,
    })
}

fn shown(path: &[u8]) -> String {
    std::str::from_utf8(path).map_or_else(|_| path.escape_ascii().to_string(), str::to_owned)
}

fn lun(lun: &LunStatus) -> Value {
    json!({
        "index": lun.info.index.get(),
        "name": lun.info.name,
        "uuid": lun.info.uuid.to_string(),
        "bytes": lun.info.bytes,
        "state": format!("{:?}", lun.info.state),
        "slot": lun.info.slot.map(|slot| slot.to_string()),
        "total_blocks": lun.total_blocks,
        "free_blocks": lun.free_blocks,
        "lease_left_ms": lun.lease_left_ms,
        "error": lun.error,
        "lost": lun.lost,
        "reservation": lun.reservation.as_ref().map(reservation),
        "hosts": lun.hosts.iter().map(host).collect::<Vec<_>>(),
    })
}

fn reservation(seen: &Reservation) -> Value {
    json!({
        "type": seen.kind,
        "keeps_out": seen.keeps_out(),
        "own_key": key(seen.own),
        "keys": seen.keys.iter().map(|registered| key(*registered)).collect::<Vec<_>>(),
        "persists": seen.persists,
    })
}

/// As text: a number of JSON need not keep 64 bits.
fn key(key: u64) -> Option<String> {
    (key != 0).then(|| format!("{key:#018x}"))
}

fn takeover(takeover: &Takeover) -> Value {
    json!({
        "lun": takeover.lun.get(),
        "slot": takeover.slot.to_string(),
        "host": takeover.host.to_string(),
        "name": takeover.name,
        "fence_grade": format!("{:?}", takeover.grade),
        "attested": takeover.attested,
    })
}

/// `vmfs scrub`. Texts are cut, so that the longest report fits a message.
pub fn scrub(report: &ScrubReport) -> Value {
    let cut = |text: &str| text.chars().take(LONGEST_TEXT).collect::<String>();
    let findings = report.findings.iter().map(|finding| {
        json!({
            "structure": finding.structure.name(),
            "at": cut(&finding.at),
            "object": finding.object.map(|fd| fd.to_string()),
            "path": finding.path.as_ref().map(|path| cut(&shown(path))),
            "what": cut(&finding.what),
        })
    });
    json!({
        "clean": report.is_clean(),
        "found": report.found,
        "findings": findings.collect::<Vec<_>>(),
        "objects": report.objects,
        "unsettled": report.unsettled,
        "bytes": report.bytes,
        "lost": report.lost.iter().map(|lun| lun.get()).collect::<Vec<_>>(),
    })
}

/// `vmfs lock break`.
pub fn broken_lock(broken: &BrokenLock) -> Value {
    json!({
        "holders": broken.holders.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "takeovers": broken.takeovers.iter().map(takeover).collect::<Vec<_>>(),
    })
}

fn host(host: &HostStatus) -> Value {
    json!({
        "slot": host.slot.to_string(),
        "state": format!("{:?}", host.state),
        "host": host.host.to_string(),
        "name": host.name,
        "incarnation": format!("{:016x}", host.incarnation),
        "beat": host.beat,
        "beat_age_ms": host.beat_age_ms,
        "live_since_s": host.live_since_s,
        "fence_grade": format!("{:?}", host.fence_grade),
        "reservation_key": key(host.reservation_key),
        "registered_paths": host.registered_paths,
        "lease_ms": host.lease.lease_ms,
        "own": host.own,
        "former_self": host.former_self,
    })
}

/// `vmfs why-locked`. `programs` has this host's programs that have the file open, as text.
pub fn why_locked(why: &WhyLocked, explanation: &str) -> Value {
    let holders = why.holders.iter().map(|holder| {
        json!({
            "slot": holder.slot.to_string(),
            "incarnation": format!("{:016x}", holder.incarnation),
            "own": holder.own,
            "counts": holder.counts,
            "host": holder.host.as_ref().map(host),
        })
    });
    json!({
        "object": why.object.fd.to_string(),
        "mode": format!("{:?}", why.mode),
        "wanted": why.wanted,
        "holders": holders.collect::<Vec<_>>(),
        "explanation": explanation,
    })
}
