//! Owns: finding out which LUNs were given, and whether they are the whole of one volume.
//! Promises: nothing is written; every refusal names the LUN, the cause and the next step.
//! Must not know: slots, objects, what happens after the members are known.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::membership::further;

use crate::cas::CellIo;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{
    BEING_REPAIRED, BEING_RESIGNATURED, HAS_WINDOW, LockMode, LunHeader, MemberState, OWN_VOLUME,
};
use crate::format::layout::{FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, LunLayout, member_cell};
use crate::format::member::Member;
use crate::format::{Cell, CellContext, CellKind, FormatError, cell};
use crate::lun::Lun;
use crate::units::{CellAddress, LunIndex, MAX_MEMBERS, Uuid};
use crate::volume::types::MissingLun;
use crate::window::{self, Carriers, Head};

/// Features of `incompatible` that this code knows.
const KNOWN_INCOMPATIBLE: u64 = OWN_VOLUME | HAS_WINDOW;
/// Features of `read_only_compatible` that this code knows.
const KNOWN_READ_ONLY_COMPATIBLE: u64 = 0;

/// A LUN whose header was read and passed its checks.
pub(super) struct Probed {
    pub lun: Rc<dyn Lun>,
    pub context: CellContext,
    pub header: LunHeader,
}

impl Probed {
    /// UUID of the volume that it belongs to.
    pub fn volume(&self) -> Uuid {
        self.header.volume_of(self.context.volume)
    }

    pub fn layout(&self) -> LunLayout {
        LunLayout {
            lun: self.header.lun_index,
            cell_size: self.context.cell_size,
            block_size: self.header.block_size,
            segments: self.header.segments.clone(),
        }
    }
}

fn refuse<T>(message: String) -> Result<T, FsError> {
    Err(FsError::refused(FsErrorKind::Invalid, message))
}

/// Reads the headers of all LUNs and checks that they are one volume, a whole one unless `degraded`. Sorted by index; with them the
/// members that are missing.
pub(super) async fn probe_all(
    luns: Vec<Rc<dyn Lun>>,
    read_only: bool,
    degraded: bool,
    tolerated: u64,
    env: &Rc<dyn Env>,
    carriers: &Carriers,
) -> Result<(Vec<Probed>, Vec<MissingLun>), FsError> {
    let mut members: Vec<Probed> = Vec::with_capacity(luns.len());
    let (mut silent, mut left) = (None, Vec::new());
    for lun in luns {
        let name = lun.name().to_owned();
        let mut probed = match probe(lun.clone()).await {
            // One that cannot be read is as good as one that is not there.
            Err(error @ FsError::Lun(_)) if degraded => {
                tracing::warn!(lun = name, %error, "mounted without a LUN that does not answer");
                silent = silent.or(Some(error));
                continue;
            }
            Err(error) => match window::head_of(&lun).await {
                Head::Left(context, index, moved) => {
                    left.push((name, context, index, moved));
                    continue;
                }
                _ => return Err(error),
            },
            Ok(probed) => probed,
        };
        check_against(&members, &probed)?;
        probed.lun = carriers.member(&probed.context, probed.header.lun_index, probed.lun);
        members.push(probed);
    }
    for member in &members {
        check_alone(member, read_only, tolerated)?;
    }
    let Some(first) = members.first() else {
        if let Some(error) = silent {
            return Err(error);
        }
        if let Some((name, _, index, _)) = left.first() {
            return Err(window::was_taken_out(name, *index));
        }
        return refuse("no LUN was given: name every LUN of the volume".to_owned());
    };
    let io = CellIo::new(first.context, env.clone());
    // Of tables that differ (a change of membership was interrupted) the furthest entries count.
    let mut table = BTreeMap::new();
    for member in &members {
        for entry in member_table(&io, &member.lun, member.header.lun_index).await? {
            let known = table.entry(entry.index).or_insert_with(|| entry.clone());
            if further(known) < further(&entry) {
                *known = entry;
            }
        }
    }
    for (name, context, index, moved) in left {
        // Whoever took it out did not come to say so in the other LUNs' tables.
        let unsaid = table.get_mut(&index).filter(|entry| entry.state == MemberState::Draining);
        match unsaid.filter(|_| context == *io.context()) {
            Some(entry) => {
                entry.state = MemberState::Carried;
                entry.window = Some(CellAddress { lun: moved.carrier, offset: moved.window });
            }
            None => return Err(window::was_taken_out(&name, index)),
        }
    }
    let table: Vec<Member> = table.into_values().collect();
    for at in table.iter().filter_map(|entry| entry.window.filter(|_| entry.state == MemberState::Carried)) {
        if let Some(lun) = carriers.window(io.context(), at).await? {
            let probed = probe(lun).await?;
            check_against(&members, &probed)?;
            check_alone(&probed, read_only, tolerated)?;
            members.push(probed);
        }
    }
    let missing = missing_from(&members, &table)?;
    if !missing.is_empty() && !degraded {
        return refuse_incomplete(&members, &missing);
    }
    members.sort_by_key(|member| member.header.lun_index);
    Ok((members, missing))
}

