//! Promises of the iSCSI target, by initiators that others have written (libiscsi) and by raw connections.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tests::harness::{folder, program, refused, run, signal, system, text, wait_for};
use tests::random::Random;

const NAME: &str = "iqn.2026-01.test:disk";

/// A running target with one LUN of 100 MiB.
struct Target {
    folder: TempDir,
    options: String,
    daemon: Child,
    portals: Vec<String>,
}

impl Target {
    /// Starts one with two portals.
    fn start(options: &str) -> Target {
        let folder = folder();
        fs::File::create(folder.path().join("disk.img")).unwrap().set_len(100 << 20).unwrap();
        let ports = ["127.0.0.1:0", "127.0.0.1:0"].map(str::to_owned);
        let (daemon, portals) = launch(&folder, options, &ports);
        Target { folder, options: options.to_owned(), daemon, portals }
    }

    fn url(&self, portal: usize) -> String {
        format!("iscsi://{}/{NAME}/0", self.portals[portal])
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn status(&self) -> Value {
        let told =
            run(Command::new(program("iscsi-target")).args(["status", "--json", "--control"]).arg(self.control()));
        serde_json::from_str(&told).unwrap()
    }

    /// Kills the daemon and starts it again at the same addresses.
    fn crash(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        (self.daemon, self.portals) = launch(&self.folder, &self.options, &self.portals.clone());
    }

    /// Ends it as a service manager does.
    fn stop(mut self) {
        signal(self.daemon.id(), libc::SIGTERM);
        assert!(self.daemon.wait().unwrap().success());
        assert!(!self.control().exists(), "nothing is left behind");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn launch(folder: &TempDir, options: &str, portals: &[String]) -> (Child, Vec<String>) {
    let control = folder.path().join("control");
    let disk = folder.path().join("disk.img");
    let mut command = Command::new(program("iscsi-target"));
    command.arg("serve").arg("--control").arg(&control).arg("--state-dir").arg(folder.path());
    for portal in portals {
        command.args(["--portal", portal]);
    }
    command.arg("--target").arg(format!("{NAME}={}{options}", disk.display()));
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let daemon = command.stderr(log).spawn().expect("iscsi-target starts");
    let ask = || {
        Command::new(program("iscsi-target")).args(["status", "--json", "--control"]).arg(&control).output().unwrap()
    };
    wait_for("the target to answer", || ask().status.success());
    let told: Value = serde_json::from_slice(&ask().stdout).unwrap();
    let portals = told["portals"].as_array().unwrap().iter().map(|portal| portal.as_str().unwrap().to_owned());
    (daemon, portals.collect())
}

/// Passed and failed tests of libiscsi's suite. It calls a skipped test passed: those are counted as neither.
fn conformance(target: &Target, suite: &str) -> (usize, Vec<String>) {
    let mut command = system("iscsi-test-cu");
    let told = command.args(["-d", "-v", "-t", suite]).arg(target.url(0)).arg(target.url(1)).output().unwrap();
    let all = text(&told);
    let (mut passed, mut failed) = (0, Vec::new());
    let (mut suite, mut test, mut is_skipped) = ("", "", false);
    for line in all.lines() {
        let mut word = line.trim();
        if let Some(name) = line.strip_prefix("Suite: ") {
            suite = name;
            continue;
        }
        if let Some(rest) = line.strip_prefix("  Test: ") {
            let (name, after) = rest.split_once(" ...").unwrap_or((rest, ""));
            (test, word, is_skipped) = (name, after.trim(), false);
        }
        is_skipped |= line.contains("SKIPPED");
        if test.is_empty() {
            continue;
        }
        if word.starts_with("FAILED") || word.ends_with("FAILED") {
            failed.push(format!("{suite}.{test}"));
            test = "";
        } else if word.starts_with("passed") || word.ends_with("passed") {
            passed += usize::from(!is_skipped);
            test = "";
        }
    }
    (passed, failed)
}

/// Tests that pass on a thin LUN with two portals.
const PASSED: usize = 199;
/// It asks for the status of one block and wants to hear of another one, where physical blocks are larger than logical ones.
const WRONG_ITSELF: &str = "GetLBAStatus.UnmapSingle";

#[test]
fn libiscsis_suite_finds_nothing_wrong_with_a_thin_lun() {
    let target = Target::start(",thin");
    let (passed, failed) = conformance(&target, "ALL");
    assert_eq!(failed, [WRONG_ITSELF], "failed");
    assert!(passed >= PASSED, "{passed} passed, at least {PASSED} should");
    target.stop();
}

#[test]
fn libiscsis_suite_finds_nothing_wrong_with_a_removable_lun() {
    let target = Target::start(",thin,removable");
    let (passed, failed) = conformance(&target, "ALL");
    assert_eq!(failed, [WRONG_ITSELF], "failed");
    assert!(passed >= PASSED, "{passed} passed, at least {PASSED} should");
    target.stop();
}

#[test]
fn libiscsis_suite_finds_nothing_wrong_with_a_read_only_lun() {
    let target = Target::start(",readonly");
    let disk = || fs::read(target.folder.path().join("disk.img")).unwrap();
    let before = disk();
    // The others begin with writing. "ReadOnly" tries every write, and counts as skipped when it comes to UNMAP.
    let suites = ["ReadOnly", "Inquiry", "Read6", "Read10", "Read12", "Read16", "ModeSense6"];
    let mut all = 0;
    for suite in suites {
        let (passed, failed) = conformance(&target, &format!("ALL.{suite}"));
        assert_eq!(failed, Vec::<String>::new(), "failed");
        all += passed;
    }
    assert!(all > 20, "{all} passed");
    assert!(disk() == before, "something was written");
    target.stop();
}

#[test]
fn initiators_find_the_target_by_each_of_its_portals() {
    let target = Target::start("");
    let listed = run(system("iscsi-ls").arg(format!("iscsi://{}", target.portals[0])));
    for (nth, portal) in target.portals.iter().enumerate() {
        assert!(listed.contains(NAME) && listed.contains(&format!("{portal},{}", nth + 1)), "{listed}");
    }
    let capacity = run(system("iscsi-readcapacity16").arg(target.url(1)));
    assert!(capacity.contains("104857600") || capacity.contains("204799"), "{capacity}");
    let told = target.status();
    assert_eq!(told["targets"][0]["luns"][0]["bytes"], 100 << 20);
    target.stop();
}

#[test]
fn reservations_are_there_again_after_a_crash() {
    let mut target = Target::start("");
    // REGISTER with a key.
    let mut session = Raw::log_in(&target.portals[0]);
    let mut parameters = [0u8; 24];
    parameters[8..16].copy_from_slice(&0xFEED_u64.to_be_bytes());
    // APTPL.
    parameters[20] = 1;
    session.check_write(&[0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0], &parameters);
    target.crash();
    let mut session = Raw::log_in(&target.portals[0]);
    let keys = session.check_read(&[0x5E, 0, 0, 0, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!(keys[8..16], 0xFEED_u64.to_be_bytes(), "{keys:?}");
    target.stop();
}

#[test]
fn what_is_written_is_read_back_by_every_way_of_sending_it() {
    let target = Target::start("");
    let mut session = Raw::log_in(&target.portals[0]);
    let data: Vec<u8> = (0..8192u32).map(|n| (n * 7) as u8).collect();
    session.check_write(&[0x2A, 0, 0, 0, 0, 8, 0, 0, 16, 0], &data);
    assert_eq!(session.check_read(&[0x28, 0, 0, 0, 0, 8, 0, 0, 16, 0], 8192), data);
    drop(session);
    let file = fs::read(target.folder.path().join("disk.img")).unwrap();
    assert_eq!(file[4096..4096 + 8192], data);
    target.stop();
}

#[test]
fn an_initiator_port_has_one_session_however_often_it_logs_in() {
    let target = Target::start("");
    let _first = Raw::log_in(&target.portals[0]);
    let connections: Vec<_> = std::thread::scope(|scope| {
        let logins: Vec<_> = (0..8).map(|_| scope.spawn(|| open(&target.portals[0]))).collect();
        // One whose place was taken at once may not even have heard its answer.
        logins.into_iter().filter_map(|login| login.join().unwrap().ok()).collect()
    });
    assert!(connections.iter().all(|(_, answer)| answer[36] == 0), "each login is answered well");
    // Each took the place of the one before it (RFC 7143, 6.3.5).
    wait_for("one session", || target.status()["targets"][0]["sessions"].as_array().unwrap().len() == 1);
    drop(connections);
    target.stop();
}

#[test]
fn garbage_ends_its_own_connection_and_no_other() {
    let target = Target::start("");
    let mut session = Raw::log_in(&target.portals[0]);
    let mut random = Random::new(5);
    for round in 0..60 {
        let mut stream = TcpStream::connect(&target.portals[round % 2]).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let length = 48 + random.below(300) as usize;
        let mut bytes = random.bytes(length);
        // Half of them look like login requests at first.
        if round % 2 == 0 {
            bytes[0] = 0x43;
            bytes[4] = 0;
            bytes[5..8].copy_from_slice(&[0, 0, 40]);
        }
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    session.check_read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512);
    target.stop();
}

#[test]
fn what_cannot_be_served_is_named() {
    let serve = |arguments: &[&str]| {
        let mut command = Command::new(program("iscsi-target"));
        let folder = folder();
        command.arg("serve").arg("--control").arg(folder.path().join("c")).args(arguments);
        refused(&mut command, 1)
    };
    let missing = serve(&["--portal", "127.0.0.1:0", "--target", "iqn.2026-01.test:a=/nowhere.img"]);
    assert!(missing.contains("/nowhere.img"), "{missing}");
    let name = serve(&["--portal", "127.0.0.1:0", "--target", "Disk=/nowhere.img"]);
    assert!(name.contains("iqn.2026-01"), "{name}");
    assert!(serve(&["--portal", "127.0.0.1:0"]).contains("--target"));
    let target = Target::start("");
    let taken = serve(&["--portal", &target.portals[0], "--target", "iqn.2026-01.test:a=/dev/zero"]);
    assert!(taken.contains(&target.portals[0]), "{taken}");
    target.stop();
}

/// A minimal initiator: one command at a time, data asked for by R2T or immediate.
struct Raw {
    stream: TcpStream,
    number: u32,
    tag: u32,
}

/// Logs in as the one initiator port that these tests have; gives the connection and the response.
fn open(portal: &str) -> std::io::Result<(TcpStream, [u8; 48])> {
    let mut stream = TcpStream::connect(portal)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let keys = format!("InitiatorName=iqn.2026-01.test:raw\0TargetName={NAME}\0InitialR2T=Yes\0ImmediateData=Yes\0");
    let mut header = [0; 48];
    header[0] = 0x43;
    header[1] = 0x87;
    header[8] = 0x40;
    header[27] = 1;
    send(&mut stream, header, keys.as_bytes());
    let mut answer = [0; 48];
    stream.read_exact(&mut answer)?;
    let length = u32::from_be_bytes([0, answer[5], answer[6], answer[7]]) as usize;
    stream.read_exact(&mut vec![0; length.next_multiple_of(4)])?;
    Ok((stream, answer))
}

impl Raw {
    fn log_in(portal: &str) -> Raw {
        let (stream, answer) = open(portal).unwrap();
        assert_eq!((answer[0], answer[1] & 0x83, answer[36]), (0x23, 0x83, 0), "{answer:?}");
        let mut raw = Raw { stream, number: 1, tag: 0 };
        // The first command hears that power is on.
        raw.command(&[0; 6], 0, &[], 0);
        raw
    }

    /// Sends a command and serves it to its end: status and data.
    fn command(&mut self, cdb: &[u8], flags: u8, out: &[u8], expected: u32) -> (u8, Vec<u8>) {
        self.tag += 1;
        let mut header = [0; 48];
        header[0] = 0x01;
        header[1] = 0x81 | flags;
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        header[32..32 + cdb.len()].copy_from_slice(cdb);
        self.number += 1;
        let immediate = out.len().min(512);
        send(&mut self.stream, header, &out[..immediate]);
        let mut data = vec![0; if flags & 0x40 != 0 { expected as usize } else { 0 }];
        let mut most = 0;
        loop {
            let (answer, bytes) = receive(&mut self.stream);
            let word = |at: usize| u32::from_be_bytes(answer[at..at + 4].try_into().unwrap());
            match answer[0] & 0x3F {
                0x31 => self.data_out(word(20), word(40), &out[word(40) as usize..(word(40) + word(44)) as usize]),
                0x25 => {
                    let at = word(40) as usize;
                    data[at..at + bytes.len()].copy_from_slice(&bytes);
                    most = most.max(at + bytes.len());
                    if answer[1] & 1 != 0 {
                        data.truncate(most);
                        return (answer[3], data);
                    }
                }
                0x21 => return (answer[3], data),
                other => panic!("an answer of kind {other:#x}"),
            }
        }
    }

    fn data_out(&mut self, transfer_tag: u32, offset: u32, data: &[u8]) {
        // In pieces of 1000 bytes: the last one is final.
        let pieces = data.chunks(1000).count();
        for (nth, piece) in data.chunks(1000).enumerate() {
            let mut header = [0; 48];
            header[0] = 0x05;
            header[1] = if nth + 1 == pieces { 0x80 } else { 0 };
            header[16..20].copy_from_slice(&self.tag.to_be_bytes());
            header[20..24].copy_from_slice(&transfer_tag.to_be_bytes());
            header[36..40].copy_from_slice(&(nth as u32).to_be_bytes());
            header[40..44].copy_from_slice(&(offset + nth as u32 * 1000).to_be_bytes());
            send(&mut self.stream, header, piece);
        }
    }

    fn check_write(&mut self, cdb: &[u8], data: &[u8]) {
        assert_eq!(self.command(cdb, 0x20, data, data.len() as u32).0, 0, "status of {cdb:02x?}");
    }

    fn check_read(&mut self, cdb: &[u8], expected: u32) -> Vec<u8> {
        let (status, data) = self.command(cdb, 0x40, &[], expected);
        assert_eq!(status, 0, "status of {cdb:02x?}");
        data
    }
}

fn send(stream: &mut TcpStream, mut header: [u8; 48], data: &[u8]) {
    header[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
    let mut bytes = header.to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    stream.write_all(&bytes).unwrap();
}

fn receive(stream: &mut TcpStream) -> ([u8; 48], Vec<u8>) {
    let mut header = [0; 48];
    stream.read_exact(&mut header).expect("an answer");
    let length = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
    let mut data = vec![0; length.next_multiple_of(4)];
    stream.read_exact(&mut data).expect("its data");
    data.truncate(length);
    (header, data)
}
