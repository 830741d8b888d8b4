//! Owns: the adapter's local RAM as it is after a reset: room of a BIOS, and the settings that are known as AutoSCSI.
//! Promises: the values that let drivers use tags, wide transfers and all targets.
//! Must not know: who reads it. Source: Linux, drivers/scsi/BusLogic.h (AutoSCSI data).

use crate::hba::queue::OWN_TARGET;

/// Size of the local RAM in bytes.
pub(super) const LOCAL_RAM_SIZE: usize = 256;
/// Where the settings begin.
const SETTINGS: usize = 64;

/// The local RAM of an adapter on interrupt `line`.
pub(super) fn local_ram(line: u8) -> [u8; LOCAL_RAM_SIZE] {
    const CHOSEN_BY_ITSELF: u8 = 0x80;
    let pieces: &[(usize, &[u8])] = &[
        // A wide adapter without floppy controller and BIOS.
        (0x02, &[0x40]),
        (0x03, b" 958  "),
        // Level-triggered.
        (0x0A, &[0x04]),
        (0x0C, &[line | CHOSEN_BY_ITSELF]),
        (0x0E, &[OWN_TARGET]),
        // Termination of both halves, parity, and that the bus is reset at a hard reset.
        (0x0F, &[0x27]),
        // Extended translation.
        (0x12, &[0x04]),
        // A bit for each target: enabled, wide, fast, synchronous, may disconnect.
        (0x13, &[0xFF; 10]),
        // Ultra.
        (0x22, &[0xFF; 2]),
        // The last logical unit number that a BIOS looks at; how it boots.
        (0x29, &[0x07]),
        (0x2B, &[0x05]),
    ];
    let mut ram = [0; LOCAL_RAM_SIZE];
    for (offset, bytes) in pieces {
        ram[SETTINGS + offset..][..bytes.len()].copy_from_slice(bytes);
    }
    ram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_find_what_they_look_for() {
        let settings = &local_ram(10)[64..128];
        assert_eq!(&settings[0x03..0x09], b" 958  ");
        assert_eq!((settings[0x0C], settings[0x0E], settings[0x2D]), (0x8A, 7, 0));
        // Without the permission to disconnect, Linux uses no tags.
        assert_eq!(settings[0x1B..0x1D], [0xFF, 0xFF]);
        assert_eq!(settings[0x1D..0x21], [0; 4]);
    }
}
