//! The SCSI device server: CDB in, status and sense out; knows no transport.
#![forbid(unsafe_code)]
