//! Operations of a host that is going to die, what they leave by a model, and what another host sees of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::volume::{AttributeChange, RenameFlags, Volume};

use crate::names_support::{create, list, mkdir};

pub const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };

/// An operation on the tree that [`furnish`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Create,
    MakeDirectory,
    /// Over the end of the large file's first block and behind its end.
    Overwrite,
    /// Within the body of the small file.
    WriteInline,
    /// The small file gets blocks.
    Grow,
    Rename,
    /// The small file takes the large one's name.
    Replace,
    /// The large file goes to the directory.
    Move,
    Unlink,
    RemoveDirectory,
    /// The large file is cut.
    Resize,
    Punch,
    /// The large file is opened to write and stays open.
    Lock,
    Unlock,
}

pub const OPS: [Op; 14] = [
    Op::Create,
    Op::MakeDirectory,
    Op::Overwrite,
    Op::WriteInline,
    Op::Grow,
    Op::Rename,
    Op::Replace,
    Op::Move,
    Op::Unlink,
    Op::RemoveDirectory,
    Op::Resize,
    Op::Punch,
    Op::Lock,
    Op::Unlock,
];

/// What a path leads to.
#[derive(Clone, PartialEq, Eq)]
pub enum Node {
    Directory,
    File(Vec<u8>),
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Node::Directory => write!(f, "directory"),
            Node::File(bytes) => {
                let mut runs: Vec<(u8, usize)> = Vec::new();
                for byte in bytes {
                    match runs.last_mut() {
                        Some((value, count)) if value == byte => *count += 1,
                        _ => runs.push((*byte, 1)),
                    }
                }
                write!(f, "file of {runs:?}")
            }
        }
    }
}

/// Paths and what is there.
pub type Look = BTreeMap<&'static str, Node>;

const PATHS: [&str; 7] = ["/d", "/d/f", "/e", "/f", "/g", "/m", "/n"];
const LARGE: usize = 100_000;
const SMALL: usize = 1500;

/// The tree before the first operation, and whether the large file is open.
#[derive(Clone)]
pub struct Model {
    pub look: Look,
    is_open: bool,
}

impl Model {
    pub fn new() -> Model {
        let look = Look::from([
            ("/d", Node::Directory),
            ("/f", Node::File(vec![1; LARGE])),
            ("/g", Node::File(vec![2; SMALL])),
        ]);
        Model { look, is_open: false }
    }

    fn file(&mut self, path: &'static str) -> Option<&mut Vec<u8>> {
        match self.look.get_mut(path) {
            Some(Node::File(bytes)) => Some(bytes),
            _ => None,
        }
    }

    fn renamed(&mut self, from: &'static str, to: &'static str) -> Option<()> {
        let node = self.look.remove(from)?;
        self.look.insert(to, node);
        Some(())
    }

    /// The tree after an operation; `None`: it cannot be done there.
    pub fn after(&self, op: Op) -> Option<Model> {
        let mut next = self.clone();
        match op {
            Op::Create => next.look.insert("/n", Node::File(Vec::new())).is_none().then_some(())?,
            Op::MakeDirectory => next.look.insert("/e", Node::Directory).is_none().then_some(())?,
            Op::Overwrite => put(next.file("/f")?, 60_000, &[3; 80_000]),
            Op::WriteInline => put(next.file("/g")?, 100, &[4; 2000]),
            Op::Grow => put(next.file("/g")?, 70_000, &[5; 500]),
            Op::Rename => next.renamed("/f", "/m")?,
            Op::Replace => {
                next.look.contains_key("/f").then_some(())?;
                next.renamed("/g", "/f")?;
            }
            Op::Move => next.renamed("/f", "/d/f").filter(|()| self.look.contains_key("/d"))?,
            Op::Unlink => next.look.remove("/f").map(drop)?,
            Op::RemoveDirectory => {
                (!self.look.contains_key("/d/f")).then_some(())?;
                next.look.remove("/d").map(drop)?;
            }
            Op::Resize => next.file("/f")?.resize(10_000, 0),
            Op::Punch => {
                let end = next.file("/f")?.len().min(66_000);
                next.file("/f")?[..end].fill(0);
            }
            Op::Lock => {
                (!self.is_open).then_some(())?;
                next.file("/f")?;
                next.is_open = true;
            }
            Op::Unlock => {
                self.is_open.then_some(())?;
                next.is_open = false;
            }
        }
        Some(next)
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, with: &[u8]) {
    let end = at + with.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[at..end].copy_from_slice(with);
}

/// Whether a look is explained by a host that died between `before` and `after`: names and what is replaced change at once, the
/// bytes of a file sector by sector.
pub fn is_between(look: &Look, before: &Look, after: &Look) -> bool {
    if look == before || look == after {
        return true;
    }
    let same_names = before.keys().eq(after.keys()) && look.keys().eq(before.keys());
    same_names
        && look.iter().all(|(path, node)| match (node, &before[path], &after[path]) {
            (Node::File(now), Node::File(old), Node::File(new)) => is_mixed(now, old, new),
            _ => node == &before[path],
        })
}

fn is_mixed(now: &[u8], old: &[u8], new: &[u8]) -> bool {
    let (low, high) = (old.len().min(new.len()), old.len().max(new.len()));
    let at = |bytes: &[u8], nth: usize| bytes.get(nth).copied().unwrap_or(0);
    let sector_of =
        |bytes: &[u8], range: std::ops::Range<usize>| range.clone().all(|nth| at(now, nth) == at(bytes, nth));
    (low..=high).contains(&now.len())
        && (0..now.len()).step_by(512).all(|from| {
            let range = from..(from + 512).min(now.len());
            sector_of(old, range.clone()) || sector_of(new, range)
        })
}

/// A host at work.
pub struct Worker {
    pub volume: Volume,
    open: Option<Arc<OpenFile>>,
}

impl Worker {
    pub fn new(volume: Volume) -> Worker {
        Worker { volume, open: None }
    }

