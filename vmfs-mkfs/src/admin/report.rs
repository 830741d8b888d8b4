//! Owns: the facts about a volume, whoever found them out, and how they are printed.
//! Promises: the JSON of a mounted and of an unmounted volume has the same shape.
//! Must not know: where the facts come from.

use serde::{Deserialize, Serialize};
use vmfs_core::volume::{Affected as CoreAffected, HostStatus, LunStatus, MissingLun, VolumeStatus};

use super::lock::show_takeover;
use crate::size;
use crate::terminal::say;

/// A host in its slot on one LUN.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Host {
    pub slot: String,
    pub state: String,
    pub host: String,
    pub name: String,
    pub incarnation: String,
    pub beat: u64,
    pub beat_age_ms: u64,
    pub live_since_s: u64,
    pub fence_grade: String,
    pub reservation_key: Option<String>,
    pub registered_paths: u32,
    pub lease_ms: u32,
    pub own: bool,
    pub former_self: bool,
}

/// One member LUN.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Lun {
    pub index: u8,
    pub name: String,
    pub uuid: String,
    pub bytes: u64,
    pub state: String,
    pub slot: Option<String>,
    pub total_blocks: u64,
    pub free_blocks: u64,
    pub lease_left_ms: u64,
    pub error: Option<String>,
    pub lost: bool,
    pub reservation: Option<Reservation>,
    pub hosts: Vec<Host>,
}

/// A LUN's persistent reservation.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Reservation {
    #[serde(rename = "type")]
    pub kind: Option<u8>,
    pub keeps_out: bool,
    pub own_key: Option<String>,
    pub keys: Vec<String>,
    pub persists: bool,
}

/// A member that is not there.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Missing {
    pub index: u8,
    pub uuid: String,
    pub bytes: u64,
    pub identity: String,
}

/// An object that a lost LUN hurts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct AffectedObject {
    pub fd: String,
    #[serde(rename = "type")]
    pub object_type: Option<String>,
    pub lost: String,
    pub path: Option<String>,
}

/// What lost LUNs hurt.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Affected {
    pub luns: Vec<u8>,
    pub objects: Vec<AffectedObject>,
    pub cut: bool,
}

/// A volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Volume {
    /// Where it is mounted; `None`: the LUNs were read without a mount.
    pub mount: Option<String>,
    pub volume: String,
    pub label: String,
    pub block_bytes: u64,
    pub cell_bytes: u64,
    pub lock_mode: String,
    pub read_only: bool,
    pub lease_ms: u32,
    pub renew_ms: u32,
    pub margin_ms: u32,
    pub open_files: u64,
    pub slots_kept_by: Option<String>,
    pub fenced: Option<String>,
    pub unfinished: u64,
    pub takeovers: Vec<serde_json::Value>,
    pub warnings: Vec<String>,
    pub luns: Vec<Lun>,
    pub missing: Vec<Missing>,
    pub affected: Affected,
}

impl From<&VolumeStatus> for Volume {
    fn from(status: &VolumeStatus) -> Volume {
        let info = &status.info;
        Volume {
            mount: None,
            volume: info.uuid.to_string(),
            label: info.label.clone(),
            block_bytes: info.block_size.bytes(),
            cell_bytes: info.cell_size.bytes() as u64,
            lock_mode: format!("{:?}", info.lock_mode),
            read_only: info.read_only,
            lease_ms: info.lease.lease_ms,
            renew_ms: info.lease.renew_ms,
            margin_ms: info.lease.margin_ms,
            open_files: 0,
            slots_kept_by: status.keeper.clone(),
            fenced: status.fenced.clone(),
            unfinished: status.unfinished as u64,
            takeovers: Vec::new(),
            warnings: status.warnings.clone(),
            luns: status.luns.iter().map(Lun::from).collect(),
            missing: status.missing.iter().map(Missing::from).collect(),
            affected: Affected::from(&status.affected),
        }
    }
}

