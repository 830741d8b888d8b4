//! What the tools of a system expect of a file system works on a mount.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use common::{Images, Random, run, try_run};

#[test]
fn names_attributes_and_links_are_those_of_any_file_system() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    fs::create_dir(mount.at("d")).unwrap();
    fs::write(mount.at("d/f"), b"content").unwrap();
    assert_eq!(fs::read(mount.at("d/f")).unwrap(), b"content");
    fs::set_permissions(mount.at("d/f"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(mount.at("d/f"), Some(12), Some(34)).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 7);
    File::options().write(true).open(mount.at("d/f")).unwrap().set_modified(time).unwrap();
    let metadata = fs::metadata(mount.at("d/f")).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid(), metadata.len()), (0o640, 12, 34, 7));
    assert_eq!(metadata.modified().unwrap(), time);
    std::os::unix::fs::symlink("d/f", mount.at("link")).unwrap();
    assert_eq!(fs::read(mount.at("link")).unwrap(), b"content");
    assert_eq!(fs::read_link(mount.at("link")).unwrap().to_str(), Some("d/f"));
    assert_eq!(fs::hard_link(mount.at("d/f"), mount.at("h")).unwrap_err().raw_os_error(), Some(libc::EPERM));
    fs::rename(mount.at("d/f"), mount.at("moved")).unwrap();
    assert_eq!(fs::read(mount.at("moved")).unwrap(), b"content");
    assert!(!mount.at("d/f").exists());
    let busy = fs::remove_dir(mount.at("nothing")).unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::ENOENT));
    fs::write(mount.at("d/again"), b"").unwrap();
    assert_eq!(fs::remove_dir(mount.at("d")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
    fs::remove_dir_all(mount.at("d")).unwrap();
    assert_eq!(try_run("mkfifo", &[&mount.text_at("pipe")]).status.code(), Some(1));
    run("df", &[mount.point.to_str().unwrap()]);
    mount.unmount();
    let mount = images.mount(1);
    assert_eq!(fs::read(mount.at("moved")).unwrap(), b"content");
    assert_eq!(fs::read_dir(&mount.point).unwrap().count(), 2);
    mount.unmount();
}

#[test]
fn a_file_that_lost_its_name_or_was_moved_lives_on_for_who_has_it_open() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    fs::create_dir(mount.at("d")).unwrap();
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(mount.at("f")).unwrap();
    file.write_all(&[1; 100_000]).unwrap();
    fs::rename(mount.at("f"), mount.at("d/g")).unwrap();
    file.write_all(&[2; 100_000]).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 200_000);
    assert_eq!(fs::metadata(mount.at("d/g")).unwrap().len(), 200_000);
    fs::remove_file(mount.at("d/g")).unwrap();
    file.write_all(&[3; 100_000]).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() == 300_000 && bytes[0] == 1 && bytes[150_000] == 2 && bytes[299_999] == 3);
    drop(file);
    assert_eq!(fs::read_dir(mount.at("d")).unwrap().count(), 0);
    mount.unmount();
}

#[test]
fn appenders_never_overwrite_each_other() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    let path = mount.at("log");
    std::thread::scope(|scope| {
        for n in 0..4u8 {
            let path = &path;
            scope.spawn(move || {
                // Files come to be and are opened again while others write.
                for _ in 0..20 {
                    let mut file = File::options().append(true).create(true).open(path).unwrap();
                    for _ in 0..10 {
                        file.write_all(&[b'a' + n; 77]).unwrap();
                    }
                }
            });
        }
    });
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 4 * 200 * 77);
    assert!(bytes.chunks(77).all(|line| line.iter().all(|byte| *byte == line[0])));
    mount.unmount();
}

