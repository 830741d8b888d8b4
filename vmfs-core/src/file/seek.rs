//! Owns: where a file has data and where it has holes, and the end of its space.
//! Promises: granule precision; a range that was never written is a hole; the end of the file is one.
//! Must not know: who asks.

use std::rc::Rc;

use super::files::{Files, Open};
use super::open_file::{Hold, SharedFile};
use crate::error::FsError;
use crate::format::body::Content;
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
        let unlocked = file.hold() == Hold::Nothing;
        if unlocked {
            self.refresh(&open).await?;
        }
        let image = open.object.image();
        let size = if unlocked { image.body.attributes.size } else { file.size() };
        if offset >= size {
            return Ok(None);
        }
        let content = if unlocked {
            match &image.body.content {
                Content::Inline(bytes) => Some(bytes.len() as u64),
                _ => None,
            }
        } else {
            file.state.read().inline.as_ref().map(|inline| inline.bytes.len() as u64)
        };
        if let Some(end) = content {
            let end = end.min(size);
            return Ok(match data {
                true => (offset < end).then_some(offset),
                false => Some(offset.max(end)),
            });
        }
        let mut at = offset;
        while at < size {
            let (class, end) = self.class_at(&open, at, size, unlocked).await?;
            if matches!(class, Class::Data { .. } | Class::Filling) == data {
                return Ok(Some(at));
            }
            at = end;
        }
        Ok((!data).then_some(size))
    }

    async fn class_at(&self, open: &Rc<Open>, at: u64, size: u64, unlocked: bool) -> Result<(Class, u64), FsError> {
        loop {
            let stretch = if unlocked {
                let image = open.object.image();
                self.view(open, &image, at..at + 1).await?.0.stretch(at, size)
            } else {
                open.shared.state.read().runs.stretch(at, size)
            };
            match stretch.class {
                Class::Unknown => self.load(open, at..at + 1).await?,
                class => return Ok((class, stretch.end)),
            }
        }
    }
}