impl From<&MissingLun> for Missing {
    fn from(lun: &MissingLun) -> Missing {
        let MissingLun { index, uuid, bytes, identity } = lun;
        Missing { index: index.get(), uuid: uuid.to_string(), bytes: *bytes, identity: identity.clone() }
    }
}

impl From<&CoreAffected> for Affected {
    fn from(affected: &CoreAffected) -> Affected {
        let objects = affected.objects.iter().map(|object| AffectedObject {
            fd: object.fd.to_string(),
            object_type: object.object_type.map(|of| format!("{of:?}")),
            lost: format!("{:?}", object.part),
            path: object.path.as_ref().map(|path| shown(path)),
        });
        Affected {
            luns: affected.luns.iter().map(|lun| lun.get()).collect(),
            objects: objects.collect(),
            cut: affected.cut,
        }
    }
}

/// A path as text; one that is not valid UTF-8 with its other bytes escaped.
fn shown(path: &[u8]) -> String {
    std::str::from_utf8(path).map_or_else(|_| path.escape_ascii().to_string(), str::to_owned)
}

impl From<&LunStatus> for Lun {
    fn from(lun: &LunStatus) -> Lun {
        Lun {
            index: lun.info.index.get(),
            name: lun.info.name.clone(),
            uuid: lun.info.uuid.to_string(),
            bytes: lun.info.bytes,
            state: format!("{:?}", lun.info.state),
            slot: lun.info.slot.map(|slot| slot.to_string()),
            total_blocks: lun.total_blocks,
            free_blocks: lun.free_blocks,
            lease_left_ms: lun.lease_left_ms,
            error: lun.error.clone(),
            lost: lun.lost,
            reservation: lun.reservation.as_ref().map(Reservation::from),
            hosts: lun.hosts.iter().map(Host::from).collect(),
        }
    }
}

impl From<&vmfs_core::lun::Reservation> for Reservation {
    fn from(seen: &vmfs_core::lun::Reservation) -> Reservation {
        Reservation {
            kind: seen.kind,
            keeps_out: seen.keeps_out(),
            own_key: shown_key(seen.own),
            keys: seen.keys.iter().filter_map(|key| shown_key(*key)).collect(),
            persists: seen.persists,
        }
    }
}

fn shown_key(key: u64) -> Option<String> {
    (key != 0).then(|| format!("{key:#018x}"))
}

impl From<&HostStatus> for Host {
    fn from(host: &HostStatus) -> Host {
        Host {
            slot: host.slot.to_string(),
            state: format!("{:?}", host.state),
            host: host.host.to_string(),
            name: host.name.clone(),
            incarnation: format!("{:016x}", host.incarnation),
            beat: host.beat,
            beat_age_ms: host.beat_age_ms,
            live_since_s: host.live_since_s,
            fence_grade: format!("{:?}", host.fence_grade),
            reservation_key: shown_key(host.reservation_key),
            registered_paths: host.registered_paths,
            lease_ms: host.lease.lease_ms,
            own: host.own,
            former_self: host.former_self,
        }
    }
}

