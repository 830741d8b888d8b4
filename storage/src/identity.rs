//! Owns: the names of a disk that has none of its own: serial number and NAA identifier.
//! Promises: the same input gives the same names for ever; different disks get different names.
//! Must not know: files, descriptors' syntax.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use scsi::Identity;

/// The names of a disk with a UUID, written as hexadecimal digits with any separators (a descriptor's `ddb.uuid`). `None`
/// if there are not 32 digits.
pub(super) fn from_uuid(text: &str) -> Option<Identity> {
    let digits: Vec<u8> = text.chars().filter_map(|digit| Some(digit.to_digit(16)? as u8)).collect();
    if digits.len() != 32 {
        return None;
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(from_bytes(uuid))
}

/// The names of a disk that is known by its path only. They change when it is moved.
pub(super) fn from_path(path: &Path) -> Identity {
    from_bytes(fnv1a_128(path.as_os_str().as_bytes()).to_be_bytes())
}

/// The UUID as serial number, and as NAA 6 identifier with VMware's company number, as ESX does it.
fn from_bytes(mut uuid: [u8; 16]) -> Identity {
    uuid[..3].copy_from_slice(&[0x60, 0x00, 0xC2]);
    uuid[3] = 0x90 | (uuid[3] & 0x0F);
    let serial = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    Identity { serial, naa: uuid }
}

/// FNV-1a with 128 bits (Fowler, Noll, Vo).
fn fnv1a_128(bytes: &[u8]) -> u128 {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013B;
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_of_an_esx_disk_becomes_its_serial_number_and_identifier() {
        let identity = from_uuid("60 00 C2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27").unwrap();
        assert_eq!(identity.serial, "6000c2937ba03a039f2256c52993b727");
        assert_eq!(identity.naa[..4], [0x60, 0, 0xC2, 0x93]);
        assert_eq!(from_uuid("60 00 C2"), None);
    }

    #[test]
    fn paths_give_stable_and_different_names() {
        let names = |path: &str| from_path(Path::new(path));
        assert_eq!(names("/a/disk.img"), names("/a/disk.img"));
        assert_ne!(names("/a/disk.img"), names("/b/disk.img"));
        assert_eq!(names("/a").naa[0] >> 4, 6);
    }

    #[test]
    fn the_hash_is_fnv() {
        assert_eq!(fnv1a_128(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }
}
