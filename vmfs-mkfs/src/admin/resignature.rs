//! Owns: vmfs resignature.
//! Promises: facts go to standard output; what is asked for is done or refused as a whole, and after a cut it is given again.
//! Must not know: how a copy becomes a volume.

use std::rc::Rc;

use clap::Args;
use serde_json::json;
use vmfs_core::env::Env;
use vmfs_core::lun::OpenLun;
use vmfs_core::real_env::RealEnv;
use vmfs_core::resignature::{ResignatureOptions, Resignatured, resignature};

use super::AdminError;
use crate::terminal::{block_on, open_luns, progress_bar, say, say_json, watching};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cp --reflink=always lun0.img copy0.img && cp --reflink=always lun1.img copy1.img\n  \
vmfs resignature copy0.img copy1.img\n  vmfs resignature --label restored /dev/sdd /dev/sde\n\n\
Give copies of all LUNs of the volume, taken at the same moment, in any order; the original may be mounted all the while. The copies get\n\
a new volume UUID, new LUN UUIDs and a new label, and can be mounted beside the original. What hosts had under way when the copy was\n\
taken is recovered by the first mount. Cut off, it is given again with the same LUNs, and until then they are not mounted."
)]
pub(super) struct ResignatureArguments {
    /// Label of the new volume; else snap-, eight digits of its UUID, and the label of the original
    #[arg(short = 'L', long)]
    label: Option<String>,
    /// You are certain that LUNs which do not say who they are are copies. One that says that it is the original is refused all the same
    #[arg(long)]
    is_copy: bool,
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Copies of all LUNs of one volume
    #[arg(value_name = "LUN", required = true)]
    luns: Vec<String>,
}

pub(super) fn run(arguments: &ResignatureArguments) -> Result<(), AdminError> {
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    let luns = open_luns(&arguments.luns, OpenLun { read_only: false, refuse_busy_device: true })?;
    let options = ResignatureOptions { label: arguments.label.clone(), is_copy: arguments.is_copy };
    let bar = progress_bar("cells", false);
    let mut progress = |now: vmfs_core::resignature::Progress| {
        bar.set_length(now.total);
        bar.set_position(now.done);
    };
    let done = block_on(watching("vmfs resignature", resignature(&env, &luns, &options, &mut progress)));
    bar.finish_and_clear();
    let done = done?;
    match arguments.json {
        true => say_json(&facts(&done)),
        false => tell(&done),
    }
    Ok(())
}

fn facts(done: &Resignatured) -> serde_json::Value {
    let luns =
        done.luns.iter().map(|lun| json!({ "index": lun.index.get(), "name": lun.name, "uuid": lun.uuid.to_string() }));
    let left = done.left.iter().map(|slot| {
        json!({
            "lun": slot.lun.get(),
            "slot": slot.slot,
            "host_name": slot.host_name,
            "fence_grade": format!("{:?}", slot.fence_grade),
        })
    });
    json!({
        "from": done.from.map(|volume| volume.to_string()),
        "volume": done.volume.to_string(),
        "label": done.label,
        "resumed": done.resumed,
        "luns": luns.collect::<Vec<_>>(),
        "to_recover": left.collect::<Vec<_>>(),
    })
}

fn tell(done: &Resignatured) {
    let how = if done.resumed { " (ended what was cut off)" } else { "" };
    say(format!("volume   {}  {}{how}", done.label, done.volume));
    if let Some(from) = done.from {
        say(format!("copy of  {from}"));
    }
    for lun in &done.luns {
        say(format!("LUN {:<4} {}  {}", lun.index.get(), lun.name, lun.uuid));
    }
    for slot in &done.left {
        let what = "was using it when the copy was taken; the first mount recovers what it left";
        say(format!("slot {} of {}: host {:?} {what}", slot.slot, slot.lun, slot.host_name));
    }
}
