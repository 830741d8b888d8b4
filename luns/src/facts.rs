//! Owns: what a logical unit says of itself: INQUIRY, vital product data, capacity, caching, reservations.
//! Promises: any bytes give facts or a reason; lengths that lie are cut to what came.
//! Must not know: how the bytes were asked for.

use vmfs_core::format::header::DeviceIdentity;

/// Standard INQUIRY data (SPC-5, 6.7.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inquiry {
    /// Peripheral qualifier and device type: 0 is a disk that is there.
    pub peripheral: u8,
    /// T10 vendor identification.
    pub vendor: String,
    /// Product identification.
    pub product: String,
    /// Product revision level.
    pub revision: String,
}

impl Inquiry {
    /// Decodes them; what is missing is empty.
    pub fn decode(bytes: &[u8]) -> Option<Inquiry> {
        let text = |range: std::ops::Range<usize>| printable(bytes.get(range).unwrap_or(&[]));
        Some(Inquiry {
            peripheral: *bytes.first()?,
            vendor: text(8..16),
            product: text(16..32),
            revision: text(32..36),
        })
    }
}

fn printable(bytes: &[u8]) -> String {
    let text: String =
        bytes.iter().map(|byte| if (0x20..0x7F).contains(byte) { char::from(*byte) } else { ' ' }).collect();
    text.trim().to_owned()
}

/// The body of a page of vital product data: what its length says, as far as it came. `None`: it is another page.
pub fn page_body(page: u8, bytes: &[u8]) -> Option<&[u8]> {
    let head = bytes.first_chunk::<4>()?;
    if head[1] != page {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    Some(&bytes[4..bytes.len().min(4 + length)])
}

/// The name of the unit itself (SPC-5, 7.7.6) as the kernel writes it in sysfs (`wwid`): "naa.", "eui." or "t10." and the rest. The
/// best one: NAA, then EUI-64, then T10 vendor.
pub fn wwid(body: &[u8]) -> Option<String> {
    let mut best: Option<(u8, String)> = None;
    let mut rest = body;
    while let Some((head, after)) = rest.split_first_chunk::<4>() {
        let Some((value, next)) = after.split_at_checked(usize::from(head[3])) else { break };
        rest = next;
        let (association, kind) = (head[1] >> 4 & 3, head[1] & 0x0F);
        if association != 0 || value.is_empty() {
            continue;
        }
        let hex = || value.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let (rank, name) = match kind {
            3 => (3, format!("naa.{}", hex())),
            2 => (2, format!("eui.{}", hex())),
            1 => (1, format!("t10.{}", printable(value))),
            _ => continue,
        };
        if best.as_ref().is_none_or(|(known, _)| *known < rank) {
            best = Some((rank, name));
        }
    }
    best.map(|(_, name)| name)
}

/// What a unit is remembered by: its name, else its serial number; empty when it says neither. The same as of a block device of this
/// machine, so that a LUN keeps its identity whichever way a host has to it.
pub fn identity(wwid: Option<&str>, serial: Option<&str>) -> DeviceIdentity {
    let said = match (wwid, serial) {
        (Some(wwid), _) => format!("wwid:{wwid}"),
        (None, Some(serial)) if !serial.is_empty() => format!("serial:{serial}"),
        _ => String::new(),
    };
    DeviceIdentity::new(said.as_bytes())
}

/// Page 80h: the serial number (SPC-5, 7.7.20).
pub fn serial(body: &[u8]) -> String {
    printable(body)
}

/// Limits of commands (SBC-4, 6.6.4, page B0h), in blocks; 0: none is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// COMPARE AND WRITE.
    pub compare_and_write: u8,
    /// One transfer.
    pub transfer: u32,
    /// UNMAP.
    pub unmap: u32,
    /// Grain of UNMAP.
    pub unmap_granularity: u32,
    /// WRITE SAME.
    pub write_same: u64,
}

impl Limits {
    /// Decodes the page's body.
    pub fn decode(body: &[u8]) -> Limits {
        let word =
            |at: usize| body.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().expect("4 bytes")));
        let high = u64::from(word(32)) << 32;
        Limits {
            compare_and_write: body.get(1).copied().unwrap_or(0),
            transfer: word(4),
            unmap: word(16),
            unmap_granularity: word(24),
            write_same: high | u64::from(word(36)),
        }
    }
}