#[test]
fn trees_are_copied_archived_and_synchronised() {
    let images = Images::new(2, 512);
    let mount = images.mount(1);
    let source = images.directory("source");
    let mut random = Random(1);
    for n in 0..60u64 {
        let folder = source.join(format!("d{}/e{}", n % 5, n % 3));
        fs::create_dir_all(&folder).unwrap();
        let length = [0, 1, 100, 5000, 6144, 6145, 70_000, 1_500_000][n as usize % 8];
        fs::write(folder.join(format!("file {n}")), random.bytes(length)).unwrap();
        std::os::unix::fs::symlink(format!("file {n}"), folder.join(format!("link{n}"))).unwrap();
    }
    let source = source.to_str().unwrap();
    run("cp", &["-a", source, &mount.text_at("copy")]);
    run("diff", &["-r", "--no-dereference", source, &mount.text_at("copy")]);
    run("tar", &["-C", source, "-cf", &mount.text_at("archive.tar"), "."]);
    fs::create_dir(mount.at("unpacked")).unwrap();
    run("tar", &["-C", &mount.text_at("unpacked"), "-xf", &mount.text_at("archive.tar")]);
    run("diff", &["-r", "--no-dereference", source, &mount.text_at("unpacked")]);
    if try_run("which", &["rsync"]).status.success() {
        run("rsync", &["-a", &format!("{source}/"), &mount.text_at("synced")]);
        let again = run("rsync", &["-ai", &format!("{source}/"), &mount.text_at("synced")]);
        assert_eq!(again, "", "rsync found differences after a sync");
    }
    let found = run("find", &[&mount.text_at("copy"), "-type", "f"]);
    assert_eq!(found.lines().count(), 60);
    run("du", &["-s", &mount.text_at("copy")]);
    run("mv", &[&mount.text_at("copy/d1"), &mount.text_at("copy/renamed")]);
    run("rm", &["-r", &mount.text_at("copy"), &mount.text_at("unpacked")]);
    mount.unmount();
    let mount = images.mount(1);
    run("tar", &["-df", &mount.text_at("archive.tar"), "-C", source]);
    mount.unmount();
}

#[test]
fn a_directory_of_many_names_is_listed_once_each_while_others_come_and_go() {
    let images = Images::new(1, 512);
    let mount = images.mount(1);
    fs::create_dir(mount.at("d")).unwrap();
    for n in 0..400 {
        File::create(mount.at(&format!("d/name{n}"))).unwrap();
    }
    let mut seen = std::collections::HashMap::new();
    for (count, entry) in fs::read_dir(mount.at("d")).unwrap().enumerate() {
        *seen.entry(entry.unwrap().file_name().into_string().unwrap()).or_insert(0) += 1;
        if count % 10 == 0 {
            File::create(mount.at(&format!("d/more{count}"))).unwrap();
            let _ = fs::remove_file(mount.at(&format!("d/more{}", count / 2)));
        }
    }
    for n in 0..400 {
        assert_eq!(seen.get(&format!("name{n}")), Some(&1), "name{n}");
    }
    mount.unmount();
}

