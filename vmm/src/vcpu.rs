//! Owns one vCPU: its reset state, its thread's loop, and what a fatal exit says.
//! Promises to leave the guest when kicked, and to end the machine with a reason rather than spin.
//! Must not know which devices exist: accesses go to the buses.

use crate::bus::Bus;
use crate::control::{Control, Outcome};
use crate::error::{Error, Result};
use crate::kvm;
use crate::memory::GuestRam;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use vm_memory::{Bytes, GuestAddress};

/// How often a vCPU left the guest, by reason; only its own thread counts.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Port reads and writes.
    pub port: AtomicU64,
    /// Memory-mapped reads and writes.
    pub memory_mapped: AtomicU64,
    /// Everything else: signals, halts.
    pub other: AtomicU64,
}

/// The buses on which a vCPU's accesses travel.
#[derive(Clone)]
pub struct Buses {
    /// The 64 Ki I/O ports.
    pub port: Arc<Bus>,
    /// Physical addresses without RAM.
    pub memory_mapped: Arc<Bus>,
}

/// The CPUID leaves that vCPU `index` shows: what KVM supports, with the vCPU's own APIC id.
///
/// # Errors
/// [`crate::error::Kind::Kvm`] when KVM does not say what it supports.
pub fn cpuid(kvm: &Kvm, index: u8) -> Result<CpuId> {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    let mut leaves =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|cause| Error::kvm("KVM_GET_SUPPORTED_CPUID", cause))?;
    for leaf in leaves.as_mut_slice() {
        match leaf.function {
            1 => {
                leaf.ecx |= HYPERVISOR_PRESENT;
                leaf.ebx = (leaf.ebx & 0x00FF_FFFF) | u32::from(index) << 24;
            }
            0xB | 0x1F => leaf.edx = u32::from(index),
            _ => {}
        }
    }
    Ok(leaves)
}

/// Puts the boot vCPU at a PVH entry: 32-bit protected mode, paging off, flat segments, interrupts off, EBX at the
/// start information (Xen, "x86/HVM direct boot ABI").
///
/// # Errors
/// [`crate::error::Kind::Kvm`] naming the call that KVM refused.
pub fn set_pvh_state(vcpu: &VcpuFd, entry: u32, start_info: u32) -> Result<()> {
    const PROTECTED_MODE: u64 = 1;
    const FLAGS_RESERVED_ONE: u64 = 2;
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().map_err(|cause| Error::kvm("KVM_GET_SREGS", cause))?;
    sregs.cs = flat(0x08, 0xB);
    let data = flat(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xB, present: 1, ..Default::default() };
    (sregs.cr0, sregs.cr4, sregs.efer) = (PROTECTED_MODE, 0, 0);
    vcpu.set_sregs(&sregs).map_err(|cause| Error::kvm("KVM_SET_SREGS", cause))?;
    let regs = kvm_regs {
        rip: u64::from(entry),
        rbx: u64::from(start_info),
        rflags: FLAGS_RESERVED_ONE,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(|cause| Error::kvm("KVM_SET_REGS", cause))
}

/// Wires the local APIC as firmware leaves it: LINT0 takes the 8259s' interrupts, LINT1 is the NMI.
///
/// # Errors
/// [`crate::error::Kind::Kvm`] naming the call that KVM refused.
pub fn set_virtual_wire(vcpu: &VcpuFd) -> Result<()> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVER_EXTINT: u32 = 0x700;
    const DELIVER_NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().map_err(|cause| Error::kvm("KVM_GET_LAPIC", cause))?;
    for (register, value) in [(LVT_LINT0, DELIVER_EXTINT), (LVT_LINT1, DELIVER_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
            *byte = value as std::os::raw::c_char;
        }
    }
    vcpu.set_lapic(&lapic).map_err(|cause| Error::kvm("KVM_SET_LAPIC", cause))
}

/// What a vCPU's thread works with.
pub struct Runner {
    /// The vCPU's number.
    pub index: usize,
    /// The vCPU.
    pub vcpu: VcpuFd,
    /// The machine's control.
    pub control: Arc<Control>,
    /// Where accesses go.
    pub buses: Buses,
    /// The guest's memory, to show the bytes of an instruction that failed.
    pub ram: GuestRam,
    /// The firmware's memory, which the guest may run from.
    pub rom: Option<GuestRam>,
    /// Where exits are counted.
    pub exits: Arc<ExitCounts>,
}

