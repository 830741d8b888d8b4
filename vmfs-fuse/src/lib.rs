//! mount.vmfs: FUSE callbacks, the extent ioctl and the gate page.
#![forbid(unsafe_code)]
