//! Owns: INQUIRY: standard data and the vital product data pages of a disk, and the limits that they announce.
//! Promises: the pages say the same as the command code does: both take the limits from here.
//! Must not know: transports, mode pages, how blocks are stored.

use crate::block_device::{Geometry, Identity};
use crate::cdb::DeviceKind;
use crate::sense::Sense;
use crate::transport_id::TargetPort;

/// The most bytes that one READ, WRITE or VERIFY moves; more is refused (VPD B0, maximum transfer length).
pub const MAX_TRANSFER_BYTES: u64 = 32 << 20;
/// The most bytes that one WRITE SAME covers (VPD B0, maximum write same length).
pub const MAX_WRITE_SAME_BYTES: u64 = 1 << 30;
/// The transfer size that costs least per byte (VPD B0, optimal transfer length).
pub const OPTIMAL_TRANSFER_BYTES: u64 = 1 << 20;
/// The most blocks that one UNMAP command gives back (VPD B0).
pub const MAX_UNMAP_BLOCKS: u64 = 1 << 20;
/// The most descriptors of one UNMAP command (VPD B0).
pub const MAX_UNMAP_DESCRIPTORS: usize = 256;
/// The most blocks of one COMPARE AND WRITE (VPD B0).
pub const MAX_COMPARE_AND_WRITE_BLOCKS: u64 = 128;

/// The most target descriptors of one EXTENDED COPY.
pub const MAX_COPY_TARGETS: usize = 16;
/// The most segment descriptors of one EXTENDED COPY.
pub const MAX_COPY_SEGMENTS: usize = 64;
/// The most bytes of the descriptors of one EXTENDED COPY.
pub const MAX_COPY_LIST: usize = 16 * 32 + 64 * 28;
/// The most bytes that one segment of an EXTENDED COPY copies.
pub const MAX_COPY_SEGMENT_BYTES: u64 = 65535 * 4096;

/// Which generation of virtual disk a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Personality {
    /// SCSI-2: guests read no vital product data and no 16-byte capacity, so there is no thin provisioning.
    Legacy,
    /// SPC-4 with vital product data.
    Modern,
}

/// What a unit calls itself in INQUIRY. Fields are padded with spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductName {
    /// T10 vendor identification.
    pub vendor: [u8; 8],
    /// Product identification.
    pub product: [u8; 16],
    /// Product revision level.
    pub revision: [u8; 4],
}

impl ProductName {
    /// The name of an ESX virtual disk of the given generation.
    pub const fn virtual_disk(personality: Personality) -> Self {
        let revision = match personality {
            Personality::Legacy => *b"1.0 ",
            Personality::Modern => *b"2.0 ",
        };
        Self { vendor: *b"VMware  ", product: *b"Virtual disk    ", revision }
    }

    /// The name of a CD-ROM drive with an image file in it.
    pub const fn virtual_cdrom() -> Self {
        Self { vendor: *b"VMware  ", product: *b"Virtual CD-ROM  ", revision: *b"1.0 " }
    }
}

/// What a unit says about the ports of its target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortView<'a> {
    /// All of them.
    pub(crate) ports: &'a [TargetPort],
    /// Relative identifier of the one through which it is asked.
    pub(crate) own: u16,
    /// SCSI name string of the target device.
    pub(crate) device_name: Option<&'a str>,
}

/// What kind of unit INQUIRY is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnitKind {
    pub(crate) device: DeviceKind,
    /// The medium can be taken out.
    pub(crate) removable: bool,
}

impl UnitKind {
    /// Peripheral device type.
    fn code(self) -> u8 {
        match self.device {
            DeviceKind::Disk => 0x00,
            DeviceKind::CdRom => 0x05,
        }
    }
}

