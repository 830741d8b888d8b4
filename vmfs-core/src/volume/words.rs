//! Owns: decoded structures as lines of text, with the field names of FORMAT.md.
//! Promises: every field of a structure is there, numbers as messages give them, times as dates.
//! Must not know: where a structure was read.

use std::fmt::{self, Display, Write};

use super::explain::Date;
use crate::format::CellHeader;
use crate::format::arena::{Arena, Place};
use crate::format::body::{Attributes, Content, MappingRoot};
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::header::{DeviceIdentity, LeaseTimes, LunHeader};
use crate::format::heartbeat::Heartbeat;
use crate::format::member::Member;
use crate::format::moved::{MapCell, Moved};
use crate::format::root_cell::{Holder, ObjectState, RootCell};
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::format::unit::UnitRef;
use crate::units::{CellAddress, FdId, SlotRef};

/// Lines of "  field   value".
#[derive(Default)]
pub(crate) struct Lines(String);

impl Lines {
    fn field(&mut self, name: &str, value: impl Display) -> &mut Lines {
        writeln!(self.0, "  {name:<20} {value}").expect("a String takes everything");
        self
    }

    /// The text.
    pub fn text(self) -> String {
        self.0
    }
}

/// The debug form in lower case: names of kinds and states are single words.
fn word(value: impl fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

fn optional<T: Display>(value: Option<T>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| value.to_string())
}

fn identity(identity: &DeviceIdentity) -> String {
    if identity.bytes().is_empty() { "unknown".to_owned() } else { identity.bytes().escape_ascii().to_string() }
}

fn lease(times: &LeaseTimes) -> String {
    let LeaseTimes { lease_ms, renew_ms, margin_ms, clock_ppm } = times;
    format!("{lease_ms} ms, renewed every {renew_ms} ms, margin {margin_ms} ms, clocks within {clock_ppm} ppm")
}

fn time(seconds: u64) -> String {
    if seconds == 0 { "never".to_owned() } else { Date(seconds).to_string() }
}

fn time_ns(ns: i64) -> String {
    match u64::try_from(ns) {
        Ok(ns) => format!("{} and {} ns", Date(ns / 1_000_000_000), ns % 1_000_000_000),
        Err(_) => format!("{ns} ns before 1970"),
    }
}

fn holder(holder: &Holder) -> String {
    format!("{} of incarnation {:#x}", holder.slot, holder.incarnation)
}

fn nobody(slot: SlotRef) -> String {
    if slot == SlotRef::NOBODY { "nobody".to_owned() } else { slot.to_string() }
}

/// A unit reference.
pub(crate) fn unit(unit: &UnitRef) -> String {
    format!("{}, {} cells, crc {:#010x}, birth {}", unit.at, unit.used_cells, unit.crc, unit.birth)
}

/// An object and its counter.
fn object(object: &ObjectRef) -> String {
    format!("{} link {}", object.fd, object.link)
}

pub(crate) fn cell_header(header: &CellHeader) -> String {
    let CellHeader { kind, address, seq, op_id, writer, owner, link, index, token } = header;
    let mut lines = Lines(format!("{} cell {address}\n", word(kind)));
    let op: String = op_id.0.iter().map(|byte| format!("{byte:02x}")).collect();
    lines.field("seq", seq).field("op_id", op).field("writer", nobody(*writer));
    lines.field("owner", optional(*owner)).field("link", link).field("index", index).field("token", token);
    lines.text()
}

pub(crate) fn lun_header(header: &LunHeader) -> String {
    let mut lines = Lines::default();
    lines.field("label", &header.label).field("lun_uuid", header.lun_uuid).field("lun_index", header.lun_index);
    lines.field("state", word(header.state)).field("lock_mode", word(header.lock_mode));
    lines.field("block_size", format!("{} bytes", header.block_size.bytes()));
    lines.field("member_count", header.member_count).field("volume_generation", header.volume_generation);
    lines.field("lun_bytes", header.lun_bytes).field("created", time(header.created_s)).field("root", header.root);
    lines.field("lease", lease(&header.lease)).field("identity", identity(&header.identity));
    lines.field("compatible", format!("{:#x}", header.compatible));
    lines.field("read_only_compatible", format!("{:#x}", header.read_only_compatible));
    lines.field("incompatible", format!("{:#x}", header.incompatible));
    if let Some(volume) = header.volume {
        lines.field("volume", volume);
    }
    for segment in &header.segments {
        let first = segment.first_block;
        let blocks = format!("blocks {first}..{}", first + segment.block_count);
        lines.field(
            "segment",
            format!("{blocks}, table at {:#x}, data at {:#x}", segment.table_offset, segment.data_offset),
        );
    }
    if header.growing != SlotRef::NOBODY {
        lines.field("growing", header.growing);
    }
    if let Some(window) = header.window {
        lines.field("window", window);
    }
    lines.text()
}

