//! Owns what compiled code needs of the processor: ports, time, the local APIC and the I/O APIC, waiting, memory routines.
//! Promises that a wait ends at the next interrupt, at the latest one timer tick away.
//! Must not know PCI or the adapter.

use core::arch::{asm, global_asm};
use core::ptr::{read_volatile, write_volatile};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    static mut interrupt_counts: [u64; 96];
    static mut intx_register: u64;
    static mut intx_value: u32;
    static image_end: u8;
}

/// Vector of the adapter's message signalled interrupt.
pub const VECTOR_MSI: u8 = 0x40;
/// Vector of the adapter's INTx pin; its stub makes the adapter let go of the pin.
pub const VECTOR_INTX: u8 = 0x41;
const VECTOR_TIMER: u8 = 0x50;
const VECTOR_SPURIOUS: u8 = 0x5F;

const LOCAL_APIC: u64 = 0xFEE0_0000;
const IO_APIC: u64 = 0xFEC0_0000;
const IO_APIC_DATA: u64 = IO_APIC + 0x10;
/// The I/O APIC's entry of the adapter's pin: level-triggered.
const INTX_ENTRY: u32 = 1 << 15 | VECTOR_INTX as u32;

/// First byte behind the image.
pub fn end_of_image() -> u64 {
    (&raw const image_end) as u64
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: a port write changes no memory of this program; what devices do is theirs.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads a device register. The identity map makes every 32-bit address between 3 and 4 GiB one.
pub fn mmio_read(address: u64) -> u32 {
    // SAFETY: mapped, uncached, and never memory of this program.
    unsafe { read_volatile(address as *const u32) }
}

/// Writes a device register.
pub fn mmio_write(address: u64, value: u32) {
    // SAFETY: as above.
    unsafe { write_volatile(address as *mut u32, value) }
}

/// Reads a device register of 16 bits.
pub fn mmio_read16(address: u64) -> u16 {
    // SAFETY: as above.
    unsafe { read_volatile(address as *const u16) }
}

/// Writes a device register of 16 bits.
pub fn mmio_write16(address: u64, value: u16) {
    // SAFETY: as above.
    unsafe { write_volatile(address as *mut u16, value) }
}

/// Reads a device register of 8 bits.
pub fn mmio_read8(address: u64) -> u8 {
    // SAFETY: as above.
    unsafe { read_volatile(address as *const u8) }
}

/// Writes a device register of 8 bits.
pub fn mmio_write8(address: u64, value: u8) {
    // SAFETY: as above.
    unsafe { write_volatile(address as *mut u8, value) }
}

fn local_apic_write(register: u64, value: u32) {
    mmio_write(LOCAL_APIC + register, value);
}

/// Turns the interrupt controllers on: 8259s masked, local APIC enabled, a timer tick every 50 ms so that no wait is for ever.
pub fn start_interrupts() {
    const TICK_NANOSECONDS: u32 = 50_000_000;
    out8(0x21, 0xFF);
    out8(0xA1, 0xFF);
    local_apic_write(0xF0, 0x100 | u32::from(VECTOR_SPURIOUS));
    local_apic_write(0x3E0, 0xB); // divide by 1
    local_apic_write(0x320, 1 << 17 | u32::from(VECTOR_TIMER)); // periodic
    local_apic_write(0x380, TICK_NANOSECONDS);
}

/// Routes I/O APIC pin `line`, level-triggered, to [`VECTOR_INTX`]; the stub writes `value` to the adapter's
/// register at `register`, which must end the interrupt.
pub fn route_intx(line: u8, register: u64, value: u32) {
    // SAFETY: one processor, and the pin is still masked: the stub cannot be reading it.
    unsafe { write_volatile(&raw mut intx_register, register) };
    // SAFETY: as above.
    unsafe { write_volatile(&raw mut intx_value, value) };
    for (index, value) in [(0x11, 0), (0x10, INTX_ENTRY)] {
        mmio_write(IO_APIC, index + 2 * u32::from(line));
        mmio_write(IO_APIC_DATA, value);
    }
}

/// The same for an adapter that lets go of its pin only when its status is read: the stub masks the pin at the I/O APIC,
/// whose register select stays on the pin's entry.
pub fn route_intx_masked(line: u8) {
    const MASKED: u32 = 1 << 16;
    route_intx(line, IO_APIC_DATA, INTX_ENTRY | MASKED);
}

/// Lets the pin through again that [`route_intx_masked`] has routed.
pub fn unmask_intx() {
    mmio_write(IO_APIC_DATA, INTX_ENTRY);
}

/// How many interrupts of `vector` there were.
pub fn interrupts(vector: u8) -> u64 {
    // SAFETY: the stubs add to it behind the compiler's back, so it is read as volatile; vectors used are below 96.
    unsafe { read_volatile((&raw const interrupt_counts).cast::<u64>().add(usize::from(vector) % 96)) }
}

/// Halts until an interrupt, unless the count of `vector` is no longer `seen`.
pub fn wait_for_interrupt(vector: u8, seen: u64) {
    // SAFETY: HLT at CPL3 faults into the stub `exception`, which reads the count at RDI and returns behind the HLT.
    unsafe {
        let count = (&raw const interrupt_counts).cast::<u64>().add(usize::from(vector) % 96);
        asm!("hlt", in("rdi") count, in("rsi") seen, options(nostack));
    }
}

/// The time stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Time by the time stamp counter.
#[derive(Clone, Copy)]
pub struct Clock {
    ticks_per_millisecond: u64,
}

impl Clock {
    /// Measures the counter against the local APIC's timer, which runs at 1 GHz under KVM. The host may take the processor away at any
    /// time, also between the looks at the two: a moment is the closest of several pairs of looks.
    pub fn calibrate() -> Clock {
        const NANOSECONDS: u64 = 4_000_000;
        const LOOKS: u32 = 16;
        let remaining = || u64::from(mmio_read(LOCAL_APIC + 0x390));
        local_apic_write(0x320, 1 << 16 | u32::from(VECTOR_TIMER)); // one shot, masked
        local_apic_write(0x3E0, 0xB);
        let moment = || {
            let (mut closest, mut pair) = (u64::MAX, (0, 0));
            for _ in 0..LOOKS {
                let before = ticks();
                let left = remaining();
                let apart = ticks() - before;
                if apart < closest {
                    (closest, pair) = (apart, (left, before + apart / 2));
                }
            }
            pair
        };
        loop {
            local_apic_write(0x380, u32::MAX);
            let (first, start) = moment();
            while first.saturating_sub(remaining()) < NANOSECONDS {}
            let (now, end) = moment();
            // A timer that has run out has missed time: the host let this processor wait for seconds.
            if now > 0 && first > now {
                return Clock { ticks_per_millisecond: ((end - start) * 1_000_000 / (first - now)).max(1) };
            }
        }
    }

    pub fn microseconds(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1000 / u128::from(self.ticks_per_millisecond)) as u64
    }

    pub fn ticks_of_seconds(&self, seconds: u32) -> u64 {
        self.ticks_per_millisecond * 1000 * u64::from(seconds)
    }
}

