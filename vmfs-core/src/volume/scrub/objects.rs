//! Owns: the pass over root cells and what is below each: body, mapping, directory, reverse map, data.
//! Promises: an object is read anew from its LUNs, past every cache; a fault is believed only when a second look at the whole object,
//! whose root cell is as it was, finds the same. Must not know: how the parts are found damaged in detail.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{PAUSE, Problem, Scrub, Suspect};
use crate::check::{Structure, structure_of};
use crate::error::FsError;
use crate::format::body::{Body, Content, MappingRoot};
use crate::format::layout::roots_per_container;
use crate::format::pointer::BlockPointer;
use crate::format::root_cell::{ObjectState, RootCell};
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::format::unit::UnitRef;
use crate::format::{Cell, CellKind, FormatError};
use crate::mapping::publish::pointers;
use crate::mapping::tree::{InnerCache, InnerSource, Shape, Tree};
use crate::object::Objects;
use crate::units::{BlockAddress, CellAddress, CellSize, FdId, Link, UnitAddress};

/// Root cells that are read with one command.
const ROOTS: usize = 512;
/// Looks at an object that changes all the time, before that is told.
const LOOKS: u32 = 40;
/// Bytes of data that are read with one command.
const DATA_PIECE: u64 = 1 << 20;

/// What a look at an object ends with, when not well.
enum Stop {
    /// Something is wrong, or has changed while it was looked at.
    Wrong(Problem),
    /// The scrub ends, or what is needed is on a LUN that is lost.
    Ends(FsError),
}

impl From<FsError> for Stop {
    fn from(error: FsError) -> Stop {
        Stop::Ends(error)
    }
}

/// An object at one image of its root cell.
struct Seen {
    fd: FdId,
    link: Link,
    root: RootCell,
}

impl Seen {
    fn wrong(&self, structure: Structure, at: impl ToString, what: impl ToString) -> Stop {
        Stop::Wrong(Problem { structure, at: at.to_string(), object: Some(self.fd), what: what.to_string() })
    }
}

/// Reads inner units of a mapping and remembers which.
struct Source<'a> {
    objects: &'a Objects,
    seen: &'a Seen,
    read: RefCell<Vec<(UnitRef, u32)>>,
}

impl InnerSource for Source<'_> {
    async fn read_inner(&self, reference: &UnitRef, kind: CellKind, index: u32) -> Result<Vec<u8>, FsError> {
        self.read.borrow_mut().push((*reference, index));
        self.objects.space().units.read(reference, kind, self.seen.fd, self.seen.link, index).await
    }
}