pub(crate) fn member(member: &Member) -> String {
    let Member { lun_uuid, lun_bytes, index, state, identity: device, window } = member;
    let mut lines = Lines::default();
    lines.field("lun_uuid", lun_uuid).field("lun_bytes", lun_bytes).field("index", index);
    lines.field("state", word(state)).field("identity", identity(device));
    if let Some(window) = window {
        lines.field("window", window);
    }
    lines.text()
}

pub(crate) fn moved(moved: &Moved) -> String {
    let at = CellAddress { lun: moved.carrier, offset: moved.offset };
    let window = CellAddress { lun: moved.carrier, offset: moved.window };
    let mut lines = Lines::default();
    lines.field("moved_to", at).field("window", window);
    lines.text()
}

pub(crate) fn window_map(map: &MapCell) -> String {
    let mut lines = Lines::default();
    lines.field("window_of", map.lun).field("lun_bytes", map.lun_bytes).field("pieces", map.total);
    for piece in &map.pieces {
        lines.field("piece", format!("{:#x}..{:#x}", piece.from, piece.from + piece.length));
    }
    lines.text()
}

pub(crate) fn heartbeat(slot: &Heartbeat) -> String {
    let mut lines = Lines::default();
    lines.field("state", word(slot.state)).field("generation", slot.generation);
    lines.field("host_name", &slot.host_name).field("host", slot.host).field("boot", slot.boot);
    lines.field("incarnation", format!("{:#x}", slot.incarnation)).field("beat", slot.beat);
    lines.field("live_since", time(slot.live_since_s)).field("lease", lease(&slot.lease));
    lines.field("fence_grade", word(slot.fence_grade));
    lines.field("reservation_key", format!("{:#x}", slot.reservation_key));
    lines.field("drop_lun", slot.drop_lun).field("drop_acknowledged", slot.drop_acknowledged);
    let breaker = &slot.breaker;
    let by = format!("{} of incarnation {:#x}, beat {}", nobody(breaker.slot), breaker.incarnation, breaker.beat);
    lines.field("breaker", by);
    lines.text()
}

pub(crate) fn arena(arena: &Arena) -> String {
    let Arena { generation, anywhere, places } = arena;
    let mut lines = Lines::default();
    lines.field("generation", generation).field("anywhere", anywhere).field("places", places.len());
    for place in places {
        match place {
            Place::TableCell(number) => lines.field("", format!("block table cell {number}")),
            Place::UnitContainer(block) => lines.field("", format!("unit container in block {block}")),
            Place::FdContainer(block) => lines.field("", format!("FD container in block {block}")),
        };
    }
    lines.text()
}

pub(crate) fn root_cell(root: &RootCell) -> String {
    let mut lines = Lines::default();
    let state = match root.state {
        ObjectState::Creating(by) => format!("creating by {by}"),
        ObjectState::Unlinking(by) => format!("unlinking by {by}"),
        ObjectState::Unlinked(by) => format!("unlinked by {by}"),
        ObjectState::Free | ObjectState::Live => word(root.state),
    };
    lines.field("state", state).field("type", root.object_type.map_or_else(|| "none".to_owned(), word));
    lines.field("flags", format!("{:#x}", root.flags.bits())).field("parent", optional(root.parent));
    let wanted = if root.lock.wanted { ", wanted by another host" } else { "" };
    lines.field("lock", format!("{}, token {}{wanted}", word(root.lock.mode), root.lock.token));
    for held in &root.lock.holders {
        lines.field("  held by", holder(held));
    }
    if root.unclean.token.0 != 0 {
        lines.field("unclean", format!("token {}, broken {}", root.unclean.token, holder(&root.unclean.broken)));
    }
    lines.field("luns", root.luns.iter().map(|lun| lun.to_string()).collect::<Vec<_>>().join(" "));
    lines.field("body", root.body.as_ref().map_or_else(|| "none".to_owned(), unit));
    lines.text()
}

