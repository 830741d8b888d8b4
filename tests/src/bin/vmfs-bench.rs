//! Benchmarks: ratios of interleaved rounds against the raw LUN file and against peers. Started by `scripts/bench`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use tests::bench::initiator::{By, InitiatorBench};
use tests::bench::iscsi::{ISCSI_WORKLOADS, IscsiBench, IscsiWorkload, Load, Server};
use tests::bench::load::{Kind, Measured, WORKLOADS, Workload};
use tests::bench::report::{Case, json, table};
use tests::bench::transport::{Bench, Transport};

/// Ratios of interleaved rounds against the raw LUN file and against peers; asserts nothing
#[derive(Parser)]
#[command(version, after_help = "Example:\n  scripts/bench --quick --json ratios.json")]
struct Arguments {
    /// Fewer and shorter rounds: under five minutes
    #[arg(long)]
    quick: bool,
    /// Writes the list of {"case", "value", "unit", "ratio_to_raw", "min", "max"} here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// Slices of a round, in which the transports take turns.
const SLICES: u32 = 4;
/// Files of one round of the workloads of names.
const NAMES: u32 = 200;

/// Creates, opens for writing and removes files in a folder: rates of each.
fn names(folder: &Path) -> io::Result<[(&'static str, f64); 3]> {
    let path = |n: u32| folder.join(format!("name{n}"));
    let rate = |each: &dyn Fn(u32) -> io::Result<()>| -> io::Result<f64> {
        let start = Instant::now();
        (0..NAMES).try_for_each(each)?;
        Ok(f64::from(NAMES) / start.elapsed().as_secs_f64())
    };
    Ok([
        ("create", rate(&|n| File::create_new(path(n))?.sync_all())?),
        ("open-for-write", rate(&|n| File::options().write(true).open(path(n)).map(|_| ()))?),
        ("unlink", rate(&|n| fs::remove_file(path(n)))?),
    ])
}

fn measure(arguments: &Arguments) -> io::Result<Vec<Case>> {
    let (rounds, time) = if arguments.quick { (3, Duration::from_secs(1)) } else { (7, Duration::from_secs(3)) };
    let mut cases = match ["iscsi/", "tgt/", "vmfs-iscsi/"].iter().any(|served| arguments.only.starts_with(served)) {
        true => Vec::new(),
        false => measure_disks(arguments, rounds, time)?,
    };
    cases.extend(measure_iscsi(arguments, rounds, time)?);
    cases.extend(measure_initiator(arguments, rounds, time)?);
    Ok(cases)
}

/// This target against tgt: both serve one file, and take turns in short slices. Rates, and processor time of a command.
fn measure_iscsi(arguments: &Arguments, rounds: u64, time: Duration) -> io::Result<Vec<Case>> {
    let wanted = |name: &str| {
        !arguments.only.starts_with(OF_INITIATOR)
            && ["iscsi", "tgt"].iter().any(|who| format!("{who}/{name}").contains(&arguments.only))
    };
    let chosen: Vec<_> = ISCSI_WORKLOADS.iter().filter(|work| wanted(work.name)).collect();
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let folder = tests::harness::folder();
    let bench = IscsiBench::new(folder.path())?;
    let mut found: BTreeMap<(usize, usize), Vec<Load>> = BTreeMap::new();
    for round in 0..rounds {
        for (w, work) in chosen.iter().enumerate() {
            let mut sums = [Load::default(); 2];
            for slice in 0..SLICES {
                for (sum, server) in sums.iter_mut().zip([Server::Ours, Server::Tgt]) {
                    go_on()?;
                    let seed = round * 100 + u64::from(slice);
                    *sum = sum.and(bench.measure(server, work, time / SLICES, seed)?);
                }
            }
            sums.into_iter().enumerate().for_each(|(s, sum)| found.entry((w, s)).or_default().push(sum));
        }
        eprintln!("iSCSI: round {} of {rounds}", round + 1);
    }
    let mut cases = Vec::new();
    for ((w, s), loads) in &found {
        let work = chosen[*w];
        let (unit, per) =
            if work.block == 4096 { ("IOPS", 1.0) } else { ("MiB/s", (1 << 20) as f64 / work.block as f64) };
        let values = |of: usize, value: &dyn Fn(&Load) -> f64| found[&(*w, of)].iter().map(value).collect::<Vec<f64>>();
        let mut add = |name: &str, unit, value: &dyn Fn(&Load) -> f64| {
            let name = format!("{}/{}{name}", ["iscsi", "tgt"][*s], work.name);
            let tgt = if *s == 0 { values(1, value) } else { Vec::new() };
            cases.push(Case { name, unit, values: values(*s, value), raw: Vec::new(), tgt, libiscsi: vec![] });
        };
        add("", unit, &|load| load.commands as f64 / load.seconds / per);
        add(" cpu", "us/IO", &|load| load.cpu_seconds * 1e6 / load.commands as f64);
        if loads.iter().any(|load| load.least != load.most) {
            add(" slowest", "of most", &|load| load.least as f64 / load.most as f64);
        }
    }
    Ok(cases)
}

/// What cases of the initiator begin with.
const OF_INITIATOR: &str = "vmfs-iscsi/";

/// A disk of a volume on an iSCSI LUN, as a VM uses it, against libiscsi on a LUN of the same target, which take turns in short slices.
fn measure_initiator(arguments: &Arguments, rounds: u64, time: Duration) -> io::Result<Vec<Case>> {
    let wanted =
        |work: &&IscsiWorkload| work.sessions == 1 && format!("{OF_INITIATOR}{}", work.name).contains(&arguments.only);
    let chosen: Vec<_> = ISCSI_WORKLOADS.iter().filter(wanted).collect();
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let folder = tests::harness::folder();
    let bench = InitiatorBench::new(folder.path())?;
    let mut found = vec![[Vec::new(), Vec::new()]; chosen.len()];
    for round in 0..rounds {
        for (work, found) in chosen.iter().zip(&mut found) {
            let mut sums = [Load::default(); 2];
            for slice in 0..SLICES {
                for (sum, by) in sums.iter_mut().zip([By::Disk, By::Libiscsi]) {
                    go_on()?;
                    let seed = round * 100 + u64::from(slice);
                    *sum = sum.and(bench.measure(by, work, time / SLICES, seed)?);
                }
            }
            let per = if work.block == 4096 { 1.0 } else { (1 << 20) as f64 / work.block as f64 };
            sums.iter().zip(found).for_each(|(sum, values)| values.push(sum.commands as f64 / sum.seconds / per));
        }
        eprintln!("initiator: round {} of {rounds}", round + 1);
    }
    let cases = chosen.iter().zip(found).map(|(work, [values, libiscsi])| {
        let unit = if work.block == 4096 { "IOPS" } else { "MiB/s" };
        Case { name: format!("{OF_INITIATOR}{}", work.name), unit, values, raw: vec![], tgt: vec![], libiscsi }
    });
    Ok(cases.collect())
}

/// The transports to a disk of the mount, against the raw file and against peers.
fn measure_disks(arguments: &Arguments, rounds: u64, time: Duration) -> io::Result<Vec<Case>> {
    let mut bench = Bench::new()?;
    let mut values: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    let wanted = |transport: Transport, name: &str| {
        transport == Transport::Raw || format!("{}/{name}", transport.name()).contains(&arguments.only)
    };
    for round in 0..rounds {
        for (w, workload) in WORKLOADS.iter().enumerate() {
            let chosen: Vec<usize> =
                (0..Transport::ALL.len()).filter(|t| wanted(Transport::ALL[*t], workload.name)).collect();
            for (t, measured) in side_by_side(&mut bench, &chosen, *workload, time, round)? {
                values.entry((w, t)).or_default().push(measured.rate() * workload.block as f64);
            }
        }
        eprintln!("round {} of {rounds}", round + 1);
    }
    let mut cases = Vec::new();
    for ((w, t), found) in &values {
        let workload = &WORKLOADS[*w];
        let (unit, per) = if workload.block == 4096 { ("IOPS", 4096.0) } else { ("MiB/s", f64::from(1 << 20)) };
        let scaled = |all: &[f64]| all.iter().map(|bytes| bytes / per).collect::<Vec<_>>();
        let name = format!("{}/{}", Transport::ALL[*t].name(), workload.name);
        cases.push(Case {
            name,
            unit,
            values: scaled(found),
            raw: scaled(&values[&(*w, 0)]),
            tgt: vec![],
            libiscsi: vec![],
        });
    }
    cases.extend(name_cases(&bench, rounds)?);
    bench.finish();
    Ok(cases)
}

/// One round of a workload: the transports take turns in short slices, so that what else the machine does meets all of them.
fn side_by_side(
    bench: &mut Bench,
    chosen: &[usize],
    workload: Workload,
    time: Duration,
    round: u64,
) -> io::Result<BTreeMap<usize, Measured>> {
    let mut sums: BTreeMap<usize, Measured> = BTreeMap::new();
    for slice in 0..SLICES {
        for t in chosen {
            let transport = Transport::ALL[*t];
            go_on()?;
            // A first write has an end of its own, and a guest has to boot.
            let once = workload.kind == Kind::WriteOnce || transport == Transport::Guest;
            if once && slice > 0 {
                continue;
            }
            let time = if once { time } else { time / SLICES };
            if let Some(measured) = bench.measure(transport, workload, time, round * 100 + u64::from(slice))? {
                let sum = sums.entry(*t).or_default();
                *sum = sum.and(measured);
            }
        }
    }
    Ok(sums)
}

/// SIGINT or SIGTERM has come.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Lets a signal end the program by an error, so that everything is unmounted and removed.
fn heed_signals() {
    let handler = interrupt as extern "C" fn(libc::c_int) as *const () as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { libc::signal(signal, handler) };
    }
}

fn go_on() -> io::Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(io::Error::other("ended by a signal")) } else { Ok(()) }
}

