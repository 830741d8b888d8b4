//! Owns: the list of deliberate faults, each of which breaks one rule of the protocol, and which of them is on.
//! Promises: without the feature `sabotage` nothing is ever on and nothing of it is compiled into a program.
//! Must not know: how a fault is noticed; the simulator's catalogue does.
//!
//! A fault is one line at the place of the rule that it breaks. It shows that the rule is needed and that the oracles see its absence.

/// Makes the enum and its table from one list.
macro_rules! sabotages {
    ($($(#[doc = $doc:literal])+ $name:ident, $text:literal, $breaks:literal;)+) => {
        /// A deliberate fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Sabotage {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Sabotage {
            /// All of them.
            pub const ALL: &'static [Sabotage] = &[$(Sabotage::$name,)+];

            /// Its name on command lines.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Sabotage::$name => $text,)+
                }
            }

            /// The rule that it breaks.
            pub const fn breaks(self) -> &'static str {
                match self {
                    $(Sabotage::$name => $breaks,)+
                }
            }
        }
    };
}

sabotages! {
    /// A compare-and-write that miscompares is taken for a loss, though it was there.
    MiscompareIsLost, "miscompare-is-lost", "a miscompare is no loss: the path may have repeated the command";
    /// A command without an answer is taken for one that was not carried out.
    UnknownIsFailed, "unknown-is-failed", "a time-out is no failure: the change may be there";
    /// A cell that moved on twice is taken for lost.
    OvertakenIsLost, "overtaken-is-lost", "an overtaken change may have been there in between";
    /// A doubt is not resolved by superseding the command: it may yet land.
    NoRestamp, "no-restamp", "what may yet land is superseded before it is called lost";
    /// A change has the same name whoever makes it.
    ImagesRecur, "images-recur", "R2: images never recur";
    /// The own slot is not read before a commit.
    SlotNotRead, "slot-not-read", "R1: a commit rests on the own slot, read after the image";
    /// A thread looks at the gate after it has written.
    GateAfterWrite, "gate-after-write", "the gate is checked before data is sent";
    /// The actor does not look at the gate.
    GateIgnored, "gate-ignored", "data is sent only while the gate is open";
    /// The lease counts from when the renewal was answered.
    LeaseFromAnswer, "lease-from-answer", "t0 is taken before a renewal is sent";
    /// The lease is taken for twice as long.
    LeaseTooLong, "lease-too-long", "the gate closes before the lease ends";
    /// A breaker waits half as long as it must.
    WatchTooShort, "watch-too-short", "a slot is watched for D without a change before it is claimed";
    /// A host goes on in a slot that another host has claimed.
    ClaimIgnored, "claim-ignored", "a slot that was claimed is never renewed again";
    /// A lock is taken whoever holds it.
    LockIgnored, "lock-ignored", "a lock held by a host that is not proven gone is never taken";
    /// A lock is not given back.
    LockKept, "lock-kept", "a clean leave leaves no lock behind";
    /// The slot is left as free whatever stays behind.
    AlwaysClean, "always-clean", "a slot is left free only if nothing stays behind for recovery";
    /// An entry is believed though the object behind it has another link.
    LinkIgnored, "link-ignored", "an entry counts only if its object agrees in link and parent";
    /// A flush does not flush the LUNs.
    FlushForgotten, "flush-forgotten", "what a flush acknowledged is on stable storage";
    /// Closing does not publish what was written.
    PublishForgotten, "publish-forgotten", "what was written is published at the last close";
    /// A block is published as if all of it had been written.
    GranulesWhole, "granules-whole", "a granule that was not written reads as zeros";
    /// A commit is sent though some fresh cell did not take what it names.
    CellsInDoubt, "cells-in-doubt", "everything that a commit makes reachable is there before";
    /// A change that lost gives back what it would have dropped.
    DropsOfTheLost, "drops-of-the-lost", "a change that lost has dropped nothing";
    /// A mark that took the place of another host's is taken off without a look.
    StolenMarkKept, "stolen-mark-kept", "who takes another host's mark over finds out what became of the unit";
    /// A unit is marked by an image that may be old.
    MarkUnproven, "mark-unproven", "what is marked is reached: the root cell is read after the entry";
    /// A taken unit is not marked as used before the commit.
    UnitNotAssigned, "unit-not-assigned", "the entry of a unit names its owner before the owner reaches it";
    /// The space of a removed file is given back to the storage before it is marked.
    UnmapBeforeMark, "unmap-before-mark", "only what carries the own mark is unmapped";
    /// The space of a removed file is given back to the storage after it became free.
    UnmapAfterFree, "unmap-after-free", "never UNMAP after a block became allocatable";
    /// What is read without a lock is believed without a second look.
    ReadOnce, "read-once", "bytes read without a lock count only if nothing changed meanwhile";
    /// A file grows over what lies behind its end.
    GrowthUncleaned, "growth-uncleaned", "bytes never written read as zeros";
    /// A removed object's blocks are left in its name when its cell becomes free.
    BlocksForgotten, "blocks-forgotten", "an object is free only after its space is";
    /// A block is given to a file though it is somebody's.
    BlockTakenTwice, "block-taken-twice", "a block is never reachable from two places";
    /// Recovery looks without making void what is still on its way.
    RecoveryWithoutRestamp, "recovery-without-restamp", "recovery re-stamps, then looks, then frees";
    /// What is taken away is not waited for while it is in use.
    EpochNotAwaited, "epoch-not-awaited", "blocks are freed when the last request of an older map epoch has ended";
    /// Recovery frees blocks of a host that is not proven fenced.
    QuarantineSkipped, "quarantine-skipped", "R3: what a late write may reach goes to quarantine";
    /// Only the lock's LUN is asked whether its holder is gone.
    OneLunAsked, "one-lun-asked", "a lock is taken when its holder is gone on every LUN of the object";
    /// What a closed file left on its way is forgotten when the locks of a LUN are dropped.
    ClosedForgotten, "closed-forgotten", "a LUN's locks are dropped when nothing under them is on its way, also of closed files";
    /// A slot is made dirty without a claim.
    ClaimSkipped, "claim-skipped", "claim before fencing: the claim expects the image that stood still";
    /// A slot is made dirty as soon as it is claimed, though its owner may still be in its lease.
    DirtyAtOnce, "dirty-at-once", "where only time fences, a slot is dirty only when its owner's lease is over";
    /// A slot that lives is taken for the own one, whatever its generation.
    GenerationIgnored, "generation-ignored", "the own slot counts at the own generation only";
    /// Pointer cells from before a break are believed as they are.
    OldPointersTrusted, "old-pointers-trusted", "after a break a pointer cell is re-stamped before it is believed";
    /// All cells of a new container are alike.
    CellsAlike, "cells-alike", "R2: no cell is changed by compare-and-write that has no image of its own";
    /// Places of work are not listed in the arena.
    ArenaEmpty, "arena-empty", "a place is listed before the first allocation or mark in it";
    /// That there is no name is believed at the first look.
    AbsenceBelieved, "absence-believed", "that there is no name takes a second look at the directory";
    /// A move does not tell the old directory that the child is leaving.
    LeavingUnsaid, "leaving-unsaid", "a move changes the old directory too, after it read the child and before it moves it";
    /// A rename takes an entry that a move is about to leave.
    LeavingIgnored, "leaving-ignored", "a rename of an entry that is about to be left changes the child first";
    /// The mark of a host that lives is taken for that of a dead one.
    LivingMarkDecided, "living-mark-decided", "only marks of incarnations that are over are decided by others";
    /// The token stays when a lock changes hands.
    TokenKept, "token-kept", "the token grows at each change of ownership";
    /// A lock that was taken by break is not marked as such.
    UncleanForgotten, "unclean-forgotten", "who takes a lock by break marks it unclean";
    /// A new object has the link of the one before it.
    LinkReused, "link-reused", "a root cell's link grows at each creation";
    /// A slot that waits for its recovery is joined.
    DirtyJoined, "dirty-joined", "a dirty slot is not joinable";
    /// Units of the own pool stay behind in a slot that is left as free.
    PoolKept, "pool-kept", "a clean leave leaves no pool behind";
    /// A host that could not look is taken for one that did not live.
    GapIgnored, "gap-ignored", "a storage that stalls convicts nobody";
    /// A lock is given back before what was written under it is published.
    UnlockFirst, "unlock-first", "a lock is released when all that rests on it has ended";
    /// A cell leaves its LUN though its copy may not be there.
    CopyUnproven, "copy-unproven", "a cell leaves its LUN after its copy is certain";
    /// A cell is read before the image that its copy replaces.
    WindowReadLast, "window-read-last", "R1: that a cell has not left is read after the image that its copy replaces";
    /// The free space of a LUN that is taken out can be allocated.
    SealSkipped, "seal-skipped", "what is free on a LUN that is taken out ceases to be before the LUN is looked at";
}

impl Sabotage {
    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Sabotage> {
        Sabotage::ALL.iter().copied().find(|sabotage| sabotage.name() == name)
    }
}

/// Whether a fault is on, on this thread.
#[cfg(not(feature = "sabotage"))]
#[inline(always)]
pub const fn active(_: Sabotage) -> bool {
    false
}

#[cfg(feature = "sabotage")]
pub use on::{active, set};

#[cfg(feature = "sabotage")]
mod on {
    use std::cell::Cell;

    use super::Sabotage;

    thread_local! {
        static ON: Cell<Option<Sabotage>> = const { Cell::new(None) };
    }

    /// Whether a fault is on, on this thread.
    #[inline]
    pub fn active(sabotage: Sabotage) -> bool {
        ON.get() == Some(sabotage)
    }

    /// Turns one fault on, on this thread, or all off.
    pub fn set(sabotage: Option<Sabotage>) {
        ON.set(sabotage);
    }
}
