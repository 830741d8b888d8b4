//! `vmfs scrub` on volumes that hosts work on: it finds what is damaged and names it, and takes no change for damage.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::Value;
use tests::faults::Paths;
use tests::harness::{Luns, Mount, command, output, run, text};
use tests::random::Random;

/// Size of a cell of these volumes, and the magic that it begins with (FORMAT.md, section 3).
const CELL: usize = 512;
const MAGIC: &[u8] = b"VMFc";

/// What `vmfs scrub` says as JSON, and its exit status.
#[track_caller]
fn scrub(mount: &Mount, arguments: &[&str]) -> (Value, i32) {
    let out = output(command("vmfs").args(["scrub", "--json", "--rate", "0"]).args(arguments).arg(mount.path()));
    let report = serde_json::from_slice(&out.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&out)));
    (report, out.status.code().unwrap())
}

#[track_caller]
fn assert_clean(mount: &Mount, arguments: &[&str]) -> Value {
    let (report, status) = scrub(mount, arguments);
    assert!(status == 0 && report["clean"] == true && report["found"] == 0, "{report:#}");
    report
}

fn fd_of(path: &Path) -> u64 {
    lockd::ioctl::get_volume(File::open(path).unwrap()).unwrap().fd.get()
}

/// Bytes of a block and of a unit of these volumes, whose blocks lie at multiples of their size.
const BLOCK: usize = 1 << 20;
const UNIT: usize = 8192;

/// The first place of a cell of a kind that belongs to an object (0: to none) on an image; for a unit the first cell of one that the
/// object has now, as its container's table says (FORMAT.md, section 7).
fn cell(image: &Path, kind: u8, owner: u64) -> u64 {
    let bytes = fs::read(image).unwrap();
    let is_one = |cell: &[u8]| cell.starts_with(MAGIC) && cell[4] == kind && cell[0x48..0x50] == owner.to_le_bytes();
    let is_in_use = |at: usize| {
        let (container, unit) = (at / BLOCK * BLOCK, at % BLOCK / UNIT);
        let entry = &bytes[container + unit / 26 * CELL + 96 + unit % 26 * 16..][..16];
        at.is_multiple_of(UNIT) && entry[..8] == owner.to_le_bytes() && entry[12] == kind
    };
    let mut places = (0..).step_by(CELL).zip(bytes.chunks(CELL)).filter(|(_, cell)| is_one(cell)).map(|(at, _)| at);
    let found = places.find(|at| !(9..=12).contains(&kind) || is_in_use(*at));
    found.unwrap_or_else(|| panic!("no cell of kind {kind} of {owner:#x}")) as u64
}

/// A cell of an image that was damaged; it is as before when this is dropped.
struct Damage {
    image: File,
    at: u64,
    before: Vec<u8>,
}

impl Damage {
    fn new(image: &Path, at: u64) -> Damage {
        let image = File::options().read(true).write(true).open(image).unwrap();
        let mut before = vec![0; CELL];
        image.read_exact_at(&mut before, at).unwrap();
        let mut damaged = before.clone();
        damaged[300] ^= 0x40;
        image.write_all_at(&damaged, at).unwrap();
        Damage { image, at, before }
    }
}

impl Drop for Damage {
    fn drop(&mut self) {
        self.image.write_all_at(&self.before, self.at).unwrap();
    }
}

