//! Owns: SendTargets discovery (RFC 7143, appendix C).
//! Promises: the list is bounded; what cannot be read is refused.
//! Must not know: sessions with targets.

use std::time::Instant;

use super::connect::{Connection, Connector, receive_whole};
use super::error::{ConnectCause, ConnectError};
use super::keeper::farewell;
use super::options::Options;
use super::outgoing::Outgoing;
use super::url::Url;
use crate::pdu::{Answer, NO_TAG, Sequence, TextRequest};
use crate::text;

/// The longest list that is taken, in bytes.
const LONGEST: usize = 1 << 20;

/// A target that a portal knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveredTarget {
    /// Its iSCSI name.
    pub name: String,
    /// Its portals: address with port, and portal group tag.
    pub portals: Vec<(String, u16)>,
}

/// The targets that the portal of `url` lists for this initiator. The URL's target and LUN do not matter.
///
/// # Errors
/// [`ConnectError`]
pub fn discover(url: &Url, options: &Options) -> Result<Vec<DiscoveredTarget>, ConnectError> {
    let connector = Connector::new(url, options)?;
    let portal = format!("iscsi://{}", url.portal());
    let connection = connector.connect_to_discover()?;
    list(connection, Instant::now() + options.login_time).map_err(|cause| ConnectError { portal, cause })
}

fn list(mut connection: Connection, deadline: Instant) -> Result<Vec<DiscoveredTarget>, ConnectCause> {
    let mut wire = Outgoing::of(connection.stream.clone(), connection.agreed);
    let mut ask = Vec::new();
    text::push(&mut ask, "SendTargets", "All");
    let mut all = Vec::new();
    let mut transfer_tag = NO_TAG;
    loop {
        let number = connection.sequence.expected;
        let request = TextRequest { is_final: true, continues: false, tag: 1, transfer_tag, number };
        let status = connection.sequence.status.wrapping_add(1);
        wire.send(request.encode(status), &ask, deadline).map_err(|unsent| ConnectCause::Broken(unsent.cause))?;
        let header = match receive_whole(&mut connection.inbox, deadline) {
            Ok(Some(header)) => header,
            Ok(None) => return Err(ConnectCause::Discovery("it does not answer in time".to_owned())),
            Err(broken) => return Err(ConnectCause::Broken(broken)),
        };
        let Ok(Answer::Text(answer)) = Answer::decode(&header) else {
            return Err(ConnectCause::Discovery("its answer is none to a text request".to_owned()));
        };
        connection.sequence = Sequence::decode(&header);
        all.extend_from_slice(&connection.inbox.small);
        if all.len() > LONGEST || (answer.transfer_tag == NO_TAG && !answer.is_final) {
            return Err(ConnectCause::Discovery("its list does not come to an end".to_owned()));
        }
        if answer.is_final {
            break;
        }
        transfer_tag = answer.transfer_tag;
        ask.clear();
    }
    farewell(connection);
    read(&all)
}

/// Reads a list: each `TargetName` is followed by its `TargetAddress`es.
fn read(list: &[u8]) -> Result<Vec<DiscoveredTarget>, ConnectCause> {
    let malformed = |what: &str| ConnectCause::Discovery(format!("its list is malformed: {what}"));
    let mut targets: Vec<DiscoveredTarget> = Vec::new();
    for pair in list.split(|byte| *byte == 0).filter(|pair| !pair.is_empty()) {
        let pair = std::str::from_utf8(pair).map_err(|_| malformed("it is no text"))?;
        match pair.split_once('=') {
            Some(("TargetName", name)) => {
                targets.push(DiscoveredTarget { name: name.to_owned(), portals: Vec::new() });
            }
            Some(("TargetAddress", address)) => {
                let target = targets.last_mut().ok_or_else(|| malformed("an address before any name"))?;
                let (portal, group) = address.rsplit_once(',').unwrap_or((address, "1"));
                let group = group.parse().map_err(|_| malformed("a portal group is no number"))?;
                target.portals.push((portal.to_owned(), group));
            }
            // Other keys are for others.
            Some(_) => {}
            None => return Err(malformed("a key without a value")),
        }
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_list_is_names_with_their_addresses() {
        let list =
            b"TargetName=iqn.a\0TargetAddress=10.0.0.1:3260,1\0TargetAddress=[fe80::1]:3260,2\0TargetName=iqn.b\0";
        let targets = read(list).unwrap();
        assert_eq!(targets[0].portals, [("10.0.0.1:3260".to_owned(), 1), ("[fe80::1]:3260".to_owned(), 2)]);
        assert_eq!((targets[1].name.as_str(), targets[1].portals.len()), ("iqn.b", 0));
        assert!(read(b"TargetAddress=10.0.0.1:3260,1\0").is_err());
    }

    proptest! {
        #[test]
        fn any_list_is_read_or_refused(list in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&list);
        }
    }
}
