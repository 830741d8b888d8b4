//! Owns: mappings under repair: inner units, pointer blocks and pointers, made anew from the reverse map where they are lost.
//! Promises: a sound pointer stays as it is; of two that claim one block, the one that the block's table entry names keeps it.
//! Must not know: names, locks.

use std::collections::BTreeMap;

use super::roots::{self, Root};
use super::tables::entry_of;
use super::units::Shop;
use crate::cas::CellChange;
use crate::check::remedy::Claimed;
use crate::error::FsError;
use crate::format::CellKind;
use crate::format::body::{Attributes, Body, Content, DiskFormat, MappingRoot};
use crate::format::layout::{pointers_per_block, pointers_per_cell};
use crate::format::pointer::{BlockPointer, Granules, stored_at, unpack_pb_reference};
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::format::unit::{UNIT_REF_BYTES, UnitRef};
use crate::mapping::tree::{InnerCache, InnerSource, MAX_FILE_BLOCKS, Shape, Tree, UPPER_INDEX, UPPER_REFS, height};
use crate::units::{BlockAddress, CellAddress, FdId, UnitAddress};

/// What mending an object changed.
#[derive(Default)]
pub(super) struct Mended {
    /// Its body is to be written anew.
    pub changed: bool,
    words: String,
}

impl Mended {
    /// The body is to be written in any case.
    pub fn whole() -> Mended {
        Mended { changed: true, ..Mended::default() }
    }

    pub fn say(&mut self, words: &str) {
        if !self.words.contains(words) {
            self.words.push_str(words);
        }
    }

    pub fn words(&self) -> &str {
        &self.words
    }
}

/// Where a mapping has its pointer blocks.
#[derive(Default)]
struct Walked {
    blocks: BTreeMap<u32, UnitAddress>,
    /// An inner unit could not be read, or names what cannot be.
    broken: bool,
}

/// What another object's pointer says of a block.
enum Rival {
    PointsHere,
    PointsElsewhere,
    Unreadable,
}

/// A mapping that is built from nothing reads no inner unit.
struct NoInner;

impl InnerSource for NoInner {
    async fn read_inner(&self, _: &UnitRef, _: CellKind, _: u32) -> Result<Vec<u8>, FsError> {
        Ok(Vec::new())
    }
}

impl Shop<'_, '_> {
    fn shape(&self) -> Shape {
        Shape::new(self.ground.context().cell_size)
    }

    /// Pointer blocks that the reverse map knows, by number; the cells decide whether they are.
    async fn known_blocks(&self, fd: FdId, root: &Root) -> Result<BTreeMap<u32, UnitAddress>, FsError> {
        let mut known = BTreeMap::new();
        let count = self.ground.context().cell_size.cells_per_unit();
        for (at, entry) in self.reverse.of(fd).units_of(EntryKind::PointerBlock) {
            let claimed = Claimed { owner: fd, kind: EntryKind::PointerBlock, index: entry.index };
            let is_its = self.cells(at, count, &claimed, root.link).await?.iter().any(Option::is_some);
            let better = entry.kind != EntryKind::Retiring || !known.contains_key(&entry.index);
            if better && (is_its || entry.kind != EntryKind::Retiring) {
                known.insert(entry.index, at);
            }
        }
        Ok(known)
    }

    /// The mapping of an object that has lost its body, as the reverse map knows it.
    pub(super) async fn mapping_anew(
        &self,
        fd: FdId,
        root: &Root,
        attributes: &Attributes,
    ) -> Result<Content, FsError> {
        let known = self.known_blocks(fd, root).await?;
        if known.is_empty() && root.root.object_type != Some(crate::format::root_cell::ObjectType::Disk) {
            return Ok(Content::Inline(Vec::new()));
        }
        let block_size = self.block_size();
        let empty = self.shape().empty_root(attributes.size, block_size);
        self.build(fd, root, &empty, &known).await.map(Content::Mapped)
    }

    fn block_size(&self) -> crate::units::BlockSize {
        self.ground.members.values().next().map_or(crate::units::BlockSize::DEFAULT, |member| member.header.block_size)
    }