/// Reads the header of one LUN.
pub(super) async fn probe(lun: Rc<dyn Lun>) -> Result<Probed, FsError> {
    let name = lun.name().to_owned();
    if lun.bytes() < HEADER_COPY_OFFSET + FIXED_STRIDE {
        return refuse(format!("{name} has only {} bytes: it is no LUN of a VMFS volume; check the path", lun.bytes()));
    }
    let cause = match header_at(&lun, HEADER_OFFSET).await? {
        Ok((context, header)) => return Ok(Probed { lun, context, header }),
        Err(cause) => cause,
    };
    if let Head::Left(_, index, _) = window::head_of(&lun).await {
        return Err(window::was_taken_out(&name, index));
    }
    if header_at(&lun, HEADER_COPY_OFFSET).await?.is_ok() {
        let structure = format!("header of {name} (its copy is intact)");
        return Err(FsError::Corrupt { structure, cause });
    }
    match cause {
        FormatError::Magic { .. } => refuse(format!(
            "{name} is no LUN of a VMFS volume ({cause}); check the path, or make a volume with mkfs.vmfs"
        )),
        cause => Err(FsError::Corrupt { structure: format!("header of {name} and its copy"), cause }),
    }
}

/// The copy of a LUN's header, whatever the header is; `None`: it has none that is sound.
pub(super) async fn header_copy(lun: &Rc<dyn Lun>) -> Option<(CellContext, LunHeader)> {
    if lun.bytes() < HEADER_COPY_OFFSET + FIXED_STRIDE {
        return None;
    }
    header_at(lun, HEADER_COPY_OFFSET).await.ok()?.ok()
}

/// How the volume whose header is in these bytes, the first of that place of a LUN, does compare-and-write; `None`: they are no header.
pub fn lock_mode_of(head: &[u8]) -> Option<LockMode> {
    decode_header(HEADER_OFFSET, head).ok().map(|(_, header)| header.lock_mode)
}

async fn header_at(lun: &Rc<dyn Lun>, offset: u64) -> Result<Result<(CellContext, LunHeader), FormatError>, FsError> {
    let bytes = lun.read(offset, FIXED_STRIDE as usize).await?;
    Ok(decode_header(offset, &bytes))
}

/// Decodes the header cell in `bytes`, which were read from `offset` of an unknown LUN.
fn decode_header(offset: u64, bytes: &[u8]) -> Result<(CellContext, LunHeader), FormatError> {
    let (context, lun) = cell::probe(offset, bytes)?;
    let at = CellAddress { lun, offset };
    let cell = Cell::decode(&context, at, &bytes[..context.cell_size.bytes()])?;
    cell.expect_kind(CellKind::Header)?;
    let header = LunHeader::decode(context.cell_size, cell.payload())?;
    if header.lun_index != lun {
        let (found, expected) = (header.lun_index.to_string(), lun.to_string());
        return Err(FormatError::Mismatch { at, field: "lun_index", found, expected });
    }
    Ok((context, header))
}

/// What can be said of a LUN beside those probed before it.
fn check_against(before: &[Probed], probed: &Probed) -> Result<(), FsError> {
    let (name, header) = (probed.lun.name(), &probed.header);
    for other in before {
        let other_name = other.lun.name();
        if other.header.lun_uuid == header.lun_uuid {
            let same_device = other_name == name
                || (!probed.lun.identity().bytes().is_empty() && probed.lun.identity() == other.lun.identity());
            return refuse(if same_device {
                format!("{name} was given twice (also as {other_name}); name each LUN once")
            } else {
                format!(
                    "{name} and {other_name} carry the same LUN UUID {}: one is a clone or a snapshot of the other; give only \
                     the original",
                    header.lun_uuid
                )
            });
        }
        if other.context.volume != probed.context.volume || other.volume() != probed.volume() {
            return refuse(format!(
                "{name} belongs to volume {} (label {:?}), {other_name} to volume {} (label {:?}); give the LUNs of one volume",
                probed.volume(),
                header.label,
                other.volume(),
                other.header.label
            ));
        }
        let differs = if other.header.lun_index == header.lun_index {
            "the same member index"
        } else if other.context.cell_size != probed.context.cell_size {
            "different cell sizes"
        } else if other.header.block_size != header.block_size {
            "different block sizes"
        } else if other.header.root != header.root {
            "different root directories"
        } else {
            continue;
        };
        return refuse(format!("{name} and {other_name} of volume {} have {differs}; run fsck.vmfs", probed.volume()));
    }
    Ok(())
}

