//! The same by NFSv4.1, whose lock is the share reservation of an open file.

use std::fs;
use std::time::{Duration, Instant};

use tests::harness::{command, output, refused, run, text};
use tests::machines::{Guest, assert_stamped, vmm};
use tests::networks::Network;
use tests::nfs::{Ganesha, LEASE};

use super::{assert_one_machine, assert_thin_with_its_bytes, lock_files, no_luns, vmfs};

#[test]
fn by_nfsv41_a_guest_writes_a_second_is_refused_by_name_and_locks_of_nfsv3_are_not_mixed_in() {
    let (luns, network) = (no_luns(), Network::new(2));
    let server = Ganesha::start(&network, &luns.beside("nfs"));
    let (url, by_v3) = (server.url_v41("disk.vmdk"), server.url("disk.vmdk"));
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    assert!(refused(&mut vmfs(&network, &["disk", "create", "-s", "1M"], &[&url]), 1).contains("there already"));
    let said = run(&mut network.at_host(1, &vmm(&luns, &url, "job=verify size=16M bs=64k depth=16 seed=5")));
    assert!(said.contains(" 0 failed"), "{said}");
    let said = run(&mut network.at_host(2, &vmm(&luns, &url, "job=check size=16M bs=4k depth=32 seed=5")));
    assert!(said.contains(" 0 failed"), "{said}");
    let flat = assert_thin_with_its_bytes(&server, &network, &url);
    assert_one_machine(&luns, &network, &url, &server.url_v41("copy.vmdk"), || {
        // A lock file would not be seen by the others, whether the disk is in use or not.
        let mixed = refused(&mut network.at_host(2, &vmm(&luns, &by_v3, "job=info")), 1);
        assert!(mixed.contains("locked by NFSv4.1"), "{mixed}");
    });
    let mixed = refused(&mut vmfs(&network, &["why-locked"], &[&by_v3]), 1);
    assert!(mixed.contains("locked by NFSv4.1") && mixed.contains("NFSv3"), "{mixed}");
    assert_eq!(lock_files(&server), Vec::<String>::new());

    run(&mut vmfs(&network, &["disk", "clone"], &[&url, &server.url_v41("copy.vmdk")]));
    let copy = fs::read(server.export().join("copy-flat.vmdk")).unwrap();
    assert!(copy == fs::read(&flat).unwrap(), "the copy differs");

    // The mark works in both directions, and bad input says what is wrong.
    let export = server.export();
    fs::create_dir(export.join("old")).unwrap();
    std::os::unix::fs::symlink("nfs3", export.join("old/.vmfs-locks")).unwrap();
    run(&mut vmfs(&network, &["disk", "create", "-s", "1M"], &[&server.url_v41("old/disk.vmdk")]));
    for (url, wrong) in [
        (server.url_v41("old/disk.vmdk"), "locked by NFSv3"),
        (server.url_v41("none.vmdk"), "no such file"),
        (format!("nfs://{}/not-exported/x.vmdk?version=4.1", Network::ADDRESS).into(), "export"),
        (server.url("disk.vmdk?version=4"), "3 or 4.1"),
    ] {
        let said = refused(&mut network.at_host(1, &vmm(&luns, &url, "job=info")), 1);
        assert!(said.contains(wrong), "{said}");
    }
}

#[test]
fn by_nfsv41_the_disk_of_a_killed_machine_is_had_when_its_lease_has_ended() {
    let (luns, network) = (no_luns(), Network::new(2));
    let server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url_v41("disk.vmdk");
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
    assert!(waited >= LEASE / 2, "taken after {waited:?}, before the holder would have stopped by itself");
    assert!(waited < LEASE * 5, "taken only after {waited:?}");
    assert_stamped(&server.export().join("disk-flat.vmdk"), 32 << 20, 3, |_| flushed - 1);
    assert_eq!(lock_files(&server), Vec::<String>::new());
}

#[test]
fn by_nfsv41_a_server_that_is_killed_under_load_loses_nothing_that_was_acknowledged() {
    let (luns, network) = (no_luns(), Network::new(2));
    let mut server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url_v41("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    let job = "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000";
    let mut guest = Guest::start_by(&luns, network.at_host(1, &vmm(&luns, &url, job)), "loaded");
    for _ in 0..2 {
        guest.wait_for_more_passes();
        server.kill();
        server.run();
    }
    guest.wait_for_more_passes();
    // The lock has outlived the server.
    let said = refused(&mut network.at_host(2, &vmm(&luns, &url, "job=info")), 1);
    assert!(said.contains(&format!("process {}", guest.child.id())), "{said}");
    guest.end_verified(&server.export().join("disk-flat.vmdk"), 16 << 20, 6);
}

#[test]
fn by_nfsv41_a_holder_that_is_cut_off_goes_on_if_nobody_had_the_disk_and_never_writes_after_another_had() {
    let (luns, network) = (no_luns(), Network::new(2));
    let server = Ganesha::start(&network, &luns.beside("nfs"));
    let url = server.url_v41("disk.vmdk");
    run(&mut vmfs(&network, &["disk", "create", "-s", "64M"], &[&url]));
    let job = "job=write size=32M bs=64k depth=8 seed=1 pattern=sequential passes=1000000";
    let mut first = Guest::start_by(&luns, network.at_host(1, &vmm(&luns, &url, job)), "first");
    first.wait_for_output("=");
    network.set_link(1, false);
    first.wait_until("the machine stands still", |guest| guest.errors().contains("stands still"));
    // Until the server has given up the share for certain.
    std::thread::sleep(LEASE + Duration::from_secs(5));
    network.set_link(1, true);
    first.wait_until("it goes on", |guest| guest.errors().contains("not keep the machine"));

    network.set_link(1, false);
    let said = run(&mut network.at_host(2, &vmm(&luns, &url, "job=verify size=48M bs=64k depth=8 seed=2")));
    assert!(said.contains(" 0 failed"), "{said}");
    network.set_link(1, true);
    assert_eq!(first.wait_for_end(), Some(1), "{}", first.errors());
    assert!(first.errors().contains("lost the disk"), "{}", first.errors());
    let flat = server.export().join("disk-flat.vmdk");
    run(command("test-guest").arg("--verify").arg(&flat).args(["--size", "48M", "--seed", "2"]));
}