    /// A mapping with these pointer blocks, its inner units written.
    async fn build(
        &self,
        fd: FdId,
        root: &Root,
        empty: &MappingRoot,
        blocks: &BTreeMap<u32, UnitAddress>,
    ) -> Result<MappingRoot, FsError> {
        let tree = Tree {
            shape: self.shape(),
            root: empty,
            source: &NoInner,
            cache: &InnerCache::default(),
            name: fd.to_string(),
        };
        let changes = blocks.iter().map(|(number, at)| (*number, Some(*at))).collect();
        let mut rewrite = tree.rewrite(&changes).await?;
        let write = async |index, stream: Option<Vec<u8>>| -> Result<Option<UnitRef>, FsError> {
            let Some(stream) = stream else { return Ok(None) };
            let claimed = Claimed { owner: fd, kind: EntryKind::Inner, index };
            self.write(claimed, root.link, root.seq as u32, &root.root.luns, &stream).await.map(Some)
        };
        for (leaf, stream) in rewrite.leaves() {
            let at = write(leaf, stream).await?;
            rewrite.set_leaf(leaf, at);
        }
        for (index, stream) in rewrite.uppers() {
            let at = write(index, stream).await?;
            rewrite.set_upper(index, at);
        }
        Ok(rewrite.root())
    }

    /// Mends a mapping: inner units first, then every pointer block and every pointer.
    pub(super) async fn mapping(
        &self,
        fd: FdId,
        root: &mut Root,
        body: &mut Body,
        mapping: &MappingRoot,
        mended: &mut Mended,
    ) -> Result<(), FsError> {
        let mut walked = self.walk(fd, root, mapping).await?;
        let per = self.shape().per_pb();
        let before = walked.blocks.len();
        let mut sound = BTreeMap::new();
        for (number, at) in &walked.blocks {
            if u64::from(*number) * per < MAX_FILE_BLOCKS && self.is_pointer_block(fd, root, *number, *at).await? {
                sound.insert(*number, *at);
            }
        }
        walked.broken |= sound.len() != before;
        if walked.broken || mended.changed {
            for (number, at) in self.known_blocks(fd, root).await? {
                walked.broken |= *sound.entry(number).or_insert(at) != at;
            }
        }
        let (mut blocks, mut last) = (0, 0);
        for (number, at) in &sound {
            let (count, end) = self.pointer_block(fd, root, body, (*number, *at)).await?;
            blocks += count;
            last = last.max(end);
        }
        if body.attributes.size == 0 && last > 0 && mended.changed {
            body.attributes.size = last * self.block_size().bytes();
            mended.say("; its size is the end of its last block");
        }
        if walked.broken {
            let last_size = body.attributes.size.max(last * self.block_size().bytes());
            let empty = match height(mapping) {
                2 => self.shape().empty_root(last_size, self.block_size()),
                height => MappingRoot::Inner { height, refs: Vec::new() },
            };
            body.content = Content::Mapped(self.build(fd, root, &empty, &sound).await?);
            mended.changed = true;
            mended.say("; its mapping is as the reverse map has it");
        }
        mended.changed |= mended.changed && body.attributes.blocks != blocks;
        if mended.changed {
            body.attributes.blocks = blocks;
        }
        Ok(())
    }

    async fn walk(&self, fd: FdId, root: &Root, mapping: &MappingRoot) -> Result<Walked, FsError> {
        let mut walked = Walked::default();
        match mapping {
            MappingRoot::PointerBlocks(refs) => {
                let some = refs.iter().enumerate().filter_map(|(number, at)| at.map(|at| (number as u32, at)));
                walked.blocks.extend(some);
            }
            MappingRoot::Inner { height, refs } => {
                for (slot, reference) in refs.iter().enumerate() {
                    let Some(reference) = reference else { continue };
                    if *height == 3 {
                        self.leaf(fd, root, slot as u32, reference, &mut walked).await?;
                        continue;
                    }
                    let claimed = Claimed { owner: fd, kind: EntryKind::Inner, index: UPPER_INDEX | slot as u32 };
                    let Some(stream) = self.stream(claimed, root.link, reference).await? else {
                        walked.broken = true;
                        continue;
                    };
                    for nth in 0..UPPER_REFS.min(stream.len() / UNIT_REF_BYTES) {
                        let number = (slot * UPPER_REFS + nth) as u32;
                        match UnitRef::unpack(self.ground.context().cell_size, &stream[nth * UNIT_REF_BYTES..]) {
                            Ok(Some(leaf)) => self.leaf(fd, root, number, &leaf, &mut walked).await?,
                            Ok(None) => {}
                            Err(_) => walked.broken = true,
                        }
                    }
                }
            }
        }
        Ok(walked)
    }