/// Logical block provisioning (SBC-4, 6.6.9, page B2h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Provisioning {
    /// UNMAP.
    pub unmap: bool,
    /// WRITE SAME(16) with UNMAP.
    pub write_same_unmap: bool,
    /// Blocks that were given back read as zeros.
    pub reads_zeros: bool,
    /// 1: resource provisioned; 2: thin.
    pub kind: u8,
}

impl Provisioning {
    /// Decodes the page's body.
    pub fn decode(body: &[u8]) -> Provisioning {
        let flags = body.get(1).copied().unwrap_or(0);
        Provisioning {
            unmap: flags & 0x80 != 0,
            write_same_unmap: flags & 0x40 != 0,
            reads_zeros: flags & 0x1C == 0x04,
            kind: body.get(2).copied().unwrap_or(0) & 0x07,
        }
    }
}

/// READ CAPACITY(16) (SBC-4, 5.21).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Blocks.
    pub blocks: u64,
    /// Bytes of a logical block.
    pub block_bytes: u32,
    /// Bytes of a physical block.
    pub physical_bytes: u64,
    /// Blocks can be given back.
    pub managed: bool,
}

impl Capacity {
    /// Decodes it; a reason when it makes no sense.
    pub fn decode(bytes: &[u8]) -> Result<Capacity, String> {
        let Some(head) = bytes.first_chunk::<16>() else {
            return Err(format!("the answer to READ CAPACITY has only {} bytes", bytes.len()));
        };
        let last = u64::from_be_bytes(*head.first_chunk().expect("8 bytes"));
        let block_bytes = u32::from_be_bytes(*head[8..].first_chunk().expect("4 bytes"));
        let blocks = last.checked_add(1).ok_or("it says that it has 2^64 blocks")?;
        if block_bytes == 0 || blocks.checked_mul(u64::from(block_bytes)).is_none_or(|bytes| bytes > 1 << 62) {
            return Err(format!("it says that it has {blocks} blocks of {block_bytes} bytes"));
        }
        let physical_bytes = u64::from(block_bytes) << (head[13] & 0x0F);
        Ok(Capacity { blocks, block_bytes, physical_bytes, managed: head[14] & 0x80 != 0 })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_bytes)
    }
}

/// DPOFUA, WP and WCE of the answer to MODE SENSE(6) of the caching page (SBC-4, 6.5.2 and 6.5.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caching {
    /// FUA is there.
    pub force_unit_access: bool,
    /// Write protected.
    pub write_protected: bool,
    /// Writes are kept in a cache that loses them with the power.
    pub write_cache: bool,
}

impl Caching {
    /// Decodes it; what is missing is false.
    pub fn decode(bytes: &[u8]) -> Caching {
        let specific = bytes.get(2).copied().unwrap_or(0);
        let page = 4 + usize::from(bytes.get(3).copied().unwrap_or(0));
        let is_caching = bytes.get(page).is_some_and(|code| code & 0x3F == 0x08);
        Caching {
            force_unit_access: specific & 0x10 != 0,
            write_protected: specific & 0x80 != 0,
            write_cache: is_caching && bytes.get(page + 2).is_some_and(|flags| flags & 0x04 != 0),
        }
    }
}

/// The keys of READ KEYS (SPC-4, 6.15.2) as far as they came, and how many bytes there are in all.
pub fn keys(bytes: &[u8]) -> (Vec<u64>, usize) {
    let length = bytes.get(4..8).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().expect("4 bytes"))) as usize;
    let list = bytes.get(8..).unwrap_or(&[]);
    let keys = list[..list.len().min(length)].chunks_exact(8);
    (keys.map(|key| u64::from_be_bytes(key.try_into().expect("8 bytes"))).collect(), length.saturating_add(8))
}

/// Holder's key and type of READ RESERVATION (SPC-4, 6.15.3); `None`: there is none.
pub fn reservation(bytes: &[u8]) -> Option<(u64, u8)> {
    let length = u32::from_be_bytes(bytes.get(4..8)?.try_into().expect("4 bytes"));
    if length < 16 {
        return None;
    }
    let key = u64::from_be_bytes(bytes.get(8..16)?.try_into().expect("8 bytes"));
    Some((key, bytes.get(21)? & 0x0F))
}

