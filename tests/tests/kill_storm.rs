//! Three hosts, their VMs and their writers are killed and stopped at random while they work on the same files and disks: no disk ever has
//! two writers, no acknowledged fsync is lost, no foreign bytes show, and in the end everything that the dead left is recovered.
//!
//! The same on iSCSI LUNs, where hosts also lose their network for a while and the target crashes.
//!
//! `VMFS_STORM_SECONDS` says how long it blows, `VMFS_TEST_SEED` which storm it is.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use test_guest::pattern::{Content, SECTOR, inspect};
use tests::harness::{Luns, Mount, PATIENCE};
use tests::machines::{disk, kernel};
use tests::networks::Network;
use tests::random::Random;
use tests::storm::host::{GENERATIONS, Host, PARTS, Part, VM_BYTES, VM_DISKS, VmRun, passes, vm_disk, vm_seed};
use tests::storm::judge::{Verdict, judge};
use tests::storm::notes;
use tests::storm::writer::{DISK, FILE_BYTES, look, published, targets};
use tests::targets::Storage;

const HOSTS: u8 = 3;
/// The order of two VMs on one disk is known when their first signs of life are further apart: logs are looked at ten times a second.
const ORDER_IS_KNOWN: Duration = Duration::from_secs(10);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: not a number")))
}

/// Makes the files and disks that everybody shares.
fn prepare(luns: &Luns) {
    let mount = luns.mount(1);
    disk(&mount, DISK.replace("-flat", "").as_str(), "8M", "thin");
    const { assert!(8 << 20 >= FILE_BYTES, "the disk holds what writers write") };
    for target in targets().iter().filter(|target| *target != DISK) {
        File::create(mount.at(target)).unwrap();
    }
    for vm in 0..VM_DISKS {
        disk(&mount, &format!("{}.vmdk", vm_disk(vm)), "16M", ["thin", "zeroedthick"][vm as usize % 2]);
    }
    kernel(luns);
    mount.unmount();
    luns.assert_recovered();
}

/// Signals of the storm.
#[derive(Debug, Default)]
struct Signals {
    kills: u64,
    short_stops: u64,
    long_stops: u64,
    short_cuts: u64,
    long_cuts: u64,
    crashes: u64,
    /// Who is to go on, and when.
    stopped: Vec<(Instant, usize, Halted)>,
}

/// What of a host stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halted {
    Part(Part),
    Link,
}

/// Longer than the lease, by this much at least: it is over for everybody.
const OVER: Duration = Duration::from_secs(13);

