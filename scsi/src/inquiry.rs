//! Owns: INQUIRY: standard data and the vital product data pages of a disk, and the limits that they announce.
//! Promises: the pages say the same as the command code does: both take the limits from here.
//! Must not know: transports, mode pages, how blocks are stored.

use crate::block_device::{Geometry, Identity};
use crate::sense::Sense;

/// The most bytes that one READ, WRITE, VERIFY or WRITE SAME moves; more is refused (VPD B0, maximum transfer length).
pub const MAX_TRANSFER_BYTES: u64 = 32 << 20;
/// The transfer size that costs least per byte (VPD B0, optimal transfer length).
pub const OPTIMAL_TRANSFER_BYTES: u64 = 1 << 20;
/// The most blocks that one UNMAP command gives back (VPD B0).
pub const MAX_UNMAP_BLOCKS: u64 = 1 << 23;
/// The most descriptors of one UNMAP command (VPD B0).
pub const MAX_UNMAP_DESCRIPTORS: usize = 256;
/// The most blocks of one COMPARE AND WRITE (VPD B0).
pub const MAX_COMPARE_AND_WRITE_BLOCKS: u64 = 128;

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
}

/// Standard INQUIRY data (SPC-4, 6.6.2): 36 bytes for the legacy personality, 96 for the modern one.
pub(crate) fn standard(personality: Personality, name: &ProductName) -> Vec<u8> {
    let mut data = match personality {
        // Response data format 2, wide 16-bit bus, synchronous transfers, command queueing.
        Personality::Legacy => vec![0x00, 0, 0x02, 0x02, 31, 0, 0, 0x32],
        // SPC-4; hierarchical LUNs, format 2; command queueing.
        Personality::Modern => vec![0x00, 0, 0x06, 0x12, 91, 0, 0, 0x02],
    };
    data.extend_from_slice(&name.vendor);
    data.extend_from_slice(&name.product);
    data.extend_from_slice(&name.revision);
    if personality == Personality::Modern {
        data.resize(96, 0);
        // Version descriptors: SAM-5, SPC-4, SBC-3 (SPC-4, table 144).
        data[58..64].copy_from_slice(&[0x00, 0xA0, 0x04, 0x60, 0x04, 0xC0]);
    }
    data
}

/// Standard INQUIRY data of a LUN where there is nothing: peripheral qualifier 3, type 1Fh.
pub(crate) fn standard_of_absent_unit() -> Vec<u8> {
    let mut data = vec![0x7F, 0, 0x06, 0x12, 31, 0, 0, 0x02];
    data.resize(36, b' ');
    data
}

/// A vital product data page.
pub(crate) fn vital_page(
    page: u8,
    geometry: &Geometry,
    identity: &Identity,
    name: &ProductName,
) -> Result<Vec<u8>, Sense> {
    let body = match page {
        0x00 => vec![0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2],
        0x80 => identity.serial.as_bytes().to_vec(),
        0x83 => device_identification(identity, name),
        0x86 => extended_inquiry(geometry),
        0xB0 => block_limits(geometry),
        0xB1 => block_device_characteristics(geometry),
        0xB2 => provisioning(geometry),
        _ => return Err(Sense::cdb_field(2, Some(7))),
    };
    let mut data = vec![0x00, page];
    data.extend_from_slice(&(body.len() as u16).to_be_bytes());
    data.extend_from_slice(&body);
    Ok(data)
}

/// Page 83h (SPC-4, 7.8.5): T10 vendor designator, NAA designator, relative target port.
fn device_identification(identity: &Identity, name: &ProductName) -> Vec<u8> {
    let mut body = Vec::new();
    let mut designator = |code_set: u8, association_and_type: u8, value: &[u8]| {
        body.extend_from_slice(&[code_set, association_and_type, 0, value.len() as u8]);
        body.extend_from_slice(value);
    };
    let serial = &identity.serial.as_bytes()[..identity.serial.len().min(200)];
    designator(0x02, 0x01, &[&name.vendor, serial].concat());
    designator(0x01, 0x03, &identity.naa);
    designator(0x01, 0x14, &[0, 0, 0, 1]);
    body
}

/// Page 86h (SPC-4, 7.8.7): simple and head of queue task attributes, volatile cache.
fn extended_inquiry(geometry: &Geometry) -> Vec<u8> {
    let mut body = vec![0; 0x3C];
    body[1] = 0x01 | 0x04;
    body[2] = u8::from(geometry.write_cache);
    body
}

/// Page B0h (SBC-3, 6.6.4).
fn block_limits(geometry: &Geometry) -> Vec<u8> {
    let logical = u64::from(geometry.logical_block);
    let blocks32 = |bytes: u64| ((bytes / logical) as u32).to_be_bytes();
    let mut body = vec![0; 0x3C];
    // WSNZ: WRITE SAME of 0 blocks is refused.
    body[0] = 0x01;
    body[1] = MAX_COMPARE_AND_WRITE_BLOCKS as u8;
    let granularity = (geometry.physical_block / geometry.logical_block).max(1);
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
    body[32..40].copy_from_slice(&(MAX_TRANSFER_BYTES / logical).to_be_bytes());
    body
}

/// Page B1h (SBC-3, 6.6.2): rotation rate 1 means a medium that does not rotate, 0 that it is not reported.
fn block_device_characteristics(geometry: &Geometry) -> Vec<u8> {
    let mut body = vec![0; 0x3C];
    body[1] = u8::from(!geometry.rotational);
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

    #[test]
    fn standard_data_has_the_length_that_it_announces() {
        for (personality, length) in [(Personality::Legacy, 36), (Personality::Modern, 96)] {
            let data = standard(personality, &NAME);
            assert_eq!((data.len(), usize::from(data[4]) + 5), (length, length));
            assert_eq!(&data[8..36], b"VMware  Virtual disk    2.0 ");
        }
    }

    #[test]
    fn every_page_of_the_list_exists_and_has_the_length_that_it_announces() {
        let list = vital_page(0, &GEOMETRY, &identity(), &NAME).unwrap();
        assert!(list[4..].is_sorted());
        for &page in &list[4..] {
            let data = vital_page(page, &GEOMETRY, &identity(), &NAME).unwrap();
            assert_eq!(data[1], page);
            assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])) + 4, data.len());
        }
        assert_eq!(vital_page(0x81, &GEOMETRY, &identity(), &NAME), Err(Sense::cdb_field(2, Some(7))));
    }

    #[test]
    fn block_limits_let_linux_enable_unmap() {
        let page = vital_page(0xB0, &GEOMETRY, &identity(), &NAME).unwrap();
        assert_eq!(page.len(), 0x40);
        assert_eq!(page[20..24], 0x0080_0000u32.to_be_bytes());
        assert_eq!(page[24..28], 256u32.to_be_bytes());
        assert_eq!(vital_page(0xB2, &GEOMETRY, &identity(), &NAME).unwrap()[5], 0xE4);
    }

    #[test]
    fn a_thick_disk_announces_no_unmap() {
        let thick = Geometry { thin: false, ..GEOMETRY };
        assert_eq!(vital_page(0xB0, &thick, &identity(), &NAME).unwrap()[20..36], [0; 16]);
        assert_eq!(vital_page(0xB2, &thick, &identity(), &NAME).unwrap()[4..], [0; 4]);
    }
}
