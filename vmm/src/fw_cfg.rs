//! Owns the device through which firmware asks what machine it runs on: a selector and a stream of bytes at two ports.
//! Promises zeros beyond the end of any item; bounded state whatever is selected. No DMA.
//! Must not know what the items mean. Source: QEMU, docs/specs/fw_cfg.

use crate::bus::BusDevice;
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// First port: the selector, of 16 bits; the data are at the next one.
pub const FW_CFG_PORT: u64 = 0x510;
/// How many ports it has.
pub const FW_CFG_PORTS: u64 = 2;

const SIGNATURE: u16 = 0x00;
/// What the device can do: bit 0 is the traditional interface, bit 1 would be DMA.
const FEATURES: u16 = 0x01;
const CPUS: u16 = 0x05;
const MAX_CPUS: u16 = 0x0F;
const FILE_DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Bits of a selector that choose an item, one of which says that it is the architecture's own; the other one asks to write it.
const ITEM_MASK: u16 = 0xBFFF;
/// Room for a file's name in the directory, its closing NUL included.
const NAME_SIZE: usize = 56;

#[derive(Default)]
struct Cursor {
    item: u16,
    offset: usize,
}

/// The device.
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    cursor: Mutex<Cursor>,
}

impl FwCfg {
    /// A machine of `cpus` processors, with these files: name and content.
    pub fn new(cpus: u8, files: Vec<(&str, Vec<u8>)>) -> FwCfg {
        let cpus = u16::from(cpus).to_le_bytes().to_vec();
        let mut items = BTreeMap::from([
            (SIGNATURE, b"QEMU".to_vec()),
            (FEATURES, vec![1, 0, 0, 0]),
            (CPUS, cpus.clone()),
            (MAX_CPUS, cpus),
        ]);
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (item, (name, content)) in (FIRST_FILE..).zip(files) {
            assert!(name.len() < NAME_SIZE, "the name {name} is too long for the directory");
            directory.extend((content.len() as u32).to_be_bytes());
            directory.extend(item.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name.as_bytes());
            directory.resize(directory.len() + NAME_SIZE - name.len(), 0);
            items.insert(item, content);
        }
        items.insert(FILE_DIRECTORY, directory);
        FwCfg { items, cursor: Mutex::default() }
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset != 1 {
            return;
        }
        let mut cursor = self.cursor.lock();
        let item = self.items.get(&cursor.item).map_or(&[][..], Vec::as_slice);
        for byte in data {
            *byte = item.get(cursor.offset).copied().unwrap_or(0);
            cursor.offset = cursor.offset.saturating_add(1);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            *self.cursor.lock() = Cursor { item: u16::from_le_bytes([low, high]) & ITEM_MASK, offset: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(device: &FwCfg, selector: u16, length: usize) -> Vec<u8> {
        device.write(0, &selector.to_le_bytes());
        (0..length)
            .map(|_| {
                let mut byte = [0xAA];
                device.read(1, &mut byte);
                byte[0]
            })
            .collect()
    }

    #[test]
    fn items_and_files_are_found_as_firmware_looks_for_them() {
        let device = FwCfg::new(3, vec![("bootorder", b"first\n".to_vec()), ("etc/x", vec![7])]);
        assert_eq!(item(&device, 0, 6), b"QEMU\0\0");
        assert_eq!((item(&device, 1, 4), item(&device, 5, 2)), (vec![1, 0, 0, 0], vec![3, 0]));
        let directory = item(&device, 0x19, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..22], *b"\0\0\0\x06\0\x20\0\0bootorder\0");
        assert_eq!(directory[68..82], *b"\0\0\0\x01\0\x21\0\0etc/x\0");
        assert_eq!((item(&device, 0x20, 7), item(&device, 0x4021, 1)), (b"first\n\0".to_vec(), vec![7]));
        assert_eq!((item(&device, 0x22, 2), item(&device, 0x8000, 4)), (vec![0; 2], vec![0; 4]));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(accesses in prop::collection::vec((any::<bool>(), 0u64..2, prop::collection::vec(any::<u8>(), 1..5)), 0..64)) {
            let device = FwCfg::new(1, vec![("a", vec![1; 9])]);
            for (write, offset, mut data) in accesses {
                if write { device.write(offset, &data) } else { device.read(offset, &mut data) }
            }
        }
    }
}
