//! Owns: mode parameters: the pages 01, 03, 04, 08, 0A and 1C, MODE SENSE and MODE SELECT.
//! Promises: MODE SELECT changes all or nothing, and only bits that the changeable mask names.
//! Must not know: what the changed bits make the disk do.

use std::cell::Cell;

use crate::block_device::Geometry;
use crate::cdb::{ModeForm, ModeSelect, ModeSense, PageControl};
use crate::sense::{Sense, SenseFormat};

/// The bits that MODE SELECT can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parameters {
    /// Page 08h, WCE: the write cache may be used.
    write_cache_enabled: bool,
    /// Page 0Ah, D_SENSE: sense data in descriptor format.
    descriptor_sense: bool,
    /// Page 0Ah, SWP: software write protect.
    software_write_protect: bool,
    /// Page 0Ah, TAS: task aborted status.
    task_aborted_status: bool,
}

/// A unit's mode parameters.
#[derive(Debug)]
pub(crate) struct ModeState {
    current: Cell<Parameters>,
    default: Parameters,
}

const PAGES: [u8; 6] = [0x01, 0x03, 0x04, 0x08, 0x0A, 0x1C];

impl ModeState {
    /// The defaults for a device with or without a write cache.
    pub(crate) fn new(write_cache: bool) -> Self {
        let default = Parameters {
            write_cache_enabled: write_cache,
            descriptor_sense: false,
            software_write_protect: false,
            task_aborted_status: false,
        };
        Self { current: Cell::new(default), default }
    }

    /// Back to the defaults, as after a reset.
    pub(crate) fn reset(&self) {
        self.current.set(self.default);
    }

    /// May writes stay in the cache?
    pub(crate) fn write_cache_enabled(&self) -> bool {
        self.current.get().write_cache_enabled
    }

    /// Has the initiator write protected the unit?
    pub(crate) fn software_write_protect(&self) -> bool {
        self.current.get().software_write_protect
    }

    /// Do commands that another nexus aborts end with a status?
    pub(crate) fn task_aborted_status(&self) -> bool {
        self.current.get().task_aborted_status
    }

    /// The sense format in force.
    pub(crate) fn sense_format(&self) -> SenseFormat {
        if self.current.get().descriptor_sense { SenseFormat::Descriptor } else { SenseFormat::Fixed }
    }

    /// MODE SENSE.
    pub(crate) fn sense(&self, request: &ModeSense, geometry: &Geometry) -> Result<Vec<u8>, Sense> {
        if request.control == PageControl::Saved {
            return Err(Sense::SAVING_NOT_SUPPORTED);
        }
        let mut pages = Vec::new();
        match (request.page, request.subpage) {
            (0x3F, 0x00 | 0xFF) => {
                for page in PAGES {
                    pages.extend_from_slice(&self.page(page, request.control, geometry));
                }
            }
            (page, 0x00 | 0xFF) if PAGES.contains(&page) => {
                pages.extend_from_slice(&self.page(page, request.control, geometry));
            }
            (page, _) if page == 0x3F || PAGES.contains(&page) => return Err(Sense::cdb_field(3, Some(7))),
            _ => return Err(Sense::cdb_field(2, Some(5))),
        }
        let long = request.form == ModeForm::Ten && request.long_lba_accepted;
        let descriptor = match (request.disable_block_descriptors, long) {
            (true, _) => Vec::new(),
            (false, false) => short_block_descriptor(geometry),
            (false, true) => long_block_descriptor(geometry),
        };
        Ok(self.with_header(request.form, long, descriptor, pages, geometry))
    }

    fn with_header(
        &self,
        form: ModeForm,
        long: bool,
        descriptor: Vec<u8>,
        pages: Vec<u8>,
        geometry: &Geometry,
    ) -> Vec<u8> {
        let protect = if geometry.read_only || self.software_write_protect() { 0x80 } else { 0 };
        // Device specific parameter (SBC-3, 6.4.1): WP, and DPOFUA since forced unit access is supported.
        let specific = protect | 0x10;
        let body = descriptor.len() + pages.len();
        let mut data = match form {
            ModeForm::Six => vec![(body + 3).min(0xFF) as u8, 0, specific, descriptor.len() as u8],
            ModeForm::Ten => {
                let [high, low] = ((body + 6) as u16).to_be_bytes();
                vec![high, low, 0, specific, u8::from(long), 0, 0, descriptor.len() as u8]
            }
        };
        data.extend_from_slice(&descriptor);
        data.extend_from_slice(&pages);
        data
    }

    /// One page with its two header bytes.
    fn page(&self, page: u8, control: PageControl, geometry: &Geometry) -> Vec<u8> {
        let parameters = match control {
            PageControl::Default => self.default,
            _ => self.current.get(),
        };
        match control {
            PageControl::Changeable => changeable(page),
            _ => values(page, parameters, geometry),
        }
    }

