//! The commands as people run them, on image files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

struct Luns {
    _folder: TempDir,
    paths: Vec<PathBuf>,
}

fn images(sizes: &[u64]) -> Luns {
    let folder = tempfile::tempdir().unwrap();
    let make = |(nth, bytes): (usize, &u64)| {
        let path = folder.path().join(format!("lun{nth}.img"));
        File::create(&path).unwrap().set_len(*bytes).unwrap();
        path
    };
    let paths = sizes.iter().enumerate().map(make).collect();
    Luns { _folder: folder, paths }
}

fn mkfs() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mkfs-vmfs"))
}

fn fsck() -> Command {
    Command::new(env!("CARGO_BIN_EXE_fsck-vmfs"))
}

fn vmfs() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vmfs"))
}

#[track_caller]
fn ends(command: &mut Command, status: i32) -> String {
    let Output { status: found, stdout, stderr } = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(found.code(), Some(status), "{command:?}: {text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn made(sizes: &[u64]) -> Luns {
    let luns = images(sizes);
    ends(mkfs().args(["-L", "ds1"]).args(&luns.paths), 0);
    luns
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_volume_is_made_with_a_plan_before_and_a_summary_after_and_is_clean() {
    let luns = images(&[64 * MIB, 80 * MIB]);
    let said = ends(mkfs().args(["-L", "ds1", "-b", "64K", "--lease", "fast"]).args(&luns.paths), 0);
    for word in ["ds1", "lun0.img", "lun1.img", "64 KiB", "10000 ms", "made:", "mount.vmfs"] {
        assert!(said.contains(word), "{word} is not in {said}");
    }
    let reversed: Vec<_> = luns.paths.iter().rev().collect();
    assert!(ends(fsck().arg("-n").args(reversed), 0).contains("clean"));
}

#[test]
fn a_dry_run_shows_the_plan_and_writes_nothing() {
    let luns = images(&[64 * MIB]);
    let before = fs::read(&luns.paths[0]).unwrap();
    assert!(ends(mkfs().args(["-n", "-L", "ds1"]).args(&luns.paths), 0).contains("nothing was written"));
    assert!(fs::read(&luns.paths[0]).unwrap() == before);
}

#[test]
fn mkfs_prints_facts_as_json() {
    let luns = images(&[64 * MIB]);
    let said = ends(mkfs().args(["--json", "-L", "ds1", "--cell", "4096"]).args(&luns.paths), 0);
    let facts: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((facts["label"].as_str(), facts["cell_bytes"].as_u64()), (Some("ds1"), Some(4096)));
    assert_eq!((facts["made"].as_bool(), facts["luns"][0]["blocks"].as_u64()), (Some(true), Some(59)));
}

#[test]
fn mkfs_refuses_what_it_can_not_use_and_says_why() {
    let luns = images(&[64 * MIB, MIB]);
    let said = ends(mkfs().args(&luns.paths), 1);
    assert!(said.contains("lun1.img") && said.contains("64 MiB"), "{said}");
    assert!(ends(fsck().arg(&luns.paths[0]), 8).contains("no LUN of a VMFS volume"), "the other LUN was written");
    let twice = ends(mkfs().args([&luns.paths[0], &luns.paths[0]]), 1);
    assert!(twice.contains("twice"), "{twice}");
    let link = luns.paths[0].with_file_name("same.img");
    std::os::unix::fs::symlink(&luns.paths[0], &link).unwrap();
    assert!(ends(mkfs().args([&luns.paths[0], &link]), 1).contains("same LUN"));
    assert!(ends(mkfs().arg("/nonexistent/lun"), 1).contains("/nonexistent/lun"));
    assert!(ends(mkfs().arg("iscsi://host/iqn/1").arg(&luns.paths[0]), 1).contains("iscsi"));
    assert!(ends(mkfs().arg("/dev/null"), 1).contains("/dev/null"));
}

#[test]
fn mkfs_says_what_is_wrong_with_its_arguments() {
    let luns = images(&[64 * MIB]);
    let long = "l".repeat(65);
    for arguments in [
        vec!["-L", &long],
        vec!["-b", "100K"],
        vec!["-b", "32K"],
        vec!["--cell", "1024"],
        vec!["--lease", "none"],
        vec!["--no-such-flag"],
    ] {
        ends(mkfs().args(arguments).args(&luns.paths), 2);
    }
    ends(&mut mkfs(), 2);
    assert!(ends(mkfs().arg("--help"), 0).contains("mkfs.vmfs -L ds1"));
}

#[test]
fn a_file_system_and_a_volume_are_overwritten_only_by_force() {
    let luns = images(&[64 * MIB]);
    let ext4 = Command::new("mkfs.ext4")
        .arg("-q")
        .arg(&luns.paths[0])
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .status()
        .expect("mkfs.ext4 is installed (e2fsprogs)");
    assert!(ext4.success());
    let before = fs::read(&luns.paths[0]).unwrap();
    let said = ends(mkfs().args(&luns.paths), 1);
    assert!(said.contains("ext4") && said.contains("--force") && said.contains("lun0.img"), "{said}");
    assert!(fs::read(&luns.paths[0]).unwrap() == before);
    ends(mkfs().args(["--force", "-L", "old"]).args(&luns.paths), 0);
    let said = ends(mkfs().args(&luns.paths), 1);
    assert!(said.contains("old") && said.contains("--force"), "{said}");
}

#[test]
fn fsck_ends_as_fsck_8_says() {
    let luns = made(&[64 * MIB, 64 * MIB]);
    ends(fsck().args(&luns.paths), 0);
    for option in ["-p", "-a", "-y"] {
        assert!(ends(fsck().arg(option).args(&luns.paths), 0).contains("0 repairs"));
    }
    ends(fsck().args(["-p", "-y"]).args(&luns.paths), 16);
    ends(fsck().args(["-u", "undo"]).args(&luns.paths), 16);
    assert!(ends(fsck().args(["-y"]).arg(&luns.paths[0]), 8).contains("needs every LUN"));
    ends(&mut fsck(), 16);
    ends(fsck().arg("--no-such-flag").args(&luns.paths), 16);
    ends(fsck().arg("--help"), 0);
    ends(fsck().arg("/nonexistent/lun"), 8);
    assert!(ends(fsck().args([&luns.paths[0], &luns.paths[0]]), 8).contains("twice"));
    let said = ends(fsck().arg(&luns.paths[0]), 4);
    assert!(said.contains("lun2"), "the missing LUN is not named: {said}");
    flip(&luns.paths[1], 0x40_0030);
    let said = ends(fsck().args(&luns.paths), 4);
    assert!(said.contains("block table lun2+0x400000"), "{said}");
    let said = ends(fsck().arg("-p").args(&luns.paths), 4);
    assert!(said.contains("not done without -y"), "{said}");
    let said = ends(fsck().arg("-y").args(&luns.paths), 1);
    assert!(said.contains("made anew"), "{said}");
    ends(fsck().args(&luns.paths), 0);
}

#[test]
fn fsck_reports_as_json() {
    let luns = made(&[64 * MIB]);
    let report =
        |status| -> Value { serde_json::from_str(&ends(fsck().arg("--json").args(&luns.paths), status)).unwrap() };
    let sound = report(0);
    assert_eq!((sound["clean"].as_bool(), sound["objects"]["directories"].as_u64()), (Some(true), Some(1)));
    flip(&luns.paths[0], 0x30_7000 + 100);
    let damaged = report(4);
    assert_eq!(damaged["findings"][0]["structure"].as_str(), Some("arena"), "{damaged}");
    assert_eq!((damaged["errors"].as_u64(), damaged["findings_omitted"].as_u64()), (Some(1), Some(0)));
}

#[test]
fn an_unmounted_volume_is_shown_and_its_structures_are_dumped() {
    let luns = made(&[64 * MIB, 64 * MIB]);
    let before: Vec<_> = luns.paths.iter().map(|path| fs::read(path).unwrap()).collect();
    let said = ends(vmfs().arg("status").args(&luns.paths), 0);
    assert!(said.contains("ds1") && said.contains("lun1.img"), "{said}");
    let facts: Value = serde_json::from_str(&ends(vmfs().args(["status", "--json"]).args(&luns.paths), 0)).unwrap();
    assert_eq!(facts[0]["luns"].as_array().map(Vec::len), Some(2));
    assert!(ends(vmfs().args(["extent", "list"]).args(&luns.paths), 0).contains("lun2"));
    assert!(ends(vmfs().args(["heartbeat", "list"]).args(&luns.paths), 0).contains("no host"));
    let dump = |what: &str| ends(vmfs().args(["dump", "--lun"]).arg(&luns.paths[0]).args(what.split(' ')), 0);
    for (what, word) in [
        ("header", "ds1"),
        ("copy", "ds1"),
        ("member 2", "active"),
        ("slot 3", "free"),
        ("arena 3", "places"),
        ("root", "directory"),
        ("fd1.0.0", "entries"),
        ("lun1+0x400000", "FD container"),
        ("lun1:b1", "unit container"),
        ("lun1:b1:u1", "body cell"),
    ] {
        let said = dump(what);
        assert!(said.contains(word), "{what}: {word} is not in {said}");
    }
    flip(&luns.paths[0], 0x10_0020);
    assert!(dump("header").contains("checksum"), "a damaged header is shown as that");
    flip(&luns.paths[0], 0x10_0020);
    let place = |what: &str| ends(vmfs().args(["dump", "--lun"]).arg(&luns.paths[0]).arg(what), 1);
    assert!(place("nonsense").contains("no place"));
    assert!(place("lun2:b0").contains("not given"));
    assert!(place("lun1:b999999").contains("no"));
    let after: Vec<_> = luns.paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(before == after, "looking changed a LUN");
}

#[test]
fn paths_on_no_mount_are_refused_clearly() {
    let luns = images(&[MIB]);
    let path = luns.paths[0].with_file_name("disk.vmdk");
    let said = ends(vmfs().args(["disk", "create", "-s", "1G"]).arg(&path), 1);
    assert!(said.contains("no mounted VMFS volume") && said.contains("disk.vmdk"), "{said}");
    for command in [
        vec!["disk", "info"],
        vec!["disk", "inflate"],
        vec!["disk", "extend", "-s", "2G"],
        vec!["why-locked"],
        vec!["dump"],
    ] {
        assert!(ends(vmfs().args(command).arg(&path), 1).contains("no mounted VMFS volume"));
    }
    for wrong in [vec!["-s", "0"], vec!["-s", "1000"], vec!["-s", "1G", "-d", "sparse"], vec![]] {
        ends(vmfs().args(["disk", "create"]).args(wrong).arg(&path), 2);
    }
    ends(vmfs().args(["disk", "create", "-s", "1G", "disk.img"]), 2);
    ends(&mut vmfs(), 2);
    let help = ends(vmfs().arg("--help"), 0);
    for command in ["disk", "rdm", "extent", "lock", "heartbeat", "status", "why-locked", "dump", "probe-lun"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "{command} is told: {help}");
    }
    assert!(ends(vmfs().arg("status").arg(luns.paths[0].parent().unwrap()), 1).contains("no mounted VMFS volume"));
}
