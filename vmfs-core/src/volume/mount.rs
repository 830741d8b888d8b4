//! Owns: mounting and unmounting.
//! Promises: a mount that fails leaves no slot behind; an unmount leaves every slot, free when nothing stays behind, else dirty.
//! Must not know: names.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::members::{self, Probed};
use super::types::{MissingLun, MountOptions, VolumeInfo};
use super::{Inner, Volume};
use crate::alloc::Space;
use crate::cas::CellIo;
use crate::context::{Context, Member};
use crate::directory::Names;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::file::Files;
use crate::format::dirent::ObjectRef;
use crate::format::header::BEING_REPAIRED;
use crate::format::heartbeat::SlotState;
use crate::format::layout::ROOT_LINK;
use crate::format::root_cell::ObjectType;
use crate::gate::GatePage;
use crate::keeper::{Joining, SlotKeeper};
use crate::lease;
use crate::lun::Lun;
use crate::object::Objects;
use crate::sabotage::{Sabotage, active};
use crate::slot::{self, HostIdentity, OwnSlot};
use crate::units::{FdId, LunIndex, SlotId};
use crate::window::Carriers;

/// Table cells of each LUN that are counted before the mount is ready: 13,000 blocks with cells of 512 bytes.
pub(super) const FIRST_SCAN_CELLS: usize = 512;
/// Rounds of tidying at unmount before what is left makes the slots dirty.
const LAST_ROUNDS: u32 = 8;

pub(super) async fn mount(
    luns: Vec<Rc<dyn Lun>>,
    options: MountOptions,
    env: Rc<dyn Env>,
    gate: GatePage,
    keeper: Rc<dyn SlotKeeper>,
) -> Result<Volume, FsError> {
    mount_with(luns, options, env, gate, keeper, 0).await
}

/// As [`mount`], for the repair that has said in the headers that it is at work.
pub(super) async fn mount_under_repair(
    luns: Vec<Rc<dyn Lun>>,
    options: MountOptions,
    env: Rc<dyn Env>,
    gate: GatePage,
    keeper: Rc<dyn SlotKeeper>,
) -> Result<Volume, FsError> {
    mount_with(luns, options, env, gate, keeper, BEING_REPAIRED).await
}

/// `tolerated`: features that only say that the volume is being worked on, by the caller.
async fn mount_with(
    luns: Vec<Rc<dyn Lun>>,
    options: MountOptions,
    env: Rc<dyn Env>,
    gate: GatePage,
    keeper: Rc<dyn SlotKeeper>,
    tolerated: u64,
) -> Result<Volume, FsError> {
    let carriers = Carriers::default();
    let found = members::probe_all(luns, options.read_only, options.degraded, tolerated, &env, &carriers);
    let (probed, missing) = found.await?;
    let io = CellIo::new(probed[0].context, env.clone());
    let incarnation = if options.read_only { 0 } else { draw_incarnation(&env) };
    let (mut warnings, mut former) = (Vec::new(), Vec::new());
    let mut slots = Vec::new();
    if !options.read_only {
        slots = join_all(&io, &probed, &options, &*keeper, incarnation, &mut warnings, &mut former).await?;
        // A repair may have begun before the slots were seen: it says so before it looks at them.
        if let Err(error) = members::refuse_features(&probed, tolerated).await {
            leave_all(&io, &*keeper, &probed, &mut slots).await;
            return Err(error);
        }
    }
    for own in &slots {
        gate.extend(own.lun, own.slot.generation, own.lease_until, lease::margin(&own.lease).as_nanos() as u64);
    }
    let info = |root| describe(&probed[0], options.read_only, incarnation, root);
    let members = probed
        .iter()
        .map(|p| {
            let own = slots.iter().find(|own| own.lun == p.header.lun_index).cloned();
            Member::new(p.lun.clone(), p.layout(), p.header.clone(), own)
        })
        .collect();
    let context = Context::new(io, members, gate, incarnation, options.read_only).with_carriers(carriers);
    let context = Rc::new(context);
    context.set_missing(missing.iter().map(|lun| lun.index));
    // They are watched from the start: nobody renews them.
    former.into_iter().for_each(|(lun, slot)| context.suspect(lun, slot));
    match assemble(&context, &probed, &options, &keeper, warnings, missing, info).await {
        Ok(volume) => Ok(volume),
        Err(error) => {
            for member in context.members() {
                leave(&context, &*keeper, &member, true).await.ok();
            }
            Err(error)
        }
    }
}

fn draw_incarnation(env: &Rc<dyn Env>) -> u64 {
    let mut bytes = [0; 8];
    env.random(&mut bytes);
    u64::from_le_bytes(bytes).max(1)
}

