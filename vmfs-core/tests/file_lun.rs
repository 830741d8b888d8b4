//! Promises of LUNs that are image files: compare-and-write excludes everybody, data is where it was put, bad input is named.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use tempfile::NamedTempFile;
use vmfs_core::buf::AlignedBuf;
use vmfs_core::error::FsErrorKind;
use vmfs_core::format::header::LockMode;
use vmfs_core::lun::{CompareAndWrite, Compared, Lun, LunErrorKind, OpenLun, drain, open_lun};
use vmfs_core::units::SlotId;

const BYTES: u64 = 1 << 20;
const CELL: usize = 512;
/// Compare-and-writes that each racer must land.
const LANDED: u32 = 150;
const RACER: &str = "VMFS_TEST_RACER_IMAGE";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(BYTES).unwrap();
    file
}

fn open(path: &Path) -> Rc<dyn Lun> {
    open_lun(path.to_str().unwrap(), OpenLun::default()).unwrap()
}

/// A cell-sized image that says `text`.
fn cell(text: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; CELL];
    bytes[..text.len()].copy_from_slice(text);
    bytes
}

async fn read_cell(lun: &Rc<dyn Lun>, offset: u64) -> Vec<u8> {
    let start = offset - offset % lun.alignment() as u64;
    let buf = lun.read(start, lun.alignment().max(CELL)).await.unwrap();
    buf[(offset - start) as usize..][..CELL].to_vec()
}

/// Adds 1 to a counter in the cell at `offset` until it has done so `LANDED` times.
async fn race(path: &Path, offset: u64) {
    let lun = open(path);
    let mut landed = 0;
    while landed < LANDED {
        let now = read_cell(&lun, offset).await;
        let count = u32::from_le_bytes(now[..4].try_into().unwrap());
        if lun.compare_and_write(offset, &now, &cell(&(count + 1).to_le_bytes())).await.unwrap() == Compared::Written {
            landed += 1;
        }
    }
}

#[test]
fn racing_threads_and_processes_never_lose_a_compare_and_write() {
    if let Ok(path) = std::env::var(RACER) {
        return runtime().block_on(race(Path::new(&path), CELL as u64));
    }
    let image = image();
    let children: Vec<_> = (0..2)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "racing_threads_and_processes_never_lose_a_compare_and_write"])
                .env(RACER, image.path())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    // The neighbour in the same aligned piece is counted too: neither may write the other's old bytes back.
    std::thread::scope(|scope| {
        for offset in [CELL as u64, 0, 0] {
            let path = image.path().to_owned();
            scope.spawn(move || runtime().block_on(race(&path, offset)));
        }
    });
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    runtime().block_on(async {
        let lun = open(image.path());
        for (offset, racers) in [(0, 2), (CELL as u64, 3)] {
            let count = u32::from_le_bytes(read_cell(&lun, offset).await[..4].try_into().unwrap());
            assert_eq!(count, racers * LANDED);
        }
    });
}

#[test]
fn one_open_lun_excludes_its_own_commands_in_flight() {
    let image = image();
    runtime().block_on(async {
        let lun = open(image.path());
        let zero = cell(b"");
        let new: Vec<_> = (0..32u8).map(|n| cell(&[n + 1])).collect();
        let all = futures_util::future::join_all(new.iter().map(|n| lun.compare_and_write(4096, &zero, n))).await;
        let written: Vec<_> = all.into_iter().map(|r| r.unwrap() == Compared::Written).collect();
        assert_eq!(written.iter().filter(|w| **w).count(), 1);
        let winner = written.iter().position(|w| *w).unwrap();
        assert_eq!(read_cell(&lun, 4096).await, new[winner]);
    });
}

#[test]
fn many_compare_and_writes_each_answer_for_themselves_in_the_order_given() {
    let image = image();
    runtime().block_on(async {
        let lun = open(image.path());
        let (zero, other, new) = (cell(b""), cell(b"other"), cell(b"new"));
        // Two runs of neighbours and one cell by itself, not in order; two of them expect what is not there.
        let offsets = [8192, 512, 8192 + 512, 0, 65536, 1024, 8192 + 1024];
        let wrong = [2, 5];
        let cells: Vec<_> = offsets
            .iter()
            .enumerate()
            .map(|(nth, offset)| CompareAndWrite {
                offset: *offset,
                expect: if wrong.contains(&nth) { &other } else { &zero },
                new: &new,
            })
            .collect();
        let results = lun.compare_and_write_many(&cells).await;
        for (nth, result) in results.into_iter().enumerate() {
            let expected = if wrong.contains(&nth) { Compared::Miscompare } else { Compared::Written };
            assert_eq!(result.unwrap(), expected, "element {nth}");
            let now = read_cell(&lun, offsets[nth]).await;
            assert_eq!(now, if wrong.contains(&nth) { &zero } else { &new }.clone());
        }
        assert!(lun.compare_and_write_many(&[]).await.is_empty());
    });
}

