//! Promises of a machine as a library: it runs, pauses, resets and stops, with an adapter whose disk is in memory.
//! These tests need /dev/kvm.

use scsi::Geometry;
use scsi::testing::{GEOMETRY, MemoryDisk};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm::control::Outcome;
use vmm::error::{Error, Kind};
use vmm::hba::buslogic::BusLogic;
use vmm::hba::lsilogic::LsiLogic;
use vmm::hba::pvscsi::PvScsi;
use vmm::hba::virtio_scsi::VirtioScsi;
use vmm::hba::{Adapter, Attachment};
use vmm::machine::{Boot, Machine, MachineConfig};
use vmm::serial::SerialSink;

/// A folder with the guest's image, its serial output, and the configuration that says so.
struct Setup {
    folder: TempDir,
    config: MachineConfig,
}

impl Setup {
    fn new(job: &str) -> Setup {
        let folder = tempfile::tempdir().expect("temporary folder");
        let kernel = folder.path().join("guest.elf");
        std::fs::write(&kernel, test_guest::IMAGE).expect("image written");
        let config = MachineConfig {
            boot: Boot::Kernel { image: kernel, command_line: job.into() },
            memory: 64 << 20,
            cpus: 1,
            disks: Vec::new(),
            serial: SerialSink::File(Setup::serial_path(&folder)),
        };
        Setup { folder, config }
    }

    fn serial_path(folder: &TempDir) -> PathBuf {
        folder.path().join("serial")
    }

    fn machine(&self) -> Machine {
        Machine::without_disks(&self.config).expect("a machine; is /dev/kvm there?")
    }

    fn output(&self) -> String {
        std::fs::read_to_string(Setup::serial_path(&self.folder)).expect("serial output")
    }
}

/// The adapters that a machine can have.
const HBAS: [&str; 4] = ["pvscsi", "lsilogic", "buslogic", "virtio-scsi"];

/// Gives the machine an adapter with a disk of 32 MiB in memory, and counts how often the disk is opened.
fn add_memory_disk(machine: &mut Machine, hba: &str) -> Arc<AtomicUsize> {
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    machine
        .add_adapter(move |ram, interrupt| {
            let disk = Attachment::new(0, Default::default(), move || async move {
                count.fetch_add(1, SeqCst);
                Ok(MemoryDisk::new(Geometry { blocks: 32 << 11, ..GEOMETRY }))
            });
            let adapter = match hba {
                "pvscsi" => PvScsi::start("hba0", ram, interrupt, vec![disk]).map(|adapter| adapter as Adapter),
                "lsilogic" => LsiLogic::start("hba0", ram, interrupt, vec![disk]).map(|adapter| adapter as Adapter),
                "buslogic" => BusLogic::start("hba0", ram, interrupt, vec![disk]).map(|adapter| adapter as Adapter),
                "virtio-scsi" => {
                    VirtioScsi::start("hba0", ram, interrupt, vec![disk]).map(|adapter| adapter as Adapter)
                }
                _ => panic!("no adapter {hba}"),
            };
            adapter.map_err(|cause| Error::new(Kind::Disk, "test disk", cause, "Mend the test"))
        })
        .expect("an adapter");
    opened
}

fn run(setup: &Setup, machine: &mut Machine) -> (Outcome, String) {
    machine.start().expect("started");
    let outcome = machine.wait();
    machine.stop().expect("stopped");
    (outcome, setup.output())
}

#[test]
fn the_exit_port_gives_the_machine_its_status() {
    for status in [0, 3, 255] {
        let setup = Setup::new(&format!("job=exit status={status}"));
        let (outcome, output) = run(&setup, &mut setup.machine());
        assert_eq!(outcome, Outcome::Exited(status));
        assert_eq!(output, "guest: 0 passed, 0 failed\n");
    }
}

#[test]
fn a_triple_fault_is_reported_with_the_instruction() {
    let setup = Setup::new("job=fault");
    let (outcome, _) = run(&setup, &mut setup.machine());
    let Outcome::Failed(text) = outcome else { panic!("{outcome:?}") };
    assert!(text.contains("triple fault; RIP 0x1") && text.contains("bytes 0f 0b"), "{text}");
}

