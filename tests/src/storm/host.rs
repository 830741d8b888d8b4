//! Owns: one host of the storm: its mount, the VM and the writer on it, which begin again whenever they have ended.
//! Promises: a signal goes only to a process that this host started and has not waited for; in the end nothing is left running or mounted.
//! Must not know: when signals are sent, what the programs note.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Luns, is_mounted, output, program, signal, system};
use crate::machines::vmm;
use crate::random::Random;

/// Disks of the VMs.
pub const VM_DISKS: u64 = 2;
/// Bytes of a disk that a VM works on.
pub const VM_BYTES: u64 = 4 << 20;
/// Generations that one run of a VM may use up.
pub const GENERATIONS: u64 = 1_000_000;

/// Name of a VM's disk.
pub fn vm_disk(number: u64) -> String {
    format!("vm{number}")
}

/// What the guests write is derived from this.
pub fn vm_seed(number: u64) -> u64 {
    100 + number
}

/// The processes of a host, in the order in which they depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// mount.vmfs.
    Mount,
    /// vmm.
    Vm,
    /// A writer of files.
    Writer,
}

/// All parts.
pub const PARTS: [Part; 3] = [Part::Mount, Part::Vm, Part::Writer];

/// One run of a VM.
#[derive(Debug)]
pub struct VmRun {
    /// The disk.
    pub disk: u64,
    /// First of its generations.
    pub generation: u64,
    /// What its guest said.
    pub log: PathBuf,
    /// When it was first seen to have its disk.
    pub began: Option<Instant>,
    /// When the last pass that it completed was first seen.
    pub progressed: Option<Instant>,
    passes: usize,
}

/// One host.
pub struct Host<'a> {
    /// Its number and name.
    pub number: u8,
    /// Its VMs so far.
    pub vm_runs: Vec<VmRun>,
    /// How often its mount ended by itself because it was fenced.
    pub fenced: u64,
    luns: &'a Luns,
    generations: &'a AtomicU64,
    point: PathBuf,
    children: [Option<Child>; 3],
    begin_at: [Instant; 3],
    killed: bool,
    /// Whether its mount was seen in the tree.
    was_up: bool,
    /// Whether the storage was out of its reach since its mount began.
    was_cut: bool,
    is_cut: bool,
    lives: u64,
    random: Random,
}

