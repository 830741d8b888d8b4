//! Owns: the life of one mount: volume, FUSE session, socket, signals, and their end in the right order.
//! Promises: a mount that fails half-way leaves nothing mounted and its slots left; SIGTERM and umount end it cleanly.
//! Must not know: single requests.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Config, MountOption, Session, SessionACL};
use lockd::gate_memory::SharedGateMemory;
use lockd::keeper::client::Link;
use lockd::server::Server;
use rustix::mount::MountFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmfs_core::error::FsError;
use vmfs_core::gate::GatePage;
use vmfs_core::volume::{MountOptions, Volume};

use crate::actor::{Actor, Luns};
use crate::control::Control;
use crate::filesystem::Vmfs;
use crate::finder::Places;
use crate::handles::Handle;
use crate::host;
use crate::mountpoint::{self, NewMount, Unmounted};
use crate::opening;
use crate::options::{Lockd, Mount};
use crate::over::Over;
use crate::policy::{Follower, Policy};
use crate::recalls::Programs;
use crate::state::State;

/// Worker threads when nothing is said: enough to keep a LUN busy while each blocks in one command.
const DEFAULT_THREADS: u16 = 16;

/// Mounts, calls `up` once the mount is in the tree, and serves until it is unmounted.
pub fn serve(mount: &Mount, up: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let directory = mountpoint::check(&mount.directory, mount.nonempty)?;
    mountpoint::check_fuse()?;
    // From here on a signal ends the mount in order, also while it is being made.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| format!("signals: {error}"))?;
    let over = Over::new(&mount.source, &directory);
    let state = mount_volume(mount, &over)?;
    let ended = run(mount, &directory, &state, &over, signals, up);
    state.end();
    let unmounted = unmount_volume(&state, &over);
    if let Some(message) = over.message() {
        return Err(message);
    }
    ended?;
    unmounted.map_err(|error| format!("{}: the unmount was not clean: {error}", mount.source))?;
    tracing::info!("unmounted {} from {}", mount.source, directory.display());
    Ok(())
}

fn mount_volume(mount: &Mount, over: &Arc<Over>) -> Result<Arc<State>, String> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", mount.source);
    let identity = host::identity(mount.host_id, mount.host_name.clone()).map_err(|error| error.to_string())?;
    let gate = SharedGateMemory::create().map_err(|error| named(&format!("the gate page: {error}")))?;
    let gate = Arc::new(gate);
    let host = identity.host;
    let page = GatePage::create(gate.clone()).map_err(|error| named(&error))?;
    let link = keeper(mount, &gate)?;
    let options =
        MountOptions { read_only: mount.read_only, host: identity, slot_hint: None, degraded: mount.degraded };
    let (read_only, watched) = (mount.read_only, absolute(&mount.watched));
    let prepare = move |volume: &Volume| {
        volume.set_finder(Rc::new(Places { read_only, watched }));
        (volume.info().clone(), volume.files().data_luns())
    };
    let (actor, (info, luns)) =
        Actor::start(luns_of(mount), options, page, link, over.on_over(), prepare).map_err(|error| named(&error))?;
    let state = Arc::new(State::new(actor, info, luns, host, gate));
    let (shared, recalls) = (Arc::downgrade(&state), state.recalls.clone());
    state.actor.send(move |volume| async move {
        volume.files().set_borrowers(Rc::new(Programs(recalls)));
        volume.set_let_go(Box::new(move |lun| shared.upgrade().is_none_or(|state| opening::let_go(&state, lun))));
    });
    Ok(state)
}

/// The name of a LUN as it holds when this process has left its working directory: a LUN that is back is opened by it.
fn lasting(lun: &str) -> String {
    let path = if lun.contains("://") { None } else { std::path::absolute(lun).ok() };
    path.and_then(|path| path.into_os_string().into_string().ok()).unwrap_or_else(|| lun.to_owned())
}

