//! Owns: compare-and-write of one cell, its five results and how doubt is resolved.
//! Promises: Applied is durable; Lost and NotDone are certain; what cannot be known is Unknown and never guessed.
//! Must not know: what a cell means, who may change it (rule R1 is the caller's: evidence is read after the image).

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;

use crate::buf::AlignedBuf;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::{Cell, CellContext, CellHeader, CellKind, FormatError};
use crate::lun::{CompareAndWrite, Compared, Lun, LunError, LunErrorKind};
use crate::sabotage::{Sabotage, active};
use crate::units::{CellAddress, FdId, Link, OpId, SlotRef, Token};

/// Reads of a cell that fails its checks before that is believed: a concurrent change can tear a read.
const READ_TRIES: u32 = 3;
/// Rounds of look and supersede before a compare-and-write is given up as unknown; about three seconds of waiting.
const SETTLE_ROUNDS: u32 = 12;
const FIRST_BACKOFF: Duration = Duration::from_millis(2);
const LONGEST_BACKOFF: Duration = Duration::from_millis(512);

/// What became of a compare-and-write.
#[derive(Clone, Debug)]
pub enum CasOutcome {
    /// The new image is in the cell (or was, before somebody changed it again) and durable. Carries it.
    Applied(Cell),
    /// Certain: the new image never was and never will be in the cell. Carries what is there now.
    Lost(Cell),
    /// The cell was changed more than once; the new image may have been there in between. Carries what is there now. The caller
    /// decides by content and frees nothing that the attempt named before re-stamp, look, free.
    Overtaken(Cell),
    /// Proven: the command was not carried out and will not be.
    NotDone(LunError),
    /// It could not be found out within bounded time. The new image may be there, or may yet land.
    Unknown(LunError),
}

/// What a change leaves in a cell besides `seq`, `op_id`, writer and address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CellChange {
    /// Kind.
    pub kind: CellKind,
    /// Object that the cell belongs to.
    pub owner: Option<FdId>,
    /// The object's link counter.
    pub link: Link,
    /// Index in the object.
    pub index: u32,
    /// Lock token (PB cells), 0 elsewhere.
    pub token: Token,
    /// Payload; bytes that are not given are zero.
    pub payload: Vec<u8>,
}

impl CellChange {
    /// The change that leaves everything as it is in `cell`.
    pub fn same(cell: &Cell) -> CellChange {
        CellChange::payload(cell, cell.payload().to_vec())
    }

    /// The change that replaces only the payload of `cell`.
    pub fn payload(cell: &Cell, payload: Vec<u8>) -> CellChange {
        let h = cell.header();
        CellChange { kind: h.kind, owner: h.owner, link: h.link, index: h.index, token: h.token, payload }
    }
}

/// Reads and changes the cells of one volume.
pub struct CellIo {
    context: CellContext,
    env: Rc<dyn Env>,
}

/// What a look at the cell said about an attempt in doubt.
enum Look {
    Settled(CasOutcome),
    /// Still the expected image: the attempt may yet land.
    StillExpected,
    Failed(LunError),
}

impl CellIo {
    /// For the volume and cell size of `context`.
    pub fn new(context: CellContext, env: Rc<dyn Env>) -> CellIo {
        CellIo { context, env }
    }

    /// Volume and cell size.
    pub fn context(&self) -> &CellContext {
        &self.context
    }

    /// Clock, randomness and timer.
    pub fn env(&self) -> &Rc<dyn Env> {
        &self.env
    }

    /// A new name of one change.
    pub fn op_id(&self) -> OpId {
        let mut bytes = [0; 16];
        self.env.random(&mut bytes);
        OpId(bytes)
    }

    /// Reads one cell. A check that fails is read again twice; then it is [`FsError::Corrupt`].
    pub async fn read(&self, lun: &Rc<dyn Lun>, at: CellAddress) -> Result<Cell, FsError> {
        for attempt in 1.. {
            let length = self.context.cell_size.bytes();
            let (bytes, skip) = self.read_bytes(lun, at.offset, length).await?;
            match Cell::decode(&self.context, at, &bytes[skip..skip + length]) {
                Ok(cell) => return Ok(cell),
                Err(cause) if attempt == READ_TRIES => {
                    return Err(FsError::Corrupt { structure: format!("cell {at} of {}", lun.name()), cause });
                }
                Err(_) => self.env.sleep(FIRST_BACKOFF).await,
            }
        }
        unreachable!("the loop ends at READ_TRIES");
    }

