//! Owns: LUNs whose cells have moved to a window on another LUN: finding them, following cells that leave, moving cells.
//! Promises: a cell is in one valid place at any moment; who meets a cell that has left finds it by what it meets.
//! Must not know: what cells mean, when a LUN is taken out, slots.

pub mod map;
mod member_lun;
pub mod mover;

pub use map::Window;
pub use member_lun::MemberLun;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::{FsError, FsErrorKind};
use crate::format::header::MemberState;
use crate::format::layout::{FIXED_STRIDE, HEADER_OFFSET, member_cell};
use crate::format::member::Member;
use crate::format::moved::Moved;
use crate::format::{Cell, CellContext, CellKind, cell};
use crate::lun::Lun;
use crate::units::{CellAddress, LunIndex, MAX_MEMBERS};

/// The LUNs of one volume as one process has them, by index: any of them may carry the cells of another one.
#[derive(Clone, Default)]
pub struct Carriers(Rc<RefCell<BTreeMap<LunIndex, Rc<dyn Lun>>>>);

impl Carriers {
    /// A LUN of the volume, as the member that it is. One that is known already by this index stays known.
    pub fn member(&self, context: &CellContext, index: LunIndex, lun: Rc<dyn Lun>) -> Rc<dyn Lun> {
        if lun.as_member().is_some() {
            return lun;
        }
        self.0.borrow_mut().entry(index).or_insert_with(|| lun.clone());
        Rc::new(MemberLun::new(*context, index, self.clone(), lun))
    }

    /// The member whose cells are in the window at `at`; `None`: the carrier is not there.
    ///
    /// # Errors
    /// [`FsError::Corrupt`]: there is no window.
    pub async fn window(&self, context: &CellContext, at: CellAddress) -> Result<Option<Rc<dyn Lun>>, FsError> {
        let Some(carrier) = self.get(at.lun) else { return Ok(None) };
        let window = Window::open(context, carrier, at).await?;
        Ok(Some(Rc::new(MemberLun::of_window(*context, self.clone(), window))))
    }

    /// A LUN, if it is there.
    pub fn get(&self, lun: LunIndex) -> Option<Rc<dyn Lun>> {
        self.0.borrow().get(&lun).cloned()
    }

    fn all(&self) -> Vec<Rc<dyn Lun>> {
        self.0.borrow().values().cloned().collect()
    }

    /// The LUN is not there any more.
    pub fn forget(&self, lun: LunIndex) {
        self.0.borrow_mut().remove(&lun);
    }
}

/// What the header cell of a LUN is.
pub(crate) enum Head {
    /// A header of a member.
    Member(CellContext, LunIndex),
    /// The LUN was taken out: its cells are elsewhere.
    Left(CellContext, LunIndex, Moved),
    /// Neither, or it cannot be read.
    Other,
}

/// Looks at the header cell of a LUN.
pub(crate) async fn head_of(lun: &Rc<dyn Lun>) -> Head {
    if lun.bytes() < HEADER_OFFSET + FIXED_STRIDE {
        return Head::Other;
    }
    let Ok(bytes) = lun.read(HEADER_OFFSET, FIXED_STRIDE as usize).await else { return Head::Other };
    let Ok((context, index)) = cell::probe(HEADER_OFFSET, &bytes) else { return Head::Other };
    let at = CellAddress { lun: index, offset: HEADER_OFFSET };
    let Ok(cell) = Cell::decode(&context, at, &bytes[..context.cell_size.bytes()]) else { return Head::Other };
    match cell.header().kind {
        CellKind::Header => Head::Member(context, index),
        CellKind::Moved => match Moved::decode(cell.payload()) {
            Ok(moved) => Head::Left(context, index, moved),
            Err(_) => Head::Other,
        },
        _ => Head::Other,
    }
}

/// The refusal of a LUN that was taken out of its volume.
pub(crate) fn was_taken_out(name: &str, index: LunIndex) -> FsError {
    let message = format!("{name} was taken out of its volume, where it was {index}; leave it out");
    FsError::refused(FsErrorKind::Invalid, message)
}

/// The LUNs that were given as members, with those in windows on them that no device stands for any more. What cannot be read, or is no
/// member, is given back as it is.
///
/// # Errors
/// Kind `Invalid`: a LUN was given that was taken out of the volume. [`FsError::Corrupt`]: a window has no sound map.
pub(crate) async fn members_of(luns: &[Rc<dyn Lun>], carriers: &Carriers) -> Result<Vec<Rc<dyn Lun>>, FsError> {
    let (mut given, mut known, mut left) = (Vec::with_capacity(luns.len()), Vec::new(), Vec::new());
    for lun in luns {
        match head_of(lun).await {
            Head::Member(context, index) => {
                let member = carriers.member(&context, index, lun.clone());
                known.push((context, index, member.clone()));
                given.push(member);
            }
            Head::Left(context, index, moved) => left.push((context, index, moved, lun.name().to_owned())),
            Head::Other => given.push(lun.clone()),
        }
    }
    let mut windows: BTreeMap<LunIndex, (CellContext, CellAddress)> = BTreeMap::new();
    for (context, index, member) in &known {
        for (lun, at) in windows_in(context, *index, member).await {
            windows.insert(lun, (*context, at));
        }
    }
    for (context, index, moved, name) in left {
        let is_one = known.iter().any(|(of, _, _)| of.volume == context.volume);
        if windows.contains_key(&index) || !is_one {
            return Err(was_taken_out(&name, index));
        }
        // Whoever took it out did not come to say so in the other LUNs' tables.
        let at = CellAddress { lun: moved.carrier, offset: moved.window };
        windows.insert(index, (context, at));
    }
    for (lun, (context, at)) in windows {
        if known.iter().all(|(_, index, _)| *index != lun)
            && let Some(window) = carriers.window(&context, at).await?
        {
            given.push(window);
        }
    }
    Ok(given)
}

/// The windows that the member table of a LUN names.
async fn windows_in(context: &CellContext, index: LunIndex, lun: &Rc<dyn Lun>) -> Vec<(LunIndex, CellAddress)> {
    let first = member_cell(index, LunIndex::new(1).expect("1 is a member index"));
    let (stride, size) = (FIXED_STRIDE as usize, context.cell_size.bytes());
    let Ok(table) = lun.read(first.offset, MAX_MEMBERS * stride).await else { return Vec::new() };
    let entry = |(nth, bytes): (usize, &[u8])| {
        let at = CellAddress { offset: first.offset + (nth * stride) as u64, ..first };
        let cell = Cell::decode(context, at, &bytes[..size]).ok()?;
        cell.expect_kind(CellKind::Member).ok()?;
        let member = Member::decode(cell.payload()).ok()?;
        (member.state == MemberState::Carried).then_some((member.index, member.window?))
    };
    table.chunks_exact(stride).enumerate().filter_map(entry).collect()
}
