//! Owns: the headers of the LUNs that were given: which volume, which members, which geometry.
//! Promises: a damaged header is told and its copy is used; LUNs of several volumes are refused.
//! Must not know: anything behind the header area.

use std::rc::Rc;

use super::finding::{Finding, Severity, Structure};
use super::state::expect_plain;
use crate::error::{FsError, FsErrorKind};
use crate::format::cell::probe;
use crate::format::header::{BEING_REPAIRED, BEING_RESIGNATURED, HAS_WINDOW, LunHeader, MemberState, OWN_VOLUME};
use crate::format::layout::{FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, LunLayout, TABLE_OFFSET};
use crate::format::{Cell, CellContext, CellKind, FormatError};
use crate::lun::Lun;
use crate::units::{CellAddress, LunIndex, Uuid};
use crate::window::{self, Carriers};

/// A LUN with a header that can be believed.
pub(crate) struct Probed {
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

fn invalid(message: String) -> FsError {
    FsError::refused(FsErrorKind::Invalid, message)
}

/// Reads all headers. LUNs whose header and copy are both damaged are left out, with a finding. Refused: LUNs of several volumes, or of a
/// copy that is half a volume of its own.
pub(crate) async fn probe_all(luns: &[Rc<dyn Lun>], findings: &mut Vec<Finding>) -> Result<Vec<Probed>, FsError> {
    let members = probe_copies(luns, findings).await?;
    for member in &members {
        let (name, first) = (member.lun.name(), &members[0]);
        if member.header.incompatible & BEING_RESIGNATURED != 0 {
            return Err(invalid(format!(
                "{name} is being made part of a volume of its own, and that was cut off; end it with vmfs resignature first, with all \
                 LUNs of the copy"
            )));
        }
        if member.volume() != first.volume() {
            return Err(invalid(format!(
                "{name} is of volume {}, {} of volume {}; give the LUNs of one volume",
                member.volume(),
                first.lun.name(),
                first.volume()
            )));
        }
    }
    Ok(members)
}

/// As [`probe_all`], of LUNs that carry the cells of one volume, whatever volume they belong to by now.
pub(crate) async fn probe_copies(luns: &[Rc<dyn Lun>], findings: &mut Vec<Finding>) -> Result<Vec<Probed>, FsError> {
    let mut members: Vec<Probed> = Vec::with_capacity(luns.len());
    for lun in &window::members_of(luns, &Carriers::default()).await? {
        let Some(probed) = probe_one(lun, findings).await? else { continue };
        for other in &members {
            let name = (other.lun.name(), lun.name());
            if other.header.lun_uuid == probed.header.lun_uuid {
                return Err(invalid(format!(
                    "{} and {} are the same LUN, or copies; give each LUN once",
                    name.0, name.1
                )));
            }
            if other.context.volume != probed.context.volume {
                let volumes = (other.volume(), probed.volume());
                return Err(invalid(format!(
                    "{} is of volume {}, {} of volume {}; give the LUNs of one volume",
                    name.0, volumes.0, name.1, volumes.1
                )));
            }
            if other.header.lun_index == probed.header.lun_index || other.context.cell_size != probed.context.cell_size
            {
                return Err(invalid(format!(
                    "{} and {} contradict each other in LUN index or cell size; leave the wrong one out",
                    name.0, name.1
                )));
            }
        }
        members.push(probed);
    }
    if members.is_empty() {
        return Err(invalid("no LUN with a readable header was given: neither header nor copy is intact".to_owned()));
    }
    members.sort_by_key(|member| member.header.lun_index);
    let reference = members.iter().max_by_key(|m| (m.header.volume_generation, std::cmp::Reverse(m.header.lun_index)));
    let reference = reference.map(|member| member.header.clone()).expect("there is a member");
    for member in &members {
        check_header(member, &reference, findings);
    }
    Ok(members)
}

type Found = (CellContext, LunHeader, Vec<u8>);

async fn probe_one(lun: &Rc<dyn Lun>, findings: &mut Vec<Finding>) -> Result<Option<Probed>, FsError> {
    if lun.bytes() < HEADER_COPY_OFFSET + FIXED_STRIDE {
        return Err(invalid(format!("{}: {} bytes are too few for a LUN of a volume", lun.name(), lun.bytes())));
    }
    let header = header_at(lun, HEADER_OFFSET).await?;
    let copy = header_at(lun, HEADER_COPY_OFFSET).await?;
    if let (Err(FormatError::Magic { .. }), Err(FormatError::Magic { .. })) = (&header, &copy) {
        return Err(invalid(format!("{} is no LUN of a VMFS volume; check the path", lun.name())));
    }
    for (structure, found, offset) in
        [(Structure::Header, &header, HEADER_OFFSET), (Structure::HeaderCopy, &copy, HEADER_COPY_OFFSET)]
    {
        if let Err(error) = found {
            findings.push(damaged(structure, format!("{}+{offset:#x}", lun.name()), error));
        }
    }
    if let (Ok((_, _, one)), Ok((_, _, two))) = (&header, &copy)
        && one != two
    {
        findings.push(Finding {
            severity: Severity::Error,
            structure: Structure::HeaderCopy,
            at: format!("{}+{HEADER_COPY_OFFSET:#x}", lun.name()),
            object: None,
            field: "payload",
            found: "another content than the header's".to_owned(),
            expected: "the same".to_owned(),
        });
    }
    Ok(header.or(copy).ok().map(|(context, header, _)| Probed { lun: lun.clone(), context, header }))
}

/// The finding of a structure that does not decode.
pub(crate) fn damaged(structure: Structure, at: String, error: &FormatError) -> Finding {
    let (field, expected) = match error {
        FormatError::Magic { .. } => ("magic", "a cell of this format".to_owned()),
        FormatError::Checksum { .. } => ("crc", "the checksum of the cell".to_owned()),
        FormatError::Mismatch { field, expected, .. } => (*field, expected.clone()),
        FormatError::Value { field, .. } => (*field, "a value that the format has".to_owned()),
        FormatError::Length { .. } => ("length", String::new()),
    };
    let found = match error {
        FormatError::Mismatch { found, .. } => found.clone(),
        other => other.to_string(),
    };
    Finding { severity: Severity::Error, structure, at, object: None, field, found, expected }
}

async fn header_at(lun: &Rc<dyn Lun>, offset: u64) -> Result<Result<Found, FormatError>, FsError> {
    let bytes = lun.read(offset, FIXED_STRIDE as usize).await?;
    let decode = || {
        let (context, index) = probe(offset, &bytes)?;
        let at = CellAddress { lun: index, offset };
        let cell = Cell::decode(&context, at, &bytes[..context.cell_size.bytes()])?;
        expect_plain(&cell, CellKind::Header)?;
        let header = LunHeader::decode(context.cell_size, cell.payload())?;
        if header.lun_index != index {
            let (found, expected) = (header.lun_index.to_string(), index.to_string());
            return Err(FormatError::Mismatch { at, field: "lun_index", found, expected });
        }
        Ok((context, header, cell.payload().to_vec()))
    };
    Ok(decode())
}

/// What a header says that contradicts its LUN or the volume's other headers.
fn check_header(member: &Probed, reference: &LunHeader, findings: &mut Vec<Finding>) {
    let (lun, header) = (&member.lun, &member.header);
    if header.incompatible & BEING_REPAIRED != 0 {
        findings.push(Finding {
            severity: Severity::Recoverable,
            structure: Structure::Header,
            at: format!("{} ({})", header.lun_index, lun.name()),
            object: None,
            field: "incompatible",
            found: "being repaired".to_owned(),
            expected: "that this goes on now, or is begun again and ended".to_owned(),
        });
    }
    let mut wrong = |structure, field, found: String, expected: String| {
        let at = format!("{} ({})", header.lun_index, lun.name());
        findings.push(Finding { severity: Severity::Error, structure, at, object: None, field, found, expected });
    };
    if lun.bytes() < header.lun_bytes {
        let found = format!("{} bytes", lun.bytes());
        wrong(Structure::Lun, "size", found, format!("{} bytes as in its header: it is truncated", header.lun_bytes));
    }
    if header.segments[0].table_offset != TABLE_OFFSET {
        let found = format!("{:#x}", header.segments[0].table_offset);
        wrong(Structure::Header, "table_offset", found, format!("{TABLE_OFFSET:#x}"));
    }
    let is_known = |state| matches!(state, MemberState::Active | MemberState::Draining | MemberState::Joining);
    if !is_known(header.state) && header.state != MemberState::Carried {
        wrong(Structure::Header, "state", format!("{:?}", header.state), "active".to_owned());
    }
    if header.incompatible & !(BEING_REPAIRED | BEING_RESIGNATURED | OWN_VOLUME | HAS_WINDOW) != 0 {
        wrong(
            Structure::Header,
            "incompatible",
            format!("{:#x}", header.incompatible),
            "known features only".to_owned(),
        );
    }
    let pairs: [(&'static str, String, String); 7] = [
        ("volume_generation", header.volume_generation.to_string(), reference.volume_generation.to_string()),
        ("block_shift", header.block_size.shift().to_string(), reference.block_size.shift().to_string()),
        ("root", header.root.to_string(), reference.root.to_string()),
        ("lock_mode", format!("{:?}", header.lock_mode), format!("{:?}", reference.lock_mode)),
        ("label", format!("{:?}", header.label), format!("{:?}", reference.label)),
        ("lease", format!("{:?}", header.lease), format!("{:?}", reference.lease)),
        ("member_count", header.member_count.to_string(), reference.member_count.to_string()),
    ];
    for (field, found, expected) in pairs {
        if found != expected {
            wrong(Structure::Header, field, found, format!("{expected} as on {}", reference.lun_index));
        }
    }
    if crate::lease::check(&header.lease).is_err() {
        wrong(Structure::Header, "lease", format!("{:?}", header.lease), "times that fit each other".to_owned());
    }
}

/// The member that decides what the volume's member table is.
pub(crate) fn reference_of(members: &[Probed]) -> LunIndex {
    let newest = members.iter().max_by_key(|m| (m.header.volume_generation, std::cmp::Reverse(m.header.lun_index)));
    newest.map(|member| member.header.lun_index).expect("there is a member")
}
