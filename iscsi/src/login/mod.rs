//! Owns: the login phase of a connection (RFC 7143, 6.3 and 11.12): stages, names, authentication, agreement.
//! Promises: the full feature phase is reached only with a name that the target lets in and, where it asks for them, proven secrets;
//! each refusal has the status that the standard gives it.
//! Must not know: sockets, sessions of others, SCSI.

pub mod chap;
pub mod parameters;
#[cfg(test)]
pub(crate) mod tests;

use crate::pdu::LoginRequest;
use crate::text;
use chap::{Credentials, Handshake};
use parameters::{OWN_SEGMENT, Parameters, Reply};

/// Status class and detail of a login response (11.13.5).
pub type Status = (u8, u8);
/// Everything is well.
pub const SUCCESS: Status = (0, 0);
/// The initiator did something wrong.
pub const INITIATOR_ERROR: Status = (2, 0);
/// It could not prove who it is.
pub const AUTHENTICATION_FAILED: Status = (2, 1);
/// It may not use this target.
pub const FORBIDDEN: Status = (2, 2);
/// There is no such target.
pub const NOT_FOUND: Status = (2, 3);
/// A version that nobody knows.
pub const VERSION: Status = (2, 5);
/// Another connection for a session that has one.
pub const TOO_MANY_CONNECTIONS: Status = (2, 6);
/// A key is missing without which no login is.
pub const MISSING_PARAMETER: Status = (2, 7);
/// Neither discovery nor a normal session.
pub const SESSION_TYPE: Status = (2, 9);
/// There is no such session.
pub const NO_SESSION: Status = (2, 10);
/// A request that does not belong into the login.
pub const INVALID_DURING_LOGIN: Status = (2, 11);
/// The target has not what it takes at the moment.
pub const OUT_OF_RESOURCES: Status = (3, 2);

/// Stages (11.12.3).
const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;

/// Longest iSCSI name (4.2.7.1).
pub const MAX_NAME: usize = 223;

/// What a target says about an initiator that knocks.
#[derive(Clone, Debug)]
pub struct Admission {
    /// The portal group that the connection came in by.
    pub group: u16,
    /// What it has to prove, if anything.
    pub credentials: Option<Credentials>,
}

/// Who may use what.
pub trait Doorkeeper {
    /// Whether `initiator` may open a session to `target`; `None`: a discovery session. A refusal is a login status.
    fn admit(&self, initiator: &str, target: Option<&str>) -> Result<Admission, Status>;

    /// Random bytes.
    fn random(&self, bytes: &mut [u8]);
}

/// What is said to a login request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The asked stage begins.
    pub transit: bool,
    /// The stage of the request.
    pub current: u8,
    /// The stage that begins, with `transit`.
    pub next: u8,
    /// Keys and values.
    pub text: Vec<u8>,
}

impl Answer {
    /// Does the full feature phase begin?
    pub fn is_last(&self) -> bool {
        self.transit && self.next == FULL_FEATURE
    }
}

/// A login under way.
pub struct Login {
    stage: u8,
    held: Vec<u8>,
    /// Name of the initiator, once it was told.
    pub initiator: Option<String>,
    /// Name of the target; none in a discovery session.
    pub target: Option<String>,
    /// What was agreed on so far.
    pub parameters: Parameters,
    admission: Option<Admission>,
    handshake: Option<Handshake>,
    is_first: bool,
    has_declared: bool,
    said: Vec<String>,
}

impl Default for Login {
    fn default() -> Self {
        Self {
            stage: SECURITY,
            held: Vec::new(),
            initiator: None,
            target: None,
            parameters: Parameters::default(),
            admission: None,
            handshake: None,
            is_first: true,
            has_declared: false,
            said: Vec::new(),
        }
    }
}

impl Login {
    /// A login that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// The portal group of the session.
    pub fn group(&self) -> u16 {
        self.admission.as_ref().map_or(0, |admission| admission.group)
    }

