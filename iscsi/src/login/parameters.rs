//! Owns: the operational keys of a session and how their values are agreed on (RFC 7143, 13).
//! Promises: a result is never outside what both sides can do; a value that makes no sense is answered with `Reject`.
//! Must not know: PDUs, stages, authentication.

use crate::pdu::Digests;
use crate::text;

/// What this target takes in one data segment: declared at login.
pub const OWN_SEGMENT: u32 = 256 << 10;
/// The most unsolicited data of one command.
const OWN_FIRST_BURST: u64 = 256 << 10;
/// The longest sequence of data PDUs.
const OWN_BURST: u64 = 4 << 20;
/// R2Ts that may be outstanding for one command.
const OWN_READY: u64 = 8;

/// What a session has agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Digests.
    pub digests: Digests,
    /// Data may come only when an R2T has asked for them, but immediate ones.
    pub initial_ready: bool,
    /// A command may carry data itself.
    pub immediate_data: bool,
    /// What the initiator takes in one data segment.
    pub initiator_segment: u32,
    /// The longest sequence of data PDUs, in bytes.
    pub burst: u32,
    /// The most unsolicited data of one command, in bytes.
    pub first_burst: u32,
    /// R2Ts that may be outstanding for one command.
    pub outstanding_ready: u32,
}

impl Default for Parameters {
    /// The values of keys that nobody mentions.
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            initial_ready: true,
            immediate_data: true,
            initiator_segment: 8192,
            burst: 262_144,
            first_burst: 65_536,
            outstanding_ready: 1,
        }
    }
}

/// What is said to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing: it was a declaration.
    Silence,
    /// This value.
    Value(String),
}

fn reject() -> Reply {
    Reply::Value("Reject".to_owned())
}

