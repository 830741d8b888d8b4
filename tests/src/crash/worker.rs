//! Owns: a program that works in its folder of a mount and remembers what was acknowledged.
//! Promises: an answer that no rule explains ends it with that error; so does the end of the mount.
//! Must not know: when the mount ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::content::{Change, Content};
use super::tree::{NameOperation, Node, Tree, parent};
use crate::random::Random;

/// Files that are open at once.
const OPEN: usize = 4;
/// Files and folders above which more is removed than made.
const NAMES: usize = 40;
/// Longest file.
const LONGEST: usize = 3 << 20;
/// The kernel sends the last close of a file without waiting for the answer: so many closed files may still be open at the host.
const CLOSING: usize = 8;

/// A program with a folder of its own.
pub struct Worker {
    /// What it knows of its folder.
    pub tree: Tree,
    /// Operations that were acknowledged.
    pub operations: u64,
    /// The last operation, for messages.
    pub last: String,
    root: PathBuf,
    random: Random,
    named: u64,
    open: Vec<(String, File)>,
    /// Files that were removed while they were open.
    orphans: Vec<File>,
    closed: Vec<String>,
    /// An open that was not answered: the file may be open at the host.
    opening: Option<String>,
}

impl Worker {
    /// A worker without a folder yet.
    pub fn new(seed: u64) -> Worker {
        Worker {
            tree: Tree::default(),
            operations: 0,
            last: String::new(),
            root: PathBuf::new(),
            random: Random::new(seed),
            named: 0,
            open: Vec::new(),
            orphans: Vec::new(),
            closed: Vec::new(),
            opening: None,
        }
    }

    /// Works below `root` until something fails or `stop` is set; then everything is closed.
    pub fn work(&mut self, root: &Path, stop: &AtomicBool) -> io::Result<()> {
        self.root = root.to_owned();
        while !stop.load(Ordering::Relaxed) {
            self.step()?;
            self.operations += 1;
        }
        while !self.open.is_empty() {
            self.close(0)?;
        }
        self.orphans.clear();
        Ok(())
    }

    /// The mount is gone with everything that was open on it.
    pub fn killed(&mut self) {
        self.orphans.clear();
        let open = self.open.drain(..).map(|(path, _)| path);
        self.tree.killed(open.chain(self.closed.drain(..)).chain(self.opening.take()));
    }

    fn step(&mut self) -> io::Result<()> {
        let files = self.tree.paths(|node| matches!(node, Node::File(_)));
        let full = self.tree.paths(|_| true).len() >= NAMES;
        match self.random.below(32) {
            0..=5 if full => self.remove(&files),
            0..=4 => self.create(),
            5 => self.replace(),
            6..=10 => self.change(Worker::some_write),
            11 => self.change(|_, _| Change::Resize(0)),
            12 => self.change(|random, length| Change::Resize(random.below(length as u64 * 2 + 1) as usize)),
            13 => self.change(|random, length| {
                let at = random.below(length as u64 + 1) as usize;
                Change::Punch(at, random.below(400_000) as usize + 1)
            }),
            14..=17 => self.sync(),
            18..=19 if !self.open.is_empty() => self.close_some(),
            18..=20 => self.open_again(&files),
            21..=23 => self.rename(&files),
            24..=25 => self.remove(&files),
            26 => self.make_folder(),
            27 => self.remove_folder(),
            28 => self.make_link(),
            29 => self.rename_folder(),
            _ => self.read_back(&files),
        }
    }

    fn new_name(&mut self) -> String {
        let folders = self.tree.paths(|node| matches!(node, Node::Folder));
        self.named += 1;
        match self.pick(&folders) {
            Some(folder) if self.random.below(3) > 0 => format!("{folder}/n{}", self.named),
            _ => format!("n{}", self.named),
        }
    }

    fn pick(&mut self, of: &[String]) -> Option<String> {
        (!of.is_empty()).then(|| of[self.random.below(of.len() as u64) as usize].clone())
    }