    /// Reads `cells` neighbouring cells with one command. A cell that fails its check is that element's error; read it again with
    /// [`CellIo::read`] before believing so.
    pub async fn read_span(
        &self,
        lun: &Rc<dyn Lun>,
        first: CellAddress,
        cells: usize,
    ) -> Result<Vec<Result<Cell, FormatError>>, LunError> {
        self.read_strided(lun, first, self.context.cell_size.bytes() as u64, cells).await
    }

    /// Reads `cells` cells that lie `stride` bytes apart with one command, as [`CellIo::read_span`].
    pub async fn read_strided(
        &self,
        lun: &Rc<dyn Lun>,
        first: CellAddress,
        stride: u64,
        cells: usize,
    ) -> Result<Vec<Result<Cell, FormatError>>, LunError> {
        if cells == 0 {
            return Ok(Vec::new());
        }
        let (size, stride) = (self.context.cell_size.bytes(), stride as usize);
        if stride > size && size.is_multiple_of(lun.alignment()) {
            let bytes = lun.read_strided(first.offset, size, stride, cells).await?;
            let decode = |(nth, image): (usize, &[u8])| {
                let at = CellAddress { lun: first.lun, offset: first.offset + (nth * stride) as u64 };
                Cell::decode(&self.context, at, image)
            };
            return Ok(bytes.chunks_exact(size).enumerate().map(decode).collect());
        }
        let (bytes, skip) = self.read_bytes(lun, first.offset, (cells - 1) * stride + size).await?;
        let decode = |nth: usize| {
            let at = CellAddress { lun: first.lun, offset: first.offset + (nth * stride) as u64 };
            Cell::decode(&self.context, at, &bytes[skip + nth * stride..skip + nth * stride + size])
        };
        Ok((0..cells).map(decode).collect())
    }

    /// Reads a range that need not be aligned as the LUN wants it: the bytes, and where in them the range begins.
    async fn read_bytes(&self, lun: &Rc<dyn Lun>, offset: u64, length: usize) -> Result<(AlignedBuf, usize), LunError> {
        let alignment = lun.alignment() as u64;
        let start = offset - offset % alignment;
        let end = (offset + length as u64).next_multiple_of(alignment);
        let buf = lun.read(start, (end - start) as usize).await?;
        Ok((buf, (offset - start) as usize))
    }

    /// The image that follows `expect`: `seq` + 1, a new `op_id`, written by `writer`.
    pub fn successor(&self, expect: &Cell, change: CellChange, writer: SlotRef) -> Cell {
        let header = CellHeader {
            kind: change.kind,
            address: expect.address(),
            seq: expect.header().seq.next(),
            op_id: if active(Sabotage::ImagesRecur) { OpId([expect.header().seq.0 as u8; 16]) } else { self.op_id() },
            writer,
            owner: change.owner,
            link: change.link,
            index: change.index,
            token: change.token,
        };
        Cell::encode(&self.context, header, &change.payload)
    }

    /// If the cell holds `expect`, makes it hold `new`, durably. An `Err` leaves as much in doubt as [`CasOutcome::Unknown`].
    pub async fn cas(&self, lun: &Rc<dyn Lun>, expect: &Cell, new: Cell) -> Result<CasOutcome, FsError> {
        check_pair(expect, &new)?;
        let answer = lun.compare_and_write(expect.address().offset, expect.image(), new.image()).await;
        self.settle(lun, expect, new, answer).await
    }

    /// Several compare-and-writes of different cells of one LUN at once; each has its own result, in the order given.
    pub async fn cas_many(&self, lun: &Rc<dyn Lun>, pairs: Vec<(Cell, Cell)>) -> Vec<Result<CasOutcome, FsError>> {
        if let Some(refused) = pairs.iter().find_map(|(expect, new)| check_pair(expect, new).err()) {
            return pairs.iter().map(|_| Err(refused.clone())).collect();
        }
        let commands: Vec<_> = pairs
            .iter()
            .map(|(expect, new)| CompareAndWrite {
                offset: expect.address().offset,
                expect: expect.image(),
                new: new.image(),
            })
            .collect();
        let answers = lun.compare_and_write_many(&commands).await;
        let settled =
            pairs.iter().zip(answers).map(|((expect, new), answer)| self.settle(lun, expect, new.clone(), answer));
        join_all(settled).await
    }

    /// Changes nothing but `seq`, `op_id` and writer: every older compare-and-write on its way to that cell is dead once this is
    /// Applied (or Lost to anybody).
    pub async fn restamp(&self, lun: &Rc<dyn Lun>, expect: &Cell, writer: SlotRef) -> Result<CasOutcome, FsError> {
        let stamped = self.restamped(expect, writer);
        self.cas(lun, expect, stamped).await
    }

