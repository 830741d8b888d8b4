//! Owns: the last look of a run: a fresh mount reads everything back, then the checker looks at the LUNs.
//! Promises: nobody else is there any more; every name and every byte is compared.
//! Must not know: what happened before.

use std::rc::Rc;
use std::time::Duration;

use engine::check::{Finding, Severity, check};
use engine::error::{FsError, FsErrorKind};
use engine::file::OpenMode;
use engine::format::heartbeat::SlotState;
use engine::lun::Lun;
use engine::sim::HostNo;
use engine::slot;
use engine::units::SlotId;
use engine::volume::{Stat, Volume};

use super::names::{Done, Event};
use super::plan::PLACES;
use super::run::Run;
use super::stamp::{self, SECTOR};
use super::volume::mount_options;
use super::work::{file_id, id_of};

/// The host that looks at last.
const READER: HostNo = HostNo(9901);
/// The path of the checker.
const CHECKER: HostNo = HostNo(9902);

/// Tries to open what a host held that is gone, and the pause between them.
const TAKEOVER_TRIES: u32 = 60;
const TAKEOVER_PAUSE: Duration = Duration::from_millis(500);
/// Looks, that far apart, within which all that is left behind is recovered.
const RECOVERY_ROUNDS: u32 = 120;

/// Reads everything back and checks the LUNs.
pub async fn verify(run: &Rc<Run>) {
    let done = run.within(run.longest() * 4, async {
        if let Err(error) = read_back(run).await {
            run.find(format!("the volume cannot be read back: {error}"));
        }
        look_through(run).await;
    });
    if !done.await {
        run.find("the last look at the volume has not ended".to_owned());
    }
}

fn luns(run: &Run, host: HostNo) -> Vec<Rc<dyn Lun>> {
    run.disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(&run.sim, host) }).collect()
}

async fn read_back(run: &Rc<Run>) -> Result<(), FsError> {
    let env = run.sim.env(READER);
    let volume = Volume::mount(luns(run, READER), mount_options(99), env).await?;
    let background = volume.clone();
    drop(run.sim.spawn(READER, async move { background.background().await }));
    let mut files = Vec::new();
    for place in 0..PLACES {
        let (directory, name) = run.at(place);
        let from = run.sim.now();
        let event = match volume.lookup(directory, &name).await {
            Ok(stat) => {
                let id = id_of(&stat);
                files.push(stat);
                Event::Found(place, id)
            }
            Err(error) if error.kind() == FsErrorKind::NotFound => Event::Missing(place),
            Err(error) => return Err(error),
        };
        run.sim.sleep(Duration::from_micros(1)).await;
        run.history.borrow_mut().push(Done { from, to: run.sim.now(), certain: true, event });
    }
    let is_file = |stat: &Stat| stat.object_type == engine::format::root_cell::ObjectType::File;
    files.retain(is_file);
    files.extend(run.fresh.disks.iter().cloned());
    for stat in files {
        compare(run, &volume, &stat).await?;
    }
    wait_for_recovery(run, &volume).await?;
    volume.unmount().await
}

/// What hosts left that are gone is recovered by whoever is there: all slots but the own become free.
async fn wait_for_recovery(run: &Rc<Run>, volume: &Volume) -> Result<(), FsError> {
    let context = volume.context();
    for member in context.members() {
        let own = context.own_slot(member.index)?.slot;
        for round in 0..RECOVERY_ROUNDS {
            let slots = slot::read_slots(&context.io, &member.lun, member.index).await?;
            let left = slots.iter().enumerate().filter_map(|(number, found)| match found {
                Ok((_, heartbeat)) if heartbeat.state != SlotState::Free => Some(SlotId(number as u8)),
                _ => None,
            });
            let left: Vec<SlotId> = left.filter(|number| *number != own).collect();
            if left.is_empty() {
                break;
            }
            if round + 1 == RECOVERY_ROUNDS {
                run.find(format!("the slots {left:?} on {} are never recovered", member.index));
            }
            left.into_iter().for_each(|number| context.suspect(member.index, number));
            run.sim.sleep(TAKEOVER_PAUSE).await;
        }
    }
    Ok(())
}

async fn compare(run: &Run, volume: &Volume, stat: &Stat) -> Result<(), FsError> {
    let mut opened = volume.open(stat.object, OpenMode::READ).await;
    for _ in 0..TAKEOVER_TRIES {
        if !opened.as_ref().is_err_and(|error| error.kind() == FsErrorKind::Busy) {
            break;
        }
        // It was held by a host that is gone.
        run.sim.sleep(TAKEOVER_PAUSE).await;
        opened = volume.open(stat.object, OpenMode::READ).await;
    }
    let file = opened?;
    let size = volume.stat(stat.object).await?.attributes.size;
    let bytes = volume.files().read(&file, 0, size as usize).await?;
    volume.close(file).await?;
    run.file_of(file_id(stat), 0);
    let now = run.sim.now();
    let mut files = run.files.borrow_mut();
    let model = &mut files.get_mut(&file_id(stat)).expect("it is known").model;
    let mut results = vec![model.check_size(size, now)];
    for (nth, piece) in bytes.chunks_exact(SECTOR).enumerate() {
        let held = stamp::read(piece, model.number, nth as u32);
        results.push(model.check(nth as u32, held, None, now));
    }
    if bytes.len() as u64 != size {
        results.push(Err(format!("{} bytes of {size} can be read", bytes.len())));
    }
    for wrong in results.into_iter().filter_map(Result::err).take(3) {
        run.find(format!("read back: {wrong}"));
    }
    Ok(())
}

async fn look_through(run: &Rc<Run>) {
    let mut findings: Vec<Finding> = Vec::new();
    if let Err(error) = check(&luns(run, CHECKER), &mut findings).await {
        run.find(format!("the checker cannot look: {error}"));
    }
    let calm = run.is_calm() && !run.plan.nearly_full;
    findings.retain(|finding| calm || finding.severity == Severity::Error);
    for finding in findings.iter().take(3) {
        run.find(format!("the checker: {finding:?}"));
    }
}
