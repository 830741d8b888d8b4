//! Owns: the metadata actor: the one thread on which everything of the volume that is asynchronous runs, and the way to it.
//! Promises: jobs begin in the order in which they were sent; after [`Actor::stop`] has returned the volume is unmounted.
//! Must not know: FUSE, what the jobs do.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;

use lockd::keeper::client::Link;
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{JoinSet, LocalSet};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::gate::GatePage;
use vmfs_core::keeper::{Embedded, SlotKeeper};
use vmfs_core::lun::{DeviceFinder, Lun, OpenLun};
use vmfs_core::real_env::RealEnv;
use vmfs_core::volume::{MountOptions, Volume};

/// Threads for blocking commands of the metadata path, made when they are needed: one for each command in flight. A LUN that hangs may
/// hold many of them for as long as its commands have patience; the others' renewals go on meanwhile.
const BLOCKING_THREADS: usize = 256;
/// How long operations that were begun may go on after the unmount was asked for.
const LAST_OPERATIONS: Duration = Duration::from_secs(30);
/// The same once this host was fenced: none of them can change anything any more, and others wait for the end of this process.
const FENCED_OPERATIONS: Duration = Duration::from_secs(1);

/// How often a degraded mount looks for the LUNs that it goes without.
const LOOK_FOR_MISSING: Duration = Duration::from_secs(3);

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Job = Box<dyn FnOnce(Volume) -> Task + Send>;
/// Told why this incarnation is over, on the actor's thread.
pub type OnOver = Box<dyn FnOnce(String) + Send>;

enum Message {
    Run(Job),
    Stop,
}

/// The way to the metadata actor. Jobs sent after it has stopped are dropped, and with them whatever must be answered.
pub struct Actor {
    sender: UnboundedSender<Message>,
    thread: Mutex<Option<JoinHandle<Result<(), FsError>>>>,
}

impl Actor {
    /// Starts the actor, opens the LUNs and mounts the volume, whose leases `gate` will show and `lockd` keeps, if there is one;
    /// `prepare` makes of it what the caller needs from the start, `on_over` is called when this incarnation is over before it is
    /// unmounted.
    pub fn start<T: Send + 'static>(
        luns: Luns,
        options: MountOptions,
        gate: GatePage,
        lockd: Option<Link>,
        on_over: OnOver,
        prepare: impl FnOnce(&Volume) -> T + Send + 'static,
    ) -> Result<(Actor, T), FsError> {
        let (sender, receiver) = unbounded_channel();
        let (mounted, is_mounted) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("vmfs-actor".to_owned())
            .spawn(move || {
                let runtime = runtime().map_err(|error| failed("the actor's runtime", &error))?;
                runtime.block_on(LocalSet::new().run_until(async move {
                    let (paths, how) = (luns.members.clone(), open_how(&options));
                    match mount(luns, options, gate, lockd).await {
                        Ok(volume) => {
                            // The receiver waits for this one message.
                            let _ = mounted.send(Ok(prepare(&volume)));
                            let awaited = volume.clone();
                            tokio::task::spawn_local(async move { await_missing(&awaited, &paths, how).await });
                            run(volume, receiver, on_over).await
                        }
                        Err(error) => {
                            let _ = mounted.send(Err(error));
                            Ok(())
                        }
                    }
                }))
            })
            .map_err(|error| failed("the actor's thread", &error))?;
        match is_mounted.recv() {
            Ok(Ok(prepared)) => Ok((Actor { sender, thread: Mutex::new(Some(thread)) }, prepared)),
            Ok(Err(error)) => Err(error),
            Err(_) => match thread.join() {
                Ok(Err(error)) => Err(error),
                _ => Err(FsError::refused(FsErrorKind::Io, "the metadata actor ended before the volume was mounted")),
            },
        }
    }

    /// Sends a job; its future runs beside the others.
    pub fn send<F>(&self, job: impl FnOnce(Volume) -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        // When the actor has ended the job is dropped, and its reply object answers with EIO.
        let _ = self.sender.send(Message::Run(Box::new(move |volume| Box::pin(job(volume)))));
    }

    /// Sends a job and blocks until it has answered. Never called on the actor's own thread.
    pub fn ask<T, F>(&self, job: impl FnOnce(Volume) -> F + Send + 'static) -> Result<T, FsError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, FsError>> + 'static,
    {
        let (answer, answered) = sync_channel(1);
        self.send(move |volume| async move {
            // Who asked may have ended with its thread.
            let _ = answer.send(job(volume).await);
        });
        answered.recv().unwrap_or_else(|_| Err(FsError::refused(FsErrorKind::Io, "the volume is being unmounted")))
    }

    /// Ends the actor: lets operations finish, unmounts the volume, leaves its slots.
    pub fn stop(&self) -> Result<(), FsError> {
        let _ = self.sender.send(Message::Stop);
        match self.thread.lock().take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => {
                Err(FsError::refused(FsErrorKind::Io, "the metadata actor panicked; the slots were not left"))
            }
        }
    }
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_time().max_blocking_threads(BLOCKING_THREADS).build()
}

