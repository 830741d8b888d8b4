//! Owns the dispatch of port and memory accesses that leave the guest.
//! Promises that every access is answered: where no device is, reads give ones and writes vanish.
//! Must not know what any device does.

use parking_lot::RwLock;
use std::sync::Arc;

/// A device that answers accesses within one of its ranges. All of its state is behind its own locks.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes the `data` that the guest writes `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Range {
    start: u64,
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space with devices in it: the ports, or the memory-mapped I/O.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>,
}

/// The range asked for overlaps one that is taken, is empty, or wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the range of {length:#x} bytes at {start:#x} is empty, wraps, or overlaps a device")]
pub struct RangeTaken {
    start: u64,
    length: u64,
}

impl Bus {
    /// Puts `device` at `start..start + length`.
    ///
    /// # Errors
    /// [`RangeTaken`]; the bus is then unchanged.
    pub fn insert(&self, start: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), RangeTaken> {
        let taken = RangeTaken { start, length };
        let end = start.checked_add(length).filter(|end| *end > start).ok_or(taken)?;
        let mut ranges = self.ranges.write();
        let place = ranges.partition_point(|range| range.start < start);
        let before = place.checked_sub(1).map(|index| &ranges[index]);
        let clear_before = before.is_none_or(|range| range.start + range.length <= start);
        let clear_after = ranges.get(place).is_none_or(|range| end <= range.start);
        if !(clear_before && clear_after) {
            return Err(taken);
        }
        ranges.insert(place, Range { start, length, device });
        Ok(())
    }

    /// Takes away the device whose range starts at `start`, if there is one.
    pub fn remove(&self, start: u64) {
        self.ranges.write().retain(|range| range.start != start);
    }

    /// Answers a read of `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xFF),
        }
    }

    /// Answers a write of `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device whose range holds the whole access, and the offset in it. The bus lock is not held afterwards, so
    /// that a device may change the bus while it answers (a BAR that moves).
    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read();
        let index = ranges.partition_point(|range| range.start <= address).checked_sub(1)?;
        let range = &ranges[index];
        let offset = address - range.start;
        (offset.checked_add(length as u64)? <= range.length).then(|| (offset, Arc::clone(&range.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().push((offset, data.len()));
            data.fill(0x5A);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.len()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_only_when_all_of_it_lies_inside() {
        let bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(0x3F8, 8, device.clone()).expect("free");
        let mut data = [0; 4];
        bus.read(0x3FC, &mut data);
        assert_eq!(data, [0x5A; 4]);
        bus.read(0x3FD, &mut data);
        assert_eq!(data, [0xFF; 4], "half outside");
        bus.write(u64::MAX, &data);
        assert_eq!(*device.0.lock(), [(4, 4)]);
    }

    proptest! {
        #[test]
        fn ranges_on_a_bus_never_overlap(wanted in prop::collection::vec((0u64..64, 0u64..16), 1..40)) {
            let bus = Bus::default();
            let mut taken = [false; 128];
            for (start, length) in wanted {
                let cells = start as usize..(start + length) as usize;
                let free = length > 0 && taken[cells.clone()].iter().all(|cell| !cell);
                prop_assert_eq!(bus.insert(start, length, Arc::new(Recorder::default())).is_ok(), free);
                if free {
                    taken[cells].fill(true);
                }
            }
            for (address, taken) in taken.iter().enumerate() {
                let mut data = [0];
                bus.read(address as u64, &mut data);
                prop_assert_eq!(data[0] == 0x5A, *taken);
            }
        }
    }
}
