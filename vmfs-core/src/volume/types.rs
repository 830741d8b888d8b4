//! Owns: the values that the public face of a volume takes and gives.
//! Promises: plain data, no references into the volume; sizes in bytes, times in nanoseconds since 1970.
//! Must not know: how anything is found out or done.

use crate::error::FsErrorKind;
use crate::format::body::{Attributes, Content, DiskFormat};
use crate::format::dirent::ObjectRef;
use crate::format::header::{LeaseTimes, LockMode, MemberState};
use crate::format::heartbeat::{FenceGrade, SlotState};
use crate::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectType};
use crate::lun::Reservation;
use crate::slot::HostIdentity;
use crate::units::{BlockSize, CellAddress, CellSize, FdId, LunIndex, SlotId, SlotRef, Uuid};

/// How a volume is mounted.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Joins no slot and writes nothing, not even a heartbeat: other hosts do not see this mount.
    pub read_only: bool,
    /// Who this host is.
    pub host: HostIdentity,
    /// Slot to take on every LUN when it is free; `None`: derived from the host's UUID.
    pub slot_hint: Option<SlotId>,
    /// Mounts also when members are missing: what lies wholly on the others can be used.
    pub degraded: bool,
}

/// What does not change while a volume is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// The volume.
    pub uuid: Uuid,
    /// Label, may be empty.
    pub label: String,
    /// Unit of compare-and-write.
    pub cell_size: CellSize,
    /// Unit of data allocation.
    pub block_size: BlockSize,
    /// How compare-and-write is done.
    pub lock_mode: LockMode,
    /// Lease parameters of every host.
    pub lease: LeaseTimes,
    /// Mounted read-only.
    pub read_only: bool,
    /// Random number of this mount's incarnation; 0 when read-only.
    pub incarnation: u64,
    /// The root directory.
    pub root: ObjectRef,
}

/// One member LUN, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunInfo {
    /// Index in the volume.
    pub index: LunIndex,
    /// Path or URL as given to mount.
    pub name: String,
    /// Identity.
    pub uuid: Uuid,
    /// Bytes of the LUN that are part of the volume.
    pub bytes: u64,
    /// State.
    pub state: MemberState,
    /// This host's slot there; `None` when read-only.
    pub slot: Option<SlotRef>,
}

/// An object that keeps something on a LUN that is emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stayed {
    /// The object.
    pub object: FdId,
    /// Its last known name; may be empty.
    pub name: String,
    /// Why: cause and next step.
    pub reason: String,
    /// Kind of the error.
    pub kind: FsErrorKind,
}

/// What became of emptying a LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainReport {
    /// The LUN.
    pub lun: LunIndex,
    /// Bytes of data blocks that were moved.
    pub moved_bytes: u64,
    /// Bytes of data blocks that are still there.
    pub left_bytes: u64,
    /// Units that are still there.
    pub left_units: u64,
    /// Blocks and units that wait for others: for recovery, or for the proof that a host is gone.
    pub unsettled: u64,
    /// Objects that could not be moved, at most 1000.
    pub stayed: Vec<Stayed>,
    /// Objects whose root cell is there.
    pub root_count: u64,
    /// These objects with their names, at most 1000.
    pub roots: Vec<(FdId, String)>,
}

impl DrainReport {
    pub(super) fn of(lun: LunIndex) -> DrainReport {
        DrainReport {
            lun,
            moved_bytes: 0,
            left_bytes: 0,
            left_units: 0,
            unsettled: 0,
            stayed: Vec::new(),
            root_count: 0,
            roots: Vec::new(),
        }
    }

    /// Whether no data and no unit is left.
    pub fn is_moved(&self) -> bool {
        self.left_bytes == 0 && self.left_units == 0
    }
}

/// What became of a LUN that was taken out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoveReport {
    /// The LUN.
    pub lun: LunIndex,
    /// How its device was named.
    pub name: String,
    /// Where the window is that carries what stays of it.
    pub window: CellAddress,
    /// Bytes that the window takes.
    pub window_bytes: u64,
}

/// What a LUN that has grown gave to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grown {
    /// Size of the LUN that the volume used before, in bytes.
    pub from_bytes: u64,
    /// Size that it uses now, in bytes.
    pub to_bytes: u64,
    /// Blocks gained.
    pub blocks: u64,
}

