//! Owns: the ioctls on open files and directories of a mount: numbers, structures, and the calls of the client's side.
//! Promises: every structure has one layout (little-endian, no padding) and fits the 16,383 bytes that an ioctl carries.
//! Must not know: how the mount answers, what the client does with the answers.
//!
//! | number | name | direction | what |
//! | --- | --- | --- | --- |
//! | `'V' 0xd0` | GET_VOLUME | out [`VolumeAnswer`] | which volume this is, where its socket is, a ticket for this open file or directory |
//! | `'V' 0xd1` | EXTENTS | in, out [`RunPage`] | the runs of a byte range, a page a call |
//! | `'V' 0xd2` | ALLOCATE | in, out [`RunPage`] | space for a byte range: granules that the caller writes whole |
//! | `'V' 0xd3` | FILLED | in [`GrantRequest`] | the granules of a grant are written (or given up) |
//! | `'V' 0xd4` | FLUSH | none | flush the LUNs, publish what was filled, as fsync(2) |
//! | `'V' 0xd5` | PUNCH | in [`RangeRequest`] | the range reads as zeros and its space is given back |
//!
//! Errors are errno values: ENOTTY on a file that is no file of a mount, ESTALE when the file is not open that way any more, EINVAL
//! for a range that is not there, ENOSPC, EIO. GET_VOLUME works on directories too.

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, NoArg, Opcode, Setter, Updater, ioctl, opcode};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First word of [`VolumeAnswer`]: "VMFSVOL1", little-endian.
pub const VOLUME_MAGIC: u64 = u64::from_le_bytes(*b"VMFSVOL1");
/// Version of these structures.
pub const ABI_VERSION: u32 = 1;
/// Runs of one page.
pub const RUNS_PER_PAGE: usize = 500;
/// Longest socket path, as in sockaddr_un(7).
pub const MAX_SOCKET_PATH: usize = 108;

/// Number of GET_VOLUME.
pub const GET_VOLUME: Opcode = opcode::read::<VolumeAnswer>(b'V', 0xd0);
/// Number of EXTENTS.
pub const EXTENTS: Opcode = opcode::read_write::<RunPage>(b'V', 0xd1);
/// Number of ALLOCATE.
pub const ALLOCATE: Opcode = opcode::read_write::<RunPage>(b'V', 0xd2);
/// Number of FILLED.
pub const FILLED: Opcode = opcode::write::<GrantRequest>(b'V', 0xd3);
/// Number of FLUSH.
pub const FLUSH: Opcode = opcode::none(b'V', 0xd4);
/// Number of PUNCH.
pub const PUNCH: Opcode = opcode::write::<RangeRequest>(b'V', 0xd5);

/// What an open file is, in [`VolumeAnswer::kind`].
pub mod kind {
    /// A plain file: it has no stable runs that other processes may use.
    pub const FILE: u8 = 1;
    /// A virtual disk: its runs may be used while it is open.
    pub const DISK: u8 = 2;
    /// A directory.
    pub const DIRECTORY: u8 = 3;
    /// A raw device mapping.
    pub const RAW: u8 = 4;
}

/// What a run is, in [`Run::state`].
pub mod state {
    /// Bytes on a LUN: read and written in place.
    pub const DATA: u32 = 1;
    /// Reads as zeros; a write needs ALLOCATE first.
    pub const ZERO: u32 = 2;
    /// A granule to be written whole (answers of ALLOCATE only).
    pub const FILL: u32 = 3;
}

