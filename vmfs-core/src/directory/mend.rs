//! Owns: single entries set or taken out by a repair, whatever they name.
//! Promises: one commit from the image that was looked at.
//! Must not know: why.

use super::names::Names;
use super::tree::Edit;
use crate::error::FsError;
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::root_cell::ObjectType;
use crate::object::Committed;

impl Names {
    /// Names an object.
    pub(crate) async fn insert_entry(
        &self,
        directory: ObjectRef,
        name: &[u8],
        child: ObjectRef,
        object_type: ObjectType,
    ) -> Result<(), FsError> {
        let entry = Dirent { name: name.to_vec(), object_type, child, pending: None, leaving: false };
        self.edit_entry(directory, Edit::Set(entry)).await
    }

    /// Takes an entry out.
    pub(crate) async fn drop_entry(&self, directory: ObjectRef, name: &[u8]) -> Result<(), FsError> {
        self.edit_entry(directory, Edit::Remove(name.to_vec())).await
    }

    async fn edit_entry(&self, directory: ObjectRef, edit: Edit) -> Result<(), FsError> {
        let _guard = self.lock_directories(&[directory.fd]).await;
        let found = self.load_directory(directory).await?;
        let mut patience = self.patience();
        loop {
            let image = found.image()?;
            let committed = self.commit_edits(&found, &image, std::slice::from_ref(&edit), &patience).await?;
            if matches!(committed, Committed::Done) {
                return Ok(());
            }
            patience.lost(edit.name()).await?;
        }
    }
}
