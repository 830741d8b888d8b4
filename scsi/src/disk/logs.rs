//! Owns: what a disk tells about itself: log pages, defect lists, diagnostic pages.
//! Promises: nothing is made up: there are no defects to list and no diagnostic pages but their list.
//! Must not know: transports.

use super::Disk;
use crate::block_device::{BlockDevice, Geometry};
use crate::sense::Sense;

/// Threshold sets of the logical block provisioning page (SBC-3, 6.3.4): a resource count is in units of 2^11 blocks.
const RESOURCE_EXPONENT: u32 = 11;

impl<D: BlockDevice> Disk<D> {
    /// LOG SENSE (SPC-4, 6.8): the list of pages, and for thin disks the logical block provisioning page.
    pub(super) fn log_page(&self, control: u8, page: u8, subpage: u8, parameter: u16) -> Result<Vec<u8>, Sense> {
        let geometry = self.device.geometry();
        // Page control 1: cumulative values; the others are for thresholds and defaults, which these pages do not have.
        if control != 1 {
            return Err(Sense::cdb_field(2, Some(7)));
        }
        if subpage != 0 && !(page == 0 && subpage == 0xFF) {
            return Err(Sense::cdb_field(3, Some(7)));
        }
        let space = self.device.space().filter(|_| geometry.thin);
        let mut body = Vec::new();
        match (page, space) {
            (0x00, space) => {
                let pages: &[u8] = if space.is_some() { &[0x00, 0x0C] } else { &[0x00] };
                for &page in pages {
                    body.push(page);
                    if subpage == 0xFF {
                        body.push(0);
                    }
                }
            }
            (0x0C, Some(space)) => {
                for (code, bytes) in [(1u16, space.available), (2, space.used)] {
                    if code >= parameter {
                        push_resource(&mut body, code, bytes, &geometry);
                    }
                }
            }
            _ => return Err(Sense::cdb_field(2, Some(5))),
        }
        let flags = if subpage != 0 { 0x40 } else { 0 };
        let mut answer = vec![page | flags, subpage];
        answer.extend_from_slice(&(body.len() as u16).to_be_bytes());
        answer.extend_from_slice(&body);
        Ok(answer)
    }

    /// READ DEFECT DATA: the lists are empty (SBC-3, 5.17 and 5.18).
    pub(super) fn defect_data(&self, long: bool, lists: u8) -> Vec<u8> {
        let mut answer = vec![0; if long { 8 } else { 4 }];
        answer[1] = lists & 0x1F;
        answer
    }

    /// RECEIVE DIAGNOSTIC RESULTS: only the list of pages, which has no other page.
    pub(super) fn diagnostic_page(&self, page: Option<u8>) -> Result<Vec<u8>, Sense> {
        match page {
            Some(0) | None => Ok(vec![0, 0, 0, 1, 0]),
            Some(_) => Err(Sense::cdb_field(2, Some(7))),
        }
    }
}

/// A resource count parameter of the logical block provisioning page; its scope is what this unit alone uses.
fn push_resource(body: &mut Vec<u8>, code: u16, bytes: u64, geometry: &Geometry) {
    let units = (bytes / u64::from(geometry.logical_block)) >> RESOURCE_EXPONENT;
    body.extend_from_slice(&code.to_be_bytes());
    body.extend_from_slice(&[0x03, 8]);
    body.extend_from_slice(&u32::try_from(units).unwrap_or(u32::MAX).to_be_bytes());
    body.extend_from_slice(&[1, 0, 0, 0]);
}