/// A member that was not there when the volume was mounted, and is not there yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingLun {
    /// Index in the volume.
    pub index: LunIndex,
    /// Identity.
    pub uuid: Uuid,
    /// Size in bytes.
    pub bytes: u64,
    /// What the device said of itself; may be empty.
    pub identity: String,
}

/// What of an object lies on a LUN that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostPart {
    /// All of it, as far as anybody can tell: its root cell.
    RootCell,
    /// Attributes and content, or the root of the mapping.
    Body,
    /// Pointer blocks, inner units, buckets of a directory.
    Units,
    /// File data.
    Blocks,
}

/// An object that a lost LUN hurts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AffectedObject {
    /// Identity.
    pub fd: FdId,
    /// Type, if something that can be read tells it.
    pub object_type: Option<ObjectType>,
    /// What is lost; the most important part.
    pub part: LostPart,
    /// Path from the root, if all directories on it can be read.
    pub path: Option<Vec<u8>>,
}

/// The objects that lost LUNs hurt. Those that only lost directories name are not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affected {
    /// The lost LUNs.
    pub luns: Vec<LunIndex>,
    /// By path.
    pub objects: Vec<AffectedObject>,
    /// There may be more: the search was cut.
    pub cut: bool,
}

/// Space and objects of a volume (statfs(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks of all LUNs.
    pub total_blocks: u64,
    /// Free blocks: exact for this host's changes, other hosts' are seen within a background round.
    pub free_blocks: u64,
    /// Longest name in bytes.
    pub name_max: u32,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Identity; a move to another directory gives it a new `link`.
    pub object: ObjectRef,
    /// Type.
    pub object_type: ObjectType,
    /// Flags.
    pub flags: ObjectFlags,
    /// Attributes; `size` of a file open on this host includes growth that is not committed yet.
    pub attributes: Attributes,
    /// Bytes of data blocks held.
    pub blocks_bytes: u64,
    /// Directory that names it; the root directory is its own parent.
    pub parent: FdId,
}

/// Change of attributes; `None` leaves a field as it is. The time of the change itself is always now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Permission bits (07777).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// New size: truncates or grows with a hole. Files only.
    pub size: Option<u64>,
    /// Last read.
    pub accessed_ns: Option<i64>,
    /// Last change of the content.
    pub modified_ns: Option<i64>,
}

/// A file to be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// `File`; disks and raw device mappings are made by `create_object`.
    pub object_type: ObjectType,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// An existing name is an error of kind `Exists` (O_EXCL); otherwise an existing file is given (and opened).
    pub exclusive: bool,
}

/// A new object in every detail, for virtual disks and raw device mappings.
#[derive(Clone, Debug)]
pub struct NewObjectSpec {
    /// Type.
    pub object_type: ObjectType,
    /// Flags.
    pub flags: ObjectFlags,
    /// LUNs that it may use; `None`: every active one.
    pub luns: Option<LunSet>,
    /// LUN for the descriptor and, while it has room, the data; `None`: the directory's.
    pub prefer: Option<LunIndex>,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Policy of a virtual disk.
    pub disk: Option<DiskFormat>,
    /// Content of the body.
    pub content: Content,
    /// Lock with which the object is born: it is never seen unlocked.
    pub lock: Option<HoldMode>,
}

/// Flags of a rename (renameat2(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// An existing new name is an error of kind `Exists`.
    pub no_replace: bool,
    /// Refused with kind `Invalid`.
    pub exchange: bool,
}

/// What a rename did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renamed {
    /// The object before: handles that carry this reference go over to `after`.
    pub before: ObjectRef,
    /// The object now: the same unless it went to another directory, then `link` is one more.
    pub after: ObjectRef,
    /// The object that had the new name and lost it.
    pub replaced: Option<ObjectRef>,
}

/// An entry as readdir gives it. The child was not read: it may be gone by now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Name.
    pub name: Vec<u8>,
    /// The child.
    pub object: ObjectRef,
    /// Its type.
    pub object_type: ObjectType,
    /// Where to go on after this entry. Ascending, at least 4, fits an i64; 0 is the start, 1..=3 are the caller's ("." and "..").
    pub cookie: u64,
}

