//! Owns: what foreign file systems and volume managers write into the first MiB of a LUN.
//! Promises: bytes of any content are looked through without a panic; what is found is named with its place.
//! Must not know: this format's own header (`format::cell::probe` finds that), what is done about a finding.

use std::fmt;

/// Something known that lies at the start of a LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What it is, with its article.
    pub name: &'static str,
    /// Byte offset of the bytes that tell.
    pub offset: u64,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (found at byte {})", self.name, self.offset)
    }
}

/// {name, offset, bytes}. The more special one first where two can be there at once (a FAT has the boot signature of an MBR).
/// Sources: the kernel's headers `include/uapi/linux/*_fs.h`, `magic.h`, `raid/md_p.h`; UEFI 2.10 section 5.3.2 (GPT);
/// ECMA-119 section 8 (ISO 9660); LUKS1 and LUKS2 on-disk format specifications; LVM2 `lib/format_text/layout.h`.
const TABLE: &[(&str, u64, &[u8])] = &[
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table", 4096, b"EFI PART"),
    ("an XFS file system", 0, b"XFSB"),
    ("an ext2, ext3 or ext4 file system", 0x438, &[0x53, 0xef]),
    ("a Btrfs file system", 0x1_0040, b"_BHRfS_M"),
    ("a LUKS container", 0, b"LUKS\xba\xbe"),
    ("an LVM physical volume", 0x018, b"LVM2 001"),
    ("an LVM physical volume", 0x218, b"LVM2 001"),
    ("an LVM physical volume", 0x418, b"LVM2 001"),
    ("an LVM physical volume", 0x618, b"LVM2 001"),
    ("a swap area", 4096 - 10, b"SWAPSPACE2"),
    ("a swap area", 4096 - 10, b"SWAP-SPACE"),
    ("a swap area", 65536 - 10, b"SWAPSPACE2"),
    ("an ISO 9660 image", 0x8001, b"CD001"),
    ("a UDF file system", 0x8001, b"BEA01"),
    ("a Linux RAID member", 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a Linux RAID member", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("a bcache device", 0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]),
    ("a GFS2 file system", 0x1_0000, &[0x01, 0x16, 0x19, 0x70]),
    ("an OCFS2 file system", 0x2000, b"OCFSV2"),
    ("an F2FS file system", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    ("a SquashFS image", 0, b"hsqs"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 54, b"FAT1"),
    ("a FAT file system", 82, b"FAT32   "),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a VMware sparse image", 0, b"KDMV"),
    ("a VMware VMFS volume", 0x10_0000, &[0x0d, 0xd0, 0x01, 0xc0]),
    ("an MBR partition table or boot sector", 510, &[0x55, 0xaa]),
];

/// A ZFS label keeps 128 uberblocks of 1 KiB from byte 128 Ki on (ZFS On-Disk Specification, section 1.3).
const ZFS_UBERBLOCKS: std::ops::Range<usize> = 128 << 10..256 << 10;
const ZFS_MAGIC: u64 = 0x00ba_b10c;

/// The first known signature in `head`, the first bytes of a LUN (1 MiB and 4 KiB, or less).
pub fn find_signature(head: &[u8]) -> Option<Signature> {
    let listed = TABLE.iter().find(|(_, offset, bytes)| {
        let from = *offset as usize;
        head.get(from..from + bytes.len()).is_some_and(|found| found == *bytes)
    });
    if let Some((name, offset, _)) = listed {
        return Some(Signature { name, offset: *offset });
    }
    ZFS_UBERBLOCKS.step_by(1024).find_map(|from| {
        let stored: [u8; 8] = head.get(from..from + 8)?.try_into().ok()?;
        let zfs = u64::from_le_bytes(stored) == ZFS_MAGIC || u64::from_be_bytes(stored) == ZFS_MAGIC;
        zfs.then_some(Signature { name: "a ZFS pool member", offset: from as u64 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_listed_signature_is_found_and_named_where_it_lies() {
        assert_eq!(find_signature(&vec![0; (1 << 20) + 4096]), None);
        for (name, offset, bytes) in TABLE {
            let mut head = vec![0; (1 << 20) + 4096];
            head[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
            assert_eq!(find_signature(&head), Some(Signature { name, offset: *offset }));
        }
    }

    #[test]
    fn a_zfs_label_is_found_in_either_byte_order() {
        for bytes in [ZFS_MAGIC.to_le_bytes(), ZFS_MAGIC.to_be_bytes()] {
            let mut head = vec![0; 1 << 20];
            head[(128 << 10) + 5 * 1024..][..8].copy_from_slice(&bytes);
            assert_eq!(find_signature(&head).unwrap().name, "a ZFS pool member");
        }
    }

    #[test]
    fn a_fat_is_not_taken_for_a_partition_table() {
        let mut head = vec![0; 1 << 20];
        head[82..90].copy_from_slice(b"FAT32   ");
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(find_signature(&head).unwrap().name, "a FAT file system");
    }

    proptest! {
        #[test]
        fn any_bytes_of_any_length_are_looked_through(head in proptest::collection::vec(any::<u8>(), 0..6000)) {
            let _ = find_signature(&head);
        }
    }
}