/// Answer of GET_VOLUME.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct VolumeAnswer {
    /// [`VOLUME_MAGIC`].
    pub magic: U64,
    /// [`ABI_VERSION`].
    pub version: U32,
    /// What the file is ([`kind`]).
    pub kind: u8,
    /// 1: opened for writing.
    pub writable: u8,
    /// Bytes used of `socket_path`.
    pub socket_path_length: U16,
    /// Volume UUID.
    pub volume: [u8; 16],
    /// UUID of this mount's host.
    pub host: [u8; 16],
    /// Names this open file to the socket, until it is closed.
    pub ticket: [u8; 16],
    /// Identity of the object.
    pub fd: U64,
    /// Link of the object.
    pub link: U64,
    /// Size in bytes.
    pub size: U64,
    /// Bytes of a block.
    pub block_bytes: U32,
    /// Bytes of a granule: the unit of a first write.
    pub granule_bytes: U32,
    /// Path of the mount's socket.
    pub socket_path: [u8; MAX_SOCKET_PATH],
    /// Zero.
    pub reserved: [u8; 4],
}

/// One run of a file.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct Run {
    /// First byte in the file.
    pub offset: U64,
    /// Bytes.
    pub length: U64,
    /// First byte on the LUN, for DATA and FILL.
    pub lun_offset: U64,
    /// Index of the LUN, for DATA and FILL.
    pub lun: U32,
    /// What it is ([`state`]).
    pub state: U32,
}

/// Request and answer of EXTENTS and ALLOCATE.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct RunPage {
    /// In: first byte of the file that is asked for.
    pub offset: U64,
    /// In: bytes. Out: bytes from `offset` on that the answer covers; go on behind them.
    pub length: U64,
    /// Out: size of the file in bytes.
    pub size: U64,
    /// Out: map epoch of EXTENTS; identity of the grant of ALLOCATE, 0 when nothing has to be filled.
    pub epoch_or_grant: U64,
    /// Out: runs used.
    pub count: U32,
    /// Zero.
    pub reserved: [u8; 12],
    /// Out: the runs, ascending.
    pub runs: [Run; RUNS_PER_PAGE],
}

/// Request of FILLED.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct GrantRequest {
    /// The grant.
    pub grant: U64,
    /// 1: written; 0: given up, nothing was written and nothing is on its way.
    pub written: U32,
    /// Zero.
    pub reserved: [u8; 4],
}

/// Request of PUNCH.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct RangeRequest {
    /// First byte.
    pub offset: U64,
    /// Bytes.
    pub length: U64,
}

const _: () = assert!(size_of::<VolumeAnswer>() == 208);
const _: () = assert!(size_of::<Run>() == 32);
const _: () = assert!(size_of::<RunPage>() == 48 + 32 * RUNS_PER_PAGE);
const _: () = assert!(size_of::<RunPage>() <= 16_383);
const _: () = assert!(size_of::<GrantRequest>() == 16);
const _: () = assert!(size_of::<RangeRequest>() == 16);

impl RunPage {
    /// A request for `length` bytes at `offset`.
    pub fn request(offset: u64, length: u64) -> Box<RunPage> {
        let mut page = Box::new(<RunPage as FromZeros>::new_zeroed());
        page.offset = offset.into();
        page.length = length.into();
        page
    }

    /// The runs of an answer; a count that is too large is cut.
    pub fn answered(&self) -> &[Run] {
        &self.runs[..(self.count.get() as usize).min(RUNS_PER_PAGE)]
    }

    /// Appends a run; false when the page is full. A DATA run that continues the last one is joined to it.
    pub fn push(&mut self, run: Run) -> bool {
        let count = self.count.get() as usize;
        if let Some(last) = count.checked_sub(1).map(|at| &mut self.runs[at]) {
            let adjoins = last.offset.get() + last.length.get() == run.offset.get()
                && (last.state, last.lun) == (run.state, run.lun)
                && (run.state.get() == state::ZERO
                    || last.lun_offset.get() + last.length.get() == run.lun_offset.get());
            if adjoins {
                last.length += run.length;
                return true;
            }
        }
        if count == RUNS_PER_PAGE {
            return false;
        }
        self.runs[count] = run;
        self.count = (count as u32 + 1).into();
        true
    }
}

