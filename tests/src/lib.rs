//! Promises checked across crates: cluster, crash, conformance, guests and benchmarks.
#![forbid(unsafe_code)]