/// While it lives the vCPU counts as in the guest; a panic of the thread then ends the machine instead of hanging it.
struct InGuest<'control>(&'control Control);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.finish(Outcome::Failed("a vCPU thread panicked".into()));
        }
        self.0.leave();
    }
}

impl Runner {
    /// Runs the vCPU until the machine ends. Call it on the vCPU's own thread.
    pub fn run(mut self) {
        let control = Arc::clone(&self.control);
        let attached = control.kick_of(self.index).attach(&mut self.vcpu);
        while control.enter(|| attached.clear(&mut self.vcpu)) {
            let _in_guest = InGuest(&control);
            if let Err(text) = self.run_until_kicked() {
                control.finish(Outcome::Failed(format!("vCPU {}: {text}", self.index)));
            }
        }
    }

    fn run_until_kicked(&mut self) -> std::result::Result<(), String> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioRead(address, data)) => {
                    count(&self.exits.memory_mapped);
                    self.buses.memory_mapped.read(address, data);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    count(&self.exits.memory_mapped);
                    self.buses.memory_mapped.write(address, data);
                }
                Ok(VcpuExit::IoIn(port, _)) => {
                    count(&self.exits.port);
                    let (data, item) = kvm::port_access(&mut self.vcpu);
                    data.chunks_exact_mut(item).for_each(|item| self.buses.port.read(u64::from(port), item));
                }
                Ok(VcpuExit::IoOut(port, _)) => {
                    count(&self.exits.port);
                    let (data, item) = kvm::port_access(&mut self.vcpu);
                    data.chunks_exact(item).for_each(|item| self.buses.port.write(u64::from(port), item));
                }
                Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => count(&self.exits.other),
                Ok(VcpuExit::Shutdown) => return Err(self.describe("the guest ended by a triple fault")),
                Ok(VcpuExit::InternalError) => return Err(self.describe_internal_error()),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let text = format!("the processor refused to enter the guest, reason {reason:#x} on CPU {cpu}");
                    return Err(self.describe(&text));
                }
                Ok(other) => {
                    let text = format!("KVM left the guest for a reason that is not handled: {other:?}");
                    return Err(self.describe(&text));
                }
                Err(cause) if cause.errno() == libc::EINTR => {
                    count(&self.exits.other);
                    return Ok(());
                }
                // An application processor that has not been started yet answers so.
                Err(cause) if cause.errno() == libc::EAGAIN => {}
                Err(cause) => return Err(self.describe(&format!("KVM_RUN failed: {cause}"))),
            }
        }
    }

    fn describe_internal_error(&mut self) -> String {
        // KVM API, section 5: the suberrors of KVM_EXIT_INTERNAL_ERROR.
        const SUBERRORS: [&str; 4] = [
            "an instruction that KVM cannot emulate",
            "an exception while an event was delivered",
            "an event could not be delivered",
            "an exit that KVM did not expect",
        ];
        let (suberror, data) = kvm::internal_error(&mut self.vcpu);
        let meaning = (suberror as usize).checked_sub(1).and_then(|index| SUBERRORS.get(index));
        let meaning = meaning.copied().unwrap_or("a suberror without a name");
        self.describe(&format!("KVM internal error {suberror}, {meaning}; data {data:x?}"))
    }

    /// `what`, followed by where the guest was: instruction pointer, its bytes, mode and faulting address.
    fn describe(&self, what: &str) -> String {
        let mut text = what.to_string();
        let (Ok(regs), Ok(sregs)) = (self.vcpu.get_regs(), self.vcpu.get_sregs()) else {
            return text + "; its registers cannot be read";
        };
        let privilege = sregs.cs.selector & 3;
        let _ = write!(
            text,
            "; RIP {:#x}, CPL {privilege}, RSP {:#x}, CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, EFER {:#x}, bytes",
            regs.rip, regs.rsp, sregs.cr0, sregs.cr2, sregs.cr3, sregs.efer
        );
        for distance in 0..15 {
            let address = sregs.cs.base.wrapping_add(regs.rip).wrapping_add(distance);
            let physical = self.vcpu.translate_gva(address).ok().filter(|found| found.valid != 0);
            let byte = physical.and_then(|found| {
                let memories = [Some(&self.ram), self.rom.as_ref()];
                let place = GuestAddress(found.physical_address);
                memories.into_iter().flatten().find_map(|memory| memory.read_obj::<u8>(place).ok())
            });
            let _ = match byte {
                Some(byte) => write!(text, " {byte:02x}"),
                None => write!(text, " ??"),
            };
        }
        text
    }
}

fn count(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}