/// Who holds a lock, as `vmfs why-locked` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhyLocked {
    /// The object.
    pub object: ObjectRef,
    /// Mode of the lock.
    pub mode: HoldMode,
    /// Holders; empty when nobody holds it.
    pub holders: Vec<LockHolder>,
    /// Another host asks to be let in.
    pub wanted: bool,
    /// The whole story in sentences for people.
    pub explanation: String,
}

/// One holder of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// Slot and generation on the LUN of the object's root cell.
    pub slot: SlotRef,
    /// Incarnation.
    pub incarnation: u64,
    /// It is this mount.
    pub own: bool,
    /// What the slot says now.
    pub host: Option<HostStatus>,
    /// The holder counts: its slot is live at that generation.
    pub counts: bool,
}

/// A slot that is not free, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostStatus {
    /// Slot and generation.
    pub slot: SlotRef,
    /// State. `Live` says only that nobody has taken it over: watch `beat` to see whether it still renews.
    pub state: SlotState,
    /// Host UUID.
    pub host: Uuid,
    /// Host name.
    pub name: String,
    /// Incarnation.
    pub incarnation: u64,
    /// +1 at each renewal.
    pub beat: u64,
    /// For how long this mount has seen no other beat, in milliseconds; 0: it is new since the last look.
    pub beat_age_ms: u64,
    /// Seconds since 1970 at the join, by the owner's clock.
    pub live_since_s: u64,
    /// Fence grade on that LUN: of one that lives, how surely it would be kept out; of one that is gone, how surely it is.
    pub fence_grade: FenceGrade,
    /// Key under which its paths are registered with the LUN's reservation; 0: it has none.
    pub reservation_key: u64,
    /// Paths that are registered under that key, as this mount last saw.
    pub registered_paths: u32,
    /// The owner's lease parameters.
    pub lease: LeaseTimes,
    /// It is this mount.
    pub own: bool,
    /// It is an earlier incarnation of this very host (same host UUID) that did not leave.
    pub former_self: bool,
}

/// A host whose slot on a LUN this mount took over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Takeover {
    /// The LUN.
    pub lun: LunIndex,
    /// Slot and generation there.
    pub slot: SlotRef,
    /// Host UUID.
    pub host: Uuid,
    /// Host name.
    pub name: String,
    /// How surely it is kept from writing.
    pub grade: FenceGrade,
    /// An administrator attested that it is down; else its lease was over.
    pub attested: bool,
}

/// What was done about a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BrokenLock {
    /// The holders that are out of the lock record now.
    pub holders: Vec<SlotRef>,
    /// Slots that were claimed for it at once, on an administrator's word.
    pub takeovers: Vec<Takeover>,
}

/// State of one LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunStatus {
    /// The member.
    pub info: LunInfo,
    /// Blocks.
    pub total_blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Slots that are not free.
    pub hosts: Vec<HostStatus>,
    /// Time until the own lease ends, in milliseconds; 0 when it has ended or there is none.
    pub lease_left_ms: u64,
    /// Why the LUN does not answer, if it does not.
    pub error: Option<String>,
    /// It has answered nothing for so long that it is taken for lost.
    pub lost: bool,
    /// Its persistent reservation as it was last seen; `None`: it has none, or this mount does not look.
    pub reservation: Option<Reservation>,
}

/// State of the volume, as `vmfs status` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStatus {
    /// The volume.
    pub info: VolumeInfo,
    /// Its LUNs that are there.
    pub luns: Vec<LunStatus>,
    /// Its members that are not there.
    pub missing: Vec<MissingLun>,
    /// What the loss of a LUN hurts; nothing while all are there.
    pub affected: Affected,
    /// This host has lost a slot: nothing is written any more until the volume is mounted again.
    pub fenced: Option<String>,
    /// Who keeps this mount's slots; `None` when read-only.
    pub keeper: Option<String>,
    /// Names and space that a failed or interrupted operation of this mount left to be tidied in the background.
    pub unfinished: usize,
    /// Hosts that this mount has taken over from since it was mounted.
    pub takeovers: Vec<Takeover>,
    /// What an administrator should know: hosts that are taken over, errors of background work. Sentences with cause and next step.
    pub warnings: Vec<String>,
}