    /// MODE SELECT with its parameter list. Returns whether anything has changed.
    pub(crate) fn select(&self, request: &ModeSelect, list: &[u8], geometry: &Geometry) -> Result<bool, Sense> {
        if !request.page_format {
            return Err(Sense::cdb_field(1, Some(4)));
        }
        if request.save {
            return Err(Sense::cdb_field(1, Some(0)));
        }
        if list.is_empty() {
            return Ok(false);
        }
        let mut at = check_header(request.form, list, geometry)?;
        let mut next = self.current.get();
        while at < list.len() {
            let length = self.check_page(at, &list[at..], geometry)?;
            apply(&list[at..at + length], &mut next);
            at += length;
        }
        Ok(self.current.replace(next) != next)
    }

    /// Checks the page at the start of `list` (which is at byte `at` of the whole); returns its length.
    fn check_page(&self, at: usize, list: &[u8], geometry: &Geometry) -> Result<usize, Sense> {
        let page = list[0] & 0x3F;
        if list[0] & 0x40 != 0 || !PAGES.contains(&page) {
            return Err(Sense::parameter_field(at as u16));
        }
        let current = self.page(page, PageControl::Current, geometry);
        let mask = changeable(page);
        let &length = list.get(1).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        if usize::from(length) + 2 != current.len() {
            return Err(Sense::parameter_field(at as u16 + 1));
        }
        let given = list.get(..current.len()).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        for index in 2..current.len() {
            if (given[index] ^ current[index]) & !mask[index] != 0 {
                return Err(Sense::parameter_field((at + index) as u16));
            }
        }
        Ok(current.len())
    }
}

/// Checks header and block descriptor of a MODE SELECT list; returns where the pages start.
fn check_header(form: ModeForm, list: &[u8], geometry: &Geometry) -> Result<usize, Sense> {
    let header = match form {
        ModeForm::Six => list.get(..4).map(|header| (header[1], false, usize::from(header[3]), 4)),
        ModeForm::Ten => list.get(..8).map(|header| {
            let length = usize::from(u16::from_be_bytes([header[6], header[7]]));
            (header[2], header[4] & 1 == 1, length, 8)
        }),
    };
    let (medium_type, long, descriptor_length, start) = header.ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    if medium_type != 0 {
        return Err(Sense::parameter_field(start as u16 / 4));
    }
    if descriptor_length == 0 {
        return Ok(start);
    }
    let end = start + descriptor_length;
    let given = list.get(start..end).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    let current = if long { long_block_descriptor(geometry) } else { short_block_descriptor(geometry) };
    let count = if long { 8 } else { 4 };
    let same = given.len() == current.len()
        && (given[..count] == current[..count] || given[..count].iter().all(|&byte| byte == 0))
        && given[count..] == current[count..];
    if same { Ok(end) } else { Err(Sense::parameter_field(start as u16)) }
}

/// Takes the changeable bits of a checked page.
fn apply(page: &[u8], parameters: &mut Parameters) {
    match page[0] & 0x3F {
        0x08 => parameters.write_cache_enabled = page[2] & 0x04 != 0,
        0x0A => {
            parameters.descriptor_sense = page[2] & 0x04 != 0;
            parameters.software_write_protect = page[4] & 0x08 != 0;
            parameters.task_aborted_status = page[5] & 0x40 != 0;
        }
        _ => {}
    }
}

/// Block descriptor of 8 bytes (SBC-3, 6.4.2.2): FFFFFFFFh if the count does not fit.
fn short_block_descriptor(geometry: &Geometry) -> Vec<u8> {
    let count = u32::try_from(geometry.blocks).unwrap_or(u32::MAX);
    [count.to_be_bytes(), geometry.logical_block.to_be_bytes()].concat()
}

/// Block descriptor of 16 bytes (SBC-3, 6.4.2.3).
fn long_block_descriptor(geometry: &Geometry) -> Vec<u8> {
    [geometry.blocks.to_be_bytes(), u64::from(geometry.logical_block).to_be_bytes()].concat()
}

/// A page's values (SPC-4, 7.5 and SBC-3, 6.4).
fn values(page: u8, parameters: Parameters, geometry: &Geometry) -> Vec<u8> {
    let mut data = blank(page);
    match page {
        0x03 => {
            data[10..12].copy_from_slice(&SECTORS.to_be_bytes());
            data[12..14].copy_from_slice(&(geometry.logical_block as u16).to_be_bytes());
            // Hard sectored.
            data[20] = 0x40;
        }
        0x04 => {
            let cylinders = (geometry.blocks / (u64::from(HEADS) * u64::from(SECTORS))).clamp(1, 0xFF_FFFF) as u32;
            data[2..5].copy_from_slice(&cylinders.to_be_bytes()[1..]);
            data[5] = HEADS;
            // Medium rotation rate: the usual 7,200 rounds a minute; old systems divide by it.
            data[20..22].copy_from_slice(&7200u16.to_be_bytes());
        }
        0x08 => data[2] = u8::from(parameters.write_cache_enabled) << 2,
        0x0A => {
            data[2] = u8::from(parameters.descriptor_sense) << 2;
            // Queue algorithm modifier 1: unrestricted reordering.
            data[3] = 0x10;
            data[4] = u8::from(parameters.software_write_protect) << 3;
            data[5] = u8::from(parameters.task_aborted_status) << 6;
        }
        // DEXCPT: no informational exceptions.
        0x1C => data[2] = 0x08,
        _ => {}
    }
    data
}

