//! Raw device mappings over real mounts: the device's bytes, its identity, and one writer over two hosts.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Images, Random, wait_for};
use lockd::client::MountedDirectory;
use lockd::protocol::{AdminRequest, NameIn};
use rustix::process::Signal;
use serde_json::Value;

const MIB: usize = 1 << 20;

fn ask(path: &Path, what: impl FnOnce(NameIn) -> AdminRequest) -> Result<Value, String> {
    let (directory, name) = MountedDirectory::of_file(path).unwrap();
    let mut connection = directory.connect().unwrap();
    connection.administer(what(name), &mut |_, _| ()).map_err(|error| error.to_string())
}

fn map(path: &Path, device: &Path, physical: bool) -> Result<Value, String> {
    let device = device.to_str().unwrap().to_owned();
    ask(path, |file| AdminRequest::RdmCreate { file, device, physical })
}

fn write(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[track_caller]
fn errno(result: std::io::Result<impl std::fmt::Debug>, expected: i32) {
    assert_eq!(result.unwrap_err().raw_os_error(), Some(expected));
}

#[test]
fn what_is_written_through_a_mapping_is_on_the_device_and_nothing_else_is() {
    let images = Images::new(1, 256);
    let device = images.folder.path().join("raw.img");
    let mut random = Random(11);
    let mut model = random.bytes(8 * MIB);
    fs::write(&device, &model).unwrap();
    let mount = images.mount(1);
    let made = map(&mount.at("raw.vmdk"), &device, false).unwrap();
    assert_eq!(made["size_bytes"], 8 * MIB as u64);
    let mapping = mount.at("raw-rdm.vmdk");
    assert_eq!(fs::metadata(&mapping).unwrap().len(), 8 * MIB as u64);
    assert!(fs::read(&mapping).unwrap() == model);
    let file = write(&mapping).unwrap();
    for _ in 0..100 {
        let at = random.below(8 * MIB as u64 - 100_000) as usize;
        let length = 1 + random.below(100_000) as usize;
        let bytes = random.bytes(length);
        file.write_all_at(&bytes, at as u64).unwrap();
        model[at..at + length].copy_from_slice(&bytes);
    }
    file.sync_all().unwrap();
    errno(file.write_at(&[1; 512], 8 * MIB as u64), libc::EFBIG);
    // A second mapping of the same device is a second name, not a second writer.
    map(&mount.at("second.vmdk"), &device, false).unwrap();
    errno(write(&mount.at("second-rdm.vmdk")), libc::EBUSY);
    drop(file);
    assert!(fs::read(&device).unwrap() == model);
    let text = fs::read_to_string(mount.at("raw.vmdk")).unwrap();
    assert!(
        text.contains("createType=\"vmfsRawDeviceMap\"") && text.contains("RW 16384 VMFSRDM \"raw-rdm.vmdk\""),
        "{text}"
    );
    assert_eq!(
        ask(&mount.at("raw.vmdk"), |file| AdminRequest::DiskInfo { file }).unwrap()["format"],
        "raw device mapping"
    );
    let error = map(&mount.at("own.vmdk"), &images.paths[0], false).unwrap_err();
    assert!(error.contains("this very volume"), "{error}");
    mount.unmount();
}

#[test]
fn a_device_that_was_moved_is_found_and_another_one_under_its_old_path_is_refused() {
    let images = Images::new(1, 256);
    let far = images.directory("far");
    let device = images.folder.path().join("raw.img");
    fs::write(&device, vec![1; MIB]).unwrap();
    let mount = images.mount_with(1, &["-o", &format!("rdm_folder={}", far.display())]);
    map(&mount.at("raw.vmdk"), &device, false).unwrap();
    let moved = far.join("other name");
    fs::rename(&device, &moved).unwrap();
    fs::write(&device, vec![2; MIB]).unwrap();
    write(&mount.at("raw-rdm.vmdk")).unwrap().write_all_at(&[3; 4096], 0).unwrap();
    assert_eq!(fs::read(&moved).unwrap()[..5000], [vec![3; 4096], vec![1; 904]].concat());
    let info = ask(&mount.at("raw.vmdk"), |file| AdminRequest::RdmInfo { file }).unwrap();
    assert_eq!(info["device"], moved.to_str().unwrap());
    fs::remove_file(&moved).unwrap();
    // As many new files as it takes: one of them may get the inode number of the one that is gone.
    for n in 0..50 {
        fs::write(far.join(format!("new{n}")), vec![4; MIB]).unwrap();
    }
    wait_for("the close", || {
        write(&mount.at("raw-rdm.vmdk")).is_err_and(|error| error.raw_os_error() == Some(libc::ENOENT))
    });
    assert_eq!(fs::read(&device).unwrap(), vec![2; MIB]);
    let info = ask(&mount.at("raw.vmdk"), |file| AdminRequest::RdmInfo { file }).unwrap();
    assert!(info["device"].is_null() && info["problem"].as_str().unwrap().contains("rdm_folder"), "{info}");
    mount.unmount();
}

#[test]
fn two_hosts_never_write_at_once_and_the_mapping_of_a_killed_host_is_taken_over_in_its_time() {
    let images = Images::new(1, 256);
    let device = images.folder.path().join("raw.img");
    fs::write(&device, vec![1; MIB]).unwrap();
    let (one, two) = (images.mount(1), images.mount(2));
    map(&one.at("raw.vmdk"), &device, false).unwrap();
    let held = write(&one.at("raw-rdm.vmdk")).unwrap();
    held.write_all_at(&[2; 4096], 0).unwrap();
    errno(write(&two.at("raw-rdm.vmdk")), libc::EBUSY);
    errno(File::open(two.at("raw-rdm.vmdk")), libc::EBUSY);
    let why = ask(&two.at("raw-rdm.vmdk"), |file| AdminRequest::WhyLocked { file }).unwrap();
    assert!(why["explanation"].as_str().unwrap().contains("host1"), "{why}");
    one.signal(Signal::KILL);
    wait_for("the takeover", || write(&two.at("raw-rdm.vmdk")).is_ok());
    let taken = write(&two.at("raw-rdm.vmdk")).unwrap();
    taken.write_all_at(&[3; 4096], 0).unwrap();
    drop(taken);
    assert_eq!(fs::read(&device).unwrap()[..4096], [3; 4096]);
    drop(held);
    one.kill();
    two.unmount();
}

#[test]
fn the_data_of_a_physical_mapping_is_for_the_vmm_only_and_its_lock_excludes_other_hosts() {
    let images = Images::new(1, 256);
    let device = images.folder.path().join("raw.img");
    fs::write(&device, vec![1; MIB]).unwrap();
    let (one, two) = (images.mount(1), images.mount(2));
    map(&one.at("raw.vmdk"), &device, true).unwrap();
    let held = write(&one.at("raw-rdmp.vmdk")).unwrap();
    errno(write(&two.at("raw-rdmp.vmdk")), libc::EBUSY);
    errno(held.read_at(&mut [0; 512], 0), libc::EOPNOTSUPP);
    errno(held.write_at(&[9; 512], 0), libc::EOPNOTSUPP);
    drop(held);
    assert_eq!(fs::read(&device).unwrap(), vec![1; MIB]);
    one.unmount();
    two.unmount();
}
