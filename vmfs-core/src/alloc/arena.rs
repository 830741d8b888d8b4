//! Owns: the own arena cells: the list of places where this incarnation may have left unfinished work.
//! Promises: a place is listed durably before the first allocation or mark in it.
//! Must not know: what happens in the places.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tokio::sync::Mutex;

use crate::cas::{CasOutcome, CellChange};
use crate::context::Context;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::{Arena, Place};
use crate::sabotage::{Sabotage, active};
use crate::units::LunIndex;

/// Attempts at one change of the own arena cell.
const TRIES: u32 = 8;

/// What is listed on one LUN.
#[derive(Default)]
struct Listed {
    places: BTreeSet<Place>,
    anywhere: bool,
}

/// The own arenas on all LUNs.
///
/// A place stays listed until the slot is left: an incarnation works in few places, and `anywhere` is right when they are many.
pub struct Arenas {
    context: Rc<Context>,
    listed: RefCell<BTreeMap<LunIndex, Rc<Mutex<Listed>>>>,
}

impl Arenas {
    /// For a mounted volume whose slots were joined: the arena cells are empty.
    pub fn new(context: Rc<Context>) -> Arenas {
        Arenas { context, listed: RefCell::default() }
    }

    /// Lists a place unless it is listed already.
    pub async fn note(&self, lun: LunIndex, place: Place) -> Result<(), FsError> {
        let entry = self.listed.borrow_mut().entry(lun).or_default().clone();
        let mut listed = entry.lock().await;
        if listed.anywhere || listed.places.contains(&place) || active(Sabotage::ArenaEmpty) {
            return Ok(());
        }
        let slot = self.context.own_slot(lun)?;
        let member = self.context.member(lun)?;
        let mut places: Vec<Place> = listed.places.iter().copied().chain([place]).collect();
        let anywhere = places.len() > Arena::capacity(self.context.cell_size());
        if anywhere {
            places.clear();
        }
        let payload = Arena { generation: slot.generation, anywhere, places }.encode();
        let mut settled = false;
        for _ in 0..TRIES {
            let expect = member.slot.borrow().as_ref().map(|own| own.arena.clone());
            let Some(expect) = expect else { return Err(FsError::Fenced { lun }) };
            let change = CellChange::payload(&expect, payload.clone());
            let (current, applied) = match self.context.cas(&expect, change).await? {
                CasOutcome::Applied(cell) => (cell, true),
                // An attempt in doubt was superseded by a re-stamp of the own. Nobody else changes the arena of a live slot.
                CasOutcome::Lost(cell) | CasOutcome::Overtaken(cell) if cell.header().writer == slot => (cell, false),
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {
                    self.context.prove_live([lun]).await?;
                    let message = format!("arena cell {}: changed by another host; run fsck.vmfs", expect.address());
                    return Err(FsError::refused(FsErrorKind::Corrupt, message));
                }
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            };
            settled = applied || current.payload().starts_with(&payload);
            if let Some(own) = member.slot.borrow_mut().as_mut() {
                own.arena = current;
            }
            if settled {
                break;
            }
        }
        if !settled {
            let message = format!("the own arena cell on {lun} could not be changed; the LUN answers unreliably");
            return Err(FsError::refused(FsErrorKind::Io, message));
        }
        listed.anywhere = anywhere;
        if anywhere {
            listed.places.clear();
        } else {
            listed.places.insert(place);
        }
        Ok(())
    }
}
