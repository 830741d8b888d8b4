//! Owns: the owner's side of a request to drop a LUN's locks: this host is gone there and does not know it.
//! Promises: it is acknowledged only when no data under those locks is on its way and none can begin; a mistaken request is taken back.
//! Must not know: who asks, what becomes of the locks.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::Inner;
use crate::context::Member;
use crate::error::FsError;
use crate::format::heartbeat::Heartbeat;
use crate::gate::GateState;
use crate::keeper::is_over;
use crate::slot;
use crate::units::LunIndex;

/// Looks at the own slot on one LUN, as it was last seen, and goes on with what is asked there.
pub(super) async fn serve(inner: &Inner, member: &Member) -> Result<(), FsError> {
    let Some(own) = member.slot.borrow().clone() else { return Ok(()) };
    let found = slot::decode(&own.cell)?;
    let Some(lun) = LunIndex::new(found.drop_lun) else { return Ok(()) };
    if found.drop_acknowledged {
        // It speaks of the slot that was lost there. One that was joined since has locks of its own.
        let joined_anew = inner.context.own_slot(lun).is_ok_and(|there| {
            let state = inner.context.gate_reader().state(lun, there.generation, inner.context.env().now());
            state != GateState::Poisoned
        });
        return if joined_anew { answer(inner, member, lun, take_back).await } else { Ok(()) };
    }
    // A LUN that does not answer for a while does not answer.
    let patience = inner.context.env().sleep(Duration::from_millis(inner.info.lease.renew_ms.into()));
    match select(pin!(inner.context.prove_live([lun])), pin!(patience)).await {
        // It is not gone there: whoever asked was wrong.
        Either::Left((Ok(()), _)) => return answer(inner, member, lun, take_back).await,
        Either::Left((Err(error), _)) if is_over(&error) => return Err(error),
        Either::Left((Err(_), _)) | Either::Right(_) => {}
    }
    if let Ok(dropped) = inner.context.member(lun)
        && let Some(there) = &*dropped.slot.borrow()
    {
        inner.context.gate().poison(lun, there.slot.generation);
    }
    let others = inner.others_let_go.borrow().as_ref().is_none_or(|let_go| let_go(lun));
    if !others || !inner.files.is_drained(lun) {
        return Ok(());
    }
    tracing::warn!(%lun, "this host is gone there, as another one found: the locks of that LUN are dropped");
    answer(inner, member, lun, |heartbeat| heartbeat.drop_acknowledged = true).await
}

fn take_back(heartbeat: &mut Heartbeat) {
    (heartbeat.drop_lun, heartbeat.drop_acknowledged) = (0, false);
}

/// Changes the own slot, if it still asks for `lun`.
async fn answer(inner: &Inner, member: &Member, lun: LunIndex, edit: impl Fn(&mut Heartbeat)) -> Result<(), FsError> {
    let _one = member.renewal.lock().await;
    let Some(mut own) = member.slot.borrow().clone() else { return Ok(()) };
    let updated = slot::update(&inner.context.io, &member.lun, &mut own, |heartbeat| {
        if heartbeat.drop_lun == lun.get() {
            edit(heartbeat);
        }
    })
    .await;
    member.note_seen(own.slot, own.cell);
    updated
}
