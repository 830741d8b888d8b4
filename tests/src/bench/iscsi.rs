//! Owns: this target and tgt, both serving one image file, and their load by libiscsi.
//! Promises: both are loaded by the same program in turns, each as it works without options; every byte that is read is looked at.
//! Must not know: how ratios are reported.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{output, program, system, text};

/// Bytes of the image.
pub(super) const IMAGE_BYTES: u64 = 512 << 20;
/// Each so many bytes begin with their place, which the load generator compares.
const STAMPED: usize = 4096;
const OUR_NAME: &str = "iqn.2026-01.test:bench";
const TGT_NAME: &str = "iqn.2026-01.test:tgt";

/// What a load does.
#[derive(Clone, Copy, Debug)]
pub struct IscsiWorkload {
    /// Its name in the report.
    pub name: &'static str,
    pub(super) writes: bool,
    pub(super) random: bool,
    /// Bytes of a command.
    pub block: u64,
    pub(super) depth: u32,
    /// Initiators that do so at once.
    pub sessions: u32,
}

const fn workload(name: &'static str, kind: (bool, bool), block: u64, depth: u32, sessions: u32) -> IscsiWorkload {
    IscsiWorkload { name, writes: kind.0, random: kind.1, block, depth, sessions }
}

/// The workloads of the report.
pub const ISCSI_WORKLOADS: [IscsiWorkload; 8] = [
    workload("randread-4k-qd1", (false, true), 4096, 1, 1),
    workload("randread-4k-qd32", (false, true), 4096, 32, 1),
    workload("randwrite-4k-qd1", (true, true), 4096, 1, 1),
    workload("randwrite-4k-qd32", (true, true), 4096, 32, 1),
    workload("read-128k-qd4", (false, false), 128 << 10, 4, 1),
    workload("write-128k-qd4", (true, false), 128 << 10, 4, 1),
    workload("randread-4k-64x32", (false, true), 4096, 32, 64),
    workload("randwrite-4k-64x32", (true, true), 4096, 32, 64),
];

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// This project's target.
    Ours,
    /// tgt.
    Tgt,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Commands that ended.
    pub commands: u64,
    /// Their time.
    pub seconds: f64,
    /// Processor time of the server.
    pub cpu_seconds: f64,
    /// Commands of the slowest session.
    pub least: u64,
    /// Commands of the fastest session.
    pub most: u64,
}

impl Load {
    /// This run and another one.
    pub fn and(self, other: Load) -> Load {
        Load {
            commands: self.commands + other.commands,
            seconds: self.seconds + other.seconds,
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
            least: self.least + other.least,
            most: self.most + other.most,
        }
    }
}

/// A daemon that is killed when dropped.
struct Daemon {
    child: Child,
    url: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both servers, side by side.
pub struct IscsiBench {
    load: PathBuf,
    ours: Daemon,
    tgt: Daemon,
}

impl IscsiBench {
    /// Makes the image in `folder`, builds the load generator, starts both.
    pub fn new(folder: &Path) -> io::Result<IscsiBench> {
        let image = folder.join("iscsi.img");
        fill(&image)?;
        let load = build_load(folder)?;
        Ok(IscsiBench { load, ours: start_ours(folder, &image)?, tgt: start_tgt(folder, &image)? })
    }

