//! The bare-metal fast test guest and its image.
#![forbid(unsafe_code)]
