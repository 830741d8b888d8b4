//! The SCSI device server: CDB in, status and sense out; knows no transport.
#![deny(unsafe_code)]

pub mod block_device;
pub mod data_buffer;

pub use block_device::{BlockDevice, BlockStatus, ByteRange, Geometry, Identity, Provisioning, StorageError};
pub use data_buffer::{DataBuffer, KeepAlive, Segment, SegmentList};
