//! Wrong input ends in an error that names object, cause and next step, changes nothing, and never panics.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tests::harness::{Luns, command, is_mounted, output, refused, run, system, text};
use tests::random::Random;

fn mount_refused(spec: &str, point: &Path) -> String {
    let said = refused(command("mount.vmfs").arg(spec).arg(point), 1);
    assert!(!is_mounted(point), "it was mounted all the same");
    said
}

#[test]
fn mkfs_refuses_what_is_in_use_and_says_what_it_found() {
    let luns = Luns::blank(1, 128);
    run(system("mkfs.ext4").args(["-q"]).arg(&luns.images()[0]));
    let before = fs::read(&luns.images()[0]).unwrap();
    let said = refused(command("mkfs.vmfs").args(["-L", "x"]).args(luns.images()), 1);
    assert!(said.contains("ext4") && said.contains("--force"), "{said}");
    assert!(fs::read(&luns.images()[0]).unwrap() == before, "a refused mkfs changed the LUN");
    run(command("mkfs.vmfs").args(["-L", "x", "--force"]).args(luns.images()));
    let mount = luns.mount(1);
    let said = refused(command("mkfs.vmfs").args(["-L", "y"]).args(luns.images()), 1);
    assert!(said.contains("host1"), "it does not name the live host: {said}");
    mount.unmount();
}

#[test]
fn mkfs_says_what_is_wrong_with_its_arguments() {
    let luns = Luns::blank(1, 1);
    let image = luns.images()[0].to_str().unwrap().to_owned();
    let small = refused(command("mkfs.vmfs").args(["-L", "x", &image]), 1);
    assert!(small.contains("lun0.img"), "{small}");
    let twice = Luns::blank(1, 128);
    let image = twice.images()[0].to_str().unwrap().to_owned();
    let said = refused(command("mkfs.vmfs").args(["-L", "x", &image, &image]), 1);
    assert!(said.contains("twice"), "{said}");
    let said = refused(command("mkfs.vmfs").args(["-L", &"l".repeat(100), &image]), 2);
    assert!(said.contains("64"), "{said}");
    refused(command("mkfs.vmfs").args(["-b", "100K", &image]), 2);
    refused(&mut command("mkfs.vmfs"), 2);
    refused(command("mkfs.vmfs").arg("/nonexistent/lun"), 1);
}

#[test]
fn mount_refuses_wrong_sets_of_luns_and_takes_any_order() {
    let luns = Luns::formatted(2, 128, &[]);
    let other = Luns::formatted(1, 128, &[]);
    let point = luns.beside("p");
    fs::create_dir(&point).unwrap();
    let [a, b] = [0, 1].map(|n| luns.images()[n].to_str().unwrap().to_owned());
    let foreign = other.images()[0].to_str().unwrap();
    let said = mount_refused(&format!("{a},{foreign}"), &point);
    assert!(said.contains(foreign), "the foreign LUN is not named: {said}");
    let said = mount_refused(&a, &point);
    assert!(said.contains("lun2") || said.contains("missing"), "the missing LUN is not named: {said}");
    let said = mount_refused(&format!("{a},{b},{a}"), &point);
    assert!(said.contains("twice"), "{said}");
    let said = mount_refused("/nonexistent/lun", &point);
    assert!(said.contains("/nonexistent/lun"), "{said}");
    let blank = Luns::blank(1, 64);
    let said = mount_refused(blank.images()[0].to_str().unwrap(), &point);
    assert!(said.contains("lun0.img"), "{said}");

    run(command("mount.vmfs").args([&format!("{b},{a}"), point.to_str().unwrap()]));
    fs::write(point.join("file"), "x").unwrap();
    run(system("umount").arg(&point));

    let copy = luns.beside("copy.img");
    fs::copy(&a, &copy).unwrap();
    let said = mount_refused(&format!("{a},{b},{}", copy.display()), &point);
    assert!(said.contains("copy.img"), "the clone is not named: {said}");
    File::options().write(true).open(&b).unwrap().set_len(64 << 20).unwrap();
    let said = mount_refused(&format!("{a},{b}"), &point);
    assert!(said.contains("lun1.img"), "the truncated LUN is not named: {said}");
}