fn failed(what: &str, error: &io::Error) -> FsError {
    FsError::refused(FsErrorKind::Io, format!("{what} cannot be had: {error}"))
}

/// Where the storage is.
pub struct Luns {
    /// Paths or URLs of the volume's LUNs.
    pub members: Vec<String>,
    /// Folders in which the image files of raw device mappings are looked for.
    pub raw_folders: Vec<PathBuf>,
}

async fn mount(luns: Luns, options: MountOptions, gate: GatePage, lockd: Option<Link>) -> Result<Volume, FsError> {
    let members = open_luns(&luns.members, &options).await?;
    let keeper: Rc<dyn SlotKeeper> = match lockd {
        Some(link) => Rc::new(link),
        None => Rc::new(Embedded),
    };
    let volume = Volume::mount_kept(members, options, Rc::new(RealEnv), gate, keeper).await?;
    volume.files().set_raw_devices(Rc::new(DeviceFinder::new(luns.raw_folders)));
    Ok(volume)
}

fn open_how(options: &MountOptions) -> OpenLun {
    OpenLun { read_only: options.read_only, refuse_busy_device: false }
}

/// Takes up the LUNs that a degraded mount went without, as soon as they are there under a path that was given. Ends when none is missing.
async fn await_missing(volume: &Volume, paths: &[String], how: OpenLun) {
    while !volume.missing().is_empty() {
        tokio::time::sleep(LOOK_FOR_MISSING).await;
        for path in paths {
            let Ok(lun) = luns::open_lun_aside(path, how).await else { continue };
            if volume.luns().iter().any(|known| known.name == lun.name()) {
                continue;
            }
            match volume.adopt(lun).await {
                Ok(index) => tracing::info!("{path} is back as {index}"),
                Err(error) => tracing::warn!("{path} is there, but cannot be used: {error}"),
            }
        }
    }
}

/// Opens the LUNs. A degraded mount goes without those that cannot be opened.
async fn open_luns(paths: &[String], options: &MountOptions) -> Result<Vec<Rc<dyn Lun>>, FsError> {
    let how = open_how(options);
    let mut luns = Vec::with_capacity(paths.len());
    let mut absent = None;
    for path in paths {
        match luns::open_lun_aside(path, how).await {
            Ok(lun) => luns.push(lun),
            Err(error) if options.degraded => {
                tracing::warn!("mounted without a LUN: {error}");
                absent = absent.or(Some(error));
            }
            Err(error) => return Err(lost_or_refused(error, paths.len())),
        }
    }
    match absent {
        Some(error) if luns.is_empty() => Err(error),
        _ => Ok(luns),
    }
}

/// Says how to go without a LUN, when that may be what is wrong.
fn lost_or_refused(error: FsError, luns: usize) -> FsError {
    match error.kind() {
        kind @ (FsErrorKind::Io | FsErrorKind::NotFound) if luns > 1 => FsError::refused(
            kind,
            format!("{error}; if that LUN is lost, mount with -o degraded to use what lies wholly on the others"),
        ),
        _ => error,
    }
}

/// Runs jobs beside the volume's background work until it is told to stop; then unmounts.
async fn run(volume: Volume, mut receiver: UnboundedReceiver<Message>, on_over: OnOver) -> Result<(), FsError> {
    let background = {
        let volume = volume.clone();
        tokio::task::spawn_local(async move { volume.background().await })
    };
    let over = {
        let volume = volume.clone();
        tokio::task::spawn_local(async move { on_over(volume.until_over().await) })
    };
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            message = receiver.recv() => match message {
                Some(Message::Run(job)) => drop(tasks.spawn_local(job(volume.clone()))),
                Some(Message::Stop) | None => break,
            },
            Some(ended) = tasks.join_next() => report_panic(ended),
        }
    }
    receiver.close();
    over.abort();
    volume.end_long_work();
    let patience = if volume.is_over() { FENCED_OPERATIONS } else { LAST_OPERATIONS };
    let rest = async {
        while let Some(ended) = tasks.join_next().await {
            report_panic(ended);
        }
    };
    if tokio::time::timeout(patience, rest).await.is_err() {
        tracing::warn!("operations did not end within {patience:?}; the volume is unmounted all the same");
    }
    let result = volume.unmount().await;
    // It ends by itself after the unmount.
    report_panic(background.await);
    result
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!("an operation of the metadata actor failed: {error}");
    }
}
