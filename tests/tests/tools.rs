//! What users do with a mount: copy, archive, sync, convert images, loop devices, exercisers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::harness::{Loop, Luns, OtherMount, output, program, run, scale, system, text};
use tests::random::Random;

fn tree(folder: &Path, seed: u64) {
    let mut random = Random::new(seed);
    for d in 0..6 {
        let sub = folder.join(format!("dir {d}/inner"));
        fs::create_dir_all(&sub).unwrap();
        for f in 0..8 {
            let length = [0, 1, 100, 4096, 7000, 70_000, 1 << 20, 3_000_001][f];
            fs::write(sub.join(format!("file-{f}")), random.bytes(length)).unwrap();
        }
        std::os::unix::fs::symlink("inner/file-3", folder.join(format!("dir {d}/link"))).unwrap();
    }
}

#[test]
fn cp_tar_and_rsync_keep_bytes_modes_times_and_links() {
    let luns = Luns::formatted(2, 512, &[]);
    let mount = luns.mount(1);
    let source = luns.beside("source");
    fs::create_dir(&source).unwrap();
    tree(&source, 11);
    run(system("chmod").args(["-R", "u+rwX,go-rwx"]).arg(&source));

    run(system("cp").arg("-a").arg(&source).arg(mount.at("copied")));
    run(system("diff").arg("-r").arg(&source).arg(mount.at("copied")));

    let archive = luns.beside("a.tar");
    run(system("tar").arg("-C").arg(mount.at("copied")).arg("-cf").arg(&archive).arg("."));
    fs::create_dir(mount.at("untarred")).unwrap();
    run(system("tar").arg("-C").arg(mount.at("untarred")).arg("-xpf").arg(&archive));
    run(system("diff").arg("-r").arg(&source).arg(mount.at("untarred")));

    let arguments = ["-a", "--itemize-changes"];
    run(system("rsync").args(arguments).arg(source.join("")).arg(mount.at("synced")));
    let again = run(system("rsync").args(arguments).arg(source.join("")).arg(mount.at("synced")));
    assert_eq!(again, "", "a second rsync has nothing to do");

    let listed = |folder: PathBuf| run(system("find").current_dir(folder).args([".", "-printf", "%p %m %s %l %T@\\n"]));
    let sorted = |text: String| {
        let mut lines: Vec<_> =
            text.lines().filter(|l| !l.contains("%s") && l.contains("file-")).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(listed(source.clone())), sorted(listed(mount.at("copied"))));

    run(system("mv").arg(mount.at("copied/dir 1")).arg(mount.at("copied/renamed")));
    run(system("rm").arg("-r").arg(mount.at("copied")).arg(mount.at("untarred")).arg(mount.at("synced")));
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn space_comes_back_when_files_go() {
    let luns = Luns::formatted(1, 512, &[]);
    let mount = luns.mount(1);
    let available = || {
        run(system("df").args(["--output=avail", "-B1M"]).arg(mount.path()))
            .lines()
            .last()
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    fs::write(mount.at("warm"), vec![1; 2 << 20]).unwrap();
    fs::remove_file(mount.at("warm")).unwrap();
    let before = available();
    fs::write(mount.at("big"), vec![7; 100 << 20]).unwrap();
    assert!(before - available() >= 100, "100 MiB are gone");
    let used: u64 = run(system("du").args(["-m"]).arg(mount.at("big"))).split('\t').next().unwrap().parse().unwrap();
    assert!((100..=101).contains(&used), "du says {used} MiB");
    fs::remove_file(mount.at("big")).unwrap();
    let after = available();
    assert!(before - after <= 1, "{before} MiB before, {after} MiB after");
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_full_volume_says_so_loses_nothing_and_mounts_again() {
    let luns = Luns::formatted(1, 96, &[]);
    let mount = luns.mount(1);
    let kept = Random::new(5).bytes(3 << 20);
    fs::write(mount.at("kept"), &kept).unwrap();
    let mut error = None;
    let block = vec![9; 1 << 20];
    {
        use std::io::Write;
        let mut file = fs::File::create(mount.at("filler")).unwrap();
        for _ in 0..200 {
            if let Err(e) = file.write_all(&block).and_then(|()| file.sync_data()) {
                error = Some(e);
                break;
            }
        }
    }
    assert_eq!(error.expect("96 MiB cannot hold 200").raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(fs::read(mount.at("kept")).unwrap(), kept);
    mount.unmount();
    luns.assert_clean();
    let mount = luns.mount(1);
    assert_eq!(fs::read(mount.at("kept")).unwrap(), kept);
    fs::remove_file(mount.at("filler")).expect("removal works on a full volume");
    fs::write(mount.at("again"), &kept).expect("there is room again");
    mount.unmount();
    luns.assert_clean();
}

fn fsx(tools: &Path, file: &Path, operations: u64, seed: u64, config: &str) {
    let settings = file.with_extension("toml");
    let settings = std::env::temp_dir().join(format!(
        "fsx-{}-{seed}-{}",
        std::process::id(),
        settings.file_name().unwrap().to_str().unwrap()
    ));
    fs::write(&settings, config).unwrap();
    let artifacts = tempfile::tempdir().unwrap();
    let out = output(
        Command::new(tools)
            .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-P"])
            .arg(artifacts.path())
            .arg("-f")
            .arg(&settings)
            .arg(file),
    );
    let _ = fs::remove_file(&settings);
    assert!(out.status.success(), "fsx with {config}: {}", text(&out));
}

/// fsx of crates.io, installed by `scripts/test`.
fn fsx_program() -> PathBuf {
    let program =
        std::env::var_os("VMFS_FSX").map(PathBuf::from).expect("VMFS_FSX names the fsx program: use scripts/test");
    assert!(program.is_file(), "{} is missing: scripts/test installs it", program.display());
    program
}

#[test]
fn fsx_finds_nothing_in_any_mode() {
    let luns = Luns::formatted(2, 512, &[]);
    let mount = luns.mount(1);
    let tools = fsx_program();
    let weights = "[weights]\nclose_open = 1\ninvalidate = 1\nfsync = 1\nfdatasync = 1\npunch_hole = 3\nposix_fallocate = 1\nsendfile = 1\nposix_fadvise = 1\ncopy_file_range = 2\ntruncate = 5\n";
    let modes = [
        ("default", "flen = 262144\n".to_owned()),
        ("all-operations", format!("flen = 1048576\n{weights}")),
        ("large", format!("flen = 16777216\n[opsize]\nmax = 1048576\n{weights}")),
        // With an alignment this fsx asks posix_fallocate for ranges of no bytes, which is EINVAL everywhere.
        (
            "aligned",
            format!("flen = 4194304\n[opsize]\nmax = 262144\nalign = 4096\n{weights}")
                .replace("posix_fallocate = 1\n", ""),
        ),
        ("small", format!("flen = 16384\n[opsize]\nmax = 4096\n{weights}")),
    ];
    let operations = scale(20_000);
    for (seed, (name, config)) in modes.iter().enumerate() {
        fsx(&tools, &mount.at(name), operations, seed as u64 + 1, config);
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn qemu_img_converts_onto_the_mount_and_compares_identical() {
    let luns = Luns::formatted(2, 1024, &[]);
    let mount = luns.mount(1);
    let raw = luns.beside("source.raw");
    let mut random = Random::new(3);
    let mut bytes = vec![0; 64 << 20];
    for _ in 0..40 {
        let at = (random.below(63 << 20) & !511) as usize;
        let piece = random.bytes(300_000);
        bytes[at..at + piece.len()].copy_from_slice(&piece);
    }
    fs::write(&raw, &bytes).unwrap();
    let qcow = luns.beside("source.qcow2");
    run(system("qemu-img").args(["convert", "-O", "qcow2"]).arg(&raw).arg(&qcow));
    for (format, name) in [("raw", "a.raw"), ("qcow2", "a.qcow2"), ("vmdk", "a.vmdk")] {
        run(system("qemu-img").args(["convert", "-O", format]).arg(&qcow).arg(mount.at(name)));
        run(system("qemu-img").args(["compare"]).arg(&qcow).arg(mount.at(name)));
        run(system("qemu-img").args(["info"]).arg(mount.at(name)));
    }
    run(system("qemu-img").args(["create", "-f", "qcow2"]).arg(mount.at("new.qcow2")).arg("1T"));
    run(system("qemu-img").args(["check"]).arg(mount.at("new.qcow2")));

    run(Command::new(program("vmfs")).args(["disk", "create", "-s", "64M", "-d", "thin"]).arg(mount.at("disk.vmdk")));
    let info = run(system("qemu-img").args(["info"]).arg(mount.at("disk.vmdk")));
    assert!(info.contains("vmdk") && info.contains("64 MiB"), "{info}");
    run(system("qemu-img").args(["convert", "-n", "-f", "qcow2", "-O", "vmdk"]).arg(&qcow).arg(mount.at("disk.vmdk")));
    run(system("qemu-img").args(["compare"]).arg(&qcow).arg(mount.at("disk.vmdk")));
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn fio_verifies_by_the_mount() {
    let luns = Luns::formatted(2, 512, &[]);
    let mount = luns.mount(1);
    for (name, extra) in [
        ("random", vec!["--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1"]),
        ("mixed", vec!["--rw=randrw", "--bsrange=512-128k", "--direct=0", "--fsync=64"]),
        ("sequential", vec!["--rw=write", "--bs=1m", "--iodepth=4", "--direct=1", "--end_fsync=1"]),
    ] {
        run(system("fio")
            .args([
                "--name",
                name,
                "--ioengine=io_uring",
                "--size=64m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--do_verify=1",
            ])
            .args(extra)
            .arg(format!("--filename={}", mount.at(name).display())));
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_loop_device_with_ext4_on_a_file_of_the_mount_verifies() {
    let luns = Luns::formatted(2, 768, &[]);
    let mount = luns.mount(1);
    let image = mount.at("ext4.img");
    fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
    {
        let device = Loop::attach(&image);
        run(system("mkfs.ext4").args(["-q"]).arg(device.device()));
        let inner = OtherMount::new(device.device(), &luns.beside("inner"));
        let point = luns.beside("inner");
        run(system("fio")
            .args(["--name=verify", "--ioengine=io_uring", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=48m"])
            .args(["--direct=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
            .arg(format!("--filename={}", point.join("data").display())));
        tree(&point, 77);
        drop(inner);
        run(system("e2fsck").args(["-fn"]).arg(device.device()));
    }
    mount.unmount();
    luns.assert_clean();
}
