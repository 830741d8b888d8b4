//! A guest writes to a disk of the volume; its data is what the mount shows; a disk has one writer.

use std::fs::{self, File};
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use tests::harness::{Luns, PATIENCE, command, output, program, refused, run, signal, system, text, wait_for};
use tests::machines::{Guest, HBAS, assert_stamped, disk, vmm, vmm_on};

#[test]
fn a_guest_writes_each_kind_of_disk_and_the_mount_shows_its_bytes() {
    let luns = Luns::formatted(2, 512, &[]);
    let mount = luns.mount(1);
    for (hba, format) in HBAS.into_iter().zip(["thin", "zeroedthick", "eagerzeroedthick"].into_iter().cycle()) {
        let path = disk(&mount, &format!("{hba}.vmdk"), "64M", format);
        let said = run(&mut vmm_on(&luns, &path, hba, "job=verify size=32M bs=64k depth=16 seed=5"));
        assert!(said.contains(&format!("adapter={hba} ")), "{said}");
        assert!(said.contains(" 0 failed"), "{said}");
        let flat = mount.at(format!("{hba}-flat.vmdk"));
        run(command("test-guest").arg("--verify").arg(&flat).args(["--size", "32M", "--seed", "5"]));
        // What one adapter wrote, each reads.
        for hba in HBAS {
            let said = run(&mut vmm_on(&luns, &path, hba, "job=check size=32M bs=4k depth=32 seed=5"));
            assert!(said.contains(" 0 failed"), "{said}");
        }
        let used: u64 = run(system("du").arg("-m").arg(&flat)).split('\t').next().unwrap().parse().unwrap();
        let expected = if format == "thin" { 32..=40 } else { 64..=65 };
        assert!(expected.contains(&used), "a {format} disk takes {used} MiB");
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn small_random_writes_to_a_thin_disk_verify() {
    let luns = Luns::formatted(2, 512, &["--cell", "4096"]);
    let mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "2G", "thin");
    for hba in HBAS {
        let job = "job=verify size=24M bs=4k depth=32 seed=8 pattern=random";
        let said = run(&mut vmm_on(&luns, &path, hba, job));
        assert!(said.contains(" 0 failed"), "{said}");
    }
    mount.unmount();
    luns.assert_clean();
    let mount = luns.mount(2);
    run(command("test-guest").arg("--verify").arg(mount.at("disk-flat.vmdk")).args(["--size", "24M", "--seed", "8"]));
    mount.unmount();
}

#[test]
fn a_second_vm_is_refused_on_this_host_and_on_another_and_told_who_holds_the_disk() {
    let luns = Luns::formatted(2, 256, &[]);
    let (one, two) = (luns.mount(1), luns.mount(2));
    let path = disk(&one, "disk.vmdk", "64M", "thin");
    let mut guest = Guest::start(&luns, &path, "job=bench rw=randwrite bs=4k depth=8 seconds=600", "first");
    guest.wait_for_output("=");
    for mount in [&one, &two] {
        let said = refused(&mut vmm(&luns, &mount.at("disk.vmdk"), "job=info"), 1);
        assert!(said.contains("host1"), "it does not say who holds the disk: {said}");
        let why = run(command("vmfs").arg("why-locked").arg(mount.at("disk.vmdk")));
        assert!(why.contains("host1"), "{why}");
    }
    signal(guest.child.id(), libc::SIGTERM);
    assert!(guest.wait_for_end().is_some(), "SIGTERM stops the VM in order");
    let said = run(&mut vmm(&luns, &two.at("disk.vmdk"), "job=verify size=8M bs=64k depth=4 seed=1"));
    assert!(said.contains(" 0 failed"), "the lock is free again: {said}");
    one.unmount();
    two.unmount();
    luns.assert_clean();
}

#[test]
fn a_killed_vm_frees_its_disk_and_keeps_what_it_flushed() {
    let luns = Luns::formatted(2, 512, &[]);
    let mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "256M", "thin");
    let job = "job=write size=200M bs=64k depth=8 seed=3 pattern=sequential flush=32";
    let mut guest = Guest::start(&luns, &path, job, "writer");
    guest.wait_for_output("flushed");
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    let flushed = guest.flushed().1 * (64 << 10);
    let start = Instant::now();
    loop {
        let job = format!("job=check size={flushed} bs=64k depth=8 seed=3 pattern=sequential");
        let out = output(&mut vmm(&luns, &path, &job));
        if out.status.success() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "the disk is not free or lost data: {}", text(&out));
        thread::sleep(Duration::from_millis(200));
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_guest_stands_still_while_its_host_cannot_renew_its_lease_and_goes_on_with_nothing_lost() {
    let luns = Luns::formatted(2, 512, &["--lease", "fast"]);
    let mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "64M", "thin");
    let job = "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000";
    let mut guest = Guest::start(&luns, &path, job, "frozen");
    guest.wait_for_more_passes();
    for round in 1..=2 {
        signal(mount.pid(), libc::SIGSTOP);
        guest.wait_until("the machine stands still", |guest| guest.errors().matches("stands still").count() == round);
        guest.wait_until_nothing_changes(&luns);
        signal(mount.pid(), libc::SIGCONT);
        guest.wait_until("it goes on", |guest| guest.errors().matches("not keep the machine").count() == round);
        guest.wait_for_more_passes();
    }
    guest.end_verified(&mount.at("disk-flat.vmdk"), 16 << 20, 6);
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_mount_that_is_killed_ends_the_vm_and_what_was_flushed_or_forced_is_there() {
    for (force, seed) in [("0", 3), ("1", 4)] {
        let luns = Luns::formatted(2, 512, &["--lease", "fast"]);
        let mount = luns.mount(1);
        let path = disk(&mount, "disk.vmdk", "256M", "thin");
        let job = format!(
            "job=write size=64M bs=64k depth=8 seed={seed} pattern=sequential flush=16 passes=1000 fua={force}"
        );
        let mut guest = Guest::start(&luns, &path, &job, "writer");
        guest.wait_for_output("flushed pass=0 generation=1 blocks=64");
        mount.kill();
        assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
        let errors = guest.errors();
        assert!(errors.contains("disk-flat.vmdk") && errors.contains("mounted the volume has ended"), "{errors}");
        assert!(!guest.said().contains("Check(Sense(3"), "no medium error for a lost mount: {}", guest.said());
        let (generation, blocks) = guest.flushed();
        // The dead host's lock may stand: a read-only mount needs none.
        let reader = luns.mount_with(3, &["-o", "ro"]);
        assert_stamped(&reader.at("disk-flat.vmdk"), 64 << 20, seed, |byte| {
            if byte < blocks * (64 << 10) { generation } else { generation - 1 }
        });
        reader.unmount();
        let two = luns.mount(2);
        wait_for("the takeover of the dead host's disk", || {
            output(&mut vmm(&luns, &two.at("disk.vmdk"), "job=info")).status.success()
        });
        two.unmount();
    }
}

#[test]
fn a_fenced_host_ends_its_vm_and_writes_nothing_more() {
    let luns = Luns::formatted(1, 128, &["--lease", "fast"]);
    let mut mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "32M", "thin");
    let lun = &luns.images()[0];
    let earlier = fs::read(lun).unwrap();
    let beat = || mount.slots_of("host1")[0]["beat"].as_u64().unwrap();
    let first = beat();
    wait_for("a renewal of the lease", || beat() > first);
    let mut guest = Guest::start(&luns, &path, "job=verify size=8M bs=64k depth=8 seed=6 passes=1000000", "fenced");
    guest.wait_for_output("pass generation=2");
    signal(mount.pid(), libc::SIGSTOP);
    guest.wait_for_error("stands still");
    wait_for("the end of what was in flight", || {
        let before = fs::metadata(lun).unwrap().modified().unwrap();
        thread::sleep(Duration::from_secs(1));
        fs::metadata(lun).unwrap().modified().unwrap() == before
    });
    // The LUN is set back to what it was: the host's slot is not as the host left it.
    File::options().write(true).open(lun).and_then(|mut file| file.write_all(&earlier)).unwrap();
    signal(mount.pid(), libc::SIGCONT);
    assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
    let errors = guest.errors();
    // It hears of it by the gate, or by the end of the mount, whichever is first.
    let cause = ["another host may have it now", "mounted the volume has ended"].iter().any(|why| errors.contains(why));
    assert!(errors.contains("disk-flat.vmdk") && cause, "{errors}");
    assert_eq!(mount.wait_for_end().code(), Some(1), "{}", mount.log());
    assert!(mount.log().contains("rolled back"), "{}", mount.log());
    assert!(fs::read(lun).unwrap() == earlier, "something was written after the host was fenced");
}

