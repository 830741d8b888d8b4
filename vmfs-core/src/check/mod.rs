//! Owns: checking a volume that no host changes: the order of the passes and their totals.
//! Promises: nothing is written; foreign bytes never panic; memory grows with what is allocated, not with the size of the LUNs.
//! Must not know: command lines, repair, how findings are shown.
//!
//! ```text
//! headers, members, slots, arenas -> block tables (finds containers) -> unit containers -> root cells, bodies, mappings,
//! directories (claim what they reach) -> names -> tables again: what says that it is in use and nothing reaches
//! ```

mod directories;
pub mod dump;
mod finding;
mod mappings;
mod objects;
pub(crate) mod probe;
mod reader;
pub(crate) mod remedy;
mod slots;
mod sparse_bits;
mod state;
mod tables;
mod units;

pub use finding::{Finding, LunCounts, ObjectCounts, Observer, Phase, Progress, Report, Severity, Structure};

pub(crate) use units::structure_of;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::cas::CellIo;
use crate::env::Env;
use crate::error::FsError;
use crate::lun::Lun;
use crate::slot;
use crate::window::MemberLun;
use reader::Reader;
use remedy::Remedies;
use sparse_bits::SparseBits;
use state::{Checker, MemberView};

/// Checks the volume whose LUNs these are, in any order. Findings go to `observer` as they come.
///
/// The volume must not be mounted: a change under way looks like a fault. An error means that nothing could be checked: no LUN of
/// a volume, LUNs of several, one given twice. A member that is not given is a finding; what lies on it is not checked.
pub async fn check(luns: &[Rc<dyn Lun>], observer: &mut dyn Observer) -> Result<Report, FsError> {
    check_for_repair(luns, observer).await.map(|(report, _)| report)
}

/// As [`check`], with what would put right what is wrong.
pub(crate) async fn check_for_repair(
    luns: &[Rc<dyn Lun>],
    observer: &mut dyn Observer,
) -> Result<(Report, Remedies), FsError> {
    let mut findings = Vec::new();
    let probed = probe::probe_all(luns, &mut findings).await?;
    let reference = probe::reference_of(&probed);
    let context = probed[0].context;
    let header = &probed.iter().find(|member| member.header.lun_index == reference).expect("it is one of them").header;
    let report = Report { volume: header.volume_of(context.volume), label: header.label.clone(), ..Report::default() };
    let root = header.root;
    let by_index: BTreeMap<_, _> = probed.iter().map(|m| (m.header.lun_index, m.lun.clone())).collect();
    let mut checker = Checker::new(Reader::new(context, by_index), observer, root, report);
    findings.into_iter().for_each(|finding| checker.tell(finding));
    for member in &probed {
        let window = member.lun.as_member().and_then(MemberLun::window);
        if let Some(at) = window.as_ref().map(|window| window.at).or(member.header.window) {
            checker.windows.insert(member.header.lun_index, (at, window.map(|window| window.end())));
        }
    }
    for member in probed {
        let layout = member.layout();
        let counts = LunCounts { name: member.lun.name().to_owned(), ..LunCounts::default() };
        let view = MemberView {
            layout,
            slots: Vec::with_capacity(256),
            arenas: Vec::with_capacity(256),
            counts,
            fd_containers: BTreeSet::new(),
            unit_containers: BTreeSet::new(),
            table_pieces: BTreeSet::new(),
            unknown_blocks: SparseBits::default(),
            reached: SparseBits::default(),
            header: member.header,
        };
        checker.members.insert(view.header.lun_index, view);
    }
    checker.check_members(reference).await;
    checker.check_slots().await;
    checker.scan_block_tables().await;
    checker.check_root_place();
    checker.scan_unit_containers().await;
    checker.scan_objects().await;
    checker.check_names().await;
    checker.tell_of_named();
    checker.find_unreached_units().await;
    checker.find_unreached_blocks().await;
    Ok(checker.into_report())
}

/// The hosts that use a volume, in words: those whose heartbeat goes on while it is watched. At once when no slot is taken, else it
/// takes some seconds. LUNs without a readable header are passed over: [`check`] tells them.
pub async fn hosts_in_use(env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>]) -> Result<Vec<String>, FsError> {
    let members = probe::probe_copies(luns, &mut Vec::new()).await?;
    let each = members.iter().map(async |member| {
        let io = CellIo::new(member.context, env.clone());
        slot::hosts_in_use(&io, &member.lun, member.header.lun_index).await
    });
    let mut names = Vec::new();
    for found in futures_util::future::join_all(each).await {
        names.extend(found?.into_iter().map(|(slot, heartbeat)| format!("{} ({slot})", heartbeat.host_name)));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

impl Checker<'_> {
    /// The root directory lies in an FD container.
    fn check_root_place(&mut self) {
        let container = self.root.container();
        let Some(member) = self.members.get(&container.lun) else { return };
        if !member.fd_containers.contains(&container.block) && !member.unknown_blocks.contains(container.block.get()) {
            let expected = "an FD container, for the root directory is in it";
            self.error(Structure::BlockTable, container, Some(self.root), "kind", "another kind", expected);
            self.remedies.lost_containers.insert(container);
        }
    }

    fn into_report(mut self) -> (Report, Remedies) {
        let mut remedies = std::mem::take(&mut self.remedies);
        remedies.objects.extend(self.damaged.iter());
        remedies.units_reached = std::mem::take(&mut self.units_reached);
        self.report.luns = self.members.into_iter().map(|(lun, member)| (lun, member.counts)).collect();
        (self.report, remedies)
    }
}
