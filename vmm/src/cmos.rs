//! Owns the real-time clock and its memory (MC146818) at ports 70h and 71h: the host's time, and what firmware asks of a PC there.
//! Promises time in UTC; a guest may write all of the memory and none of the time.
//! Must not know interrupts: the clock raises none.

use crate::bus::BusDevice;
use crate::memory::DEVICE_GAP_START;
use parking_lot::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

/// First port: the index; the register that it names is at the next one.
pub const CMOS_PORT: u64 = 0x70;
/// How many ports it has.
pub const CMOS_PORTS: u64 = 2;

/// Registers (Motorola MC146818; those from 10h on as IBM's AT and QEMU's PC use them).
mod register {
    pub const SECONDS: u8 = 0x00;
    pub const MINUTES: u8 = 0x02;
    pub const HOURS: u8 = 0x04;
    pub const DAY_OF_WEEK: u8 = 0x06;
    pub const DAY: u8 = 0x07;
    pub const MONTH: u8 = 0x08;
    pub const YEAR: u8 = 0x09;
    pub const STATUS_A: u8 = 0x0A;
    pub const STATUS_B: u8 = 0x0B;
    pub const STATUS_C: u8 = 0x0C;
    pub const STATUS_D: u8 = 0x0D;
    pub const BASE_MEMORY: u8 = 0x15;
    pub const EXTENDED_MEMORY: u8 = 0x17;
    pub const EXTENDED_MEMORY_AGAIN: u8 = 0x30;
    pub const CENTURY: u8 = 0x32;
    pub const MEMORY_ABOVE_16M: u8 = 0x34;
    pub const MEMORY_ABOVE_4G: u8 = 0x5B;
}

const SIZE: usize = 128;

struct State {
    index: u8,
    memory: [u8; SIZE],
}

/// The device.
pub struct Cmos(Mutex<State>);

impl Cmos {
    /// The device of a machine with `ram` bytes of memory.
    pub fn new(ram: u64) -> Cmos {
        /// A clock of 32 kHz.
        const RATE: u8 = 0x26;
        /// 24 hours, BCD.
        const FORMAT: u8 = 0x02;
        const BASE_KIB: u16 = 640;
        let below = ram.min(DEVICE_GAP_START);
        let capped = |units: u64| u16::try_from(units).unwrap_or(u16::MAX);
        let extended = capped(below.saturating_sub(1 << 20) >> 10);
        let above_16m = capped(below.saturating_sub(16 << 20) >> 16);
        let above_4g = (ram - below) >> 16;
        let mut memory = [0; SIZE];
        memory[usize::from(register::STATUS_A)] = RATE;
        memory[usize::from(register::STATUS_B)] = FORMAT;
        for (at, value) in [
            (register::BASE_MEMORY, BASE_KIB),
            (register::EXTENDED_MEMORY, extended),
            (register::EXTENDED_MEMORY_AGAIN, extended),
            (register::MEMORY_ABOVE_16M, above_16m),
        ] {
            memory[usize::from(at)..usize::from(at) + 2].copy_from_slice(&value.to_le_bytes());
        }
        let at = usize::from(register::MEMORY_ABOVE_4G);
        memory[at..at + 3].copy_from_slice(&above_4g.to_le_bytes()[..3]);
        Cmos(Mutex::new(State { index: 0, memory }))
    }
}

/// A moment as the clock shows it.
struct Moment {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    day_of_week: u8,
    day: u8,
    month: u8,
    year: u64,
}