/// Standard INQUIRY data (SPC-4, 6.6.2): 36 bytes for the legacy personality, 96 for the modern one.
pub(crate) fn standard(personality: Personality, name: &ProductName, kind: UnitKind, ports: &PortView<'_>) -> Vec<u8> {
    let mut data = match personality {
        // Response data format 2, wide 16-bit bus, synchronous transfers, command queueing.
        Personality::Legacy => vec![0x00, 0, 0x02, 0x02, 31, 0, 0, 0x32],
        // SPC-4; hierarchical LUNs, format 2; third-party copy; command queueing.
        Personality::Modern => vec![0x00, 0, 0x06, 0x12, 91, 0x08, 0, 0x02],
    };
    // Implicit asymmetric access, where there can be several ways to the unit: ports that others can name.
    let several_ways = ports.ports.iter().any(|port| port.name.is_some());
    if personality == Personality::Modern && several_ways {
        data[5] |= 0x10;
    }
    data[0] = kind.code();
    data[1] = u8::from(kind.removable) << 7;
    data.extend_from_slice(&name.vendor);
    data.extend_from_slice(&name.product);
    data.extend_from_slice(&name.revision);
    if personality == Personality::Modern {
        data.resize(96, 0);
        // Version descriptors: SAM-5, SPC-4, and SBC-3 or MMC-6 (SPC-4, table 144).
        data[58..62].copy_from_slice(&[0x00, 0xA0, 0x04, 0x60]);
        data[62..64].copy_from_slice(match kind.device {
            DeviceKind::Disk => &[0x04, 0xC0],
            DeviceKind::CdRom => &[0x04, 0xE0],
        });
    }
    data
}

/// Standard INQUIRY data of a LUN where there is nothing: peripheral qualifier 3, type 1Fh.
pub(crate) fn standard_of_absent_unit() -> Vec<u8> {
    let mut data = vec![0x7F, 0, 0x06, 0x12, 31, 0, 0, 0x02];
    data.resize(36, b' ');
    data
}

/// Standard INQUIRY data of the well known unit REPORT LUNS: type 1Eh.
pub(crate) fn standard_of_well_known_unit() -> Vec<u8> {
    let mut data = vec![0x1E, 0, 0x06, 0x12, 31, 0, 0, 0x02];
    data.resize(36, b' ');
    data
}

/// A vital product data page.
pub(crate) fn vital_page(
    page: u8,
    geometry: &Geometry,
    identity: &Identity,
    name: &ProductName,
    unit: &UnitView<'_>,
) -> Result<Vec<u8>, Sense> {
    let disk = unit.kind.device == DeviceKind::Disk;
    let body = match page {
        0x00 if disk => vec![0x00, 0x80, 0x83, 0x86, 0x88, 0x8F, 0xB0, 0xB1, 0xB2],
        0x00 => vec![0x00, 0x80, 0x83, 0x86, 0x88],
        0x80 => identity.serial.as_bytes().to_vec(),
        0x83 => device_identification(identity, name, &unit.ports),
        0x86 => extended_inquiry(geometry),
        0x88 => scsi_ports(&unit.ports),
        0x8F if disk => third_party_copy(),
        0xB0 if disk => block_limits(geometry, unit.atomic_write_bytes),
        0xB1 if disk => block_device_characteristics(geometry),
        0xB2 if disk => provisioning(geometry),
        _ => return Err(Sense::cdb_field(2, Some(7))),
    };
    let mut data = vec![unit.kind.code(), page];
    data.extend_from_slice(&(body.len() as u16).to_be_bytes());
    data.extend_from_slice(&body);
    Ok(data)
}

/// What a unit's vital product data depend on, beside its device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnitView<'a> {
    pub(crate) kind: UnitKind,
    pub(crate) ports: PortView<'a>,
    /// The most bytes that are written as a whole or not at all.
    pub(crate) atomic_write_bytes: u32,
}

fn designator(body: &mut Vec<u8>, code_set: u8, association_and_type: u8, value: &[u8]) {
    body.extend_from_slice(&[code_set, association_and_type, 0, value.len() as u8]);
    body.extend_from_slice(value);
}

/// A SCSI name string: a null ends it, zeros pad it to a multiple of 4 (SPC-4, 7.8.5.10).
fn name_string(body: &mut Vec<u8>, association: u8, name: &str) {
    let mut value = name.as_bytes()[..name.len().min(250)].to_vec();
    value.resize((value.len() + 1).next_multiple_of(4), 0);
    // iSCSI, code set UTF-8, protocol identifier valid.
    designator(body, 0x53, 0x80 | association | 0x08, &value);
}

/// The T10 vendor designator of a unit (SPC-4, 7.8.5.4).
pub(crate) fn t10_designator(identity: &Identity, name: &ProductName) -> Vec<u8> {
    let serial = &identity.serial.as_bytes()[..identity.serial.len().min(200)];
    [&name.vendor, serial].concat()
}

