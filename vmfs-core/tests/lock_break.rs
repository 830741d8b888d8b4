//! Promises of breaking a lock by hand: no sooner than the lease allows, unless somebody attests that this very host is down; and then
//! the storage still does what it can.

mod names_support;

use std::time::Duration;

use names_support::*;
use vmfs_core::error::FsErrorKind;
use vmfs_core::file::OpenMode;
use vmfs_core::format::heartbeat::FenceGrade;
use vmfs_core::lun::Fencing;
use vmfs_core::sim::HostNo;
use vmfs_core::units::CellSize;

#[test]
fn the_lock_of_a_host_that_may_live_is_not_broken_and_the_refusal_says_when_it_can_be() {
    let (sim, disks) = world(1, 2, CellSize::B512);
    sim.block_on(async {
        let (holder, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let file = create(&holder, holder.root(), b"disk").await.unwrap().object;
        assert_eq!(other.break_lock(file, None).await.unwrap_err().kind(), FsErrorKind::Invalid);
        let open = holder.open(file, OpenMode::WRITE).await.unwrap();
        let error = other.break_lock(file, None).await.unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == FsErrorKind::Busy && text.contains("host1") && text.contains("of 22 s"), "{text}");
        assert!(holder.break_lock(file, None).await.unwrap_err().to_string().contains("this mount holds it"));
        sim.sleep(Duration::from_secs(60)).await;
        other.break_lock(file, None).await.unwrap_err();
        assert!(other.status().await.takeovers.is_empty(), "one that lives is not taken over");
        sim.kill(HostNo(1));
        drop(open);
        other.break_lock(file, None).await.unwrap_err();
        sim.sleep(Duration::from_secs(12)).await;
        let text = other.break_lock(file, None).await.unwrap_err().to_string();
        assert!(text.contains("stood still for 1") && text.contains("can be taken in"), "{text}");
        sim.sleep(Duration::from_secs(16)).await;
        let broken = other.break_lock(file, None).await.unwrap();
        assert_eq!((broken.holders.len(), broken.takeovers.len()), (1, 0));
        assert!(other.status().await.takeovers.iter().all(|takeover| !takeover.attested));
        assert!(other.why_locked(file).await.unwrap().explanation.contains("grade A"));
        other.close(other.open(file, OpenMode::WRITE).await.unwrap()).await.unwrap();
        sim.sleep(Duration::from_secs(120)).await;
        other.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

#[test]
fn on_the_word_that_its_host_is_down_a_lock_is_had_at_once_and_only_that_hosts() {
    for (seed, fencing, grade) in [(2, Fencing::Proven, FenceGrade::A), (3, Fencing::TimeOnly, FenceGrade::C)] {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let (dying, _) = mount(&sim, &disks, 1).await;
            let (other, _) = mount(&sim, &disks, 2).await;
            let file = create(&dying, dying.root(), b"disk").await.unwrap().object;
            let open = dying.open(file, OpenMode::WRITE).await.unwrap();
            dying.files().write(&open, 0, &[7; 5000]).await.unwrap();
            dying.flush(&open).await.unwrap();
            disks.iter().for_each(|disk| disk.set_fencing(fencing));
            sim.kill(HostNo(1));
            for wrong in ["host2", "host", "", "02020202-0202-0202-0202-020202020202"] {
                let error = other.break_lock(file, Some(wrong)).await.unwrap_err();
                assert!(error.kind() == FsErrorKind::Invalid && error.to_string().contains("host1"), "{error}");
            }
            assert!(other.status().await.takeovers.is_empty());
            let began = sim.now();
            let broken = other.break_lock(file, Some("host1")).await.unwrap();
            assert!(sim.now() - began < 1_000_000_000, "it waited {} ns", sim.now() - began);
            assert_eq!((broken.holders.len(), broken.takeovers.len()), (1, 2));
            assert!(
                broken.takeovers.iter().all(|taken| taken.grade == grade && taken.attested && taken.name == "host1")
            );
            assert_eq!(other.status().await.takeovers.len(), 2);
            let taken = other.open(file, OpenMode::WRITE).await.unwrap();
            assert_eq!(other.files().read(&taken, 0, 5000).await.unwrap(), [7; 5000]);
            other.close(taken).await.unwrap();
            sim.sleep(Duration::from_secs(120)).await;
            other.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
        });
        sim.end();
    }
}

#[test]
fn a_word_that_is_wrong_ends_the_host_but_no_two_write() {
    let (sim, disks) = world(4, 1, CellSize::B512);
    sim.block_on(async {
        let (alive, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let file = create(&alive, alive.root(), b"disk").await.unwrap().object;
        let open = alive.open(file, OpenMode::WRITE).await.unwrap();
        // Its process still has its descriptors: the storage cannot prove its end, and so the lock stays.
        disks[0].set_fencing(Fencing::NotYet);
        let error = other.break_lock(file, Some("host1")).await.unwrap_err();
        assert!(error.to_string().contains("is not down"), "{error}");
        assert_eq!(other.open(file, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
        disks[0].set_fencing(Fencing::Proven);
        let broken = other.break_lock(file, Some("01010101-0101-0101-0101-010101010101")).await.unwrap();
        assert_eq!(broken.holders.len(), 1);
        let taken = other.open(file, OpenMode::WRITE).await.unwrap();
        assert!(alive.files().write(&open, 0, &[1; 4096]).await.is_err() || alive.flush(&open).await.is_err());
        other.files().write(&taken, 0, &[2; 4096]).await.unwrap();
        sim.sleep(Duration::from_secs(30)).await;
        assert!(alive.context().fenced().is_some(), "its renewals mismatch for ever");
        assert_eq!(other.files().read(&taken, 0, 4096).await.unwrap(), [2; 4096]);
        other.close(taken).await.unwrap();
        sim.kill(HostNo(1));
        sim.sleep(Duration::from_secs(120)).await;
        other.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}
