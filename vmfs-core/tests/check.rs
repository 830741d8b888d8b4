//! What the checker promises, on volumes in memory: a sound one is clean, a damaged one is told with structure and place, and
//! nothing makes it panic.

use std::rc::Rc;

use vmfs_core::check::{Finding, Report, Severity, Structure, check};
use vmfs_core::env::Env;
use vmfs_core::error::FsErrorKind;
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::{MkfsOptions, execute, plan};
use vmfs_core::sim::{HostNo, MemoryDisk, Sim};
use vmfs_core::units::{BlockSize, CellSize};

#[path = "check/content.rs"]
mod content;
#[path = "check/damage.rs"]
mod damage;
#[path = "check/lies.rs"]
mod lies;
#[path = "check/repair.rs"]
mod repair;

const MIB: u64 = 1 << 20;

/// LUNs in memory with a volume on them.
pub(crate) struct World {
    pub(crate) sim: Sim,
    pub(crate) env: Rc<dyn Env>,
    pub(crate) disks: Vec<MemoryDisk>,
    pub(crate) luns: Vec<Rc<dyn Lun>>,
}

pub(crate) fn world(sizes: &[u64], cell: CellSize) -> World {
    seeded_world(1, sizes, cell)
}

fn seeded_world(seed: u64, sizes: &[u64], cell: CellSize) -> World {
    let sim = Sim::new(seed);
    let env = sim.env(HostNo(1));
    let new = |(nth, bytes): (usize, &u64)| MemoryDisk::new(&format!("lun-{nth}"), *bytes, Some(cell));
    let disks: Vec<_> = sizes.iter().enumerate().map(new).collect();
    let luns = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(&sim, HostNo(1)) }).collect();
    World { sim, env, disks, luns }
}

impl World {
    pub(crate) fn make(self, shift: u8) -> World {
        let options = MkfsOptions { block_size: BlockSize::from_shift(shift).unwrap(), ..MkfsOptions::default() };
        self.sim.block_on(async {
            let plan = plan(&self.env, &self.luns, options).await.unwrap();
            execute(&self.env, &self.luns, &plan, &mut |_| ()).await.unwrap();
        });
        self
    }

    pub(crate) fn check(&self) -> (Report, Vec<Finding>) {
        let mut findings = Vec::new();
        let report = self.sim.block_on(check(&self.luns, &mut findings)).unwrap();
        let count = |severity| findings.iter().filter(|f| f.severity == severity).count() as u64;
        assert_eq!(report.errors, count(Severity::Error));
        assert_eq!(report.recoverable, count(Severity::Recoverable));
        (report, findings)
    }

    pub(crate) fn assert_clean(&self) -> Report {
        let (report, findings) = self.check();
        assert!(findings.is_empty(), "{}", listed(&findings));
        report
    }
}

pub(crate) fn listed(findings: &[Finding]) -> String {
    findings.iter().map(|finding| format!("{finding}\n")).collect()
}

#[test]
fn a_new_volume_is_clean_at_every_geometry() {
    for cell in [CellSize::B512, CellSize::B4096] {
        for (sizes, shift) in [(vec![64 * MIB], 20), (vec![128 * MIB], 24), (vec![64 * MIB, 80 * MIB], 16)] {
            let report = world(&sizes, cell).make(shift).assert_clean();
            assert_eq!((report.objects.directories, report.objects.files), (1, 0));
            assert_eq!(report.luns.len(), sizes.len());
            let first = &report.luns[0].1;
            assert_eq!((first.fd_containers, first.unit_containers, first.free), (1, 1, first.blocks - 2));
            assert_eq!(first.free_units, first.units - 1);
        }
    }
}

#[test]
fn what_cannot_be_checked_is_refused_with_its_reason() {
    let one = world(&[64 * MIB], CellSize::B512).make(20);
    let refusal = |luns: &[Rc<dyn Lun>]| {
        let mut findings = Vec::new();
        let error = one.sim.block_on(check(luns, &mut findings)).unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::Invalid);
        error.to_string()
    };
    assert!(refusal(&[]).contains("no LUN"));
    let twice = [one.luns[0].clone(), one.luns[0].clone()];
    assert!(refusal(&twice).contains("same LUN"));
    let other = seeded_world(2, &[64 * MIB], CellSize::B512).make(20);
    let sim_of_one = other.disks[0].connect(&one.sim, HostNo(1));
    assert!(refusal(&[one.luns[0].clone(), sim_of_one]).contains("give the LUNs of one volume"));
    let blank = MemoryDisk::new("blank", 64 * MIB, Some(CellSize::B512));
    assert!(refusal(&[blank.connect(&one.sim, HostNo(1))]).contains("no LUN of a VMFS volume"));
    let tiny = MemoryDisk::new("tiny", MIB, Some(CellSize::B512));
    assert!(refusal(&[tiny.connect(&one.sim, HostNo(1))]).contains("too few"));
}

#[test]
fn luns_are_taken_in_any_order_and_a_missing_one_is_told() {
    let mut two = world(&[64 * MIB, 80 * MIB], CellSize::B512).make(20);
    two.luns.reverse();
    two.assert_clean();
    let kept = two.luns.split_off(1);
    let (report, findings) = two.check();
    assert_eq!(report.missing.len(), 1, "{}", listed(&findings));
    assert!(
        findings.iter().any(|f| f.structure == Structure::Member && f.found.contains("lun1")),
        "{}",
        listed(&findings)
    );
    two.luns = kept;
    let (report, _) = two.check();
    assert_eq!((report.missing.len(), report.is_clean()), (1, false));
}

#[test]
fn a_truncated_lun_is_told() {
    let one = world(&[64 * MIB], CellSize::B512).make(20);
    one.disks[0].resize(40 * MIB);
    let (_, findings) = one.check();
    assert!(findings.iter().any(|f| f.structure == Structure::Lun && f.field == "size"), "{}", listed(&findings));
}
