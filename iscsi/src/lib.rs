//! iSCSI (RFC 7143): what both sides share, apart from input and output ([`pdu`] has the bytes, [`text`] and [`login`] the negotiation),
//! and the [`initiator`].
#![deny(unsafe_code)]

pub mod initiator;
pub mod login;
pub mod pdu;
pub mod text;

#[cfg(test)]
mod corpora;
