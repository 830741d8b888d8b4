//! Any sequence of file-system operations gives the same answers, tree, bytes and sizes as the kernel's own file system.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tests::harness::{Luns, scale};
use tests::random::Random;

#[derive(Clone, Debug)]
enum Step {
    Create(PathBuf),
    MakeDirectory(PathBuf),
    Remove(PathBuf),
    RemoveDirectory(PathBuf),
    Rename(PathBuf, PathBuf),
    Symlink(PathBuf, String),
    Write(PathBuf, u64, Vec<u8>),
    Append(PathBuf, Vec<u8>),
    Truncate(PathBuf, u64),
    Punch(PathBuf, u64, u64),
    Allocate(PathBuf, u64, u64),
    ZeroRange(PathBuf, u64, u64),
    Read(PathBuf, u64, usize),
    Mode(PathBuf, u32),
    List(PathBuf),
    Sync(PathBuf),
}

/// Paths of a small tree, so that steps meet: up to two directories deep, odd names among them.
fn path(random: &mut Random) -> PathBuf {
    const NAMES: &[&str] = &["a", "b", "c", "file with space", "ü", "-dash"];
    let mut path = PathBuf::new();
    for _ in 0..random.below(3) {
        path.push(["d1", "d2"][random.below(2) as usize]);
    }
    path.push(NAMES[random.below(NAMES.len() as u64) as usize]);
    path
}

fn directory(random: &mut Random) -> PathBuf {
    let mut path = PathBuf::new();
    for _ in 0..=random.below(2) {
        path.push(["d1", "d2"][random.below(2) as usize]);
    }
    path
}

fn step(random: &mut Random) -> Step {
    let at = [0, 1, 4095, 4096, 65_536, 100_000, 1 << 20, (1 << 20) + 17, 3 << 20][random.below(9) as usize]
        + random.below(3) * 512;
    let length = [1, 100, 512, 4096, 70_000, 1 << 20][random.below(6) as usize] + random.below(2) * 7;
    match random.below(24) {
        0..=2 => Step::Create(path(random)),
        3 => Step::MakeDirectory(directory(random)),
        4 => Step::Remove(path(random)),
        5 => Step::RemoveDirectory(directory(random)),
        6 | 7 => Step::Rename(path(random), path(random)),
        8 => Step::Symlink(path(random), format!("../target-{}", random.below(100))),
        9..=12 => {
            let bytes = random.bytes(length as usize);
            Step::Write(path(random), at, bytes)
        }
        13 => {
            let bytes = random.bytes((length as usize).min(9000));
            Step::Append(path(random), bytes)
        }
        14 | 15 => Step::Truncate(path(random), at),
        16 => Step::Punch(path(random), at, length),
        17 => Step::Allocate(path(random), at, length),
        18 => Step::ZeroRange(path(random), at, length),
        19..=21 => Step::Read(path(random), at, length as usize),
        22 => match random.below(2) {
            0 => Step::Mode(path(random), [0o600, 0o644, 0o755, 0o4711][random.below(4) as usize]),
            _ => Step::Sync(path(random)),
        },
        _ => Step::List(directory(random)),
    }
}

