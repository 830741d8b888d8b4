//! Owns: the inodes that the kernel knows: node number, object, generation, count of lookups.
//! Promises: a node number means one object until the kernel has forgotten it, also when the object moves to another directory.
//! Must not know: FUSE replies, open files.
//!
//! The node number is the FD's number (the root: 1). `link` makes a reused FD another object, but it also changes when this host moves
//! a file to another directory, and the kernel must not take that for another file. So the table keeps the generation
//! that the kernel was told first, and follows moves of this host.

use std::collections::HashMap;

use parking_lot::Mutex;
use vmfs_core::env::Instant;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::units::Link;
use vmfs_core::volume::{Renamed, Stat};

/// Node number of the root directory (FUSE_ROOT_ID, `include/uapi/linux/fuse.h`).
pub const ROOT: u64 = 1;

#[derive(Clone, Copy, Debug)]
struct Inode {
    object: ObjectRef,
    generation: Link,
    lookups: u64,
    unlinked: bool,
    told: (Instant, u64),
    inherit: Option<u32>,
}

/// The table of inodes.
pub struct Inodes {
    root: ObjectRef,
    table: Mutex<HashMap<u64, Inode>>,
}

/// How the kernel is to be told of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Node number.
    pub number: u64,
    /// Generation.
    pub generation: u64,
    /// The object has lost its name on this host.
    pub unlinked: bool,
}

impl Inodes {
    /// A table that knows the root.
    pub fn new(root: ObjectRef) -> Inodes {
        Inodes { root, table: Mutex::new(HashMap::new()) }
    }

    /// Node number of an object.
    pub fn number(&self, object: ObjectRef) -> u64 {
        if object.fd == self.root.fd { ROOT } else { object.fd.get() }
    }

    /// The object of a node number; `None` when the kernel was never told of it.
    pub fn object(&self, number: u64) -> Option<ObjectRef> {
        if number == ROOT {
            return Some(self.root);
        }
        self.table.lock().get(&number).map(|inode| inode.object)
    }

    /// The kernel is told of an object as the answer of a lookup; it will forget it once.
    pub fn looked_up(&self, stat: &Stat) -> Node {
        self.note(stat, 1)
    }

    /// The kernel is told of attributes of an object that it knows.
    pub fn told(&self, stat: &Stat) -> Node {
        self.note(stat, 0)
    }

    fn note(&self, stat: &Stat, lookups: u64) -> Node {
        let object = stat.object;
        let number = self.number(object);
        let fresh = Inode {
            object,
            generation: object.link,
            lookups: 0,
            unlinked: false,
            told: (Instant(0), 0),
            inherit: None,
        };
        let mut table = self.table.lock();
        let inode = if lookups == 0 && number != ROOT && !table.contains_key(&number) {
            // Forgotten meanwhile: the answer goes nowhere.
            return Node { number, generation: object.link.0, unlinked: false };
        } else {
            table.entry(number).or_insert(fresh)
        };
        if inode.object.link != object.link {
            *inode = Inode { lookups: inode.lookups, ..fresh };
        }
        inode.lookups += lookups;
        inode.told = (lockd::clock::now(), stat.attributes.size);
        let set_group = stat.object_type == ObjectType::Directory && stat.attributes.mode & libc::S_ISGID != 0;
        inode.inherit = set_group.then_some(stat.attributes.gid);
        Node { number, generation: inode.generation.0, unlinked: inode.unlinked }
    }

    /// When the kernel was last told the size of an object, and the size.
    pub fn told_size(&self, number: u64) -> Option<(Instant, u64)> {
        self.table.lock().get(&number).map(|inode| inode.told)
    }

    /// The group that new files of a directory get instead of their maker's.
    pub fn inherited_group(&self, directory: u64) -> Option<u32> {
        self.table.lock().get(&directory).and_then(|inode| inode.inherit)
    }

    /// This host renamed an object.
    pub fn renamed(&self, renamed: &Renamed) {
        let mut table = self.table.lock();
        if let Some(inode) = table.get_mut(&renamed.before.fd.get())
            && inode.object == renamed.before
        {
            inode.object = renamed.after;
        }
        if let Some(replaced) = renamed.replaced {
            mark_unlinked(&mut table, replaced);
        }
    }

