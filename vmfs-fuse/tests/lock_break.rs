//! Breaking a lock over real mounts: a word is not enough against a process that lives, and is enough against one that is gone.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Images, wait_for};
use lockd::client::MountedDirectory;
use lockd::protocol::AdminRequest;
use rustix::process::Signal;
use serde_json::Value;

fn break_lock(path: &Path, host_is_down: Option<&str>) -> Result<Value, String> {
    let (directory, name) = MountedDirectory::of_file(path).unwrap();
    let mut connection = directory.connect().unwrap();
    let what = AdminRequest::LockBreak { file: name, host_is_down: host_is_down.map(str::to_owned) };
    connection.administer(what, &mut |_, _| ()).map_err(|error| error.to_string())
}

#[test]
fn a_killed_hosts_lock_is_had_at_once_on_the_administrators_word_and_a_stopped_ones_is_not() {
    let images = Images::new(1, 256);
    let (one, two) = (images.mount(1), images.mount(2));
    fs::write(one.at("f"), vec![1; 100_000]).unwrap();
    let held = File::options().write(true).open(one.at("f")).unwrap();
    held.write_all_at(&[2; 4096], 0).unwrap();
    held.sync_all().unwrap();
    let refused = break_lock(&two.at("f"), None).unwrap_err();
    assert!(refused.contains("host1") && refused.contains("can be taken in"), "{refused}");
    assert!(break_lock(&two.at("f"), Some("host2")).unwrap_err().contains("nothing was broken"));
    // Stopped: it keeps its bytes of the drain range, and who knows what it still sends.
    one.signal(Signal::STOP);
    assert!(break_lock(&two.at("f"), Some("host1")).unwrap_err().contains("is not down"));
    assert!(File::options().write(true).open(two.at("f")).is_err());
    one.signal(Signal::KILL);
    let killed = Instant::now();
    let mut broken = None;
    wait_for("the kernel to end the process", || {
        broken = break_lock(&two.at("f"), Some("host1")).ok();
        broken.is_some() || File::options().write(true).open(two.at("f")).is_ok()
    });
    assert!(killed.elapsed() < Duration::from_secs(15), "its lease was waited for");
    if let Some(broken) = broken {
        assert_eq!(broken["holders"].as_array().unwrap().len(), 1, "{broken}");
    }
    let taken = File::options().read(true).write(true).open(two.at("f")).unwrap();
    let mut read = [0; 4096];
    taken.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(read, [2; 4096]);
    drop((taken, held));
    one.kill();
    two.unmount();
}
