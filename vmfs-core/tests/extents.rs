//! Promises of members that come while the volume is mounted: files that are open use them, nothing else is taken for one, and what is
//! open under a lock that was taken before is safe there.

mod names_support;

use std::rc::Rc;
use std::sync::Arc;

use names_support::*;
use vmfs_core::cas::{CasOutcome, CellChange};
use vmfs_core::check::Severity;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::MemberState;
use vmfs_core::format::layout::member_cell;
use vmfs_core::format::member::Member;
use vmfs_core::lun::Lun;
use vmfs_core::sim::{HostNo, MemoryDisk, Sim, format_disks};
use vmfs_core::units::{CellSize, LunIndex, Seq};
use vmfs_core::volume::Volume;

const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };
const SECOND: LunIndex = LunIndex::new(2).unwrap();

async fn write(volume: &Volume, open: &Arc<OpenFile>, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(open, at + done as u64, &bytes[done..]).await?;
    }
    volume.flush(open).await
}

fn path(sim: &Sim, disk: &MemoryDisk, host: u32) -> Rc<dyn Lun> {
    disk.connect(sim, HostNo(host))
}

/// What the first LUN says of the second one.
async fn set_state(volume: &Volume, state: MemberState) {
    let cell = volume.context().read_cell(member_cell(LunIndex::new(1).unwrap(), SECOND)).await.unwrap();
    let member = Member { state, ..Member::decode(cell.payload()).unwrap() };
    let outcome = volume.context().cas(&cell, CellChange::payload(&cell, member.encode())).await.unwrap();
    assert!(matches!(outcome, CasOutcome::Applied(_)));
}

/// How often the root cell of an object has changed.
async fn root_seq(volume: &Volume, object: ObjectRef) -> Seq {
    let at = volume.context().member(object.fd.lun()).unwrap().layout.root_cell(object.fd).unwrap();
    volume.context().read_cell(at).await.unwrap().header().seq
}

/// A volume of two LUNs of which the first one calls the second one removed: it mounts alone.
async fn without_second(sim: &Sim, disks: &[MemoryDisk]) {
    let (volume, _) = mount(sim, disks, 9).await;
    set_state(&volume, MemberState::Removed).await;
    volume.unmount().await.unwrap();
}

#[test]
fn a_file_that_is_open_and_finds_no_space_goes_on_a_member_that_came_later() {
    for seed in 0..4 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            without_second(&sim, &disks).await;
            let (volume, _) = mount(&sim, &disks[..1], 1).await;
            let file = create(&volume, volume.root(), b"grows").await.unwrap().object;
            let open = volume.open(file, WRITE).await.unwrap();
            let mut size = 0;
            let full = loop {
                match write(&volume, &open, size, &[1; 1 << 20]).await {
                    Ok(()) => size += 1 << 20,
                    Err(error) => break error,
                }
            };
            assert_eq!(full.kind(), FsErrorKind::NoSpace, "{full}");
            set_state(&volume, MemberState::Active).await;
            assert_eq!(volume.adopt(path(&sim, &disks[1], 1)).await.unwrap(), SECOND);
            write(&volume, &open, size, &[2; 5 << 20]).await.unwrap();
            assert_eq!(volume.files().read(&open, size, 5 << 20).await.unwrap(), [2; 5 << 20]);
            let used = volume.status().await.luns.into_iter().find(|lun| lun.info.index == SECOND).unwrap();
            assert!(used.total_blocks - used.free_blocks >= 80, "{used:?}");
            volume.close(open).await.unwrap();
            volume.unmount().await.unwrap();
            // What is on it is there for everybody, and nothing contradicts.
            let (other, _) = mount(&sim, &disks, 2).await;
            let open = other.open(file, OpenMode::READ).await.unwrap();
            assert_eq!(other.files().read(&open, size, 5 << 20).await.unwrap(), [2; 5 << 20]);
            other.close(open).await.unwrap();
            other.unmount().await.unwrap();
        });
        let errors: Vec<_> =
            sim.block_on(fsck(&sim, &disks, true)).into_iter().filter(|f| f.severity == Severity::Error).collect();
        assert_eq!(errors, [], "seed {seed}");
    }
}

#[test]
fn a_lock_that_was_taken_before_a_member_came_is_confirmed_before_its_data_there_is_touched() {
    let (sim, disks) = world(1, 2, CellSize::B512);
    sim.block_on(async {
        without_second(&sim, &disks).await;
        let (early, _) = mount(&sim, &disks[..1], 1).await;
        let (late, _) = mount(&sim, &disks[..1], 2).await;
        let file = create(&early, early.root(), b"shared").await.unwrap().object;
        set_state(&early, MemberState::Active).await;
        early.adopt(path(&sim, &disks[1], 1)).await.unwrap();
        // The first host puts the file on both LUNs; the second one takes its lock without knowing the new LUN.
        let open = early.open(file, WRITE).await.unwrap();
        let size = 80 << 20;
        write(&early, &open, 0, &vec![5; size]).await.unwrap();
        early.close(open).await.unwrap();
        let open = late.open(file, WRITE).await.unwrap();
        let end = size as u64 - 4096;
        let missing = write(&late, &open, end, &[6; 4096]).await.unwrap_err();
        assert!(missing.to_string().contains("LUN that is not there"), "{missing}");
        let before = root_seq(&late, file).await;
        late.adopt(path(&sim, &disks[1], 2)).await.unwrap();
        write(&late, &open, end, &[6; 4096]).await.unwrap();
        assert_ne!(root_seq(&late, file).await, before, "the lock was not confirmed");
        late.close(open).await.unwrap();
        early.unmount().await.unwrap();
        late.unmount().await.unwrap();
    });
    let errors: Vec<_> =
        sim.block_on(fsck(&sim, &disks, true)).into_iter().filter(|f| f.severity == Severity::Error).collect();
    assert_eq!(errors, []);
}

#[test]
fn what_is_no_member_in_use_of_this_volume_is_not_taken_up() {
    let (sim, disks) = world(2, 2, CellSize::B512);
    let foreign = [MemoryDisk::new("foreign", 64 << 20, Some(CellSize::B512))];
    let blank = MemoryDisk::new("blank", 64 << 20, Some(CellSize::B512));
    sim.block_on(async {
        format_disks(&sim, &foreign, options(CellSize::B512)).await.unwrap();
        without_second(&sim, &disks).await;
        let (volume, _) = mount(&sim, &disks[..1], 1).await;
        for (disk, kind, words) in [
            (&disks[0], FsErrorKind::Exists, "in use already"),
            (&disks[1], FsErrorKind::Invalid, "Removed"),
            (&foreign[0], FsErrorKind::Invalid, "belongs to volume"),
            (&blank, FsErrorKind::Invalid, "no LUN of a VMFS volume"),
        ] {
            let refused = volume.adopt(path(&sim, disk, 1)).await.unwrap_err();
            assert_eq!(refused.kind(), kind, "{refused}");
            assert!(refused.to_string().contains(words), "{refused}");
        }
        assert_eq!(volume.luns().len(), 1);
        volume.unmount().await.unwrap();
        assert_eq!(volume.adopt(path(&sim, &disks[1], 1)).await.unwrap_err().kind(), FsErrorKind::Io);
    });
}
