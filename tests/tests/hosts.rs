//! Two mounts of the same LUN files are two hosts: names are linearizable, writers exclude each other.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Instant;

use tests::harness::{Luns, run, scale, system};
use tests::history::{Answer, Event, Names, Operation, is_linearizable};
use tests::random::Random;

fn perform(folder: &Path, operation: Operation) -> Answer {
    let at = |name: u8| folder.join(format!("n{name}"));
    let answered = match operation {
        Operation::Create(name) => {
            File::options().write(true).create_new(true).open(at(name)).and_then(|f| f.metadata()).map(|m| m.ino())
        }
        Operation::Unlink(name) => fs::remove_file(at(name)).map(|()| 0),
        Operation::Rename(from, to) => fs::rename(at(from), at(to)).map(|()| 0),
        Operation::Stat(name) => fs::symlink_metadata(at(name)).map(|m| m.ino()),
    };
    match answered {
        Ok(id) => Answer::Done(id),
        Err(e) if e.kind() == ErrorKind::NotFound => Answer::NotFound,
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Answer::Exists,
        // The other host has the file open for writing at this moment: the operation was refused and did nothing.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Answer::Busy,
        Err(e) => panic!("{operation:?} in {}: {e}", folder.display()),
    }
}

fn listing(folder: &Path) -> Names {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| {
            let name = e.file_name().to_str().unwrap()[1..].parse().unwrap();
            (name, fs::symlink_metadata(e.path()).unwrap().ino())
        })
        .collect()
}

/// Renames that succeeded beside the same rename of another host may have done nothing ([`Answer::DoneOrSame`]).
fn excuse_same_renames(events: &mut [Event]) {
    let renames: Vec<Event> = events.iter().filter(|e| matches!(e.operation, Operation::Rename(..))).copied().collect();
    for event in events.iter_mut().filter(|e| matches!(e.answer, Answer::Done(_))) {
        let twins = renames.iter().filter(|other| {
            other.operation == event.operation
                && matches!(other.answer, Answer::Done(_))
                && other.called <= event.answered
                && event.called <= other.answered
        });
        if matches!(event.operation, Operation::Rename(..)) && twins.count() > 1 {
            event.answer = Answer::DoneOrSame;
        }
    }
}

fn hammer(folders: &[&Path], threads_each: usize, rounds: u64, seed: u64) {
    const NAMES: u64 = 5;
    const STEPS: u64 = 4;
    let mut before = listing(folders[0]);
    for round in 0..rounds {
        let events = Mutex::new(Vec::new());
        let barrier = Barrier::new(folders.len() * threads_each);
        thread::scope(|scope| {
            for (host, folder) in folders.iter().enumerate() {
                for t in 0..threads_each {
                    let (events, barrier) = (&events, &barrier);
                    let mut random = Random::new(seed ^ round << 16 ^ (host as u64) << 8 ^ t as u64);
                    scope.spawn(move || {
                        barrier.wait();
                        for _ in 0..STEPS {
                            let (a, b) = (random.below(NAMES) as u8, random.below(NAMES) as u8);
                            let operation = match random.below(5) {
                                0 | 1 => Operation::Create(a),
                                2 => Operation::Unlink(a),
                                3 if a != b => Operation::Rename(a, b),
                                _ => Operation::Stat(a),
                            };
                            let called = Instant::now();
                            let answer = perform(folder, operation);
                            let event = Event { called, answered: Instant::now(), operation, answer };
                            events.lock().unwrap().push(event);
                        }
                    });
                }
            }
        });
        let mut events = events.into_inner().unwrap();
        events.retain(|e| e.answer != Answer::Busy);
        excuse_same_renames(&mut events);
        let after = listing(folders[0]);
        assert_eq!(after, listing(folders[folders.len() - 1]), "round {round}: the hosts see different names");
        assert!(
            is_linearizable(&before, &after, &events),
            "round {round} of seed {seed} is not linearizable:\nbefore {before:?}\nafter {after:?}\n{events:#?}"
        );
        before = after;
    }
}

#[test]
fn two_hosts_hammering_one_directory_are_linearizable() {
    let luns = Luns::formatted(2, 256, &[]);
    let (one, two) = (luns.mount(1), luns.mount(2));
    fs::create_dir(one.at("d")).unwrap();
    hammer(&[&one.at("d"), &two.at("d")], 2, scale(150), 42);
    one.unmount();
    two.unmount();
    luns.assert_clean();
}

