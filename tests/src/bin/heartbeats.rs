//! Prints what the heartbeats of 64 hosts on 8 LUNs cost one of them: `cargo run --release -p tests --bin heartbeats`. Takes a minute, asserts no time.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use tests::harness::Luns;
use tests::lockd::Lockd;
use vmfs_core::cas::CellIo;
use vmfs_core::env::Env;
use vmfs_core::format::CellContext;
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::gate::GatePage;
use vmfs_core::lun::{Lun, OpenLun, open_lun};
use vmfs_core::real_env::RealEnv;
use vmfs_core::slot::{self, HostIdentity};
use vmfs_core::units::{CellSize, LunIndex, Uuid};

const WINDOW: Duration = Duration::from_secs(45);

/// Hosts of this very process that keep a slot on each LUN, until this is dropped.
struct OtherHosts {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl OtherHosts {
    fn start(images: &[PathBuf], volume: Uuid, hosts: u8) -> OtherHosts {
        let end = Arc::new(AtomicBool::new(false));
        let (images, ended) = (images.to_owned(), end.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                let env: Rc<dyn Env> = Rc::new(RealEnv);
                for (image, nth) in images.iter().zip(1..) {
                    let lun: Rc<dyn Lun> = open_lun(image.to_str().unwrap(), OpenLun::default()).unwrap();
                    let index = LunIndex::new(nth).unwrap();
                    for host in 1..=hosts {
                        let context = CellContext { volume, cell_size: CellSize::B512 };
                        let io = CellIo::new(context, env.clone());
                        let identity =
                            HostIdentity { host: Uuid([host; 16]), boot: Uuid([1; 16]), name: format!("h{host}") };
                        let lease = LeaseTimes::DEFAULT;
                        let own = slot::join(&io, &lun, index, &identity, host.into(), lease, None).await.unwrap();
                        let lun = lun.clone();
                        tokio::task::spawn_local(async move {
                            let error = slot::keep(&io, &lun, &RefCell::new(own), &GatePage::in_process()).await;
                            panic!("host {host}: {error}");
                        });
                    }
                }
                ready.send(()).unwrap();
                while !ended.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
        });
        is_ready.recv().unwrap();
        OtherHosts { end, thread: Some(thread) }
    }
}

impl Drop for OtherHosts {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
    }
}

/// Processor time of a process so far, from proc_pid_stat(5), whose unit is 1/100 s.
fn processor_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn main() {
    let luns = Luns::formatted(8, 128, &[]);
    let lockd = Lockd::start(&luns);
    let mount = luns.mount_with(100, &["-o", &lockd.option()]);
    let volume = Uuid::parse(mount.status()["volume"].as_str().unwrap()).unwrap();
    let _others = OtherHosts::start(luns.images(), volume, 63);
    let used = || (processor_seconds(lockd.child.id()), processor_seconds(mount.pid()));
    let before = used();
    thread::sleep(WINDOW);
    let after = used();
    let percent = |seconds: f64| seconds * 100.0 / WINDOW.as_secs_f64();
    println!(
        "8 LUNs, 64 hosts, default lease: vmfs-lockd {:.2} % of a core, an idle mount.vmfs {:.2} %",
        percent(after.0 - before.0),
        percent(after.1 - before.1)
    );
    let hosts = |lun: &Value| lun["hosts"].as_array().unwrap().iter().filter(|host| host["state"] == "Live").count();
    assert!(mount.status()["luns"].as_array().unwrap().iter().all(|lun| hosts(lun) == 64));
}
