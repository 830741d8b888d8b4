//! Owns the small devices through which a guest ends its machine: i8042 reset, reset control port, exit port.
//! Promises that each of them ends the machine with its own outcome and nothing else does.
//! Must not know what happens to a machine after its end.

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};
use parking_lot::Mutex;
use std::sync::Arc;

/// First port of the i8042 keyboard controller: data at 0x60, status and command at 0x64.
pub const I8042_PORT: u64 = 0x60;
/// Ports from the i8042's data port to its command port; those between them belong to nobody here.
pub const I8042_PORTS: u64 = 5;
/// Port of the exit device: a byte written there ends the machine with that status.
pub const EXIT_PORT: u64 = 0xF4;
/// Port of the chipset's reset control register (Intel PIIX3, RC).
pub const RESET_CONTROL_PORT: u64 = 0xCF9;

/// The i8042: only its reset pulse, and a status that says that nothing is to be read and anything may be written; or one of
/// ones, as where there is none, so that firmware does not wait for an answer of a keyboard.
pub struct I8042 {
    /// The machine's control.
    pub control: Arc<Control>,
    /// What its status and its data read as.
    pub status: u8,
}

/// [`I8042::status`]: idle.
pub const I8042_IDLE: u8 = 0;
/// [`I8042::status`]: not there.
pub const I8042_ABSENT: u8 = 0xFF;

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // 0x61 is the in-kernel timer's; an access there never arrives.
        data.fill(if matches!(offset, 0 | 4) { self.status } else { 0xFF });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const PULSE_RESET: u8 = 0xFE;
        if offset == 4 && data == [PULSE_RESET] {
            self.control.finish(Outcome::Reset);
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

/// The port by which firmware tells of its work, a byte at a time (Bochs; QEMU's isa-debugcon).
pub const DEBUG_PORT: u64 = 0x402;

/// The debug port: each line goes to this program's log, if anybody wants lines of that level.
#[derive(Default)]
pub struct DebugPort(Mutex<Vec<u8>>);

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        /// What firmware looks for before it writes.
        const HERE: u8 = 0xE9;
        data.fill(if tracing::enabled!(tracing::Level::DEBUG) { HERE } else { 0xFF });
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        const LINE_MAX: usize = 256;
        let mut line = self.0.lock();
        for byte in data {
            if *byte == b'\n' || line.len() == LINE_MAX {
                tracing::debug!("firmware: {}", String::from_utf8_lossy(&line).trim_end());
                line.clear();
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
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
        let i8042 = I8042 { control: control.clone(), status: I8042_IDLE };
        i8042.write(0, &[0xFE]);
        i8042.write(4, &[0xD1]);
        i8042.read(4, &mut byte);
        ResetControl(control.clone()).write(0, &[0x02]);
        assert_eq!(byte, [0]);
        ExitPort(control.clone()).write(0, &[3]);
        i8042.write(4, &[0xFE]);
        assert_eq!(control.wait(), Outcome::Exited(3));
    }
}