/// A page's changeable mask.
fn changeable(page: u8) -> Vec<u8> {
    let mut data = blank(page);
    match page {
        0x08 => data[2] = 0x04,
        0x0A => {
            data[2] = 0x04;
            data[4] = 0x08;
            data[5] = 0x40;
        }
        _ => {}
    }
    data
}

/// Header and zeros.
fn blank(page: u8) -> Vec<u8> {
    let length = match page {
        0x03 | 0x04 => 0x16,
        0x08 => 0x12,
        _ => 0x0A,
    };
    let mut data = vec![0; length + 2];
    data[0] = page;
    data[1] = length as u8;
    data
}

/// The made-up geometry of large disks that PC BIOSes use.
const HEADS: u8 = 255;
const SECTORS: u16 = 63;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::GEOMETRY;
    use proptest::prelude::*;

    fn request(page: u8, control: PageControl) -> ModeSense {
        ModeSense {
            form: ModeForm::Six,
            disable_block_descriptors: true,
            long_lba_accepted: false,
            control,
            page,
            subpage: 0,
            allocation: 255,
        }
    }

    const SELECT: ModeSelect = ModeSelect { form: ModeForm::Six, page_format: true, save: false, length: 0 };

    #[test]
    fn the_caching_page_reports_the_write_cache_and_select_turns_it_off() {
        let state = ModeState::new(true);
        let sensed = state.sense(&request(8, PageControl::Current), &GEOMETRY).unwrap();
        assert_eq!(sensed[..7], [23, 0, 0x10, 0, 8, 0x12, 4]);
        let mut list = sensed;
        list[0] = 0;
        list[6] = 0;
        assert_eq!(state.select(&SELECT, &list, &GEOMETRY), Ok(true));
        assert!(!state.write_cache_enabled());
        assert_eq!(state.select(&SELECT, &list, &GEOMETRY), Ok(false));
        assert_eq!(state.sense(&request(8, PageControl::Default), &GEOMETRY).unwrap()[6], 4);
        state.reset();
        assert!(state.write_cache_enabled());
    }

    #[test]
    fn select_changes_nothing_if_one_of_its_pages_is_wrong() {
        let state = ModeState::new(true);
        let mut list = vec![0, 0, 0, 0];
        let mut caching = state.page(8, PageControl::Current, &GEOMETRY);
        caching[2] = 0;
        list.extend_from_slice(&caching);
        let mut control = state.page(0x0A, PageControl::Current, &GEOMETRY);
        control[3] = 0;
        list.extend_from_slice(&control);
        assert_eq!(state.select(&SELECT, &list, &GEOMETRY), Err(Sense::parameter_field(4 + 20 + 3)));
        assert!(state.write_cache_enabled());
    }

    #[test]
    fn all_pages_come_sorted_with_a_truthful_length() {
        let state = ModeState::new(false);
        let ten =
            ModeSense { form: ModeForm::Ten, disable_block_descriptors: false, ..request(0x3F, PageControl::Current) };
        let data = state.sense(&ten, &GEOMETRY).unwrap();
        assert_eq!(usize::from(u16::from_be_bytes([data[0], data[1]])) + 2, data.len());
        assert_eq!(data[7], 8);
        let mut at = 16;
        let mut seen = Vec::new();
        while at < data.len() {
            seen.push(data[at]);
            at += usize::from(data[at + 1]) + 2;
        }
        assert_eq!((at, seen), (data.len(), PAGES.to_vec()));
    }

    #[test]
    fn saved_values_and_unknown_pages_are_refused() {
        let state = ModeState::new(false);
        assert_eq!(state.sense(&request(8, PageControl::Saved), &GEOMETRY), Err(Sense::SAVING_NOT_SUPPORTED));
        assert_eq!(state.sense(&request(9, PageControl::Current), &GEOMETRY), Err(Sense::cdb_field(2, Some(5))));
        let subpage = ModeSense { subpage: 5, ..request(8, PageControl::Current) };
        assert_eq!(state.sense(&subpage, &GEOMETRY), Err(Sense::cdb_field(3, Some(7))));
    }

    proptest! {
        #[test]
        fn any_parameter_list_is_taken_or_refused(
            list in prop::collection::vec(prop_oneof![Just(0u8), Just(8), Just(0x0A), any::<u8>()], 0..64),
            ten: bool,
        ) {
            let state = ModeState::new(true);
            let form = if ten { ModeForm::Ten } else { ModeForm::Six };
            let _ = state.select(&ModeSelect { form, ..SELECT }, &list, &GEOMETRY);
        }
    }
}
