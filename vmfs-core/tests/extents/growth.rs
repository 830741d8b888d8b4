//! Promises of LUNs that become larger: what they gain is used by everybody, and a growth that ends anywhere harms nothing.

use super::*;

const FIRST: LunIndex = LunIndex::new(1).unwrap();
const LARGER: u64 = 128 << 20;

async fn grow(volume: &Volume) -> Result<vmfs_core::volume::Grown, FsError> {
    volume.grow_extent(FIRST, &mut |_| ()).await
}

async fn blocks(volume: &Volume) -> u64 {
    volume.statfs().await.total_blocks
}

/// Writes a file larger than the LUN was.
async fn fill(volume: &Volume, name: &[u8]) -> ObjectRef {
    let file = create(volume, volume.root(), name).await.unwrap().object;
    let open = volume.open(file, WRITE).await.unwrap();
    for piece in 0..80u64 {
        write(volume, &open, piece << 20, &vec![piece as u8 + 1; 1 << 20]).await.unwrap();
    }
    volume.close(open).await.unwrap();
    file
}

async fn check_filled(volume: &Volume, file: ObjectRef) {
    let open = volume.open(file, OpenMode::READ).await.unwrap();
    for piece in 0..80u64 {
        let read = volume.files().read(&open, piece << 20, 1 << 20).await.unwrap();
        assert!(read.iter().all(|byte| *byte == piece as u8 + 1), "piece {piece}");
    }
    volume.close(open).await.unwrap();
}

#[test]
fn a_lun_that_one_host_grows_is_used_by_all_others_within_two_heartbeats_and_read_by_them_at_once() {
    for cell_size in [CellSize::B512, CellSize::B4096] {
        let (sim, disks) = world(1, 1, cell_size);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            let refused = grow(&one).await.unwrap_err();
            assert_eq!(refused.kind(), FsErrorKind::Invalid);
            assert!(refused.to_string().contains("not become larger"), "{refused}");
            let before = blocks(&one).await;
            disks[0].resize(LARGER);
            let grown = grow(&one).await.unwrap();
            assert_eq!((grown.from_bytes, grown.to_bytes), (64 << 20, LARGER));
            assert_eq!(blocks(&one).await, before + grown.blocks);
            assert!(grown.blocks >= 1000, "{grown:?}");
            // What lies in the new part is found by a host that has not heard of it yet.
            let file = fill(&one, b"large").await;
            check_filled(&two, file).await;
            let began = sim.now();
            while blocks(&two).await != before + grown.blocks {
                assert!(Duration::from_nanos(sim.now() - began) < 2 * Duration::from_millis(2000));
                sim.sleep(Duration::from_millis(50)).await;
            }
            // Its own allocations go there as well.
            let open = two.open(file, WRITE).await.unwrap();
            write(&two, &open, 80 << 20, &[9; 5 << 20]).await.unwrap();
            two.close(open).await.unwrap();
            sim.sleep(Duration::from_secs(5)).await;
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
            let (after, _) = mount(&sim, &disks, 3).await;
            assert_eq!(blocks(&after).await, before + grown.blocks);
            check_filled(&after, file).await;
            after.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), []);
    }
}

#[test]
fn a_lun_grows_four_times_and_of_two_hosts_that_grow_it_at_once_one_does() {
    for seed in 0..4 {
        let (sim, disks) = world(seed, 1, CellSize::B512);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            for step in 2..=5u64 {
                disks[0].resize(step * (64 << 20));
                let (left, right) = (one.clone(), two.clone());
                let left = sim.spawn(HostNo(1), async move { grow(&left).await });
                let right = sim.spawn(HostNo(2), async move { grow(&right).await });
                let both = [left.join().await.unwrap(), right.join().await.unwrap()];
                assert_eq!(both.iter().filter(|grown| grown.is_ok()).count(), 1, "{both:?}");
                let refused = both.into_iter().find_map(Result::err).unwrap();
                assert!(matches!(refused.kind(), FsErrorKind::Busy | FsErrorKind::Invalid), "{refused}");
            }
            disks[0].resize(6 * (64 << 20));
            let refused = grow(&one).await.unwrap_err();
            assert_eq!(refused.kind(), FsErrorKind::NoSpace, "{refused}");
            let file = fill(&two, b"large").await;
            check_filled(&one, file).await;
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), [], "seed {seed}");
    }
}

/// Kills the growing host at its `nth` change. False: the LUN had grown before.
fn killed_at(nth: usize) -> bool {
    let (sim, disks) = world(nth as u64, 2, CellSize::B512);
    let died = sim.block_on(async {
        let (grower, other) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
        let before = blocks(&other).await;
        disks[0].resize(LARGER);
        let reached = count_down(&disks, nth);
        let growing = sim.spawn(HostNo(1), async move { grow(&grower).await.is_ok() });
        let died = std::pin::pin!(reached.notified());
        let died = match futures_util::future::select(died, std::pin::pin!(growing.join())).await {
            futures_util::future::Either::Left(_) => true,
            futures_util::future::Either::Right((grown, _)) => {
                assert_eq!(grown, Some(true));
                false
            }
        };
        sim.kill(HostNo(1));
        if blocks(&other).await == before && died {
            // Whether the dead one has claimed it or not: after its lease another host may.
            grow(&other).await.ok();
            sim.sleep(Duration::from_secs(60)).await;
            if blocks(&other).await == before {
                grow(&other).await.unwrap();
            }
        }
        sim.sleep(Duration::from_secs(5)).await;
        assert!(blocks(&other).await > before + 1000, "killed at change {nth}");
        let file = fill(&other, b"large").await;
        check_filled(&other, file).await;
        other.unmount().await.unwrap();
        died
    });
    assert_eq!(errors(&sim, &disks), [], "killed at change {nth}");
    died
}

#[test]
fn a_growth_that_dies_at_any_change_is_made_by_another_host() {
    let ended = (1..60).find(|nth| !killed_at(*nth)).expect("a growth takes fewer changes");
    assert!(ended > 5, "it ended after {ended} changes: not every step was met");
}
