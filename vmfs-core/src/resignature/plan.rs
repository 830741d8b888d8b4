//! Owns: what may be made a volume of its own, and what it becomes.
//! Promises: nothing is written; every refusal names the LUN, the cause and the next step.
//! Must not know: how the cells are changed.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::{NewLun, ResignatureOptions};
use crate::cas::CellIo;
use crate::check::probe::{self, Probed};
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{
    BEING_REPAIRED, BEING_RESIGNATURED, HAS_WINDOW, LockMode, LunHeader, MAX_LABEL, MemberState, OWN_VOLUME,
};
use crate::format::layout::header_cell;
use crate::format::member::Member;
use crate::format::{Cell, CellKind};
use crate::lun::Lun;
use crate::mkfs::new_uuid;
use crate::repair::ground::{self, Ground};
use crate::units::{LunIndex, Uuid};
use crate::volume::MissingLun;
use crate::volume::members::{in_words, member_table};
use crate::volume::membership::{self, further};

/// How far a LUN is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// A copy as it was taken.
    Untouched,
    /// Its header says that it is being made part of the new volume.
    Announced,
    /// A member of the new volume.
    Finished,
}

/// A LUN that was given.
pub(super) struct Given {
    pub lun: Rc<dyn Lun>,
    pub header: LunHeader,
    /// The header's cell; `None`: it fails its checks, `header` is of its copy.
    pub cell: Option<Cell>,
    pub stage: Stage,
}

impl Given {
    pub fn index(&self) -> LunIndex {
        self.header.lun_index
    }

    fn name(&self) -> &str {
        self.lun.name()
    }
}

/// What will be done.
pub(super) struct Plan {
    /// Ascending by index.
    pub given: Vec<Given>,
    /// Members that have an entry to be changed.
    pub members: Vec<LunIndex>,
    pub volume: Uuid,
    pub label: String,
    pub lock_mode: LockMode,
    pub from: Option<Uuid>,
    pub resumed: bool,
}

impl Plan {
    /// The UUID of a LUN follows from the volume's: a call that was cut off gives it again.
    pub fn lun_uuid(&self, index: LunIndex) -> Uuid {
        lun_uuid(self.volume, index)
    }

    pub fn new_lun(&self, given: &Given) -> NewLun {
        NewLun { index: given.index(), name: given.name().to_owned(), uuid: self.lun_uuid(given.index()) }
    }
}

fn lun_uuid(mut volume: Uuid, index: LunIndex) -> Uuid {
    volume.0[15] ^= index.get();
    volume
}

fn refuse<T>(message: String) -> Result<T, FsError> {
    Err(FsError::refused(FsErrorKind::Invalid, message))
}

/// Looks at everything and decides.
pub(super) async fn decide(
    env: &Rc<dyn Env>,
    luns: &[Rc<dyn Lun>],
    options: &ResignatureOptions,
) -> Result<(Plan, Ground), FsError> {
    if let Some(label) = options.label.as_ref().filter(|label| label.len() > MAX_LABEL) {
        return refuse(format!("the label has {} bytes, at most {MAX_LABEL} are possible", label.len()));
    }
    let mut findings = Vec::new();
    let probed = probe::probe_copies(luns, &mut findings).await?;
    if let Some(unread) = luns.iter().find(|lun| probed.iter().all(|known| known.lun.name() != lun.name())) {
        let what = findings.first().map(ToString::to_string).unwrap_or_default();
        return refuse(format!("{}: neither its header nor the copy of it can be read ({what})", unread.name()));
    }
    let io = CellIo::new(probed[0].context, env.clone());
    let mut ground = Ground { io, again: "give the command again", members: BTreeMap::new() };
    let mut given = Vec::new();
    for one in probed {
        check_device(&given, &one)?;
        given.push(look(&mut ground, one).await?);
    }
    let resumed = given.iter().find(|given| given.stage == Stage::Announced).and_then(|given| given.header.volume);
    let volume = resumed.unwrap_or_else(|| new_uuid(env));
    settle_stages(&mut given, resumed)?;
    let mut unsure = Vec::new();
    for one in given.iter().filter(|given| given.stage == Stage::Untouched) {
        check_copy(one, options, &mut unsure)?;
    }
    refuse_unsure(&unsure)?;
    let members = check_members(&ground, &given, volume).await?;
    let label = decide_label(&given, options, volume)?;
    let from = given.iter().find(|given| given.stage == Stage::Untouched);
    let from = from.map(|given| given.header.volume_of(ground.context().volume));
    let lock_mode = given[0].lun.lock_mode();
    Ok((Plan { given, members, volume, label, lock_mode, from, resumed: resumed.is_some() }, ground))
}

