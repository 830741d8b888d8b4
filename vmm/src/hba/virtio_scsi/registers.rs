//! Owns: the register window of a modern virtio PCI device and what the driver has written into it (virtio 1.2, 4.1.4).
//! Promises: pure; features and queues that cannot be are not taken; a write gives at most one thing to do.
//! Must not know: guest memory, threads, requests.

use super::rings::{CDB_SIZE, NO_VECTOR, QUEUES, REQUEST_QUEUES, SENSE_SIZE, VECTORS, Vectors};
use super::virtqueue::{MAX_SIZE, Setup};
use crate::hba::window;

/// Size of the window in bytes.
pub(super) const WINDOW_SIZE: u32 = 0x4000;
/// Where the interrupt status is.
pub(super) const INTERRUPT_STATUS: u32 = 0x1000;
/// Where the device's own configuration is.
pub(super) const DEVICE: u32 = 0x2000;
/// Where all queues are notified.
pub(super) const NOTIFY: u32 = 0x3000;
/// Size of the common configuration.
pub(super) const COMMON_SIZE: u32 = 0x38;
/// Size of the device's own configuration.
pub(super) const DEVICE_SIZE: u32 = 36;

/// A part of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    Common,
    InterruptStatus,
    Device,
    Notify,
    Reserved,
}

const WINDOW: &[(Area, u32)] = &[
    (Area::Common, COMMON_SIZE),
    (Area::Reserved, INTERRUPT_STATUS - COMMON_SIZE),
    (Area::InterruptStatus, 1),
    (Area::Reserved, DEVICE - INTERRUPT_STATUS - 1),
    (Area::Device, DEVICE_SIZE),
    (Area::Reserved, NOTIFY - DEVICE - DEVICE_SIZE),
    (Area::Notify, 4),
    (Area::Reserved, WINDOW_SIZE - NOTIFY - 4),
];

const _: () = assert!(window::size(WINDOW) == WINDOW_SIZE);

/// The area that holds the byte at `offset`.
pub(super) fn area_at(offset: u64) -> Area {
    window::register_at(WINDOW, offset).unwrap_or(Area::Reserved)
}

/// Feature bits: indirect descriptors, version 1, hot plug, changes of parameters.
const FEATURES: u64 = 1 << 28 | 1 << 32 | 1 << 1 | 1 << 2;
const VERSION_1: u64 = 1 << 32;
/// Device status: the driver is ready.
const DRIVER_OK: u8 = 4;
/// Device status: the features are agreed on.
const FEATURES_OK: u8 = 8;
/// Device status: the device must be reset.
pub(super) const NEEDS_RESET: u8 = 64;

/// What follows from a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The driver is ready: use its queues.
    Start(Box<[Option<Setup>; QUEUES]>),
    /// Reset the device.
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct QueueRegisters {
    setup: Setup,
    enabled: bool,
    vector: u16,
}

/// The common configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    configuration_vector: u16,
    queues: [QueueRegisters; QUEUES],
}

