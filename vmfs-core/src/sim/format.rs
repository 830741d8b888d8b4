//! Owns: a shortcut for tests: a new volume on simulated LUNs.
//! Promises: what it makes is what mkfs makes.
//! Must not know: what is done with the volume.

use std::rc::Rc;

use super::disk::MemoryDisk;
use super::executor::{STORAGE, Sim};
use crate::env::Env;
use crate::error::FsError;
use crate::lun::Lun;
use crate::mkfs::{self, MkfsOptions, MkfsPlan};

/// Makes a volume of `disks`, in this order, through paths without faults.
pub async fn format_disks(sim: &Sim, disks: &[MemoryDisk], options: MkfsOptions) -> Result<MkfsPlan, FsError> {
    let env: Rc<dyn Env> = sim.env(STORAGE);
    let luns: Vec<Rc<dyn Lun>> = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(sim, STORAGE) }).collect();
    let plan = mkfs::plan(&env, &luns, options).await?;
    mkfs::execute(&env, &luns, &plan, &mut |_| ()).await?;
    Ok(plan)
}
