//! The ioctl's structure, against a stand-in for the kernel that reads it byte by byte as include/scsi/sg.h has it.
#![allow(unsafe_code)]

use std::sync::Mutex;

use scsi::testing::{PathFault, TestPath, TestTarget, identity};
use vmfs_core::lun::{Compared, Fencing, Lun, PathOwner};
use vmfs_core::units::SlotId;

use super::*;
use crate::device::Device;
use crate::scsi_lun::ScsiLun;

/// Does what the kernel does with a struct sg_io_hdr at `at`, whose command goes to `target`.
fn kernel(target: &TestPath, at: *mut u8, seen: &Mutex<Vec<u32>>) {
    // SAFETY: the caller gives a structure of 88 bytes.
    let bytes = unsafe { std::slice::from_raw_parts_mut(at, 88) };
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let long = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as *mut u8;
    assert_eq!(word(bytes, 0), u32::from(b'S'), "interface_id");
    let (direction, length) = (word(bytes, 4) as i32, word(bytes, 12) as usize);
    assert_eq!(bytes[10..12], [0, 0], "iovec_count");
    // SAFETY: dxferp, cmdp and sbp point to memory of the lengths that are given beside them.
    let (cdb, sense) = unsafe {
        let cdb = std::slice::from_raw_parts(long(bytes, 24), bytes[8].into());
        (cdb, std::slice::from_raw_parts_mut(long(bytes, 32), bytes[9].into()))
    };
    seen.lock().unwrap().push(word(bytes, 40));
    assert_eq!(bytes[44..64], [0; 20], "flags, pack_id, usr_ptr");
    let data = match direction {
        -1 => PathData::None,
        // SAFETY: as above.
        -2 => PathData::Out(unsafe { std::slice::from_raw_parts(long(bytes, 16), length) }),
        // SAFETY: as above.
        -3 => PathData::In(unsafe { std::slice::from_raw_parts_mut(long(bytes, 16), length) }),
        other => panic!("dxfer_direction {other}"),
    };
    match target.execute(cdb, data, Duration::ZERO) {
        Ok(answer) => {
            let came = answer.sense.len().min(sense.len());
            sense[..came].copy_from_slice(&answer.sense[..came]);
            bytes[64] = answer.status;
            bytes[67] = came as u8;
            // driver_status: DRIVER_SENSE.
            bytes[70] = if came > 0 { 8 } else { 0 };
            bytes[72..76].copy_from_slice(&((length - answer.transferred) as i32).to_le_bytes());
        }
        // host_status: DID_TIME_OUT.
        Err(_) => bytes[68] = 3,
    }
}

struct Machine {
    target: Arc<TestPath>,
    timeouts: Arc<Mutex<Vec<u32>>>,
    node: tempfile::NamedTempFile,
}

impl Machine {
    fn new(target: &TestTarget) -> Machine {
        Machine { target: target.path(), timeouts: Arc::default(), node: tempfile::NamedTempFile::new().unwrap() }
    }

    /// A path as another process of this machine has it: through the same port.
    fn path(&self) -> SgPath {
        let file = open(self.node.path(), OFlags::RDWR, Mode::empty()).unwrap();
        let (target, seen) = (self.target.clone(), self.timeouts.clone());
        let send: Send = Box::new(move |_, header| {
            kernel(&target, std::ptr::from_mut(header).cast(), &seen);
            Ok(())
        });
        SgPath::with(file, "sda".to_owned(), 64 << 10, send)
    }

    fn lun(&self) -> ScsiLun {
        let path = self.path();
        let tenancy = Box::new(path.tenancy());
        let device = Device::open("sda".to_owned(), vec![Arc::new(path)], false).unwrap();
        ScsiLun::new(device.shared_by(tenancy)).unwrap()
    }
}

fn target() -> TestTarget {
    let geometry = scsi::Geometry { blocks: 8192, ..scsi::testing::GEOMETRY };
    TestTarget::start(geometry, identity())
}

fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

fn owner(slot: u8, key: u64) -> PathOwner {
    PathOwner { slot: SlotId(slot), key }
}

#[test]
fn commands_go_through_the_structure_of_the_kernel_and_come_back() {
    let machine = Machine::new(&target());
    let lun = machine.lun();
    on_runtime(async {
        assert_eq!(lun.compare_and_write(512, &[0; 512], &[7; 512]).await.unwrap(), Compared::Written);
        assert_eq!(lun.compare_and_write(512, &[0; 512], &[8; 512]).await.unwrap(), Compared::Miscompare);
        // Longer than one command of this path.
        lun.data().write_at(8192, &vec![3; 200 << 10]).unwrap();
        lun.flush().await.unwrap();
        let mut back = vec![0; 200 << 10];
        lun.data().read_at(8192, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 3));
        assert_eq!(lun.read(512, 512).await.unwrap()[..], [7; 512]);
    });
    assert!(
        machine.timeouts.lock().unwrap().iter().all(|ms| *ms == 10_000 || *ms == 30_000),
        "timeouts in milliseconds"
    );
}

