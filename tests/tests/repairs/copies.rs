//! Copies of the LUNs of a mounted volume, taken in the midst of work, become a volume of their own, beside the original and not in its way.
//! Real processes; what an array's snapshot does is done by holding the mount still while its image files are copied.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::Value;
use tests::harness::{Luns, Mount, command, refused, run, system, wait_for};

use super::{files, fill};

/// Waits until no thread of a process that was sent SIGSTOP runs, or waits for a command to a LUN.
fn wait_until_still(mount: &Mount) {
    wait_for("the mount to stand still", || {
        let threads = fs::read_dir(format!("/proc/{}/task", mount.pid())).unwrap();
        threads.flatten().all(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        })
    });
}

/// The bytes of all LUNs at one moment, in the images of `to`.
fn copy_all(mount: &Mount, from: &Luns, to: &Luns) {
    mount.pause();
    wait_until_still(mount);
    // In this process: a child would close files of the mount that stands still before it begins, and wait for it.
    for (from, to) in from.images().iter().zip(to.images()) {
        fs::copy(from, to).unwrap();
    }
    mount.resume();
}

/// Appends numbers to a file, each made durable before it is told.
fn write_numbers(path: &Path, told: &AtomicU64, stop: &AtomicBool) {
    let mut file = File::create(path).unwrap();
    for number in 1u64.. {
        if stop.load(Ordering::Acquire) {
            return;
        }
        file.write_all(&number.to_le_bytes().repeat(512)).unwrap();
        file.sync_all().unwrap();
        told.store(number, Ordering::Release);
        let beside = path.with_extension((number % 7).to_string());
        fs::write(&beside, vec![number as u8; 100_000]).unwrap();
        if number.is_multiple_of(3) {
            fs::remove_file(&beside).unwrap();
        }
    }
}

/// Ends the writer also when the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn resignature(luns: &Luns, arguments: &[&str]) -> Value {
    let said = run(command("vmfs").args(["resignature", "--json"]).args(arguments).args(luns.images()));
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

#[test]
fn copies_of_a_volume_that_is_written_to_become_a_volume_that_is_mounted_beside_it() {
    let (luns, copies) = (Luns::formatted(2, 64, &["--lease", "fast"]), Luns::blank(2, 64));
    let raw = luns.beside("raw.img");
    File::create(&raw).unwrap().set_len(8 << 20).unwrap();
    let mount = luns.mount(1);
    fill(mount.path());
    let before = files(mount.path());
    run(command("vmfs").args(["rdm", "create", "--virtual"]).arg(&raw).arg(mount.at("raw.vmdk")));
    run(system("sync").arg("-f").arg(mount.path()));
    let (told, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let numbers = mount.at("numbers");
        let (told, stop) = (&told, &stop);
        scope.spawn(move || write_numbers(&numbers, told, stop));
        let _ends = Ends(stop);
        wait_for("numbers to be written", || told.load(Ordering::Acquire) >= 5);
        let durable = told.load(Ordering::Acquire);
        copy_all(&mount, &luns, &copies);
        let one = refused(command("vmfs").arg("resignature").arg(&copies.images()[1]), 1);
        assert!(one.contains("not complete") && one.contains("lun1"), "{one}");
        let original = refused(command("vmfs").arg("resignature").args(luns.images()), 1);
        assert!(original.contains("no copy") && original.contains("lun0.img"), "{original}");
        let done = resignature(&copies, &["--label", "copied"]);
        assert_eq!((&done["label"], &done["resumed"]), (&Value::from("copied"), &Value::from(false)), "{done:#}");
        assert_eq!(done["from"], mount.status()["volume"], "{done:#}");
        let to_recover = done["to_recover"].as_array().unwrap();
        assert!(to_recover.len() == 2 && to_recover.iter().all(|slot| slot["host_name"] == "host1"), "{done:#}");
        let folder = format!("rdm_folder={}", raw.parent().unwrap().display());
        let copy = copies.mount_with(2, &["-o", &folder]);
        assert_eq!(copy.status()["volume"], done["volume"], "{done:#}");
        let mut there = files(copy.path());
        let numbers = there.remove("numbers").unwrap();
        there.retain(|name, _| !name.starts_with("numbers.") && !name.starts_with("raw"));
        assert!(there == before, "what was durable when the copy was taken is not in it");
        let whole: Vec<u64> =
            numbers.chunks_exact(4096).map(|one| u64::from_le_bytes(one[..8].try_into().unwrap())).collect();
        assert!(whole.len() as u64 >= durable, "{durable} numbers were durable, {} are there", whole.len());
        assert!((1..=durable).eq(whole[..durable as usize].iter().copied()), "{whole:?}");
        copy.wait_until_alone();
        // Both are written to, and neither sees what is written in the other.
        fs::write(copy.at("in-the-copy"), "copy").unwrap();
        let now = told.load(Ordering::Acquire);
        wait_for("the original to go on", || told.load(Ordering::Acquire) > now + 3);
        assert!(!mount.at("in-the-copy").exists());
        // A mapping is in both, and its device has one writer.
        let writer = File::options().write(true).open(mount.at("raw-rdm.vmdk")).unwrap();
        writer.write_all_at(&[7; 4096], 0).unwrap();
        let second = File::options().write(true).open(copy.at("raw-rdm.vmdk")).unwrap_err();
        assert_eq!(second.raw_os_error(), Some(libc::EBUSY), "{second}");
        writer.sync_all().unwrap();
        drop(writer);
        wait_for("the device to be free", || File::options().write(true).open(copy.at("raw-rdm.vmdk")).is_ok());
        copy.unmount();
    });
    mount.unmount();
    luns.assert_recovered();
    copies.assert_recovered();
    // The copy of one that is not mounted is ready at once, and for certain no copy any more.
    let third = Luns::blank(2, 64);
    for (from, to) in copies.images().iter().zip(third.images()) {
        run(system("cp").arg("--sparse=always").arg(from).arg(to));
    }
    let done = resignature(&third, &[]);
    let label = done["label"].as_str().unwrap();
    assert!(label.starts_with("snap-") && label.ends_with("-copied"), "{done:#}");
    assert_eq!(done["to_recover"], Value::Array(Vec::new()));
    let said = refused(command("vmfs").arg("resignature").args(third.images()), 1);
    assert!(said.contains("no copy"), "{said}");
    third.mount(3).unmount();
    third.assert_clean();
}