/// The LUNs, and where the image files of raw device mappings are looked for: where it was said, and beside the volume's own images.
fn luns_of(mount: &Mount) -> Luns {
    let images = mount.luns.iter().filter_map(|lun| Path::new(lun).canonicalize().ok()).filter(|path| path.is_file());
    let beside = images.filter_map(|path| path.parent().map(Path::to_owned));
    let said = mount.raw_folders.iter().map(|folder| folder.canonicalize().unwrap_or_else(|_| folder.clone()));
    let members = mount.luns.iter().map(|lun| lasting(lun)).collect();
    Luns { members, raw_folders: said.chain(beside).collect() }
}

/// The daemon that keeps the slots, if one is to.
fn keeper(mount: &Mount, gate: &Arc<SharedGateMemory>) -> Result<Option<Link>, String> {
    if mount.read_only {
        return Ok(None);
    }
    let program = format!("mount.vmfs {}, process {}", mount.directory.display(), std::process::id());
    match &mount.lockd {
        Lockd::No => Ok(None),
        Lockd::At(path) => Link::start(path, gate.clone(), program)
            .map(Some)
            .map_err(|error| format!("{}: {error}; start vmfs-lockd, or mount with -o lockd=no", path.display())),
        Lockd::Auto => {
            let path = lockd::keeper::default_socket();
            if !path.exists() {
                return Ok(None);
            }
            let link = Link::start(&path, gate.clone(), program);
            let failed = |error: &std::io::Error| {
                tracing::warn!("{}: {error}; no vmfs-lockd answers, the mount keeps its slots itself", path.display());
            };
            Ok(link.inspect_err(failed).ok())
        }
    }
}

/// Watched places as they are meant where the command is typed: a daemon works elsewhere.
fn absolute(places: &[PathBuf]) -> Vec<PathBuf> {
    let is_url = |place: &Path| place.to_string_lossy().contains("://");
    let absolute = |place: &PathBuf| if is_url(place) { None } else { std::path::absolute(place).ok() };
    places.iter().map(|place| absolute(place).unwrap_or_else(|| place.clone())).collect()
}

/// Closes what is open and unmounts the volume. When this host was fenced there is nothing to close, and nobody to wait for.
fn unmount_volume(state: &Arc<State>, over: &Over) -> Result<(), FsError> {
    if over.message().is_some() {
        return state.actor.stop();
    }
    for (number, _) in state.handles.files() {
        if let Some(Handle::File(handle)) = state.handles.remove(number) {
            let shared = state.clone();
            state.actor.send(move |volume| async move {
                if let Err(error) = opening::close(&shared, &volume, &handle).await {
                    tracing::error!("a file that was open at the unmount: {error}");
                }
            });
        }
    }
    state.actor.stop()
}

fn run(
    mount: &Mount,
    directory: &Path,
    state: &Arc<State>,
    over: &Over,
    signals: Signals,
    up: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    let _server = match Server::start(Arc::new(Control::new(state.clone()))) {
        Ok(server) => {
            // Set once: this is the only place.
            let _ = state.socket.set(server.path().to_owned());
            Some(server)
        }
        Err(error) => {
            tracing::warn!("no socket for direct access and the vmfs command: {error}");
            None
        }
    };
    let policy = Policy { watched: absolute(&mount.watched), format_blank: mount.format_blank, grow: mount.grow };
    let follower =
        Follower::start(policy, state).map_err(|error| format!("the thread that watches for LUNs: {error}"))?;
    let session = open_session(mount, directory, state).map_err(|error| explain(directory, &error))?;
    let watch = Watch::start(signals, directory)?;
    if over.message().is_some() {
        // It happened before there was a mount to take out of the tree.
        over.leave_tree();
    }
    tracing::info!("mounted {} at {}", mount.source, directory.display());
    let told = up();
    if told.is_err()
        && let Err(error) = mountpoint::unmount(directory)
    {
        tracing::error!("{}: {error}", directory.display());
    }
    let ended = match session.run() {
        // The connection was cut (umount -f, or the last program of a mount that had left the tree was killed): there is no session any
        // more, and the volume is left as after any unmount.
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {
            tracing::warn!("{}: the connection to the kernel was cut", directory.display());
            Ok(())
        }
        ended => ended.map_err(|error| format!("{}: the FUSE session failed: {error}", directory.display())),
    };
    watch.stop();
    drop(follower);
    told.and(ended)
}