impl Moment {
    /// `seconds` since the beginning of 1970, in the Gregorian calendar. (By years that begin in March, so that the day that leap
    /// years have more is the last one.)
    fn of(seconds: u64) -> Moment {
        const DAYS_OF_400_YEARS: u64 = 146_097;
        const DAYS_BEFORE_1970: u64 = 719_468; // since 1 March of the year 0
        let days = seconds / 86_400;
        let shifted = days + DAYS_BEFORE_1970;
        let (era, day_of_era) = (shifted / DAYS_OF_400_YEARS, shifted % DAYS_OF_400_YEARS);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Moment {
            second: (seconds % 60) as u8,
            minute: (seconds / 60 % 60) as u8,
            hour: (seconds / 3600 % 24) as u8,
            day_of_week: ((days + 4) % 7) as u8 + 1,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            month: month as u8,
            year: 400 * era + year_of_era + u64::from(month <= 2),
        }
    }

    /// A register of time; `None` for any other one.
    fn register(&self, index: u8) -> Option<u8> {
        let value = match index {
            register::SECONDS => self.second,
            register::MINUTES => self.minute,
            register::HOURS => self.hour,
            register::DAY_OF_WEEK => self.day_of_week,
            register::DAY => self.day,
            register::MONTH => self.month,
            register::YEAR => (self.year % 100) as u8,
            register::CENTURY => (self.year / 100 % 100) as u8,
            _ => return None,
        };
        Some(((value / 10) << 4) | (value % 10))
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        let (1, [byte]) = (offset, data) else { return };
        const VALID: u8 = 0x80;
        let state = self.0.lock();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        *byte = match state.index {
            register::STATUS_C => 0,
            register::STATUS_D => VALID,
            index => Moment::of(now).register(index).unwrap_or(state.memory[usize::from(index)]),
        };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const UPDATING: u8 = 0x80;
        /// The seventh bit of the index keeps non-maskable interrupts out.
        const INDEX: u8 = 0x7F;
        let &[byte] = data else { return };
        let mut state = self.0.lock();
        let index = state.index;
        match (offset, index) {
            (0, _) => state.index = byte & INDEX,
            (_, register::STATUS_A) => state.memory[usize::from(index)] = byte & !UPDATING,
            (_, register::STATUS_B) => state.memory[usize::from(index)] = byte & 0x70 | 0x02,
            _ => state.memory[usize::from(index)] = byte,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(device: &Cmos, index: u8) -> u8 {
        device.write(0, &[index]);
        let mut byte = [0];
        device.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn moments_are_shown_in_bcd() {
        let shown = |seconds| {
            let moment = Moment::of(seconds);
            [0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00, 0x06].map(|index| moment.register(index).expect("time"))
        };
        assert_eq!(shown(0), [0x19, 0x70, 0x01, 0x01, 0x00, 0x00, 0x00, 5]);
        assert_eq!(shown(951_827_696), [0x20, 0x00, 0x02, 0x29, 0x12, 0x34, 0x56, 3]);
        assert_eq!(shown(1_709_251_199), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x59, 5]);
        assert_eq!(shown(4_102_444_800), [0x21, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 6]);
        assert_eq!(Moment::of(0).register(0x0A), None);
    }

    #[test]
    fn memory_sizes_are_where_firmware_looks_for_them() {
        let device = Cmos::new((3 << 30) + (1 << 30));
        let half = |at| u16::from_le_bytes([read(&device, at), read(&device, at + 1)]);
        assert_eq!((half(0x15), half(0x17), half(0x34)), (640, 0xFFFF, 0xBF00));
        assert_eq!([0x5B, 0x5C, 0x5D].map(|at| read(&device, at)), [0x00, 0x40, 0]);
        assert_eq!((read(&device, 0x0D), read(&device, 0x0A) & 0x80), (0x80, 0));
    }

    proptest! {
        #[test]
        fn any_access_is_answered_and_memory_keeps_what_it_was_given(index in 0x0Eu8..0x80, value: u8, offset in 0u64..2, bytes in prop::collection::vec(any::<u8>(), 1..5)) {
            let device = Cmos::new(64 << 20);
            device.write(offset, &bytes);
            device.read(offset, &mut bytes.clone());
            device.write(0, &[index | 0x80]);
            device.write(1, &[value]);
            prop_assert!(index == 0x32 || read(&device, index) == value);
        }
    }
}