impl Common {
    pub(super) fn new() -> Self {
        let setup = Setup { size: MAX_SIZE, ..Setup::default() };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            configuration_vector: NO_VECTOR,
            queues: [QueueRegisters { setup, enabled: false, vector: NO_VECTOR }; QUEUES],
        }
    }

    /// The common configuration as it reads; `status` are bits of the device status that the device itself sets.
    pub(super) fn bytes(&self, status: u8) -> [u8; COMMON_SIZE as usize] {
        let mut bytes = [0; COMMON_SIZE as usize];
        let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(FEATURES, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0C, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.configuration_vector.to_le_bytes());
        put(0x12, &(QUEUES as u16).to_le_bytes());
        put(0x14, &[self.status | status]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that is not there has the size 0.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.setup.size.to_le_bytes());
            put(0x1A, &queue.vector.to_le_bytes());
            put(0x1C, &u16::from(queue.enabled).to_le_bytes());
            put(0x20, &queue.setup.descriptors.to_le_bytes());
            put(0x28, &queue.setup.available.to_le_bytes());
            put(0x30, &queue.setup.used.to_le_bytes());
        }
        bytes
    }

    /// A write of `data` at `offset`: one whole field, or 4 of the 8 bytes of a queue's address.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0C, 4) if self.status & FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.driver_features = self.driver_features >> 32 << 32 | value,
                1 => self.driver_features = self.driver_features & u64::from(u32::MAX) | value << 32,
                _ => {}
            },
            (0x10, 2) => self.configuration_vector = known_vector(value as u16),
            (0x14, 1) => return self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            // A vector may be changed while the queue is used.
            (0x1A, 2) => {
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
                    queue.vector = known_vector(value as u16);
                }
            }
            (0x18..0x38, length) => self.write_queue(offset, length, value),
            _ => {}
        }
        None
    }

    /// By which vectors the driver wants to be interrupted.
    pub(super) fn vectors(&self) -> Vectors {
        Vectors { configuration: self.configuration_vector, queues: self.queues.map(|queue| queue.vector) }
    }

    fn write_queue(&mut self, offset: u64, length: usize, value: u64) {
        let running = self.status & DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.enabled) else {
            return;
        };
        let low = |field: &mut u64| *field = *field >> 32 << 32 | value & u64::from(u32::MAX);
        let high = |field: &mut u64| *field = *field & u64::from(u32::MAX) | value << 32;
        match (offset, length) {
            (0x18, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= MAX_SIZE {
                    queue.setup.size = size;
                }
            }
            // All queues are given before the driver is ready.
            (0x1C, 2) => queue.enabled = value == 1 && !running,
            (0x20, 8) => queue.setup.descriptors = value,
            (0x20, 4) => low(&mut queue.setup.descriptors),
            (0x24, 4) => high(&mut queue.setup.descriptors),
            (0x28, 8) => queue.setup.available = value,
            (0x28, 4) => low(&mut queue.setup.available),
            (0x2C, 4) => high(&mut queue.setup.available),
            (0x30, 8) => queue.setup.used = value,
            (0x30, 4) => low(&mut queue.setup.used),
            (0x34, 4) => high(&mut queue.setup.used),
            _ => {}
        }
    }

    fn set_status(&mut self, status: u8) -> Option<Action> {
        if status == 0 {
            *self = Self::new();
            return Some(Action::Reset);
        }
        let acceptable = self.driver_features & !FEATURES == 0 && self.driver_features & VERSION_1 != 0;
        let mut added = status & !self.status & !NEEDS_RESET;
        if added & FEATURES_OK != 0 && !acceptable {
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        let setups = self.queues.map(|queue| queue.enabled.then_some(queue.setup));
        (added & DRIVER_OK != 0).then_some(Action::Start(Box::new(setups)))
    }
}

/// A vector that the table does not have is none (virtio 1.2, 4.1.5.1.3).
fn known_vector(vector: u16) -> u16 {
    if usize::from(vector) < VECTORS { vector } else { NO_VECTOR }
}

/// The device's own configuration (virtio 1.2, 5.6.4). The sizes of CDB and sense data stay as they are.
pub(super) fn device_bytes(targets: u8) -> [u8; DEVICE_SIZE as usize] {
    let mut bytes = [0; DEVICE_SIZE as usize];
    let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
    put(0x00, &(REQUEST_QUEUES as u32).to_le_bytes());
    put(0x04, &u32::from(MAX_SIZE - 2).to_le_bytes());
    put(0x08, &0xFFFFu32.to_le_bytes());
    put(0x0C, &128u32.to_le_bytes());
    put(0x10, &16u32.to_le_bytes());
    put(0x14, &(SENSE_SIZE as u32).to_le_bytes());
    put(0x18, &(CDB_SIZE as u32).to_le_bytes());
    put(0x1E, &u16::from(targets - 1).to_le_bytes());
    put(0x20, &16383u32.to_le_bytes());
    bytes
}

/// The vendor-specific capabilities, each from its length on: where the areas are in BAR 0, and last the window to them through the
/// configuration space (virtio 1.2, 4.1.4).
pub(super) const CAPABILITIES: &[&[u8]] = &[
    &area(1, 0, COMMON_SIZE),
    &notify_area(),
    &area(3, INTERRUPT_STATUS, 1),
    &area(4, DEVICE, DEVICE_SIZE),
    &WINDOW_TO_ALL,
];

/// The driver says where it looks, and how many bytes.
const WINDOW_TO_ALL: [u8; 18] = longer(area(5, 0, 0));

