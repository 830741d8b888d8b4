//! Owns: the order in which a new volume is written.
//! Promises: the old header goes first and the new one comes last, so an interrupted mkfs is no volume; one large write at a time.
//! Must not know: what was there before (the plan does).

use std::rc::Rc;

use futures_util::future::join;

use super::{MkfsPlan, PlannedLun};
use crate::buf::AlignedBuf;
use crate::container::{FORMATTED_SEQ, Formatter, first_unit, unit_offset, unit_table};
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Arena;
use crate::format::body::{Attributes, Body, Content};
use crate::format::header::{LunHeader, MemberState};
use crate::format::heartbeat::Heartbeat;
use crate::format::layout::{
    ARENA_OFFSET, FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, HEARTBEAT_OFFSET, ROOT_LINK, entries_per_cell,
};
use crate::format::member::Member;
use crate::format::root_cell::{HoldMode, LockRecord, LunSet, ObjectFlags, ObjectState, ObjectType, RootCell, Unclean};
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::format::unit::{UnitRef, cells_for};
use crate::format::{Cell, CellContext, CellHeader, CellKind, layout};
use crate::lun::Lun;
use crate::units::{
    BlockAddress, BlockNo, CellAddress, FdId, Generation, Link, LunIndex, MAX_MEMBERS, OpId, SLOTS, Seq, SlotId,
    SlotRef, Token, UnitAddress,
};

/// Bytes of one write of the block table.
const CHUNK: usize = 4 << 20;
/// Block of the first LUN that holds the first root cells.
const FIRST_FD_CONTAINER: BlockNo = BlockNo::new(0).unwrap();
/// Block of the first LUN that holds the first units.
const FIRST_UNIT_CONTAINER: BlockNo = BlockNo::new(1).unwrap();

/// How far mkfs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written.
    pub done_bytes: u64,
    /// Bytes to write in all.
    pub total_bytes: u64,
}

/// What mkfs did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MkfsSummary {
    /// Bytes written.
    pub written_bytes: u64,
    /// Blocks of all LUNs.
    pub blocks: u64,
    /// Blocks in use: the two containers of the root directory.
    pub used_blocks: u64,
    /// The root directory.
    pub root: FdId,
}

/// Makes the volume. `luns` are the ones the plan was made for, in the same order.
pub async fn execute(
    env: &Rc<dyn Env>,
    luns: &[Rc<dyn Lun>],
    plan: &MkfsPlan,
    progress: &mut dyn FnMut(Progress),
) -> Result<MkfsSummary, FsError> {
    let unchanged = luns.len() == plan.luns.len() && luns.iter().zip(&plan.luns).all(|(lun, p)| lun.bytes() == p.bytes);
    if !unchanged {
        let message = "the LUNs are not those that the plan was made for, or one changed its size; plan again";
        return Err(FsError::refused(FsErrorKind::Invalid, message));
    }
    let total_bytes = plan.luns.iter().map(|lun| bytes_of(plan, lun)).sum();
    let mut making =
        Making { env, plan, context: plan.context(), progress, done: Progress { done_bytes: 0, total_bytes } };
    let each = || luns.iter().zip(&plan.luns);
    for (lun, _) in each() {
        lun.evict().await?;
        making.write(lun, HEADER_OFFSET, AlignedBuf::zeroed(HEADER_AREA)).await?;
    }
    for (lun, planned) in each() {
        making.write_slots(lun, planned).await?;
        making.write_block_table(lun, planned).await?;
    }
    making.write_root(&luns[0], &plan.luns[0]).await?;
    let members: Vec<Member> = plan.luns.iter().map(active_member).collect();
    for (lun, planned) in each() {
        making.write_members(lun, planned, &members).await?;
    }
    // The first LUN holds the root directory: its header is the very last write.
    for (lun, planned) in each().rev() {
        let header = making.header(planned);
        making.write_header(lun, planned, &header).await?;
    }
    Ok(MkfsSummary {
        written_bytes: making.done.done_bytes,
        blocks: plan.luns.iter().map(|lun| lun.layout.block_count()).sum(),
        used_blocks: 2,
        root: root_fd(),
    })
}

/// Formats the one LUN of `plan` as a further member of a volume: with these member cells, and at last with this header.
pub(super) async fn execute_member(
    env: &Rc<dyn Env>,
    lun: &Rc<dyn Lun>,
    plan: &MkfsPlan,
    members: &[Member],
    header: &LunHeader,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let planned = &plan.luns[0];
    let total_bytes = bytes_of(plan, planned);
    let mut making =
        Making { env, plan, context: plan.context(), progress, done: Progress { done_bytes: 0, total_bytes } };
    lun.evict().await?;
    making.write(lun, HEADER_OFFSET, AlignedBuf::zeroed(HEADER_AREA)).await?;
    making.write_slots(lun, planned).await?;
    making.write_block_table(lun, planned).await?;
    making.write_members(lun, planned, members).await?;
    lun.flush().await?;
    making.write_header(lun, planned, header).await?;
    lun.flush().await?;
    Ok(())
}