fn fallocate(file: &File, mode: i32, at: u64, length: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open for the whole call; fallocate(2) touches no memory of this process.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, length as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// What a step answers: bytes or names that must be equal.
fn perform(root: &Path, step: &Step) -> io::Result<Vec<u8>> {
    let done = |()| Vec::new();
    match step {
        Step::Create(p) => File::create_new(root.join(p)).map(|_| Vec::new()),
        Step::MakeDirectory(p) => fs::create_dir(root.join(p)).map(done),
        Step::Remove(p) => fs::remove_file(root.join(p)).map(done),
        Step::RemoveDirectory(p) => fs::remove_dir(root.join(p)).map(done),
        Step::Rename(a, b) => fs::rename(root.join(a), root.join(b)).map(done),
        Step::Symlink(p, target) => std::os::unix::fs::symlink(target, root.join(p)).map(done),
        Step::Write(p, at, bytes) => open(&root.join(p))?.write_all_at(bytes, *at).map(done),
        Step::Append(p, bytes) => {
            use io::Write;
            File::options().append(true).open(root.join(p))?.write_all(bytes).map(done)
        }
        Step::Truncate(p, size) => open(&root.join(p))?.set_len(*size).map(done),
        Step::Punch(p, at, length) => {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            fallocate(&open(&root.join(p))?, mode, *at, *length).map(done)
        }
        Step::Allocate(p, at, length) => fallocate(&open(&root.join(p))?, 0, *at, *length).map(done),
        Step::ZeroRange(p, at, length) => {
            fallocate(&open(&root.join(p))?, libc::FALLOC_FL_ZERO_RANGE, *at, *length).map(done)
        }
        Step::Read(p, at, length) => {
            let mut bytes = vec![0; *length];
            let read = File::open(root.join(p))?.read_at(&mut bytes, *at)?;
            bytes.truncate(read);
            Ok(bytes)
        }
        Step::Mode(p, mode) => fs::set_permissions(root.join(p), fs::Permissions::from_mode(*mode)).map(done),
        Step::List(p) => {
            let mut names: Vec<_> = fs::read_dir(root.join(p))?.map(|e| e.unwrap().file_name()).collect();
            names.sort();
            Ok(format!("{names:?}").into_bytes())
        }
        Step::Sync(p) => open(&root.join(p))?.sync_all().map(done),
    }
}

/// Everything of a tree that two file systems must agree on.
fn describe(root: &Path) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
    let mut all = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let path = folder.join(entry.unwrap().file_name());
            let data = fs::symlink_metadata(root.join(&path)).unwrap();
            let content = if data.is_symlink() {
                fs::read_link(root.join(&path)).unwrap().into_os_string().into_encoded_bytes()
            } else if data.is_file() {
                fs::read(root.join(&path)).unwrap()
            } else {
                folders.push(path.clone());
                Vec::new()
            };
            let size = if data.is_dir() { 0 } else { data.size() };
            all.push((path, data.mode(), size, content));
        }
    }
    all.sort();
    all
}

fn same_tree(reference: &Path, mounted: &Path, seed: u64, when: &str) {
    let (expected, found) = (describe(reference), describe(mounted));
    let names = |all: &[(PathBuf, u32, u64, Vec<u8>)]| all.iter().map(|e| (e.0.clone(), e.1, e.2)).collect::<Vec<_>>();
    assert_eq!(names(&expected), names(&found), "seed {seed}, {when}");
    for (e, f) in expected.iter().zip(&found) {
        assert!(e.3 == f.3, "seed {seed}, {when}: {} has other bytes", e.0.display());
    }
}

fn run_sequence(seed: u64, steps: u64, arguments: &[&str]) {
    let luns = Luns::formatted(2, 256, arguments);
    let reference = luns.beside("reference");
    fs::create_dir(&reference).unwrap();
    let mut mount = luns.mount(1);
    let mut random = Random::new(seed);
    for n in 0..steps {
        let step = step(&mut random);
        let (expected, found) = (perform(&reference, &step), perform(mount.path(), &step));
        match (&expected, &found) {
            (Ok(e), Ok(f)) => assert!(e == f, "seed {seed}, step {n}: {step:?} gives other bytes"),
            (Err(e), Err(f)) => {
                assert_eq!(e.raw_os_error(), f.raw_os_error(), "seed {seed}, step {n}: {step:?}: {e} / {f}");
            }
            // A directory moves only within its parent here (README, limits).
            (Ok(_), Err(f)) if f.raw_os_error() == Some(libc::EXDEV) => {
                let Step::Rename(from, to) = &step else { panic!("EXDEV for {step:?}") };
                assert!(reference.join(to).is_dir() && from.parent() != to.parent(), "EXDEV for {step:?}");
                fs::rename(reference.join(to), reference.join(from)).expect("undone in the reference");
            }
            _ => panic!("seed {seed}, step {n}: {step:?}: expected {expected:?}, found {found:?}"),
        }
        if n % (steps / 3) == steps / 3 - 1 {
            same_tree(&reference, mount.path(), seed, "mounted");
            mount.unmount();
            luns.assert_clean();
            mount = luns.mount(2);
            same_tree(&reference, mount.path(), seed, "mounted again");
        }
    }
    for entry in fs::read_dir(mount.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn sequences_of_operations_answer_as_the_kernels_own_file_system_does() {
    for seed in 0..scale(4) {
        run_sequence(seed, 900, &[]);
    }
}

#[test]
fn sequences_of_operations_agree_with_large_cells_and_small_blocks() {
    for seed in 100..100 + scale(3) {
        run_sequence(seed, 900, &["--cell", "4096", "-b", "64K"]);
    }
}