impl Signals {
    /// One blow against a random part of a random host, or against its link if the hosts are on a network.
    fn strike(&mut self, hosts: &mut [Host<'_>], random: &mut Random, network: Option<&Network>) {
        let host = random.below(hosts.len() as u64) as usize;
        let halted = match random.below(if network.is_some() { 4 } else { 3 }) {
            3 => Halted::Link,
            part => Halted::Part(PARTS[part as usize]),
        };
        if self.stopped.iter().any(|(_, other, stopped)| (*other, *stopped) == (host, halted)) {
            return;
        }
        let (short, long) =
            (Duration::from_millis(random.below(6000)), OVER + Duration::from_millis(random.below(6000)));
        let roll = random.below(10);
        let (is_long, pause) = if roll < 8 { (false, short) } else { (true, long) };
        match halted {
            Halted::Link => {
                let network = network.expect("links are those of a network");
                network.set_link(hosts[host].number, false);
                hosts[host].set_cut(true);
                *if is_long { &mut self.long_cuts } else { &mut self.short_cuts } += 1;
            }
            Halted::Part(part) if roll < 4 => {
                self.kills += u64::from(hosts[host].signal(part, libc::SIGKILL));
                return;
            }
            Halted::Part(part) => {
                if !hosts[host].signal(part, libc::SIGSTOP) {
                    return;
                }
                *if is_long { &mut self.long_stops } else { &mut self.short_stops } += 1;
            }
        }
        self.stopped.push((Instant::now() + pause, host, halted));
    }

    /// Lets those go on whose time has come.
    fn go_on(&mut self, hosts: &mut [Host<'_>], network: Option<&Network>, all: bool) {
        let now = Instant::now();
        self.stopped.retain(|(until, host, halted)| {
            let is_due = all || *until <= now;
            match halted {
                Halted::Part(part) if is_due => drop(hosts[*host].signal(*part, libc::SIGCONT)),
                Halted::Link if is_due => {
                    network.expect("links are those of a network").set_link(hosts[*host].number, true);
                    hosts[*host].set_cut(false);
                }
                Halted::Part(_) | Halted::Link => {}
            }
            !is_due
        });
    }

    /// The storage of all of them crashes, and begins again.
    fn crash(&mut self, hosts: &mut [Host<'_>], storage: &mut Storage, luns: &Luns) {
        let cut: Vec<bool> = hosts.iter().map(Host::is_cut).collect();
        hosts.iter_mut().for_each(|host| host.set_cut(true));
        storage.crash();
        storage.restart(luns);
        hosts.iter_mut().zip(cut).for_each(|(host, cut)| host.set_cut(cut));
        self.crashes += 1;
    }
}

/// Lets the storm blow, then ends all hosts in order.
fn storm(
    hosts: &mut [Host<'_>],
    random: &mut Random,
    duration: Duration,
    luns: &Luns,
    mut storage: Option<&mut Storage>,
) -> Signals {
    let mut signals = Signals::default();
    let network = luns.network();
    let start = Instant::now();
    let mut next = start + Duration::from_secs(4);
    let mut crash = start + duration / 4;
    while start.elapsed() < duration {
        for host in hosts.iter_mut() {
            host.look(true).unwrap_or_else(|wrong| panic!("{wrong}"));
        }
        signals.go_on(hosts, network, false);
        if let Some(storage) = storage.as_deref_mut().filter(|_| Instant::now() >= crash) {
            signals.crash(hosts, storage, luns);
            crash = Instant::now() + duration / 4;
        }
        if Instant::now() >= next {
            signals.strike(hosts, random, network);
            next = Instant::now() + Duration::from_millis(300 + random.below(2500));
        }
        thread::sleep(Duration::from_millis(50));
    }
    signals.go_on(hosts, network, true);
    let ending = Instant::now();
    let mut asked = ending;
    while !hosts.iter().all(Host::is_gone) {
        assert!(ending.elapsed() < PATIENCE, "the hosts do not end");
        for host in hosts.iter_mut() {
            host.look(false).unwrap_or_else(|wrong| panic!("{wrong}"));
            if Instant::now() >= asked {
                host.signal(Part::Writer, libc::SIGKILL);
                host.signal(Part::Vm, libc::SIGTERM);
                host.signal(Part::Mount, libc::SIGTERM);
            }
        }
        if Instant::now() >= asked {
            asked = Instant::now() + Duration::from_secs(2);
        }
        thread::sleep(Duration::from_millis(50));
    }
    signals
}

fn judge_writers(hosts: &[Host<'_>], mount: &Mount) -> Verdict {
    let all: Vec<_> = hosts.iter().map(|host| notes::read(&host.notes())).collect();
    let publications: Vec<Option<u64>> = hosts
        .iter()
        .map(|host| fs::read_to_string(mount.at(published(&format!("host{}", host.number)))).ok()?.parse().ok())
        .collect();
    let look = |target: &str, record: u64| {
        File::open(mount.at(target)).and_then(|file| look(&file, record)).unwrap_or_else(|error| Err(error.to_string()))
    };
    judge(&all, look, &publications)
}

/// What is wrong with the disks of the VMs, and how many passes their guests completed.
fn judge_vms(runs: &[&VmRun], mount: &Mount) -> (Vec<String>, u64) {
    let (mut wrong, mut completed) = (Vec::new(), 0);
    for run in runs {
        let passes = passes(&run.log);
        let acknowledged = passes.iter().filter(|pass| pass.is_acknowledged);
        completed += acknowledged.clone().count() as u64;
        wrong.extend(acknowledged.filter(|pass| pass.mismatches > 0).map(|pass| format!("{run:?}: {pass:?}")));
    }
    for disk in 0..VM_DISKS {
        let runs: Vec<_> = runs.iter().filter(|run| run.disk == disk).collect();
        let bytes = fs::read(mount.at(format!("{}-flat.vmdk", vm_disk(disk)))).unwrap();
        let sectors = bytes[..VM_BYTES as usize].chunks_exact(SECTOR).enumerate();
        for (sector, bytes) in sectors {
            if let Some(what) = wrong_sector(&runs, inspect(bytes, vm_seed(disk), sector as u64)) {
                wrong.push(format!("{} sector {sector}: {what}", vm_disk(disk)));
                break;
            }
        }
    }
    (wrong, completed)
}

/// Whether what a sector holds can be the last that was written there.
fn wrong_sector(runs: &[&&VmRun], found: Content) -> Option<String> {
    let acknowledged =
        |run: &VmRun| passes(&run.log).iter().rfind(|pass| pass.is_acknowledged).map(|pass| pass.generation);
    let writer = match found {
        Content::Foreign => return Some("foreign bytes".to_owned()),
        Content::Zero => None,
        Content::Stamped(generation) => {
            let Some(run) =
                runs.iter().find(|run| (run.generation..run.generation + GENERATIONS).contains(&generation))
            else {
                return Some(format!("generation {generation}, which no VM wrote"));
            };
            if acknowledged(run).is_some_and(|last| generation < last) {
                return Some(format!(
                    "generation {generation}, though {:?} was acknowledged: {run:?}",
                    acknowledged(run)
                ));
            }
            run.began
        }
    };
    let later = |run: &&&&VmRun| match (writer, run.began) {
        (Some(writer), Some(began)) => began > writer + ORDER_IS_KNOWN,
        (None, began) => began.is_some(),
        (Some(_), None) => false,
    };
    let lost = runs.iter().filter(later).find(|run| acknowledged(run).is_some())?;
    Some(format!("{found:?}, though a later VM has completed a pass: {lost:?}"))
}

fn takeovers(hosts: &[Host<'_>], luns: &Path) -> usize {
    let first = luns.to_str().unwrap();
    hosts
        .iter()
        .map(|host| host.log().lines().filter(|l| l.contains("is taken over") && l.contains(first)).count())
        .sum()
}

/// Lets a storm blow over a volume, and judges what is left of it.
fn weather(luns: &Luns, mut storage: Option<Storage>) {
    let seed = number("VMFS_TEST_SEED").unwrap_or(3);
    let duration = Duration::from_secs(number("VMFS_STORM_SECONDS").unwrap_or(45));
    println!("storm: seed {seed}, {duration:?}");
    prepare(luns);
    let (generations, mut random) = (AtomicU64::new(1), Random::new(seed));
    let mut hosts: Vec<_> = (1..=HOSTS).map(|n| Host::new(luns, n, &generations, random.bits())).collect();
    let signals = storm(&mut hosts, &mut random, duration, luns, storage.as_mut());
    let last = luns.mount(9);
    last.wait_until_alone();
    let verdict = judge_writers(&hosts, &last);
    let runs: Vec<&VmRun> = hosts.iter().flat_map(|host| &host.vm_runs).collect();
    let (wrong, vm_passes) = judge_vms(&runs, &last);
    println!(
        "storm: {} kills, {} short and {} long stops, {} short and {} long cuts, {} crashes of the storage; \
         {} takeovers of a slot of the first LUN, {} mounts ended because they were fenced; \
         {} sessions, {} writes, {} fsyncs, {} publications; {} VMs with {vm_passes} passes",
        signals.kills,
        signals.short_stops,
        signals.long_stops,
        signals.short_cuts,
        signals.long_cuts,
        signals.crashes,
        takeovers(&hosts, &luns.images()[0]),
        hosts.iter().map(|host| host.fenced).sum::<u64>(),
        verdict.sessions,
        verdict.writes,
        verdict.syncs,
        verdict.published,
        generations.load(Ordering::Relaxed) / GENERATIONS,
    );
    let all: Vec<_> = verdict.wrong.iter().chain(&wrong).collect();
    assert!(all.is_empty(), "seed {seed}: {all:#?}");
    assert!(signals.kills > 0 && verdict.writes > 0 && verdict.syncs > 0 && vm_passes > 0, "it was no storm");
    last.unmount();
    luns.assert_recovered();
}

/// One storm at a time: each is as much as the machine can do.
static SKY: Mutex<()> = Mutex::new(());

#[test]
fn whatever_dies_or_stands_still_no_disk_has_two_writers_and_nothing_acknowledged_is_lost() {
    let _alone = SKY.lock().unwrap_or_else(PoisonError::into_inner);
    weather(&Luns::formatted(2, 512, &["--lease", "fast"]), None);
}

#[test]
fn nor_do_cut_links_and_crashes_of_the_storage_change_that_on_iscsi_luns() {
    let _alone = SKY.lock().unwrap_or_else(PoisonError::into_inner);
    let (storage, luns) = Storage::in_network(Network::new(HOSTS), 3);
    weather(&luns, Some(storage));
}
