//! Promises of the iSCSI target, by initiators that others have written (libiscsi) and by raw connections.

#[path = "iscsi/direct.rs"]
mod direct;
#[path = "iscsi/volumes.rs"]
mod volumes;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tests::harness::{Luns, folder, output, program, refused, run, signal, system, text, wait_for};
use tests::random::Random;
use tests::raw_initiator::{RawInitiator, open};
use tests::targets::launch;

#[path = "iscsi/clients.rs"]
mod clients;
#[path = "iscsi/crashes.rs"]
mod crashes;
#[path = "iscsi/initiator.rs"]
mod initiator;
#[path = "iscsi/invalid.rs"]
mod invalid;
#[path = "iscsi/operation.rs"]
mod operation;

const NAME: &str = "iqn.2026-01.test:disk";
const HOST: &str = "iqn.2026-01.test:host";

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
        let (daemon, portals) = launch_disk(&folder, options, &ports);
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
        (self.daemon, self.portals) = launch_disk(&self.folder, &self.options, &self.portals.clone());
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

fn launch_disk(folder: &TempDir, options: &str, portals: &[String]) -> (Child, Vec<String>) {
    let disk = folder.path().join("disk.img");
    let mut arguments: Vec<String> =
        portals.iter().flat_map(|portal| ["--portal".to_owned(), portal.clone()]).collect();
    arguments.extend(["--target".to_owned(), format!("{NAME}={}{options}", disk.display())]);
    launch(folder.path(), &arguments)
}

/// Passed and failed tests of libiscsi's suite. It calls a skipped test passed: those are counted as neither.
fn conformance(target: &Target, suite: &str) -> (usize, Vec<String>) {
    conformance_with(&["-d", "-v", "-t", suite], target)
}

