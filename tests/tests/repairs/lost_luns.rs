//! Each LUN in turn is pulled, the first one too, under hosts that work: what does not lie on it goes on, the rest gives EIO, and with the
//! LUN's return all goes on without a remount. Real processes on image files, whose paths to a LUN are cut.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tests::faults::Paths;
use tests::harness::{Luns, Mount, command, output, text, wait_for};
use vmfs_core::units::FdId;

const LUNS: usize = 3;
/// Records of a writer's file, and from one to the next: more than a granule.
const RECORDS: u64 = 24;
const STRIDE: u64 = 192 << 10;

fn fd_of(path: &Path) -> FdId {
    let opened = File::open(path).unwrap();
    FdId::from_stored(lockd::ioctl::get_volume(&opened).unwrap().fd.get()).unwrap()
}

fn lun_of(path: &Path) -> usize {
    usize::from(fd_of(path).lun().get())
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or_else(|| panic!("{error}"))
}

#[track_caller]
fn assert_eio<T: std::fmt::Debug>(result: io::Result<T>, what: &str) {
    assert_eq!(errno(&result.expect_err(what)), libc::EIO, "{what}");
}

/// A directory under the root, whose LUN is known.
struct Home {
    lun: usize,
    name: String,
    directory: FdId,
}

impl Home {
    fn at(&self, mount: &Mount, name: &str) -> PathBuf {
        mount.at(&self.name).join(name)
    }
}

/// One home on each LUN, in their order, each with a file that has blocks, and with one whose root cell lies on the next LUN.
fn homes(mount: &Mount) -> Vec<Home> {
    let mut homes = BTreeMap::new();
    for number in 0.. {
        assert!(number < 50, "directories do not come to every LUN: {:?}", homes.keys());
        let name = format!("home{number}");
        fs::create_dir(mount.at(&name)).unwrap();
        let lun = lun_of(&mount.at(&name));
        if homes.contains_key(&lun) {
            fs::remove_dir(mount.at(&name)).unwrap();
            // So that the next one goes elsewhere.
            let there: &Home = &homes[&lun];
            fs::write(there.at(mount, &format!("fill{number}")), vec![1; 4 << 20]).unwrap();
            continue;
        }
        let directory = fd_of(&mount.at(&name));
        fs::write(mount.at(&name).join("file"), vec![lun as u8; 400_000]).unwrap();
        homes.insert(lun, Home { lun, name, directory });
        if homes.len() == LUNS {
            break;
        }
    }
    let homes: Vec<Home> = homes.into_values().collect();
    for (nth, home) in homes.iter().enumerate() {
        let moved = mount.at("moved");
        let next = &homes[(nth + 1) % LUNS];
        fs::write(next.at(mount, "moving"), vec![9; 300_000]).unwrap();
        fs::rename(next.at(mount, "moving"), &moved).unwrap();
        fs::rename(&moved, home.at(mount, "scattered")).unwrap();
        assert_eq!(lun_of(&home.at(mount, "scattered")), next.lun);
    }
    homes
}

fn record(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(512)
}

/// What a writer knows of its file: of each record the last number that an fsync vouched for, and the last one that was tried.
#[derive(Default)]
struct Known {
    durable: BTreeMap<u64, u64>,
    tried: BTreeMap<u64, u64>,
}

/// A writer: records of one file, made durable, and names beside it.
struct Writer {
    home: usize,
    folder: PathBuf,
    name: String,
    rounds: AtomicU64,
    failures: AtomicU64,
}

impl Writer {
    fn new(mount: &Mount, home: &Home, host: u8) -> Writer {
        let (folder, name) = (mount.at(&home.name), format!("written-by-{host}"));
        Writer { home: home.lun, folder, name, rounds: AtomicU64::new(0), failures: AtomicU64::new(0) }
    }

