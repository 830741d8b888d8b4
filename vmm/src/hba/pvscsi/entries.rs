//! Owns: the layout of ring entries, scatter/gather elements and the configuration page.
//! Promises: layouts only; sizes are checked at compile time. Source: Linux, drivers/scsi/vmw_pvscsi.h.
//! Must not know: guest memory, what a request makes the adapter do.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const REQUEST_SIZE: usize = 128;
pub(super) const COMPLETION_SIZE: usize = 32;
pub(super) const MESSAGE_SIZE: usize = 128;
pub(super) const ELEMENT_SIZE: usize = 16;
pub(super) const CONTROLLER_PAGE_SIZE: usize = 480;

const _: () = assert!(size_of::<Descriptor>() == REQUEST_SIZE);
const _: () = assert!(size_of::<CompletionEntry>() == COMPLETION_SIZE);
const _: () = assert!(size_of::<Message>() == MESSAGE_SIZE);
const _: () = assert!(size_of::<Element>() == ELEMENT_SIZE);

/// A request as it lies in the request ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Descriptor {
    pub(super) context: U64,
    pub(super) data_address: U64,
    pub(super) data_length: U64,
    pub(super) sense_address: U64,
    pub(super) sense_length: U32,
    pub(super) flags: U32,
    pub(super) cdb: [u8; 16],
    pub(super) cdb_length: u8,
    pub(super) lun: [u8; 8],
    pub(super) tag: u8,
    pub(super) bus: u8,
    pub(super) target: u8,
    pub(super) vcpu_hint: U16,
    pub(super) unused: [u8; 58],
}

/// [`Descriptor::flags`]: the data address is that of a scatter/gather list.
pub(super) const FLAG_SCATTER_GATHER: u32 = 0x01;
/// [`Descriptor::flags`]: the CDB lies elsewhere. Not supported.
pub(super) const FLAG_OUT_OF_BAND_CDB: u32 = 0x02;
/// [`Descriptor::flags`]: no data.
pub(super) const FLAG_NO_DATA: u32 = 0x04;
/// [`Descriptor::flags`]: data to the guest.
pub(super) const FLAG_TO_HOST: u32 = 0x08;
/// [`Descriptor::flags`]: data from the guest.
pub(super) const FLAG_TO_DEVICE: u32 = 0x10;

/// One element of a scatter/gather list.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Element {
    pub(super) address: U64,
    pub(super) length: U32,
    pub(super) flags: U32,
}

/// [`Element::flags`]: the address is that of the next list.
pub(super) const ELEMENT_CHAIN: u32 = 0x01;

/// A completion as it lies in the completion ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct CompletionEntry {
    pub(super) context: U64,
    /// Bytes moved.
    pub(super) data_length: U64,
    pub(super) sense_length: U32,
    pub(super) host_status: U16,
    pub(super) scsi_status: U16,
    pub(super) unused: [u8; 8],
}

impl CompletionEntry {
    /// A request that never got a SCSI status.
    pub(super) fn failed(context: U64, host_status: HostStatus) -> Self {
        Self {
            context,
            data_length: U64::ZERO,
            sense_length: U32::ZERO,
            host_status: U16::new(host_status as u16),
            scsi_status: U16::ZERO,
            unused: [0; 8],
        }
    }
}

/// Host adapter status: what became of a request outside the SCSI device.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostStatus {
    /// The device has answered.
    Success = 0x00,
    /// No such target or LUN.
    SelectionTimeout = 0x11,
    /// The CDB moves more data than the request has room for.
    DataOverrun = 0x12,
    /// The request makes no sense, or points outside RAM.
    InvalidParameter = 0x1A,
    /// Sense data could not be delivered.
    SenseFailed = 0x1B,
    /// Ended by a bus reset that the guest asked for.
    SentReset = 0x22,
    /// Ended by a device reset.
    BusReset = 0x25,
    /// Ended by an abort.
    Aborted = 0x26,
    /// The adapter's own software failed.
    AdapterSoftware = 0x27,
}

/// A message as it lies in the message ring: a device has come or gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Message {
    pub(super) kind: U32,
    pub(super) bus: U32,
    pub(super) target: U32,
    pub(super) lun: [u8; 8],
    pub(super) unused: [u8; 108],
}

/// [`Message::kind`]
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MessageKind {
    DeviceAdded = 0,
    DeviceRemoved = 1,
}

impl Message {
    pub(super) fn new(kind: MessageKind, target: u8) -> Self {
        Self {
            kind: U32::new(kind as u32),
            bus: U32::ZERO,
            target: U32::new(u32::from(target)),
            lun: [0; 8],
            unused: [0; 108],
        }
    }
}

/// Number of the configuration page of the controller.
pub(super) const CONTROLLER_PAGE: u32 = 0x1958;
/// Address space of the controller's configuration pages.
pub(super) const CONTROLLER_ADDRESS: u64 = 0x2120 << 32;

/// The answer to CONFIG for the controller's page: header, names, number of targets.
pub(super) fn controller_page(targets: u32) -> [u8; CONTROLLER_PAGE_SIZE] {
    let mut page = [0; CONTROLLER_PAGE_SIZE];
    page[0..4].copy_from_slice(&CONTROLLER_PAGE.to_le_bytes());
    page[4..6].copy_from_slice(&((CONTROLLER_PAGE_SIZE / 4) as u16).to_le_bytes());
    let mut text = |start: usize, text: &str| {
        for (place, unit) in page[start..].chunks_exact_mut(2).zip(text.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    };
    text(0x018, "VMware, Inc.");
    text(0x158, "PVSCSI");
    page[0x1D8..0x1DC].copy_from_slice(&targets.to_le_bytes());
    page
}

/// The answer to CONFIG for a page that does not exist: a header of 16 bytes with a host status.
pub(super) fn unknown_page(number: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[0..4].copy_from_slice(&number.to_le_bytes());
    header[4..6].copy_from_slice(&4u16.to_le_bytes());
    header[6..8].copy_from_slice(&(HostStatus::InvalidParameter as u16).to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn fields_are_where_drivers_put_them() {
        assert_eq!(offset_of!(Descriptor, sense_address), 0x18);
        assert_eq!(offset_of!(Descriptor, cdb), 0x28);
        assert_eq!(offset_of!(Descriptor, lun), 0x39);
        assert_eq!(offset_of!(Descriptor, target), 0x43);
        assert_eq!(offset_of!(Descriptor, vcpu_hint), 0x44);
        assert_eq!(offset_of!(CompletionEntry, host_status), 0x14);
    }

    #[test]
    fn the_controller_page_tells_its_length_and_the_number_of_targets() {
        let page = controller_page(65);
        assert_eq!(page[..8], [0x58, 0x19, 0, 0, 120, 0, 0, 0]);
        assert_eq!(page[0x18..0x1C], [b'V', 0, b'M', 0]);
        assert_eq!(page[0x1D8..0x1DD], [65, 0, 0, 0, 0]);
        assert_eq!(unknown_page(0x1959)[..8], [0x59, 0x19, 0, 0, 4, 0, 0x1A, 0]);
    }
}