    async fn find(&self, name: &[u8]) -> Result<ObjectRef, FsError> {
        self.volume.lookup(self.volume.root(), name).await.map(|stat| stat.object)
    }

    async fn write(&self, name: &[u8], at: u64, bytes: &[u8]) -> Result<(), FsError> {
        let open = self.volume.open(self.find(name).await?, WRITE).await?;
        let written = write_all(&self.volume, &open, at, bytes).await;
        written.and(self.volume.close(open).await)
    }

    pub async fn carry_out(&mut self, op: Op) -> Result<(), FsError> {
        let (volume, root) = (self.volume.clone(), self.volume.root());
        let rename = async |from: &[u8], directory: ObjectRef, to: &[u8]| {
            volume.rename(root, from, directory, to, RenameFlags::default()).await.map(drop)
        };
        match op {
            Op::Create => create(&volume, root, b"n").await.map(drop),
            Op::MakeDirectory => mkdir(&volume, root, b"e").await.map(drop),
            Op::Overwrite => self.write(b"f", 60_000, &[3; 80_000]).await,
            Op::WriteInline => self.write(b"g", 100, &[4; 2000]).await,
            Op::Grow => self.write(b"g", 70_000, &[5; 500]).await,
            Op::Rename => rename(b"f", root, b"m").await,
            Op::Replace => rename(b"g", root, b"f").await,
            Op::Move => rename(b"f", self.find(b"d").await?, b"f").await,
            Op::Unlink => volume.unlink(root, b"f").await.map(drop),
            Op::RemoveDirectory => volume.remove_directory(root, b"d").await.map(drop),
            Op::Resize => {
                let change = AttributeChange { size: Some(10_000), ..AttributeChange::default() };
                volume.set_attributes(self.find(b"f").await?, change).await.map(drop)
            }
            Op::Punch => {
                let open = volume.open(self.find(b"f").await?, WRITE).await?;
                let end = open.size().min(66_000);
                let punched = volume.files().punch(&open, 0..end).await;
                let flushed = punched.and(volume.flush(&open).await);
                flushed.and(volume.close(open).await)
            }
            Op::Lock => {
                self.open = Some(volume.open(self.find(b"f").await?, WRITE).await?);
                Ok(())
            }
            Op::Unlock => match self.open.take() {
                Some(open) => volume.close(open).await,
                None => Ok(()),
            },
        }
    }
}

pub async fn write_all(volume: &Volume, open: &Arc<OpenFile>, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(open, at + done as u64, &bytes[done..]).await?;
    }
    volume.flush(open).await
}

/// Makes the tree of [`Model::new`].
pub async fn furnish(volume: &Volume) {
    let root = volume.root();
    mkdir(volume, root, b"d").await.unwrap();
    for (name, byte, length) in [(b"f", 1, LARGE), (b"g", 2, SMALL)] {
        let file = create(volume, root, name).await.unwrap().object;
        let open = volume.open(file, WRITE).await.unwrap();
        write_all(volume, &open, 0, &vec![byte; length]).await.unwrap();
        volume.close(open).await.unwrap();
    }
}

/// Everything that a host sees, names and bytes. A listing may show the old name of what has moved until somebody tidies the directory.
pub async fn look(volume: &Volume) -> Look {
    let mut seen = Look::new();
    let mut directories = vec![(String::new(), volume.root())];
    while let Some((path, directory)) = directories.pop() {
        for name in list(volume, directory, 100).await.into_keys() {
            let stat = match volume.lookup(directory, &name).await {
                Err(error) if error.kind() == FsErrorKind::NotFound => continue,
                other => other.unwrap(),
            };
            let path = format!("{path}/{}", name.escape_ascii());
            let known = PATHS.iter().find(|known| **known == path);
            let known = known.unwrap_or_else(|| panic!("{path} is no name of this test"));
            if stat.object_type == ObjectType::Directory {
                directories.push((path, stat.object));
                seen.insert(*known, Node::Directory);
            } else {
                seen.insert(*known, Node::File(read_all(volume, stat.object).await));
            }
        }
    }
    seen
}

async fn read_all(volume: &Volume, object: ObjectRef) -> Vec<u8> {
    let size = volume.stat(object).await.unwrap().attributes.size as usize;
    let open = volume.open(object, OpenMode { read: true, write: false, truncate: false }).await.unwrap();
    let bytes = volume.files().read(&open, 0, size).await.unwrap();
    volume.close(open).await.unwrap();
    assert_eq!(bytes.len(), size, "{} ends before its size", object.fd);
    bytes
}

/// Writes to every file, makes and removes a name in every directory: nothing is held by one that is gone.
pub async fn use_everything(volume: &Volume) {
    let mut directories = vec![volume.root()];
    while let Some(directory) = directories.pop() {
        for (_, (object, object_type)) in list(volume, directory, 100).await {
            match object_type {
                ObjectType::Directory => directories.push(object),
                _ => {
                    let open = volume.open(object, WRITE).await.unwrap();
                    write_all(volume, &open, 0, &[9; 512]).await.unwrap();
                    volume.close(open).await.unwrap();
                }
            }
        }
        create(volume, directory, b"used").await.unwrap();
        volume.unlink(directory, b"used").await.unwrap();
    }
}