fn active_member(planned: &PlannedLun) -> Member {
    Member {
        lun_uuid: planned.lun_uuid,
        lun_bytes: planned.bytes,
        index: planned.index(),
        state: MemberState::Active,
        identity: planned.identity.clone(),
        window: None,
    }
}

const HEADER_AREA: usize = (HEADER_COPY_OFFSET + FIXED_STRIDE - HEADER_OFFSET) as usize;
const SLOT_AREA: usize = SLOTS * FIXED_STRIDE as usize;

fn root_fd() -> FdId {
    let lun = LunIndex::new(1).expect("1 is a LUN index");
    FdId::new(BlockAddress { lun, block: FIRST_FD_CONTAINER }, 0).expect("cell 0 is in every container")
}

fn table_bytes(plan: &MkfsPlan, lun: &PlannedLun) -> u64 {
    lun.layout.table_cell_count() * plan.cell_size.bytes() as u64
}

fn bytes_of(plan: &MkfsPlan, lun: &PlannedLun) -> u64 {
    let containers = if lun.index().get() == 1 { 2 * plan.options.block_size.bytes() } else { 0 };
    (2 * HEADER_AREA + 2 * SLOT_AREA) as u64 + table_bytes(plan, lun) + containers
}

struct Making<'a> {
    env: &'a Rc<dyn Env>,
    plan: &'a MkfsPlan,
    context: CellContext,
    progress: &'a mut dyn FnMut(Progress),
    done: Progress,
}

/// The header of a cell as mkfs leaves it.
fn fresh(address: CellAddress, kind: CellKind, op_id: OpId) -> CellHeader {
    CellHeader {
        kind,
        address,
        seq: FORMATTED_SEQ,
        op_id,
        writer: SlotRef::NOBODY,
        owner: None,
        link: Link(0),
        index: 0,
        token: Token(0),
    }
}

