//! Owns: a member's LUN whose cells may leave it: every command goes to where its cells are.
//! Promises: a cell is one register wherever it lies: a read gives, and a compare-and-write compares with, what is in its one valid place.
//! Must not know: who moves cells, what they mean.
//!
//! ```text
//! own LUN (no cell has left) ──> a read meets a cell that has left: moving ──> the header has left: the window alone is used
//! ```

use std::cell::{Cell as StdCell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use super::Carriers;
use super::map::{self, Window};
use crate::buf::AlignedBuf;
use crate::env::LocalFuture;
use crate::format::cell::CELL_MAGIC;
use crate::format::header::{DeviceIdentity, LockMode};
use crate::format::layout::HEADER_OFFSET;
use crate::format::moved::Moved;
use crate::format::{Cell, CellContext, CellKind};
use crate::lun::{CompareAndWrite, Compared, DataLun, Fencing, Lun, LunError, LunErrorKind, PathOwner, Reservation};
use crate::units::{CellAddress, CellSize, LunIndex, SlotId};

#[derive(Clone)]
enum Route {
    Own(Rc<dyn Lun>),
    Window(Rc<Window>),
}

/// The LUN of a member: its own device, or the window that carries its cells.
pub struct MemberLun {
    context: CellContext,
    index: LunIndex,
    name: String,
    carriers: Carriers,
    route: RefCell<Route>,
    /// A cell that has left was met.
    moving: StdCell<bool>,
    /// The former device, whose paths are marked still.
    former: RefCell<Option<Rc<dyn Lun>>>,
}

/// A cell that has left, as a read met it: where its image is in the buffer, and where it is now.
struct Met {
    at: usize,
    from: u64,
    moved: Moved,
}

impl MemberLun {
    pub(super) fn new(context: CellContext, index: LunIndex, carriers: Carriers, own: Rc<dyn Lun>) -> MemberLun {
        let name = own.name().to_owned();
        MemberLun::with(context, index, name, carriers, Route::Own(own))
    }

    pub(super) fn of_window(context: CellContext, carriers: Carriers, window: Window) -> MemberLun {
        let name = format!("{} in {}", window.lun, window.carrier.name());
        MemberLun::with(context, window.lun, name, carriers, Route::Window(Rc::new(window)))
    }

    fn with(context: CellContext, index: LunIndex, name: String, carriers: Carriers, route: Route) -> MemberLun {
        let (route, moving, former) = (RefCell::new(route), StdCell::new(false), RefCell::default());
        MemberLun { context, index, name, carriers, route, moving, former }
    }

    fn route(&self) -> Route {
        self.route.borrow().clone()
    }

    /// The LUN that commands that are not about moved cells go to.
    fn under(&self) -> Rc<dyn Lun> {
        match self.route() {
            Route::Own(own) => own,
            Route::Window(window) => window.carrier.clone(),
        }
    }

    /// The own device, while it is in use.
    pub(crate) fn own(&self) -> Option<Rc<dyn Lun>> {
        match self.route() {
            Route::Own(own) => Some(own),
            Route::Window(_) => None,
        }
    }

    /// The window, once all cells are in it and it alone is used.
    pub fn window(&self) -> Option<Rc<Window>> {
        match self.route() {
            Route::Own(_) => None,
            Route::Window(window) => Some(window),
        }
    }

    /// Whether a cell was met that has left, and the own device is in use still: reading the header tells whether all have.
    pub fn is_moving(&self) -> bool {
        self.moving.get() && self.window().is_none()
    }

    /// Whether byte `offset` is there: of a LUN that was taken out only what came along is.
    pub fn holds(&self, offset: u64) -> bool {
        self.window().is_none_or(|window| window.holds(offset))
    }

    fn error(&self, kind: LunErrorKind, command: &'static str, range: (u64, u64), why: String) -> LunError {
        let cause = io::Error::other(why);
        LunError { kind, lun: self.name.clone(), command, offset: range.0, length: range.1, cause }
    }

    /// What the image of the cell at `offset` says, if the cell has left.
    fn moved_at(&self, offset: u64, image: &[u8]) -> Option<Moved> {
        if !image.starts_with(&CELL_MAGIC) || image[CELL_MAGIC.len()] != CellKind::Moved as u8 {
            return None;
        }
        let cell = Cell::decode(&self.context, CellAddress { lun: self.index, offset }, image).ok()?;
        cell.expect_kind(CellKind::Moved).ok()?;
        Moved::decode(cell.payload()).ok()
    }

    /// Puts the cells that have left in the place of what says so. `buf` holds ranges of `length` bytes that lie `stride` apart.
    async fn follow(
        &self,
        own: &Rc<dyn Lun>,
        buf: &mut AlignedBuf,
        (first, length, stride): (u64, usize, usize),
    ) -> Result<(), LunError> {
        let size = self.context.cell_size.bytes();
        let mut met: Vec<Met> = Vec::new();
        for (nth, range) in buf.chunks_exact(length.max(1)).enumerate() {
            for (step, image) in range.chunks_exact(size).enumerate() {
                let from = first + (nth * stride + step * size) as u64;
                if let Some(moved) = self.moved_at(from, image) {
                    met.push(Met { at: nth * length + step * size, from, moved });
                }
            }
        }
        if met.is_empty() {
            return Ok(());
        }
        self.moving.set(true);
        let mut rest = &met[..];
        while let Some(one) = rest.first() {
            let joins = |nth: usize, next: &Met| {
                let by = nth * size;
                next.at == one.at + by
                    && next.moved.carrier == one.moved.carrier
                    && next.moved.offset == one.moved.offset + by as u64
            };
            let count = rest.iter().enumerate().take_while(|(nth, next)| joins(*nth, next)).count();
            let carrier = self.carrier_of(&one.moved, (one.from, size as u64))?;
            let (start, skip, end) = widened(&carrier, one.moved.offset, count * size);
            let found = carrier.read(start, (end - start) as usize).await?;
            buf[one.at..one.at + count * size].copy_from_slice(&found[skip..skip + count * size]);
            rest = &rest[count..];
        }
        if let Some(header) = met.iter().find(|met| met.from == HEADER_OFFSET) {
            self.use_window(own, &header.moved).await?;
        }
        Ok(())
    }

    fn carrier_of(&self, moved: &Moved, range: (u64, u64)) -> Result<Rc<dyn Lun>, LunError> {
        self.carriers.get(moved.carrier).ok_or_else(|| {
            let why = format!("its cells are carried by {}, which is not there", moved.carrier);
            self.error(LunErrorKind::NotDone, "read", range, why)
        })
    }

    /// The header was the last cell to leave: the own device is not used any more.
    async fn use_window(&self, own: &Rc<dyn Lun>, header: &Moved) -> Result<(), LunError> {
        if self.window().is_some() {
            return Ok(());
        }
        let range = (header.window, 0);
        let carrier = self.carrier_of(header, range)?;
        // What says that the cells have left is to stand before the window is changed and nothing asks here any more.
        own.flush().await?;
        let at = CellAddress { lun: header.carrier, offset: header.window };
        let opened = Window::open(&self.context, carrier, at).await;
        let window = opened.map_err(|error| self.error(LunErrorKind::NotDone, "read", range, error.to_string()))?;
        if self.window().is_none() {
            tracing::info!(lun = %self.index, name = self.name, %at, "the LUN was taken out: its cells are in the window");
            if own.lock_mode() == LockMode::CompareAndWrite {
                *self.former.borrow_mut() = Some(own.clone());
            }
            *self.route.borrow_mut() = Route::Window(Rc::new(window));
            self.carriers.forget(self.index);
        }
        Ok(())
    }

    /// The compare-and-write of a cell that miscompared on the own device: again where the cell is, if it has left.
    async fn change_moved(
        &self,
        own: &Rc<dyn Lun>,
        offset: u64,
        expect: &[u8],
        new: &[u8],
    ) -> Result<Compared, LunError> {
        let (start, skip, end) = widened(own, offset, new.len());
        let found = own.read(start, (end - start) as usize).await?;
        let Some(moved) = self.moved_at(offset, &found[skip..skip + new.len()]) else {
            return Ok(Compared::Miscompare);
        };
        let carrier = self.carrier_of(&moved, (offset, new.len() as u64))?;
        // That the cell has left is to stand before it is changed there.
        own.flush().await.map_err(|error| LunError { kind: LunErrorKind::NotDone, ..error })?;
        carrier.compare_and_write(moved.offset, expect, new).await
    }

    /// A plain write while cells leave: each cell where it is. Only the checker rewrites cells that others have, and nobody uses the volume then.
    async fn write_moved(&self, own: &Rc<dyn Lun>, offset: u64, data: AlignedBuf) -> Result<(), LunError> {
        let size = self.context.cell_size.bytes();
        let found = own.read(offset, data.len()).await?;
        for (nth, (image, new)) in found.chunks(size).zip(data.chunks(size)).enumerate() {
            let at = offset + (nth * size) as u64;
            match self.moved_at(at, image) {
                Some(moved) => {
                    let carrier = self.carrier_of(&moved, (at, size as u64))?;
                    carrier.write(moved.offset, AlignedBuf::copy_of(new)).await?;
                }
                None => own.write(at, AlignedBuf::copy_of(new)).await?,
            }
        }
        Ok(())
    }

    fn placed(&self, window: &Window, command: &'static str, offset: u64, length: u64) -> Result<u64, LunError> {
        match map::find(&window.pieces, offset) {
            Some((to, together)) if together >= length => Ok(to),
            _ => {
                let why = format!("{} was taken out of the volume, and nothing of it is there", self.index);
                Err(self.error(LunErrorKind::OutOfRange, command, (offset, length), why))
            }
        }
    }

    /// The own device, for what only a LUN in use can do.
    fn only_own(&self, command: &'static str, offset: u64, length: u64) -> Result<Rc<dyn Lun>, LunError> {
        self.own().ok_or_else(|| {
            let why = format!("{} was taken out of the volume: there is no data on it", self.index);
            self.error(LunErrorKind::OutOfRange, command, (offset, length), why)
        })
    }
}

/// The aligned range of a LUN around a cell: start, what comes before the cell in it, end.
pub(super) fn widened(lun: &Rc<dyn Lun>, offset: u64, length: usize) -> (u64, usize, u64) {
    let alignment = lun.alignment() as u64;
    let start = offset - offset % alignment;
    (start, (offset - start) as usize, (offset + length as u64).next_multiple_of(alignment))
}

impl Lun for MemberLun {
    fn name(&self) -> &str {
        &self.name
    }

    fn bytes(&self) -> u64 {
        match self.route() {
            Route::Own(own) => own.bytes(),
            Route::Window(window) => window.lun_bytes,
        }
    }

    fn cell_size(&self) -> Option<CellSize> {
        self.under().cell_size()
    }

    fn alignment(&self) -> usize {
        self.under().alignment()
    }

    fn identity(&self) -> DeviceIdentity {
        self.own().map(|own| own.identity()).unwrap_or_default()
    }

    fn lock_mode(&self) -> LockMode {
        self.under().lock_mode()
    }

    fn read(&self, offset: u64, length: usize) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        Box::pin(async move {
            match self.route() {
                Route::Own(own) => {
                    let mut buf = own.read(offset, length).await?;
                    self.follow(&own, &mut buf, (offset, length, length)).await?;
                    Ok(buf)
                }
                Route::Window(window) => window.read(offset, length).await,
            }
        })
    }

    fn read_strided(
        &self,
        offset: u64,
        length: usize,
        stride: usize,
        count: usize,
    ) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        Box::pin(async move {
            match self.route() {
                Route::Own(own) => {
                    let mut buf = own.read_strided(offset, length, stride, count).await?;
                    self.follow(&own, &mut buf, (offset, length, stride)).await?;
                    Ok(buf)
                }
                Route::Window(window) => {
                    let bytes = (count.saturating_sub(1) * stride + length) as u64;
                    if let Ok(to) = self.placed(&window, "read", offset, bytes) {
                        return window.carrier.read_strided(to, length, stride, count).await;
                    }
                    let mut buf = window.read(offset, bytes as usize).await?;
                    (1..count).for_each(|nth| buf.copy_within(nth * stride..nth * stride + length, nth * length));
                    buf.truncate(count * length);
                    Ok(buf)
                }
            }
        })
    }

    fn write(&self, offset: u64, data: AlignedBuf) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            match self.route() {
                Route::Own(own) if self.moving.get() => self.write_moved(&own, offset, data).await,
                Route::Own(own) => own.write(offset, data).await,
                Route::Window(window) => {
                    let to = self.placed(&window, "write", offset, data.len() as u64)?;
                    window.carrier.write(to, data).await
                }
            }
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            self.under().flush().await?;
            // A change in doubt may be that of a cell that has left.
            for carrier in if self.is_moving() { self.carriers.all() } else { Vec::new() } {
                carrier.flush().await?;
            }
            Ok(())
        })
    }

    fn unmap(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move { self.only_own("unmap", offset, length)?.unmap(offset, length).await })
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move { self.only_own("write zeroes", offset, length)?.write_zeroes(offset, length).await })
    }

    fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> LocalFuture<'_, Result<Compared, LunError>> {
        let (expect, new) = (expect.to_vec(), new.to_vec());
        Box::pin(async move {
            match self.route() {
                Route::Own(own) => match own.compare_and_write(offset, &expect, &new).await {
                    Ok(Compared::Miscompare) if self.moving.get() => {
                        self.change_moved(&own, offset, &expect, &new).await
                    }
                    answer => answer,
                },
                Route::Window(window) => {
                    let to = self.placed(&window, "compare-and-write", offset, new.len() as u64)?;
                    window.carrier.compare_and_write(to, &expect, &new).await
                }
            }
        })
    }

    fn compare_and_write_many<'a>(
        &'a self,
        cells: &'a [CompareAndWrite<'a>],
    ) -> LocalFuture<'a, Vec<Result<Compared, LunError>>> {
        Box::pin(async move {
            match self.route() {
                Route::Own(own) => {
                    let mut answers = own.compare_and_write_many(cells).await;
                    if self.moving.get() {
                        for (cell, answer) in cells.iter().zip(&mut answers) {
                            if matches!(answer, Ok(Compared::Miscompare)) {
                                *answer = self.change_moved(&own, cell.offset, cell.expect, cell.new).await;
                            }
                        }
                    }
                    answers
                }
                Route::Window(window) => {
                    let command = "compare-and-write";
                    let there = |cell: &CompareAndWrite<'a>| {
                        let to = self.placed(&window, command, cell.offset, cell.new.len() as u64);
                        to.map(|offset| CompareAndWrite { offset, ..*cell })
                    };
                    match cells.iter().map(there).collect::<Result<Vec<_>, _>>() {
                        Ok(there) => window.carrier.compare_and_write_many(&there).await,
                        Err(error) => cells.iter().map(|_| Err(error.clone())).collect(),
                    }
                }
            }
        })
    }

    fn data(&self) -> Arc<dyn DataLun> {
        match self.route() {
            Route::Own(own) => own.data(),
            Route::Window(window) => {
                Arc::new(NoData { name: self.name.clone(), alignment: window.carrier.data().alignment() })
            }
        }
    }

    /// No plain write goes to a window: there is nothing to mark.
    fn mark_paths(&self, owner: PathOwner) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            match self.own() {
                Some(own) => own.mark_paths(owner).await,
                None => Ok(()),
            }
        })
    }

    fn evict(&self) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            match self.own() {
                Some(own) => own.evict().await,
                None => Ok(()),
            }
        })
    }

    fn unmark_paths(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let former = self.former.borrow_mut().take();
            if let Some(marked) = self.own().or(former) {
                marked.unmark_paths().await;
            }
        })
    }

    fn tend(&self) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            match self.own() {
                Some(own) => own.tend().await,
                None => Ok(()),
            }
        })
    }

    fn reservation(&self) -> Option<Reservation> {
        self.under().reservation()
    }

    /// Nothing but compare-and-write goes to a window, and the slot was claimed before: that is the fence.
    fn fence(&self, victim: PathOwner) -> LocalFuture<'_, Result<Fencing, LunError>> {
        Box::pin(async move {
            match self.own() {
                Some(own) => own.fence(victim).await,
                None => Ok(Fencing::Proven),
            }
        })
    }

    fn end_fence(&self, slot: SlotId) {
        if let Some(own) = self.own() {
            own.end_fence(slot);
        }
    }

    fn as_member(&self) -> Option<&MemberLun> {
        Some(self)
    }
}