#[test]
fn direct_io_and_holes_behave_as_on_other_file_systems() {
    let images = Images::new(1, 512);
    let mount = images.mount(1);
    let file = mount.text_at("f");
    run("dd", &["if=/dev/urandom", &format!("of={file}"), "bs=1M", "count=8", "oflag=direct", "status=none"]);
    let read = format!("if={file}");
    run("dd", &[&read, "of=/dev/null", "bs=4096", "iflag=direct", "status=none"]);
    let before = fs::read(&file).unwrap();
    assert_eq!(before.len(), 8 << 20);
    assert!(fs::metadata(&file).unwrap().blocks() * 512 >= 8 << 20);

    let thin = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(mount.at("thin")).unwrap();
    thin.set_len(1 << 40).unwrap();
    thin.write_all_at(b"far", 1 << 39).unwrap();
    thin.sync_all().unwrap();
    let metadata = thin.metadata().unwrap();
    assert!(metadata.len() == 1 << 40 && metadata.blocks() * 512 <= 16 << 20, "{} blocks", metadata.blocks());
    let mut seeker = thin.try_clone().unwrap();
    let data = rustix::fs::seek(&seeker, rustix::fs::SeekFrom::Data(0)).unwrap();
    assert!(((1 << 39) - (1 << 20)..=1 << 39).contains(&data), "data at {data}");
    let hole = rustix::fs::seek(&seeker, rustix::fs::SeekFrom::Hole(1 << 39)).unwrap();
    assert!(hole > 1 << 39 && hole <= (1 << 39) + (1 << 20));
    let mut bytes = [1; 16];
    seeker.seek(SeekFrom::Start((1 << 39) - 8)).unwrap();
    seeker.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\0\0\0\0\0\0\0\0far\0\0\0\0\0");
    run("fallocate", &["-p", "-o", "0", "-l", "4M", &file]);
    let after = fs::read(&file).unwrap();
    assert!(after[..4 << 20].iter().all(|b| *b == 0) && after[4 << 20..] == before[4 << 20..]);
    run("fallocate", &["-l", "20M", &mount.text_at("full")]);
    assert_eq!(fs::metadata(mount.at("full")).unwrap().len(), 20 << 20);
    run("fallocate", &["-z", "-o", "4M", "-l", "1M", &file]);
    assert!(fs::read(&file).unwrap()[4 << 20..5 << 20].iter().all(|b| *b == 0));
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&file).unwrap();
    let mut odd = vec![0; 1000];
    direct.read_exact_at(&mut odd[..777], (5 << 20) + 13).unwrap();
    assert_eq!(odd[..777], before[(5 << 20) + 13..(5 << 20) + 790]);
    drop((thin, seeker, direct));
    mount.unmount();
}

#[test]
fn mapped_memory_reads_and_writes_files() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    let script = r#"
import mmap, os, sys
path = sys.argv[1]
with open(path, "wb") as f: f.write(bytes(range(256)) * 4096)
with open(path, "r+b") as f:
    shared = mmap.mmap(f.fileno(), 0)
    private = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert shared[1000:1256] == (bytes(range(256)) * 2)[232:488], "shared read"
    private[0:4] = b"mine"
    shared[8192:8196] = b"ours"
    shared.flush()
    with open(path, "rb") as g:
        assert g.read(4) == bytes(range(4)), "a private mapping must not reach the file"
        g.seek(8192); assert g.read(4) == b"ours", "a shared mapping must reach the file"
    shared[1048572:1048576] = b"last"
    shared.close(); private.close()
with open(path, "rb") as f: assert f.read()[-4:] == b"last", "what a mapping wrote at its end"
with open(path, "rb") as f:
    readonly = mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    assert readonly[8192:8196] == b"ours"
"#;
    run("python3", &["-c", script, &mount.text_at("mapped")]);
    fs::copy("/bin/true", mount.at("program")).unwrap();
    fs::set_permissions(mount.at("program"), fs::Permissions::from_mode(0o755)).unwrap();
    run(&mount.text_at("program"), &[]);
    mount.unmount();
}

#[test]
fn qemu_img_and_a_loop_device_work_on_files_of_the_mount() {
    let images = Images::new(2, 512);
    let mount = images.mount(1);
    let source = images.folder.path().join("source.raw");
    let mut random = Random(5);
    let mut file = File::create(&source).unwrap();
    file.set_len(64 << 20).unwrap();
    for _ in 0..20 {
        file.seek(SeekFrom::Start(random.below(60 << 20) & !511)).unwrap();
        file.write_all(&random.bytes(200_000)).unwrap();
    }
    let source = source.to_str().unwrap();
    for format in ["raw", "qcow2", "vmdk"] {
        let target = mount.text_at(format);
        run("qemu-img", &["convert", "-f", "raw", "-O", format, source, &target]);
        run("qemu-img", &["compare", "-f", "raw", "-F", format, source, &target]);
        run("qemu-img", &["info", &target]);
    }
    let device = run("losetup", &["--find", "--show", &mount.text_at("raw")]);
    let device = device.trim().to_owned();
    let compared = try_run("cmp", &[&device, source]);
    run("losetup", &["--detach", &device]);
    assert!(compared.status.success(), "{}", common::text(&compared));
    common::wait_for("the loop device to let go", || {
        try_run("umount", &[mount.point.to_str().unwrap()]).status.success()
    });
}