#[test]
fn damage_under_a_live_mount_is_found_and_named() {
    let luns = Luns::formatted(1, 128, &[]);
    let paths = Paths::default();
    let mount = luns.mount_by(1, &[], |command| paths.start(command).unwrap());
    let image = &luns.images()[0];
    fs::create_dir_all(mount.at("vms/many")).unwrap();
    for nth in 0..400 {
        fs::write(mount.at(format!("vms/many/a file with a name that is not short {nth}")), "x").unwrap();
    }
    let pattern = Random::new(3).bytes(1 << 20);
    fs::write(mount.at("vms/data"), &pattern).unwrap();
    fs::write(mount.at("vms/inline"), "x").unwrap();
    run(command("vmfs").args(["disk", "create", "-s", "64M", "-d", "zeroedthick"]).arg(mount.at("vms/disk.vmdk")));
    let report = assert_clean(&mount, &["--data"]);
    assert!(report["objects"].as_u64().unwrap() >= 406, "{report:#}");
    let fixed = |slot: u64| slot * 4096;
    let of = |name: &str| fd_of(&mount.at(name));
    let cases: Vec<(&str, u64, Option<&str>)> = vec![
        ("header copy", 0x1f_f000, None),
        ("member", (1 << 20) + fixed(77), None),
        ("heartbeat", (2 << 20) + fixed(200), None),
        ("arena", (3 << 20) + fixed(201), None),
        ("block table", cell(image, 5, 0), None),
        ("unit table", cell(image, 6, 0), None),
        ("root cell", cell(image, 7, of("vms/inline")), Some("/vms/inline")),
        ("body", cell(image, 9, of("vms/inline")), Some("/vms/inline")),
        ("pointer block", cell(image, 10, of("vms/data")), Some("/vms/data")),
        ("pointer block", cell(image, 10, of("vms/disk-flat.vmdk")), Some("/vms/disk-flat.vmdk")),
        ("bucket", cell(image, 12, of("vms/many")), Some("/vms/many")),
    ];
    for (structure, place, path) in &cases {
        let damage = Damage::new(image, *place);
        let (report, status) = scrub(&mount, &[]);
        let findings = report["findings"].as_array().unwrap();
        let named = |of: &Value| of["structure"] == *structure && of["path"].as_str() == *path;
        assert!(status == 1 && findings.iter().any(named), "{structure} {path:?}: {report:#}");
        let others = |of: &&Value| of["structure"] != *structure && of["structure"] != "free unit";
        assert_eq!(findings.iter().find(others), None, "{structure} {path:?}: {report:#}");
        let out = output(command("vmfs").args(["scrub", "--rate", "0"]).arg(mount.path()));
        let said = text(&out);
        assert!(out.status.code() == Some(1) && said.contains(structure) && said.contains(path.unwrap_or("damaged")));
        drop(damage);
        assert_clean(&mount, &[]);
    }
    // A bad sector below file data: found by --data only, with the file and its offset.
    let bytes = fs::read(image).unwrap();
    let at =
        bytes.chunks(4096).position(|piece| piece == &pattern[409_600..413_696]).expect("the data is there") as u64;
    paths.spoil(image, at * 4096..at * 4096 + 512);
    assert_clean(&mount, &[]);
    let (report, status) = scrub(&mount, &["--data"]);
    assert_eq!((status, &report["found"]), (1, &1.into()), "{report:#}");
    assert_eq!(report["findings"][0]["path"], "/vms/data", "{report:#}");
    assert!(report["findings"][0]["what"].as_str().unwrap().contains("cannot be read"), "{report:#}");
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_lost_lun_is_told_and_what_is_not_on_it_is_looked_at() {
    let luns = Luns::formatted(2, 128, &[]);
    let mount = luns.mount(1);
    fs::write(mount.at("file"), "x").unwrap();
    mount.unmount();
    let away = luns.beside("away");
    fs::rename(&luns.images()[1], &away).unwrap();
    let mount = luns.mount_with(1, &["-o", "degraded"]);
    let (report, status) = scrub(&mount, &[]);
    assert_eq!((status, &report["found"], &report["lost"]), (1, &0.into(), &serde_json::json!([2])), "{report:#}");
    fs::rename(&away, &luns.images()[1]).unwrap();
    mount.unmount();
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ESTALE | libc::ENOENT))
}

/// Changes names, sizes and data below a folder that two hosts share, until it is told to stop.
fn hammer(folder: &Path, host: u64, stop: &AtomicBool) {
    let mut random = Random::new(host);
    while !stop.load(Ordering::Acquire) {
        let shared = |n: u64| folder.join(format!("shared{n}"));
        let (one, other): (PathBuf, PathBuf) = (shared(random.below(12)), shared(random.below(12)));
        let own = folder.join(format!("dir{}", random.below(3))).join(format!("own{host}-{}", random.below(200)));
        let length = random.below(400_000) as usize;
        let done = match random.below(8) {
            0 => fs::write(&one, random.bytes(length)),
            1 => fs::rename(&one, &other),
            2 => fs::remove_file(&one),
            3 => fs::rename(&one, &own),
            4 => fs::rename(&own, &one),
            5 => fs::remove_file(&own),
            6 => fs::write(&own, random.bytes(length / 100)),
            _ => File::options().write(true).open(&own).and_then(|file| {
                file.set_len(random.below(3_000_000))?;
                file.write_all_at(&[7; 5000], random.below(2_000_000))?;
                file.sync_all()
            }),
        };
        if let Err(error) = done {
            assert!(is_busy(&error), "{error}");
        }
    }
}

#[test]
fn no_change_under_way_is_taken_for_damage() {
    // The other cell size than where damage is found.
    let luns = Luns::formatted(2, 256, &["--cell", "4096"]);
    let mounts = [luns.mount(1), luns.mount(2)];
    for nth in 0..3 {
        fs::create_dir(mounts[0].at(format!("dir{nth}"))).unwrap();
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4u64)
            .map(|nth| {
                let (folder, stop) = (mounts[nth as usize % 2].path(), &stop);
                scope.spawn(move || hammer(folder, nth, stop))
            })
            .collect();
        let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..4 {
                assert_clean(&mounts[round % 2], if round < 2 { &["--data"] } else { &[] });
            }
        }));
        stop.store(true, Ordering::Release);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        looked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let [one, two] = mounts;
    assert_clean(&one, &["--data"]);
    one.unmount();
    two.unmount();
    luns.assert_clean();
}