impl<'a> Host<'a> {
    /// A host without processes yet.
    pub fn new(luns: &'a Luns, number: u8, generations: &'a AtomicU64, seed: u64) -> Host<'a> {
        let point = luns.beside(format!("mnt{number}"));
        std::fs::create_dir_all(&point).expect("a mount point can be made");
        Host {
            number,
            vm_runs: Vec::new(),
            fenced: 0,
            luns,
            generations,
            point,
            children: [None, None, None],
            begin_at: [Instant::now(); 3],
            killed: false,
            was_up: false,
            was_cut: false,
            is_cut: false,
            lives: 0,
            random: Random::new(seed),
        }
    }

    /// Where the writers of this host note what they do.
    pub fn notes(&self) -> PathBuf {
        self.luns.beside(format!("notes{}", self.number))
    }

    /// What its mounts logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.luns.beside(format!("mount{}.log", self.number))
    }

    /// Sends a signal to a part, if it runs.
    pub fn signal(&mut self, part: Part, number: libc::c_int) -> bool {
        let Some(child) = &self.children[part as usize] else { return false };
        signal(child.id(), number);
        self.killed |= part == Part::Mount && number == libc::SIGKILL;
        true
    }

    /// Looks what has ended, and begins again what should run. An error is something that must not happen.
    pub fn look(&mut self, should_run: bool) -> Result<(), String> {
        if let Some(status) = self.ended(Part::Mount) {
            self.mount_ended(status)?;
        }
        for part in [Part::Vm, Part::Writer] {
            if self.ended(part).is_some() {
                self.pause(part, 300);
            }
        }
        self.watch_vm();
        if should_run && self.is_due(Part::Mount) {
            self.start_mount();
        }
        let is_up = self.children[Part::Mount as usize].is_some() && is_mounted(&self.point);
        self.was_up |= is_up;
        if should_run && is_up && self.is_due(Part::Writer) {
            self.start_writer();
        }
        if should_run && is_up && self.is_due(Part::Vm) {
            self.start_vm();
        }
        Ok(())
    }

    /// The storage gets out of its reach, or into it again.
    pub fn set_cut(&mut self, cut: bool) {
        self.is_cut = cut;
        self.was_cut |= cut;
    }

    /// Whether the storage is out of its reach.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Whether nothing of this host runs.
    pub fn is_gone(&self) -> bool {
        self.children.iter().all(Option::is_none)
    }

    fn ended(&mut self, part: Part) -> Option<ExitStatus> {
        let child = self.children[part as usize].as_mut()?;
        let status = child.try_wait().expect("a child can be waited for")?;
        self.children[part as usize] = None;
        Some(status)
    }

    fn is_due(&self, part: Part) -> bool {
        self.children[part as usize].is_none() && self.begin_at[part as usize] <= Instant::now()
    }

    fn pause(&mut self, part: Part, most_ms: u64) {
        self.begin_at[part as usize] = Instant::now() + Duration::from_millis(self.random.below(most_ms));
    }

    fn mount_ended(&mut self, status: ExitStatus) -> Result<(), String> {
        let killed = std::mem::replace(&mut self.killed, false);
        self.leave_tree();
        self.pause(Part::Mount, 4000);
        let log = self.log();
        let said = log.lines().rfind(|line| line.starts_with("mount.vmfs: ")).unwrap_or_default();
        match status.code() {
            Some(0) => Ok(()),
            Some(1) if said.contains("was fenced") => {
                self.fenced += 1;
                Ok(())
            }
            _ if killed => Ok(()),
            // Nobody can mount what is out of reach; a mount that is there waits.
            Some(1) if self.was_cut && !self.was_up => Ok(()),
            _ => Err(format!("the mount of host{} ended with {status}:\n{log}", self.number)),
        }
    }

    fn leave_tree(&self) {
        if is_mounted(&self.point) {
            output(system("umount").arg("-l").arg(&self.point));
        }
    }

    fn start_mount(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log");
        let mut mount = self.luns.mount_command(self.number, &self.point, &[]);
        mount.stdout(log.try_clone().expect("a log")).stderr(log);
        (self.was_up, self.was_cut) = (false, self.is_cut);
        self.start(Part::Mount, &mut mount);
    }

    fn start_writer(&mut self) {
        self.lives += 1;
        let mut writer = Command::new(program("host-program"));
        writer.arg("storm").arg(&self.point).arg(self.notes()).arg(format!("host{}", self.number));
        writer.args([self.random.bits().to_string(), self.lives.to_string()]);
        writer.stdout(Stdio::null()).stderr(Stdio::null());
        self.start(Part::Writer, &mut writer);
    }

    fn start_vm(&mut self) {
        let disk = self.random.below(VM_DISKS);
        let generation = self.generations.fetch_add(GENERATIONS, Ordering::Relaxed);
        let log = self.luns.beside(format!("vm-{}-{generation}.log", self.number));
        let job = format!(
            "job=verify size={VM_BYTES} bs=64k depth=8 seed={} passes={} generation={generation}",
            vm_seed(disk),
            GENERATIONS - 1
        );
        let path = self.point.join(format!("{}.vmdk", vm_disk(disk)));
        let mut machine = vmm(self.luns, &path, &job);
        machine.arg("--serial").arg(format!("file:{}", log.display())).stdout(Stdio::null()).stderr(Stdio::null());
        self.start(Part::Vm, &mut machine);
        self.vm_runs.push(VmRun { disk, generation, log, began: None, progressed: None, passes: 0 });
    }

    fn start(&mut self, part: Part, command: &mut Command) {
        let child = command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        self.children[part as usize] = Some(child);
    }

    /// Notes what the last VM has said since.
    fn watch_vm(&mut self) {
        let Some(run) = self.vm_runs.last_mut() else { return };
        let passes = passes(&run.log).len();
        let now = Instant::now();
        if run.began.is_none() && run.log.metadata().is_ok_and(|found| found.len() > 0) {
            run.began = Some(now);
        }
        if passes > run.passes {
            run.passes = passes;
            run.progressed = Some(now);
        }
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.leave_tree();
    }
}

/// A pass of a guest: everything was written, flushed, read back and compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Generation that it wrote.
    pub generation: u64,
    /// Sectors that were not as written.
    pub mismatches: u64,
    /// Whether the disk answered each of its commands well: only then what it wrote is acknowledged.
    pub is_acknowledged: bool,
}

/// The passes that a guest's log shows.
pub fn passes(log: &Path) -> Vec<Pass> {
    let said = std::fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    parse(said.rfind('\n').map_or("", |end| &said[..end]))
}

fn parse(said: &str) -> Vec<Pass> {
    let number = |line: &str, key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)?.parse().ok());
    let mut passes = Vec::new();
    let mut is_acknowledged = true;
    for line in said.lines() {
        if ["failed=write", "failed=flush", "failed=read"].contains(&line) {
            is_acknowledged = false;
        }
        if !line.starts_with("pass ") {
            continue;
        }
        if let (Some(generation), Some(mismatches)) = (number(line, "generation="), number(line, "mismatches=")) {
            passes.push(Pass { generation, mismatches, is_acknowledged });
        }
        is_acknowledged = true;
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_with_a_refused_command_acknowledges_nothing() {
        let said = "pass generation=1 bytes=9 mismatches=0\nwrite: answer=Check\nfailed=write\nfailed=compare\n\
                    pass generation=2 bytes=9 mismatches=4\nfailed=compare\npass generation=3 bytes=9 mismatches=5\npass genera";
        let seen =
            parse(said).iter().map(|pass| (pass.generation, pass.mismatches, pass.is_acknowledged)).collect::<Vec<_>>();
        assert_eq!(seen, [(1, 0, true), (2, 4, false), (3, 5, true)]);
    }
}