    fn restamped(&self, expect: &Cell, writer: SlotRef) -> Cell {
        self.successor(expect, CellChange::same(expect), writer)
    }

    /// Turns the answer to a compare-and-write into its result: reads again where the answer leaves doubt, and while the cell still
    /// holds the expected image supersedes the attempt by a re-stamp. All attempts that expect one image form a set of which at
    /// most one lands, so once the cell has changed the doubt is over.
    async fn settle(
        &self,
        lun: &Rc<dyn Lun>,
        expect: &Cell,
        new: Cell,
        answer: Result<Compared, LunError>,
    ) -> Result<CasOutcome, FsError> {
        let mut doubt = match answer {
            Ok(Compared::Written) => return Ok(CasOutcome::Applied(new)),
            Ok(Compared::Miscompare) => None,
            Err(error) if error.kind != LunErrorKind::Unknown || active(Sabotage::UnknownIsFailed) => {
                return Ok(CasOutcome::NotDone(error));
            }
            Err(error) => Some(error),
        };
        for round in 0..SETTLE_ROUNDS {
            if round > 0 {
                self.back_off(round).await;
            }
            match self.look(lun, expect, &new).await? {
                Look::Settled(outcome) => return Ok(outcome),
                Look::Failed(error) => {
                    doubt = Some(error);
                    continue;
                }
                Look::StillExpected if active(Sabotage::NoRestamp) => return Ok(CasOutcome::Lost(expect.clone())),
                Look::StillExpected => {}
            }
            let stamp = self.restamped(expect, new.header().writer);
            match lun.compare_and_write(expect.address().offset, expect.image(), stamp.image()).await {
                Ok(Compared::Written) => return Ok(CasOutcome::Lost(stamp)),
                Ok(Compared::Miscompare) => {}
                Err(error) => doubt = Some(error),
            }
        }
        Ok(CasOutcome::Unknown(doubt.unwrap_or_else(|| never_settled(lun, expect))))
    }

    async fn look(&self, lun: &Rc<dyn Lun>, expect: &Cell, new: &Cell) -> Result<Look, FsError> {
        let current = match self.read(lun, expect.address()).await {
            Ok(cell) => cell,
            Err(FsError::Lun(error)) => return Ok(Look::Failed(error)),
            Err(other) => return Err(other),
        };
        if current.header().op_id == new.header().op_id && !active(Sabotage::MiscompareIsLost) {
            return Ok(match lun.flush().await {
                Ok(()) => Look::Settled(CasOutcome::Applied(current)),
                Err(error) => Look::Failed(error),
            });
        }
        if current.image() == expect.image() {
            return Ok(Look::StillExpected);
        }
        // A lower `seq` is a cell that was formatted anew since: mine may have been there before that.
        Ok(Look::Settled(if current.header().seq == expect.header().seq.next() || active(Sabotage::OvertakenIsLost) {
            CasOutcome::Lost(current)
        } else {
            CasOutcome::Overtaken(current)
        }))
    }

    /// Waits 2 ms, 4 ms, ... 512 ms, each made up to half as long again by chance.
    async fn back_off(&self, round: u32) {
        let base = LONGEST_BACKOFF.min(FIRST_BACKOFF * (1 << (round - 1).min(16)));
        let mut chance = [0];
        self.env.random(&mut chance);
        self.env.sleep(base + base * u32::from(chance[0]) / 512).await;
    }
}

/// The two images must be of one cell, the second the successor of the first.
fn check_pair(expect: &Cell, new: &Cell) -> Result<(), FsError> {
    let (old, next) = (expect.header(), new.header());
    if old.address == next.address && next.seq == old.seq.next() && next.op_id != old.op_id {
        return Ok(());
    }
    Err(FsError::refused(
        FsErrorKind::Invalid,
        format!(
            "cell {}: the image for {} with seq {} does not follow the one with seq {}; this is a bug, nothing was written",
            old.address, next.address, next.seq, old.seq
        ),
    ))
}

fn never_settled(lun: &Rc<dyn Lun>, expect: &Cell) -> LunError {
    LunError {
        kind: LunErrorKind::Unknown,
        lun: lun.name().to_owned(),
        command: "compare-and-write",
        offset: expect.address().offset,
        length: expect.image().len() as u64,
        cause: std::io::Error::other("the cell holds the expected image and yet every attempt miscompares"),
    }
}
