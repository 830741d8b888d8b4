//! Owns: vmfs dump.
//! Promises: it reads only, works on damaged volumes, and shows what fails its checks as that.
//! Must not know: how structures are printed.

use std::path::PathBuf;
use std::rc::Rc;

use clap::Args;
use lockd::protocol::AdminRequest;
use vmfs_core::check::dump::{Place, dump};
use vmfs_core::env::Env;
use vmfs_core::lun::OpenLun;
use vmfs_core::real_env::RealEnv;

use super::{AdminError, mounted};
use crate::terminal::{block_on, open_luns, say};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  vmfs dump /mnt/ds1/vm1/disk.vmdk          a file on a mounted volume
  vmfs dump --lun /dev/sdb header           also: copy, member N, slot N, arena N, root
  vmfs dump --lun /dev/sdb fd1.0.5          an object's root cell and body
  vmfs dump --lun /dev/sdb lun1+0x400000    the cell at a byte offset
  vmfs dump --lun /dev/sdb lun1:b7          a block's table entry; lun1:b7:u3: a unit and its entry")]
pub(super) struct DumpArguments {
    /// Read these LUNs, which need not be mounted
    #[arg(long = "lun", value_name = "LUN")]
    luns: Vec<String>,
    /// File on a mounted volume; with --lun: a place, as messages name it
    #[arg(value_name = "FILE|PLACE", required = true)]
    what: Vec<String>,
}

pub(super) fn run(arguments: &DumpArguments) -> Result<(), AdminError> {
    if !arguments.luns.is_empty() {
        return dump_luns(arguments);
    }
    let [path] = arguments.what.as_slice() else {
        return Err(AdminError("name one file, or give the LUNs with --lun".to_owned()));
    };
    let path = PathBuf::from(path);
    let file = mounted::name(&path)?;
    let value = mounted::ask(&file.directory, &path, AdminRequest::Dump { file: file.name }, "asking")?;
    say(value.get("text").and_then(|text| text.as_str()).unwrap_or("the mount gave no text").trim_end());
    Ok(())
}

fn dump_luns(arguments: &DumpArguments) -> Result<(), AdminError> {
    let words = arguments.what.join(" ");
    let place = Place::parse(&words).ok_or_else(|| {
        format!("{words:?} is no place; header, copy, root, member N, slot N, arena N, fd1.0.5, lun1+0x400000, lun1:b7 and lun1:b7:u3 are")
    })?;
    let text = block_on(async {
        let luns = open_luns(&arguments.luns, OpenLun { read_only: true, refuse_busy_device: false })?;
        let env: Rc<dyn Env> = Rc::new(RealEnv);
        dump(&env, &luns, place).await
    })?;
    say(text.trim_end());
    Ok(())
}
