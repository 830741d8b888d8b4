//! A host that dies at any moment loses nothing that fsync acknowledged, and leaves a volume that others use.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use tests::harness::{Luns, scale};
use tests::random::Random;

/// Files whose whole content was acknowledged by fsync, by name.
type Acknowledged = Mutex<BTreeMap<String, Vec<u8>>>;

/// Creates, writes, grows and renames files until the mount is gone; notes what was acknowledged.
fn work(folder: &std::path::Path, thread: u64, seed: u64, acknowledged: &Acknowledged) -> std::io::Result<()> {
    let mut random = Random::new(seed);
    for n in 0.. {
        let name = format!("t{thread}-{n}");
        let length = [50, 3_000, 9_000, 150_000, 1_300_000][random.below(5) as usize];
        let mut bytes = random.bytes(length);
        let mut file = File::create_new(folder.join(&name))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        acknowledged.lock().unwrap().insert(name.clone(), bytes.clone());
        if random.below(3) == 0 {
            let at = random.below(bytes.len() as u64);
            let piece = random.bytes(random.clone().below(40_000) as usize + 1);
            let end = at as usize + piece.len();
            acknowledged.lock().unwrap().remove(&name);
            file.write_all_at(&piece, at)?;
            file.sync_data()?;
            bytes.resize(bytes.len().max(end), 0);
            bytes[at as usize..end].copy_from_slice(&piece);
            acknowledged.lock().unwrap().insert(name.clone(), bytes.clone());
        }
        drop(file);
        if random.below(4) == 0 {
            let new = format!("{name}-renamed");
            acknowledged.lock().unwrap().remove(&name);
            fs::rename(folder.join(&name), folder.join(&new))?;
            File::open(folder)?.sync_all()?;
            acknowledged.lock().unwrap().insert(new, bytes);
        } else if random.below(4) == 0 {
            acknowledged.lock().unwrap().remove(&name);
            fs::remove_file(folder.join(&name))?;
        }
    }
    Ok(())
}

#[test]
fn acknowledged_fsyncs_survive_sigkill_at_random_points() {
    for round in 0..scale(2) {
        let luns = Luns::formatted(2, 1024, &[]);
        let acknowledged = Acknowledged::default();
        let mut random = Random::new(round);
        for host in 1..=3u8 {
            let mount = luns.mount(host);
            let folder = mount.at(format!("by{host}"));
            fs::create_dir(&folder).unwrap();
            thread::scope(|scope| {
                for t in 0..2 {
                    let (folder, acknowledged, seed) = (&folder, &acknowledged, random.bits());
                    scope.spawn(move || {
                        let local = Acknowledged::default();
                        let end = work(folder, t, seed, &local).expect_err("it ends when the mount dies");
                        assert_ne!(end.raw_os_error(), Some(libc::ENOSPC), "the volume was too small for this test");
                        let prefix = folder.file_name().unwrap().to_str().unwrap();
                        let all = local.into_inner().unwrap().into_iter().map(|(n, b)| (format!("{prefix}/{n}"), b));
                        acknowledged.lock().unwrap().extend(all);
                    });
                }
                thread::sleep(Duration::from_millis(300 + random.below(1500)));
                mount.kill();
            });
        }
        let acknowledged = acknowledged.into_inner().unwrap();
        assert!(acknowledged.len() > 10, "only {} files were acknowledged", acknowledged.len());
        let mount = luns.mount(9);
        for (name, bytes) in &acknowledged {
            let found = fs::read(mount.at(name)).unwrap_or_else(|e| panic!("round {round}: {name} is lost: {e}"));
            assert!(found == *bytes, "round {round}: {name} has other bytes");
        }
        fs::write(mount.at("new"), "the volume is in use again").unwrap();
        mount.unmount();
        luns.assert_clean();
    }
}