/// Page 83h (SPC-4, 7.8.5): T10 vendor and NAA designators; relative port, group and names of the port and the target.
fn device_identification(identity: &Identity, name: &ProductName, view: &PortView<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    designator(&mut body, 0x02, 0x01, &t10_designator(identity, name));
    designator(&mut body, 0x01, 0x03, &identity.naa);
    let [high, low] = view.own.to_be_bytes();
    designator(&mut body, 0x01, 0x14, &[0, 0, high, low]);
    if let Some(port) = view.ports.iter().find(|port| port.relative_id == view.own) {
        let [high, low] = port.group.to_be_bytes();
        designator(&mut body, 0x01, 0x15, &[0, 0, high, low]);
        if let Some(name) = &port.name {
            name_string(&mut body, 0x10, name);
        }
    }
    if let Some(name) = view.device_name {
        name_string(&mut body, 0x20, name);
    }
    body
}

/// Page 88h (SPC-4, 7.8.14): the target's ports with their names.
fn scsi_ports(view: &PortView<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    for port in view.ports {
        let mut names = Vec::new();
        if let Some(name) = &port.name {
            name_string(&mut names, 0x10, name);
        }
        let [high, low] = port.relative_id.to_be_bytes();
        body.extend_from_slice(&[0, 0, high, low, 0, 0, 0, 0, 0, 0]);
        body.extend_from_slice(&(names.len() as u16).to_be_bytes());
        body.extend_from_slice(&names);
    }
    body
}

/// Page 8Fh (SPC-4, 7.8.17): what EXTENDED COPY and RECEIVE COPY RESULTS can do.
fn third_party_copy() -> Vec<u8> {
    // Commands: 83h with service action 0; 84h with 0, 3 and 4.
    let mut body = vec![0x00, 0x01, 0, 12, 8, 0x83, 1, 0x00, 0x84, 3, 0x00, 0x03, 0x04, 0, 0, 0];
    // Parameter data: at most so many target and segment descriptors, of so many bytes; no inline data.
    body.extend_from_slice(&[0x00, 0x04, 0, 28, 0, 0, 0, 0]);
    body.extend_from_slice(&(MAX_COPY_TARGETS as u16).to_be_bytes());
    body.extend_from_slice(&(MAX_COPY_SEGMENTS as u16).to_be_bytes());
    body.extend_from_slice(&(MAX_COPY_LIST as u32).to_be_bytes());
    body.extend_from_slice(&[0; 16]);
    // Descriptors: block to block, identification.
    body.extend_from_slice(&[0x00, 0x08, 0, 4, 2, 0x02, 0xE4, 0]);
    // General copy operations: concurrent copies; the largest segment, in granules of 2^9 bytes.
    body.extend_from_slice(&[0x80, 0x01, 0, 32]);
    body.extend_from_slice(&[0, 0, 1, 0, 0, 0, 1, 0]);
    body.extend_from_slice(&(MAX_COPY_SEGMENT_BYTES as u32).to_be_bytes());
    body.extend_from_slice(&[9, 0]);
    body.extend_from_slice(&[0; 18]);
    body
}

/// Page 86h (SPC-4, 7.8.7): simple, ordered and head of queue task attributes, volatile cache.
fn extended_inquiry(geometry: &Geometry) -> Vec<u8> {
    let mut body = vec![0; 0x3C];
    body[1] = 0x01 | 0x02 | 0x04;
    body[2] = u8::from(geometry.write_cache);
    body
}

