//! The protocol of iSCSI (RFC 7143), apart from input and output: [`pdu`] has the bytes, [`text`] and [`login`] the negotiation.
#![forbid(unsafe_code)]

pub mod login;
pub mod pdu;
pub mod text;