#[test]
fn mount_refuses_wrong_mount_points() {
    let luns = Luns::formatted(1, 128, &[]);
    let said = mount_refused(&luns.spec(), &luns.beside("nowhere"));
    assert!(said.contains("nowhere"), "{said}");
    let full = luns.beside("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("file"), "").unwrap();
    let said = mount_refused(&luns.spec(), &full);
    assert!(said.contains("full") && said.contains("empty"), "{said}");
    let said = mount_refused(&luns.spec(), &full.join("file"));
    assert!(said.contains("directory"), "{said}");
    refused(command("mount.vmfs").arg("--no-such-flag"), 2);

    let mount = luns.mount(1);
    let again = refused(command("mount.vmfs").arg(luns.spec()).arg(mount.path()), 1);
    assert!(again.contains("mounted already"), "an empty volume was mounted over: {again}");
    let said = refused(command("vmfs").arg("dump").arg(mount.path()), 1);
    assert!(said.contains("mount point"), "{said}");
    let said = refused(command("vmfs").args(["disk", "create", "-s", "1G"]).arg(mount.at("d.vmdk")), 1);
    assert!(said.contains("d.vmdk") && said.contains("thin"), "a thick disk larger than the volume: {said}");
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn names_of_any_bytes_work_and_impossible_ones_are_refused() {
    let luns = Luns::formatted(1, 128, &[]);
    let mount = luns.mount(1);
    for byte in (1..=255u8).filter(|b| *b != b'/' && *b != b'.') {
        let name = [b'x', byte];
        fs::write(mount.at(std::ffi::OsStr::from_bytes(&name)), [byte]).unwrap();
    }
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 253);
    for byte in (1..=255u8).filter(|b| *b != b'/' && *b != b'.') {
        assert_eq!(fs::read(mount.at(std::ffi::OsStr::from_bytes(&[b'x', byte]))).unwrap(), [byte]);
    }
    let longest = "n".repeat(255);
    fs::write(mount.at(&longest), "255").unwrap();
    assert_eq!(fs::read(mount.at(&longest)).unwrap(), b"255");
    let error = fs::write(mount.at("n".repeat(256)), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    let error = fs::hard_link(mount.at(&longest), mount.at("second")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_read_only_mount_writes_nothing() {
    let luns = Luns::formatted(1, 128, &[]);
    let mount = luns.mount(1);
    fs::write(mount.at("file"), "content").unwrap();
    mount.unmount();
    let before = fs::read(&luns.images()[0]).unwrap();
    let mount = luns.mount_with(1, &["-o", "ro"]);
    assert_eq!(fs::read(mount.at("file")).unwrap(), b"content");
    assert_eq!(fs::write(mount.at("new"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
    mount.unmount();
    assert!(fs::read(&luns.images()[0]).unwrap() == before, "a read-only mount changed the LUN");
}

/// Flips one byte in every megabyte-sized area of the metadata and in random places: fsck and mount say so or are not concerned.
#[test]
fn flipped_bytes_are_reported_and_never_crash_anything() {
    let luns = Luns::formatted(1, 64, &[]);
    let mount = luns.mount(1);
    fs::create_dir(mount.at("d")).unwrap();
    for n in 0..30 {
        fs::write(mount.at(format!("d/file{n}")), vec![n as u8; 3000 * n]).unwrap();
    }
    mount.unmount();
    let sound = fs::read(&luns.images()[0]).unwrap();
    let image = File::options().write(true).open(&luns.images()[0]).unwrap();
    let point = luns.beside("p");
    fs::create_dir(&point).unwrap();
    let mut random = Random::new(6);
    let mut reported = 0;
    let cells: Vec<usize> =
        (0..sound.len() / 512).map(|n| n * 512).filter(|at| &sound[*at..at + 4] == b"VMFc").collect();
    for round in 0..60 {
        let at = match round {
            0 => 1 << 20,
            1 => (1 << 20) + 4096,
            2 => 2 << 20,
            3 => 3 << 20,
            4 => 4 << 20,
            _ => cells[random.below(cells.len() as u64) as usize],
        } + random.below(500) as usize;
        image.write_all_at(&[sound[at] ^ (1 << random.below(8))], at as u64).unwrap();
        let check = output(command("fsck.vmfs").arg("-n").args(luns.images()));
        assert!([Some(0), Some(4), Some(8)].contains(&check.status.code()), "byte {at}: {}", text(&check));
        assert!(!text(&check).contains("panicked"), "byte {at}: {}", text(&check));
        reported += u32::from(!check.status.success());
        let out = output(command("mount.vmfs").arg(luns.spec()).arg(&point));
        assert!(!text(&out).contains("panicked"), "byte {at}: {}", text(&out));
        if out.status.success() {
            let _ = output(system("cp").arg("-r").arg(&point).arg("/dev/null"));
            let _ = output(system("find").arg(&point).args(["-type", "f", "-exec", "cat", "{}", "+"]));
            run(system("umount").arg(&point));
        }
        image.write_all_at(&sound, 0).unwrap();
    }
    assert!(reported >= 50, "only {reported} of 60 flipped bytes in metadata were reported");
    luns.assert_clean();
}