/// What can be said of a LUN by itself.
pub(super) fn check_alone(member: &Probed, read_only: bool, tolerated: u64) -> Result<(), FsError> {
    let (lun, header) = (&member.lun, &member.header);
    let name = lun.name();
    if lun.bytes() < header.lun_bytes {
        return refuse(format!(
            "{name} is truncated: it has {} bytes, its volume was made for {}; restore the LUN's size",
            lun.bytes(),
            header.lun_bytes
        ));
    }
    if let Some(cell_size) = lun.cell_size().filter(|size| *size != member.context.cell_size) {
        return refuse(format!(
            "{name} has logical blocks of {} bytes, the volume's cells have {}; attach it with the block size it was made with",
            cell_size.bytes(),
            member.context.cell_size.bytes()
        ));
    }
    if !matches!(header.state, MemberState::Active | MemberState::Draining | MemberState::Carried) {
        let next = match header.state {
            MemberState::Joining => {
                "leave it out: it is being added, or vmfs extent add finishes that once the volume is mounted"
            }
            _ => "leave it out",
        };
        return refuse(format!("{name} is no member in use: its state is {:?}; {next}", header.state));
    }
    check_features(name, header.incompatible & !tolerated)?;
    let unknown = header.read_only_compatible & !KNOWN_READ_ONLY_COMPATIBLE;
    if unknown != 0 && !read_only {
        return refuse(format!(
            "{name} needs features {unknown:#x} for writing that this release does not have; mount read-only or use a newer release"
        ));
    }
    if !read_only && lun.lock_mode() != header.lock_mode {
        return refuse(format!(
            "{name} was made for {}, but here compare-and-write is done by {}; attach it the same way on every host, or mount \
             read-only",
            lock_mode_name(header.lock_mode),
            lock_mode_name(lun.lock_mode())
        ));
    }
    let (made, now) = (&header.identity, lun.identity());
    if !read_only && is_copy(made.bytes(), now.bytes()) {
        return refuse(format!(
            "{name} is not the LUN that the volume was made on (then {}, now {}): it is a clone or a snapshot; mount it read-only, or \
             make a volume of its own of the clones of all LUNs with vmfs resignature",
            String::from_utf8_lossy(made.bytes()),
            String::from_utf8_lossy(now.bytes())
        ));
    }
    Ok(())
}

/// Refuses a volume that is being worked on, and features that this code does not know.
fn check_features(name: &str, incompatible: u64) -> Result<(), FsError> {
    if incompatible & BEING_REPAIRED != 0 {
        return refuse(format!(
            "{name} is being repaired by fsck.vmfs, or that was cut off; wait for its end, or run fsck.vmfs -p again"
        ));
    }
    if incompatible & BEING_RESIGNATURED != 0 {
        return refuse(format!(
            "{name} is being made part of a volume of its own by vmfs resignature, or that was cut off; give the command again with \
             all LUNs of the copy"
        ));
    }
    let unknown = incompatible & !KNOWN_INCOMPATIBLE;
    if unknown != 0 {
        return refuse(format!(
            "{name} needs features {unknown:#x} that this release does not have; use a newer release"
        ));
    }
    Ok(())
}

/// As at the probe, from the headers as they are now.
pub(super) async fn refuse_features(members: &[Probed], tolerated: u64) -> Result<(), FsError> {
    for member in members {
        let name = member.lun.name();
        let found = header_at(&member.lun, HEADER_OFFSET).await?;
        let (_, header) = found.map_err(|cause| FsError::Corrupt { structure: format!("header of {name}"), cause })?;
        check_features(name, header.incompatible & !tolerated)?;
    }
    Ok(())
}

/// Whether a LUN that says `now` of itself is a copy of the one that said `made` when the volume was made: a device by its name or serial
/// number, an image file by its inode in the same file system. What says nothing is not known, and an image file that lies on another
/// file system than then, or on a device by now, has been moved: that the first one is still there nobody can tell.
fn is_copy(made: &[u8], now: &[u8]) -> bool {
    const FILE: &[u8] = b"file:";
    let file_system =
        |identity: &[u8]| identity.iter().rposition(|byte| *byte == b':').map(|end| identity[..end].to_vec());
    match (made.strip_prefix(FILE), now.strip_prefix(FILE)) {
        _ if made.is_empty() || now.is_empty() || made == now => false,
        (None, None) => true,
        // The number of a device that has no UUID on it may be another file system's after the next boot.
        (Some(then), Some(inode)) => !then.starts_with(b"dev") && file_system(then) == file_system(inode),
        _ => false,
    }
}

