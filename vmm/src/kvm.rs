//! Owns the calls to KVM that need `unsafe`: guest memory slots and the shared run page.
//! Promises that a run page is never touched after its vCPU is gone.
//! Must not know devices or the guest's image.

use crate::error::{Error, Kind, Result};
use crate::memory::GuestRam;
use kvm_bindings::{
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config, kvm_run,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use parking_lot::Mutex;
use std::os::raw::c_int;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// What the machine asks of KVM: the capability, and its name as the KVM API document has it.
const NEEDED: [(Cap, &str); 11] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Where KVM may keep its three real-mode TSS pages: below the firmware's place, above the I/O and local APICs.
const TSS_ADDRESS: usize = 0xFFFB_D000;
/// Where KVM may keep the identity map of real mode: one page, beside the TSS.
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;

/// Opens KVM and checks that it can carry the machine.
///
/// # Errors
/// [`Kind::Kvm`] that says whether the device is missing, forbidden, or lacks a capability.
pub fn open(path: &Path) -> Result<Kvm> {
    let object = path.display().to_string();
    let bytes = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|cause| Error::new(Kind::Kvm, object.clone(), cause, "Give a path without NUL bytes"))?;
    let kvm = Kvm::new_with_path(bytes).map_err(|cause| {
        let next = match cause.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => {
                "Load the module (modprobe kvm_intel or kvm_amd) and enable virtualisation in the firmware"
            }
            libc::EACCES | libc::EPERM => {
                "Add your user to the group that owns it (usermod -aG kvm USER), log in again"
            }
            _ => "Check that it is the host's KVM device",
        };
        Error::new(Kind::Kvm, object.clone(), cause, next)
    })?;
    let version = kvm.get_api_version();
    if version != 12 {
        let cause = format!("it speaks API version {version}, not 12");
        return Err(Error::new(Kind::Kvm, object, cause, "Check that it is the host's KVM device"));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(Error::new(
                Kind::Kvm,
                object,
                format!("it lacks {name}"),
                "Use a host kernel whose KVM has it (Linux 4.13 or later on x86-64)",
            ));
        }
    }
    Ok(kvm)
}

/// Makes all of `ram` zero by giving its pages back to the host.
///
/// # Errors
/// [`Kind::Host`] when the host refuses.
pub fn clear(ram: &GuestRam) -> Result<()> {
    let failed = |cause: &dyn std::fmt::Display| Error::host("clearing guest memory", cause);
    for region in ram.iter() {
        let start = ram.get_host_address(region.start_addr()).map_err(|cause| failed(&cause))?;
        // SAFETY: the range is one live, private, anonymous mapping, which no Rust reference points into; afterwards it
        // reads as zeros.
        let cleared =
            unsafe { rustix::mm::madvise(start.cast(), region.len() as usize, rustix::mm::Advice::LinuxDontNeed) };
        cleared.map_err(|cause| failed(&cause))?;
    }
    Ok(())
}

/// Makes a VM with in-kernel 8259s, I/O APIC, local APICs and 8254, and gives it `ram`.
///
/// # Errors
/// [`Kind::Kvm`] naming the call that KVM refused.
pub fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(|cause| Error::kvm("KVM_CREATE_VM", cause))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        .map_err(|cause| Error::kvm("KVM_SET_IDENTITY_MAP_ADDR", cause))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(|cause| Error::kvm("KVM_SET_TSS_ADDR", cause))?;
    vm.create_irq_chip().map_err(|cause| Error::kvm("KVM_CREATE_IRQCHIP", cause))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(|cause| Error::kvm("KVM_CREATE_PIT2", cause))?;
    for (slot, region) in ram.iter().enumerate() {
        let host = ram
            .get_host_address(region.start_addr())
            .map_err(|cause| Error::kvm("looking up guest memory for KVM_SET_USER_MEMORY_REGION", cause))?;
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a live mapping of `ram`; every holder of the VM also holds a clone of `ram`, which
        // keeps the mapping, and the guest's accesses through KVM are to memory that is shared by design.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|cause| Error::kvm("KVM_SET_USER_MEMORY_REGION", cause))?;
    }
    Ok(vm)
}

/// Gives the VM `rom`, one region of memory beside its RAM, which the guest can only read.
///
/// # Errors
/// [`Kind::Kvm`] naming the call that KVM refused.
pub fn add_rom(vm: &VmFd, ram: &GuestRam, rom: &GuestRam) -> Result<()> {
    for (slot, region) in (ram.num_regions()..).zip(rom.iter()) {
        let host = rom
            .get_host_address(region.start_addr())
            .map_err(|cause| Error::kvm("looking up firmware for KVM_SET_USER_MEMORY_REGION", cause))?;
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a live mapping of `rom`; whoever runs a vCPU of the VM also holds a clone of `rom`, which keeps the
        // mapping, and the guest's accesses through KVM are to memory that is shared by design.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|cause| Error::kvm("KVM_SET_USER_MEMORY_REGION", cause))?;
    }
    Ok(())
}