    fn run(&self, stop: &AtomicBool) -> Known {
        let (mut known, mut open, mut number) = (Known::default(), None, 0);
        while !stop.load(Ordering::Acquire) {
            number += 1;
            match self.round(&mut known, &mut open, number) {
                Ok(()) => {
                    self.rounds.fetch_add(1, Ordering::Release);
                }
                Err(error) => {
                    // What fails is refused for the one reason.
                    assert_eq!(errno(&error), libc::EIO, "{} in {}", self.name, self.folder.display());
                    self.failures.fetch_add(1, Ordering::Release);
                    open = None;
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
        known
    }

    fn round(&self, known: &mut Known, open: &mut Option<File>, number: u64) -> io::Result<()> {
        if open.is_none() {
            let path = self.folder.join(&self.name);
            *open = Some(File::options().read(true).write(true).create(true).truncate(false).open(path)?);
        }
        let file = open.as_ref().expect("it was opened");
        let at = number % RECORDS;
        known.tried.insert(at, number);
        file.write_all_at(&record(number), at * STRIDE)?;
        file.sync_all()?;
        known.durable.insert(at, number);
        let mut found = vec![0; 4096];
        file.read_exact_at(&mut found, at * STRIDE)?;
        assert!(found == record(number), "{} in {} reads something else", self.name, self.folder.display());
        let new = self.folder.join(format!("{}.new", self.name));
        fs::write(&new, number.to_string())?;
        fs::rename(&new, self.folder.join(format!("{}.done", self.name)))
    }

    /// Everything that an fsync vouched for is there.
    fn assert_kept(&self, known: &Known, mount: &Mount) {
        let folder = self.folder.file_name().unwrap();
        let file = File::open(mount.at(folder).join(&self.name)).unwrap();
        for (at, durable) in &known.durable {
            let mut found = vec![0; 4096];
            file.read_exact_at(&mut found, at * STRIDE).unwrap();
            let number = u64::from_le_bytes(found[..8].try_into().unwrap());
            assert!(found == record(number), "record {at} of {} is torn", self.name);
            let range = *durable..=known.tried[at];
            assert!(range.contains(&number), "record {at} of {}: {number} is not in {range:?}", self.name);
        }
    }

    fn done(&self) -> (u64, u64) {
        (self.rounds.load(Ordering::Acquire), self.failures.load(Ordering::Acquire))
    }
}

fn is_lost(mount: &Mount, lun: usize) -> bool {
    mount.status()["luns"].as_array().unwrap().iter().any(|of| of["index"] == lun && of["lost"] == true)
}

/// What `vmfs status` lists as hurt: identity to what is lost.
fn affected(mount: &Mount) -> BTreeMap<String, (String, Value)> {
    let status = mount.status();
    assert_eq!(status["affected"]["cut"], false);
    let objects = status["affected"]["objects"].as_array().unwrap();
    let text = |of: &Value| of.as_str().unwrap().to_owned();
    objects.iter().map(|of| (text(&of["fd"]), (text(&of["lost"]), of["path"].clone()))).collect()
}

/// What a host without LUN `gone` can do, and what not.
fn assert_hurt(mount: &Mount, homes: &[Home], scattered: &[FdId], gone: usize, host: u8) {
    let label = |what: &str| format!("host {host}, LUN {gone} is gone: {what}");
    let mut expected = BTreeMap::new();
    for (nth, home) in homes.iter().enumerate() {
        let next = homes[(nth + 1) % LUNS].lun;
        let named = |name: &str| home.at(mount, name);
        if home.lun != gone {
            assert_eq!(fs::read(named("file")).unwrap(), vec![home.lun as u8; 400_000], "{}", label("read"));
            let (new, other) = (named(&format!("new-{host}-{gone}")), named(&format!("other-{host}-{gone}")));
            fs::write(&new, vec![5; 200_000]).unwrap_or_else(|error| panic!("{}: {error}", label("create")));
            fs::rename(&new, &other).unwrap_or_else(|error| panic!("{}: {error}", label("rename")));
            fs::remove_file(&other).unwrap_or_else(|error| panic!("{}: {error}", label("remove")));
            // A file whose LUN was lost before has blocks elsewhere since then: such a one is hurt, and shows it.
            for name in ["written-by-1", "written-by-2"] {
                if let Err(error) = fs::read(named(name)) {
                    assert_eq!(errno(&error), libc::EIO, "{}", label(name));
                    let path = if gone == 1 { Value::Null } else { format!("/{}/{name}", home.name).into() };
                    expected.insert(fd_of(&named(name)).to_string(), ("Blocks".to_owned(), path));
                }
            }
            if next == gone {
                assert_eio(fs::read(named("scattered")), &label("a file on it in a directory that is there"));
                let path = if gone == 1 { Value::Null } else { format!("/{}/scattered", home.name).into() };
                expected.insert(scattered[nth].to_string(), ("RootCell".to_owned(), path));
            }
            continue;
        }
        if gone == 1 {
            // The root is lost: only those below it have a name whose own root cells say it.
            assert_eio(fs::write(mount.at(format!("never-{host}")), "x"), &label("a new name in the root"));
            let root = fd_of(mount.path()).to_string();
            expected.insert(root, ("RootCell".to_owned(), "/".into()));
        } else {
            expected.insert(home.directory.to_string(), ("RootCell".to_owned(), format!("/{}", home.name).into()));
        }
        // Under the root's own name for it, or under the one that is made of its identity.
        let shown = if gone == 1 { format!("lost-{}", home.directory) } else { home.name.clone() };
        let listed: Vec<String> =
            fs::read_dir(mount.path()).unwrap().map(|of| of.unwrap().file_name().into_string().unwrap()).collect();
        assert!(listed.contains(&shown), "{}: {listed:?}", label("the lost directory's name"));
        let below = mount.at(&shown);
        let listed: Vec<String> =
            fs::read_dir(&below).unwrap().map(|of| of.unwrap().file_name().into_string().unwrap()).collect();
        assert!(listed.contains(&"scattered".to_owned()), "{}: {listed:?}", label("names in the lost directory"));
        assert_eq!(fs::read(below.join("scattered")).unwrap(), vec![9; 300_000], "{}", label("a rebuilt name"));
        assert_eio(fs::read(below.join("file")), &label("a file on it"));
        assert_eio(fs::write(below.join("never"), "x"), &label("a new name in the lost directory"));
    }
    assert_eq!(affected(mount), expected, "{}", label("vmfs status"));
    let said = text(&output(command("vmfs").arg("status").arg(mount.path())));
    assert!(said.contains("LOST") || said.contains("MISSING"), "{said}");
    assert!(said.contains(&format!("it hurts {} objects", expected.len())), "{said}");
}

#[test]
fn each_lun_in_turn_is_pulled_under_load_and_what_is_not_on_it_goes_on() {
    let luns = Luns::formatted(LUNS, 256, &["--lease", "fast"]);
    let paths = [Paths::default(), Paths::default(), Paths::default()];
    let start = |host: u8, arguments: &[&str]| {
        luns.mount_by(host, arguments, |command| paths[usize::from(host) - 1].start(command).unwrap())
    };
    let mounts = [start(1, &[]), start(2, &[])];
    let homes = homes(&mounts[0]);
    let scattered: Vec<FdId> = homes.iter().map(|home| fd_of(&home.at(&mounts[0], "scattered"))).collect();
    let writers: Vec<Writer> = (1..=2u8)
        .flat_map(|host| homes.iter().map(move |home| (host, home)))
        .map(|(host, home)| Writer::new(&mounts[usize::from(host) - 1], home, host))
        .collect();
    let stop = AtomicBool::new(false);
    let go_on = |what: &str, of: &dyn Fn(&Writer) -> bool| {
        let before: Vec<u64> = writers.iter().map(|writer| writer.done().0).collect();
        for (writer, before) in writers.iter().zip(before).filter(|(writer, _)| of(writer)) {
            wait_for(&format!("{} in {} to go on {what}", writer.name, writer.folder.display()), || {
                writer.done().0 >= before + 10
            });
        }
    };
    let known: Vec<Known> = thread::scope(|scope| {
        let stop_at_end = StopAtEnd(&stop);
        let running: Vec<_> = writers.iter().map(|writer| scope.spawn(|| writer.run(&stop))).collect();
        go_on("at first", &|_| true);
        for gone in 1..=LUNS {
            let lun = &luns.images()[gone - 1];
            let before: Vec<u64> = writers.iter().map(|writer| writer.done().1).collect();
            paths.iter().for_each(|of| of.cut(lun));
            go_on(&format!("after LUN {gone} was pulled"), &|writer| writer.home != gone);
            for (writer, before) in writers.iter().zip(before).filter(|(writer, _)| writer.home == gone) {
                wait_for("an error of who writes to it", || writer.done().1 > before);
            }
            for (mount, host) in mounts.iter().zip(1..) {
                wait_for("the LUN to be known as lost", || is_lost(mount, gone));
                assert_hurt(mount, &homes, &scattered, gone, host);
            }
            go_on(&format!("while LUN {gone} is lost"), &|writer| writer.home != gone);
            let point = luns.beside("refused");
            fs::create_dir_all(&point).unwrap();
            let mut refused = command("mount.vmfs");
            refused.arg(luns.spec()).arg(&point).arg("--foreground").stdin(Stdio::null()).stderr(Stdio::piped());
            let refused = paths[2].start(&mut refused).unwrap().wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(refused.status.code() == Some(1) && said.contains("-o degraded"), "{said}");
            let late = start(3, &["-o", "degraded"]);
            assert_hurt(&late, &homes, &scattered, gone, 3);
            paths.iter().for_each(|of| of.mend(lun));
            go_on(&format!("after LUN {gone} came back"), &|_| true);
            wait_for("the late mount to take it up", || {
                let status = late.status();
                status["missing"].as_array().unwrap().is_empty() && affected(&late).is_empty()
            });
            for home in &homes {
                assert_eq!(fs::read(home.at(&late, "file")).unwrap(), vec![home.lun as u8; 400_000]);
            }
            late.unmount();
            for mount in &mounts {
                wait_for("nothing to be lost any more", || !is_lost(mount, gone) && affected(mount).is_empty());
            }
        }
        drop(stop_at_end);
        running.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    assert!(paths.iter().all(|of| of.failed() > 0), "the paths were never cut");
    let [one, two] = mounts;
    one.unmount();
    two.unmount();
    let mount = luns.mount(4);
    for (writer, known) in writers.iter().zip(&known) {
        writer.assert_kept(known, &mount);
    }
    mount.wait_until_alone();
    mount.unmount();
    luns.assert_recovered();
}

/// Ends the writers also when the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Whether this host may write the file now; it says so by an error that is no other than "held" or "cannot be seen".
fn try_open(path: &Path) -> Option<File> {
    match File::options().read(true).write(true).open(path) {
        Ok(file) => Some(file),
        Err(error) => {
            assert!([libc::EBUSY, libc::EIO].contains(&errno(&error)), "{}: {error}", path.display());
            None
        }
    }
}

#[test]
fn a_host_that_alone_lost_a_lun_is_claimed_there_goes_on_elsewhere_and_is_fenced_when_the_path_is_back() {
    let luns = Luns::formatted(LUNS, 256, &["--lease", "fast"]);
    let paths = Paths::default();
    let mut one = luns.mount_by(1, &[], |command| paths.start(command).unwrap());
    let two = luns.mount(2);
    let homes = homes(&one);
    let lost = &homes[1];
    for home in &homes {
        fs::write(home.at(&one, "held"), vec![3; 300_000]).unwrap();
    }
    let open = |home: &Home| File::options().read(true).write(true).open(home.at(&one, "held")).unwrap();
    let held: Vec<File> = homes.iter().map(open).collect();
    held.iter().for_each(|file| assert_eq!(file.write_at(&record(1), 0).unwrap(), 4096));
    held.iter().for_each(|file| file.sync_all().unwrap());
    paths.cut(&luns.images()[lost.lun - 1]);
    // Its slot there is claimed after its lease. What it has elsewhere works all the while, and nobody else has it.
    let mut number = 1;
    let mut goes_on = || {
        number += 1;
        for (home, file) in homes.iter().zip(&held).filter(|(home, _)| home.lun != lost.lun) {
            assert!(try_open(&home.at(&two, "held")).is_none(), "{} has two writers", home.name);
            file.write_all_at(&record(number), 0).unwrap();
            file.sync_all().unwrap();
            fs::write(home.at(&one, "new"), "x").unwrap();
        }
        number
    };
    wait_for("the slot on the lost LUN to be claimed", || {
        goes_on();
        // Its process lives and could still write if the path came back: on LUNs of one machine that keeps the lock.
        assert!(try_open(&lost.at(&two, "held")).is_none(), "a lock was given away that its holder may still use");
        let late = held[1].write_all_at(&record(666), 0).and_then(|()| held[1].sync_all());
        assert_eq!(errno(&late.expect_err("the path is cut")), libc::EIO);
        let status = two.status();
        let on_it = status["luns"].as_array().unwrap().iter().find(|of| of["index"] == lost.lun).unwrap();
        on_it["hosts"].as_array().unwrap().iter().any(|host| host["name"] == "host1" && host["state"] == "Breaking")
    });
    let number = goes_on();
    let three = luns.mount(3);
    for mount in [&two, &three] {
        assert_eq!(fs::read(lost.at(mount, "file")).unwrap(), vec![lost.lun as u8; 400_000]);
        fs::write(lost.at(mount, "beside"), "x").unwrap();
    }
    three.unmount();
    // The path is back: what the host had there is another one's, and it ends as a whole.
    paths.mend(&luns.images()[lost.lun - 1]);
    let status = one.wait_for_end();
    assert!(!status.success(), "a mount that was fenced ended as if it had been unmounted");
    assert!(one.log().contains("fenced") || one.log().contains("taken over"), "{}", one.log());
    drop(held);
    drop(one);
    for home in &homes {
        let mut file = None;
        wait_for("the locks of the host that is gone", || {
            file = try_open(&home.at(&two, "held"));
            file.is_some()
        });
        let (mut found, expected) = (vec![0; 4096], if home.lun == lost.lun { 1 } else { number });
        file.unwrap().read_exact_at(&mut found, 0).unwrap();
        assert!(found == record(expected), "{} has not what was durable", home.name);
    }
    assert!(two.status()["takeovers"].as_array().unwrap().iter().any(|of| of["name"] == "host1"));
    two.wait_until_alone();
    two.unmount();
    luns.assert_recovered();
}
