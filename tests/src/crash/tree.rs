//! Owns: the names below a folder as their only user knows them, the one name operation whose answer it did not get, and the
//!   comparison with what a mount shows.
//! Promises: every acknowledged name operation is there; one without an answer took place wholly or not at all, the same for all hosts.
//! Must not know: how operations are chosen.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::content::Content;

/// What a name leads to.
#[derive(Clone, Debug)]
pub enum Node {
    /// A file.
    File(Content),
    /// A folder.
    Folder,
    /// A symbolic link and where it points.
    Link(String),
}

/// A name operation. Paths are relative to the folder, without a slash at their ends.
#[derive(Clone, Debug)]
pub enum NameOperation {
    /// A new name.
    Add(String, Node),
    /// A name goes.
    Remove(String),
    /// A name moves and replaces what is at the second.
    Rename(String, String),
}

/// The names below a folder.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    /// The operation under way.
    doubt: Option<NameOperation>,
    /// Names that a killed host may hold: it had the file open, or was changing the name. A folder stands for all below it.
    held: BTreeSet<String>,
}

/// The folder part of a path; empty at the top.
pub fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn is_below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

impl Tree {
    /// Notes an operation before it is asked for.
    pub fn begin(&mut self, operation: NameOperation) {
        assert!(self.doubt.is_none(), "one operation at a time");
        self.doubt = Some(operation);
    }

    /// The operation was acknowledged.
    pub fn done(&mut self) {
        if let Some(operation) = self.doubt.take() {
            self.apply(operation);
        }
    }

    /// The operation was refused: nothing happened.
    pub fn refused(&mut self) {
        self.doubt = None;
    }

    fn apply(&mut self, operation: NameOperation) {
        match operation {
            NameOperation::Add(path, node) => {
                self.nodes.insert(path, node);
            }
            NameOperation::Remove(path) => {
                self.nodes.remove(&path);
            }
            NameOperation::Rename(from, to) => {
                let moved = |path: &str| {
                    (path == from || is_below(path, &from)).then(|| format!("{to}{}", &path[from.len()..]))
                };
                let nodes = std::mem::take(&mut self.nodes);
                self.nodes =
                    nodes.iter().filter(|(path, _)| **path != to).map(|(p, n)| (p.clone(), n.clone())).collect();
                for (path, node) in nodes {
                    if let Some(new) = moved(&path) {
                        self.nodes.remove(&path);
                        self.nodes.insert(new, node);
                    }
                }
                let held: Vec<_> = self.held.iter().filter_map(|path| moved(path)).collect();
                self.held.extend(held);
            }
        }
    }

    /// What a path leads to.
    pub fn node(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The content of a file that is there.
    pub fn content(&mut self, path: &str) -> &mut Content {
        match self.nodes.get_mut(path) {
            Some(Node::File(content)) => content,
            other => panic!("{path} is {other:?}, not a file"),
        }
    }

    /// All paths whose node is of a kind.
    pub fn paths(&self, of: impl Fn(&Node) -> bool) -> Vec<String> {
        self.nodes.iter().filter(|(_, node)| of(node)).map(|(path, _)| path.clone()).collect()
    }

    /// Whether anything is in a folder.
    pub fn is_empty(&self, folder: &str) -> bool {
        !self.nodes.keys().any(|path| is_below(path, folder))
    }

    /// Whether a killed host may hold this name, so that EBUSY is a right answer.
    pub fn may_be_held(&self, path: &str) -> bool {
        self.held.iter().any(|held| held == path || is_below(path, held))
    }

    /// The host was killed while it had these files open.
    pub fn killed(&mut self, open: impl IntoIterator<Item = String>) {
        self.held.extend(open);
        match &self.doubt {
            Some(NameOperation::Add(path, _) | NameOperation::Remove(path)) => {
                self.held.insert(path.clone());
            }
            Some(NameOperation::Rename(from, to)) => self.held.extend([from.clone(), to.clone()]),
            None => {}
        }
    }

    /// Compares with what is below `root`; what was in doubt is settled by it. The error says what is wrong.
    pub fn compare(&mut self, root: &Path) -> Result<(), String> {
        self.settle_doubt(root)?;
        let mut folders = vec![String::new()];
        folders.extend(self.paths(|node| matches!(node, Node::Folder)));
        let mut listed = BTreeSet::new();
        for folder in &folders {
            let at = root.join(folder);
            for entry in fs::read_dir(&at).map_err(|e| format!("folder {}: {e}", at.display()))? {
                let name = entry.map_err(|e| format!("listing {}: {e}", at.display()))?.file_name();
                let name = name.into_string().map_err(|n| format!("a name that nobody made: {n:?}"))?;
                let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                if !listed.insert(path.clone()) {
                    return Err(format!("{path} is listed twice"));
                }
                // A listing does not read what a name leads to: what a killed host was changing may be listed and not be there.
                let leftover = || self.may_be_held(&path) && exists(&root.join(&path)) == Ok(false);
                if !self.nodes.contains_key(&path) && !leftover() {
                    return Err(format!("{path} should not be there"));
                }
            }
        }
        for (path, node) in &mut self.nodes {
            if !listed.contains(path) {
                return Err(format!("{path} is lost: it is not listed (look-up: {:?})", exists(&root.join(path))));
            }
            node.compare(&root.join(path)).map_err(|what| format!("{path}: {what}"))?;
        }
        Ok(())
    }

    fn settle_doubt(&mut self, root: &Path) -> Result<(), String> {
        let Some(operation) = self.doubt.take() else { return Ok(()) };
        let happened = match &operation {
            NameOperation::Add(path, _) => exists(&root.join(path))?,
            NameOperation::Remove(path) | NameOperation::Rename(path, _) => !exists(&root.join(path))?,
        };
        if happened {
            self.apply(operation);
        }
        Ok(())
    }
}

fn exists(path: &PathBuf) -> Result<bool, String> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!("look-up of {}: {error}", path.display())),
    }
}

