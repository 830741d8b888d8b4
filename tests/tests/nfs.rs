//! Disks on an NFS server, nfs-ganesha, in a network of its own: what is written is there, a disk has one machine, whatever dies or is cut off.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::harness::{Luns, command, folder, output, refused, run, signal, system, text};
use tests::machines::{Guest, HBAS, assert_stamped, vmm, vmm_on};
use tests::networks::Network;
use tests::nfs::Ganesha;

#[path = "nfs/v41.rs"]
mod v41;

/// A lock whose holder gives no sign of life is taken after so long.
const STALE: Duration = Duration::from_secs(35);

/// A folder, for kernels and logs; there are no LUNs.
fn no_luns() -> Luns {
    Luns::elsewhere(folder(), &[])
}

fn vmfs(network: &Network, arguments: &[&str], urls: &[&Path]) -> Command {
    let mut vmfs = command("vmfs");
    vmfs.args(arguments).args(urls);
    network.at_host(1, &vmfs)
}

/// Files that tell who has a disk, of either version.
fn lock_files(server: &Ganesha<'_>) -> Vec<String> {
    let names = fs::read_dir(server.export()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(".lck-") || name.starts_with(".own-")).collect()
}

/// The disk of 64 MiB holds the 16 MiB that guests have written, is thin, and nobody has it any more. Gives the file of its data.
fn assert_thin_with_its_bytes(server: &Ganesha<'_>, network: &Network, url: &Path) -> PathBuf {
    let flat = server.export().join("disk-flat.vmdk");
    run(command("test-guest").arg("--verify").arg(&flat).args(["--size", "16M", "--seed", "5"]));
    let info: Value = serde_json::from_str(&run(&mut vmfs(network, &["disk", "info", "--json"], &[url]))).unwrap();
    assert_eq!((&info["size_bytes"], &info["format"]), (&(64 << 20).into(), &"thin".into()));
    let used = info["allocated_bytes"].as_u64().unwrap();
    assert!((16 << 20..24 << 20).contains(&used), "a thin disk grows with what is written: {used}");
    assert_eq!(lock_files(server), Vec::<String>::new(), "each machine gave its lock back");
    flat
}

/// While a machine has the disk, others and a copy to `copy` are refused and told who has it; `meanwhile` is done then. Afterwards it is free.
fn assert_one_machine(luns: &Luns, network: &Network, url: &Path, copy: &Path, meanwhile: impl FnOnce()) {
    let job = "job=bench rw=randwrite bs=4k depth=8 seconds=600";
    let mut guest = Guest::start_by(luns, network.at_host(1, &vmm(luns, url, job)), "first");
    guest.wait_for_output("=");
    let said = refused(&mut network.at_host(2, &vmm(luns, url, "job=info")), 1);
    let host = run(system("uname").arg("-n"));
    let holder = format!("process {} on host {}", guest.child.id(), host.trim());
    assert!(said.contains(&holder) && said.contains("renews its lock"), "it does not say who holds the disk: {said}");
    let why: Value = serde_json::from_str(&run(&mut vmfs(network, &["why-locked", "--json"], &[url]))).unwrap();
    assert_eq!(
        (&why["locked"], &why["alive"], &why["process"]),
        (&true.into(), &true.into(), &guest.child.id().into())
    );
    let copied = refused(&mut vmfs(network, &["disk", "clone"], &[url, copy]), 1);
    assert!(copied.contains(&holder), "{copied}");
    meanwhile();
    signal(guest.child.id(), libc::SIGTERM);
    assert!(guest.wait_for_end().is_some(), "SIGTERM stops the machine in order");
    assert!(run(&mut vmfs(network, &["why-locked"], &[url])).contains("not locked"));
}

