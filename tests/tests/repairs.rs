//! Volumes that were left by killed mounts, damaged or copied: the commands that bring them back.

#[path = "repairs/copies.rs"]
mod copies;
#[path = "repairs/lost_luns.rs"]
mod lost_luns;
#[path = "repairs/scrub.rs"]
mod scrub;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tests::harness::{Luns, command, output, refused, run, system, text};
use tests::random::Random;

/// Every file below a directory with its bytes.
fn files(below: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![below.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let name = path.strip_prefix(below).unwrap().to_str().unwrap().to_owned();
                    all.insert(name, fs::read(&path).unwrap());
                }
            }
        }
    }
    all
}

fn fill(below: &Path) {
    let mut random = Random::new(7);
    for directory in ["vm1", "vm2/deep"] {
        fs::create_dir_all(below.join(directory)).unwrap();
        for (nth, length) in [0, 100, 5000, 300_000, 2_000_000].into_iter().enumerate() {
            fs::write(below.join(directory).join(format!("file{nth}")), random.bytes(length)).unwrap();
        }
    }
    run(system("sync").arg("-f").arg(below));
}

#[test]
fn a_volume_of_a_killed_mount_is_preened_and_has_everything_that_was_synced() {
    let luns = Luns::formatted(2, 128, &["--lease", "fast"]);
    let mut mount = luns.mount(1);
    fill(mount.path());
    let before = files(mount.path());
    let said = refused(command("fsck.vmfs").arg("-p").args(luns.images()), 8);
    assert!(said.contains("host1"), "it does not name the live host: {said}");
    // Work is under way when it dies.
    let busy = mount.at("busy");
    let writer = std::thread::spawn(move || {
        for nth in 0.. {
            let path = busy.with_extension(nth.to_string());
            if fs::write(&path, [1; 200_000]).is_err() || (nth % 2 == 0 && fs::remove_file(&path).is_err()) {
                return;
            }
        }
    });
    std::thread::sleep(std::time::Duration::from_millis(500));
    mount.crash();
    writer.join().unwrap();
    mount.kill();
    let preened = output(command("fsck.vmfs").arg("-p").args(luns.images()));
    assert_eq!(preened.status.code(), Some(1), "{}", text(&preened));
    assert!(text(&preened).contains("was gone"), "{}", text(&preened));
    luns.assert_clean();
    assert_eq!(output(command("fsck.vmfs").arg("-p").args(luns.images())).status.code(), Some(0));
    let mount = luns.mount(1);
    let mut after = files(mount.path());
    after.retain(|name, _| !name.starts_with("busy"));
    assert!(after == before, "what was synced is not there");
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_damaged_volume_is_repaired_and_the_repair_is_taken_back() {
    let luns = Luns::formatted(1, 128, &[]);
    let mount = luns.mount(1);
    fill(mount.path());
    let before = files(mount.path());
    mount.unmount();
    let image = &luns.images()[0];
    let bytes = fs::read(image).unwrap();
    let file = File::options().write(true).open(image).unwrap();
    // A pointer cell, a cell of the block table and the header.
    let pointers = bytes.chunks(512).position(|cell| cell[..5] == *b"VMFc\x0a").expect("a pointer cell") as u64 * 512;
    for at in [pointers, 0x40_0000, 0x10_0000] {
        file.write_all_at(&[0xee; 200], at).unwrap();
    }
    let damaged = fs::read(image).unwrap();
    assert_eq!(output(command("fsck.vmfs").arg("-n").arg(image)).status.code(), Some(4));
    let undo = luns.beside("undo");
    let repaired = output(command("fsck.vmfs").args(["-y", "-u"]).arg(&undo).arg(image));
    assert_eq!(repaired.status.code(), Some(1), "{}", text(&repaired));
    luns.assert_clean();
    refused(command("fsck.vmfs").args(["-y", "-u"]).arg(&undo).arg(image), 8);
    let sound = fs::read(image).unwrap();
    run(command("fsck.vmfs").arg("--undo").arg(&undo).arg(image));
    assert!(fs::read(image).unwrap() == damaged, "not as it was before the repair");
    fs::write(image, sound).unwrap();
    let mount = luns.mount(1);
    assert!(files(mount.path()) == before);
    mount.unmount();
}
