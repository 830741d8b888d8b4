//! Owns: the answer of `iscsi-target status`: its shape, and how people read it.
//! Promises: what is told was true at one moment; times are in seconds, sizes in bytes, rates of the last second.
//! Must not know: how it is asked for.

use std::io::{self, Write};

use scsi::{ReservationView, TransportId};
use serde::{Deserialize, Serialize};

use iscsi::text;

/// What goes on.
#[derive(Debug, Deserialize, Serialize)]
pub struct Report {
    /// Age of the daemon in seconds.
    pub seconds: u64,
    /// Where it listens.
    pub portals: Vec<String>,
    /// Memory for the data of commands, in bytes: there can be, in use.
    pub memory: [u64; 2],
    /// Sessions: there can be, there are.
    pub sessions: [u64; 2],
    /// Connections that have not logged in: there can be, there are.
    pub arrivals: [u64; 2],
    /// Targets.
    pub targets: Vec<TargetReport>,
}

/// A target.
#[derive(Debug, Deserialize, Serialize)]
pub struct TargetReport {
    /// iSCSI name.
    pub name: String,
    /// LUNs.
    pub luns: Vec<LunReport>,
    /// Sessions.
    pub sessions: Vec<SessionReport>,
}

/// A LUN.
#[derive(Debug, Deserialize, Serialize)]
pub struct LunReport {
    /// Number.
    pub lun: u16,
    /// What stores it.
    pub path: String,
    /// Capacity.
    pub bytes: u64,
    /// Logical block in bytes.
    pub block_size: u32,
    /// Space is given back.
    pub thin: bool,
    /// Nobody may write.
    pub read_only: bool,
    /// The medium can be taken out.
    pub removable: bool,
    /// It is a CD-ROM.
    pub cdrom: bool,
    /// Persistent reservations survive a restart, as long as initiators ask for it.
    pub reservations_persist: bool,
    /// The reservation that is in force: type (SPC-4, table 70).
    pub reservation: Option<u8>,
    /// How often registrations or reservations have changed (PRGENERATION).
    pub reservation_generation: u32,
    /// Who is registered.
    pub registrants: Vec<RegistrantReport>,
    /// Unit serial number.
    pub serial: String,
}

/// A registered initiator port.
#[derive(Debug, Deserialize, Serialize)]
pub struct RegistrantReport {
    /// Its key, as a hexadecimal number.
    pub key: String,
    /// Its name, and its session identifier if it is known by one.
    pub initiator: String,
    /// The portal that it is registered at.
    pub portal: u16,
    /// It holds the reservation.
    pub holds: bool,
}

/// A session.
#[derive(Debug, Deserialize, Serialize)]
pub struct SessionReport {
    /// The initiator's name.
    pub initiator: String,
    /// Its part of the session identifier.
    pub isid: String,
    /// The target's part.
    pub tsih: u16,
    /// The initiator's address.
    pub peer: String,
    /// Number of the portal.
    pub portal: u16,
    /// Age in seconds.
    pub seconds: u64,
    /// Commands so far.
    pub commands: u64,
    /// Bytes read so far.
    pub bytes_read: u64,
    /// Bytes written so far.
    pub bytes_written: u64,
    /// Commands under way.
    pub queue_depth: u32,
    /// What it did in the last second.
    #[serde(flatten)]
    pub rates: Rates,
}

/// Rates of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Rates {
    /// Commands a second.
    pub iops: u64,
    /// Bytes read a second.
    pub read_bytes_per_second: u64,
    /// Bytes written a second.
    pub write_bytes_per_second: u64,
}

impl RegistrantReport {
    /// Those of a unit.
    pub fn all(view: &ReservationView) -> Vec<RegistrantReport> {
        let one = |registrant: &scsi::Registrant| RegistrantReport {
            key: format!("{:#018x}", registrant.key),
            initiator: match &registrant.initiator {
                TransportId::Iscsi { name, isid: Some(isid) } => format!("{name},{}", text::hexadecimal(isid)),
                TransportId::Iscsi { name, isid: None } => name.clone(),
                TransportId::ParallelScsi { address, .. } => format!("parallel SCSI {address}"),
            },
            portal: registrant.target_port,
            holds: registrant.holds,
        };
        view.registrants.iter().map(one).collect()
    }
}

impl Report {
    /// Prints it for people.
    ///
    /// # Errors
    /// Of `out`.
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        self.portals.iter().try_for_each(|portal| writeln!(out, "portal {portal}"))?;
        writeln!(out, "memory {} of {} bytes in use", self.memory[1], self.memory[0])?;
        writeln!(out, "{} of {} sessions", self.sessions[1], self.sessions[0])?;
        writeln!(out, "{} of {} connections that have not logged in", self.arrivals[1], self.arrivals[0])?;
        for target in &self.targets {
            writeln!(out, "target {}", target.name)?;
            target.luns.iter().try_for_each(|lun| lun.print(out))?;
            target.sessions.iter().try_for_each(|session| session.print(out))?;
        }
        Ok(())
    }
}

impl LunReport {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let flags = [
            ("thin", self.thin),
            ("read-only", self.read_only),
            ("removable", self.removable),
            ("CD-ROM", self.cdrom),
            ("reservations survive a restart", self.reservations_persist),
        ];
        let flags: String = flags.iter().filter(|(_, on)| *on).map(|(name, _)| format!(", {name}")).collect();
        writeln!(
            out,
            "  lun {}: {}, {} bytes in blocks of {}{flags}",
            self.lun, self.path, self.bytes, self.block_size
        )?;
        if let Some(kind) = self.reservation {
            writeln!(out, "    reserved, type {kind}")?;
        }
        for registrant in &self.registrants {
            let holds = if registrant.holds { ", holds the reservation" } else { "" };
            let RegistrantReport { key, initiator, portal, .. } = registrant;
            writeln!(out, "    key {key}: {initiator} at portal {portal}{holds}")?;
        }
        Ok(())
    }
}

impl SessionReport {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { initiator, tsih, peer, portal, seconds, commands, bytes_read, bytes_written, queue_depth, .. } =
            self;
        writeln!(out, "  session {tsih}: {initiator} from {peer} at portal {portal}, {seconds} s")?;
        writeln!(
            out,
            "    {commands} commands, {bytes_read} bytes read, {bytes_written} written; {queue_depth} under way"
        )?;
        let Rates { iops, read_bytes_per_second, write_bytes_per_second } = self.rates;
        writeln!(
            out,
            "    in the last second: {iops} commands, {read_bytes_per_second} bytes read, {write_bytes_per_second} written"
        )
    }
}