#[test]
fn what_a_guest_discards_is_free_on_the_volume_and_reads_as_zeros() {
    let luns = Luns::formatted(2, 256, &[]);
    let mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "128M", "thin");
    let flat = mount.at("disk-flat.vmdk");
    let used = || run(system("du").arg("-m").arg(&flat)).split('\t').next().unwrap().parse::<u64>().unwrap();
    let free = || {
        let said = run(command("vmfs").args(["status", "--json"]).arg(mount.path()));
        let status: serde_json::Value = serde_json::from_str(&said).unwrap();
        status[0]["luns"].as_array().unwrap().iter().map(|lun| lun["free_blocks"].as_u64().unwrap()).sum::<u64>()
    };
    run(&mut vmm(&luns, &path, "job=verify size=48M bs=64k depth=8 seed=9"));
    let (used_before, free_before) = (used(), free());
    // 15 MiB and odd sectors on both sides, in two commands: the block in which they meet is not free as a whole. Then 8 MiB.
    for (job, freed) in [
        ("job=discard offset=1047552 size=15730688 bs=512 depth=16 by=unmap", 14),
        ("job=discard offset=32M size=8M bs=64k by=writesame", 22),
    ] {
        let said = run(&mut vmm(&luns, &path, job));
        assert!(said.contains(" 0 failed"), "{said}");
        assert_eq!(used_before - used(), freed, "{job}");
        assert_eq!(free() - free_before, freed, "{job}");
    }
    let holes = [1047552..1047552 + 15730688, 32 << 20..40 << 20];
    assert_stamped(&flat, 48 << 20, 9, |byte| u64::from(!holes.iter().any(|hole| hole.contains(&byte))));
    let bytes = fs::read(&flat).unwrap();
    assert!(holes.iter().all(|hole| bytes[hole.start as usize..hole.end as usize].iter().all(|byte| *byte == 0)));
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn thin_disks_tell_the_guest_that_they_take_unmap_and_thick_ones_that_they_do_not() {
    let luns = Luns::formatted(1, 256, &[]);
    let mount = luns.mount(1);
    for (format, provisioning) in [("thin", "00b2000400e40200"), ("zeroedthick", "00b2000400000000")] {
        let path = disk(&mount, &format!("{format}.vmdk"), "32M", format);
        let said = run(&mut vmm(&luns, &path, "job=info"));
        assert!(said.contains(&format!("page=b2 bytes={provisioning}")), "{said}");
        // Most blocks and most descriptors of one UNMAP: none for a disk that takes none.
        let limits = said.split("page=b0 bytes=").nth(1).unwrap();
        assert_eq!(&limits[40..56], if format == "thin" { "0010000000000100" } else { "0000000000000000" }, "{said}");
    }
    mount.unmount();
}

#[test]
fn a_guest_that_posts_garbage_harms_neither_the_vmm_nor_the_volume() {
    let luns = Luns::formatted(1, 256, &[]);
    let mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "64M", "thin");
    for hba in HBAS {
        for job in ["job=garbage seed=4", "job=errors", "job=unmap size=32M seed=4"] {
            let said = run(&mut vmm_on(&luns, &path, hba, job));
            assert!(said.contains(" 0 failed"), "{hba} {job}: {said}");
        }
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn the_vmm_says_what_is_wrong_with_its_arguments() {
    let luns = Luns::formatted(1, 128, &[]);
    let missing = luns.beside("missing.vmdk");
    let said = refused(&mut vmm(&luns, &missing, "job=info"), 1);
    assert!(said.contains("missing.vmdk"), "{said}");
    let no_kernel = refused(command("vmm").args(["run", "--kernel"]).arg(&missing), 1);
    assert!(no_kernel.contains("missing.vmdk"), "{no_kernel}");
    refused(command("vmm").args(["run", "--no-such-flag"]), 2);
    assert!(program("vmm").exists());
}