    /// Carries out a name operation. `None`: refused because a killed host may hold one of the names.
    fn name<T>(
        &mut self,
        operation: NameOperation,
        names: &[&str],
        call: impl FnOnce(&Path) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        self.last = format!("{operation:?}");
        self.tree.begin(operation);
        match call(&self.root) {
            Ok(value) => {
                self.tree.done();
                Ok(Some(value))
            }
            Err(error) if self.is_held(&error, names) => {
                self.tree.refused();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn is_held(&self, error: &io::Error, names: &[&str]) -> bool {
        error.raw_os_error() == Some(libc::EBUSY) && names.iter().any(|name| self.tree.may_be_held(name))
    }

    fn create(&mut self) -> io::Result<()> {
        while self.open.len() >= OPEN {
            self.close(0)?;
        }
        let path = self.new_name();
        let add = NameOperation::Add(path.clone(), Node::File(Content::default()));
        let call = |root: &Path| File::options().read(true).write(true).create_new(true).open(root.join(&path));
        if let Some(file) = self.name(add, &[&path], call)? {
            self.open.push((path, file));
            if self.random.below(2) == 0 {
                let last = self.open.len() - 1;
                self.change_at(last, Worker::some_write)?;
                self.sync_at(last)?;
            }
        }
        Ok(())
    }

    /// As editors save: a new file, written and made durable, takes the name of the old one.
    fn replace(&mut self) -> io::Result<()> {
        self.create()?;
        let Some(last) = self.open.len().checked_sub(1) else { return Ok(()) };
        self.change_at(last, Worker::some_write)?;
        self.sync_at(last)?;
        let path = self.open[last].0.clone();
        self.close(last)?;
        let others = self.tree.paths(|node| matches!(node, Node::File(_)));
        let to = self.pick(&others).filter(|other| *other != path);
        to.map_or(Ok(()), |to| self.rename_to(path, to))
    }

    fn some_write(random: &mut Random, length: usize) -> Change {
        let size = [1, 60, 700, 5_000, 30_000, 200_000, 1_200_000][random.below(7) as usize];
        let size = random.below(size) as usize + 1;
        let at = match random.below(4) {
            0 => length,
            1 => random.below(length as u64 * 2 + 1) as usize,
            _ => random.below(length as u64 + 1) as usize,
        };
        Change::Write(at.min(LONGEST - size), random.bytes(size))
    }

    fn change(&mut self, what: impl FnOnce(&mut Random, usize) -> Change) -> io::Result<()> {
        match self.open.len() as u64 {
            0 => Ok(()),
            count => {
                let at = self.random.below(count) as usize;
                self.change_at(at, what)
            }
        }
    }

    fn change_at(&mut self, at: usize, what: impl FnOnce(&mut Random, usize) -> Change) -> io::Result<()> {
        let (path, file) = &self.open[at];
        let content = self.tree.content(path);
        let change = what(&mut self.random, content.length());
        if matches!(change, Change::Resize(to) if to > LONGEST) {
            return Ok(());
        }
        self.last = format!("{} of {path}", change.name());
        content.change(change.clone());
        match change {
            Change::Write(at, bytes) => file.write_all_at(&bytes, at as u64),
            Change::Resize(length) => file.set_len(length as u64),
            Change::Punch(at, length) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: fallocate(2) takes a descriptor that is open here and integers; it touches no memory of this process.
                match unsafe { libc::fallocate(file.as_raw_fd(), mode, at as libc::off_t, length as libc::off_t) } {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            }
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        match self.open.len() as u64 {
            0 => Ok(()),
            count => {
                let at = self.random.below(count) as usize;
                self.sync_at(at)
            }
        }
    }

    fn sync_at(&mut self, at: usize) -> io::Result<()> {
        let (path, file) = &self.open[at];
        self.last = format!("fsync of {path}");
        if self.random.below(2) == 0 {
            file.sync_all()?
        } else {
            file.sync_data()?
        }
        self.tree.content(path).synced();
        Ok(())
    }

    fn close_some(&mut self) -> io::Result<()> {
        let at = self.random.below(self.open.len() as u64) as usize;
        self.close(at)
    }

    /// What close(2) has acknowledged is durable too.
    fn close(&mut self, at: usize) -> io::Result<()> {
        let (path, file) = self.open.remove(at);
        self.last = format!("close of {path}");
        self.closed.insert(0, path.clone());
        self.closed.truncate(CLOSING);
        // SAFETY: the descriptor was owned by `file` alone, which has given it up.
        if unsafe { libc::close(file.into_raw_fd()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.tree.content(&path).synced();
        Ok(())
    }

    fn open_again(&mut self, files: &[String]) -> io::Result<()> {
        let Some(path) = self.pick(files) else { return Ok(()) };
        if self.open.len() >= OPEN || self.open.iter().any(|(open, _)| *open == path) {
            return Ok(());
        }
        self.last = format!("open {path}");
        self.opening = Some(path.clone());
        match File::options().read(true).write(true).open(self.root.join(&path)) {
            Ok(file) => self.open.push((path, file)),
            Err(error) if self.is_held(&error, &[&path]) => {}
            Err(error) => return Err(error),
        }
        self.opening = None;
        Ok(())
    }

    fn rename(&mut self, files: &[String]) -> io::Result<()> {
        let Some(from) = self.pick(files) else { return Ok(()) };
        let to = match self.random.below(3) {
            0 => self.pick(files).unwrap_or_default(),
            _ => self.new_name(),
        };
        if from == to { Ok(()) } else { self.rename_to(from, to) }
    }

    fn rename_to(&mut self, from: String, to: String) -> io::Result<()> {
        let operation = NameOperation::Rename(from.clone(), to.clone());
        let call = |root: &Path| fs::rename(root.join(&from), root.join(&to));
        if self.name(operation, &[&from, &to], call)?.is_some() {
            self.forget_open(&to);
            for path in self.open.iter_mut().map(|(path, _)| path).chain(&mut self.closed).filter(|path| **path == from)
            {
                path.clone_from(&to);
            }
        }
        Ok(())
    }

    /// The name of a file that may be open was taken away: it lives on without one.
    fn forget_open(&mut self, path: &str) {
        while let Some(at) = self.open.iter().position(|(open, _)| open == path) {
            self.orphans.push(self.open.remove(at).1);
        }
        if self.orphans.len() > OPEN {
            self.orphans.remove(0);
        }
    }

    fn remove(&mut self, files: &[String]) -> io::Result<()> {
        let links = self.tree.paths(|node| matches!(node, Node::Link(_)));
        let path = if self.random.below(5) == 0 { self.pick(&links) } else { self.pick(files) };
        let Some(path) = path else { return Ok(()) };
        let call = |root: &Path| fs::remove_file(root.join(&path));
        if self.name(NameOperation::Remove(path.clone()), &[&path], call)?.is_some() {
            self.forget_open(&path);
        }
        Ok(())
    }

    fn make_folder(&mut self) -> io::Result<()> {
        let path = self.new_name();
        let call = |root: &Path| fs::create_dir(root.join(&path));
        self.name(NameOperation::Add(path.clone(), Node::Folder), &[&path], call).map(drop)
    }

    fn remove_folder(&mut self) -> io::Result<()> {
        let folders = self.tree.paths(|node| matches!(node, Node::Folder));
        let Some(path) = self.pick(&folders) else { return Ok(()) };
        let call = |root: &Path| fs::remove_dir(root.join(&path));
        if self.tree.is_empty(&path) {
            return self.name(NameOperation::Remove(path.clone()), &[&path], call).map(drop);
        }
        match call(&self.root) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) || self.is_held(&error, &[&path]) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(io::Error::other(format!("the folder {path} was removed with what is in it"))),
        }
    }

    fn rename_folder(&mut self) -> io::Result<()> {
        let folders = self.tree.paths(|node| matches!(node, Node::Folder));
        let Some(from) = self.pick(&folders) else { return Ok(()) };
        self.named += 1;
        let name = format!("n{}", self.named);
        let to = if parent(&from).is_empty() { name } else { format!("{}/{name}", parent(&from)) };
        let call = |root: &Path| fs::rename(root.join(&from), root.join(&to));
        if self.name(NameOperation::Rename(from.clone(), to.clone()), &[&from, &to], call)?.is_some() {
            for path in self.open.iter_mut().map(|(path, _)| path).chain(&mut self.closed) {
                if path.strip_prefix(&from).is_some_and(|rest| rest.starts_with('/')) {
                    path.replace_range(..from.len(), &to);
                }
            }
        }
        Ok(())
    }

    fn make_link(&mut self) -> io::Result<()> {
        let (path, target) = (self.new_name(), format!("target of {}", self.named));
        let call = |root: &Path| symlink(&target, root.join(&path));
        self.name(NameOperation::Add(path.clone(), Node::Link(target.clone())), &[&path], call).map(drop)
    }

    /// The mount that made the changes shows all of them.
    fn read_back(&mut self, files: &[String]) -> io::Result<()> {
        let Some(path) = self.pick(files) else { return Ok(()) };
        self.last = format!("read {path}");
        let found = fs::read(self.root.join(&path))?;
        if found == self.tree.content(&path).current() {
            return Ok(());
        }
        Err(io::Error::other(format!("{path} has other bytes than were written")))
    }
}