/// An entry of a block or unit table.
pub(crate) fn table_entry(entry: &TableEntry) -> String {
    let by = format!("slot{} generation ..{:02x}", entry.slot.0, entry.generation_low);
    let owner = FdId::from_stored(entry.fd).map_or_else(String::new, |fd| format!(" {} of {fd}", entry.index));
    match entry.kind {
        EntryKind::Free => "free".to_owned(),
        EntryKind::FdContainer => "FD container".to_owned(),
        EntryKind::UnitContainer => "unit container".to_owned(),
        EntryKind::Retiring => format!("retiring, was {}{owner}, by {by}", word(entry.was)),
        EntryKind::Quarantine => format!("quarantine for {}", optional(SlotRef::unpack(entry.fd))),
        kind => format!("{}{owner}, by {by}", word(kind)),
    }
}

pub(crate) fn attributes(attributes: &Attributes) -> String {
    let mut lines = Lines("attributes\n".to_owned());
    lines.field("name", attributes.name.escape_ascii()).field("mode", format!("{:04o}", attributes.mode));
    lines.field("uid", attributes.uid).field("gid", attributes.gid);
    lines.field("size", attributes.size).field("blocks", attributes.blocks);
    lines.field("accessed", time_ns(attributes.accessed_ns)).field("modified", time_ns(attributes.modified_ns));
    lines.field("changed", time_ns(attributes.changed_ns)).field("born", time_ns(attributes.born_ns));
    lines.field("disk", attributes.disk.map_or_else(|| "no".to_owned(), word));
    lines.text()
}

pub(crate) fn content(content: &Content) -> String {
    let mut lines = Lines::default();
    match content {
        Content::Inline(bytes) => return format!("content: {} bytes in the body\n", bytes.len()),
        Content::Symlink(target) => return format!("content: a link to \"{}\"\n", target.escape_ascii()),
        Content::Raw(device) => {
            let how = if device.physical { "physical" } else { "virtual" };
            return format!("content: raw device {}, {how} compatibility\n", identity(&device.identity));
        }
        Content::Entries(entries) => {
            lines.0 = format!("content: {} entries in the body\n", entries.len());
            for entry in entries {
                lines.field(&word(entry.object_type), dirent(entry));
            }
        }
        Content::Buckets { depth, refs } => {
            lines.0 = format!("content: directory tree of depth {depth}\n");
            numbered(&mut lines, refs.iter().map(|reference| reference.as_ref().map(unit)));
        }
        Content::Mapped(MappingRoot::PointerBlocks(blocks)) => {
            lines.0 = "content: mapping of height 2, pointer blocks\n".to_owned();
            numbered(&mut lines, blocks.iter().map(|at| at.map(|at| at.to_string())));
        }
        Content::Mapped(MappingRoot::Inner { height, refs }) => {
            lines.0 = format!("content: mapping of height {height}, inner units\n");
            numbered(&mut lines, refs.iter().map(|reference| reference.as_ref().map(unit)));
        }
    }
    lines.text()
}

/// Those that are there, by number.
fn numbered(lines: &mut Lines, all: impl Iterator<Item = Option<String>>) {
    for (nth, there) in all.enumerate() {
        if let Some(there) = there {
            lines.field(&nth.to_string(), there);
        }
    }
}

fn dirent(entry: &Dirent) -> String {
    let pending = match &entry.pending {
        None if entry.leaving => ", leaving".to_owned(),
        None => String::new(),
        Some(None) => ", pending".to_owned(),
        Some(Some(replaced)) => format!(", pending, replaces {}", object(replaced)),
    };
    format!("\"{}\" {}{pending}", entry.name.escape_ascii(), object(&entry.child))
}