#[test]
fn a_guest_writes_to_a_disk_on_nfs_a_second_is_refused_by_name_and_copies_have_the_same_bytes() {
    let (luns, network) = (Luns::formatted(1, 256, &[]), Network::new(2));
    let server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    let told = run(system("qemu-img").args(["info", "--output=json"]).arg(server.export().join("disk.vmdk")));
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["format"], &told["virtual-size"]), (&"vmdk".into(), &(64 << 20).into()));
    assert!(refused(&mut vmfs(&network, &["disk", "create", "-s", "1M"], &[&url]), 1).contains("there already"));

    for hba in HBAS {
        let said =
            run(&mut network.at_host(1, &vmm_on(&luns, &url, hba, "job=verify size=16M bs=64k depth=16 seed=5")));
        assert!(said.contains(" 0 failed"), "{said}");
        let said = run(&mut network.at_host(2, &vmm_on(&luns, &url, hba, "job=check size=16M bs=4k depth=32 seed=5")));
        assert!(said.contains(" 0 failed"), "{said}");
    }
    let flat = assert_thin_with_its_bytes(&server, &network, &url);
    assert_one_machine(&luns, &network, &url, &server.url("copy.vmdk"), || {});

    // To a volume, and back.
    let mount = luns.mount(1);
    let local = mount.at("local.vmdk");
    run(&mut vmfs(&network, &["disk", "clone"], &[&url, &local]));
    run(&mut vmfs(&network, &["disk", "clone"], &[&local, &server.url("back.vmdk")]));
    let original = fs::read(&flat).unwrap();
    assert!(original == fs::read(mount.at("local-flat.vmdk")).unwrap(), "the copy on the volume differs");
    assert!(original == fs::read(server.export().join("back-flat.vmdk")).unwrap(), "the copy of the copy differs");
    mount.unmount();
    luns.assert_clean();

    // Larger, and then with all its space: refused while a machine has it, the bytes stay.
    let job = "job=bench rw=randread bs=4k depth=1 seconds=600";
    let mut guest = Guest::start_by(&luns, network.at_host(1, &vmm(&luns, &url, job)), "second");
    guest.wait_for_output("=");
    for change in [&["disk", "extend", "-s", "80M"][..], &["disk", "inflate"]] {
        let said = refused(&mut vmfs(&network, change, &[&url]), 1);
        assert!(said.contains(&format!("process {}", guest.child.id())), "{said}");
    }
    signal(guest.child.id(), libc::SIGTERM);
    guest.wait_for_end();
    assert!(refused(&mut vmfs(&network, &["disk", "extend", "-s", "64M"], &[&url]), 1).contains("larger"));
    run(&mut vmfs(&network, &["disk", "extend", "-s", "80M"], &[&url]));
    run(&mut vmfs(&network, &["disk", "inflate"], &[&url]));
    let info: Value = serde_json::from_str(&run(&mut vmfs(&network, &["disk", "info", "--json"], &[&url]))).unwrap();
    assert_eq!((&info["size_bytes"], &info["format"]), (&(80 << 20).into(), &"eagerzeroedthick".into()));
    assert!(info["allocated_bytes"].as_u64() >= Some(80 << 20), "{info}");
    let changed = fs::read(&flat).unwrap();
    assert!(changed[..original.len()] == original && changed[original.len()..].iter().all(|byte| *byte == 0));
    assert_eq!(lock_files(&server), Vec::<String>::new());
    run(&mut network.at_host(1, &vmm(&luns, &url, "job=verify size=72M bs=64k depth=4 seed=9")));

    // Bad input changes nothing and says what is wrong.
    for (url, wrong) in [
        (server.url("none.vmdk"), "no such file"),
        (format!("nfs://{}/not-exported/x.vmdk", Network::ADDRESS).into(), "export"),
        ("nfs://10.0.0.100".into(), "path"),
    ] {
        let said = refused(&mut network.at_host(1, &vmm(&luns, &url, "job=info")), 1);
        assert!(said.contains(wrong), "{said}");
    }
}

