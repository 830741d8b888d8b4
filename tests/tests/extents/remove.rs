//! A LUN that is taken out while hosts work: nothing stops, its image can go away, and the volume is whole without it.

use super::*;

use tests::lockd::Lockd;

/// What `vmfs extent list --json` says of the first LUN.
fn first_lun(mount: &Mount) -> serde_json::Value {
    let said = run(command("vmfs").args(["extent", "list", "--json"]).arg(mount.path()));
    serde_json::from_str::<serde_json::Value>(&said).unwrap()[0].take()
}

/// Whether a process has the file open.
fn has_open(pid: u32, file: &Path) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    descriptors.flatten().any(|one| fs::read_link(one.path()).is_ok_and(|target| target == file))
}

#[test]
fn the_first_lun_is_taken_out_while_programs_write_and_its_image_goes_away() {
    let luns = Luns::formatted(2, 128, &[]);
    let image = luns.images()[0].clone();
    let mut lockd = Lockd::start(&luns);
    let mounts = [luns.mount_with(1, &["-o", &lockd.option()]), luns.mount(2)];
    let is_there = AtomicBool::new(true);
    write_files(mounts[0].path(), 1, 10, &is_there);
    // Its lock and its descriptor lie on the first LUN, now and afterwards.
    run(command("vmfs").args(["disk", "create", "-s", "8M", "-d", "eagerzeroedthick"]).arg(mounts[0].at("held.vmdk")));
    let held = DirectFile::open(&mounts[0].at("held-flat.vmdk"), true).unwrap();
    let remove = |mount: &Mount| {
        let mut vmfs = command("vmfs");
        vmfs.args(["extent", "remove", "--json"]).arg(&image).arg(mount.path());
        vmfs
    };
    let said = refused(&mut remove(&mounts[0]), 1);
    assert!(said.contains("vmfs extent drain"), "{said}");
    let end = AtomicBool::new(false);
    let gone = luns.beside("gone.img");
    let (model, disk) = thread::scope(|scope| {
        let writing = scope.spawn(|| write_over(&mounts[1].at("busy"), &end));
        let moving = scope.spawn(|| write_in_place(&held, &end));
        let drain = |mount: &Mount| output(command("vmfs").args(["extent", "drain", "lun1"]).arg(mount.path()));
        wait_for("the file is there", || mounts[0].at("busy").exists());
        // Each host moves what it has locked.
        wait_for("nothing is left on the first LUN", || {
            drain(&mounts[0]);
            drain(&mounts[1]).status.success()
        });
        let mut said = String::new();
        wait_for("the LUN is taken out", || {
            let out = output(&mut remove(&mounts[1]));
            let why = String::from_utf8_lossy(&out.stderr).into_owned();
            // What hosts keep ready is given back within seconds.
            assert!(out.status.success() || why.contains("is not empty"), "{why}");
            said = String::from_utf8_lossy(&out.stdout).into_owned();
            out.status.success()
        });
        let report: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&report["index"], &report["carrier"]), (&1.into(), &2.into()), "{report}");
        for mount in &mounts {
            wait_for("every host knows it", || first_lun(mount)["state"] == "Carried");
        }
        for pid in [lockd.pid(), mounts[0].pid(), mounts[1].pid()] {
            wait_for("every process has let go of it", || !has_open(pid, &image));
        }
        fs::rename(&image, &gone).unwrap();
        // A daemon that begins anew finds the slots where they are.
        lockd.kill();
        lockd.start_again();
        wait_for("it keeps all of them", || lockd.slots() == 2);
        write_files(mounts[0].path(), 3, 5, &is_there);
        write_files(mounts[1].path(), 4, 5, &is_there);
        // Longer than a lease.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(25) {
            fs::write(mounts[0].at("tick"), b"tick").unwrap();
            thread::sleep(Duration::from_millis(200));
        }
        end.store(true, Ordering::Release);
        (writing.join().unwrap(), moving.join().unwrap())
    });
    let said = refused(command("vmfs").args(["extent", "remove", "lun1"]).arg(mounts[0].path()), 1);
    assert!(said.contains("was taken out of the volume already"), "{said}");
    drop(held);
    let [one, two] = mounts;
    one.unmount();
    two.unmount();
    drop(lockd);
    let luns = luns.without_first();
    luns.assert_clean();
    let mount = luns.mount(3);
    let (other, busy) = (mount.at("held-flat.vmdk"), mount.at("busy"));
    wait_for("the disk can be read", || fs::read(&other).is_ok());
    assert!(fs::read(other).unwrap() == disk && fs::read(busy).unwrap() == model);
    for (host, count) in [(1, 10), (3, 5), (4, 5)] {
        for number in 0..count {
            assert_eq!(fs::read(mount.at(format!("h{host}-{number}"))).unwrap(), pattern(host, number));
        }
    }
    let said = run(command("vmfs").arg("status").arg(mount.path()));
    let mib: u64 =
        run(tests::harness::system("stat").args(["-f", "-c", "%b"]).arg(mount.path())).trim().parse().unwrap();
    assert!(said.contains(&format!("free of {mib} MiB\n")), "statfs says {mib} blocks of 1 MiB: {said}");
    fs::rename(mount.at("busy"), mount.at("renamed")).unwrap();
    fs::create_dir(mount.at("directory")).unwrap();
    let said = run(command("vmfs").args(["scrub", "--json"]).arg(mount.path()));
    assert!(said.contains("\"findings\": []") || said.contains("\"findings\":[]"), "{said}");
    mount.unmount();
    luns.assert_clean();
    run(command("fsck.vmfs").arg("-p").args(luns.images()));
    // Nobody takes the former LUN for one of the volume.
    let spec = format!("{},{}", gone.display(), luns.spec());
    let said = refused(command("mount.vmfs").arg(spec).arg(luns.beside("mnt3")), 1);
    assert!(said.contains("was taken out of its volume"), "{said}");
    let said = refused(command("fsck.vmfs").arg("-n").arg(&gone).args(luns.images()), 8);
    assert!(said.contains("was taken out of its volume"), "{said}");
}
