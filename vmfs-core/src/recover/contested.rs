//! Owns: deciding what becomes of units whose retiring mark this host took over from another one with a change that then was lost.
//! Promises: one that nothing reaches is freed, also when the host that dropped it has died; one that is reached keeps no mark, and no
//! older change can drop it any more. Must not know: what the changes were.
//!
//! Two hosts that change one object mark the same unit, one after the other, and the mark tells only who was last. So the last one
//! answers for the unit: before it takes its mark off it makes every change that is on its way void and looks. A host whose change
//! has dropped a unit frees it only while the mark is still its own.

use std::collections::BTreeMap;

use super::Parts;
use super::reach::Reach;
use crate::alloc::units::{UnitEdit, UnitUse};
use crate::error::FsError;
use crate::units::FdId;

/// Decides all units that are contested now. What fails is decided with the next call.
pub async fn settle_contested(parts: &Parts<'_>) -> Result<(), FsError> {
    let mut by_owner: BTreeMap<FdId, Vec<UnitUse>> = BTreeMap::new();
    for unit in parts.objects.take_contested() {
        by_owner.entry(unit.owner).or_default().push(unit);
    }
    let mut result = Ok(());
    for (owner, units) in by_owner {
        let is_away = |unit: &UnitUse| parts.context.is_lost(unit.at.lun);
        if parts.context.is_lost(owner.lun()) || units.iter().any(is_away) {
            parts.objects.contest(units);
            continue;
        }
        if let Err(error) = settle(parts, owner, &units).await {
            parts.objects.contest(units);
            result = result.and(Err(error));
        }
    }
    result
}

async fn settle(parts: &Parts<'_>, owner: FdId, units: &[UnitUse]) -> Result<(), FsError> {
    let reach = Reach::new(parts);
    let object = reach.owner(owner.get()).await?;
    let (mut reached, mut dropped) = (Vec::new(), Vec::new());
    for unit in units {
        let is_reached = match &object {
            Some(object) => reach.reaches_unit(object, (unit.kind, unit.index), unit.at).await?,
            None => false,
        };
        if is_reached { reached.push((*unit, UnitEdit::Keep)) } else { dropped.push(*unit) }
    }
    parts.objects.space().units.edit(&reached, None).await?;
    parts.objects.defer(dropped);
    Ok(())
}
