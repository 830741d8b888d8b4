//! Owns: what all threads of a mount share.
//! Promises: everything here can be used from any thread without waiting for the actor.
//! Must not know: how requests are answered.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use lockd::gate_memory::SharedGateMemory;
use vmfs_core::env::Instant;
use vmfs_core::file::DataLuns;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::gate::Gate;
use vmfs_core::units::{LunIndex, Uuid};
use vmfs_core::volume::VolumeInfo;

use crate::actor::Actor;
use crate::handles::Handles;
use crate::inodes::Inodes;
use crate::lost_lun::LostLun;
use crate::recalls::Recalls;

/// Shared by the FUSE workers, the actor's jobs and the socket's connections.
pub struct State {
    /// The metadata actor.
    pub actor: Actor,
    /// What the kernel knows.
    pub inodes: Inodes,
    /// What the kernel has open.
    pub handles: Handles,
    /// Who has to let go of blocks before they are moved.
    pub recalls: Arc<Recalls>,
    /// The data paths of the LUNs.
    pub luns: Arc<DataLuns>,
    /// The volume.
    pub info: VolumeInfo,
    /// This host.
    pub host: Uuid,
    /// The gate page, as shared memory.
    pub gate: Arc<SharedGateMemory>,
    /// Path of the socket, once it listens.
    pub socket: OnceLock<PathBuf>,
    lost_lun: LostLun,
    ending: AtomicBool,
}

impl State {
    /// For a mounted volume.
    pub fn new(actor: Actor, info: VolumeInfo, luns: Arc<DataLuns>, host: Uuid, gate: Arc<SharedGateMemory>) -> State {
        State {
            actor,
            inodes: Inodes::new(info.root),
            handles: Handles::default(),
            recalls: Arc::default(),
            luns,
            info,
            host,
            gate,
            socket: OnceLock::new(),
            lost_lun: LostLun::default(),
            ending: AtomicBool::new(false),
        }
    }

    /// The object of a node number.
    pub fn object(&self, node: fuser::INodeNo) -> Option<ObjectRef> {
        self.inodes.object(node.0)
    }

    /// Bytes that programs are told to read and write at a time: a granule, the unit of a first write.
    pub fn io_bytes(&self) -> u32 {
        self.info.block_size.granule_bytes() as u32
    }

    /// The LUN that is lost while others are not, if there is one: asked for while a gate is closed.
    pub fn lost_alone(&self) -> Option<LunIndex> {
        let gate = Gate::open(self.gate.clone()).ok()?;
        let leases: Vec<(LunIndex, Instant)> = (1..=u8::MAX)
            .filter_map(LunIndex::new)
            .map(|lun| (lun, gate.lease_until(lun)))
            .filter(|(_, (generation, _))| generation.0 > 0)
            .map(|(lun, (_, until))| (lun, until))
            .collect();
        self.lost_lun.judge(lockd::clock::now(), &leases)
    }

    /// The mount ends: whoever waits for a gate gives up.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Whether the mount ends.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}
