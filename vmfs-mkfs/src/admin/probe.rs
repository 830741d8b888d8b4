//! Owns: vmfs probe-lun.
//! Promises: nothing is written without a scratch block that the administrator names.
//! Must not know: SCSI commands.

use clap::Args;
use luns::{Probe, Trial};
use serde_json::{Value, json};
use vmfs_core::format::header::LockMode;
use vmfs_core::lun::OpenLun;

use super::AdminError;
use crate::size;
use crate::terminal::{say, say_json};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  vmfs probe-lun /dev/sdc                                        what it says of itself\n  \
vmfs probe-lun --scratch-offset 0 iscsi://10.0.0.1/iqn.2026-01.com.example:lun/0   and what it does\n\n\
With a scratch block, two initiators compare and write there, also at once, and one is shut out by its registration. The block\n\
has its bytes back at the end. On a LUN of a volume only the first MiB is free for that: 0 is a good place."
)]
pub(super) struct ProbeArguments {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Byte offset of a block that may be written to
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    scratch_offset: Option<u64>,
    /// Path or URL of the LUN
    lun: String,
}

pub(super) fn run(arguments: &ProbeArguments) -> Result<(), AdminError> {
    let facts = match luns::probe(&arguments.lun, arguments.scratch_offset)? {
        Some(probe) => of_unit(&probe),
        None => of_local(&arguments.lun)?,
    };
    if arguments.json {
        say_json(&facts);
    } else {
        show(&facts);
    }
    let failed = facts["trials"].as_array().is_some_and(|trials| trials.iter().any(|trial| trial["ok"] == false));
    if failed {
        Err(AdminError(format!("{}: not everything that was tried works; see above", arguments.lun)))
    } else {
        Ok(())
    }
}

/// An image file, or a block device that is no whole SCSI disk with COMPARE AND WRITE.
fn of_local(name: &str) -> Result<Value, AdminError> {
    let lun = vmfs_core::lun::open_lun(name, OpenLun { read_only: true, refuse_busy_device: false })?;
    Ok(json!({
        "name": lun.name(),
        "scsi": false,
        "bytes": lun.bytes(),
        "block_bytes": lun.cell_size().map(|cell| cell.bytes()),
        "identity": String::from_utf8_lossy(lun.identity().bytes()),
        "lock_mode": format!("{:?}", lun.lock_mode()),
        "shared": lun.lock_mode() == LockMode::CompareAndWrite,
        "fence_grade": "A",
        "trials": [],
    }))
}

fn of_unit(probe: &Probe) -> Value {
    let facts = &probe.facts;
    let provisioned = match facts.provisioning.kind {
        1 => "resource",
        2 => "thin",
        _ => "full",
    };
    let commands =
        probe.commands.iter().map(|one| json!({ "name": one.command, "supported": one.told, "needed": one.needed }));
    let trial =
        |trial: &Trial| json!({ "what": trial.what, "ok": trial.result.is_ok(), "found": trial.result.as_ref().err() });
    let types: Option<Vec<u8>> =
        probe.reservations.map(|can| (1..=8).filter(|kind| can.types != 0 && can.has(*kind)).collect());
    json!({
        "name": probe.name,
        "scsi": true,
        "vendor": facts.inquiry.vendor,
        "product": facts.inquiry.product,
        "revision": facts.inquiry.revision,
        "serial": facts.serial,
        "identity": probe.identity,
        "bytes": facts.capacity.bytes(),
        "block_bytes": facts.capacity.block_bytes,
        "physical_block_bytes": facts.capacity.physical_bytes,
        "provisioning": provisioned,
        "unmap": facts.provisioning.unmap,
        "unmapped_reads_zeros": facts.provisioning.reads_zeros,
        "write_cache": facts.caching.write_cache,
        "force_unit_access": facts.caching.force_unit_access,
        "write_protected": facts.caching.write_protected,
        "compare_and_write_blocks": facts.limits.compare_and_write,
        "commands": commands.collect::<Vec<_>>(),
        "reservation_types": types,
        "reservations_persist": probe.reservations.map(|can| can.can_persist),
        "untried": probe.untried,
        "trials": probe.trials.iter().map(trial).collect::<Vec<_>>(),
        "lock_mode": if probe.shared { "CompareAndWrite" } else { "SingleMachine" },
        "shared": probe.shared,
        "fence_grade": if probe.grade_a { "A" } else { "C" },
    })
}

fn show(facts: &Value) {
    let text = |key: &str| facts[key].as_str().unwrap_or("?").to_owned();
    let bytes = |key: &str| facts[key].as_u64().map_or("?".to_owned(), |bytes| bytes.to_string());
    say(format!(
        "{}: {}, blocks of {} bytes",
        text("name"),
        size::show(facts["bytes"].as_u64().unwrap_or(0)),
        bytes("block_bytes")
    ));
    say(format!("identity   {} (recorded by mkfs.vmfs; empty: copies cannot be told apart)", text("identity")));
    if facts["scsi"] == true {
        say(format!(
            "unit       {} {} {}, serial number {}",
            text("vendor"),
            text("product"),
            text("revision"),
            text("serial")
        ));
        say(format!("space      {} provisioned, UNMAP {}", text("provisioning"), yes(&facts["unmap"])));
        say(format!(
            "cache      write cache {}, FUA {}, write protected {}",
            yes(&facts["write_cache"]),
            yes(&facts["force_unit_access"]),
            yes(&facts["write_protected"])
        ));
        for command in facts["commands"].as_array().into_iter().flatten() {
            say(format!("command    {}: {}", command["name"].as_str().unwrap_or("?"), yes(&command["supported"])));
        }
        say(match &facts["reservation_types"] {
            Value::Null => "reserve    none: only time keeps out a host that has lost its lease".to_owned(),
            types => {
                format!("reserve    types {types}, kept over a loss of power: {}", yes(&facts["reservations_persist"]))
            }
        });
    }
    let trials = facts["trials"].as_array().map_or(&[][..], Vec::as_slice);
    for trial in trials {
        let found = trial["found"].as_str().map(|found| format!(": {found}")).unwrap_or_default();
        say(format!(
            "{}  {}{found}",
            if trial["ok"] == true { "ok       " } else { "FAILED   " },
            trial["what"].as_str().unwrap_or("?")
        ));
    }
    for why in facts["untried"].as_array().into_iter().flatten() {
        say(format!("not tried  {}", why.as_str().unwrap_or("?")));
    }
    if facts["scsi"] == true && trials.is_empty() {
        say("tried      nothing: name a block that may be written to with --scratch-offset");
    }
    say(match facts["shared"] == true {
        true => format!(
            "verdict    hosts on several machines can share it (COMPARE AND WRITE); fence grade {}",
            text("fence_grade")
        ),
        false => {
            "verdict    for the processes of one machine (lock mode SingleMachine); not safe to be shared by several"
                .to_owned()
        }
    });
}

fn yes(value: &Value) -> &'static str {
    match value.as_bool() {
        Some(true) => "yes",
        Some(false) => "no",
        None => "not told",
    }
}
