//! Promises of scale, in virtual time: hosts at work in their own directories do not wait for one another, nor for the death of one of them.

mod names_support;

use std::rc::Rc;
use std::time::Duration;

use names_support::*;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::heartbeat::SlotState;
use vmfs_core::sim::{HostNo, MemoryDisk, Sim, TaskHandle};
use vmfs_core::slot;
use vmfs_core::units::CellSize;
use vmfs_core::volume::Volume;

/// Each command takes this long to arrive and as long to be answered.
const ONE_WAY: Duration = Duration::from_micros(500);

/// Hosts that are mounted, each with a directory of its own in which it has worked before, and with latency from now on.
async fn at_work(sim: &Sim, disks: &[MemoryDisk], hosts: u32) -> Vec<(HostNo, Volume, ObjectRef)> {
    let mut all = Vec::new();
    for number in 1..=hosts {
        let (volume, paths) = mount(sim, disks, number).await;
        let directory = mkdir(&volume, volume.root(), format!("of host {number}").as_bytes()).await.unwrap().object;
        create_and_remove(&volume, directory, 0).await;
        all.push((HostNo(number), volume, directory, paths));
    }
    all.iter().flat_map(|(_, _, _, paths)| paths).for_each(|path| path.set_latency(ONE_WAY, ONE_WAY));
    all.into_iter().map(|(no, volume, directory, _)| (no, volume, directory)).collect()
}

async fn create_and_remove(volume: &Volume, directory: ObjectRef, nth: u32) {
    let name = format!("file {nth}");
    create(volume, directory, name.as_bytes()).await.unwrap();
    volume.unlink(directory, name.as_bytes()).await.unwrap();
}

/// Virtual time in which so many hosts make and remove so many files each.
fn time_of(hosts: u32, files: u32) -> Duration {
    let (sim, disks) = world(3, 1, CellSize::B512);
    let took = sim.block_on(async {
        let hosts = at_work(&sim, &disks, hosts).await;
        let began = sim.now();
        let work: Vec<TaskHandle<()>> = hosts
            .into_iter()
            .map(|(no, volume, directory)| {
                sim.spawn(no, async move {
                    for nth in 0..files {
                        create_and_remove(&volume, directory, nth).await;
                    }
                })
            })
            .collect();
        for host in work {
            host.join().await.unwrap();
        }
        Duration::from_nanos(sim.now() - began)
    });
    sim.end();
    took
}

#[test]
fn eight_hosts_in_their_own_directories_do_six_times_the_work_of_one() {
    let files = 60;
    let (one, eight) = (time_of(1, files), time_of(8, files));
    let times = 8.0 * one.as_secs_f64() / eight.as_secs_f64();
    println!("one host: {one:?} for {files} files, eight hosts: {eight:?} for {files} each: {times:.1} times the work");
    assert!(times >= 6.0, "eight hosts do {times:.1} times the work of one");
}

/// The longest that a host waits for making and removing a file, over forty seconds, while another one dies after five or does not: it is
/// watched, broken and recovered meanwhile.
fn longest_wait(dies: bool) -> Duration {
    let (sim, disks) = world(4, 1, CellSize::B512);
    let longest = sim.block_on(async {
        let hosts = at_work(&sim, &disks, 3).await;
        let (dead, other) = (slots_of(&hosts[0].1), hosts[1].1.clone());
        let mut work: Vec<TaskHandle<Duration>> = Vec::new();
        for (no, volume, directory) in hosts {
            let world = Rc::new(sim.clone());
            work.push(sim.spawn(no, async move {
                let mut longest = Duration::ZERO;
                for nth in 0..80 {
                    let began = world.now();
                    create_and_remove(&volume, directory, nth).await;
                    longest = longest.max(Duration::from_nanos(world.now() - began));
                    world.sleep(Duration::from_millis(500)).await;
                }
                longest
            }));
        }
        sim.sleep(Duration::from_secs(5)).await;
        if dies {
            sim.kill(HostNo(1));
            dead.iter().for_each(|(lun, slot)| other.context().suspect(*lun, slot.slot));
        }
        work.remove(0);
        let mut longest = Duration::ZERO;
        for host in work {
            longest = longest.max(host.join().await.unwrap());
        }
        let member = other.context().members().remove(0);
        let (_, slot) = slot::read_slot(&other.context().io, &member.lun, member.index, dead[0].1.slot).await.unwrap();
        assert_eq!(slot.state == SlotState::Free, dies, "it was recovered while the others worked");
        longest
    });
    sim.end();
    longest
}

#[test]
fn the_death_of_one_host_adds_no_pause_to_the_others() {
    let (calm, with_a_death) = (longest_wait(false), longest_wait(true));
    println!("longest wait: {calm:?}, with a death: {with_a_death:?}");
    // The recovery re-stamps cells that the others work on: what loses to that is done once more, it is not waited for anything.
    assert!(with_a_death <= calm * 3, "{with_a_death:?} instead of {calm:?}");
}