/// Makes `lines` (8 to 15) of the second 8259 level-triggered, by its ELCR at port 0x4D1.
///
/// # Errors
/// [`Kind::Kvm`] naming the call that KVM refused.
pub fn set_level_triggered(vm: &VmFd, lines: impl IntoIterator<Item = u32>) -> Result<()> {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_SLAVE, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(|cause| Error::kvm("KVM_GET_IRQCHIP", cause))?;
    // SAFETY: this chip is an 8259, so the kernel filled `pic`; every byte pattern of its integers is valid.
    let pic = unsafe { &mut chip.chip.pic };
    pic.elcr = lines.into_iter().fold(pic.elcr, |elcr, line| elcr | 1 << (line - 8));
    vm.set_irqchip(&chip).map_err(|cause| Error::kvm("KVM_SET_IRQCHIP", cause))
}

/// A vCPU's run page and thread, for as long as that thread runs the vCPU.
struct Running {
    page: NonNull<kvm_run>,
    thread: libc::pthread_t,
}

// SAFETY: the page is memory shared with the kernel; through this pointer it is accessed only by volatile single-byte
// writes under the lock of `RunPage`, which the owner of the mapping empties before it unmaps.
unsafe impl Send for Running {}

/// A handle to make a vCPU leave the guest, from any thread.
#[derive(Clone, Default)]
pub struct Kick {
    running: Arc<Mutex<Option<Running>>>,
}

impl Kick {
    /// Ties this handle to the calling thread and its vCPU until the returned guard goes.
    pub fn attach<'kick>(&'kick self, vcpu: &mut VcpuFd) -> Attached<'kick> {
        let page = NonNull::from(vcpu.get_kvm_run());
        // SAFETY: takes no argument and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        *self.running.lock() = Some(Running { page, thread });
        Attached { kick: self }
    }

    /// Makes the vCPU leave the guest, or not enter it: its next or current KVM_RUN ends with EINTR.
    pub fn kick(&self) {
        if let Some(running) = self.running.lock().as_ref() {
            // SAFETY: the page is mapped while `running` is there (see `Attached`); the kernel reads this byte by a
            // single access, and nothing else in this process holds a reference to it.
            unsafe { (&raw mut (*running.page.as_ptr()).immediate_exit).write_volatile(1) };
            // SAFETY: the thread cannot have ended: it empties `running`, under this lock, before it does.
            unsafe { libc::pthread_kill(running.thread, kick_signal()) };
        }
    }
}

/// The time in which a [`Kick`] reaches a vCPU; it lies on the vCPU's thread, within the vCPU's life.
pub struct Attached<'kick> {
    kick: &'kick Kick,
}

impl Attached<'_> {
    /// Lets the vCPU enter the guest again after a kick was obeyed.
    pub fn clear(&self, vcpu: &mut VcpuFd) {
        let _exclusive = self.kick.running.lock();
        vcpu.set_kvm_immediate_exit(0);
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        *self.kick.running.lock() = None;
    }
}

/// The signal that interrupts KVM_RUN: a real-time one, which nothing else in the process uses.
fn kick_signal() -> c_int {
    vmm_sys_util::signal::SIGRTMIN()
}

/// Installs the empty handler of the kick signal: without it the signal would end the process.
///
/// # Errors
/// [`Kind::Host`] when the host refuses the handler.
pub fn install_kick_handler() -> Result<()> {
    extern "C" fn obey(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(kick_signal(), obey)
        .map_err(|cause| Error::host("signal handler for vCPU threads", cause))
}

/// The port access that the vCPU just left the guest for: its bytes, and how many of them are one item (a string
/// instruction moves several). Call it after a port exit only.
pub fn port_access(vcpu: &mut VcpuFd) -> (&mut [u8], usize) {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: `run` is a live mapping; every byte pattern of the union's fields is a valid integer.
    let io = unsafe { (*run).__bindgen_anon_1.io };
    let item = usize::from(io.size).max(1);
    // SAFETY: the kernel puts the data `data_offset` bytes into the run page's mapping, wholly inside it (KVM API,
    // section 5, KVM_EXIT_IO); the slice borrows the vCPU, so that neither it nor the kernel touches them meanwhile.
    let data = unsafe {
        std::slice::from_raw_parts_mut(run.cast::<u8>().add(io.data_offset as usize), item * io.count as usize)
    };
    (data, item)
}

/// KVM's reason for KVM_EXIT_INTERNAL_ERROR: suberror and up to 16 words of data (KVM API, section 5).
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    // SAFETY: as above; the caller asks after an internal-error exit.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let words = (internal.ndata as usize).min(internal.data.len());
    (internal.suberror, internal.data[..words].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kvm_device_is_reported_with_the_module_to_load() {
        let error = open(Path::new("/nonexistent/kvm")).expect_err("no such device");
        assert_eq!(error.kind(), Kind::Kvm);
        assert!(error.to_string().contains("modprobe"), "{error}");
    }

    #[test]
    fn a_device_that_is_not_kvm_is_reported() {
        let error = open(Path::new("/dev/null")).expect_err("not KVM");
        assert_eq!(error.kind(), Kind::Kvm);
        assert!(error.to_string().contains("API version"), "{error}");
    }
}
