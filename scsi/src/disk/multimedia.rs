//! Owns: the commands that only CD-ROM drives have (MMC-6): one data track in one session.
//! Promises: answers agree with the capacity.
//! Must not know: transports.

use super::Disk;
use crate::block_device::BlockDevice;
use crate::cdb::MultiMedia;
use crate::data_buffer::DataBuffer;
use crate::reply::send;
use crate::sense::{Failure, Sense};

/// The track number that stands for the lead-out.
const LEAD_OUT: u8 = 0xAA;
/// Features of GET CONFIGURATION (MMC-6, 5.3): profile list, core, morphing, removable medium, random readable, multi-read, CD read.
const FEATURES: &[(u16, &[u8])] = &[
    (0x0000, &[0x00, 0x08, 0x01, 0x00]),
    (0x0001, &[0x00, 0x00, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]),
    (0x0002, &[0x02, 0x00, 0x00, 0x00]),
    (0x0003, &[0x29, 0x00, 0x00, 0x00]),
    (0x0010, &[0x00, 0x00, 0x08, 0x00, 0x00, 0x01, 0x00, 0x00]),
    (0x001D, &[]),
    (0x001E, &[0x00, 0x00, 0x00, 0x00]),
];

impl<D: BlockDevice> Disk<D> {
    pub(super) fn multi_media(&self, command: MultiMedia, into: &DataBuffer) -> Result<u64, Failure> {
        match command {
            MultiMedia::ReadToc { msf, format, track, allocation } => {
                Ok(send(&self.table_of_contents(msf, format, track)?, allocation, into))
            }
            MultiMedia::GetConfiguration { requested, start, allocation } => {
                Ok(send(&self.configuration(requested, start), allocation, into))
            }
            MultiMedia::GetEventStatus { polled, classes, allocation } => {
                Ok(send(&self.event_status(polled, classes)?, allocation, into))
            }
            MultiMedia::ReadDiscInformation { allocation } => Ok(send(&disc_information(), allocation, into)),
        }
    }

    /// READ TOC/PMA/ATIP (MMC-6, 6.25), formats 0 (tracks), 1 (sessions) and 2 (as on the disc).
    fn table_of_contents(&self, msf: bool, format: u8, track: u8) -> Result<Vec<u8>, Sense> {
        let end = u32::try_from(self.device.geometry().blocks).unwrap_or(u32::MAX);
        let mut body = vec![1, 1];
        let mut point = |number: u8, lba: u32| {
            body.extend_from_slice(&[0, 0x14, number, 0]);
            body.extend_from_slice(&address(lba, msf));
        };
        match format {
            0 if track > 1 && track != LEAD_OUT => return Err(Sense::cdb_field(6, Some(7))),
            0 => {
                if track <= 1 {
                    point(1, 0);
                }
                point(LEAD_OUT, end);
            }
            1 => point(1, 0),
            _ => {
                for (number, value) in [(0xA0, [1, 0, 0]), (0xA1, [1, 0, 0]), (0xA2, frames(end)), (1, frames(0))] {
                    body.extend_from_slice(&[1, 0x14, 0, number, 0, 0, 0, 0]);
                    body.extend_from_slice(&value);
                }
            }
        }
        let mut answer = (body.len() as u16).to_be_bytes().to_vec();
        answer.extend_from_slice(&body);
        Ok(answer)
    }

    /// GET CONFIGURATION (MMC-6, 6.6): the profile is CD-ROM while a medium is in.
    fn configuration(&self, requested: u8, start: u16) -> Vec<u8> {
        let loaded = self.loaded.get();
        let mut answer = vec![0, 0, 0, 0, 0, 0, 0, if loaded { 8 } else { 0 }];
        for &(code, data) in FEATURES.iter().filter(|(code, _)| *code >= start) {
            if requested == 2 && code != start {
                break;
            }
            // The first four are always there; the rest depends on the medium.
            let current = code < 0x0010 || loaded;
            if requested == 1 && !current {
                continue;
            }
            answer.extend_from_slice(&code.to_be_bytes());
            let persistent = if code < 0x0010 { 2 } else { 0 };
            answer.extend_from_slice(&[persistent | u8::from(current), data.len() as u8]);
            answer.extend_from_slice(data);
        }
        let length = (answer.len() - 4) as u32;
        answer[..4].copy_from_slice(&length.to_be_bytes());
        answer
    }

    /// GET EVENT STATUS NOTIFICATION (MMC-6, 6.7): the state of the medium, without events.
    fn event_status(&self, polled: bool, classes: u8) -> Result<Vec<u8>, Sense> {
        if !polled {
            return Err(Sense::cdb_field(1, Some(0)));
        }
        const MEDIA: u8 = 4;
        if classes & (1 << MEDIA) == 0 {
            return Ok(vec![0, 2, 0x80, 1 << MEDIA]);
        }
        let status = if self.loaded.get() { 0x02 } else { 0x01 };
        Ok(vec![0, 6, MEDIA, 1 << MEDIA, 0, status, 0, 0])
    }
}

/// READ DISC INFORMATION (MMC-6, 6.21): a complete disc of one session with one track.
fn disc_information() -> Vec<u8> {
    let mut answer = vec![0; 34];
    answer[1] = 32;
    answer[2] = 0x0E;
    answer[3..7].copy_from_slice(&[1, 1, 1, 1]);
    answer[7] = 0x20;
    answer[16..24].fill(0xFF);
    answer
}

/// Minutes, seconds and frames; the data start after two seconds.
fn frames(lba: u32) -> [u8; 3] {
    let frame = u64::from(lba) + 150;
    [(frame / 4500).min(255) as u8, (frame / 75 % 60) as u8, (frame % 75) as u8]
}

fn address(lba: u32, msf: bool) -> [u8; 4] {
    if !msf {
        return lba.to_be_bytes();
    }
    let [minutes, seconds, frame] = frames(lba);
    [0, minutes, seconds, frame]
}
