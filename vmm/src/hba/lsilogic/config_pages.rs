//! Owns: the configuration pages that drivers read and write: their sizes, attributes and values.
//! Promises: a page's header never changes; a write to a SCSI device's requested parameters negotiates what the port can.
//! Must not know: guest memory, how pages travel. Sources: Linux's lsi/mpi_cnfg.h, and what Linux's mptbase and mptspi and
//! FreeBSD's mpt ask for.

use super::messages::IocStatus;

/// Target numbers of the bus.
pub(super) const TARGETS: u8 = 16;
/// The adapter's own target number.
const HOST: u8 = 7;

/// Page types, the low nibble of a header's last byte.
mod kind {
    pub(super) const IO_UNIT: u8 = 0;
    pub(super) const IOC: u8 = 1;
    pub(super) const BIOS: u8 = 2;
    pub(super) const SCSI_PORT: u8 = 3;
    pub(super) const SCSI_DEVICE: u8 = 4;
    pub(super) const RAID_VOLUME: u8 = 8;
    pub(super) const MANUFACTURING: u8 = 9;
    pub(super) const RAID_DISK: u8 = 10;
}

/// Page attributes, the high nibble of a header's last byte.
const READ_ONLY: u8 = 0x00;
const CHANGEABLE: u8 = 0x10;
const PERSISTENT: u8 = 0x20;

/// SCSI PORT PAGE 0: Ultra2 wide, minimal period factor 0Ah, offset up to 127.
const PORT_CAPABILITIES: u32 = 0x207F_0A00;
const WIDE: u32 = 1 << 29;

/// Actions of a CONFIG request.
mod action {
    pub(super) const HEADER: u8 = 0;
    pub(super) const READ_CURRENT: u8 = 1;
    pub(super) const WRITE_CURRENT: u8 = 2;
    pub(super) const SET_DEFAULT: u8 = 3;
    pub(super) const WRITE_STORED: u8 = 4;
    pub(super) const READ_DEFAULT: u8 = 5;
    pub(super) const READ_STORED: u8 = 6;
}

/// What a page is asked for by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageRequest {
    pub(super) action: u8,
    /// Type, perhaps with attributes.
    pub(super) kind: u8,
    pub(super) number: u8,
    /// For SCSI devices: target and bus.
    pub(super) address: u32,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageAccess<'a> {
    /// Only the header was asked for.
    Header,
    /// The page's bytes, header included, go to the guest.
    Read(&'a [u8]),
    /// The guest's bytes, header included, go to [`Pages::write`].
    Write,
}

#[derive(Clone, Debug)]
struct Page {
    kind: u8,
    number: u8,
    /// For SCSI devices, whose.
    target: Option<u8>,
    current: Vec<u8>,
    /// What a driver has stored for good.
    stored: Vec<u8>,
    default: Vec<u8>,
}

impl Page {
    fn new(kind: u8, number: u8, version: u8, attributes: u8, size: usize) -> Self {
        let mut bytes = vec![0; size];
        bytes[..4].copy_from_slice(&[version, (size / 4) as u8, number, kind | attributes]);
        Self { kind, number, target: None, current: bytes.clone(), stored: bytes.clone(), default: bytes }
    }

    fn of(mut self, target: u8) -> Self {
        self.target = Some(target);
        self
    }

