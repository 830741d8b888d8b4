//! What a mount keeps in memory does not grow with the size of a disk, and little with what is open.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::Images;
use lockd::client::MountedDirectory;
use lockd::protocol::{AdminRequest, DiskKind};

const FILES: u64 = 1000;
const DISK_BYTES: u64 = 10 << 40;
/// Places of the disk that are written, as far from each other as can be.
const PLACES: u64 = 500;
const MOST_KIB: u64 = 100 << 10;

fn offset(place: u64) -> u64 {
    (DISK_BYTES / PLACES * place) & !511
}

fn make_thin_disk(path: &Path) {
    let (directory, file) = MountedDirectory::of_file(path).unwrap();
    let create = AdminRequest::DiskCreate { file, bytes: DISK_BYTES, kind: DiskKind::Thin };
    directory.connect().unwrap().administer(create, &mut |_, _| ()).unwrap();
}

/// A figure of /proc/PID/status in KiB.
fn status(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_thousand_open_files_and_a_sparse_disk_of_ten_tebibytes_fit_in_a_hundred_mebibytes() {
    let images = Images::new(2, 8 << 10);
    let mount = images.mount(1);
    make_thin_disk(&mount.at("disk.vmdk"));
    let disk = File::options().read(true).write(true).open(mount.at("disk-flat.vmdk")).unwrap();
    for place in 0..PLACES {
        disk.write_all_at(&place.to_le_bytes(), offset(place)).unwrap();
    }
    disk.sync_all().unwrap();
    let files: Vec<File> = (0..FILES)
        .map(|n| {
            let path = mount.at(&format!("file{n}"));
            let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
            file.write_all_at(&[7; 9000], 0).unwrap();
            file
        })
        .collect();
    // Each worker thread has had a long request.
    std::thread::scope(|scope| {
        for file in &files[..64] {
            scope.spawn(|| {
                file.write_all_at(&vec![8; 1 << 20], 0).unwrap();
                assert_eq!(file.read_at(&mut vec![0; 1 << 20], 0).unwrap(), 1 << 20);
            });
        }
    });
    let mut bytes = [0; 8];
    disk.read_exact_at(&mut bytes, offset(123)).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 123);
    let (now, most) = (status(mount.pid(), "VmRSS"), status(mount.pid(), "VmHWM"));
    eprintln!("{now} KiB in memory, {most} KiB at most");
    assert!(most < MOST_KIB, "{now} KiB in memory, {most} KiB at most");
    drop((disk, files));
    mount.unmount();
}
