//! Owns: iSCSI URLs as paths to a unit.
//! Promises: a name that is shown has no secret, and leads another program of this host to the same unit.
//! Must not know: PDUs, what commands mean.

use std::sync::Arc;
use std::time::Duration;

use iscsi::initiator::{Initiator, Url};
use scsi::{PathAnswer, PathData, PathError, ScsiPath};

use crate::session::Origin;

/// How long a target may take to say that it is there.
const SETTLE_TIME: Duration = Duration::from_secs(10);

/// A session with a target.
pub(crate) struct IscsiPath(Arc<Initiator>);

impl IscsiPath {
    pub(crate) fn new(initiator: Initiator) -> Self {
        Self::of(Arc::new(initiator))
    }

    /// One that others have too.
    pub(crate) fn of(initiator: Arc<Initiator>) -> Self {
        Self(initiator)
    }

    pub(crate) fn initiator(&self) -> &Initiator {
        &self.0
    }
}

impl ScsiPath for IscsiPath {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn execute(&self, cdb: &[u8], data: PathData<'_>, timeout: Duration) -> Result<PathAnswer, PathError> {
        self.0.execute(cdb, data, timeout)
    }

    fn max_transfer(&self) -> usize {
        self.0.max_transfer()
    }

    /// A command that had no answer was aborted, or its connection given up; the session that follows is the same port's, so that the
    /// target has ended the tasks of the one before when it answers here (RFC 7143, 6.3.5).
    fn settled(&self) -> bool {
        self.0.execute(&crate::commands::test_unit_ready(), PathData::None, SETTLE_TIME).is_ok()
    }

    fn end(&self) -> bool {
        self.0.end()
    }
}

/// Logs in.
pub fn connect(text: &str) -> Result<(Arc<dyn ScsiPath>, Origin), String> {
    let url = Url::from_text(text).map_err(|error| error.to_string())?;
    let origin = Origin::of(url);
    let initiator = Initiator::connect(&origin.url, origin.options.clone()).map_err(|error| error.to_string())?;
    Ok((Arc::new(IscsiPath::new(initiator)), origin))
}

/// What was typed, without passwords.
pub fn without_secrets(text: &str) -> String {
    let (place, query) = text.split_once('?').unwrap_or((text, ""));
    let place = match (place.split_once("://"), place.rsplit_once('@')) {
        (Some((scheme, _)), Some((who, rest))) => {
            let user = who.split_once("://").map_or(who, |(_, user)| user);
            let user = user.split(['%', ':']).next().unwrap_or_default();
            format!("{scheme}://{user}@{rest}")
        }
        _ => place.to_owned(),
    };
    let kept: Vec<&str> =
        query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("target_password=")).collect();
    if kept.is_empty() { place } else { format!("{place}?{}", kept.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_no_password_and_keeps_everything_else() {
        for (typed, shown) in [
            ("iscsi://h/iqn.a/0", "iscsi://h/iqn.a/0"),
            ("iscsi://u%p@ss@h:1/iqn.a/0", "iscsi://u@h:1/iqn.a/0"),
            (
                "iscsi://u:p@h/iqn.a/0?header_digest=crc32c&target_password=x",
                "iscsi://u@h/iqn.a/0?header_digest=crc32c",
            ),
            ("iscsi://u@h/iqn.a/0?password_file=/etc/x", "iscsi://u@h/iqn.a/0?password_file=/etc/x"),
            ("iscsi://h/iqn.a/0?target_password=x", "iscsi://h/iqn.a/0"),
        ] {
            assert_eq!(without_secrets(typed), shown);
        }
    }

    #[test]
    fn a_url_that_is_none_is_a_refusal_without_the_password() {
        let error = connect("iscsi://u%secret@h/nothing/0").err().unwrap();
        assert!(!error.contains("secret"), "{error}");
    }
}
