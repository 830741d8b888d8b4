//! Benchmarks: ratios of interleaved rounds against the raw LUN file and against peers. Nothing here asserts a time.

pub mod initiator;
pub mod iscsi;
pub mod load;
pub mod report;
pub mod transport;