/// The data path of a LUN that was taken out: there is none.
struct NoData {
    name: String,
    alignment: usize,
}

impl NoData {
    fn refuse<T>(&self, command: &'static str, offset: u64, length: u64) -> Result<T, LunError> {
        let (kind, lun) = (LunErrorKind::OutOfRange, self.name.clone());
        let cause = io::Error::other("the LUN was taken out of the volume: there is no data on it");
        Err(LunError { kind, lun, command, offset, length, cause })
    }
}

impl DataLun for NoData {
    fn alignment(&self) -> usize {
        self.alignment
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError> {
        self.refuse("read", offset, into.len() as u64)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), LunError> {
        self.refuse("write", offset, from.len() as u64)
    }

    fn flush(&self) -> Result<(), LunError> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.refuse("write zeroes", offset, length)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.refuse("unmap", offset, length)
    }

    /// Programs are given one for each LUN. Nothing can be written to this one, and nothing is there to be read.
    fn open_descriptor(&self) -> Option<Result<OwnedFd, LunError>> {
        let opened = std::fs::File::open("/dev/null").map(OwnedFd::from);
        let error = |cause| LunError {
            kind: LunErrorKind::NotDone,
            lun: self.name.clone(),
            command: "open",
            offset: 0,
            length: 0,
            cause,
        };
        Some(opened.map_err(error))
    }
}