/// What can be said of a LUN beside those before it, and of its device.
fn check_device(before: &[Given], probed: &Probed) -> Result<(), FsError> {
    let (lun, header, name) = (&probed.lun, &probed.header, probed.lun.name());
    if let Some(other) = before.iter().find(|other| other.lun.lock_mode() != lun.lock_mode()) {
        return refuse(format!(
            "{} and {name} can not be shared in the same way; take copies of one kind for all LUNs",
            other.name()
        ));
    }
    let same = |other: &&Given| !lun.identity().bytes().is_empty() && other.lun.identity() == lun.identity();
    if let Some(other) = before.iter().find(same) {
        return refuse(format!("{} and {name} are the same LUN; give each LUN once", other.name()));
    }
    if lun.bytes() < header.lun_bytes {
        return refuse(format!(
            "{name} is truncated: it has {} bytes, its volume was made for {}; copy the whole LUN",
            lun.bytes(),
            header.lun_bytes
        ));
    }
    if header.incompatible & HAS_WINDOW != 0 {
        return refuse(format!(
            "{name} is of a volume of which a LUN was taken out: a copy of such a volume cannot be made a volume of its own; copy its \
             files into a new volume"
        ));
    }
    let cell_size = probed.context.cell_size;
    if let Some(other) = lun.cell_size().filter(|size| *size != cell_size) {
        return refuse(format!(
            "{name} has logical blocks of {} bytes, the volume's cells have {}; take a device with that block size for the copy",
            other.bytes(),
            cell_size.bytes()
        ));
    }
    if !matches!(header.state, MemberState::Joining | MemberState::Active | MemberState::Draining) {
        return refuse(format!("{name} is no member in use: its state is {:?}; leave it out", header.state));
    }
    if header.incompatible & BEING_REPAIRED != 0 {
        return refuse(format!(
            "{name} was copied while fsck.vmfs repaired the volume; run fsck.vmfs -p on the copies of all LUNs first"
        ));
    }
    let unknown = header.incompatible & !(BEING_RESIGNATURED | OWN_VOLUME) | header.read_only_compatible;
    if unknown != 0 {
        return refuse(format!(
            "{name} needs features {unknown:#x} that this release does not have; use a newer release"
        ));
    }
    Ok(())
}

/// Reads the header's cell, and how far the LUN is.
async fn look(ground: &mut Ground, probed: Probed) -> Result<Given, FsError> {
    let (index, layout) = (probed.header.lun_index, probed.layout());
    let member = ground::Member { lun: probed.lun.clone(), header: probed.header.clone(), layout, unfenced: None };
    ground.members.insert(index, member);
    let cell = ground.read_kind(header_cell(index), CellKind::Header).await?;
    let size = ground.context().cell_size;
    let header = cell.as_ref().and_then(|cell| LunHeader::decode(size, cell.payload()).ok());
    let cell = cell.filter(|_| header.is_some());
    let header = header.unwrap_or(probed.header);
    // One that was copied in the midst of this is a copy like any other.
    let is_here = header.identity == probed.lun.identity();
    let stage = match header.incompatible & BEING_RESIGNATURED != 0 {
        true if is_here => Stage::Announced,
        _ => Stage::Untouched,
    };
    Ok(Given { lun: probed.lun, header, cell, stage })
}