fn boolean(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

fn yes(value: bool) -> Reply {
    Reply::Value(if value { "Yes" } else { "No" }.to_owned())
}

impl Parameters {
    /// Agrees on one key.
    pub fn negotiate(&mut self, key: &str, value: &str) -> Reply {
        self.try_negotiate(key, value).unwrap_or_else(reject)
    }

    fn try_negotiate(&mut self, key: &str, value: &str) -> Option<Reply> {
        let number = |least: u64, most: u64| text::number(value).filter(|number| (least..=most).contains(number));
        let told = |number: u64| Some(Reply::Value(number.to_string()));
        match key {
            "HeaderDigest" | "DataDigest" => {
                let chosen = value.split(',').find(|offer| matches!(*offer, "CRC32C" | "None"))?;
                let on = chosen == "CRC32C";
                if key == "HeaderDigest" {
                    self.digests.header = on
                } else {
                    self.digests.data = on
                }
                Some(Reply::Value(chosen.to_owned()))
            }
            "MaxRecvDataSegmentLength" => {
                self.initiator_segment = number(512, (1 << 24) - 1)? as u32;
                Some(Reply::Silence)
            }
            "InitialR2T" => {
                self.initial_ready = boolean(value)?;
                Some(yes(self.initial_ready))
            }
            "ImmediateData" => {
                self.immediate_data = boolean(value)?;
                Some(yes(self.immediate_data))
            }
            "MaxBurstLength" => {
                self.burst = number(512, (1 << 24) - 1)?.min(OWN_BURST) as u32;
                told(self.burst.into())
            }
            "FirstBurstLength" => {
                self.first_burst = number(512, (1 << 24) - 1)?.min(OWN_FIRST_BURST) as u32;
                told(self.first_burst.into())
            }
            "MaxOutstandingR2T" => {
                self.outstanding_ready = number(1, 65_535)?.min(OWN_READY) as u32;
                told(self.outstanding_ready.into())
            }
            // One connection, no recovery below that of sessions: a connection that fails takes its session along.
            "MaxConnections" => number(1, 65_535).and(told(1)),
            "ErrorRecoveryLevel" => number(0, 2).and(told(0)),
            "DefaultTime2Wait" => told(number(0, 3600)?.max(2)),
            "DefaultTime2Retain" => number(0, 3600).and(told(0)),
            "DataPDUInOrder" | "DataSequenceInOrder" => boolean(value).map(|_| yes(true)),
            "TaskReporting" => {
                value.split(',').any(|offer| offer == "RFC3720").then(|| Reply::Value("RFC3720".to_owned()))
            }
            "iSCSIProtocolLevel" => told(number(0, 31)?.min(1)),
            // Obsolete, but not to be called unknown (13.25).
            "IFMarker" | "OFMarker" => Some(yes(false)),
            "IFMarkInt" | "OFMarkInt" => None,
            "InitiatorAlias" => Some(Reply::Silence),
            // Only in the full feature phase, or said once at the start.
            "SendTargets" | "TargetAddress" | "TargetAlias" | "TargetPortalGroupTag" => None,
            _ => Some(Reply::Value("NotUnderstood".to_owned())),
        }
    }

    /// The agreement is complete: unsolicited data are never longer than a sequence.
    pub fn settle(&mut self) {
        self.first_burst = self.first_burst.min(self.burst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn say(parameters: &mut Parameters, key: &str, value: &str) -> String {
        match parameters.negotiate(key, value) {
            Reply::Silence => String::new(),
            Reply::Value(value) => value,
        }
    }

    #[test]
    fn each_key_is_agreed_on_by_its_rule() {
        let mut agreed = Parameters::default();
        for (key, offer, answer) in [
            // 13.1: the first of the list that both know.
            ("HeaderDigest", "CRC32C,None", "CRC32C"),
            ("DataDigest", "X-other,None,CRC32C", "None"),
            ("DataDigest", "MD5", "Reject"),
            // 13.10: OR; 13.11: AND.
            ("InitialR2T", "No", "No"),
            ("ImmediateData", "No", "No"),
            ("ImmediateData", "maybe", "Reject"),
            // 13.13, 13.14, 13.17: the lesser.
            ("MaxBurstLength", "16776192", "4194304"),
            ("FirstBurstLength", "8192", "8192"),
            ("MaxOutstandingR2T", "16", "8"),
            ("MaxBurstLength", "100", "Reject"),
            // 13.12: a declaration.
            ("MaxRecvDataSegmentLength", "0x10000", ""),
            // 13.15: the greater; 13.16: the lesser.
            ("DefaultTime2Wait", "0", "2"),
            ("DefaultTime2Retain", "20", "0"),
            // 13.18, 13.19: OR.
            ("DataPDUInOrder", "No", "Yes"),
            ("DataSequenceInOrder", "Yes", "Yes"),
            ("ErrorRecoveryLevel", "2", "0"),
            ("MaxConnections", "8", "1"),
            ("IFMarker", "Yes", "No"),
            ("IFMarkInt", "2048", "Reject"),
            ("X-com.example.new", "1", "NotUnderstood"),
        ] {
            assert_eq!(say(&mut agreed, key, offer), answer, "{key}={offer}");
        }
        assert!(agreed.digests.header && !agreed.digests.data && !agreed.initial_ready && !agreed.immediate_data);
        assert_eq!((agreed.initiator_segment, agreed.burst, agreed.first_burst), (65_536, 4 << 20, 8192));
    }

    proptest! {
        #[test]
        fn no_offer_leads_outside_of_what_this_target_does(
            offers in prop::collection::vec(("(MaxBurstLength|FirstBurstLength|MaxOutstandingR2T|MaxRecvDataSegmentLength)", "[0-9a-fx]{0,12}"), 0..8),
        ) {
            let mut agreed = Parameters::default();
            for (key, value) in &offers {
                agreed.negotiate(key, value);
            }
            agreed.settle();
            prop_assert!((512..=OWN_BURST as u32).contains(&agreed.burst));
            prop_assert!(agreed.first_burst <= agreed.burst && agreed.first_burst <= OWN_FIRST_BURST as u32);
            prop_assert!((1..=8).contains(&agreed.outstanding_ready));
            prop_assert!((512..1 << 24).contains(&agreed.initiator_segment));
        }
    }
}
