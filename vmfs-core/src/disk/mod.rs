//! Owns: virtual disks: their kinds, creation, growth and copies, and the descriptor text beside the data.
//! Promises: a disk that is named is whole: its blocks and zeros are there as its kind says.
//! Must not know: FUSE, how a guest reaches the disk.

pub mod descriptor;