    fn with(mut self, offset: usize, bytes: &[u8]) -> Self {
        for version in [&mut self.current, &mut self.stored, &mut self.default] {
            version[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        self
    }

    fn attributes(&self) -> u8 {
        self.current[3] & 0xF0
    }
}

/// All pages of one adapter.
#[derive(Clone, Debug)]
pub(super) struct Pages(Vec<Page>);

impl Pages {
    /// The pages as after power-on.
    pub(super) fn new() -> Self {
        let mut pages = manufacturing_pages();
        pages.extend(unit_pages());
        pages.extend(port_pages());
        pages.extend((0..TARGETS).flat_map(device_pages));
        Self(pages)
    }

    fn find(&self, request: &PageRequest) -> Result<usize, IocStatus> {
        let kind = request.kind & 0x0F;
        let known = [
            kind::IO_UNIT,
            kind::IOC,
            kind::BIOS,
            kind::SCSI_PORT,
            kind::SCSI_DEVICE,
            kind::MANUFACTURING,
            kind::RAID_VOLUME,
            kind::RAID_DISK,
        ];
        if !known.contains(&kind) {
            return Err(IocStatus::ConfigInvalidType);
        }
        // Page address of a SCSI device: the target, and the bus in the next byte.
        let target = (kind == kind::SCSI_DEVICE).then_some(request.address & 0xFFFF);
        let same =
            |page: &Page| page.kind == kind && page.number == request.number && page.target.map(u32::from) == target;
        self.0.iter().position(same).ok_or(IocStatus::ConfigInvalidPage)
    }

    /// The header of the page that is asked for; an error if there is none.
    pub(super) fn header(&self, request: &PageRequest) -> Result<[u8; 4], IocStatus> {
        let page = &self.0[self.find(request)?].current;
        Ok([page[0], page[1], page[2], page[3]])
    }

    /// Begins what is asked for.
    pub(super) fn access(&mut self, request: &PageRequest) -> Result<PageAccess<'_>, IocStatus> {
        let page = self.find(request)?;
        let page = &mut self.0[page];
        Ok(match request.action {
            action::HEADER => PageAccess::Header,
            action::READ_CURRENT => PageAccess::Read(&page.current),
            action::READ_STORED => PageAccess::Read(&page.stored),
            action::READ_DEFAULT => PageAccess::Read(&page.default),
            action::SET_DEFAULT => {
                page.current.clone_from(&page.default);
                PageAccess::Header
            }
            action::WRITE_CURRENT if page.attributes() != READ_ONLY => PageAccess::Write,
            action::WRITE_STORED if page.attributes() == PERSISTENT => PageAccess::Write,
            action::WRITE_CURRENT | action::WRITE_STORED => return Err(IocStatus::ConfigCannotCommit),
            _ => return Err(IocStatus::ConfigInvalidAction),
        })
    }

    /// Takes the guest's bytes for a page that [`Self::access`] allowed to write; the header stays as it is.
    pub(super) fn write(&mut self, request: &PageRequest, bytes: &[u8]) -> Result<(), IocStatus> {
        let index = self.find(request)?;
        let page = &mut self.0[index];
        let end = bytes.len().min(page.current.len());
        if end < 4 {
            return Err(IocStatus::ConfigInvalidData);
        }
        if request.action == action::WRITE_STORED {
            page.stored[4..end].copy_from_slice(&bytes[4..end]);
        }
        page.current[4..end].copy_from_slice(&bytes[4..end]);
        if (page.kind, page.number) == (kind::SCSI_DEVICE, 1) {
            let requested = u32::from_le_bytes(page.current[4..8].try_into().expect("four bytes"));
            let target = page.target;
            let agreed = negotiate(requested).to_le_bytes();
            let of_device = |page: &&mut Page| (page.kind, page.number, page.target) == (kind::SCSI_DEVICE, 0, target);
            if let Some(page) = self.0.iter_mut().find(of_device) {
                page.current[4..8].copy_from_slice(&agreed);
                page.current[8] |= 0x01; // negotiation has taken place
            }
        }
        Ok(())
    }

    /// The largest page in bytes.
    pub(super) fn largest(&self) -> usize {
        self.0.iter().map(|page| page.current.len()).max().unwrap_or(0)
    }
}

/// What a device and the port agree on: the slower period, the smaller offset, what both can.
fn negotiate(requested: u32) -> u32 {
    let offset = (requested >> 16 & 0xFF).min(PORT_CAPABILITIES >> 16 & 0xFF);
    let period = (requested >> 8 & 0xFF).max(PORT_CAPABILITIES >> 8 & 0xFF);
    let period = if offset == 0 { 0 } else { period };
    requested & PORT_CAPABILITIES & (WIDE | 0xFF) | offset << 16 | period << 8
}

fn manufacturing_pages() -> Vec<Page> {
    let page = |number, version, size| Page::new(kind::MANUFACTURING, number, version, READ_ONLY, size);
    let names = page(0, 0, 0x4C).with(0x04, b"53C1030").with(0x14, b"B0").with(0x1C, b"VMware");
    vec![
        names,
        page(1, 0, 0x104),
        page(2, 0, 0x0C),
        page(3, 0, 0x0C),
        page(4, 5, 0x70),
        page(5, 2, 0x20),
        page(6, 0, 8),
    ]
}

/// Pages of the I/O unit, the controller and its BIOS.
fn unit_pages() -> Vec<Page> {
    let unit = |number, version, size| Page::new(kind::IO_UNIT, number, version, READ_ONLY, size);
    let ioc = |number, version, size| Page::new(kind::IOC, number, version, READ_ONLY, size);
    let identity = ioc(0, 1, 0x1C)
        .with(0x0C, &0x1000u16.to_le_bytes())
        .with(0x0E, &0x0030u16.to_le_bytes())
        .with(0x10, &[0x01])
        .with(0x14, &0x0001_0000u32.to_le_bytes())
        .with(0x18, &0x15ADu16.to_le_bytes())
        .with(0x1A, &0x1976u16.to_le_bytes());
    vec![
        unit(0, 0, 0x0C),
        // A single function.
        Page::new(kind::IO_UNIT, 1, 2, CHANGEABLE, 8).with(4, &[1]),
        unit(2, 2, 0x20),
        unit(3, 1, 0x0C),
        unit(4, 0, 0x14),
        identity,
        // Reply coalescing, off.
        Page::new(kind::IOC, 1, 3, CHANGEABLE, 0x10),
        // No volumes of a RAID, and none possible.
        ioc(2, 4, 0x14),
        ioc(3, 0, 0x0C),
        ioc(4, 0, 0x0C),
        ioc(5, 0, 0x10),
        ioc(6, 1, 0x3C),
        Page::new(kind::BIOS, 1, 3, CHANGEABLE, 0x20),
        Page::new(kind::BIOS, 2, 2, CHANGEABLE, 0x64),
    ]
}

fn port_pages() -> Vec<Page> {
    // LVD.
    let zero =
        Page::new(kind::SCSI_PORT, 0, 2, READ_ONLY, 0x0C).with(4, &PORT_CAPABILITIES.to_le_bytes()).with(8, &[3]);
    // The adapter answers to its own number. FreeBSD writes this page and reads it back.
    let response = 1u32 << (16 + HOST) | u32::from(HOST);
    let one = Page::new(kind::SCSI_PORT, 1, 3, CHANGEABLE, 0x10).with(4, &response.to_le_bytes());
    // Avoid bus resets at start; the adapter's number; it is an initiator; the host sets no bus parameters.
    let mut two = Page::new(kind::SCSI_PORT, 2, 2, PERSISTENT, 0x4C)
        .with(4, &0x04u32.to_le_bytes())
        .with(8, &(0x3000 | 0x30 | u32::from(HOST)).to_le_bytes());
    for target in 0..usize::from(TARGETS) {
        // Timeout, period factor (0 would be asynchronous), flags: disconnect, scan by identifier and unit, tags.
        two = two.with(0x0C + 4 * target, &[0x0A, 0x0A, 0x0F, 0x00]);
    }
    vec![zero, one, two]
}

fn device_pages(target: u8) -> [Page; 4] {
    [
        Page::new(kind::SCSI_DEVICE, 0, 4, READ_ONLY, 0x0C).of(target),
        Page::new(kind::SCSI_DEVICE, 1, 5, CHANGEABLE, 0x10).of(target),
        Page::new(kind::SCSI_DEVICE, 2, 1, READ_ONLY, 0x10).of(target),
        Page::new(kind::SCSI_DEVICE, 3, 0, READ_ONLY, 0x0C).of(target).with(4, &[0xFF; 8]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pages: &mut Pages, kind: u8, number: u8, address: u32) -> Vec<u8> {
        let request = PageRequest { action: 1, kind, number, address };
        match pages.access(&request) {
            Ok(PageAccess::Read(bytes)) => bytes.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn headers_have_the_lengths_that_drivers_rely_on() {
        let pages = Pages::new();
        for (kind, number, header) in [
            (9, 0, [0, 19, 0, 0x09]),
            (0, 2, [2, 8, 2, 0x00]),
            (1, 1, [3, 4, 1, 0x11]),
            (1, 2, [4, 5, 2, 0x01]),
            (3, 0, [2, 3, 0, 0x03]),
            (3, 1, [3, 4, 1, 0x13]),
            (3, 2, [2, 19, 2, 0x23]),
            (4, 0, [4, 3, 0, 0x04]),
            (4, 1, [5, 4, 1, 0x14]),
        ] {
            let request = PageRequest { action: 0, kind: kind | 0x20, number, address: 0 };
            assert_eq!(pages.header(&request), Ok(header), "type {kind} number {number}");
        }
    }

    #[test]
    fn what_is_not_there_has_the_error_that_says_so() {
        let mut pages = Pages::new();
        let request = |action, kind, number, address| PageRequest { action, kind, number, address };
        for (request, status) in [
            (request(0, 0xF, 0, 0), IocStatus::ConfigInvalidType),
            (request(0, 8, 0, 0), IocStatus::ConfigInvalidPage),
            (request(0, 10, 0, 0), IocStatus::ConfigInvalidPage),
            (request(0, 3, 9, 0), IocStatus::ConfigInvalidPage),
            (request(1, 4, 0, 16), IocStatus::ConfigInvalidPage),
            (request(1, 4, 0, 0x100), IocStatus::ConfigInvalidPage),
            (request(7, 1, 1, 0), IocStatus::ConfigInvalidAction),
            (request(2, 1, 2, 0), IocStatus::ConfigCannotCommit),
            (request(4, 1, 1, 0), IocStatus::ConfigCannotCommit),
        ] {
            assert_eq!(pages.access(&request).err(), Some(status), "{request:?}");
        }
    }

    #[test]
    fn a_devices_parameters_become_what_the_port_can() {
        let mut pages = Pages::new();
        assert_eq!(read(&mut pages, 4, 0, 3)[4..8], [0; 4]);
        let request = PageRequest { action: 2, kind: 4, number: 1, address: 3 };
        assert_eq!(pages.access(&request), Ok(PageAccess::Write));
        let mut wish = vec![0; 16];
        wish[4..8].copy_from_slice(&0x20FF_08FFu32.to_le_bytes());
        pages.write(&request, &wish).unwrap();
        assert_eq!(read(&mut pages, 4, 0, 3)[4..9], [0x00, 0x0A, 0x7F, 0x20, 1]);
        assert_eq!(read(&mut pages, 4, 1, 3)[..8], [5, 4, 1, 0x14, 0xFF, 0x08, 0xFF, 0x20]);
        assert_eq!(read(&mut pages, 4, 0, 4)[4..8], [0; 4]);
        // Asynchronous and narrow again.
        pages.write(&request, &[0; 16]).unwrap();
        assert_eq!(read(&mut pages, 4, 0, 3)[4..8], [0; 4]);
    }

    #[test]
    fn stored_values_and_defaults_are_kept_apart() {
        let mut pages = Pages::new();
        let write = |action| PageRequest { action, kind: 3, number: 2, address: 0 };
        pages.write(&write(2), &[0xFF; 12]).unwrap();
        let reread = |pages: &mut Pages, action| match pages.access(&write(action)) {
            Ok(PageAccess::Read(bytes)) => bytes[..12].to_vec(),
            other => panic!("{other:?}"),
        };
        let default = reread(&mut pages, 5);
        assert_eq!(default, [2, 19, 2, 0x23, 4, 0, 0, 0, 0x37, 0x30, 0, 0]);
        assert_eq!(reread(&mut pages, 6), default);
        assert_eq!(reread(&mut pages, 1)[..8], [2, 19, 2, 0x23, 0xFF, 0xFF, 0xFF, 0xFF]);
        assert_eq!(pages.access(&write(3)), Ok(PageAccess::Header));
        assert_eq!(reread(&mut pages, 1), default);
        assert_eq!(pages.write(&write(2), &[0; 3]), Err(IocStatus::ConfigInvalidData));
    }
}