#[test]
fn a_command_whose_end_the_adapter_does_not_tell_is_unknown_and_one_that_was_refused_was_not_sent() {
    let machine = Machine::new(&target());
    let path = machine.path();
    machine.target.fail(0x00, PathFault::CommandLost);
    assert!(matches!(path.execute(&[0; 6], PathData::None, Duration::ZERO), Err(PathError::Unknown(_))));
    assert!(path.end());
    let file = open(machine.node.path(), OFlags::RDWR, Mode::empty()).unwrap();
    let refused =
        SgPath::with(file, "file".to_owned(), 4096, Box::new(|file, header| sg_sys::send(file.as_fd(), header)));
    // The real ioctl, at something that is no device.
    assert!(matches!(refused.execute(&[0; 6], PathData::None, Duration::ZERO), Err(PathError::NotSent(_))));
}

#[test]
fn a_new_incarnation_registers_the_port_only_when_no_process_of_the_last_one_is_left() {
    let target = target();
    let machine = Machine::new(&target);
    let (first, breaker) = (machine.lun(), Machine::new(&target).lun());
    on_runtime(async {
        first.mark_paths(owner(1, 11)).await.unwrap();
        let beside = machine.lun();
        beside.mark_paths(owner(1, 11)).await.unwrap();
        breaker.compare_and_write(0, &[0; 512], &[1; 512]).await.unwrap();
        breaker.mark_paths(owner(2, 22)).await.unwrap();
        assert_eq!(breaker.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        // The machine's port is shut out. A new incarnation would open it again, for what the old one still sends too.
        let again = machine.lun();
        let error = again.mark_paths(owner(1, 12)).await.unwrap_err();
        assert!(error.to_string().contains("another incarnation"), "{error}");
        assert!(again.compare_and_write(512, &[0; 512], &[1; 512]).await.is_err());
        drop(first);
        assert!(again.mark_paths(owner(1, 12)).await.is_err(), "one is left");
        drop(beside);
        again.mark_paths(owner(1, 12)).await.unwrap();
        again.data().write_at(0, &[5; 512]).unwrap();
    });
}

#[test]
fn a_program_that_has_a_descriptor_of_the_disk_counts_among_those_that_use_the_port() {
    let target = target();
    let machine = Machine::new(&target);
    let (mount, breaker) = (machine.lun(), Machine::new(&target).lun());
    on_runtime(async {
        mount.mark_paths(owner(1, 11)).await.unwrap();
        let descriptor = mount.data().open_descriptor().unwrap().unwrap();
        assert_eq!(
            std::fs::File::from(descriptor.try_clone().unwrap()).metadata().unwrap().len(),
            0,
            "the node itself"
        );
        breaker.compare_and_write(0, &[0; 512], &[1; 512]).await.unwrap();
        breaker.mark_paths(owner(2, 22)).await.unwrap();
        assert_eq!(breaker.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        drop(mount);
        let again = machine.lun();
        let error = again.mark_paths(owner(1, 12)).await.unwrap_err();
        assert!(error.to_string().contains("another incarnation"), "{error}");
        drop(descriptor);
        again.mark_paths(owner(1, 12)).await.unwrap();
    });
}

#[test]
fn a_daemon_says_that_its_mount_is_gone_only_when_it_is_alone_on_the_port() {
    let target = target();
    let machine = Machine::new(&target);
    let (daemon, mount) = (machine.lun(), machine.lun());
    on_runtime(async {
        daemon.mark_paths(owner(1, 11)).await.unwrap();
        mount.mark_paths(owner(1, 11)).await.unwrap();
        assert_eq!(daemon.fence(owner(1, 11)).await.unwrap(), Fencing::NotYet);
        mount.data().write_at(0, &[5; 512]).unwrap();
        drop(mount);
        assert_eq!(daemon.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        assert_eq!(daemon.compare_and_write(0, &[5; 512], &[1; 512]).await.unwrap(), Compared::Written);
    });
}

#[test]
fn partitions_and_mappings_are_told_from_whole_disks() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, file: &str| {
        let path = folder.path().join(name).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        folder.path().join(name)
    };
    assert_eq!(kind_in(&make("sda", "device/scsi_level")), BlockKind::ScsiDisk);
    assert_eq!(kind_in(&make("sda1", "partition")), BlockKind::Stacked);
    assert_eq!(kind_in(&make("dm-0", "slaves/sda")), BlockKind::Stacked);
    assert_eq!(kind_in(&make("loop0", "loop/backing_file")), BlockKind::Other);
}
