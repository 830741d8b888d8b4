//! Owns: a process whose commands to some of its files fail: its paths to single LUNs, cut and mended while it runs.
//! Promises: between [`Paths::cut`] and [`Paths::mend`] every read, write, flush and fallocate of that process on the LUN gives EIO and
//! does nothing; no other process notices, and what is on the LUN stays as it is. Must not know: what the files are.
//!
//! The process runs with a seccomp filter that asks this process about each such system call (seccomp(2), SECCOMP_RET_USER_NOTIF): the
//! kernel's own answer to a command whose path is gone, without a device that has to play ill. Locks of files go on.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

/// Commands that reach a LUN.
const COMMANDS: [libc::c_long; 9] = [
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
];

/// The paths of one process to its LUNs.
#[derive(Clone, Default)]
pub struct Paths {
    /// Device and inode of each LUN whose path is cut.
    cut: Arc<Mutex<BTreeSet<(u64, u64)>>>,
    /// Ranges of a LUN that cannot be read.
    unreadable: Arc<Mutex<Vec<Unreadable>>>,
    failed: Arc<AtomicU64>,
}

/// Device and inode of a LUN, and bytes of it.
type Unreadable = ((u64, u64), Range<u64>);

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

impl Paths {
    /// From now on every command to this LUN fails.
    pub fn cut(&self, lun: &Path) {
        self.cut.lock().expect("no holder panics").insert(identity(lun).expect("the LUN is there"));
    }

    /// From now on the LUN answers.
    pub fn mend(&self, lun: &Path) {
        self.cut.lock().expect("no holder panics").remove(&identity(lun).expect("the LUN is there"));
    }

    /// From now on these bytes of the LUN cannot be read, as with a bad sector.
    pub fn spoil(&self, lun: &Path, bytes: Range<u64>) {
        let lun = identity(lun).expect("the LUN is there");
        self.unreadable.lock().expect("no holder panics").push((lun, bytes));
    }

    /// Commands that were answered with an error.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Starts a process whose paths these are.
    pub fn start(&self, command: &mut Command) -> io::Result<Child> {
        let (give, take) = mpsc::channel::<OwnedFd>();
        let paths = self.clone();
        // Before the filter is there: a thread inherits the one of who starts it.
        thread::spawn(move || {
            if let Ok(listener) = take.recv() {
                paths.answer(&listener);
            }
        });
        // A thread of its own, which ends: the filter is that thread's and that of the process that it starts.
        thread::scope(|scope| {
            let starter = scope.spawn(|| {
                let listener = filter()?;
                give.send(listener).map_err(|_| io::Error::other("nobody listens"))?;
                command.spawn()
            });
            starter.join().expect("the starter does not panic")
        })
    }

    /// Answers until no process has the filter any more.
    fn answer(&self, listener: &OwnedFd) {
        loop {
            let mut ready = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, which lives through the call.
            let polled = unsafe { libc::poll(&raw mut ready, 1, -1) };
            if polled == 1 && ready.revents & libc::POLLIN == 0 {
                return;
            }
            let mut asked = MaybeUninit::<libc::seccomp_notif>::zeroed();
            // SAFETY: the number says that the kernel writes a seccomp_notif, of which any bytes are one; it wants zeros before.
            if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, asked.as_mut_ptr()) } != 0 {
                // The thread that asked is gone, or a signal came.
                continue;
            }
            // SAFETY: it was zeroed, and then written by the kernel.
            let asked = unsafe { asked.assume_init() };
            let is_cut = self.is_cut(&asked);
            let mut answer = libc::seccomp_notif_resp {
                id: asked.id,
                val: 0,
                error: if is_cut { -libc::EIO } else { 0 },
                flags: if is_cut { 0 } else { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 },
            };
            self.failed.fetch_add(u64::from(is_cut), Ordering::Relaxed);
            // SAFETY: the number says that the kernel reads a seccomp_notif_resp. That the asking thread is gone by now is no fault.
            unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
        }
    }

    fn is_cut(&self, asked: &libc::seccomp_notif) -> bool {
        let cut = self.cut.lock().expect("no holder panics");
        let unreadable = self.unreadable.lock().expect("no holder panics");
        if cut.is_empty() && unreadable.is_empty() {
            return false;
        }
        let Ok(file) = identity(Path::new(&format!("/proc/{}/fd/{}", asked.pid, asked.data.args[0] as i32))) else {
            return false;
        };
        let [_, _, length, offset, ..] = asked.data.args;
        let reads = libc::c_long::from(asked.data.nr) == libc::SYS_pread64;
        let spoilt = |(lun, bytes): &Unreadable| *lun == file && offset < bytes.end && bytes.start < offset + length;
        cut.contains(&file) || (reads && unreadable.iter().any(spoilt))
    }
}

/// Puts the filter on this thread.
fn filter() -> io::Result<OwnedFd> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let number = offset_of!(libc::seccomp_data, nr) as u32;
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, number)];
    for (nth, command) in COMMANDS.iter().enumerate() {
        // To the last instruction, which asks.
        let jt = (COMMANDS.len() - nth) as u8;
        let code = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push(libc::sock_filter { code, jt, jf: 0, k: *command as u32 });
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF));
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: five integers; it is a property of this thread.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the program and its instructions live through the call, which copies them.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor of this process that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}
