//! Owns: where the bytes of a file lie: pointers, granules, runs, epochs; how space is asked for and pointers are published.
//! Promises: no pointer becomes visible to bytes that were not written; nothing is taken away from data in flight.
//! Must not know: names, FUSE, how bytes are moved.

pub mod allocate;
pub mod epoch;
pub mod granules;
pub mod publish;
pub mod runs;
pub mod tree;
