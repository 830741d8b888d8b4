//! Owns COM1 as a place for lines.
//! Promises that a line leaves in one go: each byte costs an exit, so nothing is sent that need not be.
//! Must not know what the lines say.

use crate::cpu;
use core::fmt::{self, Write};

const COM1: u16 = 0x3F8;

/// Writes to COM1. The machine's 16550 takes bytes at any time, so its status is not asked for.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(COM1, byte));
        Ok(())
    }
}

/// Prints a line on COM1.
macro_rules! line {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::console::Console, $($argument)*);
    }};
}
pub(crate) use line;