#[test]
fn a_user_without_permission_and_a_server_that_is_gone_are_told_apart_with_the_next_step() {
    let (luns, network) = (no_luns(), Network::new(1));
    let mut server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "16M"], &[&url]));
    // As root is, where the server squashes him.
    let nobody = |name: &str| format!("{}?uid=65534&gid=65534", server.url(name).display()).into();
    let (new, old): (PathBuf, PathBuf) = (nobody("new.vmdk"), nobody("disk.vmdk"));
    let names = |server: &Ganesha<'_>| fs::read_dir(server.export()).unwrap().count();
    for said in [
        refused(&mut vmfs(&network, &["disk", "create", "-s", "1M"], &[&new]), 1),
        refused(&mut vmfs(&network, &["disk", "extend", "-s", "32M"], &[&old]), 1),
        refused(&mut network.at_host(1, &vmm(&luns, &old, "job=info")), 1),
    ] {
        assert!(said.contains("no permission") && said.contains("squash"), "{said}");
    }
    assert_eq!(names(&server), 2, "nothing was made");
    // Reading takes no lock, and so no permission to make one.
    let read_only: PathBuf = format!("{},readonly", old.display()).into();
    assert!(run(&mut network.at_host(1, &vmm(&luns, &read_only, "job=info"))).contains("="));

    server.kill();
    // Both wait for it for a while, at once.
    std::thread::scope(|scope| {
        let commands = [vmfs(&network, &["disk", "info"], &[&url]), network.at_host(1, &vmm(&luns, &url, "job=info"))];
        let waiting = commands.map(|mut command| scope.spawn(move || refused(&mut command, 1)));
        for said in waiting.map(|waiting| waiting.join().unwrap()) {
            let told = ["disk.vmdk", "cannot be reached", "check the server"].iter().all(|part| said.contains(part));
            assert!(told, "{said}");
        }
    });
}

#[test]
fn the_disk_of_a_killed_machine_is_had_after_the_stated_time() {
    let (luns, network) = (no_luns(), Network::new(2));
    let server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    let job = "job=write size=32M bs=64k depth=8 seed=3 pattern=sequential flush=32 passes=1000000";
    let mut guest = Guest::start_by(&luns, network.at_host(1, &vmm(&luns, &url, job)), "writer");
    guest.wait_for_output("flushed pass=1");
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    let flushed = guest.flushed().0;
    let begin = Instant::now();
    let said = output(&mut network.at_host(2, &vmm(&luns, &url, "job=info")));
    let waited = begin.elapsed();
    assert!(said.status.success(), "{}", text(&said));
    assert!(text(&said).contains("sign of life"), "it does not say what it waits for: {}", text(&said));
    assert!(waited >= STALE, "taken after {waited:?}");
    assert_stamped(&server.export().join("disk-flat.vmdk"), 32 << 20, 3, |_| flushed - 1);
    assert_eq!(lock_files(&server), Vec::<String>::new(), "giving a lock back frees it of those that were broken");
}

#[test]
fn a_server_that_is_killed_under_load_loses_nothing_that_was_acknowledged() {
    let (luns, network) = (no_luns(), Network::new(1));
    let mut server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    let job = "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000";
    let mut guest = Guest::start_by(&luns, network.at_host(1, &vmm(&luns, &url, job)), "loaded");
    for _ in 0..3 {
        guest.wait_for_more_passes();
        server.kill();
        server.run();
    }
    guest.wait_for_more_passes();
    guest.end_verified(&server.export().join("disk-flat.vmdk"), 16 << 20, 6);
}

#[test]
fn a_holder_that_is_cut_off_stands_still_and_never_writes_after_another_has_the_disk() {
    let (luns, network) = (no_luns(), Network::new(2));
    let server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    let job = "job=write size=32M bs=64k depth=8 seed=1 pattern=sequential passes=1000000";
    let mut first = Guest::start_by(&luns, network.at_host(1, &vmm(&luns, &url, job)), "first");
    first.wait_for_output("=");
    network.set_link(1, false);
    // It stands still before anybody can take its disk; a short cut does nothing else.
    first.wait_until("the machine stands still", |guest| guest.errors().contains("stands still"));
    network.set_link(1, true);
    first.wait_until("it goes on", |guest| guest.errors().contains("not keep the machine"));

    network.set_link(1, false);
    let said = run(&mut network.at_host(2, &vmm(&luns, &url, "job=verify size=48M bs=64k depth=8 seed=2")));
    assert!(said.contains(" 0 failed"), "{said}");
    assert_eq!(first.errors().matches("stands still").count(), 2, "{}", first.errors());
    network.set_link(1, true);
    assert_eq!(first.wait_for_end(), Some(1), "{}", first.errors());
    assert!(first.errors().contains("lost the disk"), "{}", first.errors());
    let flat = server.export().join("disk-flat.vmdk");
    run(command("test-guest").arg("--verify").arg(&flat).args(["--size", "48M", "--seed", "2"]));
}
