//! Owns: the transports that are compared, each with a filled disk of the same size on the same file system.
//! Promises: everything it made is unmounted, detached and removed when it is dropped.
//! Must not know: which workloads run, what the figures mean.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lockd::client::DirectFile;

use super::load::{Kind, Measured, Target, Workload, run};
use crate::harness::{Loop, Luns, Mount, OtherMount, command, is_mounted, output, run as run_command, system};

/// Size of each disk: larger than any cache of a device that matters, small enough to fill quickly.
pub const DISK_BYTES: u64 = 512 << 20;
/// Bytes of one first write.
pub const THIN_BYTES: u64 = 256 << 20;

/// A way to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// An image file.
    Raw,
    /// A loop device on an image file.
    Loop,
    /// A disk of the mount, by FUSE.
    Fuse,
    /// A disk of the mount, straight on the LUNs.
    Direct,
    /// A disk of the mount in the test guest, by PVSCSI.
    Guest,
    /// qemu-storage-daemon's FUSE export of a qcow2 image.
    QsdQcow2,
    /// A file of ext4 on a loop device.
    Ext4Loop,
}

impl Transport {
    /// All, raw first.
    pub const ALL: [Transport; 7] = [
        Transport::Raw,
        Transport::Loop,
        Transport::Fuse,
        Transport::Direct,
        Transport::Guest,
        Transport::QsdQcow2,
        Transport::Ext4Loop,
    ];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Raw => "raw",
            Transport::Loop => "loop",
            Transport::Fuse => "fuse",
            Transport::Direct => "direct",
            Transport::Guest => "guest",
            Transport::QsdQcow2 => "qsd-qcow2",
            Transport::Ext4Loop => "ext4-loop",
        }
    }
}

/// A program that is ended when dropped.
struct Running(Child, PathBuf);

impl Drop for Running {
    fn drop(&mut self) {
        crate::harness::signal(self.0.id(), libc::SIGTERM);
        let _ = self.0.wait();
        if is_mounted(&self.1) {
            let _ = output(system("umount").arg("-l").arg(&self.1));
        }
    }
}

/// All transports, ready. Fields are dropped in order: what lies on top goes first.
pub struct Bench {
    qsd: Option<Running>,
    ext4: OtherMount,
    _ext4_loop: Loop,
    raw_loop: Loop,
    mount: Option<Mount>,
    luns: Luns,
    kernel: PathBuf,
    fresh: u32,
}

fn direct_io(path: &Path) -> io::Result<Target> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
    Ok(Target::File(file.into()))
}

/// A loop device past the page cache, as all other transports are.
fn attach(file: &Path) -> Loop {
    Loop::attach_with(file, &["--direct-io=on"])
}