    /// Takes one request. After an error the connection ends, with this status in the last response.
    pub fn step(&mut self, request: &LoginRequest, data: &[u8], doorkeeper: &dyn Doorkeeper) -> Result<Answer, Status> {
        if request.version_min > 0 {
            return Err(VERSION);
        }
        let known = matches!(request.current, SECURITY | OPERATIONAL);
        let forward = !request.transit || (request.next > request.current && request.next != 2);
        // A login may begin in either stage and never goes back (6.3).
        if !known
            || !forward
            || (request.transit && request.continues)
            || (!self.is_first && request.current != self.stage)
        {
            return Err(INITIATOR_ERROR);
        }
        if self.held.len() + data.len() > text::MAX_TEXT {
            return Err(INITIATOR_ERROR);
        }
        self.held.extend_from_slice(data);
        self.stage = request.current;
        let quiet = Answer { transit: false, current: request.current, next: 0, text: Vec::new() };
        if request.continues {
            return Ok(quiet);
        }
        let held = std::mem::take(&mut self.held);
        let pairs = text::parse(&held).map_err(|_| INITIATOR_ERROR)?;
        let mut answer = Vec::new();
        if self.is_first {
            self.names(&pairs, doorkeeper, &mut answer)?;
            self.is_first = false;
        }
        self.keys(&pairs, doorkeeper, &mut answer)?;
        let is_proven = match (&self.handshake, &self.admission) {
            (Some(handshake), _) => handshake.is_proven(),
            (None, Some(Admission { credentials: Some(_), .. })) => false,
            (None, _) => true,
        };
        if request.current == OPERATIONAL && !is_proven {
            return Err(AUTHENTICATION_FAILED);
        }
        if !request.transit || !is_proven {
            // Who has nothing more to say and has not been asked to prove itself will never be let in.
            if request.transit && !is_proven && self.handshake.is_none() {
                return Err(AUTHENTICATION_FAILED);
            }
            return Ok(Answer { text: answer, ..quiet });
        }
        if (request.next == FULL_FEATURE || request.current == OPERATIONAL) && !self.has_declared {
            self.declare(&mut answer);
        }
        self.stage = request.next;
        if request.next == FULL_FEATURE {
            self.parameters.settle();
        }
        Ok(Answer { transit: true, current: request.current, next: request.next, text: answer })
    }

    /// The first request says who wants what (6.3, 13.4 to 13.6, 13.21).
    fn names(
        &mut self,
        pairs: &[(&str, &str)],
        doorkeeper: &dyn Doorkeeper,
        answer: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let value = |key: &str| pairs.iter().find(|(known, _)| *known == key).map(|(_, value)| *value);
        let initiator = value("InitiatorName").ok_or(MISSING_PARAMETER)?;
        if initiator.is_empty() || initiator.len() > MAX_NAME {
            return Err(INITIATOR_ERROR);
        }
        let target = match value("SessionType").unwrap_or("Normal") {
            "Normal" => Some(value("TargetName").ok_or(MISSING_PARAMETER)?),
            "Discovery" => None,
            _ => return Err(SESSION_TYPE),
        };
        let admission = doorkeeper.admit(initiator, target)?;
        if target.is_some() {
            text::push(answer, "TargetPortalGroupTag", &admission.group.to_string());
        }
        self.initiator = Some(initiator.to_owned());
        self.target = target.map(str::to_owned);
        self.admission = Some(admission);
        Ok(())
    }

    fn keys(
        &mut self,
        pairs: &[(&str, &str)],
        doorkeeper: &dyn Doorkeeper,
        answer: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let mut declares = false;
        for (key, value) in pairs {
            match *key {
                "InitiatorName" | "TargetName" | "SessionType" => continue,
                "CHAP_A" | "CHAP_I" | "CHAP_C" | "CHAP_N" | "CHAP_R" => continue,
                _ => {}
            }
            // A key is agreed on once in a login (6.2).
            if self.said.iter().any(|said| said == key) {
                return Err(INITIATOR_ERROR);
            }
            self.said.push((*key).to_owned());
            if *key == "AuthMethod" {
                self.choose_method(value, answer)?;
                continue;
            }
            declares |= *key == "MaxRecvDataSegmentLength";
            if let Reply::Value(value) = self.parameters.negotiate(key, value) {
                text::push(answer, key, &value);
            }
        }
        if declares && !self.has_declared {
            self.declare(answer);
        }
        if let Some(handshake) = &mut self.handshake {
            let mut random = [0; 17];
            doorkeeper.random(&mut random);
            let mut challenge = [0; 16];
            challenge.copy_from_slice(&random[1..]);
            handshake.step(pairs, (random[0], challenge), answer).map_err(|_| AUTHENTICATION_FAILED)?;
        }
        Ok(())
    }

    fn choose_method(&mut self, offers: &str, answer: &mut Vec<u8>) -> Result<(), Status> {
        let wanted = self.admission.as_ref().and_then(|admission| admission.credentials.clone());
        let method = if wanted.is_some() { "CHAP" } else { "None" };
        if !offers.split(',').any(|offer| offer == method) {
            return Err(AUTHENTICATION_FAILED);
        }
        text::push(answer, "AuthMethod", method);
        self.handshake = wanted.map(Handshake::new);
        Ok(())
    }

    fn declare(&mut self, answer: &mut Vec<u8>) {
        text::push(answer, "MaxRecvDataSegmentLength", &OWN_SEGMENT.to_string());
        self.has_declared = true;
    }
}