impl Scrub<'_> {
    /// Every root cell of a container, and the objects.
    pub(super) async fn fd_container(&mut self, container: BlockAddress) -> Result<(), FsError> {
        let Ok(member) = self.inner.context.member(container.lun) else { return Ok(()) };
        let (layout, size) = (member.layout(), self.inner.context.cell_size());
        let count = roots_per_container(size, layout.block_size) as usize;
        let Some(start) = layout.block_offset(container.block) else { return Ok(()) };
        let legal = |cell: &Cell| root_of(size, container, start, cell).map(drop);
        for from in (0..count).step_by(ROOTS) {
            let cells = ROOTS.min(count - from);
            let Some(fd) = FdId::new(container, from as u16) else { continue };
            let Some(first) = layout.root_cell(fd) else { return Ok(()) };
            let bytes = (cells * size.bytes()) as u64;
            match self.inner.context.io.read_span(&member.lun, first, cells).await {
                Ok(found) => {
                    let mut suspects: Vec<Suspect<'_>> = Vec::new();
                    for (nth, cell) in found.into_iter().enumerate() {
                        let at = CellAddress { offset: first.offset + (nth * size.bytes()) as u64, ..first };
                        match cell.and_then(|cell| root_of(size, container, start, &cell)) {
                            Ok((fd, root)) if is_settled(&root) => self.object(fd).await?,
                            Ok(_) => {}
                            Err(_) => suspects.push((at, &legal)),
                        }
                    }
                    for (at, wrong) in self.confirm(suspects).await? {
                        if !self.is_container(container, EntryKind::FdContainer).await {
                            break;
                        }
                        let Some(fd) = fd_at(size, container, start, at) else { continue };
                        self.problem(Structure::RootCell, at, Some(fd), wrong);
                        self.unrooted.insert(fd);
                    }
                }
                Err(error) => self.unread(&member, first, None, error),
            }
            self.paced(bytes).await?;
            self.advance(bytes);
        }
        Ok(())
    }

    /// One object, until it is well, is gone, or is wrong in the same way twice.
    async fn object(&mut self, fd: FdId) -> Result<(), FsError> {
        self.report.objects += 1;
        let mut before: Option<(Cell, Problem)> = None;
        for _ in 0..LOOKS {
            let (cell, root) = match self.inner.objects.read_root(fd).await {
                Ok(read) => read,
                // A damaged root cell is the other pass's, and so is a LUN that does not answer.
                Err(_) => return Ok(()),
            };
            if !is_settled(&root) {
                return Ok(());
            }
            let seen = Seen { fd, link: cell.header().link, root };
            let problem = match self.look(&seen).await {
                Ok(()) => return Ok(()),
                Err(Stop::Ends(error)) if self.is_away(&error) => return Ok(()),
                Err(Stop::Ends(error)) => return Err(error),
                Err(Stop::Wrong(problem)) => problem,
            };
            if before.as_ref().is_some_and(|(root, same)| *root == cell && *same == problem) {
                // What its container's pass found damaged it told by its cell.
                if !self.told.contains(&fd) {
                    self.problem(problem.structure, problem.at, Some(fd), problem.what);
                }
                return Ok(());
            }
            before = Some((cell, problem));
            self.inner.context.env().sleep(PAUSE).await;
        }
        self.report.unsettled += 1;
        Ok(())
    }

    fn is_away(&self, error: &FsError) -> bool {
        matches!(error, FsError::MissingLun { .. }) || self.inner.context.is_loss(error)
    }

    /// An error of something that the object names.
    fn judge(&self, seen: &Seen, structure: Structure, at: impl ToString, error: FsError) -> Stop {
        if self.is_away(&error) { Stop::Ends(error) } else { seen.wrong(structure, at, error) }
    }

    async fn look(&mut self, seen: &Seen) -> Result<(), Stop> {
        let Some(reference) = seen.root.body else {
            return Err(seen.wrong(Structure::RootCell, seen.fd, "it has no body"));
        };
        let objects = self.inner.objects.clone();
        let read = objects.space().units.read(&reference, CellKind::Body, seen.fd, seen.link, 0).await;
        let stream = read.map_err(|error| self.judge(seen, Structure::Body, reference.at, error))?;
        let body = Body::decode(self.inner.context.cell_size(), &stream)
            .map_err(|cause| seen.wrong(Structure::Body, reference.at, cause))?;
        self.unit_entry(seen, reference.at, EntryKind::Body, 0).await?;
        match &body.content {
            Content::Mapped(root) => self.mapping(seen, root).await,
            Content::Entries(_) | Content::Buckets { .. } => self.directory(seen, &body.content).await,
            _ => Ok(()),
        }
    }

    /// The table of a unit's container says whose the unit is.
    async fn unit_entry(&mut self, seen: &Seen, unit: UnitAddress, kind: EntryKind, index: u32) -> Result<(), Stop> {
        let structure = structure_of(kind);
        let no_place = || seen.wrong(structure, unit, "there is no such unit");
        let member = self.inner.context.member(unit.lun)?;
        let (at, nth) = member.layout().unit_table_entry(unit).ok_or_else(no_place)?;
        let read = self.inner.context.read_cell(at).await;
        let cell = read.map_err(|error| self.judge(seen, Structure::UnitTable, at, error))?;
        self.paced(self.inner.context.cell_size().bytes() as u64).await?;
        let table = TableCell::decode(self.inner.context.cell_size(), cell.payload())
            .map_err(|cause| seen.wrong(Structure::UnitTable, at, cause))?;
        match table.entries.get(nth) {
            Some(entry) if is_entry_of(entry, seen.fd, kind, index) => Ok(()),
            Some(entry) => {
                let what = format!("unit {unit} is {kind:?} {index} of {}, its table has {}", seen.fd, words(entry));
                Err(seen.wrong(Structure::UnitTable, at, what))
            }
            None => Err(no_place()),
        }
    }

    async fn directory(&mut self, seen: &Seen, content: &Content) -> Result<(), Stop> {
        let inner = self.inner;
        let walked = inner.names.read_past_cache(seen.fd, seen.link, content).await;
        let units = walked.map_err(|error| self.judge(seen, Structure::Bucket, seen.fd, error))?;
        self.paced(units.len() as u64 * crate::units::UNIT_BYTES).await?;
        for (unit, kind, index) in units {
            self.unit_entry(seen, unit, kind, index).await?;
        }
        Ok(())
    }

    async fn mapping(&mut self, seen: &Seen, root: &MappingRoot) -> Result<(), Stop> {
        let (cache, shape) = (InnerCache::default(), Shape::new(self.inner.context.cell_size()));
        let objects = self.inner.objects.clone();
        let source = Source { objects: &objects, seen, read: RefCell::default() };
        let tree = Tree { shape, root, source: &source, cache: &cache, name: seen.fd.to_string() };
        let mut from = 0;
        loop {
            let next = tree.next_attached(from).await;
            let read = source.read.take();
            self.paced(read.len() as u64 * crate::units::UNIT_BYTES).await?;
            let next = next.map_err(|error| {
                let at = read.last().map_or_else(|| seen.fd.to_string(), |(reference, _)| reference.at.to_string());
                self.judge(seen, Structure::InnerUnit, at, error)
            })?;
            for (reference, index) in read {
                self.unit_entry(seen, reference.at, EntryKind::Inner, index).await?;
            }
            let Some((pb, unit)) = next else { return Ok(()) };
            self.unit_entry(seen, unit, EntryKind::PointerBlock, pb).await?;
            self.pointer_block(seen, pb, unit, shape).await?;
            from = pb + 1;
        }
    }

    async fn pointer_block(&mut self, seen: &Seen, pb: u32, unit: UnitAddress, shape: Shape) -> Result<(), Stop> {
        let size = self.inner.context.cell_size();
        let member = self.inner.context.member(unit.lun)?;
        for nth in 0..size.cells_per_unit() {
            let Some(at) = member.layout().unit_cell(unit, nth) else { return Ok(()) };
            let mut looked = None;
            // A cell is changed in place: what it says is compared with the block table only if it says the same afterwards.
            let wrong = loop {
                let read = self.inner.context.read_cell(at).await;
                let cell = read.map_err(|error| self.judge(seen, Structure::PointerBlock, at, error))?;
                if let Some((before, wrong)) = looked.take()
                    && before == cell
                {
                    break wrong;
                }
                self.paced(size.bytes() as u64).await?;
                let decoded = cell.expect_kind(CellKind::PointerBlock).and_then(|()| {
                    cell.expect_owner(seen.fd, seen.link, pb)?;
                    pointers(size, cell.payload())
                });
                let first = shape.first_block(pb) + nth as u64 * shape.per_cell();
                let wrong = match decoded {
                    Ok(pointers) => self.reverse_map(seen, first, &pointers).await?,
                    Err(cause) => Some(seen.wrong(Structure::PointerBlock, at, cause)),
                };
                match wrong {
                    None => break None,
                    wrong => looked = Some((cell, wrong)),
                }
            };
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
        }
        Ok(())
    }

    /// The block table says of each block whose it is; its data can be read, if that is asked for. Gives the first that is wrong.
    async fn reverse_map(
        &mut self,
        seen: &Seen,
        first: u64,
        pointers: &[Option<BlockPointer>],
    ) -> Result<Option<Stop>, Stop> {
        let mut tables: BTreeMap<CellAddress, TableCell> = BTreeMap::new();
        for (nth, pointer) in pointers.iter().enumerate() {
            let Some(pointer) = pointer else { continue };
            let number = first + nth as u64;
            let member = self.inner.context.member(pointer.at.lun)?;
            let Some((at, place)) = member.layout().table_entry(pointer.at.block) else {
                return Ok(Some(seen.wrong(Structure::PointerBlock, pointer.at, "there is no such block")));
            };
            let table = match tables.entry(at) {
                Entry::Occupied(read) => read.into_mut(),
                Entry::Vacant(unread) => {
                    let read = self.inner.context.read_cell(at).await;
                    let cell = read.map_err(|error| self.judge(seen, Structure::BlockTable, at, error))?;
                    self.paced(self.inner.context.cell_size().bytes() as u64).await?;
                    let table = TableCell::decode(self.inner.context.cell_size(), cell.payload());
                    unread.insert(table.map_err(|cause| seen.wrong(Structure::BlockTable, at, cause))?)
                }
            };
            let entry = table.entries.get(place).copied().unwrap_or(TableEntry::FREE);
            if !is_entry_of(&entry, seen.fd, EntryKind::Data, number as u32) {
                let what = format!(
                    "block {} is file block {number} of {}, its table has {}",
                    pointer.at,
                    seen.fd,
                    words(&entry)
                );
                return Ok(Some(seen.wrong(Structure::BlockTable, at, what)));
            }
            if self.options.data
                && let Some(wrong) = self.data(seen, number, pointer).await?
            {
                return Ok(Some(wrong));
            }
        }
        Ok(None)
    }

    /// The granules of a block that were written can be read.
    async fn data(&mut self, seen: &Seen, number: u64, pointer: &BlockPointer) -> Result<Option<Stop>, Stop> {
        let member = self.inner.context.member(pointer.at.lun)?;
        let Some(start) = member.layout().block_offset(pointer.at.block) else { return Ok(None) };
        let (block, granule) = (self.inner.info.block_size.bytes(), self.inner.info.block_size.granule_bytes());
        let mut at = 0;
        while at < block {
            if !pointer.valid.has((at / granule) as u32) {
                at += granule;
                continue;
            }
            let mut end = at;
            while end < block && end - at < DATA_PIECE && pointer.valid.has((end / granule) as u32) {
                end += granule;
            }
            if let Err(error) = member.lun.read(start + at, (end - at) as usize).await {
                let error = FsError::from(error);
                if self.is_away(&error) {
                    return Err(Stop::Ends(error));
                }
                let what = format!("data at byte {} cannot be read: {error}", number * block + at);
                return Ok(Some(seen.wrong(Structure::Lun, pointer.at, what)));
            }
            self.paced(end - at).await?;
            at = end;
        }
        self.advance(block);
        Ok(None)
    }
}

