//! Promises of the command `test-guest`.

use std::fs;
use std::process::{Command, Output};
use test_guest::pattern::fill_range;

fn test_guest(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_test-guest")).args(arguments).output().expect("test-guest starts")
}

#[test]
fn the_image_is_written_whole() {
    let folder = std::env::temp_dir().join(format!("test-guest-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("folder");
    let path = folder.join("guest.elf");
    assert!(test_guest(&["--output", path.to_str().expect("UTF-8")]).status.success());
    assert_eq!(fs::read(&path).expect("image"), test_guest::IMAGE);
    fs::remove_dir_all(&folder).expect("removed");
    let refused = test_guest(&["--output", path.to_str().expect("UTF-8")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("guest.elf"));
}

#[test]
fn a_disk_is_checked_sector_by_sector() {
    let path = std::env::temp_dir().join(format!("test-guest-disk-{}", std::process::id()));
    let mut bytes = vec![0; 3 << 20];
    fill_range(&mut bytes[1 << 20..], 7, (1 << 20) / 512, 2);
    fs::write(&path, &bytes).expect("disk");
    let name = path.to_str().expect("UTF-8");
    let good = ["--verify", name, "--offset", "1M", "--seed", "7", "--generation", "2"];
    assert_eq!(test_guest(&good).status.code(), Some(0));
    for (bad, word) in [
        (&["--verify", name, "--offset", "1M", "--seed", "7"][..], "sector 2048"),
        (&["--verify", name, "--size", "1M", "--seed", "7", "--generation", "2"], "Zero"),
        (&["--verify", name, "--offset", "1M", "--size", "4M", "--seed", "7", "--generation", "2"], "--size"),
        (&["--verify", name, "--offset", "8M"], "no sector"),
        (&["--verify", "/nonexistent/disk"], "/nonexistent/disk"),
    ] {
        let run = test_guest(bad);
        assert_eq!(run.status.code(), Some(1), "{bad:?}");
        assert!(String::from_utf8_lossy(&run.stderr).contains(word), "{run:?}");
    }
    fs::remove_file(&path).expect("removed");
    for usage in [&[][..], &["--verify", name, "--size", "100"], &["--output", "a", "--verify", "b"]] {
        assert_eq!(test_guest(usage).status.code(), Some(2), "{usage:?}");
    }
}
