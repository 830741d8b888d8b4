//! Owns: `nfs://` URLs: `nfs://server[:port]/path/of/file[?version=3|4.1&port=N&mountport=N&uid=N&gid=N]` (RFC 2224 in form; keys as libnfs has them).
//! Promises: a URL says where and who without doubt, or is refused with the reason.
//! Must not know: sockets.

use std::fmt;
use std::str::FromStr;

/// Port of NFS.
pub const PORT: u16 = 2049;
/// How these URLs begin.
pub const SCHEME: &str = "nfs://";
const FORM: &str = "form: nfs://server[:port]/export/directory/disk.vmdk";

/// Why a text is no URL of a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It begins in another way.
    #[error("an NFS URL begins with nfs:// ({FORM})")]
    Scheme,
    /// A part is missing.
    #[error("the URL has no {0} ({FORM})")]
    Missing(&'static str),
    /// The host has characters that no name or address has.
    #[error("'{0}' is no host: a name or an address is; addresses of IPv6 go into brackets")]
    Host(String),
    /// A path that leads up or nowhere.
    #[error("'{0}' is no path of a file: it has an empty part, '.' or '..'")]
    Path(String),
    /// A key that nobody knows.
    #[error("the key '{0}' is not known (known: version, port, mountport, uid, gid)")]
    Key(String),
    /// A version that this program does not speak.
    #[error("version is '{0}': it has to be 3 or 4.1")]
    Version(String),
    /// A port that this version does not have.
    #[error(
        "mountport is of NFSv3: version 4.1 finds a directory by its path from the server's root; leave mountport out"
    )]
    MountPort,
    /// A value that does not fit its key.
    #[error("{key} is '{value}': it has to be a number{of}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What kind of number.
        of: &'static str,
    },
}

/// A version of NFS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// NFSv3, with lock files.
    #[default]
    V3,
    /// NFSv4.1, with share reservations.
    V41,
}

impl Version {
    /// As a URL has it.
    pub fn text(self) -> &'static str {
        match self {
            Version::V3 => "3",
            Version::V41 => "4.1",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "NFSv{}", self.text())
    }
}

/// Where a file is, and who asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Version of NFS.
    pub version: Version,
    /// Name or address of the server, without brackets.
    pub host: String,
    /// TCP port of NFS.
    pub port: u16,
    /// TCP port of MOUNT; none: the port mapper is asked.
    pub mount_port: Option<u16>,
    /// User id; none: this process's.
    pub uid: Option<u32>,
    /// Group id; none: this process's.
    pub gid: Option<u32>,
    /// The directory, beginning with a slash; "/" alone is possible.
    pub directory: String,
    /// Name of the file.
    pub name: String,
}

impl Url {
    /// Is it meant to be one?
    pub fn is_url(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// Another file in the same directory.
    pub fn beside(&self, name: &str) -> Url {
        Url { name: name.to_owned(), ..self.clone() }
    }
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Url, UrlError> {
        let rest = text.strip_prefix(SCHEME).ok_or(UrlError::Scheme)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').ok_or(UrlError::Missing("path"))?;
        let (host, port) = split_authority(authority)?;
        let (directory, name) = (String::new(), String::new());
        let mut url = Url { version: Version::V3, host, port, mount_port: None, uid: None, gid: None, directory, name };
        if path.is_empty() {
            return Err(UrlError::Missing("path"));
        }
        if path.split('/').any(|part| matches!(part, "" | "." | "..") || part.len() > 255) || path.contains('\0') {
            return Err(UrlError::Path(format!("/{path}")));
        }
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        (url.directory, url.name) = (format!("/{directory}"), name.to_owned());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (key, value) {
                ("version", "3") => url.version = Version::V3,
                ("version", "4.1") => url.version = Version::V41,
                ("version", _) => return Err(UrlError::Version(value.to_owned())),
                ("port", _) => url.port = parse_port(key, value)?,
                ("mountport", _) => url.mount_port = Some(parse_port(key, value)?),
                ("uid", _) => url.uid = Some(parse_id(key, value)?),
                ("gid", _) => url.gid = Some(parse_id(key, value)?),
                _ => return Err(UrlError::Key(key.to_owned())),
            }
        }
        if url.version == Version::V41 && url.mount_port.is_some() {
            return Err(UrlError::MountPort);
        }
        Ok(url)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = if self.directory == "/" { "" } else { &self.directory };
        match self.host.contains(':') {
            true => write!(out, "{SCHEME}[{}]", self.host)?,
            false => write!(out, "{SCHEME}{}", self.host)?,
        }
        if self.port != PORT {
            write!(out, ":{}", self.port)?;
        }
        write!(out, "{directory}/{}", self.name)?;
        let mut separator = '?';
        if self.version != Version::V3 {
            write!(out, "?version={}", self.version.text())?;
            separator = '&';
        }
        let numbers = [("mountport", self.mount_port.map(u32::from)), ("uid", self.uid), ("gid", self.gid)];
        for (key, value) in numbers {
            if let Some(value) = value {
                write!(out, "{separator}{key}={value}")?;
                separator = '&';
            }
        }
        Ok(())
    }
}

