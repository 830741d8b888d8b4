//! Promises of the project's initiator, with the project's target and with tgt as real processes.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use iscsi::initiator::{ConnectCause, DigestChoice, Initiator, Options, Url, discover};
use scsi::path::{PathData, PathError, ScsiPath};

use super::*;

const BLOCK: usize = 4096;
const LONG: Duration = Duration::from_secs(60);

fn options(digests: DigestChoice) -> Options {
    Options {
        initiator: HOST.to_owned(),
        header_digest: digests,
        data_digest: digests,
        patience: Duration::from_secs(120),
        ..Options::default()
    }
}

fn url(text: &str) -> Url {
    Url::parse_with(text, &|_| None).unwrap()
}

fn connect(text: &str, digests: DigestChoice) -> Initiator {
    let initiator = Initiator::connect(&url(text), options(digests)).unwrap();
    // Power on, and what else the unit has to say first.
    while initiator.execute(&[0; 6], PathData::None, LONG).unwrap().status != 0 {}
    initiator
}

/// READ (16) or WRITE (16).
fn transfer(opcode: u8, byte: u64, length: usize) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&(byte / 512).to_be_bytes());
    cdb[10..14].copy_from_slice(&((length / 512) as u32).to_be_bytes());
    cdb
}

/// Done; or what is not known; the answer of a unit attention is taken and the command given again.
fn write(initiator: &Initiator, byte: u64, data: &[u8]) -> Result<(), PathError> {
    loop {
        let answer = initiator.execute(&transfer(0x8A, byte, data.len()), PathData::Out(data), LONG)?;
        match (answer.status, answer.sense.get(2).map(|key| key & 0xF)) {
            (0, _) => {
                assert_eq!(answer.transferred, data.len());
                return Ok(());
            }
            // UNIT ATTENTION, ABORTED COMMAND.
            (2, Some(6 | 0xB)) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn read(initiator: &Initiator, byte: u64, into: &mut [u8]) -> Result<(), PathError> {
    loop {
        let length = into.len();
        let answer = initiator.execute(&transfer(0x88, byte, length), PathData::In(into), LONG)?;
        match (answer.status, answer.sense.get(2).map(|key| key & 0xF)) {
            (0, _) => {
                assert_eq!(answer.transferred, length);
                return Ok(());
            }
            (2, Some(6 | 0xB)) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed).collect()
}

/// Writes and reads in every size class: immediate, unsolicited, asked for, in several sequences.
fn check_sizes(initiator: &Initiator, seed: u8) {
    for length in [512, BLOCK, 64 << 10, (256 << 10) + 512, 1 << 20, 3 << 20] {
        let data = pattern(length, seed);
        write(initiator, 8 << 20, &data).unwrap();
        let mut back = vec![0; length];
        read(initiator, 8 << 20, &mut back).unwrap();
        assert!(data == back, "{length} bytes");
    }
}

#[test]
fn our_initiator_moves_data_of_every_size_with_and_without_digests() {
    let target = Target::start(",thin");
    for (nth, digests) in [DigestChoice::None, DigestChoice::Required].into_iter().enumerate() {
        let initiator = connect(&target.url(nth), digests);
        check_sizes(&initiator, nth as u8);
        let bad = initiator.execute(&transfer(0x88, 1 << 40, BLOCK), PathData::In(&mut [0; BLOCK]), LONG).unwrap();
        assert_eq!((bad.status, bad.sense[2] & 0xF, bad.transferred), (2, 5, 0), "ILLEGAL REQUEST");
        assert!(initiator.end());
    }
    let listed = discover(&url(&target.url(0)), &options(DigestChoice::None)).unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].name, NAME);
    let portals: Vec<&str> = listed[0].portals.iter().map(|(portal, _)| portal.as_str()).collect();
    assert_eq!(portals, target.portals);
    target.stop();
}

#[test]
fn our_initiator_goes_on_over_crashes_of_the_target_and_loses_no_acknowledged_write() {
    const WRITERS: u8 = 6;
    let mut target = Target::start("");
    let paths = [0, 1].map(|portal| connect(&target.url(portal), DigestChoice::None));
    let (is_over, unknown, done) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    let last: Vec<u8> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (paths, is_over, unknown, done) = (&paths, &is_over, &unknown, &done);
                scope.spawn(move || {
                    let place = u64::from(writer) << 20;
                    let mut seed = 0u8;
                    while !is_over.load(Ordering::SeqCst) {
                        seed = seed.wrapping_add(1);
                        let data = pattern(BLOCK, seed ^ writer);
                        // What is unknown is written again, with the same bytes, until it is known.
                        while let Err(error) = write(&paths[usize::from(seed % 2)], place, &data) {
                            assert!(matches!(error, PathError::Unknown(_)), "{error}");
                            unknown.fetch_add(1, Ordering::SeqCst);
                        }
                        let mut back = vec![0; BLOCK];
                        while read(&paths[usize::from(seed / 2 % 2)], place, &mut back).is_err() {}
                        assert!(back == data, "an acknowledged write is lost");
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                    seed
                })
            })
            .collect();
        for _ in 0..3 {
            let before = done.load(Ordering::SeqCst);
            wait_for("writes", || done.load(Ordering::SeqCst) > before + 50);
            target.crash();
        }
        let before = done.load(Ordering::SeqCst);
        wait_for("writes after the crashes", || done.load(Ordering::SeqCst) > before + 50);
        is_over.store(true, Ordering::SeqCst);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    assert!(unknown.load(Ordering::SeqCst) > 0, "commands were in flight at a crash");
    let disk = fs::read(target.folder.path().join("disk.img")).unwrap();
    for (writer, seed) in last.into_iter().enumerate() {
        assert!(disk[writer << 20..][..BLOCK] == pattern(BLOCK, seed ^ writer as u8));
    }
    assert!(paths.iter().all(|path| path.end()));
    target.stop();
}

#[test]
fn the_end_of_a_path_is_its_end_at_the_target_too() {
    let target = Target::start("");
    let initiator = connect(&target.url(0), DigestChoice::None);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let initiator = &initiator;
                scope.spawn(move || {
                    for seed in 0.. {
                        if write(initiator, writer << 20, &pattern(1 << 18, seed as u8)).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        wait_for("a load", || target.status()["targets"][0]["sessions"][0]["commands"].as_u64() > Some(50));
        assert!(initiator.end());
        // All of it, before the logout was answered.
        assert!(target.status()["targets"][0]["sessions"].as_array().unwrap().is_empty());
        let disk = || fs::read(target.folder.path().join("disk.img")).unwrap();
        let before = disk();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert!(before == disk(), "something was written after the end");
    });
    // A target that is gone proves nothing.
    let other = Initiator::connect(
        &url(&target.url(1)),
        Options { end_time: Duration::from_secs(2), ..options(DigestChoice::None) },
    );
    let (other, gone) = (other.unwrap(), url(&target.url(0)));
    target.stop();
    assert!(!other.end());
    let refused = Initiator::connect(&gone, options(DigestChoice::None)).err().unwrap();
    assert!(refused.to_string().contains(&gone.to_string()) && refused.to_string().contains("running"), "{refused}");
}

/// tgt with one LUN (number 1), and an account if asked for.
struct Tgt {
    folder: TempDir,
    daemon: Child,
    control: String,
    port: u16,
}

impl Tgt {
    fn start() -> Tgt {
        let folder = folder();
        fs::File::create(folder.path().join("disk.img")).unwrap().set_len(100 << 20).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // Its control socket is known by a number of at most 15 bits.
        let control = (std::process::id() % 16_000 + 16_001).to_string();
        let daemon = Self::launch(&folder, &control, port);
        let tgt = Tgt { folder, daemon, control, port };
        tgt.set_up();
        tgt
    }

    fn launch(folder: &TempDir, control: &str, port: u16) -> Child {
        let log = fs::File::create(folder.path().join("log")).unwrap();
        system("tgtd")
            .args(["-f", "-C", control, "--iscsi", &format!("portal=127.0.0.1:{port}")])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("tgtd starts")
    }

    fn ask(&self, words: &[&str]) -> bool {
        system("tgtadm")
            .args(["-C", &self.control, "--lld", "iscsi", "--mode"])
            .args(words)
            .output()
            .unwrap()
            .status
            .success()
    }

    fn set_up(&self) {
        wait_for("tgtd", || self.ask(&["target", "--op", "new", "--tid", "1", "--targetname", NAME]));
        let image = self.folder.path().join("disk.img");
        let image = image.to_str().unwrap();
        assert!(self.ask(&["logicalunit", "--op", "new", "--tid", "1", "--lun", "1", "--backing-store", image]));
        assert!(self.ask(&["target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL"]));
    }

    fn url(&self, account: &str, more: &str) -> String {
        format!("iscsi://{account}127.0.0.1:{}/{NAME}/1{more}", self.port)
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn our_initiator_works_with_tgt() {
    let mut tgt = Tgt::start();
    // It has no digests as it comes: a wish is dropped, a demand ends the login.
    let demand =
        Initiator::connect(&url(&tgt.url("", "?header_digest=crc32c")), options(DigestChoice::None)).err().unwrap();
    assert!(matches!(demand.cause, ConnectCause::Key { .. }), "{demand}");
    for (seed, digests) in [(1, DigestChoice::None), (2, DigestChoice::Preferred)] {
        let initiator = connect(&tgt.url("", ""), digests);
        check_sizes(&initiator, seed);
        assert!(initiator.end());
    }
    let listed = discover(&url(&tgt.url("", "")), &options(DigestChoice::None)).unwrap();
    assert_eq!(listed[0].name, NAME);
    // A crash: what was in flight is unknown, and the session is had again.
    let initiator = connect(&tgt.url("", ""), DigestChoice::None);
    tgt.daemon.kill().unwrap();
    tgt.daemon.wait().unwrap();
    tgt.daemon = Tgt::launch(&tgt.folder, &tgt.control, tgt.port);
    tgt.set_up();
    let data = pattern(BLOCK, 9);
    wait_for("the session", || match write(&initiator, 0, &data) {
        Ok(()) => true,
        // The target may be there before its LUN is.
        Err(PathError::NotSent(_) | PathError::Unknown(_)) => false,
    });
    let mut back = vec![0; BLOCK];
    read(&initiator, 0, &mut back).unwrap();
    assert!(back == data);
    drop(initiator);
    // CHAP one way and both ways.
    for (user, outgoing) in [("user", false), ("disk", true)] {
        assert!(tgt.ask(&["account", "--op", "new", "--user", user, "--password", &format!("secret-of-{user}")]));
        let mut bind = vec!["account", "--op", "bind", "--tid", "1", "--user", user];
        bind.extend(outgoing.then_some("--outgoing"));
        assert!(tgt.ask(&bind));
    }
    let both = "?target_user=disk&target_password=secret-of-disk";
    for more in ["", both] {
        let initiator = connect(&tgt.url("user%secret-of-user@", more), DigestChoice::None);
        assert!(initiator.end());
    }
    let impostor = "?target_user=disk&target_password=another-secret";
    let cause = |account: &str, more: &str| {
        Initiator::connect(&url(&tgt.url(account, more)), options(DigestChoice::None)).err().map(|error| error.cause)
    };
    assert!(matches!(cause("user%secret-of-user@", impostor), Some(ConnectCause::Unproven(_))));
    for (account, more) in [("", ""), ("user%guess@", ""), ("guest%secret-of-user@", "")] {
        let cause = cause(account, more);
        assert!(cause.as_ref().is_some_and(|cause| cause.is_lasting()), "{account}: {cause:?}");
    }
}
