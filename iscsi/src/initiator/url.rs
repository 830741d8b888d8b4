//! Owns: `iscsi://` URLs, in libiscsi's form: `iscsi://[user[%password]@]host[:port]/target/lun[?key=value&...]`.
//! Promises: a URL says where and who without doubt, or is refused with the reason; what is printed has no secret in it.
//! Must not know: sockets.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::secret::{Account, Secret};
use crate::login::MAX_NAME;

/// The port of iSCSI (RFC 7143, 4.2.7).
pub const PORT: u16 = 3260;
/// Scheme of these URLs.
const SCHEME: &str = "iscsi://";
/// Highest LUN of the flat space addressing method (SAM-5, 4.7.7.3).
const MOST_LUNS: u64 = 1 << 14;

/// Which digests an initiator asks for (RFC 7143, 13.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestChoice {
    /// None.
    #[default]
    None,
    /// CRC32C if the target has it.
    Preferred,
    /// CRC32C; a target without it is refused.
    Required,
}

impl DigestChoice {
    /// The value to offer.
    pub(super) fn offer(self) -> &'static str {
        match self {
            DigestChoice::None => "None",
            DigestChoice::Preferred => "CRC32C,None",
            DigestChoice::Required => "CRC32C",
        }
    }

    fn parse(key: &str, value: &str) -> Result<Self, UrlError> {
        match value {
            "none" => Ok(DigestChoice::None),
            "crc32c" => Ok(DigestChoice::Required),
            "crc32c_none" => Ok(DigestChoice::Preferred),
            _ => Err(UrlError::Value {
                key: key.to_owned(),
                value: value.to_owned(),
                known: "none, crc32c, crc32c_none",
            }),
        }
    }
}

/// Why a text is no URL of a logical unit. None of them repeats a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// It begins in another way.
    #[error("an iSCSI URL begins with iscsi:// (form: iscsi://[user@]host[:port]/target/lun)")]
    Scheme,
    /// A part is missing.
    #[error("the URL has no {0} (form: iscsi://[user@]host[:port]/target/lun)")]
    Missing(&'static str),
    /// The host has characters that no name or address has.
    #[error("'{0}' is no host: a name or an address is; addresses of IPv6 go into brackets")]
    Host(String),
    /// The port is no number from 1 to 65535.
    #[error("'{0}' is no port: a number from 1 to 65535 is")]
    Port(String),
    /// The LUN is no number that can be addressed.
    #[error("'{0}' is no LUN: a number from 0 to 16383 is")]
    Lun(String),
    /// The name of a target or initiator is none.
    #[error("'{0}' is no iSCSI name: one begins with iqn., eui. or naa. and has at most 223 bytes")]
    Name(String),
    /// A key that nobody knows.
    #[error(
        "the key '{0}' is not known (known: header_digest, data_digest, target_user, target_password, \
         password_file, target_password_file, initiator)"
    )]
    Key(String),
    /// A value that does not fit its key.
    #[error("{key} is '{value}': it can be {known}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it can be.
        known: &'static str,
    },
    /// A name without a password, or the other way round.
    #[error("{0} has a {1} but no {2}: give both (a password best by {3})")]
    Half(&'static str, &'static str, &'static str, &'static str),
    /// A file of a password cannot be read.
    #[error("the password file {path} cannot be used: {cause}")]
    PasswordFile {
        /// Its path.
        path: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The same secret in both directions proves nothing (RFC 7143, 9.2.1).
    #[error("the password of the target is that of the initiator: choose another one, or the target proves nothing")]
    SameSecret,
    /// Only together with the initiator's own proof (RFC 7143, 12.1.3).
    #[error("the target is to prove itself but there is no user: give iscsi://user@... and its password too")]
    TargetOnly,
}