fn conformance_with(options: &[&str], target: &Target) -> (usize, Vec<String>) {
    let mut command = system("iscsi-test-cu");
    let told = command.args(options).arg(target.url(0)).arg(target.url(1)).output().unwrap();
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
const PASSED: usize = 202;
/// Tests that pass on a removable one: eight that forbid and allow the removal, one that ejects.
const PASSED_REMOVABLE: usize = PASSED + 9;

#[test]
fn libiscsis_suite_finds_nothing_wrong_with_a_thin_lun() {
    let target = Target::start(",thin");
    let (passed, failed) = conformance(&target, "ALL");
    assert_eq!(failed, Vec::<String>::new(), "failed");
    assert!(passed >= PASSED, "{passed} passed, at least {PASSED} should");
    target.stop();
}

#[test]
fn libiscsis_suite_finds_nothing_wrong_with_sanitize() {
    let target = Target::start(",thin");
    let (passed, failed) = conformance_with(&["-d", "-S", "-v", "-t", "ALL.Sanitize"], &target);
    // One asks for the progress of work on a LUN so small that it is done by then.
    assert!(failed.iter().all(|test| test == "Sanitize.Reset"), "{failed:?}");
    assert!(passed >= 7, "{passed} passed");
    target.stop();
}

#[test]
fn libiscsis_suite_finds_nothing_wrong_with_a_removable_lun() {
    let target = Target::start(",thin,removable");
    let (passed, failed) = conformance(&target, "ALL");
    assert_eq!(failed, Vec::<String>::new(), "failed");
    assert!(passed >= PASSED_REMOVABLE, "{passed} passed, at least {PASSED_REMOVABLE} should");
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

/// The example of the manual page, with its places put in.
const CONFIG: &str = include_str!("../../docs/man/iscsi-target.8");

#[test]
fn the_example_of_the_manual_page_lets_in_who_proves_itself_by_chap_and_nobody_else() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    fs::File::create(&image).unwrap().set_len(100 << 20).unwrap();
    let second = folder.path().join("second.img");
    fs::File::create(&second).unwrap().set_len(100 << 20).unwrap();
    let iso = folder.path().join("install.iso");
    fs::File::create(&iso).unwrap().set_len(1 << 20).unwrap();
    let example = CONFIG.split(".Bd -literal\n").nth(1).unwrap().split(".Ed").next().unwrap();
    let example = example
        .replace("10.0.0.1:3260", "127.0.0.1:0")
        .replace("10.0.1.1:3260", "127.0.0.1:0")
        .replace("iqn.2026-01.com.example:host-a", HOST)
        .replace("/srv/lun0.img", image.to_str().unwrap())
        .replace("/dev/sdb", second.to_str().unwrap())
        .replace("/srv/install.iso", iso.to_str().unwrap());
    let config = folder.path().join("config.toml");
    fs::write(&config, example).unwrap();
    let (daemon, portals) = launch(folder.path(), &["--config".to_owned(), config.to_str().unwrap().to_owned()]);
    let target = Target { folder, options: String::new(), daemon, portals };
    let ask = |credentials: &str, proof: &str, who: &str| {
        let url = format!("iscsi://{credentials}{}/iqn.2026-01.com.example:ds1/1{proof}", target.portals[1]);
        system("iscsi-readcapacity16").args(["-i", who, &url]).output().unwrap()
    };
    let right = "host%at-least-12-characters@";
    for proof in ["", "?target_user=ds1&target_password=another-one-of-12"] {
        let told = ask(right, proof, HOST);
        assert!(told.status.success() && text(&told).contains("BYTES:4096"), "{}", text(&told));
    }
    for (credentials, proof, who) in [
        ("", "", HOST),
        ("host%not-that-secret@", "", HOST),
        ("guest%at-least-12-characters@", "", HOST),
        (right, "?target_user=ds1&target_password=not-the-targets", HOST),
        (right, "", "iqn.2026-01.test:stranger"),
    ] {
        let told = ask(credentials, proof, who);
        assert!(!told.status.success(), "{credentials} {proof} {who}: {}", text(&told));
    }
    target.stop();
}

#[test]
fn a_disk_of_a_volume_is_served_under_its_lock_and_its_data_are_seen_by_the_mount() {
    let luns = Luns::formatted(2, 256, &[]);
    let (mount, other) = (luns.mount(1), luns.mount(2));
    let disk = mount.at("disk.vmdk");
    run(Command::new(program("vmfs")).args(["disk", "create", "-s", "64M", "-d", "thin"]).arg(&disk));
    let lun = |disk: &Path| {
        [
            "--portal".to_owned(),
            "127.0.0.1:0".to_owned(),
            "--target".to_owned(),
            format!("{NAME}={},thin", disk.display()),
        ]
    };
    let folder = folder();
    let (daemon, portals) = launch(folder.path(), &lun(&disk));
    let target = Target { folder, options: String::new(), daemon, portals };
    let data: Vec<u8> = (0..16_384u32).map(|n| (n * 5) as u8).collect();
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
    session.check_write(&[0x2A, 0, 0, 0, 8, 0, 0, 0, 32, 0], &data);
    // SYNCHRONIZE CACHE.
    assert_eq!(session.command(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0, &[], 0).0, 0);
    let mut command = Command::new(program("iscsi-target"));
    command.arg("serve").arg("--control").arg(luns.beside("control")).args(lun(&other.at("disk.vmdk")));
    let refusal = refused(&mut command, 1);
    assert!(refusal.contains("disk-flat.vmdk") && refusal.contains("held by one host"), "{refusal}");
    target.stop();
    let file = fs::read(other.at("disk-flat.vmdk")).unwrap();
    assert!(file[2048 * 512..][..data.len()] == data);
    mount.unmount();
    other.unmount();
    luns.assert_clean();
}

#[test]
fn digests_are_right_and_a_wrong_one_is_noticed() {
    let target = Target::start("");
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "HeaderDigest=CRC32C\0DataDigest=CRC32C\0");
    let data: Vec<u8> = (0..2048u32).map(|n| (n * 3) as u8).collect();
    session.check_write(&[0x2A, 0, 0, 0, 0, 8, 0, 0, 4, 0], &data);
    assert_eq!(session.check_read(&[0x28, 0, 0, 0, 0, 8, 0, 0, 4, 0], 2048), data);

    // RFC 7143, 7.8: data whose digest is wrong are rejected, and their command ends; the session goes on.
    session.wire.spoil_data = true;
    let (status, _) = session.command(&[0x2A, 0, 0, 0, 0, 8, 0, 0, 1, 0], 0x20, &[0xEE; 512], 512);
    assert_eq!((status, session.rejected), (0x02, Some(0x02)));
    session.wire.spoil_data = false;
    assert_eq!(session.check_read(&[0x28, 0, 0, 0, 0, 8, 0, 0, 1, 0], 512), data[..512], "nothing was written");

    // A header whose digest is wrong ends the connection.
    session.wire.spoil_header = true;
    assert!(session.is_hung_up_on());
    wait_for("the session to end", || target.status()["targets"][0]["sessions"].as_array().unwrap().is_empty());
    target.stop();
}

#[test]
fn reservations_are_there_again_after_a_crash() {
    let mut target = Target::start("");
    // REGISTER with a key.
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
    let mut parameters = [0u8; 24];
    parameters[8..16].copy_from_slice(&0xFEED_u64.to_be_bytes());
    // APTPL.
    parameters[20] = 1;
    session.check_write(&[0x5F, 0, 0, 0, 0, 0, 0, 0, 24, 0], &parameters);
    target.crash();
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
    let keys = session.check_read(&[0x5E, 0, 0, 0, 0, 0, 0, 0, 255, 0], 255);
    assert_eq!(keys[8..16], 0xFEED_u64.to_be_bytes(), "{keys:?}");
    target.stop();
}

#[test]
fn what_is_written_is_read_back_by_every_way_of_sending_it() {
    let target = Target::start("");
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
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
    let _first = RawInitiator::log_in(&target.portals[0], NAME, "");
    let connections: Vec<_> = std::thread::scope(|scope| {
        let logins: Vec<_> = (0..8).map(|_| scope.spawn(|| open(&target.portals[0], NAME, ""))).collect();
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
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
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
