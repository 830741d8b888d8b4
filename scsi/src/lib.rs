//! The SCSI device server: CDB in, status and sense out; knows no transport.
//!
//! A transport builds a [`Target`] from [`Disk`]s over its own [`BlockDevice`]s, describes each command as a
//! [`Command`] with its memory as [`DataBuffer`]s, and awaits [`Target::execute`]. Everything runs on the transport's
//! single-threaded executor; a READ or WRITE allocates nothing here.
#![deny(unsafe_code)]

mod attention;
mod background;
pub mod block_device;
pub mod cdb;
pub mod data_buffer;
mod disk;
pub mod inquiry;
mod mode;
pub mod path;
pub mod range_lock;
mod reply;
mod reservation;
pub mod sense;
pub mod target;
pub mod task;
mod task_set;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod transport_id;

pub use attention::UnitAttention;
pub use block_device::{BlockDevice, BlockStatus, ByteRange, Geometry, Identity, Provisioning, Space, StorageError};
pub use cdb::DeviceKind;
pub use data_buffer::{DataBuffer, KeepAlive, Segment, SegmentList};
pub use disk::{Disk, DiskOptions};
pub use inquiry::{Personality, ProductName};
pub use path::{PathAnswer, PathData, PathError, ScsiPath};
pub use reservation::{Registrant, ReservationStore, ReservationView, RestoreError, StoreError, check_record};
pub use sense::{SenseData, Status};
pub use target::Target;
pub use task::{Command, Completion, Lun, NexusId, ShortBuffer, TaskAttribute, TaskManagement, TaskManagementResponse};
pub use task_set::{MAX_TASKS, Task};
pub use transport_id::{AccessState, TargetPort, TransportId};