    /// Loads one of them for `time`.
    pub fn measure(&self, server: Server, work: &IscsiWorkload, time: Duration, seed: u64) -> io::Result<Load> {
        let daemon = if server == Server::Ours { &self.ours } else { &self.tgt };
        let before = cpu_seconds(daemon.child.id())?;
        let load = by_libiscsi(&self.load, &daemon.url, work, time, seed)?;
        Ok(Load { cpu_seconds: cpu_seconds(daemon.child.id())? - before, ..load })
    }
}

/// Builds the load generator in `folder`.
pub(super) fn build_load(folder: &Path) -> io::Result<PathBuf> {
    let load = folder.join("iscsi-load");
    let mut compiler =
        Command::new("cc").args(["-O2", "-x", "c", "-", "-liscsi", "-o"]).arg(&load).stdin(Stdio::piped()).spawn()?;
    compiler.stdin.take().expect("it is piped").write_all(include_bytes!("iscsi-load.c"))?;
    if compiler.wait()?.success() {
        return Ok(load);
    }
    Err(io::Error::other("iscsi-load.c cannot be built; scripts/setup bench installs libiscsi-dev"))
}

/// Loads a LUN by libiscsi for `time`; whose processor time that took is not known.
pub(super) fn by_libiscsi(load: &Path, url: &str, work: &IscsiWorkload, time: Duration, seed: u64) -> io::Result<Load> {
    let told = output(
        Command::new(load)
            .arg(url)
            .arg(if work.writes { "write" } else { "read" })
            .arg(if work.random { "random" } else { "sequential" })
            .args([work.block, work.depth.into(), work.sessions.into()].map(|number| number.to_string()))
            .arg(time.as_secs_f64().to_string())
            .args([IMAGE_BYTES, seed + 1].map(|number| number.to_string())),
    );
    let wrong = || io::Error::other(format!("{url} {}: {}", work.name, text(&told)));
    if !told.status.success() {
        return Err(wrong());
    }
    let words = String::from_utf8_lossy(&told.stdout);
    let words: Vec<&str> = words.split_whitespace().collect();
    let [commands, seconds, least, most] = words[..] else { return Err(wrong()) };
    let count = |word: &str| word.parse::<u64>().map_err(|_| wrong());
    let (commands, seconds) = (count(commands)?, seconds.parse().map_err(|_| wrong())?);
    Ok(Load { commands, seconds, cpu_seconds: 0.0, least: count(least)?, most: count(most)? })
}

/// An image in which every piece begins with its place.
pub(super) fn fill(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    // As initiators write: what is written at once stays one piece in the page cache, and a change of a large one costs the kernel time.
    let mut chunk = vec![0x5A; 64 << 10];
    for start in (0..IMAGE_BYTES).step_by(chunk.len()) {
        for (nth, piece) in chunk.chunks_exact_mut(STAMPED).enumerate() {
            piece[..8].copy_from_slice(&(start + (nth * STAMPED) as u64).to_ne_bytes());
        }
        file.write_all(&chunk)?;
    }
    file.sync_all()
}

/// User and system time of a process and its threads (proc(5), stat: fields 14 and 15).
fn cpu_seconds(process: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let ticks: u64 = after.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // SAFETY: sysconf(3) only reads.
    Ok(ticks as f64 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64)
}

fn start_ours(folder: &Path, image: &Path) -> io::Result<Daemon> {
    let control = folder.join("iscsi.control");
    let mut command = Command::new(program("iscsi-target"));
    command.args(["serve", "--portal", "127.0.0.1:0", "--control"]).arg(&control).arg("--target");
    command.arg(format!("{OUR_NAME}={},thin", image.display()));
    let child = command.stderr(Stdio::null()).spawn()?;
    let mut daemon = Daemon { child, url: String::new() };
    wait_until("iscsi-target", || {
        let told = output(Command::new(program("iscsi-target")).args(["status", "--json", "--control"]).arg(&control));
        let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap_or_default();
        let portal = told["portals"][0].as_str().map(|portal| format!("iscsi://{portal}/{OUR_NAME}/0"));
        portal.map(|url| daemon.url = url).is_some()
    })?;
    Ok(daemon)
}

fn start_tgt(folder: &Path, image: &Path) -> io::Result<Daemon> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    // Its control socket is known by a number.
    let control = (std::process::id() % 30_000 + 1).to_string();
    let log = File::create(folder.join("tgt.log"))?;
    let child = system("tgtd")
        .args(["-f", "-C", &control, "--iscsi", &format!("portal=127.0.0.1:{port}")])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let daemon = Daemon { child, url: format!("iscsi://127.0.0.1:{port}/{TGT_NAME}/1") };
    let ask = |words: &[&str]| {
        let mut command = system("tgtadm");
        command.args(["-C", &control, "--lld", "iscsi", "--mode"]).args(words);
        output(&mut command).status.success()
    };
    wait_until("tgtd", || ask(&["target", "--op", "new", "--tid", "1", "--targetname", TGT_NAME]))?;
    let image = image.to_str().expect("the folder's name is text");
    let is_served = ask(&["logicalunit", "--op", "new", "--tid", "1", "--lun", "1", "--backing-store", image])
        && ask(&["target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL"]);
    if is_served { Ok(daemon) } else { Err(io::Error::other("tgtadm refuses the image")) }
}

fn wait_until(who: &str, mut is_there: impl FnMut() -> bool) -> io::Result<()> {
    let start = Instant::now();
    while !is_there() {
        if start.elapsed() > Duration::from_secs(30) {
            return Err(io::Error::other(format!("{who} does not answer")));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
