//! Owns: the login of an initiator (RFC 7143, 6.3 and 13), as requests that follow from responses.
//! Promises: it ends after a bounded number of rounds; what is agreed on is never beyond what was offered.
//! Must not know: sockets, time.

use super::chap::{Flaw, Handshake};
use super::error::ConnectCause;
use super::secret::Account;
use super::url::DigestChoice;
use crate::pdu::{Digests, LoginRequest, LoginResponse};
use crate::text;

const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;

/// What this initiator takes in one data segment.
pub(super) const OWN_SEGMENT: u32 = 256 << 10;
/// The most unsolicited data of one command that is offered.
const FIRST_BURST: u32 = 256 << 10;
/// The longest sequence of data PDUs that is offered.
const BURST: u32 = 4 << 20;
/// R2Ts of one command that may be outstanding.
pub(super) const OUTSTANDING: u32 = 4;
/// Command number of the login and of the first command after it.
pub(super) const FIRST_NUMBER: u32 = 1;
/// Responses that a login may take, pieces of text included.
const ROUNDS: u32 = 32;

/// What a session has agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    pub digests: Digests,
    /// Data may come only when an R2T has asked for them, but immediate ones.
    pub initial_ready: bool,
    /// A command may carry data itself.
    pub immediate_data: bool,
    /// What the target takes in one data segment.
    pub segment: u32,
    /// The longest sequence of data PDUs.
    pub burst: u32,
    /// The most unsolicited data of one command.
    pub first_burst: u32,
    /// R2Ts of one command that may be outstanding.
    pub outstanding: u32,
}

impl Default for Agreed {
    /// The values of keys that nobody mentions (RFC 7143, 13).
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            initial_ready: true,
            immediate_data: true,
            segment: 8192,
            burst: 262_144,
            first_burst: 65_536,
            outstanding: 1,
        }
    }
}

/// Who logs in where.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub initiator: &'a str,
    /// None: a discovery session.
    pub target: Option<&'a str>,
    pub account: Option<&'a Account>,
    pub target_account: Option<&'a Account>,
    /// Algorithms of the handshake.
    pub algorithms: &'static str,
    pub header_digest: DigestChoice,
    pub data_digest: DigestChoice,
    pub isid: [u8; 6],
}

/// What follows from a response.
#[derive(Debug)]
pub(super) enum Step {
    /// This request, with this text.
    Send(LoginRequest, Vec<u8>),
    /// The full feature phase has begun.
    Done,
    /// The target is to be found there (`host:port[,group]`).
    Moved(String),
}

/// A login under way.
pub(super) struct Login<'a> {
    wanted: Wanted<'a>,
    handshake: Option<Handshake<'a>>,
    stage: u8,
    method_chosen: bool,
    keys_sent: bool,
    held: Vec<u8>,
    rounds: u32,
    /// What was agreed on so far.
    pub agreed: Agreed,
    /// The target's part of the session identifier.
    pub tsih: u16,
    /// The portal group that the session is with, if the target says so.
    pub group: Option<String>,
}

impl<'a> Login<'a> {
    pub fn new(wanted: Wanted<'a>) -> Self {
        Self {
            wanted,
            handshake: None,
            stage: SECURITY,
            method_chosen: false,
            keys_sent: false,
            held: Vec::new(),
            rounds: 0,
            agreed: Agreed::default(),
            tsih: 0,
            group: None,
        }
    }

    /// Whether the target has chosen SHA-256 for the handshake.
    pub fn is_strong(&self) -> bool {
        let chosen = self.handshake.as_ref().and_then(|handshake| handshake.chosen);
        chosen.is_some_and(|algorithm| algorithm != crate::login::chap::Algorithm::Md5)
    }

    /// The first request.
    pub fn begin(&self) -> (LoginRequest, Vec<u8>) {
        let mut say = Vec::new();
        text::push(&mut say, "InitiatorName", self.wanted.initiator);
        match self.wanted.target {
            Some(target) => {
                text::push(&mut say, "TargetName", target);
                text::push(&mut say, "SessionType", "Normal");
            }
            None => text::push(&mut say, "SessionType", "Discovery"),
        }
        text::push(&mut say, "AuthMethod", self.methods());
        (self.request(true), say)
    }

