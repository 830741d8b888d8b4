//! ONC RPC (RFC 5531) over TCP: messages, records, and a client with many calls in flight on one connection.
//!
//! There is no receiving thread. Whoever makes a call writes it to the socket himself, or leaves it to be written together with those of
//! others; one task of the same thread's executor reads the answers, looks after the connection, and makes a new one when it breaks.

mod calls;
mod client;
mod connection;
pub mod message;
mod receive;
pub mod record;

pub use calls::{Locate, Sending};
pub use client::{Answer, Call, Client, Gate, Options, Recovery};
pub use message::{Credential, Procedure};