/// Joins every LUN, with the same slot index where it is free. A failure leaves those that were joined. `former` gets the slots that an
/// earlier mount of this host did not leave.
async fn join_all(
    io: &CellIo,
    probed: &[Probed],
    options: &MountOptions,
    keeper: &dyn SlotKeeper,
    incarnation: u64,
    warnings: &mut Vec<String>,
    former: &mut Vec<(LunIndex, SlotId)>,
) -> Result<Vec<OwnSlot>, FsError> {
    let mut slots: Vec<OwnSlot> = Vec::with_capacity(probed.len());
    // What lies in a window is joined after the LUN that carries it: paths are registered there.
    let (own, carried): (Vec<&Probed>, _) = probed.iter().partition(|p| !is_carried(p));
    for p in own.into_iter().chain(carried) {
        let prefer = slots.first().map(|own| own.slot.slot).or(options.slot_hint);
        let lun = p.header.lun_index;
        let joining = Joining {
            io,
            lun: &p.lun,
            index: lun,
            lun_uuid: p.header.lun_uuid,
            identity: &options.host,
            incarnation,
            lease: p.header.lease,
            prefer,
        };
        match keeper.join(joining).await {
            Ok(own) => slots.push(own),
            Err(error) => {
                leave_all(io, keeper, probed, &mut slots).await;
                return Err(error);
            }
        }
    }
    if let Err(error) = mark_paths(io, probed, &slots).await {
        leave_all(io, keeper, probed, &mut slots).await;
        return Err(error);
    }
    for p in probed {
        former.extend(former_selves(io, p, &options.host, incarnation, warnings).await?);
    }
    Ok(slots)
}

fn is_carried(probed: &Probed) -> bool {
    probed.lun.as_member().is_some_and(|member| member.window().is_some())
}

/// The slots of a LUN that an earlier mount of this host did not leave.
pub(super) async fn former_selves(
    io: &CellIo,
    probed: &Probed,
    host: &HostIdentity,
    incarnation: u64,
    warnings: &mut Vec<String>,
) -> Result<Vec<(LunIndex, SlotId)>, FsError> {
    let (lun, mut former) = (probed.header.lun_index, Vec::new());
    for (number, slot) in slot::read_slots(io, &probed.lun, lun).await?.into_iter().enumerate() {
        match slot {
            Ok((_, h)) if h.state != SlotState::Free && h.host == host.host && h.incarnation != incarnation => {
                former.push((lun, SlotId(number as u8)));
                warnings.push(format!(
                    "slot {number} of {}: an earlier mount of this very host (generation {}) never left; its locks stay until \
                     its lease is over for certain, then it is recovered by itself: see vmfs status",
                    probed.lun.name(),
                    h.generation
                ));
            }
            Ok(_) => {}
            Err(error) => warnings.push(format!("slot {number} of {}: {error}", probed.lun.name())),
        }
    }
    Ok(former)
}

/// Marks the paths that carry plain writes as the slots'.
async fn mark_paths(io: &CellIo, probed: &[Probed], slots: &[OwnSlot]) -> Result<(), FsError> {
    for own in slots {
        slot::mark_paths(io, lun_of(probed, own), own).await?;
    }
    Ok(())
}

/// Leaves slots that were just joined, as far as that works: nothing was done in them.
async fn leave_all(io: &CellIo, keeper: &dyn SlotKeeper, probed: &[Probed], slots: &mut [OwnSlot]) {
    for own in slots {
        let lun = lun_of(probed, own);
        keeper.leave(io, lun, own, true).await.ok();
        lun.unmark_paths().await;
    }
}

fn lun_of<'a>(probed: &'a [Probed], own: &OwnSlot) -> &'a Rc<dyn Lun> {
    &probed.iter().find(|p| p.header.lun_index == own.lun).expect("was joined").lun
}

fn describe(first: &Probed, read_only: bool, incarnation: u64, root: ObjectRef) -> VolumeInfo {
    VolumeInfo {
        uuid: first.volume(),
        label: first.header.label.clone(),
        cell_size: first.context.cell_size,
        block_size: first.header.block_size,
        lock_mode: first.header.lock_mode,
        lease: first.header.lease,
        read_only,
        incarnation,
        root,
    }
}

/// Puts the parts together over the members and finds the root directory.
async fn assemble(
    context: &Rc<Context>,
    probed: &[Probed],
    options: &MountOptions,
    keeper: &Rc<dyn SlotKeeper>,
    warnings: Vec<String>,
    missing: Vec<MissingLun>,
    info: impl Fn(ObjectRef) -> VolumeInfo,
) -> Result<Volume, FsError> {
    let space = Space::new(context);
    let objects = Objects::new(context.clone(), space.clone());
    let root = find_root(&objects, probed[0].header.root).await?;
    for member in context.members() {
        space.blocks.scan(member.index, 0, FIRST_SCAN_CELLS).await?;
    }
    let files = Rc::new(Files::new(context.clone(), space.clone(), objects.clone()));
    Ok(Volume {
        inner: Rc::new(Inner {
            context: context.clone(),
            names: Rc::new(Names::new(objects.clone(), root.fd)),
            objects,
            files,
            info: info(root),
            host: options.host.clone(),
            closing: Cell::new(false),
            left: Cell::new(false),
            wake: tokio::sync::Notify::new(),
            keeper: keeper.clone(),
            adopting: tokio::sync::Mutex::new(()),
            extending: tokio::sync::Mutex::new(()),
            draining: tokio::sync::Mutex::new(()),
            stopping: Cell::new(false),
            membership: tokio::sync::Notify::new(),
            finder: RefCell::default(),
            unfound: RefCell::default(),
            missing,
            reaping: tokio::sync::Mutex::new(()),
            scrubs: Cell::new(0),
            rounds: tokio::sync::RwLock::new(()),
            warnings: RefCell::new(warnings),
            takeovers: RefCell::default(),
            others_let_go: RefCell::default(),
        }),
    })
}