fn split_authority(authority: &str) -> Result<(String, u16), UrlError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or_else(|| UrlError::Host(authority.to_owned()))?;
            let port = match after.strip_prefix(':') {
                Some(port) => Some(port),
                None if after.is_empty() => None,
                None => return Err(UrlError::Host(authority.to_owned())),
            };
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(UrlError::Host(host.to_owned()));
            }
            (host, port)
        }
        None => {
            let (host, port) = authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
            if !host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
                return Err(UrlError::Host(host.to_owned()));
            }
            (host, port)
        }
    };
    if host.is_empty() {
        return Err(UrlError::Missing("server"));
    }
    Ok((host.to_owned(), port.map_or(Ok(PORT), |port| parse_port("port", port))?))
}

fn parse_port(key: &str, value: &str) -> Result<u16, UrlError> {
    let port = value.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| UrlError::Value { key: key.to_owned(), value: value.to_owned(), of: " from 1 to 65535" })
}

fn parse_id(key: &str, value: &str) -> Result<u32, UrlError> {
    value.parse().map_err(|_| UrlError::Value { key: key.to_owned(), value: value.to_owned(), of: " of 32 bits" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_url_says_where_and_who() {
        let url: Url = "nfs://nas/vol/ds1/vm1/disk.vmdk".parse().expect("plain");
        assert_eq!((url.host.as_str(), url.port, url.mount_port), ("nas", 2049, None));
        assert_eq!((url.directory.as_str(), url.name.as_str()), ("/vol/ds1/vm1", "disk.vmdk"));
        let url: Url = "nfs://[::1]:20/d.vmdk?mountport=30&uid=5&gid=6".parse().expect("full");
        assert_eq!((url.host.as_str(), url.port, url.mount_port), ("::1", 20, Some(30)));
        assert_eq!((url.directory.as_str(), url.uid, url.gid), ("/", Some(5), Some(6)));
        assert_eq!(url.beside("e").to_string(), "nfs://[::1]:20/e?mountport=30&uid=5&gid=6");
        let url: Url = "nfs://nas/a?version=4.1&uid=5".parse().expect("the other version");
        assert_eq!((url.version, url.to_string().as_str()), (Version::V41, "nfs://nas/a?version=4.1&uid=5"));
        assert_eq!("nfs://nas/a?version=3".parse::<Url>().expect("plain").to_string(), "nfs://nas/a");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("http://a/b", "nfs://"),
            ("nfs://nas", "path"),
            ("nfs://nas/", "path"),
            ("nfs:///a", "server"),
            ("nfs://n as/a", "'n as'"),
            ("nfs://[zz]/a", "'zz'"),
            ("nfs://nas/a/../b", "'/a/../b'"),
            ("nfs://nas//b", "'//b'"),
            ("nfs://nas:0/b", "port"),
            ("nfs://nas/b?mountport=x", "mountport"),
            ("nfs://nas/b?uid=-1", "uid"),
            ("nfs://nas/b?version=4", "version"),
            ("nfs://nas/b?version=4.1&mountport=5", "mountport"),
            ("nfs://nas/b?server=x", "server"),
        ] {
            let error = text.parse::<Url>().expect_err(text).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_and_what_it_takes_is_said_the_same_way(text in "(nfs://)?[\\[\\]a-z:/.?=&0-9]{0,30}([?]version=4[.]1)?") {
            if let Ok(url) = text.parse::<Url>() {
                prop_assert_eq!(url.to_string().parse::<Url>(), Ok(url));
            }
        }
    }
}