/// Where a logical unit is, and who asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Name or address of the portal, without brackets.
    pub host: String,
    /// Its TCP port.
    pub port: u16,
    /// iSCSI name of the target.
    pub target: String,
    /// Logical unit, 0..=16383.
    pub lun: u16,
    /// By which the initiator proves itself.
    pub account: Option<Account>,
    /// By which the target has to.
    pub target_account: Option<Account>,
    /// Digests of headers; none given: as the options say.
    pub header_digest: Option<DigestChoice>,
    /// Digests of data; none given: as the options say.
    pub data_digest: Option<DigestChoice>,
    /// Name of the initiator; none given: as the options say.
    pub initiator: Option<String>,
}

/// A URL as it was typed: secrets may still be in files.
#[derive(Default)]
struct Typed {
    user: Option<String>,
    password: Option<Secret>,
    password_file: Option<PathBuf>,
    target_user: Option<String>,
    target_password: Option<Secret>,
    target_password_file: Option<PathBuf>,
}

impl Url {
    /// Reads a URL, the password files that it names and, for what it does not say, libiscsi's environment variables
    /// `LIBISCSI_CHAP_USERNAME`, `LIBISCSI_CHAP_PASSWORD`, `LIBISCSI_CHAP_TARGET_USERNAME` and `LIBISCSI_CHAP_TARGET_PASSWORD`.
    ///
    /// # Errors
    /// [`UrlError`], without secrets.
    pub fn from_text(text: &str) -> Result<Url, UrlError> {
        Self::parse_with(text, &|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The same with an environment of the caller's.
    ///
    /// # Errors
    /// [`UrlError`]
    pub fn parse_with(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Url, UrlError> {
        let rest = text.strip_prefix(SCHEME).ok_or(UrlError::Scheme)?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut typed = Typed::default();
        // The last @: passwords may have one, hosts and targets do not.
        let place = match place.rsplit_once('@') {
            None => place,
            Some((who, place)) => {
                let (user, password) =
                    who.split_once('%').or_else(|| who.split_once(':')).map_or((who, None), |(u, p)| (u, Some(p)));
                typed.user = Some(user.to_owned()).filter(|user| !user.is_empty());
                typed.password = password.map(|password| Secret::new(password.to_owned()));
                place
            }
        };
        let mut parts = place.splitn(3, '/');
        let (host, port) = host_and_port(parts.next().unwrap_or_default())?;
        let target = parts.next().filter(|part| !part.is_empty()).ok_or(UrlError::Missing("target"))?;
        let lun = parts.next().filter(|part| !part.is_empty()).ok_or(UrlError::Missing("LUN"))?;
        let target = name(&unescape(target))?;
        let number =
            lun.parse::<u64>().ok().filter(|number| *number < MOST_LUNS && lun.bytes().all(|b| b.is_ascii_digit()));
        let lun = number.ok_or_else(|| UrlError::Lun(lun.to_owned()))? as u16;
        let mut url = Url {
            host,
            port,
            target,
            lun,
            account: None,
            target_account: None,
            header_digest: None,
            data_digest: None,
            initiator: None,
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "header_digest" => url.header_digest = Some(DigestChoice::parse(key, value)?),
                "data_digest" => url.data_digest = Some(DigestChoice::parse(key, value)?),
                "initiator" => url.initiator = Some(name(value)?),
                "target_user" => typed.target_user = Some(value.to_owned()),
                "target_password" => typed.target_password = Some(Secret::new(value.to_owned())),
                "password_file" => typed.password_file = Some(value.into()),
                "target_password_file" => typed.target_password_file = Some(value.into()),
                other => return Err(UrlError::Key(other.to_owned())),
            }
        }
        url.accounts(typed, environment)?;
        Ok(url)
    }

    fn accounts(&mut self, typed: Typed, environment: &dyn Fn(&str) -> Option<String>) -> Result<(), UrlError> {
        let from_file = |path: Option<PathBuf>| path.map(|path| Secret::read(&path)).transpose();
        let secret = |name: &str| environment(name).map(Secret::new);
        let user = typed.user.or_else(|| environment("LIBISCSI_CHAP_USERNAME"));
        let password = typed.password.or(from_file(typed.password_file)?).or_else(|| secret("LIBISCSI_CHAP_PASSWORD"));
        self.account = match (user, password) {
            (Some(user), Some(password)) => Some(Account { name: user, secret: password }),
            (None, None) => None,
            (Some(_), None) => return Err(UrlError::Half("the URL", "user", "password", "?password_file=FILE")),
            (None, Some(_)) => return Err(UrlError::Half("the URL", "password", "user", "?password_file=FILE")),
        };
        let user = typed.target_user.or_else(|| environment("LIBISCSI_CHAP_TARGET_USERNAME"));
        let password = (typed.target_password.or(from_file(typed.target_password_file)?))
            .or_else(|| secret("LIBISCSI_CHAP_TARGET_PASSWORD"));
        const BY: &str = "&target_password_file=FILE";
        self.target_account = match (user, password) {
            (Some(user), Some(password)) => Some(Account { name: user, secret: password }),
            (None, None) => None,
            (Some(_), None) => return Err(UrlError::Half("the target's account", "user", "password", BY)),
            (None, Some(_)) => return Err(UrlError::Half("the target's account", "password", "user", BY)),
        };
        match (&self.account, &self.target_account) {
            (None, Some(_)) => Err(UrlError::TargetOnly),
            (Some(own), Some(target)) if own.secret == target.secret => Err(UrlError::SameSecret),
            _ => Ok(()),
        }
    }

    /// Host and port as one text; addresses of IPv6 in brackets.
    pub fn portal(&self) -> String {
        portal(&self.host, self.port)
    }
}

/// Host and port as one text.
pub(super) fn portal(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Host and port of `host[:port]`, `[address]` or `[address]:port`.
pub(super) fn host_and_port(text: &str) -> Result<(String, u16), UrlError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or(UrlError::Missing("']' after the host's address"))?;
            (host, after.strip_prefix(':').or((!after.is_empty()).then_some(after)))
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err(UrlError::Missing("host"));
    }
    if !host.chars().all(|c| c.is_ascii_alphanumeric() || "-.:_%".contains(c)) {
        return Err(UrlError::Host(host.to_owned()));
    }
    let number = |port: &str| port.parse::<u16>().ok().filter(|port| *port > 0);
    let port = port.map_or(Ok(PORT), |port| number(port).ok_or_else(|| UrlError::Port(port.to_owned())))?;
    Ok((host.to_owned(), port))
}

fn name(text: &str) -> Result<String, UrlError> {
    let known = ["iqn.", "eui.", "naa."].iter().any(|kind| text.starts_with(kind));
    let plain = text.chars().all(|c| c.is_alphanumeric() || "-.:_".contains(c));
    if known && plain && text.len() <= MAX_NAME { Ok(text.to_owned()) } else { Err(UrlError::Name(text.to_owned())) }
}

/// `%3A` and the like. What is no escape stays as it is.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|byte| (*byte as char).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high << 4 | low) as u8);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Url, UrlError> {
        Url::from_text(text)
    }
}