/// Mounts: as root directly, as another user by fusermount3.
fn open_session(mount: &Mount, directory: &Path, state: &Arc<State>) -> std::io::Result<Session<Vmfs>> {
    let (config, vmfs) = (config(mount), Vmfs { state: state.clone() });
    let flags = flags(mount);
    let new = NewMount { source: &mount.source, directory, allow_other: mount.allow_other, flags };
    let Some(device) = mountpoint::mount(&new)? else { return Session::new(vmfs, directory, &config) };
    let acl = config.acl;
    Session::from_fd(vmfs, device, acl, config).inspect_err(|_| {
        if let Err(error) = mountpoint::unmount(directory) {
            tracing::error!("{}: {error}", directory.display());
        }
    })
}

/// Flags of mount(2): no devices and no set-user-id programs, unless asked for.
fn flags(mount: &Mount) -> MountFlags {
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID;
    flags.set(MountFlags::RDONLY, mount.read_only);
    for option in &mount.flags {
        match option {
            MountOption::Dev => flags.remove(MountFlags::NODEV),
            MountOption::Suid => flags.remove(MountFlags::NOSUID),
            MountOption::NoExec => flags.insert(MountFlags::NOEXEC),
            MountOption::NoAtime => flags.insert(MountFlags::NOATIME),
            MountOption::Sync => flags.insert(MountFlags::SYNCHRONOUS),
            MountOption::DirSync => flags.insert(MountFlags::DIRSYNC),
            _ => {}
        }
    }
    flags
}

fn explain(directory: &Path, error: &std::io::Error) -> String {
    let shown = directory.display();
    let text = error.to_string();
    if text.contains("user_allow_other") {
        return format!("{shown}: allow_other is for root, unless /etc/fuse.conf has user_allow_other");
    }
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            format!("{shown}: cannot be mounted: {text}; a user other than root needs fusermount3 (package fuse3)")
        }
        _ => format!("{shown}: cannot be mounted: {}", text.trim_end()),
    }
}

fn config(mount: &Mount) -> Config {
    let mut config = Config::default();
    config.acl = if mount.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(mount.threads.unwrap_or(DEFAULT_THREADS).into());
    config.mount_options = vec![
        MountOption::FSName(mount.source.clone()),
        MountOption::Subtype("vmfs".to_owned()),
        MountOption::DefaultPermissions,
        if mount.read_only { MountOption::RO } else { MountOption::RW },
    ];
    config.mount_options.extend(mount.flags.iter().cloned());
    config
}

/// The thread that turns signals into an unmount.
struct Watch {
    handle: signal_hook::iterator::Handle,
    thread: std::thread::JoinHandle<()>,
    ended: Arc<AtomicBool>,
}

impl Watch {
    fn start(mut signals: Signals, directory: &Path) -> Result<Watch, String> {
        let handle = signals.handle();
        let directory = directory.to_owned();
        let ended = Arc::new(AtomicBool::new(false));
        let session_ended = ended.clone();
        let thread = std::thread::Builder::new()
            .name("vmfs-signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    if session_ended.load(Ordering::Acquire) {
                        return;
                    }
                    tracing::info!("signal {signal}: unmounting {}", directory.display());
                    match mountpoint::unmount(&directory) {
                        Ok(Unmounted::Gone) => {}
                        Ok(Unmounted::Detached) => tracing::warn!(
                            "{} is in use: it has left the tree, and the volume is left when the last file is closed",
                            directory.display()
                        ),
                        Err(error) => tracing::error!("{}: {error}", directory.display()),
                    }
                }
            })
            .map_err(|error| format!("the signals' thread: {error}"))?;
        Ok(Watch { handle, thread, ended })
    }

    fn stop(self) {
        self.ended.store(true, Ordering::Release);
        self.handle.close();
        if self.thread.join().is_err() {
            tracing::error!("the signals' thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lun_keeps_its_name_when_the_working_directory_changes() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(lasting("lun0.img"), here.join("lun0.img").to_str().unwrap());
        assert_eq!(lasting("/dev/sdb"), "/dev/sdb");
        assert_eq!(lasting("iscsi://10.0.0.1/iqn.2026-01.test:a/0"), "iscsi://10.0.0.1/iqn.2026-01.test:a/0");
    }
}