/// Names on the mount against names of the file system that holds the LUN files.
fn name_cases(bench: &Bench, rounds: u64) -> io::Result<Vec<Case>> {
    let mut cases: BTreeMap<String, Case> = BTreeMap::new();
    for _ in 0..rounds {
        go_on()?;
        let raw = names(&bench.folder())?;
        let fuse = names(&bench.mount_point())?;
        for ((name, raw), (_, fuse)) in raw.into_iter().zip(fuse) {
            for (transport, value) in [("raw", raw), ("fuse", fuse)] {
                let case = format!("{transport}/{name}");
                let new = Case {
                    name: case.clone(),
                    unit: "1/s",
                    values: vec![],
                    raw: vec![],
                    tgt: vec![],
                    libiscsi: vec![],
                };
                let case = cases.entry(case).or_insert(new);
                case.values.push(value);
                case.raw.push(raw);
            }
        }
    }
    Ok(cases.into_values().collect())
}

fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    heed_signals();
    let cases = match measure(&arguments) {
        Ok(cases) => cases,
        Err(error) => {
            eprintln!("vmfs-bench: {error}");
            return std::process::ExitCode::FAILURE;
        }
    };
    print!("{}", table(&cases));
    if let Some(path) = &arguments.json
        && let Err(error) = fs::write(path, format!("{:#}\n", json(&cases)))
    {
        eprintln!("vmfs-bench: {}: {error}; give --json a path that can be written", path.display());
        return std::process::ExitCode::FAILURE;
    }
    std::process::ExitCode::SUCCESS
}