/// Finds the LUNs that an earlier call has finished, and refuses what does not belong together.
fn settle_stages(given: &mut [Given], resumed: Option<Uuid>) -> Result<(), FsError> {
    let Some(volume) = resumed else {
        let of = |given: &Given| given.header.volume;
        return match given.iter().find(|other| of(other) != of(&given[0])) {
            Some(other) => refuse(format!(
                "{} and {} are copies of different volumes; give the LUNs of one",
                given[0].name(),
                other.name()
            )),
            None => Ok(()),
        };
    };
    for one in given.iter_mut() {
        let is_new = one.header.volume == Some(volume) && one.header.identity == one.lun.identity();
        match one.stage {
            Stage::Announced if !is_new => {
                return refuse(format!(
                    "{} was being made part of volume {}, another LUN of volume {volume}; give the LUNs of one copy",
                    one.name(),
                    one.header.volume.unwrap_or_default()
                ));
            }
            Stage::Untouched if is_new && one.header.lun_uuid == lun_uuid(volume, one.header.lun_index) => {
                one.stage = Stage::Finished;
            }
            _ => {}
        }
    }
    let finished = given.iter().find(|given| given.stage == Stage::Finished);
    let untouched = given.iter().find(|given| given.stage == Stage::Untouched);
    if let (Some(finished), Some(untouched)) = (finished, untouched) {
        return refuse(format!(
            "{} is a LUN of volume {volume} already, which was begun when {} was none of its LUNs; give the LUNs of one copy",
            finished.name(),
            untouched.name()
        ));
    }
    Ok(())
}

/// What a device says of itself, beside what the one said on which the volume was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Copy,
    Original,
    Unknown,
}

/// A device says its name or serial number, an image file its file system, inode and birth. A file with the inode and birth of the original is
/// it, or is in a copy of its file system, or its file system has another number since the last boot.
fn origin(made: &[u8], now: &[u8]) -> Origin {
    let inode = |identity: &[u8]| {
        let place = identity.strip_prefix(b"file:")?;
        let at = place.iter().rposition(|byte| *byte == b':')?;
        Some(place[at + 1..].to_vec())
    };
    if made.is_empty() || now.is_empty() {
        Origin::Unknown
    } else if made == now {
        Origin::Original
    } else if inode(made).is_some() && inode(made) == inode(now) {
        Origin::Unknown
    } else {
        Origin::Copy
    }
}

fn check_copy(given: &Given, options: &ResignatureOptions, unsure: &mut Vec<String>) -> Result<(), FsError> {
    match origin(given.header.identity.bytes(), given.lun.identity().bytes()) {
        Origin::Original => refuse(format!(
            "{} is no copy: it is the LUN itself on which the volume was made ({}); nothing was written. Give copies of all LUNs, and only \
             copies",
            given.name(),
            given.lun.identity().bytes().escape_ascii()
        )),
        Origin::Unknown if !options.is_copy => {
            unsure.push(given.name().to_owned());
            Ok(())
        }
        _ => Ok(()),
    }
}

fn refuse_unsure(unsure: &[String]) -> Result<(), FsError> {
    if unsure.is_empty() {
        return Ok(());
    }
    refuse(format!(
        "whether {} is a copy or the original its device does not say; nothing was written. If you are certain that it is a copy, say so \
         with --is-copy",
        unsure.join(" and ")
    ))
}

/// Whether a member may hold something: it was formatted, and was neither taken out nor given up.
pub(super) fn is_needed(entry: &Member) -> bool {
    use membership::Stage;
    matches!(membership::stage(entry), Stage::Joining | Stage::Active | Stage::Draining)
}

/// Every LUN that was given is a member, and every member was given. Gives the members.
async fn check_members(ground: &Ground, given: &[Given], volume: Uuid) -> Result<Vec<LunIndex>, FsError> {
    let mut table: BTreeMap<LunIndex, Member> = BTreeMap::new();
    for on in given {
        for entry in member_table(&ground.io, &on.lun, on.index()).await? {
            let known = table.entry(entry.index).or_insert_with(|| entry.clone());
            if further(known) < further(&entry) {
                *known = entry;
            }
        }
    }
    table.retain(|_, entry| is_needed(entry));
    for one in given {
        // Tables have new UUIDs before headers have.
        let may_be = |uuid: Uuid| {
            let before = one.header.volume.map(|volume| lun_uuid(volume, one.index()));
            uuid == one.header.lun_uuid || uuid == lun_uuid(volume, one.index()) || Some(uuid) == before
        };
        if !table.get(&one.index()).is_some_and(|entry| may_be(entry.lun_uuid)) {
            return refuse(format!(
                "{} (LUN UUID {}) is not among the members in use of the volume whose copies the others are; leave it out",
                one.name(),
                one.header.lun_uuid
            ));
        }
    }
    let absent = table.values().filter(|entry| given.iter().all(|given| given.index() != entry.index));
    let missing: Vec<MissingLun> = absent
        .map(|entry| MissingLun {
            index: entry.index,
            uuid: entry.lun_uuid,
            bytes: entry.lun_bytes,
            identity: String::from_utf8_lossy(entry.identity.bytes()).into_owned(),
        })
        .collect();
    if !missing.is_empty() {
        return refuse(format!(
            "the copy is not complete: missing {}; nothing was written. Give copies of all LUNs, taken at the same moment",
            in_words(&missing)
        ));
    }
    Ok(table.into_keys().collect())
}

