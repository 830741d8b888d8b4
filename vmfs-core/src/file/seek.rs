//! Owns: where a file has data and where it has holes, and the end of its space.
//! Promises: granule precision; a range that was never written is a hole; the end of the file is one.
//! Must not know: who asks.

use std::rc::Rc;

use super::files::{Files, Open};
use super::open_file::{Hold, SharedFile};
use crate::error::FsError;
use crate::format::body::Content;
use crate::format::root_cell::ObjectType;
use crate::mapping::runs::Class;

impl Files {
    /// The first byte at or after `offset` that was written (SEEK_DATA); `None`: there is none before the end (ENXIO).
    pub async fn seek_data(&self, file: &SharedFile, offset: u64) -> Result<Option<u64>, FsError> {
        self.seek(file, offset, true).await
    }

    /// The first byte at or after `offset` that was not (SEEK_HOLE): at last the end of the file; `None`: `offset` is behind it.
    pub async fn seek_hole(&self, file: &SharedFile, offset: u64) -> Result<Option<u64>, FsError> {
        self.seek(file, offset, false).await
    }

    async fn seek(&self, file: &SharedFile, offset: u64, data: bool) -> Result<Option<u64>, FsError> {
        let open = self.find(file)?;
        if file.hold() == Hold::Nothing {
            self.refresh(&open).await?;
        }
        let mut at = offset;
        loop {
            // Where the content is, and whether this host has a lock, may change with every wait.
            let (size, inline) = self.content(&open);
            if at >= size {
                return Ok((!data && offset < size).then_some(size));
            }
            if let Some(end) = inline {
                let end = end.min(size);
                return Ok(match data {
                    true => (at < end).then_some(at),
                    false => Some(at.max(end)),
                });
            }
            if file.object_type == ObjectType::Rdm {
                return Ok(Some(if data { at } else { size }));
            }
            let Some((class, end)) = self.class_at(&open, at, size).await? else { continue };
            if matches!(class, Class::Data { .. } | Class::Filling) == data {
                return Ok(Some(at));
            }
            at = end;
        }
    }

    /// The size, and for a file that lives in its body how far its bytes go.
    fn content(&self, open: &Open) -> (u64, Option<u64>) {
        let state = open.shared.state.read();
        if state.access.hold != Hold::Nothing {
            return (open.shared.size(), state.inline.as_ref().map(|inline| inline.bytes.len() as u64));
        }
        let image = open.object.image();
        let inline = match &image.body.content {
            Content::Inline(bytes) => Some(bytes.len() as u64),
            _ => None,
        };
        (image.body.attributes.size, inline)
    }

    /// What lies at `at` and up to where; `None`: it had to be read, look again.
    async fn class_at(&self, open: &Rc<Open>, at: u64, size: u64) -> Result<Option<(Class, u64)>, FsError> {
        let stretch = if open.shared.hold() == Hold::Nothing {
            let image = open.object.image();
            self.view(open, &image, at..at + 1).await?.0.stretch(at, size)
        } else {
            let stretch = open.shared.state.read().runs.stretch(at, size);
            if stretch.class == Class::Unknown {
                self.load(open, at..at + 1).await?;
                return Ok(None);
            }
            stretch
        };
        Ok(Some((stretch.class, stretch.end)))
    }
}