impl fmt::Display for Url {
    /// Without secrets and names of users.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{SCHEME}{}/{}/{}", self.portal(), self.target, self.lun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Url, UrlError> {
        Url::parse_with(text, &|_| None)
    }

    #[test]
    fn the_parts_of_a_url_are_where_libiscsi_has_them() {
        let url = parse("iscsi://user%secret-word@10.0.0.1:3261/iqn.2026-01.test:disk/7?header_digest=crc32c").unwrap();
        assert_eq!((url.host.as_str(), url.port, url.lun), ("10.0.0.1", 3261, 7));
        assert_eq!(url.target, "iqn.2026-01.test:disk");
        assert_eq!(url.account.as_ref().unwrap().name, "user");
        assert_eq!(url.account.as_ref().unwrap().secret.bytes(), b"secret-word");
        assert_eq!((url.header_digest, url.data_digest), (Some(DigestChoice::Required), None));
        assert_eq!(url.to_string(), "iscsi://10.0.0.1:3261/iqn.2026-01.test:disk/7");
        assert!(!format!("{url:?}").contains("secret-word"));
        let url = parse("iscsi://[fe80::1]/iqn.2026-01.test%3Adisk/0?target_user=t&target_password=p");
        assert_eq!(url, Err(UrlError::TargetOnly));
        let url = parse("iscsi://[fe80::1]/iqn.2026-01.test%3Adisk/0").unwrap();
        assert_eq!((url.portal().as_str(), url.target.as_str()), ("[fe80::1]:3260", "iqn.2026-01.test:disk"));
        let url = parse("iscsi://u:p@h/iqn.a/1?target_user=t&target_password=q").unwrap();
        assert_eq!(url.target_account.unwrap().name, "t");
    }

    #[test]
    fn secrets_come_from_files_and_from_libiscsis_variables() {
        let folder = std::env::temp_dir().join(format!("iscsi-url-{}", std::process::id()));
        std::fs::write(&folder, "of-the-file\n").unwrap();
        let url = parse(&format!("iscsi://u@h/iqn.a/1?password_file={}", folder.display())).unwrap();
        assert_eq!(url.account.unwrap().secret.bytes(), b"of-the-file");
        std::fs::remove_file(&folder).unwrap();
        let gone = parse(&format!("iscsi://u@h/iqn.a/1?password_file={}", folder.display()));
        assert!(matches!(gone, Err(UrlError::PasswordFile { .. })));
        let url = Url::parse_with("iscsi://h/iqn.a/1", &|name| Some(name.to_lowercase())).unwrap();
        assert_eq!(url.account.unwrap().name, "libiscsi_chap_username");
        assert_eq!(url.target_account.unwrap().secret.bytes(), b"libiscsi_chap_target_password");
    }

    #[test]
    fn each_wrong_url_is_refused_by_its_reason() {
        for (text, reason) in [
            ("http://h/iqn.a/1", UrlError::Scheme),
            ("iscsi:///iqn.a/1", UrlError::Missing("host")),
            ("iscsi://h", UrlError::Missing("target")),
            ("iscsi://h/iqn.a", UrlError::Missing("LUN")),
            ("iscsi://h/iqn.a/", UrlError::Missing("LUN")),
            ("iscsi://h:0/iqn.a/1", UrlError::Port("0".into())),
            ("iscsi://h:99999/iqn.a/1", UrlError::Port("99999".into())),
            ("iscsi://h/iqn.a/16384", UrlError::Lun("16384".into())),
            ("iscsi://h/iqn.a/+1", UrlError::Lun("+1".into())),
            ("iscsi://h/iqn.a/1/2", UrlError::Lun("1/2".into())),
            ("iscsi://h/disk/1", UrlError::Name("disk".into())),
            ("iscsi://h/iqn.a/1?digest=1", UrlError::Key("digest".into())),
            ("iscsi://u%p@h/iqn.a/1?target_user=t&target_password=p", UrlError::SameSecret),
        ] {
            assert_eq!(parse(text), Err(reason), "{text}");
        }
        assert!(matches!(parse("iscsi://u@h/iqn.a/1"), Err(UrlError::Half(..))));
        assert!(matches!(parse("iscsi://h/iqn.a/1?data_digest=md5"), Err(UrlError::Value { .. })));
    }

    proptest! {
        #[test]
        fn any_text_is_a_url_or_refused_and_no_message_has_the_password(
            text in "(iscsi://)?([a-z]{0,3}%SECRET@)?[a-z0-9:\\[\\]./%@?&=_-]{0,60}",
        ) {
            match parse(&text) {
                Ok(url) => {
                    prop_assert!(!url.to_string().contains("SECRET"));
                    prop_assert_eq!(parse(&url.to_string()).unwrap().target, url.target);
                }
                Err(UrlError::Scheme | UrlError::Missing(_)) => {}
                Err(error) => prop_assert!(!error.to_string().contains("SECRET"), "{}", error),
            }
        }
    }
}