impl Node {
    fn compare(&mut self, at: &Path) -> Result<(), String> {
        let kind = fs::symlink_metadata(at).map_err(|e| format!("look-up: {e}"))?.file_type();
        match self {
            Node::Folder if kind.is_dir() => Ok(()),
            Node::Link(target) if kind.is_symlink() => {
                let found = fs::read_link(at).map_err(|e| format!("reading the link: {e}"))?;
                if found == Path::new(target) { Ok(()) } else { Err(format!("points to {found:?}, not {target:?}")) }
            }
            Node::File(content) if kind.is_file() => content.settle(fs::read(at).map_err(|e| format!("reading: {e}"))?),
            other => Err(format!("is a {kind:?}, not {other:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        names.iter().for_each(|name| fs::write(folder.path().join(name), "").unwrap());
        folder
    }

    fn tree(names: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for name in names {
            tree.begin(NameOperation::Add((*name).to_owned(), Node::File(Content::default())));
            tree.done();
        }
        tree
    }

    #[test]
    fn acknowledged_names_must_be_there_and_no_others() {
        assert_eq!(tree(&["a", "b"]).compare(folder_with(&["a", "b"]).path()), Ok(()));
        assert!(tree(&["a", "b"]).compare(folder_with(&["a"]).path()).is_err());
        assert!(tree(&["a"]).compare(folder_with(&["a", "b"]).path()).is_err());
    }

    #[test]
    fn a_name_operation_without_an_answer_took_place_wholly_or_not_at_all() {
        let mut doubtful = tree(&["a", "b"]);
        doubtful.begin(NameOperation::Rename("a".to_owned(), "b".to_owned()));
        doubtful.killed([]);
        assert_eq!(doubtful.clone().compare(folder_with(&["a", "b"]).path()), Ok(()));
        assert_eq!(doubtful.clone().compare(folder_with(&["b"]).path()), Ok(()));
        assert!(doubtful.clone().compare(folder_with(&["a"]).path()).is_err());
        assert!(doubtful.compare(folder_with(&[]).path()).is_err());
    }

    #[test]
    fn a_moved_folder_takes_what_is_in_it_along() {
        let mut tree = tree(&["x", "x/y", "x/y/z", "xx"]);
        tree.killed(["x/y/z".to_owned()]);
        tree.begin(NameOperation::Rename("x".to_owned(), "n".to_owned()));
        tree.done();
        assert_eq!(tree.paths(|_| true), ["n", "n/y", "n/y/z", "xx"]);
        assert!(tree.may_be_held("n/y/z") && !tree.may_be_held("xx") && !tree.is_empty("n/y"));
    }
}
