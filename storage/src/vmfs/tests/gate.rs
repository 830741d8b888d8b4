//! Promises of a disk whose host cannot vouch for its lock, for a while or for good.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockd::client::Withdrawn;
use scsi::{BlockDevice, StorageError};
use tokio::task::JoinHandle;

use super::world::{GRANULE, How, World};
use super::{bytes, range, read, run};
use crate::vmfs::VmfsDisk;

/// Long enough for several looks at the gate.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(350)).await;
}

/// Sends a request that meets a closed gate, and waits until the machine is frozen for it.
async fn frozen<T: 'static>(world: &World, request: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    let held = tokio_uring::spawn(request);
    until("freeze", || world.told() == ["freeze"]).await;
    held
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never happened: {what}");
}

/// A disk with one granule on each LUN and holes behind.
async fn disk(world: &Arc<World>) -> Rc<VmfsDisk> {
    let disk = Rc::new(world.open(&How::default()));
    disk.write(0, &bytes(1, 4 * GRANULE, 0), false).await.unwrap();
    disk
}

#[test]
fn requests_that_meet_a_closed_gate_wait_and_go_on_with_nothing_lost() {
    run(async {
        let world = World::new();
        let disk = disk(&world).await;
        world.close_gate_of(0);
        let ended = Rc::new(Cell::new(0));
        let tasks: Vec<_> = (0..6)
            .map(|number| {
                let (disk, ended) = (disk.clone(), ended.clone());
                tokio_uring::spawn(async move {
                    match number {
                        0 => assert_eq!(read(&disk, 0, 4 * GRANULE).await[4096], 1),
                        1 => disk.write(512, &bytes(2, 512, 0), false).await.unwrap(),
                        2 => disk.write(10 * GRANULE, &bytes(3, 512, 0), true).await.unwrap(),
                        3 => disk.flush().await.unwrap(),
                        4 => disk.unmap(&[range(2 * GRANULE, GRANULE)]).await.unwrap(),
                        _ => assert_eq!(read(&disk, 20 * GRANULE, 512).await, [0; 512]),
                    }
                    ended.set(ended.get() + 1);
                })
            })
            .collect();
        a_while().await;
        assert_eq!((ended.get(), world.told()), (0, vec!["freeze".to_string()]));
        assert_eq!((world.counts().flushes, world.counts().punches, world.used()), (0, 0, 4));
        world.open_gate();
        for task in tasks {
            task.await.unwrap();
        }
        until("thaw", || world.told() == ["freeze", "thaw"]).await;
        let image = world.image(true);
        assert_eq!((image[512], image[10 * GRANULE as usize], image[2 * GRANULE as usize]), (2, 3, 0));
    });
}

#[test]
fn an_idle_guest_stands_still_too_and_goes_on() {
    run(async {
        let world = World::new();
        let _disk = disk(&world).await;
        for round in 1..3 {
            world.close_gate_of(0);
            until("freeze", || world.told().len() == 2 * round - 1).await;
            world.open_gate();
            until("thaw", || world.told().len() == 2 * round).await;
        }
        assert_eq!(world.told(), ["freeze", "thaw", "freeze", "thaw"]);
    });
}

#[test]
fn a_lun_out_of_reach_stops_only_those_who_need_it() {
    run(async {
        let world = World::new();
        let disk = disk(&world).await;
        world.close_gate_of(1);
        a_while().await;
        assert!(world.told().is_empty());
        disk.write(0, &bytes(5, GRANULE, 0), false).await.unwrap();
        let user = disk.clone();
        let needs_it = frozen(&world, async move { user.write(0, &bytes(6, 2 * GRANULE, 0), false).await }).await;
        world.open_gate();
        needs_it.await.unwrap().unwrap();
        until("thaw", || world.told() == ["freeze", "thaw"]).await;
        assert_eq!(world.image(false)[..2 * GRANULE as usize], [6; 2 * GRANULE as usize]);
    });
}

#[test]
fn a_lock_that_went_to_another_host_fails_everything_for_good() {
    run(async {
        let world = World::new();
        let disk = disk(&world).await;
        world.close_gate_of(0);
        let user = disk.clone();
        let held = frozen(&world, async move { user.write(0, &bytes(9, 512, 0), false).await }).await;
        world.poison(0);
        assert_eq!(held.await.unwrap(), Err(StorageError::LockLost));
        world.open_gate();
        let buffer = bytes(0, 512, 0);
        assert_eq!(disk.read(0, &buffer).await, Err(StorageError::LockLost));
        assert_eq!(disk.read(30 * GRANULE, &buffer).await, Err(StorageError::LockLost));
        assert_eq!(disk.write(0, &buffer, false).await, Err(StorageError::LockLost));
        assert_eq!(disk.write(30 * GRANULE, &buffer, true).await, Err(StorageError::LockLost));
        assert_eq!(disk.unmap(&[range(0, GRANULE)]).await, Err(StorageError::LockLost));
        assert_eq!(disk.flush().await, Err(StorageError::LockLost));
        let told = world.told();
        assert!(told.len() == 3 && told[1].contains("another host") && told[2] == "thaw", "{told:?}");
        assert_eq!(world.image(false)[0], 1);
    });
}

#[test]
fn a_mount_that_wants_the_disk_back_or_has_ended_is_heard_without_a_request() {
    for cause in [Withdrawn::Revoked, Withdrawn::MountEnded] {
        run(async {
            let world = World::new();
            let disk = disk(&world).await;
            world.withdraw(cause);
            until("the loss", || world.told() == [cause.to_string()]).await;
            assert_eq!(disk.write(0, &bytes(9, 512, 0), false).await, Err(StorageError::LockLost));
            assert_eq!(world.image(false)[0], 1);
        });
    }
}

#[test]
fn a_failure_of_a_mount_that_has_ended_is_a_loss_and_no_medium_error() {
    run(async {
        let world = World::new();
        let disk = disk(&world).await;
        world.withdraw(Withdrawn::MountEnded);
        world.fail(Some(libc::ENOTCONN));
        assert_eq!(disk.flush().await, Err(StorageError::LockLost));
        assert_eq!(world.told(), [Withdrawn::MountEnded.to_string()]);
    });
}

#[test]
fn a_mount_whose_end_the_kernel_tells_first_is_a_loss_too() {
    for errno in [libc::ENOTCONN, libc::ECONNABORTED] {
        run(async {
            let world = World::new();
            let disk = disk(&world).await;
            world.fail(Some(errno));
            assert_eq!(disk.write(30 * GRANULE, &bytes(9, 512, 0), false).await, Err(StorageError::LockLost));
            assert_eq!(disk.write(0, &bytes(9, 512, 0), false).await, Err(StorageError::LockLost));
            assert_eq!((world.told(), world.image(false)[0]), (vec![Withdrawn::MountEnded.to_string()], 1));
        });
    }
}

#[test]
fn a_machine_that_ends_does_not_wait_for_its_storage() {
    run(async {
        let world = World::new();
        let disk = disk(&world).await;
        world.close_gate_of(0);
        let user = disk.clone();
        let held = frozen(&world, async move { user.read(0, &bytes(0, 512, 0)).await }).await;
        world.ending.store(true, Ordering::SeqCst);
        assert_eq!(held.await.unwrap(), Err(StorageError::Frozen));
        assert_eq!(disk.flush().await, Err(StorageError::Frozen));
        drop(disk);
        until("thaw", || world.told() == ["freeze", "thaw"]).await;
    });
}