/// The root directory. That it cannot be read because its LUN is missing is no reason not to mount: its names are rebuilt.
async fn find_root(objects: &Rc<Objects>, fd: FdId) -> Result<ObjectRef, FsError> {
    match objects.load_any(fd).await {
        Ok(root) if root.image().root.object_type == Some(ObjectType::Directory) => Ok(root.reference()),
        Ok(root) => {
            let message = format!("the root directory {} is no directory; run fsck.vmfs", root.fd);
            Err(FsError::refused(FsErrorKind::Corrupt, message))
        }
        Err(error) if objects.context().is_loss(&error) => Ok(ObjectRef { fd, link: ROOT_LINK }),
        Err(error) => Err(error),
    }
}

/// Closes, tidies and leaves. All steps are taken whatever fails; the first error is given.
pub(super) async fn unmount(inner: &Rc<Inner>) -> Result<(), FsError> {
    if inner.closing.replace(true) {
        return Err(FsError::refused(FsErrorKind::Invalid, "the volume is being unmounted already"));
    }
    // A LUN that is being taken up has its slot by then, or gives up.
    let _no_more_members = inner.adopting.lock().await;
    // What writes plainly, or changes what it has read long ago, has ended too before a slot is left.
    inner.stopping.set(true);
    let _nothing_is_formatted = inner.extending.lock().await;
    let _nothing_is_moved = inner.draining.lock().await;
    let _no_more_rounds = inner.rounds.write().await;
    let mut result = inner.files.close_all().await;
    if !inner.info.read_only && inner.context.fenced().is_none() {
        result = result.and(finish(inner).await);
        let objects = &inner.objects;
        let waiting =
            inner.names.unfinished() + inner.names.removed_count() + objects.deferred() + objects.doubtful_locks();
        let nothing_left = result.is_ok() && waiting == 0;
        inner.left.set(true);
        for member in inner.context.members() {
            let clean = (nothing_left && !member.is_unresolved()) || active(Sabotage::AlwaysClean);
            if !clean {
                tracing::warn!(lun = %member.lun.name(), "the slot is left dirty: something stays behind for recovery");
            }
            let _renewals_ended = member.renewal.lock().await;
            if inner.files.is_in_doubt_on(member.index) {
                // Only the end of its lease proves to the others that what is on its way under its locks has ended.
                tracing::warn!(lun = %member.lun.name(), "the slot is not left: the end of a write is not known");
                abandon(&inner.context, &member);
                continue;
            }
            result = result.and(leave(&inner.context, &*inner.keeper, &member, clean).await);
        }
    }
    inner.left.set(true);
    inner.wake.notify_waiters();
    // A host that was fenced has nothing to leave; that it lost its slots is what matters most.
    inner.context.over().map_or(result, Err)
}

/// Finishes everything that was put off.
async fn finish(inner: &Rc<Inner>) -> Result<(), FsError> {
    let mut result = Ok(());
    for _ in 0..LAST_ROUNDS {
        result = inner.names.tidy().await;
        result = result.and(inner.reap().await);
        result = result.and(inner.settle_contested().await);
        result = result.and(inner.objects.tidy().await);
        result = result.and(inner.objects.release_doubtful_locks().await);
        if result.is_ok() && inner.names.unfinished() == 0 {
            break;
        }
    }
    result.and(inner.objects.space().units.drain_pools().await)
}

async fn leave(
    context: &Rc<Context>,
    keeper: &dyn SlotKeeper,
    member: &Rc<Member>,
    clean: bool,
) -> Result<(), FsError> {
    let Some(mut own) = abandon(context, member) else {
        return Ok(());
    };
    let left = keeper.leave(&context.io, &member.lun, &mut own, clean).await;
    // What stays behind may still be on its way: then the mark stays too, and with it the means to fence it.
    if clean && left.is_ok() {
        member.lun.unmark_paths().await;
    }
    left
}

/// Forgets the own slot on a LUN: nothing is written there any more, and nobody renews it.
fn abandon(context: &Context, member: &Member) -> Option<OwnSlot> {
    let own = member.slot.borrow_mut().take()?;
    context.gate().poison(member.index, own.slot.generation);
    Some(own)
}
