//! Owns: names and secrets of CHAP, kept out of messages.
//! Promises: a secret is never printed.
//! Must not know: the handshake.

use std::fmt;
use std::path::Path;

use super::url::UrlError;

/// Longest secret that is taken, in bytes.
const LONGEST: usize = 1024;

/// A secret. Neither [`fmt::Debug`] nor anything else shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// This one.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The first line of a file.
    ///
    /// # Errors
    /// [`UrlError::PasswordFile`]
    pub fn read(path: &Path) -> Result<Self, UrlError> {
        let refusal = |cause: String| UrlError::PasswordFile { path: path.display().to_string(), cause };
        let text = std::fs::read_to_string(path).map_err(|error| refusal(error.to_string()))?;
        let line = text.lines().next().unwrap_or_default();
        if line.is_empty() || line.len() > LONGEST {
            return Err(refusal(format!("its first line has to be the password, 1 to {LONGEST} bytes")));
        }
        Ok(Self(line.to_owned()))
    }

    /// The secret itself, to hand it to another program of this host by a way that nobody else reads.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

/// A name and the secret that proves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Name (`CHAP_N`).
    pub name: String,
    /// Secret.
    pub secret: Secret,
}