    /// This host removed the name of an object.
    pub fn unlinked(&self, object: ObjectRef) {
        mark_unlinked(&mut self.table.lock(), object);
    }

    /// The kernel forgets `count` lookups.
    pub fn forget(&self, number: u64, count: u64) {
        let mut table = self.table.lock();
        if let Some(inode) = table.get_mut(&number) {
            inode.lookups = inode.lookups.saturating_sub(count);
            if inode.lookups == 0 && number != ROOT {
                table.remove(&number);
            }
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.table.lock().len()
    }
}

fn mark_unlinked(table: &mut HashMap<u64, Inode>, object: ObjectRef) {
    if let Some(inode) = table.get_mut(&object.fd.get())
        && inode.object == object
    {
        inode.unlinked = true;
    }
}

#[cfg(test)]
mod tests {
    use vmfs_core::format::body::Attributes;
    use vmfs_core::format::root_cell::ObjectFlags;
    use vmfs_core::units::{BlockAddress, BlockNo, FdId, LunIndex};

    use super::*;

    fn object(cell: u16, link: u64) -> ObjectRef {
        let container = BlockAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(5).unwrap() };
        ObjectRef { fd: FdId::new(container, cell).unwrap(), link: Link(link) }
    }

    fn stat(object: ObjectRef) -> Stat {
        let attributes = Attributes {
            mode: 0o644,
            uid: 0,
            gid: 7,
            size: 10,
            blocks: 0,
            accessed_ns: 0,
            modified_ns: 0,
            changed_ns: 0,
            born_ns: 0,
            disk: None,
            name: vec![],
        };
        let object_type = ObjectType::File;
        Stat { object, object_type, flags: ObjectFlags::default(), attributes, blocks_bytes: 0, parent: object.fd }
    }

    #[test]
    fn an_inode_lives_from_its_first_lookup_until_all_are_forgotten() {
        let inodes = Inodes::new(object(0, 1));
        let file = object(9, 4);
        let node = inodes.looked_up(&stat(file));
        assert_eq!((node.number, node.generation), (file.fd.get(), 4));
        inodes.looked_up(&stat(file));
        inodes.forget(node.number, 1);
        assert_eq!(inodes.object(node.number), Some(file));
        inodes.forget(node.number, 1);
        assert_eq!(inodes.object(node.number), None);
        assert_eq!(inodes.object(ROOT), Some(object(0, 1)));
        inodes.told(&stat(file));
        assert_eq!(inodes.len(), 0);
    }

    #[test]
    fn a_move_by_this_host_keeps_the_inode_and_a_reused_fd_is_another_one() {
        let inodes = Inodes::new(object(0, 1));
        let before = object(9, 4);
        let after = object(9, 5);
        inodes.looked_up(&stat(before));
        inodes.renamed(&Renamed { before, after, replaced: None });
        let node = inodes.looked_up(&stat(after));
        assert_eq!((node.generation, inodes.object(node.number)), (4, Some(after)));
        let reused = object(9, 7);
        let node = inodes.looked_up(&stat(reused));
        assert_eq!((node.generation, node.unlinked, inodes.object(node.number)), (7, false, Some(reused)));
        inodes.unlinked(before);
        assert!(!inodes.told(&stat(reused)).unlinked);
        inodes.unlinked(reused);
        assert!(inodes.told(&stat(reused)).unlinked);
    }

    #[test]
    fn a_directory_with_the_set_group_id_bit_hands_its_group_down() {
        let inodes = Inodes::new(object(0, 1));
        let mut directory = stat(object(3, 1));
        directory.object_type = ObjectType::Directory;
        inodes.looked_up(&directory);
        assert_eq!(inodes.inherited_group(directory.object.fd.get()), None);
        directory.attributes.mode |= libc::S_ISGID;
        inodes.told(&directory);
        assert_eq!(inodes.inherited_group(directory.object.fd.get()), Some(7));
    }
}