impl Volume {
    /// Everything, for people.
    pub(super) fn say(&self) {
        let label = if self.label.is_empty() { "(no label)" } else { &self.label };
        say(format!("volume   {label}  {}", self.volume));
        match &self.mount {
            Some(point) => {
                let mode = if self.read_only { ", read-only" } else { "" };
                say(format!("mounted  {point}{mode}, {} open files", self.open_files));
            }
            None => say("mounted  not looked at: read from the LUNs"),
        }
        say(format!(
            "blocks   {}, cells {} bytes, lock mode {}",
            size::show(self.block_bytes),
            self.cell_bytes,
            self.lock_mode
        ));
        let keeper = self.slots_kept_by.as_ref().map(|keeper| format!(" by {keeper}")).unwrap_or_default();
        say(format!("lease    {} ms, renewed every {} ms{keeper}", self.lease_ms, self.renew_ms));
        // Of a LUN that was taken out there is nothing but what another one carries.
        let luns = self.luns.iter().filter(|lun| lun.state != "Carried");
        let (free, total) = luns.fold((0, 0), |(f, t), lun| (f + lun.free_blocks, t + lun.total_blocks));
        say(format!(
            "space    {} free of {}",
            size::show(free * self.block_bytes),
            size::show(total * self.block_bytes)
        ));
        for lun in &self.luns {
            lun.say(self.block_bytes);
            lun.hosts.iter().for_each(|host| host.say("  "));
        }
        for lun in &self.missing {
            let known_as = if lun.identity.is_empty() { String::new() } else { format!(", {}", lun.identity) };
            say(format!("lun{:<5} MISSING: UUID {}, {}{known_as}", lun.index, lun.uuid, size::show(lun.bytes)));
        }
        self.affected.say();
        if let Some(fenced) = &self.fenced {
            say(format!("FENCED   {fenced}"));
        }
        if self.unfinished > 0 {
            say(format!("{} things are left to be tidied in the background", self.unfinished));
        }
        for takeover in &self.takeovers {
            say(format!("taken over from {}", show_takeover(takeover)));
        }
        for warning in &self.warnings {
            say(format!("warning  {warning}"));
        }
    }
}

impl Affected {
    /// A line for each object; nothing while no LUN is lost.
    fn say(&self) {
        if self.luns.is_empty() {
            return;
        }
        let luns: Vec<String> = self.luns.iter().map(|lun| format!("lun{lun}")).collect();
        let more = if self.cut { " at least" } else { "" };
        say(format!("lost     {}: it hurts{more} {} objects", luns.join(", "), self.objects.len()));
        for object in &self.objects {
            let name = object.path.as_ref().unwrap_or(&object.fd);
            let kind = object.object_type.as_deref().unwrap_or("object").to_lowercase();
            let what = match object.lost.as_str() {
                "RootCell" => "all of it",
                "Body" => "its attributes and content",
                "Units" => "part of its structures",
                _ => "part of its data",
            };
            say(format!("  {kind:<10} {name}: {what}"));
        }
        if self.cut {
            say("  the search was cut here: there may be more");
        }
    }
}

impl Lun {
    /// One line.
    pub(super) fn say(&self, block_bytes: u64) {
        let space = match &self.error {
            Some(error) if self.lost => format!("LOST: {error}"),
            Some(error) => format!("does not answer: {error}"),
            None => format!(
                "{}, {} free of {}",
                self.state,
                size::show(self.free_blocks * block_bytes),
                size::show(self.total_blocks * block_bytes)
            ),
        };
        say(format!("lun{:<5} {}: {space}", self.index, self.name));
        if let Some(seen) = &self.reservation {
            let what = match seen.kind {
                Some(7) => "write exclusive for all registrants".to_owned(),
                Some(5) => "write exclusive for registrants".to_owned(),
                Some(kind) => format!("type {kind}"),
                None => "none".to_owned(),
            };
            let lasting = if seen.persists { "kept over a loss of power" } else { "NOT kept over a loss of power" };
            let grade = if seen.keeps_out { "fence grade A" } else { "fence grade C" };
            say(format!("  reservation: {what}, {} paths registered, {lasting}: {grade}", seen.keys.len()));
        }
    }
}

impl Host {
    /// One line.
    pub(super) fn say(&self, indent: &str) {
        let name = if self.name.is_empty() { &self.host } else { &self.name };
        let whose = match (self.own, self.former_self) {
            (true, _) => ", this mount",
            (_, true) => ", an earlier mount of this host that did not leave",
            _ => "",
        };
        let registered =
            self.reservation_key.as_ref().map(|key| format!(", key {key} on {} paths", self.registered_paths));
        let registered = registered.unwrap_or_default();
        say(format!(
            "{indent}{:<12} {:<8} {name}{whose}: beat {} seen for {}.{} s, lease {} s, fence grade {}{registered}",
            self.slot,
            self.state,
            self.beat,
            self.beat_age_ms / 1000,
            self.beat_age_ms % 1000 / 100,
            self.lease_ms / 1000,
            self.fence_grade
        ));
    }
}
