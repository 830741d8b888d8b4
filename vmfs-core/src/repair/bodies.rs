//! Owns: directories under repair: whether all their units can be read, and what is saved of one that cannot.
//! Promises: an entry that could be read is not lost: its name is kept for when its object is named again.
//! Must not know: how objects get their names back.

use std::collections::HashSet;

use super::mappings::Mended;
use super::roots::Root;
use super::units::Shop;
use crate::check::remedy::Claimed;
use crate::error::FsError;
use crate::format::body::{Body, Content, DIRECT_DEPTH, MAX_DEPTH};
use crate::format::dirent::{Dirent, decode_bucket, name_hash};
use crate::format::layout::roots_per_container;
use crate::format::root_cell::{ObjectState, RootCell};
use crate::format::table_entry::EntryKind;
use crate::format::unit::{UNIT_REF_BYTES, UnitRef};
use crate::format::{Cell, CellKind};
use crate::units::{CellAddress, FdId};

/// Root cells that are read with one command.
const SPAN: usize = 1024;

/// What a directory has.
#[derive(Default)]
struct Shelves {
    entries: Vec<Dirent>,
    /// Something could not be read, or lies where it cannot be found.
    broken: bool,
}

impl Shop<'_, '_> {
    /// A directory that cannot be read whole is emptied: its objects know their parent, and get their names back.
    pub(super) async fn directory(
        &self,
        fd: FdId,
        root: &Root,
        body: &mut Body,
        mended: &mut Mended,
    ) -> Result<(), FsError> {
        let mut shelves = Shelves::default();
        match &body.content {
            Content::Entries(entries) => shelves.entries.clone_from(entries),
            Content::Buckets { depth, refs } => self.buckets(fd, root, *depth, refs, &mut shelves).await?,
            _ => return Ok(()),
        }
        let mut names = HashSet::new();
        shelves.broken |= !shelves.entries.iter().all(|entry| names.insert(&entry.name));
        let count = shelves.entries.len() as u64;
        if !shelves.broken {
            mended.changed |= body.attributes.size != count;
            body.attributes.size = count;
            return Ok(());
        }
        self.keep_children(fd).await?;
        let mut work = self.work.borrow_mut();
        for entry in shelves.entries {
            work.saved_names.entry(entry.child.fd).or_insert(entry.name);
        }
        body.content = Content::Entries(Vec::new());
        body.attributes.size = 0;
        mended.changed = true;
        mended.say("; its entries are found again by their objects");
        Ok(())
    }

    /// Objects of a directory that is about to be emptied are kept, also those of which only the directory said whether they have
    /// a name.
    pub(super) async fn keep_children(&self, directory: FdId) -> Result<(), FsError> {
        let size = self.ground.context().cell_size;
        for container in &self.reverse.fd_containers {
            let member = self.ground.member(container.lun)?;
            let Some(offset) = member.layout.block_offset(container.block) else { continue };
            let all = roots_per_container(size, member.layout.block_size) as usize;
            for first in (0..all).step_by(SPAN) {
                let count = SPAN.min(all - first);
                let at = CellAddress { lun: container.lun, offset: offset + (first * size.bytes()) as u64 };
                let cells = self.ground.io.read_span(&member.lun, at, count).await?;
                for cell in cells.into_iter().flatten().filter(|cell| cell.header().kind == CellKind::Root) {
                    self.keep_child(directory, &cell).await?;
                }
            }
        }
        Ok(())
    }

    async fn keep_child(&self, directory: FdId, cell: &Cell) -> Result<(), FsError> {
        let Ok(mut root) = RootCell::decode(self.ground.context().cell_size, cell.payload()) else { return Ok(()) };
        let undecided = matches!(root.state, ObjectState::Creating(_) | ObjectState::Unlinking(_));
        if root.parent == Some(directory) && undecided {
            root.state = ObjectState::Live;
            self.ground.put_payload(cell, root.encode()).await?;
        }
        Ok(())
    }

    async fn buckets(
        &self,
        fd: FdId,
        root: &Root,
        depth: u8,
        refs: &[Option<UnitRef>],
        shelves: &mut Shelves,
    ) -> Result<(), FsError> {
        let slots = self.slots(fd, root, depth, refs, shelves).await?;
        let mut slot = 0;
        while slot < slots.len() {
            let Some(reference) = slots[slot] else {
                slot += 1;
                continue;
            };
            let same = slots[slot..].iter().take_while(|other| **other == Some(reference)).count();
            let prefix = (slot << (MAX_DEPTH - depth)) as u16;
            let claimed = Claimed { owner: fd, kind: EntryKind::Bucket, index: prefix.into() };
            let stream = self.stream(claimed, root.link, &reference).await?;
            match stream.and_then(|stream| decode_bucket(&stream).ok()) {
                Some((local_depth, entries)) => {
                    let span = 1usize << depth.saturating_sub(local_depth);
                    let here = |entry: &Dirent| {
                        ((name_hash(&entry.name) >> 48) as u16 ^ prefix).leading_zeros()
                            >= u32::from(local_depth.min(MAX_DEPTH))
                    };
                    let placed = local_depth <= depth && span == same && slot.is_multiple_of(span);
                    shelves.broken |= !placed || !entries.iter().all(here);
                    shelves.entries.extend(entries);
                }
                None => shelves.broken = true,
            }
            slot += same;
        }
        Ok(())
    }

    async fn slots(
        &self,
        fd: FdId,
        root: &Root,
        depth: u8,
        refs: &[Option<UnitRef>],
        shelves: &mut Shelves,
    ) -> Result<Vec<Option<UnitRef>>, FsError> {
        if depth <= DIRECT_DEPTH {
            return Ok(refs.to_vec());
        }
        let mut slots = Vec::with_capacity(1 << depth);
        for (group, reference) in refs.iter().enumerate() {
            let index = (group << (MAX_DEPTH - depth)) as u32;
            let claimed = Claimed { owner: fd, kind: EntryKind::Inner, index };
            let stream = match reference {
                Some(reference) => self.stream(claimed, root.link, reference).await?,
                None => Some(Vec::new()),
            };
            shelves.broken |= stream.is_none();
            let stream = stream.unwrap_or_default();
            for nth in 0..1usize << DIRECT_DEPTH {
                let bytes = stream.get(nth * UNIT_REF_BYTES..).filter(|bytes| bytes.len() >= UNIT_REF_BYTES);
                let slot = bytes.map_or(Ok(None), |bytes| UnitRef::unpack(self.ground.context().cell_size, bytes));
                shelves.broken |= slot.is_err();
                slots.push(slot.unwrap_or(None));
            }
        }
        Ok(slots)
    }
}
