//! The host's slots, heartbeats and gate page, and the client library of whoever moves data.
#![forbid(unsafe_code)]
