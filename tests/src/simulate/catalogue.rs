//! Owns: the sabotage catalogue: within how many seeds each deliberate fault is noticed.
//! Promises: a fault that is not noticed within its seeds is a miss, and a miss is a failure of the oracles.
//! Must not know: what a fault does.

pub use engine::sabotage::Sabotage;

use super::plan::{Aim, Plan};
use super::runner::{Outcome, run_plans};

/// Seeds that are tried for a fault whose number was not measured.
const TRIED: u64 = 2000;

/// Seeds within which a fault has to be noticed, counted from the first one on: at least four times as many as it took when it was measured.
/// `None`: not measured with the present plans and oracles; `simulate --sabotage all` tries it all the same.
pub const fn seeds(sabotage: Sabotage) -> Option<u64> {
    use Sabotage::*;
    match sabotage {
        ImagesRecur | LockKept | PublishForgotten | UnitNotAssigned | BlockTakenTwice | ClaimSkipped | CellsAlike
        | ArenaEmpty | TokenKept | UncleanForgotten | LinkReused | PoolKept | LockIgnored | MiscompareIsLost
        | UnknownIsFailed | GateIgnored | LeaseTooLong | AlwaysClean | CellsInDoubt | DropsOfTheLost
        | AbsenceBelieved | LinkIgnored | DirtyAtOnce | NoRestamp | OvertakenIsLost | ReadOnce | LeavingUnsaid => {
            Some(100)
        }
        FlushForgotten | UnlockFirst | DirtyJoined | WatchTooShort | ClaimIgnored | QuarantineSkipped | SlotNotRead
        | GateAfterWrite | UnmapAfterFree => Some(250),
        OneLunAsked | LivingMarkDecided => Some(500),
        UnmapBeforeMark | BlocksForgotten | StolenMarkKept => Some(1000),
        GranulesWhole | LeaseFromAnswer => Some(1600),
        GenerationIgnored | LeavingIgnored | RecoveryWithoutRestamp => Some(2500),
        OldPointersTrusted => Some(2800),
        _ => None,
    }
}

/// What plans are aimed at for a fault that others meet too seldom.
pub const fn aim(sabotage: Sabotage) -> Option<Aim> {
    match sabotage {
        Sabotage::AbsenceBelieved | Sabotage::LinkIgnored => Some(Aim::LooksOverPauses),
        Sabotage::RecoveryWithoutRestamp => Some(Aim::LateAndAlone),
        Sabotage::LeavingUnsaid | Sabotage::LeavingIgnored => Some(Aim::Disputes),
        Sabotage::OvertakenIsLost => Some(Aim::Unheard),
        Sabotage::ReadOnce => Some(Aim::ReadsOverPauses),
        Sabotage::OldPointersTrusted => Some(Aim::BreakerDies),
        Sabotage::NoRestamp => Some(Aim::Late),
        Sabotage::DirtyAtOnce => Some(Aim::Unanswered),
        Sabotage::ClosedForgotten => Some(Aim::ClosedAndLate),
        _ => None,
    }
}

/// The plan of a seed, aimed or of any kind.
pub fn plan_of(aim: Option<Aim>, seed: u64) -> Plan {
    aim.map_or_else(|| Plan::of(seed), |aim| Plan::aimed(aim, seed))
}

/// Runs seeds with a fault until one fails or its seeds are used up.
pub fn try_out(sabotage: Sabotage, first_seed: u64) -> Outcome {
    let count = match seeds(sabotage) {
        Some(count) => count,
        None => TRIED,
    };
    run_plans(&|seed| plan_of(aim(sabotage), seed), first_seed, count, Some(sabotage), true)
}
