//! Several mounts of the same LUNs are several hosts; crashes and unmounts keep what was promised.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Images, is_mounted, run, wait_for};
use rustix::fs::SeekFrom;
use rustix::process::Signal;

#[test]
fn a_second_host_sees_what_the_first_one_closed_and_is_kept_from_writing_beside_it() {
    let images = Images::new(2, 256);
    let (one, two) = (images.mount(1), images.mount(2));
    fs::write(one.at("f"), b"first").unwrap();
    assert_eq!(fs::read(two.at("f")).unwrap(), b"first");
    fs::create_dir(two.at("d")).unwrap();
    fs::rename(one.at("f"), one.at("d/f")).unwrap();
    assert_eq!(fs::read(two.at("d/f")).unwrap(), b"first");
    let mut held = File::options().write(true).open(one.at("d/f")).unwrap();
    let error = File::options().write(true).open(two.at("d/f")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    held.write_all(b"again").unwrap();
    held.sync_all().unwrap();
    assert_eq!(fs::read(two.at("d/f")).unwrap(), b"again");
    drop(held);
    wait_for("the lock to go", || File::options().write(true).open(two.at("d/f")).is_ok());
    one.unmount();
    fs::write(two.at("d/g"), vec![7; 3 << 20]).unwrap();
    two.unmount();
    let one = images.mount(1);
    assert_eq!(fs::read(one.at("d/g")).unwrap(), vec![7; 3 << 20]);
    one.unmount();
}

#[test]
fn what_was_synced_survives_a_kill_and_a_new_mount_gets_its_own_slot() {
    let images = Images::new(2, 256);
    let mount = images.mount(1);
    for n in 0..20 {
        let file = File::create(mount.at(&format!("f{n}"))).unwrap();
        file.write_all_at(&vec![n as u8 + 1; 200_000], 0).unwrap();
        file.sync_all().unwrap();
        std::mem::forget(file.try_clone());
    }
    mount.kill();
    let mount = images.mount(1);
    for n in 0..20 {
        assert_eq!(fs::read(mount.at(&format!("f{n}"))).unwrap(), vec![n as u8 + 1; 200_000], "f{n}");
    }
    fs::write(mount.at("new"), b"x").unwrap();
    mount.unmount();
}

#[test]
fn signals_unmount_cleanly_also_while_files_are_open() {
    let images = Images::new(1, 256);
    for signal in [Signal::TERM, Signal::INT] {
        let mount = images.mount(1);
        fs::write(mount.at("f"), b"x").unwrap();
        mount.end_by(signal);
    }
    let mount = images.mount(1);
    let mut file = File::create(mount.at("open")).unwrap();
    mount.signal(Signal::TERM);
    wait_for("the mount to leave the tree", || !is_mounted(&mount.point));
    file.write_all(&[9; 100_000]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    mount.end_by(Signal::TERM);
    let mount = images.mount(1);
    assert_eq!(fs::read(mount.at("open")).unwrap(), vec![9; 100_000]);
    mount.unmount();
}

#[test]
fn two_mounts_without_a_host_id_work_side_by_side() {
    let images = Images::new(1, 256);
    let points = [images.directory("a"), images.directory("b")];
    for point in &points {
        let output = common::mount_command().arg(images.spec()).arg(point).output().unwrap();
        assert!(output.status.success(), "{}", common::text(&output));
        assert!(is_mounted(point), "the daemon's parent ended before the mount was up");
    }
    fs::write(points[0].join("f"), b"by a").unwrap();
    assert_eq!(fs::read(points[1].join("f")).unwrap(), b"by a");
    for point in &points {
        run("umount", &[point.to_str().unwrap()]);
    }
}

#[test]
fn a_read_only_mount_reads_and_refuses_changes() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    fs::write(mount.at("f"), vec![5; 100_000]).unwrap();
    mount.unmount();
    let mount = images.mount_with(1, &["-o", "ro"]);
    assert_eq!(fs::read(mount.at("f")).unwrap(), vec![5; 100_000]);
    assert_eq!(fs::write(mount.at("g"), b"").unwrap_err().raw_os_error(), Some(libc::EROFS));
    mount.unmount();
}

#[test]
fn whoever_looks_for_holes_gets_an_answer_while_the_writer_closes_and_truncates() {
    let images = Images::new(2, 256);
    let mount = images.mount(1);
    let path = mount.at("f");
    fs::write(&path, vec![1; 3 << 20]).unwrap();
    let reader = File::open(&path).unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let seekers: Vec<_> = (0..2)
        .map(|_| {
            let (reader, ended) = (reader.try_clone().unwrap(), ended.clone());
            thread::spawn(move || {
                let mut answers = 0;
                while !ended.load(Ordering::Relaxed) {
                    for from in [SeekFrom::Hole(0), SeekFrom::Data(2 << 20)] {
                        match rustix::fs::seek(&reader, from) {
                            Ok(_) | Err(rustix::io::Errno::NXIO) => answers += 1,
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
                answers
            })
        })
        .collect();
    for round in 0..400 {
        let writer = File::options().write(true).open(&path).unwrap();
        match round % 40 {
            0 => writer.set_len(0).unwrap(),
            1 => writer.write_all_at(&[2; 10_000], 1 << 20).unwrap(),
            _ => {}
        }
    }
    ended.store(true, Ordering::Relaxed);
    wait_for("the answers", || seekers.iter().all(thread::JoinHandle::is_finished));
    assert!(seekers.into_iter().all(|seeker| seeker.join().unwrap() > 0));
    drop(reader);
    mount.unmount();
}
