//! A guest writes to a disk of the volume; its data is what the mount shows; a disk has one writer.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tests::harness::{Luns, Mount, command, output, program, refused, run, signal, system, text};

struct Guest(Option<Child>);

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn kernel(luns: &Luns) -> std::path::PathBuf {
    let path = luns.beside("guest.elf");
    if !path.exists() {
        run(command("test-guest").arg("--output").arg(&path));
    }
    path
}

fn vmm(luns: &Luns, disk: &Path, job: &str) -> Command {
    let mut vmm = command("vmm");
    vmm.args(["run", "--memory", "64M", "--kernel"]).arg(kernel(luns)).arg("--disk").arg(disk).args(["--cmdline", job]);
    vmm
}

fn disk(mount: &Mount, name: &str, size: &str, format: &str) -> std::path::PathBuf {
    let path = mount.at(name);
    run(command("vmfs").args(["disk", "create", "-s", size, "-d", format]).arg(&path));
    path
}

fn wait_for_output(log: &Path, word: &str) {
    let start = Instant::now();
    while !fs::read_to_string(log).unwrap_or_default().contains(word) {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the guest never said {word}: {:?}",
            fs::read_to_string(log)
        );
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_writes_each_kind_of_disk_and_the_mount_shows_its_bytes() {
    let luns = Luns::formatted(2, 512, &[]);
    let mount = luns.mount(1);
    for format in ["thin", "zeroedthick", "eagerzeroedthick"] {
        let path = disk(&mount, &format!("{format}.vmdk"), "64M", format);
        let said = run(&mut vmm(&luns, &path, "job=verify size=32M bs=64k depth=16 seed=5"));
        assert!(said.contains(" 0 failed"), "{said}");
        let flat = mount.at(format!("{format}-flat.vmdk"));
        run(command("test-guest").arg("--verify").arg(&flat).args(["--size", "32M", "--seed", "5"]));
        let said = run(&mut vmm(&luns, &path, "job=check size=32M bs=4k depth=32 seed=5"));
        assert!(said.contains(" 0 failed"), "{said}");
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
    let said = run(&mut vmm(&luns, &path, "job=verify size=24M bs=4k depth=32 seed=8 pattern=random"));
    assert!(said.contains(" 0 failed"), "{said}");
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
    let log = luns.beside("first.log");
    let mut first = vmm(&luns, &path, "job=bench rw=randwrite bs=4k depth=8 seconds=600");
    let child = first.arg("--serial").arg(format!("file:{}", log.display())).stdout(Stdio::null()).spawn().unwrap();
    let mut guest = Guest(Some(child));
    wait_for_output(&log, "=");
    for mount in [&one, &two] {
        let said = refused(&mut vmm(&luns, &mount.at("disk.vmdk"), "job=info"), 1);
        assert!(said.contains("host1"), "it does not say who holds the disk: {said}");
        let why = run(command("vmfs").arg("why-locked").arg(mount.at("disk.vmdk")));
        assert!(why.contains("host1"), "{why}");
    }
    let child = guest.0.as_mut().unwrap();
    signal(child.id(), libc::SIGTERM);
    let ended = child.wait().unwrap();
    assert!(ended.code().is_some(), "SIGTERM stops the VM in order: {ended}");
    guest.0 = None;
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
    let log = luns.beside("writer.log");
    let mut writer = vmm(&luns, &path, "job=write size=200M bs=64k depth=8 seed=3 pattern=sequential flush=32");
    let child = writer.arg("--serial").arg(format!("file:{}", log.display())).stdout(Stdio::null()).spawn().unwrap();
    let mut guest = Guest(Some(child));
    wait_for_output(&log, "flushed");
    let mut child = guest.0.take().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let said = fs::read_to_string(&log).unwrap();
    let blocks = said.lines().filter(|line| line.contains("flushed")).filter_map(|line| line.split("blocks=").nth(1));
    let blocks = blocks.filter_map(|count| count.trim().parse::<u64>().ok()).next_back();
    let flushed = blocks.unwrap_or_else(|| panic!("no acknowledged flush in {said}")) * (64 << 10);
    let start = Instant::now();
    loop {
        let job = format!("job=check size={flushed} bs=64k depth=8 seed=3 pattern=sequential");
        let out = output(&mut vmm(&luns, &path, &job));
        if out.status.success() {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "the disk is not free or lost data: {}", text(&out));
        thread::sleep(Duration::from_millis(200));
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_guest_that_posts_garbage_harms_neither_the_vmm_nor_the_volume() {
    let luns = Luns::formatted(1, 256, &[]);
    let mount = luns.mount(1);
    let path = disk(&mount, "disk.vmdk", "64M", "thin");
    let said = run(&mut vmm(&luns, &path, "job=garbage seed=4"));
    assert!(said.contains(" 0 failed"), "{said}");
    let said = run(&mut vmm(&luns, &path, "job=errors"));
    assert!(said.contains(" 0 failed"), "{said}");
    let said = run(&mut vmm(&luns, &path, "job=unmap size=32M seed=4"));
    assert!(said.contains(" 0 failed"), "{said}");
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