/// Fills a file or device with bytes, so that every block of it exists.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
    let piece = vec![0x3c; 4 << 20];
    for _ in 0..DISK_BYTES / piece.len() as u64 {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

impl Bench {
    /// Makes and fills everything.
    pub fn new() -> io::Result<Bench> {
        let luns = Luns::formatted(2, 3 << 10, &[]);
        let mount = luns.mount(1);
        let kernel = luns.beside("guest.elf");
        run_command(command("test-guest").arg("--output").arg(&kernel));
        for name in ["raw.img", "loop.img"] {
            fill(&luns.beside(name))?;
        }
        let raw_loop = attach(&luns.beside("loop.img"));
        let image = luns.beside("ext4.img");
        File::create(&image)?.set_len(2 * DISK_BYTES + (256 << 20))?;
        let ext4_loop = attach(&image);
        run_command(system("mkfs.ext4").arg("-q").arg(ext4_loop.device()));
        let ext4 = OtherMount::new(ext4_loop.device(), &luns.beside("ext4"));
        fill(&luns.beside("ext4/disk"))?;
        let mut bench =
            Bench { qsd: None, ext4, _ext4_loop: ext4_loop, raw_loop, mount: Some(mount), luns, kernel, fresh: 0 };
        for name in ["fuse", "direct", "guest"] {
            let disk = bench.disk(name, "eagerzeroedthick", DISK_BYTES);
            fill(&disk)?;
        }
        let qsd = bench.export_qcow2("disk.qcow2", DISK_BYTES)?;
        fill(&qsd.1)?;
        bench.qsd = Some(qsd);
        Ok(bench)
    }

    fn mount(&self) -> &Mount {
        self.mount.as_ref().expect("mounted until dropped")
    }

    /// The mount point, for workloads of names.
    pub fn mount_point(&self) -> PathBuf {
        self.mount().path().to_owned()
    }

    /// A folder of the file system on which the LUN files lie.
    pub fn folder(&self) -> PathBuf {
        self.luns.beside("")
    }

    /// Makes a disk; gives the path of its data.
    fn disk(&self, name: &str, format: &str, bytes: u64) -> PathBuf {
        let descriptor = self.mount().at(format!("{name}.vmdk"));
        run_command(command("vmfs").args(["disk", "create", "-s", &bytes.to_string(), "-d", format]).arg(&descriptor));
        self.mount().at(format!("{name}-flat.vmdk"))
    }

    /// Exports a new qcow2 image by FUSE.
    fn export_qcow2(&self, name: &str, bytes: u64) -> io::Result<Running> {
        let (image, point) = (self.luns.beside(name), self.luns.beside(format!("{name}.export")));
        run_command(system("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(bytes.to_string()));
        fs::write(&point, "")?;
        let child = system("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=file,filename={},cache.direct=on,aio=io_uring,discard=unmap",
                image.display()
            ))
            .args(["--blockdev", "driver=qcow2,node-name=disk,file=file,cache.direct=on", "--export"])
            .arg(format!("type=fuse,id=export,node-name=disk,mountpoint={},writable=on", point.display()))
            .stdin(Stdio::null())
            .spawn()?;
        let running = Running(child, point);
        let start = Instant::now();
        while !is_mounted(&running.1) {
            if start.elapsed() > Duration::from_secs(20) {
                return Err(io::Error::other("qemu-storage-daemon exports nothing"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(running)
    }

    /// Runs a workload on a transport. `None`: the transport does not have it.
    pub fn measure(
        &mut self,
        transport: Transport,
        workload: Workload,
        time: Duration,
        seed: u64,
    ) -> io::Result<Option<Measured>> {
        if workload.kind == Kind::WriteOnce {
            let thick = workload.name.starts_with("thick");
            let of_mount = matches!(transport, Transport::Fuse | Transport::Direct);
            if thick && !of_mount && transport != Transport::Raw {
                return Ok(None);
            }
            let format = if thick { "zeroedthick" } else { "thin" };
            return self.first_write(transport, workload, format).map(Some);
        }
        let target = match transport {
            Transport::Raw => direct_io(&self.luns.beside("raw.img"))?,
            Transport::Loop => direct_io(self.raw_loop.device())?,
            Transport::Fuse => direct_io(&self.mount().at("fuse-flat.vmdk"))?,
            Transport::Direct => {
                let path = self.mount().at("direct-flat.vmdk");
                Target::Direct(Box::new(DirectFile::open(&path, true).map_err(io::Error::other)?))
            }
            Transport::Guest => return self.guest(workload, time).map(Some),
            Transport::QsdQcow2 => direct_io(&self.luns.beside("disk.qcow2.export"))?,
            Transport::Ext4Loop => direct_io(&self.luns.beside("ext4/disk"))?,
        };
        run(target, workload, DISK_BYTES, time, seed).map(Some)
    }

    fn guest(&self, workload: Workload, time: Duration) -> io::Result<Measured> {
        let rw = match workload.kind {
            Kind::RandomRead => "randread",
            Kind::RandomWrite => "randwrite",
            Kind::Read => "read",
            Kind::Write | Kind::WriteOnce => "write",
        };
        let seconds = time.as_secs().max(1);
        let job = format!("job=bench rw={rw} bs={} depth={} seconds={seconds}", workload.block, workload.depth);
        let said = self.vmm("guest.vmdk", &job);
        let iops =
            said.split_whitespace().find_map(|word| word.strip_prefix("iops=")).and_then(|n| n.parse::<f64>().ok());
        let iops = iops.ok_or_else(|| io::Error::other(format!("the guest reports no rate: {said}")))?;
        Ok(Measured { requests: (iops * seconds as f64) as u64, elapsed: Duration::from_secs(seconds) })
    }

    fn vmm(&self, disk: &str, job: &str) -> String {
        let mut vmm = command("vmm");
        vmm.args(["run", "--memory", "128M", "--kernel"]).arg(&self.kernel);
        run_command(vmm.arg("--disk").arg(self.mount().at(disk)).args(["--cmdline", job]))
    }

    /// Sequential writes to a new disk (raw, loop: a new sparse file).
    fn first_write(&mut self, transport: Transport, workload: Workload, format: &str) -> io::Result<Measured> {
        self.fresh += 1;
        let name = format!("thin{}", self.fresh);
        let sparse = |path: PathBuf| File::create(&path).and_then(|file| file.set_len(THIN_BYTES)).map(|()| path);
        let once = |target: Target| run(target, workload, THIN_BYTES, Duration::ZERO, 0);
        match transport {
            Transport::Raw => {
                let path = sparse(self.luns.beside(&name))?;
                let measured = once(direct_io(&path)?);
                fs::remove_file(path)?;
                measured
            }
            Transport::Loop => {
                let path = sparse(self.luns.beside(&name))?;
                let device = attach(&path);
                let measured = once(direct_io(device.device())?);
                drop(device);
                fs::remove_file(path)?;
                measured
            }
            Transport::Ext4Loop => {
                let path = sparse(self.luns.beside(format!("ext4/{name}")))?;
                let measured = once(direct_io(&path)?);
                fs::remove_file(path)?;
                measured
            }
            Transport::QsdQcow2 => {
                let qsd = self.export_qcow2(&format!("{name}.qcow2"), THIN_BYTES)?;
                let measured = once(direct_io(&qsd.1)?);
                drop(qsd);
                fs::remove_file(self.luns.beside(format!("{name}.qcow2")))?;
                measured
            }
            Transport::Fuse | Transport::Direct | Transport::Guest => {
                let data = self.disk(&name, format, THIN_BYTES);
                let measured = match transport {
                    Transport::Fuse => once(direct_io(&data)?),
                    Transport::Direct => {
                        once(Target::Direct(Box::new(DirectFile::open(&data, true).map_err(io::Error::other)?)))
                    }
                    _ => {
                        let start = Instant::now();
                        let job = format!("job=write size={THIN_BYTES} bs={} depth={}", workload.block, workload.depth);
                        self.vmm(&format!("{name}.vmdk"), &job);
                        Ok(Measured { requests: THIN_BYTES / workload.block, elapsed: start.elapsed() })
                    }
                };
                fs::remove_file(&data)?;
                fs::remove_file(self.mount().at(format!("{name}.vmdk")))?;
                measured
            }
        }
    }

    /// Unmounts in order; an error of the mount's end is reported.
    pub fn finish(mut self) {
        self.qsd = None;
        if let Some(mount) = self.mount.take() {
            mount.unmount();
        }
        let _ = &self.ext4;
        self.luns.assert_clean();
    }
}