    async fn leaf(
        &self,
        fd: FdId,
        root: &Root,
        leaf: u32,
        reference: &UnitRef,
        walked: &mut Walked,
    ) -> Result<(), FsError> {
        let claimed = Claimed { owner: fd, kind: EntryKind::Inner, index: leaf };
        let Some(stream) = self.stream(claimed, root.link, reference).await? else {
            walked.broken = true;
            return Ok(());
        };
        let per = pointers_per_block(self.ground.context().cell_size);
        for nth in 0..per.min(stream.len() / 8) {
            match stored_at(&stream, nth, "inner unit").and_then(unpack_pb_reference) {
                Ok(Some(at)) => {
                    walked.blocks.insert(leaf * per as u32 + nth as u32, at);
                }
                Ok(None) => {}
                Err(_) => walked.broken = true,
            }
        }
        Ok(())
    }

    /// Whether a unit is this pointer block: a cell of it says so, or its entry does while no cell can be read.
    async fn is_pointer_block(&self, fd: FdId, root: &Root, number: u32, at: UnitAddress) -> Result<bool, FsError> {
        if !self.is_unit(at).await? {
            return Ok(false);
        }
        let claimed = Claimed { owner: fd, kind: EntryKind::PointerBlock, index: number };
        let count = self.ground.context().cell_size.cells_per_unit();
        if self.cells(at, count, &claimed, root.link).await?.iter().any(Option::is_some) {
            self.claim(at, &claimed).await?;
            return Ok(true);
        }
        let entry = self.ground.unit_entry(at).await?;
        Ok(entry.is_none_or(|entry| super::units::agrees(&entry, &claimed)))
    }

    /// Mends the cells of a pointer block; gives the blocks that it names and the end of the last one.
    async fn pointer_block(
        &self,
        fd: FdId,
        root: &mut Root,
        body: &Body,
        (number, at): (u32, UnitAddress),
    ) -> Result<(u64, u64), FsError> {
        let size = self.ground.context().cell_size;
        let claimed = Claimed { owner: fd, kind: EntryKind::PointerBlock, index: number };
        let per = pointers_per_cell(size) as u64;
        let (mut blocks, mut last) = (0, 0);
        root.root.luns.insert(at.lun);
        let cells = self.cells(at, size.cells_per_unit(), &claimed, root.link).await?;
        for (nth, cell) in cells.into_iter().enumerate() {
            let place = self.ground.member(at.lun)?.layout.unit_cell(at, nth).expect("it is a unit");
            let first = u64::from(number) * self.shape().per_pb() + nth as u64 * per;
            let mut payload = vec![0; size.payload()];
            let (mut changed, mut restored) = (cell.is_none(), 0);
            for nth in 0..per as usize {
                let block = first + nth as u64;
                let found = cell.as_ref().map(|cell| stored_at(cell.payload(), nth, "PB cell").unwrap_or(0));
                let pointer = match found {
                    Some(stored) => self.pointer(fd, block, stored, body).await?,
                    None => self.known_pointer(fd, block, body),
                };
                let stored = BlockPointer::pack(pointer);
                changed |= found.is_some_and(|found| found != stored);
                restored += u64::from(found != Some(stored) && stored != 0);
                payload[nth * 8..nth * 8 + 8].copy_from_slice(&stored.to_le_bytes());
                if let Some(pointer) = pointer {
                    root.root.luns.insert(pointer.at.lun);
                    blocks += 1;
                    last = block + 1;
                }
            }
            if let Some(cell) = &cell {
                root.root.lock.token = root.root.lock.token.max(cell.header().token);
            }
            if changed {
                self.put_pointers(fd, root, place, number, payload).await?;
                self.repaired(format!(
                    "pointer cell {place} of {fd}: written anew, {restored} pointers from the reverse map"
                ));
            }
        }
        Ok((blocks, last))
    }

    async fn put_pointers(
        &self,
        fd: FdId,
        root: &Root,
        at: CellAddress,
        index: u32,
        payload: Vec<u8>,
    ) -> Result<(), FsError> {
        let (link, token) = (root.link, root.root.lock.token);
        let change = CellChange { kind: CellKind::PointerBlock, owner: Some(fd), link, index, token, payload };
        self.ground.put(at, change).await.map(|_| ())
    }