const fn area(kind: u8, offset: u32, length: u32) -> [u8; 14] {
    let (at, size) = (offset.to_le_bytes(), length.to_le_bytes());
    [16, kind, 0, 0, 0, 0, at[0], at[1], at[2], at[3], size[0], size[1], size[2], size[3]]
}

/// The multiplier is 0: one address notifies all queues.
const fn notify_area() -> [u8; 18] {
    longer(area(2, NOTIFY, 4))
}

/// The same capability with four more bytes.
const fn longer(area: [u8; 14]) -> [u8; 18] {
    let mut bytes = [0; 18];
    let mut index = 0;
    while index < area.len() {
        bytes[index] = area[index];
        index += 1;
    }
    bytes[0] = 20;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn negotiate(common: &mut Common, features: u64) -> u8 {
        for status in [1u8, 3] {
            common.write(0x14, &[status]);
        }
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            common.write(0x08, &select.to_le_bytes());
            common.write(0x0C, &half.to_le_bytes());
        }
        common.write(0x14, &[11]);
        common.bytes(0)[0x14]
    }

    #[test]
    fn only_features_that_were_offered_are_agreed_on_and_version_1_must_be_among_them() {
        for (features, status) in [(VERSION_1, 11), (FEATURES, 11), (0, 3), (1 << 28, 3), (VERSION_1 | 1, 3)] {
            assert_eq!(negotiate(&mut Common::new(), features), status, "{features:x}");
        }
    }

    #[test]
    fn a_ready_driver_starts_the_queues_that_it_enabled() {
        let mut common = Common::new();
        negotiate(&mut common, VERSION_1);
        common.write(0x16, &2u16.to_le_bytes());
        common.write(0x18, &300u16.to_le_bytes());
        assert_eq!(common.bytes(0)[0x18..0x1A], [0, 1]);
        common.write(0x18, &64u16.to_le_bytes());
        common.write(0x20, &0x1_2345_6000u64.to_le_bytes());
        common.write(0x28, &0x7000u32.to_le_bytes());
        common.write(0x30, &0x8000u32.to_le_bytes());
        common.write(0x34, &2u32.to_le_bytes());
        common.write(0x1C, &1u16.to_le_bytes());
        let mut expected = [None; QUEUES];
        let setup = Setup { size: 64, descriptors: 0x1_2345_6000, available: 0x7000, used: 0x2_0000_8000 };
        expected[2] = Some(setup);
        assert_eq!(common.write(0x14, &[15]), Some(Action::Start(Box::new(expected))));
        assert_eq!(common.write(0x14, &[15]), None);
        // What is enabled stays as it is; a queue that is not there has no size.
        common.write(0x18, &32u16.to_le_bytes());
        assert_eq!(common.bytes(NEEDS_RESET)[0x14..0x1A], [79, 0, 2, 0, 64, 0]);
        common.write(0x16, &(QUEUES as u16).to_le_bytes());
        assert_eq!(common.bytes(0)[0x18..0x1A], [0, 0]);
        assert_eq!((common.write(0x14, &[0]), common), (Some(Action::Reset), Common::new()));
    }

    #[test]
    fn vectors_of_the_table_are_taken_and_others_are_none() {
        let mut common = Common::new();
        let none = Vectors { configuration: NO_VECTOR, queues: [NO_VECTOR; QUEUES] };
        assert_eq!(common.vectors(), none);
        common.write(0x10, &0u16.to_le_bytes());
        common.write(0x16, &3u16.to_le_bytes());
        common.write(0x1A, &6u16.to_le_bytes());
        assert_eq!(
            (common.bytes(0)[0x10..0x12].to_vec(), common.bytes(0)[0x1A..0x1C].to_vec()),
            (vec![0, 0], vec![6, 0])
        );
        let mut queues = [NO_VECTOR; QUEUES];
        queues[3] = 6;
        assert_eq!(common.vectors(), Vectors { configuration: 0, queues });
        common.write(0x1A, &7u16.to_le_bytes());
        common.write(0x10, &NO_VECTOR.to_le_bytes());
        assert_eq!(common.vectors(), none);
    }

    proptest! {
        #[test]
        fn any_sequence_of_writes_is_taken(
            writes in prop::collection::vec((0u64..0x40, prop::collection::vec(any::<u8>(), 0..12)), 0..100),
        ) {
            let mut common = Common::new();
            for (offset, data) in writes {
                common.write(offset, &data);
                common.bytes(0);
            }
        }
    }
}