/// Page B0h (SBC-3, 6.6.4).
fn block_limits(geometry: &Geometry, atomic_write_bytes: u32) -> Vec<u8> {
    let logical = u64::from(geometry.logical_block);
    let blocks32 = |bytes: u64| ((bytes / logical) as u32).to_be_bytes();
    let mut body = vec![0; 0x3C];
    // WSNZ: WRITE SAME of 0 blocks, which would go on to the end of the disk, is refused.
    body[0] = 0x01;
    body[1] = MAX_COMPARE_AND_WRITE_BLOCKS as u8;
    let granularity = (geometry.transfer_granularity / geometry.logical_block).max(1);
    body[2..4].copy_from_slice(&(granularity.min(0xFFFF) as u16).to_be_bytes());
    body[4..8].copy_from_slice(&blocks32(MAX_TRANSFER_BYTES));
    body[8..12].copy_from_slice(&blocks32(OPTIMAL_TRANSFER_BYTES));
    if geometry.thin {
        body[16..20].copy_from_slice(&(MAX_UNMAP_BLOCKS as u32).to_be_bytes());
        body[20..24].copy_from_slice(&(MAX_UNMAP_DESCRIPTORS as u32).to_be_bytes());
        body[24..28].copy_from_slice(&blocks32(u64::from(geometry.unmap_granularity)));
        // UGAVALID, alignment 0.
        body[28] = 0x80;
    }
    body[32..40].copy_from_slice(&(MAX_WRITE_SAME_BYTES / logical).to_be_bytes());
    if atomic_write_bytes != 0 {
        let blocks = blocks32(u64::from(atomic_write_bytes));
        // The largest length; any alignment and granularity, no boundaries inside of a write.
        body[40..44].copy_from_slice(&blocks);
    }
    body
}

/// Page B1h (SBC-3, 6.6.2): rotation rate 1 means a medium that does not rotate, 0 that it is not reported.
fn block_device_characteristics(geometry: &Geometry) -> Vec<u8> {
    let mut body = vec![0; 0x3C];
    body[1] = u8::from(!geometry.rotational);
    // WABEREQ: blocks that SANITIZE has erased are read without an error.
    body[3] = 0x40;
    body
}

/// Page B2h (SBC-3, 6.6.5).
fn provisioning(geometry: &Geometry) -> Vec<u8> {
    if !geometry.thin {
        return vec![0; 4];
    }
    // UNMAP, WRITE SAME(16) and WRITE SAME(10) with UNMAP; LBPRZ; type thin.
    let zeros = if geometry.unmapped_reads_zero { 0x04 } else { 0 };
    vec![0, 0x80 | 0x40 | 0x20 | zeros, 2, 0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{GEOMETRY, identity};

    const NAME: ProductName = ProductName::virtual_disk(Personality::Modern);
    const KIND: UnitKind = UnitKind { device: DeviceKind::Disk, removable: false };
    const UNIT: UnitView<'_> =
        UnitView { kind: KIND, ports: PortView { ports: &[], own: 1, device_name: None }, atomic_write_bytes: 4096 };

    #[test]
    fn standard_data_has_the_length_that_it_announces() {
        for (personality, length) in [(Personality::Legacy, 36), (Personality::Modern, 96)] {
            let data = standard(personality, &NAME, KIND, &UNIT.ports);
            assert_eq!((data.len(), usize::from(data[4]) + 5), (length, length));
            assert_eq!(&data[8..36], b"VMware  Virtual disk    2.0 ");
        }
    }

    #[test]
    fn every_page_of_the_list_exists_and_has_the_length_that_it_announces() {
        let list = vital_page(0, &GEOMETRY, &identity(), &NAME, &UNIT).unwrap();
        assert!(list[4..].is_sorted());
        for &page in &list[4..] {
            let data = vital_page(page, &GEOMETRY, &identity(), &NAME, &UNIT).unwrap();
            assert_eq!(data[1], page);
            assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])) + 4, data.len());
        }
        assert_eq!(vital_page(0x81, &GEOMETRY, &identity(), &NAME, &UNIT), Err(Sense::cdb_field(2, Some(7))));
    }

    #[test]
    fn block_limits_let_linux_enable_unmap() {
        let page = vital_page(0xB0, &GEOMETRY, &identity(), &NAME, &UNIT).unwrap();
        assert_eq!(page.len(), 0x40);
        assert_eq!(page[20..24], 0x0010_0000u32.to_be_bytes());
        assert_eq!(page[24..28], 256u32.to_be_bytes());
        assert_eq!(vital_page(0xB2, &GEOMETRY, &identity(), &NAME, &UNIT).unwrap()[5], 0xE4);
    }

    #[test]
    fn a_thick_disk_announces_no_unmap() {
        let thick = Geometry { thin: false, ..GEOMETRY };
        assert_eq!(vital_page(0xB0, &thick, &identity(), &NAME, &UNIT).unwrap()[20..36], [0; 16]);
        assert_eq!(vital_page(0xB2, &thick, &identity(), &NAME, &UNIT).unwrap()[4..], [0; 4]);
    }
}