impl Making<'_> {
    async fn write(&mut self, lun: &Rc<dyn Lun>, offset: u64, data: AlignedBuf) -> Result<(), FsError> {
        let bytes = data.len() as u64;
        lun.write(offset, data).await?;
        self.count(bytes);
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.done.done_bytes += bytes;
        (self.progress)(Progress { done_bytes: self.done.done_bytes.min(self.done.total_bytes), ..self.done });
    }

    fn op_ids(&self, count: usize) -> Vec<OpId> {
        let mut bytes = vec![0; count * 16];
        self.env.random(&mut bytes);
        bytes.as_chunks().0.iter().map(|chunk| OpId(*chunk)).collect()
    }

    /// An area of fixed cells, one every 4 KiB from `first` on; `content` gives the payload of each.
    fn fixed_area(
        &self,
        first: CellAddress,
        kind: CellKind,
        count: usize,
        content: impl Fn(usize) -> Vec<u8>,
    ) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(count * FIXED_STRIDE as usize);
        let op_ids = self.op_ids(count);
        for (nth, place) in buf.chunks_exact_mut(FIXED_STRIDE as usize).enumerate() {
            let at = CellAddress { offset: first.offset + nth as u64 * FIXED_STRIDE, ..first };
            let image = &mut place[..self.context.cell_size.bytes()];
            Cell::encode_into(&self.context, &fresh(at, kind, op_ids[nth]), &content(nth), image);
        }
        buf
    }

    async fn write_slots(&mut self, lun: &Rc<dyn Lun>, planned: &PlannedLun) -> Result<(), FsError> {
        let heartbeats = layout::heartbeat_cell(planned.index(), SlotId(0));
        let free = Heartbeat::free().encode();
        let area = self.fixed_area(heartbeats, CellKind::Heartbeat, SLOTS, |_| free.clone());
        self.write(lun, HEARTBEAT_OFFSET, area).await?;
        let arenas = layout::arena_cell(planned.index(), SlotId(0));
        let empty = Arena { generation: Generation(0), anywhere: false, places: Vec::new() }.encode();
        let area = self.fixed_area(arenas, CellKind::Arena, SLOTS, |_| empty.clone());
        self.write(lun, ARENA_OFFSET, area).await
    }

    /// Writes the block table in large pieces; the next piece is made while the one before is written.
    async fn write_block_table(&mut self, lun: &Rc<dyn Lun>, planned: &PlannedLun) -> Result<(), FsError> {
        let cells = planned.layout.table_cell_count();
        let per_chunk = (CHUNK / self.context.cell_size.bytes()) as u64;
        let mut next = Some(self.table_chunk(lun, planned, 0, per_chunk.min(cells)));
        let mut first = 0;
        while let Some(chunk) = next.take() {
            let written = per_chunk.min(cells - first);
            let offset = table_address(planned, first).offset;
            first += written;
            let (result, made) = join(lun.write(offset, chunk), async {
                (first < cells).then(|| self.table_chunk(lun, planned, first, per_chunk.min(cells - first)))
            })
            .await;
            result?;
            next = made;
            self.count(written * self.context.cell_size.bytes() as u64);
        }
        Ok(())
    }

    fn table_chunk(&self, lun: &Rc<dyn Lun>, planned: &PlannedLun, first: u64, cells: u64) -> AlignedBuf {
        let size = self.context.cell_size.bytes();
        let length = cells as usize * size;
        // What is added to the last piece to align it lies between the table and the first block.
        let mut buf = AlignedBuf::zeroed(length.next_multiple_of(lun.alignment()));
        let op_ids = self.op_ids(cells as usize);
        for (nth, image) in buf[..length].chunks_exact_mut(size).enumerate() {
            let cell = first + nth as u64;
            let payload = if cell == 0 { first_table_cell(self.plan, planned) } else { Vec::new() };
            let header = fresh(table_address(planned, cell), CellKind::BlockTable, op_ids[nth]);
            Cell::encode_into(&self.context, &header, &payload, image);
        }
        buf
    }

    /// The first FD container with the root directory's root cell and the first unit container with its body.
    async fn write_root(&mut self, lun: &Rc<dyn Lun>, planned: &PlannedLun) -> Result<(), FsError> {
        let layout = &planned.layout;
        let root_unit = UnitAddress { lun: planned.index(), block: FIRST_UNIT_CONTAINER, unit: first_unit(layout) };
        let missing = || FsError::refused(FsErrorKind::Invalid, format!("{}: too few blocks", planned.name));
        let env = self.env.clone();
        let mut op_id = || {
            let mut bytes = [0; 16];
            env.random(&mut bytes);
            OpId(bytes)
        };
        let mut formatter = Formatter { context: &self.context, layout, writer: SlotRef::NOBODY, op_id: &mut op_id };
        let mut units = formatter.unit_container(FIRST_UNIT_CONTAINER).ok_or_else(missing)?;
        let mut roots = formatter.fd_container(FIRST_FD_CONTAINER).ok_or_else(missing)?;
        let body = root_body(self.plan, self.env.wall_ns()).encode();
        let body = self.put_root_unit(&mut units, planned, root_unit, &body);
        self.put_root_cell(&mut roots, planned, body);
        let place = |block| layout.block_offset(block).ok_or_else(missing);
        self.write(lun, place(FIRST_UNIT_CONTAINER)?, units).await?;
        self.write(lun, place(FIRST_FD_CONTAINER)?, roots).await
    }

    /// Enters the root directory's body unit into a fresh unit container: its table entry and its cells.
    fn put_root_unit(&self, units: &mut [u8], planned: &PlannedLun, unit: UnitAddress, body: &[u8]) -> UnitRef {
        let (layout, size) = (&planned.layout, self.context.cell_size.bytes());
        let start = layout.block_offset(unit.block).expect("the container was made");
        let used = cells_for(self.context.cell_size, body.len()).expect("an empty directory fits a unit");
        let op_ids = self.op_ids(usize::from(used) + 1);
        let (table_at, nth) = layout.unit_table_entry(unit).expect("the unit follows the table");
        let from = (table_at.offset - start) as usize;
        let mut table = unit_table(layout).swap_remove(from / size);
        table.entries[nth] = TableEntry { fd: root_fd().get(), kind: EntryKind::Body, ..TableEntry::FREE };
        let header = fresh(table_at, CellKind::UnitTable, op_ids[0]);
        Cell::encode_into(&self.context, &header, &table.encode(), &mut units[from..from + size]);
        let (mut crc, first) = (0, unit_offset(unit.unit));
        for (nth, payload) in body.chunks(self.context.cell_size.payload()).enumerate() {
            let from = first as usize + nth * size;
            let at = CellAddress { lun: unit.lun, offset: start + from as u64 };
            let header =
                CellHeader { owner: Some(root_fd()), link: ROOT_LINK, ..fresh(at, CellKind::Body, op_ids[nth + 1]) };
            let image = &mut units[from..from + size];
            Cell::encode_into(&self.context, &header, payload, image);
            crc = crc32c::crc32c_append(crc, image);
        }
        // The root cell was never anything else: the image that its commit replaced has seq 0.
        UnitRef { at: unit, used_cells: used, crc, birth: 0 }
    }

    fn put_root_cell(&self, roots: &mut [u8], planned: &PlannedLun, body: UnitRef) {
        let at = planned.layout.root_cell(root_fd()).expect("the container was made");
        let header = CellHeader {
            seq: Seq(1),
            owner: Some(root_fd()),
            link: ROOT_LINK,
            ..fresh(at, CellKind::Root, self.op_ids(1)[0])
        };
        let root = RootCell {
            state: ObjectState::Live,
            object_type: Some(ObjectType::Directory),
            flags: ObjectFlags::empty(),
            parent: Some(root_fd()),
            lock: LockRecord { mode: HoldMode::Free, token: Token(0), holders: Vec::new(), wanted: false },
            unclean: Unclean::default(),
            luns: LunSet::of(planned.index()),
            body: Some(body),
        };
        let size = self.context.cell_size.bytes();
        Cell::encode_into(&self.context, &header, &root.encode(), &mut roots[..size]);
    }

    /// All member cells, those of `members` filled; the header and its copy stay invalid.
    async fn write_members(
        &mut self,
        lun: &Rc<dyn Lun>,
        planned: &PlannedLun,
        members: &[Member],
    ) -> Result<(), FsError> {
        let first = layout::member_cell(planned.index(), LunIndex::new(1).expect("1 is a LUN index"));
        let area = self.fixed_area(first, CellKind::Member, MAX_MEMBERS, |nth| {
            let index = LunIndex::new(nth as u8 + 1).expect("the members are 1 to 254");
            match members.iter().find(|member| member.index == index) {
                None => Member::free(index).encode(),
                Some(member) => member.encode(),
            }
        });
        self.write(lun, first.offset, area).await
    }

    /// The header of a member of a new volume.
    fn header(&self, planned: &PlannedLun) -> LunHeader {
        let plan = self.plan;
        LunHeader {
            lun_uuid: planned.lun_uuid,
            lun_index: planned.index(),
            state: MemberState::Active,
            block_size: plan.options.block_size,
            lock_mode: plan.lock_mode,
            member_count: plan.luns.len() as u16,
            lease: plan.options.lease,
            volume_generation: 1,
            lun_bytes: planned.bytes,
            created_s: u64::try_from(self.env.wall_ns() / 1_000_000_000).unwrap_or(0),
            root: root_fd(),
            compatible: 0,
            read_only_compatible: 0,
            incompatible: 0,
            label: plan.options.label.clone(),
            identity: planned.identity.clone(),
            segments: planned.layout.segments.clone(),
            growing: SlotRef::NOBODY,
            volume: None,
            window: None,
        }
    }

    /// The copy, then the header: from here on this is what the header says.
    async fn write_header(
        &mut self,
        lun: &Rc<dyn Lun>,
        planned: &PlannedLun,
        header: &LunHeader,
    ) -> Result<(), FsError> {
        let payload = header.encode();
        for at in [layout::header_copy_cell(planned.index()), layout::header_cell(planned.index())] {
            let area = self.fixed_area(at, CellKind::Header, 1, |_| payload.clone());
            self.write(lun, at.offset, area).await?;
        }
        Ok(())
    }
}