    fn methods(&self) -> &'static str {
        match (self.wanted.account, self.wanted.target_account) {
            (None, _) => "None",
            (Some(_), None) => "CHAP,None",
            // A target that leaves the proof out has not proven itself.
            (Some(_), Some(_)) => "CHAP",
        }
    }

    fn request(&self, transit: bool) -> LoginRequest {
        LoginRequest {
            transit,
            continues: false,
            current: self.stage,
            next: match (transit, self.stage) {
                (false, _) => 0,
                (true, SECURITY) => OPERATIONAL,
                (true, _) => FULL_FEATURE,
            },
            version_max: 0,
            version_min: 0,
            isid: self.wanted.isid,
            tsih: 0,
            tag: 1,
            connection: 0,
            number: FIRST_NUMBER,
            expected_status: 0,
        }
    }

    /// Takes a response. `random` makes the challenge of a handshake.
    pub fn step(&mut self, response: &LoginResponse, data: &[u8], random: [u8; 17]) -> Result<Step, ConnectCause> {
        self.rounds += 1;
        if self.rounds > ROUNDS || self.held.len() + data.len() > text::MAX_TEXT {
            return Err(ConnectCause::Protocol("it does not come to an end"));
        }
        self.held.extend_from_slice(data);
        if response.status.0 > 1 {
            return Err(ConnectCause::Refused(response.status));
        }
        if response.isid != self.wanted.isid {
            return Err(ConnectCause::Protocol("the answer is for another session"));
        }
        if response.continues {
            if response.transit {
                return Err(ConnectCause::Protocol("text that goes on where a stage ends"));
            }
            return Ok(Step::Send(self.request(false), Vec::new()));
        }
        let held = std::mem::take(&mut self.held);
        let pairs = text::parse(&held).map_err(|_| ConnectCause::Protocol("its text is malformed"))?;
        if response.status.0 == 1 {
            let address = pairs.iter().find(|(key, _)| *key == "TargetAddress");
            let (_, address) = address.ok_or(ConnectCause::Protocol("it refers to another portal but names none"))?;
            return Ok(Step::Moved((*address).to_owned()));
        }
        if response.current != self.stage {
            return Err(ConnectCause::Protocol("it is in another stage"));
        }
        if let Some((_, group)) = pairs.iter().find(|(key, _)| *key == "TargetPortalGroupTag") {
            self.group = Some((*group).to_owned());
        }
        match self.stage {
            SECURITY => self.secure(response, &pairs, random),
            _ => self.operate(response, &pairs),
        }
    }

    fn secure(
        &mut self,
        response: &LoginResponse,
        pairs: &[(&str, &str)],
        random: [u8; 17],
    ) -> Result<Step, ConnectCause> {
        let mut say = Vec::new();
        let method = pairs.iter().find(|(key, _)| *key == "AuthMethod").map(|(_, value)| *value);
        if !self.method_chosen {
            self.method_chosen = method.is_some();
            match (method, self.wanted.account) {
                (None, _) => {}
                (Some("None"), _) if self.wanted.target_account.is_none() => {}
                (Some("CHAP"), Some(account)) => {
                    let handshake = Handshake::new(account, self.wanted.target_account, self.wanted.algorithms);
                    if response.transit {
                        return Err(ConnectCause::Protocol("it ends the proof before its beginning"));
                    }
                    handshake.begin(&mut say);
                    self.handshake = Some(handshake);
                    return Ok(Step::Send(self.request(false), say));
                }
                (Some("None"), _) => return Err(ConnectCause::Unproven("it sends no proof")),
                (Some(other), _) => return Err(ConnectCause::Method(other.to_owned())),
            }
        } else if let Some(handshake) = &mut self.handshake {
            handshake.step(pairs, random, &mut say).map_err(|flaw| match flaw {
                Flaw::Malformed => ConnectCause::Protocol("its handshake is malformed"),
                Flaw::Unproven(why) => ConnectCause::Unproven(why),
            })?;
        }
        let is_proven = match (&self.handshake, self.wanted.target_account) {
            (Some(handshake), _) => handshake.is_done,
            (None, proof) => proof.is_none(),
        };
        if response.transit {
            if !is_proven {
                return Err(ConnectCause::Unproven("it sends no proof"));
            }
            if response.next != OPERATIONAL {
                return Err(ConnectCause::Protocol("it leaves the agreement out"));
            }
            self.stage = OPERATIONAL;
            self.keys_sent = true;
            self.offer(&mut say);
            return Ok(Step::Send(self.request(true), say));
        }
        // With the proof of the target asked for, the stage is left when it was given.
        Ok(Step::Send(self.request(is_proven || self.wanted.target_account.is_some()), say))
    }

    fn offer(&self, say: &mut Vec<u8>) {
        text::push(say, "HeaderDigest", self.wanted.header_digest.offer());
        text::push(say, "DataDigest", self.wanted.data_digest.offer());
        text::push(say, "MaxRecvDataSegmentLength", &OWN_SEGMENT.to_string());
        text::push(say, "DefaultTime2Wait", "0");
        text::push(say, "DefaultTime2Retain", "0");
        text::push(say, "ErrorRecoveryLevel", "0");
        if self.wanted.target.is_none() {
            return;
        }
        text::push(say, "MaxConnections", "1");
        text::push(say, "InitialR2T", "No");
        text::push(say, "ImmediateData", "Yes");
        text::push(say, "MaxBurstLength", &BURST.to_string());
        text::push(say, "FirstBurstLength", &FIRST_BURST.to_string());
        text::push(say, "MaxOutstandingR2T", &OUTSTANDING.to_string());
        text::push(say, "DataPDUInOrder", "Yes");
        text::push(say, "DataSequenceInOrder", "Yes");
    }

    fn operate(&mut self, response: &LoginResponse, pairs: &[(&str, &str)]) -> Result<Step, ConnectCause> {
        let mut say = Vec::new();
        for (key, value) in pairs {
            self.agree(key, value, &mut say)?;
        }
        if !response.transit {
            return Ok(Step::Send(self.request(true), say));
        }
        if response.next != FULL_FEATURE {
            return Err(ConnectCause::Protocol("it goes into a stage that there is not"));
        }
        self.agreed.first_burst = self.agreed.first_burst.min(self.agreed.burst);
        let (header, data) = (self.agreed.digests.header, self.agreed.digests.data);
        self.insist("HeaderDigest", self.wanted.header_digest, header)?;
        self.insist("DataDigest", self.wanted.data_digest, data)?;
        self.tsih = response.tsih;
        Ok(Step::Done)
    }

    fn insist(&self, key: &str, choice: DigestChoice, is_on: bool) -> Result<(), ConnectCause> {
        if choice == DigestChoice::Required && !is_on {
            return Err(refused(key, choice.offer(), "nothing"));
        }
        Ok(())
    }

    /// Takes the target's word about one key.
    fn agree(&mut self, key: &str, value: &str, say: &mut Vec<u8>) -> Result<(), ConnectCause> {
        // What the target does not negotiate stays at its default.
        let is_left = matches!(value, "Irrelevant" | "NotUnderstood" | "Reject");
        let number = |most: u32, default: u32| match is_left {
            true => Ok(default.min(most)),
            false => {
                let number = text::number(value).and_then(|number| u32::try_from(number).ok());
                let least = if most < 512 { 1 } else { 512 };
                number.filter(|n| (least..=most).contains(n)).ok_or_else(|| refused(key, &most.to_string(), value))
            }
        };
        let truth = |default: bool| match value {
            "Yes" => Ok(true),
            "No" => Ok(false),
            _ if is_left => Ok(default),
            _ => Err(refused(key, "Yes", value)),
        };
        match key {
            "HeaderDigest" | "DataDigest" => {
                let choice = if key == "HeaderDigest" { self.wanted.header_digest } else { self.wanted.data_digest };
                let is_on = match value {
                    "CRC32C" if choice != DigestChoice::None => true,
                    "None" if choice != DigestChoice::Required => false,
                    _ if is_left => false,
                    _ => return Err(refused(key, choice.offer(), value)),
                };
                if key == "HeaderDigest" {
                    self.agreed.digests.header = is_on;
                } else {
                    self.agreed.digests.data = is_on;
                }
            }
            "MaxRecvDataSegmentLength" => self.agreed.segment = number((1 << 24) - 1, 8192)?,
            "MaxBurstLength" => self.agreed.burst = number(BURST, 262_144)?,
            "FirstBurstLength" => self.agreed.first_burst = number(FIRST_BURST, 65_536)?,
            "MaxOutstandingR2T" => self.agreed.outstanding = number(OUTSTANDING, 1)?,
            "InitialR2T" => self.agreed.initial_ready = truth(true)?,
            "ImmediateData" => self.agreed.immediate_data = truth(true)?,
            // One connection, no recovery below that of sessions, everything in order.
            "DataPDUInOrder" | "DataSequenceInOrder" if value == "No" => return Err(refused(key, "Yes", value)),
            "ErrorRecoveryLevel" if !is_left && text::number(value) != Some(0) => {
                return Err(refused(key, "0", value));
            }
            "DataPDUInOrder" | "DataSequenceInOrder" | "ErrorRecoveryLevel" | "MaxConnections" => {}
            "DefaultTime2Wait" | "DefaultTime2Retain" | "TargetAlias" | "TargetPortalGroupTag" | "TargetAddress" => {}
            _ if is_left => {}
            _ => text::push(say, key, "NotUnderstood"),
        }
        Ok(())
    }
}

fn refused(key: &str, offer: &str, answer: &str) -> ConnectCause {
    // A hostile value is not repeated at any length.
    let answer = answer.chars().take(64).filter(|c| !c.is_control()).collect();
    ConnectCause::Key { key: key.to_owned(), offer: offer.to_owned(), answer }
}

#[cfg(test)]
#[path = "login_tests.rs"]
mod tests;
