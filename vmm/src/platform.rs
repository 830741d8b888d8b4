//! Owns the small devices through which a guest ends its machine: i8042 reset, reset control port, exit port.
//! Promises that each of them ends the machine with its own outcome and nothing else does.
//! Must not know what happens to a machine after its end.

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};
use std::sync::Arc;

/// First port of the i8042 keyboard controller: data at 0x60, status and command at 0x64.
pub const I8042_PORT: u64 = 0x60;
/// Ports from the i8042's data port to its command port; those between them belong to nobody here.
pub const I8042_PORTS: u64 = 5;
/// Port of the exit device: a byte written there ends the machine with that status.
pub const EXIT_PORT: u64 = 0xF4;
/// Port of the chipset's reset control register (Intel PIIX3, RC).
pub const RESET_CONTROL_PORT: u64 = 0xCF9;

/// The i8042: only its status (nothing to read, ready to be written) and its reset pulse.
pub struct I8042(pub Arc<Control>);

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // 0x61 is the in-kernel timer's; an access there never arrives.
        data.fill(if matches!(offset, 0 | 4) { 0 } else { 0xFF });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const PULSE_RESET: u8 = 0xFE;
        if offset == 4 && data == [PULSE_RESET] {
            self.0.finish(Outcome::Reset);
        }
    }
}

/// The exit device: `out 0xF4, status`. Reads give ones.
pub struct ExitPort(pub Arc<Control>);

impl BusDevice for ExitPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(status) = data.first() {
            self.0.finish(Outcome::Exited(*status));
        }
    }
}

/// The reset control register: a write that sets bit 2 resets the machine.
pub struct ResetControl(pub Arc<Control>);

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        const RESET_CPU: u8 = 1 << 2;
        if data.first().is_some_and(|byte| byte & RESET_CPU != 0) {
            self.0.finish(Outcome::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_documented_writes_end_the_machine_and_the_first_one_wins() {
        let control = Control::new(0);
        let mut byte = [0];
        I8042(control.clone()).write(0, &[0xFE]);
        I8042(control.clone()).write(4, &[0xD1]);
        I8042(control.clone()).read(4, &mut byte);
        ResetControl(control.clone()).write(0, &[0x02]);
        assert_eq!(byte, [0]);
        ExitPort(control.clone()).write(0, &[3]);
        I8042(control.clone()).write(4, &[0xFE]);
        assert_eq!(control.wait(), Outcome::Exited(3));
    }
}
