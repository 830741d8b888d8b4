//! Owns: the command mkfs.vmfs.
//! Promises: the plan is printed before anything is written; nothing is written when any LUN is refused.
//! Must not know: how a volume is made.

use std::ffi::OsString;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Parser, ValueEnum};
use serde_json::json;
use vmfs_core::env::Env;
use vmfs_core::error::FsError;
use vmfs_core::format::header::{LeaseTimes, MAX_LABEL};
use vmfs_core::lun::OpenLun;
use vmfs_core::mkfs::{MkfsOptions, MkfsPlan, MkfsSummary, execute, plan};
use vmfs_core::real_env::RealEnv;
use vmfs_core::units::{BlockSize, CellSize};

use crate::size;
use crate::terminal::{FAILED, USAGE, block_on, fail, open_luns, progress_bar, say, say_json, usage, watching};

const AFTER_HELP: &str = "\
Examples:
  mkfs.vmfs -L ds1 /dev/sdb /dev/sdc
  truncate -s 10G lun0.img lun1.img && mkfs.vmfs -L ds1 lun0.img lun1.img
  mkfs.vmfs -n -L ds1 lun0.img            shows the plan, writes nothing

A LUN that holds something known, or a volume, is refused unless --force is given. Whether a host still uses a volume is seen by
watching its heartbeat, which takes a few seconds.
Exit status: 0 made, 1 refused or failed, 2 usage.";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Lease {
    /// Renewed every 2 s, takeover after about 23 s
    Default,
    /// Renewed every 1 s, takeover after about 13 s
    Fast,
    /// Renewed every 5 s, takeover after about 63 s
    Slow,
}

/// Makes a VMFS volume on one or more LUNs.
#[derive(Debug, Parser)]
#[command(name = "mkfs.vmfs", version, after_help = AFTER_HELP)]
struct Arguments {
    /// LUNs: image files or block devices; the first one holds the root directory
    #[arg(value_name = "LUN", required = true)]
    luns: Vec<String>,
    /// Label of the volume, at most 64 bytes
    #[arg(short = 'L', long, default_value = "", value_parser = parse_label)]
    label: String,
    /// File block: a power of two, 64K to 16M
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "1M", value_parser = parse_block)]
    block: BlockSize,
    /// Unit of compare-and-write: 512 or 4096 bytes [default: the LUNs' logical block size]
    #[arg(long, value_name = "BYTES", value_parser = parse_cell)]
    cell: Option<CellSize>,
    /// How long a host's lease lasts
    #[arg(long, value_enum, default_value_t = Lease::Default)]
    lease: Lease,
    /// Overwrite what the LUNs hold, also a volume that a host uses
    #[arg(short = 'f', long)]
    force: bool,
    /// Show the plan and write nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Print plan and summary as JSON
    #[arg(long)]
    json: bool,
    /// As mkfs(8) may pass it: the type
    #[arg(short = 't', hide = true, value_name = "TYPE")]
    file_system_type: Option<String>,
}

fn parse_label(text: &str) -> Result<String, String> {
    match text.len() {
        0..=MAX_LABEL => Ok(text.to_owned()),
        length => Err(format!("a label has at most {MAX_LABEL} bytes, this one has {length}")),
    }
}

fn parse_block(text: &str) -> Result<BlockSize, String> {
    let bytes = size::parse(text)?;
    BlockSize::from_bytes(bytes).ok_or_else(|| format!("{text} is no block size: a power of two from 64K to 16M"))
}

fn parse_cell(text: &str) -> Result<CellSize, String> {
    match text {
        "512" => Ok(CellSize::B512),
        "4096" | "4k" | "4K" => Ok(CellSize::B4096),
        _ => Err("a cell has 512 or 4096 bytes".to_owned()),
    }
}

/// Runs the command and gives its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error, USAGE),
    };
    match block_on(make(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail("mkfs.vmfs", error, FAILED),
    }
}

fn options(arguments: &Arguments) -> MkfsOptions {
    MkfsOptions {
        label: arguments.label.clone(),
        block_size: arguments.block,
        cell_size: arguments.cell,
        lease: match arguments.lease {
            Lease::Default => LeaseTimes::DEFAULT,
            Lease::Fast => LeaseTimes::FAST,
            Lease::Slow => LeaseTimes::SLOW,
        },
        force: arguments.force,
        root_uid: rustix::process::geteuid().as_raw(),
        root_gid: rustix::process::getegid().as_raw(),
        ..MkfsOptions::default()
    }
}

async fn make(arguments: &Arguments) -> Result<(), FsError> {
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    let how = OpenLun { read_only: arguments.dry_run, refuse_busy_device: true };
    let luns = open_luns(&arguments.luns, how)?;
    let plan = watching("mkfs.vmfs", plan(&env, &luns, options(arguments))).await?;
    if !arguments.json {
        say(plan.to_string().trim_end());
    }
    if arguments.dry_run {
        if arguments.json {
            say_json(&facts(&plan, None));
        } else {
            say("nothing was written (dry run)");
        }
        return Ok(());
    }
    let bar = progress_bar("writing", true);
    let summary = execute(&env, &luns, &plan, &mut |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
    })
    .await;
    bar.finish_and_clear();
    let summary = summary?;
    if arguments.json {
        say_json(&facts(&plan, Some(&summary)));
    } else {
        let free = (summary.blocks - summary.used_blocks) * plan.options.block_size.bytes();
        say(format!("made: {} written, {} free for files", size::show(summary.written_bytes), size::show(free)));
        let paths = arguments.luns.join(",");
        say(format!("mount it with: mount.vmfs {paths} DIRECTORY"));
    }
    Ok(())
}

fn facts(plan: &MkfsPlan, summary: Option<&MkfsSummary>) -> serde_json::Value {
    let luns = plan.luns.iter().map(|lun| {
        json!({
            "index": lun.index().get(),
            "name": lun.name,
            "uuid": lun.lun_uuid.to_string(),
            "bytes": lun.bytes,
            "blocks": lun.layout.block_count(),
            "overwrites": lun.overwrites,
        })
    });
    json!({
        "volume": plan.volume.to_string(),
        "label": plan.options.label,
        "cell_bytes": plan.cell_size.bytes(),
        "block_bytes": plan.options.block_size.bytes(),
        "capacity_bytes": plan.capacity(),
        "luns": luns.collect::<Vec<_>>(),
        "made": summary.is_some(),
        "written_bytes": summary.map(|summary| summary.written_bytes),
        "used_blocks": summary.map(|summary| summary.used_blocks),
    })
}