/// A 64-bit ELF image with a PVH note that enters `code` in 32-bit protected mode at 0x100000.
fn image_of(code: &[u8]) -> Vec<u8> {
    const FILE_OFFSET: u64 = 0x1000;
    const ADDRESS: u64 = 0x10_0000;
    let mut note = Vec::new();
    [4u32, 4, 18].iter().for_each(|word| note.extend(word.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend((ADDRESS as u32).to_le_bytes());
    let code_size = code.len() as u64;
    let segments = [(1u32, FILE_OFFSET, ADDRESS, code_size), (4, FILE_OFFSET + code_size, 0, note.len() as u64)];
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    [2u16, 62].iter().for_each(|half| image.extend(half.to_le_bytes()));
    image.extend(1u32.to_le_bytes());
    [ADDRESS, 64, 0].iter().for_each(|word| image.extend(word.to_le_bytes()));
    image.extend(0u32.to_le_bytes());
    [64u16, 56, 2, 0, 0, 0].iter().for_each(|half| image.extend(half.to_le_bytes()));
    for (kind, offset, address, size) in segments {
        [kind, 7].iter().for_each(|word| image.extend(word.to_le_bytes()));
        [offset, address, address, size, size, 4].iter().for_each(|word| image.extend(word.to_le_bytes()));
    }
    image.resize(FILE_OFFSET as usize, 0);
    image.extend(code);
    image.extend(note);
    image
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_reported_with_its_place_and_bytes() {
    // crc32 eax, dword ptr [0xd0000000]: no RAM there, so that KVM has to emulate it, which it cannot.
    let code = [0xF2, 0x0F, 0x38, 0xF1, 0x05, 0x00, 0x00, 0x00, 0xD0];
    let setup = Setup::new("");
    std::fs::write(setup.folder.path().join("guest.elf"), image_of(&code)).expect("image written");
    let (outcome, _) = run(&setup, &mut setup.machine());
    let Outcome::Failed(text) = outcome else { panic!("{outcome:?}") };
    assert!(text.contains("KVM internal error 1, an instruction that KVM cannot emulate"), "{text}");
    assert!(text.contains("RIP 0x100000") && text.contains("bytes f2 0f 38 f1 05 00 00 00 d0"), "{text}");
}

#[test]
fn a_job_that_is_not_understood_is_a_failure_that_names_the_word() {
    let setup = Setup::new("job=dance");
    let (outcome, output) = run(&setup, &mut setup.machine());
    assert_eq!(outcome, Outcome::Exited(1));
    assert!(output.contains("\"job=dance\": unknown job"), "{output}");
}

#[test]
fn a_guest_without_an_adapter_says_so() {
    let setup = Setup::new("job=info");
    let (outcome, output) = run(&setup, &mut setup.machine());
    assert_eq!(outcome, Outcome::Exited(1));
    assert!(output.contains("NotFound"), "{output}");
}

#[test]
fn the_guest_drives_the_adapter_by_each_kind_of_interrupt() {
    let each = HBAS.into_iter().flat_map(|hba| ["msi", "intx", "poll"].map(|interrupt| (hba, interrupt)));
    for (hba, interrupt) in each {
        let setup = Setup::new(&format!("job=verify size=4M block=16k depth=24 passes=2 interrupt={interrupt}"));
        let mut machine = setup.machine();
        add_memory_disk(&mut machine, hba);
        let (outcome, output) = run(&setup, &mut machine);
        assert_eq!(outcome, Outcome::Exited(0), "{output}");
        assert!(output.contains(&format!("adapter={hba} ")), "{output}");
        assert!(output.ends_with("guest: 9 passed, 0 failed\n"), "{output}");
    }
}

#[test]
fn errors_and_garbage_from_the_guest_get_the_right_answers() {
    let jobs =
        ["job=errors", "job=errors interrupt=intx", "job=garbage", "job=garbage interrupt=intx", "job=unmap size=16M"];
    for (hba, job) in HBAS.into_iter().flat_map(|hba| jobs.map(|job| (hba, job))) {
        // Without messages, two of the jobs would be the same.
        if hba != "pvscsi" && job.ends_with("intx") {
            continue;
        }
        let setup = Setup::new(job);
        let mut machine = setup.machine();
        add_memory_disk(&mut machine, hba);
        let (outcome, output) = run(&setup, &mut machine);
        assert_eq!(outcome, Outcome::Exited(0), "{hba} {job}: {output}");
    }
}

#[test]
fn no_guest_instruction_runs_while_a_machine_is_paused() {
    let mut setup = Setup::new("job=spin");
    setup.config.cpus = 2;
    let mut machine = setup.machine();
    machine.start().expect("started");
    let count =
        |machine: &Machine| -> u64 { machine.ram().read_obj(GuestAddress(test_guest::SPIN_COUNTER)).expect("RAM") };
    let wait_for_more = |than: u64| {
        while count(&machine) <= than {
            std::thread::yield_now();
        }
    };
    wait_for_more(0);
    for _ in 0..50 {
        machine.pause();
        let stopped_at = count(&machine);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(count(&machine), stopped_at);
        machine.resume();
        wait_for_more(stopped_at);
    }
    machine.pause();
    machine.stop().expect("stopped while paused");
    assert_eq!(machine.wait(), Outcome::Stopped);
}

#[test]
fn a_reset_starts_the_guest_again_with_clean_memory_and_the_same_open_disk() {
    for hba in HBAS {
        let setup = Setup::new("job=reset");
        let mut machine = setup.machine();
        let opened = add_memory_disk(&mut machine, hba);
        for round in 0..5 {
            machine.ram().write_obj(0x5AA5u64, GuestAddress(test_guest::SPIN_COUNTER)).expect("RAM");
            machine.start().expect("started");
            assert_eq!(machine.wait(), Outcome::Reset, "{hba}: round {round}");
            machine.reset().expect("reset");
            let word: u64 = machine.ram().read_obj(GuestAddress(test_guest::SPIN_COUNTER)).expect("RAM");
            assert_eq!(word, 0, "memory is cleared");
        }
        machine.stop().expect("stopped");
        assert_eq!(opened.load(SeqCst), 1);
    }
}

#[test]
fn a_machine_that_is_dropped_while_it_runs_ends() {
    let setup = Setup::new("job=spin");
    let mut machine = setup.machine();
    add_memory_disk(&mut machine, "pvscsi");
    machine.start().expect("started");
    let control = machine.control();
    drop(machine);
    assert_eq!(control.wait(), Outcome::Stopped);
}

#[test]
fn memory_above_the_device_gap_is_the_guests_too() {
    let mut setup = Setup::new("job=exit");
    setup.config.memory = (3 << 30) + (64 << 20);
    let mut machine = setup.machine();
    let (outcome, _) = run(&setup, &mut machine);
    assert_eq!(outcome, Outcome::Exited(0));
    machine.ram().write_obj(1u8, GuestAddress((4 << 30) + (64 << 20) - 1)).expect("RAM up to there");
    assert!(machine.ram().write_obj(1u8, GuestAddress(3 << 30)).is_err(), "no RAM in the gap");
}
