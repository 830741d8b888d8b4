//! Owns: structures as text for people.
//! Promises: it only reads; what fails its checks is shown as that.
//! Must not know: how the text is printed.

use std::fmt::Write;
use std::rc::Rc;

use super::{Inner, words};
use crate::error::FsError;
use crate::format::arena::Arena;
use crate::format::dirent::ObjectRef;
use crate::format::header::LunHeader;
use crate::format::heartbeat::Heartbeat;
use crate::format::member::Member;
use crate::format::moved::{MapCell, Moved};
use crate::format::pointer::pointer_at;
use crate::format::root_cell::RootCell;
use crate::format::table_entry::{EntryKind, TableCell};
use crate::format::{Cell, CellKind, FormatError, layout};
use crate::units::{CellAddress, CellSize, FdId};

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DumpTarget {
    /// An object: root cell and body. The link is not compared.
    Object(FdId),
    /// One cell.
    Cell(CellAddress),
}

impl From<ObjectRef> for DumpTarget {
    fn from(object: ObjectRef) -> DumpTarget {
        DumpTarget::Object(object.fd)
    }
}

pub(super) async fn dump(inner: &Rc<Inner>, what: DumpTarget) -> Result<String, FsError> {
    match what {
        DumpTarget::Cell(at) => {
            let cell = inner.context.read_cell(at).await?;
            Ok(show_cell(inner.info.cell_size, &cell))
        }
        DumpTarget::Object(fd) => {
            let (cell, root) = inner.objects.read_root(fd).await?;
            let mut text = show_cell(inner.info.cell_size, &cell);
            if root.body.is_some()
                && let Ok(object) = inner.objects.load_any(fd).await
            {
                let body = &object.image().body;
                text.push_str(&words::attributes(&body.attributes));
                text.push_str(&words::content(&body.content));
            }
            Ok(text)
        }
    }
}

/// A cell's header and payload in words.
pub(crate) fn show_cell(size: CellSize, cell: &Cell) -> String {
    let mut text = words::cell_header(cell.header());
    let shown = match show_payload(size, cell) {
        Ok(shown) => shown,
        Err(error) => format!("the payload fails its checks: {error}\n"),
    };
    text.push_str(&shown);
    text
}

fn show_payload(size: CellSize, cell: &Cell) -> Result<String, FormatError> {
    let payload = cell.payload();
    Ok(match cell.header().kind {
        CellKind::Header => words::lun_header(&LunHeader::decode(size, payload)?),
        CellKind::Member => words::member(&Member::decode(payload)?),
        CellKind::Heartbeat => words::heartbeat(&Heartbeat::decode(payload)?),
        CellKind::Arena => words::arena(&Arena::decode(size, payload)?),
        CellKind::Root => words::root_cell(&RootCell::decode(size, payload)?),
        CellKind::BlockTable | CellKind::UnitTable => {
            let mut text = String::new();
            for (nth, entry) in TableCell::decode(size, payload)?.entries.iter().enumerate() {
                if entry.kind != EntryKind::Free {
                    writeln!(text, "  entry {nth}: {}", words::table_entry(entry)).expect("a String takes everything");
                }
            }
            text
        }
        CellKind::PointerBlock => {
            let mut text = String::new();
            for nth in 0..layout::pointers_per_cell(size) {
                if let Some(pointer) = pointer_at(payload, nth)? {
                    writeln!(text, "  pointer {nth}: {} valid {:016b}", pointer.at, pointer.valid.0)
                        .expect("a String takes everything");
                }
            }
            text
        }
        CellKind::Blank => "blank\n".to_owned(),
        CellKind::Moved => words::moved(&Moved::decode(payload)?),
        CellKind::WindowMap => words::window_map(&MapCell::decode(size, payload)?),
        CellKind::Body | CellKind::Inner | CellKind::Bucket => {
            let mut text = String::new();
            for (nth, line) in payload.chunks(32).enumerate() {
                if line.iter().any(|byte| *byte != 0) {
                    let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
                    writeln!(text, "  {:4}: {hex}", nth * 32).expect("a String takes everything");
                }
            }
            text
        }
    })
}