/// What REPORT CAPABILITIES (SPC-4, 6.15.4) says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReservationCapabilities {
    /// Reservations can survive a loss of power (PTPL_C).
    pub can_persist: bool,
    /// The types that it has, a bit each; 0: it does not tell.
    pub types: u16,
}

impl ReservationCapabilities {
    /// Decodes them.
    pub fn decode(bytes: &[u8]) -> ReservationCapabilities {
        let flag = |at: usize, bit: u8| bytes.get(at).is_some_and(|byte| byte >> bit & 1 == 1);
        let places = [(1, 4, 1), (3, 4, 3), (5, 4, 5), (6, 4, 6), (7, 4, 7), (8, 5, 0)];
        let told = flag(3, 7);
        let types =
            places.iter().filter(|(_, at, bit)| told && flag(*at, *bit)).fold(0, |all, (kind, ..)| all | 1 << kind);
        ReservationCapabilities { can_persist: flag(2, 0), types }
    }

    /// Whether a type is there, as far as it is told.
    pub fn has(&self, kind: u8) -> bool {
        self.types == 0 || self.types >> kind & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_best_name_of_the_unit_itself_is_taken() {
        let mut body = vec![2, 1, 0, 5, b'A', b'C', b'M', b'E', b' '];
        body.extend_from_slice(&[1, 3, 0, 8, 0x60, 1, 2, 3, 4, 5, 6, 7]);
        // A port's name, and a designator that is cut off.
        body.extend_from_slice(&[1, 0x93, 0, 8, 0x50, 1, 2, 3, 4, 5, 6, 7, 1, 3, 0, 16, 0x60]);
        assert_eq!(wwid(&body).unwrap(), "naa.6001020304050607");
        assert_eq!(wwid(&body[..9]).unwrap(), "t10.ACME");
        assert_eq!(wwid(&[]), None);
        assert_eq!(identity(None, Some("42")).bytes(), b"serial:42");
        assert_eq!(identity(None, Some("")).bytes(), b"");
    }

    #[test]
    fn a_capacity_that_cannot_be_is_refused() {
        let of = |last: u64, block: u32| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&last.to_be_bytes());
            bytes[8..12].copy_from_slice(&block.to_be_bytes());
            (bytes[13], bytes[14]) = (3, 0x80);
            Capacity::decode(&bytes)
        };
        let fine = of(99, 512).unwrap();
        assert_eq!((fine.bytes(), fine.physical_bytes, fine.managed), (51200, 4096, true));
        assert!(of(u64::MAX, 512).is_err() && of(9, 0).is_err() && of(1 << 60, 4096).is_err());
        assert!(Capacity::decode(&[0; 15]).is_err());
    }

    #[test]
    fn reservations_are_read() {
        let list = [0, 0, 0, 1, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2];
        assert_eq!(keys(&list), (vec![1, 2], 24));
        assert_eq!(keys(&list[..20]), (vec![1], 24));
        let mut held = vec![0; 24];
        (held[7], held[15], held[21]) = (16, 9, 0x07);
        assert_eq!(reservation(&held), Some((9, 7)));
        assert_eq!(reservation(&[0; 8]), None);
        let told = ReservationCapabilities::decode(&[0, 8, 1, 0x80, 0xEA, 1, 0, 0]);
        assert!(told.can_persist && [1, 3, 5, 6, 7, 8].iter().all(|kind| told.has(*kind)) && !told.has(2));
    }

    proptest! {
        #[test]
        fn any_bytes_are_facts_or_a_reason(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = (Inquiry::decode(&bytes), wwid(&bytes), serial(&bytes), Limits::decode(&bytes), Caching::decode(&bytes));
            let _ = (Provisioning::decode(&bytes), keys(&bytes), reservation(&bytes), ReservationCapabilities::decode(&bytes));
            for page in 0..=255 {
                prop_assert!(page_body(page, &bytes).is_none_or(|body| body.len() + 4 <= bytes.len()));
            }
            if let Ok(capacity) = Capacity::decode(&bytes) {
                prop_assert!(capacity.bytes() > 0);
            }
        }
    }
}