fn table_address(planned: &PlannedLun, cell: u64) -> CellAddress {
    planned.layout.table_cell(cell).expect("the table has this cell").0
}

/// The first cell of a LUN's block table: on the first LUN it has the two containers, elsewhere nothing.
fn first_table_cell(plan: &MkfsPlan, planned: &PlannedLun) -> Vec<u8> {
    let mut table = TableCell::free(plan.cell_size);
    if planned.index().get() == 1 {
        let containers =
            [(FIRST_FD_CONTAINER, EntryKind::FdContainer), (FIRST_UNIT_CONTAINER, EntryKind::UnitContainer)];
        for (block, kind) in containers {
            table.entries[block.get() as usize % entries_per_cell(plan.cell_size)] =
                TableEntry { kind, ..TableEntry::FREE };
        }
    }
    table.encode()
}

/// The body of an empty root directory.
fn root_body(plan: &MkfsPlan, now_ns: i64) -> Body {
    Body {
        attributes: Attributes {
            mode: plan.options.root_mode,
            uid: plan.options.root_uid,
            gid: plan.options.root_gid,
            size: 0,
            blocks: 0,
            accessed_ns: now_ns,
            modified_ns: now_ns,
            changed_ns: now_ns,
            born_ns: now_ns,
            disk: None,
            name: Vec::new(),
        },
        content: Content::Entries(Vec::new()),
    }
}
