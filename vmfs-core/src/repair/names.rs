//! Owns: giving objects their names back, and taking out entries that contradict what they name, on the mounted volume.
//! Promises: every step is an operation of the file system, atomic as any; a name that is in use is never taken.
//! Must not know: cells and tables.

use std::pin::pin;
use std::rc::Rc;

use futures_util::future::{Either, select};

use super::Work;
use super::ground::Ground;
use super::roots::{self, Root};
use crate::check::remedy::Remedies;
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::{MAX_NAME, ObjectRef, is_name};
use crate::format::root_cell::{ObjectState, ObjectType};
use crate::lun::Lun;
use crate::units::{FdId, Link, Uuid};
use crate::volume::Volume;

/// Where objects go whose directory is gone or has their name already.
const LOST_AND_FOUND: &[u8] = b"lost+found";
/// Names that are tried for one object.
const TRIES: u32 = 100;

/// Mends names, if there is something to mend that may be done.
pub(super) async fn mend(
    ground: &Ground,
    luns: &[Rc<dyn Lun>],
    remedies: &Remedies,
    work: &mut Work<'_>,
) -> Result<(), FsError> {
    if let Some(fd) = remedies.cut_off.iter().next()
        && work.allowed(&format!("directory {fd} does not lead to the root. Put it into /lost+found?"))
    {
        return cut(ground, *fd, work).await;
    }
    let mut orphans = remedies.orphans.clone();
    orphans.retain(|fd| work.allowed(&format!("{fd} has no name. Give it its name back, or put it into /lost+found?")));
    let mut entries = remedies.entries.clone();
    entries.retain(|(directory, name)| {
        let question =
            format!("entry {:?} of {directory} contradicts what it names. Take it out?", String::from_utf8_lossy(name));
        work.allowed(&question)
    });
    if orphans.is_empty() && entries.is_empty() && remedies.leftovers.is_empty() {
        return Ok(());
    }
    let volume = mount(ground, luns).await?;
    let done = {
        let changes = pin!(change(&volume, &orphans, &entries, remedies, work));
        match select(changes, pin!(volume.background())).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => Err(FsError::refused(FsErrorKind::Io, "the volume was left while it was repaired")),
        }
    };
    done.and(volume.unmount().await)
}

/// A directory of a ring becomes an object without a name, whose directory is the root.
async fn cut(ground: &Ground, fd: FdId, work: &mut Work<'_>) -> Result<(), FsError> {
    let Some(mut root) = roots::read(ground, fd).await? else { return Ok(()) };
    let volume_root = ground.member(fd.lun())?.header.root;
    root.root.parent = Some(volume_root);
    let moved = Root { link: Link(root.link.0 + 1), ..root };
    roots::write(ground, fd, &moved).await?;
    work.repaired(format!("directory {fd}: taken out of a ring of directories"));
    Ok(())
}

async fn mount(ground: &Ground, luns: &[Rc<dyn Lun>]) -> Result<Volume, FsError> {
    let mut host = [0; 16];
    ground.env().random(&mut host);
    Volume::mount_for_repair(luns.to_vec(), Uuid(host), ground.env().clone()).await
}

async fn change(
    volume: &Volume,
    orphans: &std::collections::BTreeSet<FdId>,
    entries: &[(FdId, Vec<u8>)],
    remedies: &Remedies,
    work: &mut Work<'_>,
) -> Result<(), FsError> {
    for (directory, name) in entries {
        let Some(directory) = volume.reference_of(*directory).await? else { continue };
        volume.drop_entry(directory, name).await?;
        let name = String::from_utf8_lossy(name);
        work.repaired(format!("directory {}: entry {name:?} taken out; it contradicted what it named", directory.fd));
    }
    for fd in &remedies.leftovers {
        let Some(directory) = volume.reference_of(*fd).await? else { continue };
        volume.tidy_directory(directory).await?;
        work.repaired(format!("directory {fd}: leftover entries taken out"));
    }
    for fd in orphans {
        let name = work.saved_names.get(fd).cloned();
        if let Some(said) = attach(volume, *fd, name).await? {
            work.repaired(said);
        }
    }
    Ok(())
}

/// Gives an object a name: in its own directory if that is one and does not have the name, else in lost+found.
async fn attach(volume: &Volume, fd: FdId, saved: Option<Vec<u8>>) -> Result<Option<String>, FsError> {
    let Some(what) = volume.object_state(fd).await? else { return Ok(None) };
    if matches!(what.state, ObjectState::Free | ObjectState::Unlinked(_)) {
        return Ok(None);
    }
    let hint = saved.filter(|name| is_name(name)).or_else(|| Some(what.name.clone()).filter(|name| is_name(name)));
    let parent = match what.parent {
        Some(parent) => volume.reference_of(parent).await?,
        None => None,
    };
    if let (Some(parent), Some(name)) = (parent, &hint)
        && volume.name_is_free(parent, name).await?
    {
        volume.insert_entry(parent, name, what.reference, what.object_type).await?;
        let name = String::from_utf8_lossy(name);
        return Ok(Some(format!("{fd}: named {name:?} again in its directory {}", parent.fd)));
    }
    let shelf = lost_and_found(volume).await?;
    let moved = match what.parent == Some(shelf.fd) {
        true => what.reference,
        false => volume.move_unnamed(what.reference, shelf).await?,
    };
    let base = hint.unwrap_or_else(|| fd.to_string().into_bytes());
    for nth in 0..TRIES {
        let suffix = if nth == 0 { String::new() } else { format!(".{fd}.{nth}") };
        let mut name = base[..base.len().min(MAX_NAME - suffix.len())].to_vec();
        name.extend(suffix.into_bytes());
        if volume.name_is_free(shelf, &name).await? {
            volume.insert_entry(shelf, &name, moved, what.object_type).await?;
            let name = String::from_utf8_lossy(&name);
            return Ok(Some(format!("{fd}: put into /lost+found as {name:?}")));
        }
    }
    let message = format!("{fd}: /lost+found has every name that was tried; empty it, then repair again");
    Err(FsError::refused(FsErrorKind::Exists, message))
}

async fn lost_and_found(volume: &Volume) -> Result<ObjectRef, FsError> {
    let root = volume.root();
    match volume.lookup(root, LOST_AND_FOUND).await {
        Ok(found) if found.object_type == ObjectType::Directory => Ok(found.object),
        Ok(_) => {
            let message = "/lost+found is no directory; rename it (mount the volume), then repair again";
            Err(FsError::refused(FsErrorKind::NotDirectory, message))
        }
        Err(error) if error.kind() == FsErrorKind::NotFound => {
            Ok(volume.make_directory(root, LOST_AND_FOUND, 0o700, 0, 0).await?.object)
        }
        Err(error) => Err(error),
    }
}