/// Ends the machine through the exit port.
pub fn exit(status: u8) -> ! {
    loop {
        out8(0xF4, status);
    }
}

/// Has the interrupt descriptor table forgotten, so that the next fault is a triple one: not possible at CPL3, where the
/// stack of CPL0 can be taken away instead, which does the same.
pub fn triple_fault() -> ! {
    unsafe extern "C" {
        static mut task_state: [u32; 26];
    }
    // SAFETY: ends the machine: the next exception cannot push its frame, nor can the double fault that follows.
    unsafe {
        write_volatile((&raw mut task_state).cast::<u32>().add(1), 0x8000_0000);
        write_volatile((&raw mut task_state).cast::<u32>().add(2), 0);
        asm!("ud2", options(noreturn))
    }
}

/// The routines that compiled code calls for copies and comparisons.
mod routines {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
        // SAFETY: the caller's: both ranges are valid and do not overlap.
        unsafe { asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _) };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= count {
            // SAFETY: the destination does not start inside of the source, so copying upwards is right.
            return unsafe { memcpy(to, from, count) };
        }
        // SAFETY: the caller's: both ranges are valid; copying downwards is right for this overlap.
        unsafe {
            asm!(
                "std", "rep movsb", "cld",
                inout("rcx") count => _,
                inout("rdi") to.add(count).wrapping_sub(1) => _,
                inout("rsi") from.add(count).wrapping_sub(1) => _,
            );
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
        // SAFETY: the caller's: the range is valid.
        unsafe { asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8) };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
        for index in 0..count {
            // SAFETY: the caller's: both ranges are valid. Volatile, so that this loop is not made a call of itself.
            let (left, right) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
            if left != right {
                return i32::from(left) - i32::from(right);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
        // SAFETY: the caller's.
        unsafe { memcmp(a, b, count) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn strlen(text: *const u8) -> usize {
        let mut length = 0;
        // SAFETY: the caller's: a NUL-terminated string. Volatile as above.
        while unsafe { text.add(length).read_volatile() } != 0 {
            length += 1;
        }
        length
    }

    /// Asked for by `core`, which is built to unwind; this program aborts instead.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}
}