fn lock_mode_name(mode: LockMode) -> &'static str {
    match mode {
        LockMode::SingleMachine => "file locks of a single machine",
        LockMode::CompareAndWrite => "SCSI COMPARE AND WRITE",
    }
}

/// The member table as a LUN has it: the members that were ever used.
pub(crate) async fn member_table(io: &CellIo, on: &Rc<dyn Lun>, lun: LunIndex) -> Result<Vec<Member>, FsError> {
    let first = member_cell(lun, LunIndex::new(1).expect("1 is a member index"));
    let mut table = Vec::new();
    for (nth, cell) in io.read_strided(on, first, FIXED_STRIDE, MAX_MEMBERS).await?.into_iter().enumerate() {
        let at = CellAddress { lun, offset: first.offset + nth as u64 * FIXED_STRIDE };
        let cell = match cell {
            Ok(cell) => cell,
            Err(_) => io.read(on, at).await?,
        };
        let corrupt = |cause| FsError::Corrupt { structure: format!("member cell {at} of {}", on.name()), cause };
        cell.expect_kind(CellKind::Member).map_err(corrupt)?;
        let member = Member::decode(cell.payload()).map_err(corrupt)?;
        if usize::from(member.index.get()) != nth + 1 {
            let value = member.index.get().into();
            return Err(corrupt(FormatError::Value { structure: "member", field: "index", value }));
        }
        table.push(member);
    }
    table.retain(|member| member.state != MemberState::Free);
    Ok(table)
}

/// Refuses LUNs that are no members in use; gives the members in use that are not there.
fn missing_from(members: &[Probed], table: &[Member]) -> Result<Vec<MissingLun>, FsError> {
    for probed in members {
        let entry = table.iter().find(|member| member.index == probed.header.lun_index);
        let in_use = entry.is_some_and(|member| {
            member.lun_uuid == probed.header.lun_uuid
                && (matches!(member.state, MemberState::Joining | MemberState::Active | MemberState::Draining)
                    || member.state == MemberState::Carried)
        });
        if !in_use {
            return refuse(format!(
                "{} ({}) is not among the members in use of volume {}; leave it out, or run fsck.vmfs",
                probed.lun.name(),
                probed.header.lun_uuid,
                probed.volume()
            ));
        }
    }
    let is_needed = |state| matches!(state, MemberState::Active | MemberState::Draining | MemberState::Carried);
    let needed = table.iter().filter(|member| is_needed(member.state));
    let missing =
        needed.filter(|member| members.iter().all(|probed| probed.header.lun_index != member.index)).map(|member| {
            MissingLun {
                index: member.index,
                uuid: member.lun_uuid,
                bytes: member.lun_bytes,
                identity: String::from_utf8_lossy(member.identity.bytes()).into_owned(),
            }
        });
    Ok(missing.collect())
}

/// LUNs that are missing, in words.
pub(crate) fn in_words(missing: &[MissingLun]) -> String {
    let each = missing.iter().map(|lun| {
        let known_as = if lun.identity.is_empty() { String::new() } else { format!(", {}", lun.identity) };
        format!("{} (UUID {}, {} bytes{known_as})", lun.index, lun.uuid, lun.bytes)
    });
    each.collect::<Vec<_>>().join(" and ")
}

fn refuse_incomplete<T>(members: &[Probed], missing: &[MissingLun]) -> Result<T, FsError> {
    let volume = members[0].volume();
    refuse(format!(
        "volume {volume}: missing {}; name every LUN of the volume, or mount it with -o degraded to use what lies wholly on the others",
        in_words(missing)
    ))
}

#[cfg(test)]
mod tests {
    use super::is_copy;

    #[test]
    fn a_lun_is_a_copy_when_it_is_certainly_another_thing_than_the_one_that_the_volume_was_made_on() {
        for (made, now, copy) in [
            ("wwid:naa.1", "wwid:naa.1", false),
            ("wwid:naa.1", "wwid:naa.2", true),
            ("serial:a", "wwid:naa.1", true),
            ("", "wwid:naa.1", false),
            ("wwid:naa.1", "", false),
            ("file:00ff:12", "file:00ff:12", false),
            ("file:00ff:12", "file:00ff:13", true),
            ("file:00ff:12", "file:00ee:13", false),
            ("file:dev1f:12", "file:dev1f:13", false),
            ("file:00ff:12", "wwid:naa.1", false),
        ] {
            assert_eq!(is_copy(made.as_bytes(), now.as_bytes()), copy, "{made} {now}");
        }
    }
}
