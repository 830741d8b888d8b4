//! Owns: symbolic links of NFSv3 (RFC 1813, 3.3.5 and 3.3.10). Must not know: what they are for.

use super::procedures::{Server, nfs};
use super::values::{Attributes, FileHandle, NewAttributes};
use crate::error::{NfsError, Status};
use crate::rpc::Procedure;
use crate::xdr::{Reader, Writer, XdrError};

const READLINK: Procedure = nfs(5, "READLINK");
const SYMLINK: Procedure = nfs(10, "SYMLINK");
/// Longest target that is taken from a server.
const MAX_TARGET: usize = 1024;

fn read_target<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], XdrError> {
    Attributes::read_optional(reader)?;
    reader.opaque(MAX_TARGET)
}

impl Server {
    /// Makes a symbolic link; `false`: the name is there already, perhaps because this was done twice.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn make_link(&self, directory: &FileHandle, name: &str, target: &str) -> Result<bool, NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(directory.as_bytes());
            to.put_opaque(name.as_bytes());
            NewAttributes::default().write(to);
            to.put_opaque(target.as_bytes());
        };
        match self.ask(SYMLINK, arguments, false, false).await {
            Err(error) if error.is(Status::EXIST) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// The target of a symbolic link; `None`: there is no such name.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn link_target(&self, directory: &FileHandle, name: &str) -> Result<Option<Vec<u8>>, NfsError> {
        let Some((link, _)) = self.lookup(directory, name.as_bytes()).await? else { return Ok(None) };
        let results = self.ask(READLINK, |to| to.put_opaque(link.as_bytes()), false, false).await?;
        let mut reader = results.reader();
        read_target(&mut reader).map(|target| Some(target.to_vec())).map_err(NfsError::nonsense("READLINK"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_results_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), bare: bool) {
            let bytes = if bare { [&[0; 4][..], &bytes].concat() } else { bytes };
            let _ = read_target(&mut Reader::new(&bytes));
        }
    }
}