/// The object whose root cell lies there, in a container that begins at `start`.
fn fd_at(size: CellSize, container: BlockAddress, start: u64, at: CellAddress) -> Option<FdId> {
    FdId::new(container, ((at.offset - start) / size.bytes() as u64) as u16)
}

/// The root cell in a cell of a container.
fn root_of(size: CellSize, container: BlockAddress, start: u64, cell: &Cell) -> Result<(FdId, RootCell), FormatError> {
    cell.expect_kind(CellKind::Root)?;
    let none = FormatError::Value { structure: "root cell", field: "address", value: cell.address().offset };
    let fd = fd_at(size, container, start, cell.address()).ok_or(none)?;
    cell.expect_owner(fd, Link(u64::MAX), 0)?;
    Ok((fd, RootCell::decode(size, cell.payload())?))
}

/// Whether an object is what its root cell says: one that is being made need not have a body yet, one that is being freed need not have
/// anything.
fn is_settled(root: &RootCell) -> bool {
    matches!(root.state, ObjectState::Live | ObjectState::Unlinking(_))
}

fn is_entry_of(entry: &TableEntry, fd: FdId, kind: EntryKind, index: u32) -> bool {
    let now = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
    now == kind && entry.fd == fd.get() && entry.index == index
}

fn words(entry: &TableEntry) -> String {
    match FdId::from_stored(entry.fd) {
        Some(fd) => format!("{:?} {} of {fd}", entry.kind, entry.index),
        None => format!("{:?}", entry.kind),
    }
}