#[test]
fn what_is_written_is_read_and_what_is_zeroed_or_given_back_reads_as_zeros() {
    for directory in [std::env::temp_dir(), "/dev/shm".into()] {
        let image = NamedTempFile::new_in(directory).unwrap();
        image.as_file().set_len(BYTES).unwrap();
        runtime().block_on(async {
            let lun = open(image.path());
            assert_eq!((lun.bytes(), lun.cell_size(), lun.lock_mode()), (BYTES, None, LockMode::SingleMachine));
            lun.write(0, AlignedBuf::copy_of(&[7; 65536])).await.unwrap();
            lun.flush().await.unwrap();
            lun.write_zeroes(4096, 8192).await.unwrap();
            lun.unmap(32768, 4096).await.unwrap();
            let buf = lun.read(0, 65536).await.unwrap();
            let zeros: Vec<_> =
                buf.chunks(4096).enumerate().filter(|(_, c)| **c == [0; 4096]).map(|(n, _)| n).collect();
            assert_eq!(zeros, [1, 2, 8]);

            let data = lun.data();
            data.write_at(4096, &AlignedBuf::copy_of(&[9; 4096])).unwrap();
            data.flush().unwrap();
            let mut back = AlignedBuf::zeroed(8192);
            data.read_at(4096, &mut back).unwrap();
            assert!(back[..4096] == [9; 4096] && back[4096..] == [0; 4096]);
            data.write_zeroes(4096, 4096).unwrap();
            data.unmap(0, 4096).unwrap();
            data.read_at(0, &mut back).unwrap();
            assert!(back.iter().all(|byte| *byte == 0));
        });
    }
}

#[test]
fn two_paths_to_one_image_have_one_identity_and_a_copy_has_another() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second, copy) = (directory.path().join("a"), directory.path().join("b"), directory.path().join("c"));
    std::fs::write(&first, vec![0; BYTES as usize]).unwrap();
    std::os::unix::fs::symlink(&first, &second).unwrap();
    std::fs::copy(&first, &copy).unwrap();
    assert_eq!(open(&first).identity(), open(&second).identity());
    assert_ne!(open(&first).identity(), open(&copy).identity());
    assert!(!open(&first).identity().bytes().is_empty());
}

#[test]
fn a_data_path_that_holds_a_drain_byte_keeps_the_range_until_it_is_closed() {
    let image = image();
    let lun = open(image.path());
    let data = lun.data();
    data.hold_drain_byte(SlotId(3)).unwrap();
    let breaker = data.open_descriptor().unwrap().unwrap();
    assert!(!drain::take(breaker.as_fd(), SlotId(3)).unwrap());
    drop((lun, data));
    assert!(drain::take(breaker.as_fd(), SlotId(3)).unwrap());
    let late = open(image.path()).data().hold_drain_byte(SlotId(3)).unwrap_err();
    assert_eq!(late.kind, LunErrorKind::Fenced);
}

#[test]
fn ranges_that_the_lun_does_not_have_are_refused_before_anything_is_sent() {
    let image = image();
    runtime().block_on(async {
        let lun = open(image.path());
        for (offset, length) in [(BYTES, 4096), (BYTES - 4096, 8192), (100, 4096), (0, 100), (u64::MAX - 4095, 4096)] {
            assert_eq!(lun.read(offset, length as usize).await.err().unwrap().kind, LunErrorKind::OutOfRange);
            let error = lun.unmap(offset, length).await.unwrap_err();
            assert_eq!(error.kind, LunErrorKind::OutOfRange, "{error}");
        }
        image.as_file().set_len(BYTES / 2).unwrap();
        let error = lun.read(BYTES - 4096, 4096).await.err().unwrap();
        assert!(error.to_string().contains("truncated"), "{error}");
    });
    assert_eq!(image.as_file().metadata().unwrap().len(), BYTES / 2);
}

#[test]
fn a_lun_that_is_open_for_reading_only_never_writes() {
    let image = image();
    let path = image.path().to_str().unwrap();
    let lun = open_lun(path, OpenLun { read_only: true, ..OpenLun::default() }).unwrap();
    runtime().block_on(async {
        assert!(lun.read(0, 4096).await.is_ok());
        let error = lun.compare_and_write(0, &cell(b""), &cell(b"x")).await.unwrap_err();
        assert_eq!(error.kind, LunErrorKind::NotDone);
        assert!(lun.write(0, AlignedBuf::zeroed(4096)).await.is_err());
    });
}

#[test]
fn what_is_no_lun_is_refused_with_its_name_and_the_reason() {
    let refusal = |name: &str| {
        let error = open_lun(name, OpenLun::default()).err().unwrap();
        assert!(error.to_string().contains(name), "{error}");
        (error.kind(), error.to_string())
    };
    assert_eq!(refusal("/no/such/image").0, FsErrorKind::NotFound);
    assert_eq!(refusal("/tmp").0, FsErrorKind::Invalid);
    assert_eq!(refusal("/dev/null").0, FsErrorKind::Invalid);
    assert_eq!(refusal("ftp://host/x").0, FsErrorKind::Invalid);
    let (kind, message) = refusal("iscsi://host/iqn/0");
    assert!(kind == FsErrorKind::Unsupported && message.contains("iSCSI"), "{message}");
}
