//! Owns: the ioctl SG_IO with its structure.
//! Promises: the structure is byte for byte that of the kernel (include/scsi/sg.h, struct sg_io_hdr, interface version 3).
//! Must not know: what commands mean.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// SG_IO (include/scsi/sg.h).
const SG_IO: libc::c_ulong = 0x2285;
/// DRIVER_SENSE: sense data are there.
pub const DRIVER_SENSE: u16 = 0x08;

/// Direction of a transfer (SG_DXFER_*).
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No data.
    None = -1,
    /// To the device.
    ToDevice = -2,
    /// From the device.
    FromDevice = -3,
}

/// struct sg_io_hdr.
#[repr(C)]
#[derive(Debug)]
pub struct Header<'a> {
    interface: i32,
    direction: i32,
    command_length: u8,
    sense_room: u8,
    segments: u16,
    length: u32,
    data: *mut u8,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    packet: i32,
    /// As the compiler of C leaves room for the pointer; a byte that nobody wrote can not be read.
    #[cfg(target_pointer_width = "64")]
    gap: u32,
    user: *mut u8,
    /// SAM status.
    pub status: u8,
    masked_status: u8,
    message_status: u8,
    /// Bytes of sense data that came.
    pub sense_written: u8,
    /// Of the adapter; 0 is fine.
    pub host_status: u16,
    /// Of its driver.
    pub driver_status: u16,
    /// Bytes that were not moved.
    pub residual: i32,
    duration: u32,
    info: u32,
    #[cfg(target_pointer_width = "64")]
    end: u32,
    memory: PhantomData<&'a mut [u8]>,
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Header<'_>>() == 88 && std::mem::offset_of!(Header<'_>, status) == 64);

impl<'a> Header<'a> {
    /// For one command; `data`: its memory, which must live as long as the CDB and the sense data, and be writable if the device writes.
    pub fn new(
        command: &'a [u8],
        direction: Direction,
        (data, length): (*mut u8, usize),
        sense: &'a mut [u8],
        timeout: Duration,
    ) -> Header<'a> {
        Header {
            interface: i32::from(b'S'),
            direction: direction as i32,
            command_length: command.len() as u8,
            sense_room: sense.len().min(255) as u8,
            segments: 0,
            length: length as u32,
            data,
            command: command.as_ptr(),
            sense: sense.as_mut_ptr(),
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
            flags: 0,
            packet: 0,
            #[cfg(target_pointer_width = "64")]
            gap: 0,
            user: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            message_status: 0,
            sense_written: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration: 0,
            info: 0,
            #[cfg(target_pointer_width = "64")]
            end: 0,
            memory: PhantomData,
        }
    }
}

/// Sends a command and waits for its end.
pub fn send(fd: BorrowedFd<'_>, header: &mut Header<'_>) -> io::Result<()> {
    // SAFETY: SG_IO reads and writes one sg_io_hdr, which `header` is. CDB, sense data and data that it points to live through the call:
    // their borrows are those of the header, and the call returns only when the device has ended the command.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SG_IO as _, std::ptr::from_mut(header)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
