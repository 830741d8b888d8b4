//! Owns: root cells: bringing what was cut off to its end, taking locks back, making a lost one anew.
//! Promises: a link counter and a lock token never go down, also when what they were is lost.
//! Must not know: bodies and mappings.

use super::ground::Ground;
use super::reverse::Holdings;
use crate::cas::CellChange;
use crate::check::remedy::NamedBy;
use crate::error::FsError;
use crate::format::root_cell::{HoldMode, LockRecord, LunSet, ObjectFlags, ObjectState, ObjectType, RootCell, Unclean};
use crate::format::unit::UnitRef;
use crate::format::{Cell, CellKind};
use crate::units::{CellAddress, FdId, Link, Token};

/// A counter that was lost goes on from here: no object has been moved or locked as often.
const FAR_AHEAD: u64 = 1 << 32;

/// A root cell with its counter.
pub(super) struct Root {
    pub at: CellAddress,
    pub link: Link,
    pub root: RootCell,
    /// `seq` of the image it was read from: what bodies are born under.
    pub seq: u64,
}

pub(super) fn place(ground: &Ground, fd: FdId) -> Result<Option<CellAddress>, FsError> {
    Ok(ground.member(fd.lun())?.layout.root_cell(fd))
}

/// Reads a root cell; `None`: it fails its checks, or the LUN does not have it.
pub(super) async fn read(ground: &Ground, fd: FdId) -> Result<Option<Root>, FsError> {
    let Some(at) = place(ground, fd)? else { return Ok(None) };
    let Some(cell) = ground.read_kind(at, CellKind::Root).await? else { return Ok(None) };
    if cell.expect_owner(fd, Link(u64::MAX), 0).is_err() {
        return Ok(None);
    }
    let root = RootCell::decode(ground.context().cell_size, cell.payload()).ok();
    Ok(root.map(|root| Root { at, link: cell.header().link, root, seq: cell.header().seq.0 }))
}

/// Writes a root cell.
pub(super) async fn write(ground: &Ground, fd: FdId, root: &Root) -> Result<Cell, FsError> {
    let change = CellChange {
        kind: CellKind::Root,
        owner: Some(fd),
        link: root.link,
        index: 0,
        token: Token(0),
        payload: root.root.encode(),
    };
    ground.put(root.at, change).await
}

/// Makes a root cell free: its object was never named, or is named no more.
pub(super) async fn finish(ground: &Ground, fd: FdId) -> Result<String, FsError> {
    let Some(mut root) = read(ground, fd).await? else { return Ok(String::new()) };
    let what = match root.root.state {
        ObjectState::Creating(_) => "made, but never named",
        ObjectState::Unlinking(_) | ObjectState::Unlinked(_) => "removed",
        ObjectState::Live | ObjectState::Free => return Ok(String::new()),
    };
    root.root = RootCell::free(root.root.lock.token);
    write(ground, fd, &root).await?;
    Ok(format!("{fd}: freed; it was {what} by a host that is gone"))
}

/// The object of a removal that was cut off keeps its name.
pub(super) async fn settle(ground: &Ground, fd: FdId) -> Result<String, FsError> {
    let Some(mut root) = read(ground, fd).await? else { return Ok(String::new()) };
    let ObjectState::Unlinking(_) = root.root.state else { return Ok(String::new()) };
    root.root.state = ObjectState::Live;
    write(ground, fd, &root).await?;
    Ok(format!("{fd}: keeps its name; a host that is gone had begun to remove it"))
}

/// Takes all holders out of a lock, as whoever opens the object next would: all of them are gone.
pub(super) async fn unlock(ground: &Ground, fd: FdId) -> Result<String, FsError> {
    let Some(mut root) = read(ground, fd).await? else { return Ok(String::new()) };
    let count = root.root.lock.holders.len();
    if count == 0 || root.root.state == ObjectState::Free {
        return Ok(String::new());
    }
    take_back(ground, &mut root.root);
    write(ground, fd, &root).await?;
    Ok(format!("{fd}: lock of {count} holder(s) that are gone taken back"))
}

fn take_back(ground: &Ground, root: &mut RootCell) {
    let token = root.lock.token.next();
    let unfenced = ground.members.values().any(|member| member.unfenced.is_some());
    if root.lock.mode != HoldMode::Shared {
        let broken =
            if unfenced { root.lock.holders.first().copied().unwrap_or_default() } else { root.unclean.broken };
        root.unclean = Unclean { token, broken };
    }
    root.lock = LockRecord { mode: HoldMode::Free, token, holders: Vec::new(), wanted: false };
    if let ObjectState::Creating(_) = root.state {
        root.state = ObjectState::Live;
    }
}

/// What is proven of an object whose root cell is lost.
pub(super) struct Proof<'a> {
    pub named: Option<&'a NamedBy>,
    pub holdings: &'a Holdings,
    /// Highest link counter and lock token of its units' cells.
    pub link: Link,
    pub token: Token,
    /// Its body, and what type that makes it.
    pub body: Option<(UnitRef, ObjectType)>,
}

impl Proof<'_> {
    /// A free root cell that nothing takes for an object of before.
    pub fn free(&self, at: CellAddress) -> Root {
        let named = self.named.map_or(Link(0), |named| named.child.link);
        let known = named.max(self.link);
        let link = if known.0 == 0 { Link(FAR_AHEAD) } else { Link(known.0 + 2) };
        let token = if self.token.0 == 0 { Token(FAR_AHEAD) } else { self.token.next() };
        Root { at, link, root: RootCell::free(token), seq: 0 }
    }

    /// The root cell again, as far as it is proven what the object is; `None`: nothing says that there was one.
    pub fn anew(&self, ground: &Ground, fd: FdId, at: CellAddress) -> Option<Root> {
        let volume_root = ground.members.values().next().map(|member| member.header.root)?;
        let is_root = fd == volume_root;
        let named_type = self.named.map(|named| named.object_type);
        let object_type = match (is_root, self.body, named_type) {
            (true, ..) => ObjectType::Directory,
            (_, Some((_, object_type)), _) => object_type,
            (_, None, Some(object_type)) => object_type,
            (_, None, None) => self.guessed()?,
        };
        let link = match self.named {
            Some(named) => named.child.link,
            None if is_root => self.link.max(Link(1)),
            None => Link(self.link.0 + FAR_AHEAD),
        };
        let mut luns = LunSet::of(fd.lun());
        self.holdings.luns().into_iter().for_each(|lun| luns.insert(lun));
        let token = self.token.next();
        let parent = if is_root { volume_root } else { self.named.map_or(volume_root, |named| named.directory) };
        let root = RootCell {
            state: ObjectState::Live,
            object_type: Some(object_type),
            flags: ObjectFlags::empty(),
            parent: Some(parent),
            lock: LockRecord { mode: HoldMode::Free, token, holders: Vec::new(), wanted: false },
            unclean: Unclean { token, ..Unclean::default() },
            luns,
            body: self.body.filter(|(_, of)| *of == object_type).map(|(body, _)| body),
        };
        Some(Root { at, link, root, seq: 0 })
    }

    /// Without name and body: what holds blocks was a file.
    fn guessed(&self) -> Option<ObjectType> {
        (!self.holdings.blocks.is_empty()).then_some(ObjectType::File)
    }
}
