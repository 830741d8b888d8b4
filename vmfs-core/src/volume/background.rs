//! Owns: what goes on beside the operations: renewals, deferred frees, tidying, counting free space.
//! Promises: one renewal in flight on each LUN, its time taken before it is sent; a LUN that does not answer holds up nothing else.
//! Must not know: what an operation is.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{join, join3, select};
use futures_util::stream::FuturesUnordered;

use super::{Inner, membership, patrol};
use crate::context::Member;
use crate::env::LocalFuture;
use crate::keeper::Kept;

/// Time between two rounds of tidying when nothing asks for one.
const TIDY_EVERY: Duration = Duration::from_secs(1);
/// Table cells that are counted in one step.
const SCAN_CELLS: usize = 1024;
/// Time between two steps while the first count is not complete, and afterwards.
const FIRST_SCAN_STEP: Duration = Duration::from_millis(20);
const NEXT_SCAN_STEP: Duration = Duration::from_secs(1);

pub(super) async fn run(inner: &Rc<Inner>) {
    if inner.info.read_only {
        join(each_member(inner), membership::run(inner)).await;
    } else {
        join3(each_member(inner), membership::run(inner), tidying(inner)).await;
    }
}

/// Works for every member, also for those that are added later, until the volume is left.
async fn each_member(inner: &Rc<Inner>) {
    let mut works = FuturesUnordered::new();
    let mut begun = BTreeSet::new();
    loop {
        for member in inner.context.members() {
            if begun.insert(member.index) {
                works.push(work(inner, member));
            }
        }
        let next = works.next();
        if let futures_util::future::Either::Left((None, _)) = select(next, pin!(inner.context.members_changed())).await
        {
            return;
        }
    }
}

/// All that goes on for one member, until the volume is left or the member is taken out.
async fn work(inner: &Rc<Inner>, member: Rc<Member>) {
    if inner.info.read_only {
        join(scan(inner, &member), membership::watch_header(inner, &member)).await;
    } else {
        let watches = join(membership::watch_header(inner, &member), patrol::run(inner, &member));
        join3(renewals(inner, &member), scan(inner, &member), watches).await;
    }
}

/// Sleeps; false when the volume was left meanwhile.
pub(super) async fn sleep(inner: &Inner, time: Duration) -> bool {
    if inner.left.get() {
        return false;
    }
    let woken = async {
        while !inner.left.get() {
            inner.wake.notified().await;
        }
    };
    select(pin!(inner.context.env().sleep(time)), pin!(woken)).await;
    !inner.left.get()
}

/// Sleeps, or until something asks for a round.
async fn sleep_or_asked(inner: &Inner, time: Duration) -> bool {
    if inner.left.get() {
        return false;
    }
    let asked: std::pin::Pin<&mut dyn Future<Output = ()>> = pin!(inner.wake.notified());
    select(pin!(inner.context.env().sleep(time)), asked).await;
    !inner.left.get()
}

/// Has the own slot on one LUN kept until the volume is left or this host is fenced there.
async fn renewals(inner: &Rc<Inner>, member: &Rc<Member>) {
    let sleep = |time| -> LocalFuture<'_, bool> { Box::pin(sleep(inner, time)) };
    let kept = Kept { context: &inner.context, member, sleep: &sleep };
    if let Some(error) = inner.keeper.keep(kept).await {
        inner.fenced(member, &error);
    }
}

async fn tidying(inner: &Rc<Inner>) {
    while sleep_or_asked(inner, TIDY_EVERY).await {
        let _round = inner.rounds.read().await;
        if inner.context.fenced().is_some() || inner.closing.get() {
            continue;
        }
        let reaped = inner.reap().await;
        let tidied = inner.names.tidy().await;
        let settled = inner.settle_contested().await;
        let recycled = inner.objects.tidy().await;
        let space = inner.objects.space();
        let topped_up = space.units.top_up(&space.blocks).await;
        let unlocked = inner.objects.release_doubtful_locks().await;
        for error in [reaped, tidied, settled, recycled, topped_up, unlocked].into_iter().filter_map(Result::err) {
            if let Some(left_out) = inner.context.complain("tidying", None) {
                tracing::warn!(%error, left_out, "tidying up is tried again");
            }
        }
    }
}

/// Counts the free blocks of a LUN, again and again: other hosts change them too.
async fn scan(inner: &Rc<Inner>, member: &Rc<Member>) {
    let mut from = 0;
    loop {
        let complete = inner.objects.space().blocks.count(member.index).complete;
        if !sleep(inner, if complete { NEXT_SCAN_STEP } else { FIRST_SCAN_STEP }).await
            || inner.closing.get()
            || inner.context.member(member.index).is_err()
        {
            return;
        }
        match inner.objects.space().blocks.scan(member.index, from, SCAN_CELLS).await {
            Ok(next) => {
                from = next.unwrap_or(0);
                // Nothing else is asked of a LUN all the time when it is not written to.
                if inner.info.read_only {
                    inner.context.note_answer(member);
                }
            }
            Err(error) => {
                if let Some(left_out) = inner.context.complain("free space", Some(member.index)) {
                    tracing::warn!(lun = member.lun.name(), %error, left_out, "free space could not be counted");
                }
                from = 0;
                if !sleep(inner, NEXT_SCAN_STEP).await {
                    return;
                }
            }
        }
    }
}