    /// What a pointer is to be: itself, or what the reverse map says.
    async fn pointer(&self, fd: FdId, block: u64, stored: u64, body: &Body) -> Result<Option<BlockPointer>, FsError> {
        let pointer = match BlockPointer::unpack(stored) {
            Ok(None) => return Ok(None),
            Ok(Some(pointer)) if !pointer.shared => pointer,
            _ => return Ok(self.known_pointer(fd, block, body)),
        };
        let member = self.ground.members.get(&pointer.at.lun);
        if member.is_none_or(|member| member.layout.table_entry(pointer.at.block).is_none()) {
            return Ok(self.known_pointer(fd, block, body));
        }
        let Some(entry) = self.ground.block_entry(pointer.at).await? else { return Ok(Some(pointer)) };
        let kind = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
        if kind == EntryKind::Data && entry.fd == fd.get() && u64::from(entry.index) == block {
            return Ok(Some(pointer));
        }
        if kind == EntryKind::Data {
            match self.rival(&entry, pointer.at).await? {
                Rival::PointsElsewhere => {}
                // It is told again in the next round, when that one has been mended.
                Rival::Unreadable => return Ok(Some(pointer)),
                Rival::PointsHere => return Ok(self.known_pointer(fd, block, body)),
            }
        }
        if matches!(entry.kind, EntryKind::FdContainer | EntryKind::UnitContainer) {
            return Ok(self.known_pointer(fd, block, body));
        }
        let claimed = Claimed { owner: fd, kind: EntryKind::Data, index: block as u32 };
        if self.ground.set_block_entry(pointer.at, Some(&entry), entry_of(&claimed)).await? {
            self.repaired(format!(
                "block {}: entry set to block {block} of {fd}, which alone points to it",
                pointer.at
            ));
        }
        Ok(Some(pointer))
    }

    /// A pointer that only the reverse map still knows. Which granules were written is lost with the cell: all of them count, so
    /// that nothing that was written reads as zeros, or none, if that was asked for. An eager-zeroed disk has written them all.
    fn known_pointer(&self, fd: FdId, block: u64, body: &Body) -> Option<BlockPointer> {
        let at = u32::try_from(block).ok().and_then(|index| self.reverse.of(fd).blocks.get(&index).copied())?;
        let eager = body.attributes.disk == Some(DiskFormat::EagerZeroedThick);
        let zero = self.work.borrow().options.zero_unknown && !eager;
        Some(BlockPointer { at, valid: if zero { Granules::NONE } else { Granules::ALL }, shared: false })
    }

    /// Whether the object that a block's entry names points to that block.
    async fn rival(&self, entry: &TableEntry, at: BlockAddress) -> Result<Rival, FsError> {
        let Some(fd) = FdId::from_stored(entry.fd).filter(|fd| self.ground.members.contains_key(&fd.lun())) else {
            return Ok(Rival::PointsElsewhere);
        };
        let Some(root) = roots::read(self.ground, fd).await? else { return Ok(Rival::Unreadable) };
        let Some(reference) = root.root.body else { return Ok(Rival::PointsElsewhere) };
        let claimed = Claimed { owner: fd, kind: EntryKind::Body, index: 0 };
        let Some(body) = self.stream(claimed, root.link, &reference).await? else { return Ok(Rival::Unreadable) };
        let Ok(body) = Body::decode(self.ground.context().cell_size, &body) else { return Ok(Rival::Unreadable) };
        let Content::Mapped(mapping) = &body.content else { return Ok(Rival::PointsElsewhere) };
        let walked = self.walk(fd, &root, mapping).await?;
        let place = self.shape().place(entry.index.into());
        let Some(unit) = walked.blocks.get(&place.pb) else {
            return Ok(if walked.broken { Rival::Unreadable } else { Rival::PointsElsewhere });
        };
        let claimed = Claimed { owner: fd, kind: EntryKind::PointerBlock, index: place.pb };
        let cells = self.cells(*unit, self.ground.context().cell_size.cells_per_unit(), &claimed, root.link).await?;
        let Some(Some(cell)) = cells.get(place.cell) else { return Ok(Rival::Unreadable) };
        let stored = stored_at(cell.payload(), place.nth, "PB cell").unwrap_or(0);
        Ok(match BlockPointer::unpack(stored) {
            Ok(Some(pointer)) if pointer.at == at => Rival::PointsHere,
            _ => Rival::PointsElsewhere,
        })
    }
}