fn decide_label(given: &[Given], options: &ResignatureOptions, volume: Uuid) -> Result<String, FsError> {
    let begun = given.iter().find(|given| given.stage == Stage::Announced);
    match (begun, &options.label) {
        (Some(begun), Some(label)) if *label != begun.header.label => refuse(format!(
            "the copy is being made a volume with the label {:?} already; give that label, or none",
            begun.header.label
        )),
        (Some(begun), _) => Ok(begun.header.label.clone()),
        (None, Some(label)) => Ok(label.clone()),
        (None, None) => Ok(snapshot_label(&given[0].header.label, volume)),
    }
}

/// The label of a copy, as ESX makes it. That of a copy's copy takes the place of the copy's.
fn snapshot_label(label: &str, volume: Uuid) -> String {
    let is_digits = |text: &str| text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let of_copy = label.strip_prefix("snap-").and_then(|rest| rest.split_at_checked(8));
    let original = match of_copy {
        Some((digits, "")) if is_digits(digits) => "",
        Some((digits, rest)) if is_digits(digits) && rest.starts_with('-') => &rest[1..],
        _ => label,
    };
    let digits: String = volume.0[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut new = format!("snap-{digits}");
    if !original.is_empty() {
        new.push('-');
        new.push_str(original);
    }
    let mut end = new.len().min(MAX_LABEL);
    while !new.is_char_boundary(end) {
        end -= 1;
    }
    new.truncate(end);
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_the_original_or_a_copy_or_does_not_say() {
        for (made, now, found) in [
            ("wwid:naa.1", "wwid:naa.1", Origin::Original),
            ("wwid:naa.1", "wwid:naa.2", Origin::Copy),
            ("serial:a", "wwid:naa.1", Origin::Copy),
            ("", "wwid:naa.1", Origin::Unknown),
            ("wwid:naa.1", "", Origin::Unknown),
            ("file:00ff:12-1", "file:00ff:12-1", Origin::Original),
            ("file:00ff:12-1", "file:00ff:13-2", Origin::Copy),
            ("file:00ff:12-1", "file:00ee:12-7", Origin::Copy),
            ("file:00ff:12-1", "file:00ee:12-1", Origin::Unknown),
            ("file:dev1f:12-1", "file:dev20:12-1", Origin::Unknown),
            ("file:dev1f:12-1", "file:dev1f:13-4", Origin::Copy),
            ("file:00ff:12-1", "wwid:naa.1", Origin::Copy),
        ] {
            assert_eq!(origin(made.as_bytes(), now.as_bytes()), found, "{made} {now}");
        }
    }

    #[test]
    fn the_label_of_a_copy_says_so_once_and_fits() {
        let volume = Uuid([0xab; 16]);
        for (label, expected) in [
            ("ds1", "snap-abababab-ds1"),
            ("", "snap-abababab"),
            ("snap-01234567-ds1", "snap-abababab-ds1"),
            ("snap-01234567", "snap-abababab"),
            ("snap-shot", "snap-abababab-snap-shot"),
        ] {
            assert_eq!(snapshot_label(label, volume), expected);
        }
        let cut = snapshot_label(&"ä".repeat(32), volume);
        assert!(cut.len() <= MAX_LABEL && cut.ends_with('ä'), "{cut}");
    }
}