#[test]
fn two_hosts_hammering_a_large_directory_are_linearizable() {
    let luns = Luns::formatted(1, 256, &["--cell", "4096"]);
    let (one, two) = (luns.mount(1), luns.mount(2));
    fs::create_dir(one.at("d")).unwrap();
    for n in 10..250u16 {
        fs::write(one.at(format!("d/n{n}")), "").unwrap();
    }
    hammer(&[&one.at("d"), &two.at("d")], 2, scale(30), 43);
    one.unmount();
    two.unmount();
    luns.assert_clean();
}

#[test]
fn a_file_never_has_writers_on_two_hosts_at_once() {
    let luns = Luns::formatted(1, 256, &[]);
    let mounts = [luns.mount(1), luns.mount(2)];
    for n in 0..3 {
        fs::write(mounts[0].at(format!("f{n}")), "free").unwrap();
    }
    let held = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for (host, mount) in mounts.iter().enumerate() {
            let held = &held;
            scope.spawn(move || {
                let mut random = Random::new(host as u64);
                for _ in 0..scale(250) {
                    let file = random.below(3);
                    let path = mount.at(format!("f{file}"));
                    match File::options().read(true).write(true).open(&path) {
                        Ok(opened) => {
                            let from = Instant::now();
                            use std::os::unix::fs::FileExt;
                            let stamp = format!("host{host}");
                            opened.write_all_at(stamp.as_bytes(), 0).unwrap();
                            let mut seen = [0; 5];
                            opened.read_exact_at(&mut seen, 0).unwrap();
                            assert_eq!(seen, stamp.as_bytes(), "another writer came in between");
                            let to = Instant::now();
                            drop(opened);
                            held.lock().unwrap().push((file, host, from, to));
                        }
                        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EBUSY), "{e}"),
                    }
                }
            });
        }
    });
    let held = held.into_inner().unwrap();
    for (file, host, from, to) in &held {
        for (other_file, other_host, other_from, other_to) in &held {
            let overlap = from < other_to && other_from < to;
            assert!(file != other_file || host == other_host || !overlap, "two hosts held f{file} at once");
        }
    }
    for host in 0..2 {
        assert!(held.iter().any(|h| h.1 == host), "host {host} was starved");
    }
    let [one, two] = mounts;
    one.unmount();
    two.unmount();
    luns.assert_clean();
}

#[test]
fn what_one_host_writes_the_other_reads() {
    let luns = Luns::formatted(2, 256, &[]);
    let (one, two) = (luns.mount(1), luns.mount(2));
    let mut random = Random::new(9);
    for n in 0..20 {
        let bytes = random.bytes([10, 5_000, 200_000, 2_500_000][n % 4]);
        let (writer, reader) = if n % 2 == 0 { (&one, &two) } else { (&two, &one) };
        fs::write(writer.at("shared"), &bytes).unwrap();
        assert!(fs::read(reader.at("shared")).unwrap() == bytes, "round {n}: the other host reads other bytes");
    }
    fs::create_dir(one.at("dir")).unwrap();
    fs::rename(one.at("shared"), one.at("dir/moved")).unwrap();
    assert!(!two.at("shared").exists() && two.at("dir/moved").exists());
    fs::remove_file(two.at("dir/moved")).unwrap();
    fs::remove_dir(two.at("dir")).unwrap();
    assert_eq!(fs::read_dir(one.path()).unwrap().count(), 0);
    one.unmount();
    two.unmount();
    luns.assert_clean();
}

#[test]
fn two_hosts_unpack_archives_side_by_side() {
    let luns = Luns::formatted(2, 512, &[]);
    let source = luns.beside("source");
    let mut random = Random::new(1);
    for d in 0..5 {
        fs::create_dir_all(source.join(format!("d{d}"))).unwrap();
        for f in 0..20 {
            let length = random.below(60_000) as usize;
            fs::write(source.join(format!("d{d}/f{f}")), random.bytes(length)).unwrap();
        }
    }
    let mounts = [luns.mount(1), luns.mount(2)];
    thread::scope(|scope| {
        for (n, mount) in mounts.iter().enumerate() {
            let source = &source;
            scope.spawn(move || run(system("cp").arg("-a").arg(source).arg(mount.at(format!("copy{n}")))));
        }
    });
    for n in 0..2 {
        run(system("diff").arg("-r").arg(&source).arg(mounts[1 - n].at(format!("copy{n}"))));
    }
    let [one, two] = mounts;
    one.unmount();
    two.terminate();
    luns.assert_clean();
}