/// Calls GET_VOLUME. ENOTTY, also when another file system answers.
pub fn get_volume(file: impl AsFd) -> io::Result<VolumeAnswer> {
    // SAFETY: the number says that the kernel writes a VolumeAnswer, which any bytes are one of.
    let answer: VolumeAnswer = unsafe { ioctl(file, Getter::<GET_VOLUME, VolumeAnswer>::new()) }?;
    if answer.magic.get() != VOLUME_MAGIC {
        return Err(io::Error::from_raw_os_error(libc::ENOTTY));
    }
    if answer.version.get() != ABI_VERSION {
        let text = format!(
            "the mount speaks version {} of the ioctls, this program version {ABI_VERSION}: use one release for both",
            answer.version
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    Ok(answer)
}

/// Calls EXTENTS.
pub fn extents(file: impl AsFd, page: &mut RunPage) -> io::Result<()> {
    // SAFETY: the number says that the kernel reads and writes a RunPage, which any bytes are one of.
    unsafe { ioctl(file, Updater::<EXTENTS, RunPage>::new(page)) }.map_err(io::Error::from)
}

/// Calls ALLOCATE.
pub fn allocate(file: impl AsFd, page: &mut RunPage) -> io::Result<()> {
    // SAFETY: the number says that the kernel reads and writes a RunPage, which any bytes are one of.
    unsafe { ioctl(file, Updater::<ALLOCATE, RunPage>::new(page)) }.map_err(io::Error::from)
}

/// Calls FILLED.
pub fn filled(file: impl AsFd, grant: u64, written: bool) -> io::Result<()> {
    let request = GrantRequest { grant: grant.into(), written: u32::from(written).into(), reserved: [0; 4] };
    // SAFETY: the number says that the kernel reads a GrantRequest.
    unsafe { ioctl(file, Setter::<FILLED, GrantRequest>::new(request)) }.map_err(io::Error::from)
}

/// Calls FLUSH.
pub fn flush(file: impl AsFd) -> io::Result<()> {
    // SAFETY: the number says that nothing is read or written.
    unsafe { ioctl(file, NoArg::<FLUSH>::new()) }.map_err(io::Error::from)
}

/// Calls PUNCH.
pub fn punch(file: impl AsFd, offset: u64, length: u64) -> io::Result<()> {
    let request = RangeRequest { offset: offset.into(), length: length.into() };
    // SAFETY: the number says that the kernel reads a RangeRequest.
    unsafe { ioctl(file, Setter::<PUNCH, RangeRequest>::new(request)) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_what_other_programs_may_hard_code() {
        assert_eq!(GET_VOLUME, 0x80d0_56d0);
        assert_eq!(EXTENTS, 0xfeb0_56d1);
        assert_eq!(ALLOCATE, 0xfeb0_56d2);
        assert_eq!(FILLED, 0x4010_56d3);
        assert_eq!(FLUSH, 0x0000_56d4);
        assert_eq!(PUNCH, 0x4010_56d5);
    }

    #[test]
    fn a_file_of_another_file_system_is_told_apart() {
        let file = tempfile::tempfile().unwrap();
        let error = get_volume(&file).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn neighbouring_runs_are_joined_and_a_full_page_says_so() {
        let data = |offset: u64, lun_offset: u64| Run {
            offset: offset.into(),
            length: 64.into(),
            lun_offset: lun_offset.into(),
            lun: 1.into(),
            state: state::DATA.into(),
        };
        let mut page = RunPage::request(0, 1 << 20);
        assert!(page.push(data(0, 1000)) && page.push(data(64, 1064)));
        assert_eq!((page.answered().len(), page.answered()[0].length.get()), (1, 128));
        for n in 0..RUNS_PER_PAGE as u64 - 1 {
            assert!(page.push(data(128 + n * 64, 9000 + n * 128)));
        }
        assert!(!page.push(data(1 << 30, 5)));
        page.count = u32::MAX.into();
        assert_eq!(page.answered().len(), RUNS_PER_PAGE);
    }
}
