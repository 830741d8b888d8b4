//! Owns: finding out which LUNs were given, and whether they are the whole of one volume.
//! Promises: nothing is written; every refusal names the LUN, the cause and the next step.
//! Must not know: slots, objects, what happens after the members are known.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::membership::stage;

use crate::cas::CellIo;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{BEING_REPAIRED, LockMode, LunHeader, MemberState};
use crate::format::layout::{FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, LunLayout, member_cell};
use crate::format::member::Member;
use crate::format::{Cell, CellContext, CellKind, FormatError, cell};
use crate::lun::Lun;
use crate::units::{CellAddress, LunIndex, MAX_MEMBERS};

/// Features of `incompatible` that this code knows.
const KNOWN_INCOMPATIBLE: u64 = 0;
/// Features of `read_only_compatible` that this code knows.
const KNOWN_READ_ONLY_COMPATIBLE: u64 = 0;

/// A LUN whose header was read and passed its checks.
pub(super) struct Probed {
    pub lun: Rc<dyn Lun>,
    pub context: CellContext,
    pub header: LunHeader,
}

impl Probed {
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

/// Reads the headers of all LUNs and checks that they are one whole volume. Sorted by index.
pub(super) async fn probe_all(
    luns: Vec<Rc<dyn Lun>>,
    read_only: bool,
    tolerated: u64,
    env: &Rc<dyn Env>,
) -> Result<Vec<Probed>, FsError> {
    let mut members: Vec<Probed> = Vec::with_capacity(luns.len());
    for lun in luns {
        let probed = probe(lun).await?;
        check_against(&members, &probed)?;
        members.push(probed);
    }
    for member in &members {
        check_alone(member, read_only, tolerated)?;
    }
    let Some(first) = members.first() else {
        return refuse("no LUN was given: name every LUN of the volume".to_owned());
    };
    let io = CellIo::new(first.context, env.clone());
    // Of tables that differ (a change of membership was interrupted) the furthest entries count.
    let mut table = BTreeMap::new();
    for member in &members {
        for entry in member_table(&io, &member.lun, member.header.lun_index).await? {
            let known = table.entry(entry.index).or_insert_with(|| entry.clone());
            if stage(known) < stage(&entry) {
                *known = entry;
            }
        }
    }
    check_whole(&members, &table.into_values().collect::<Vec<_>>())?;
    members.sort_by_key(|member| member.header.lun_index);
    Ok(members)
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
        if other.context.volume != probed.context.volume {
            return refuse(format!(
                "{name} belongs to volume {} (label {:?}), {other_name} to volume {} (label {:?}); give the LUNs of one volume",
                probed.context.volume, header.label, other.context.volume, other.header.label
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
        return refuse(format!(
            "{name} and {other_name} of volume {} have {differs}; run fsck.vmfs",
            probed.context.volume
        ));
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
    if !matches!(header.state, MemberState::Active | MemberState::Draining) {
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
    // An image file may be moved and copied; a device that is not the one that mkfs saw is a clone or an array snapshot.
    let (made, now) = (&header.identity, lun.identity());
    if header.lock_mode == LockMode::CompareAndWrite
        && !made.bytes().is_empty()
        && !now.bytes().is_empty()
        && *made != now
        && !read_only
    {
        return refuse(format!(
            "{name} is not the device that the volume was made on (then {}, now {}): it is a clone or a snapshot; mount it read-only",
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

fn lock_mode_name(mode: LockMode) -> &'static str {
    match mode {
        LockMode::SingleMachine => "file locks of a single machine",
        LockMode::CompareAndWrite => "SCSI COMPARE AND WRITE",
    }
}

/// The member table as a LUN has it: the members that were ever used.
pub(super) async fn member_table(io: &CellIo, on: &Rc<dyn Lun>, lun: LunIndex) -> Result<Vec<Member>, FsError> {
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

/// Every member in use is there, and nothing else is.
fn check_whole(members: &[Probed], table: &[Member]) -> Result<(), FsError> {
    for probed in members {
        let entry = table.iter().find(|member| member.index == probed.header.lun_index);
        let in_use = entry.is_some_and(|member| {
            member.lun_uuid == probed.header.lun_uuid
                && matches!(member.state, MemberState::Joining | MemberState::Active | MemberState::Draining)
        });
        if !in_use {
            return refuse(format!(
                "{} ({}) is not among the members in use of volume {}; leave it out, or run fsck.vmfs",
                probed.lun.name(),
                probed.header.lun_uuid,
                probed.context.volume
            ));
        }
    }
    let needed = table.iter().filter(|member| matches!(member.state, MemberState::Active | MemberState::Draining));
    let missing: Vec<String> = needed
        .filter(|member| members.iter().all(|probed| probed.header.lun_index != member.index))
        .map(|member| {
            let identity = String::from_utf8_lossy(member.identity.bytes()).into_owned();
            let known_as = if identity.is_empty() { String::new() } else { format!(", {identity}") };
            format!("{} (UUID {}, {} bytes{known_as})", member.index, member.lun_uuid, member.lun_bytes)
        })
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let volume = members[0].context.volume;
    refuse(format!("volume {volume}: missing {}; name every LUN of the volume", missing.join(" and ")))
}
