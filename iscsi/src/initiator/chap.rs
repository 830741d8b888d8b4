//! Owns: the initiator's side of the challenge handshake (RFC 7143, 12.1.3; RFC 1994).
//! Promises: the target's proof is checked against a challenge of our own, which is used once.
//! Must not know: stages, PDUs.

use super::secret::Account;
use crate::login::chap::{Algorithm, is_equal};
use crate::text;

/// SHA-256 and MD5, in this order.
pub(super) const STRONG: &str = "7,5";
/// MD5 alone: some targets take the number of SHA-256 for another algorithm.
pub(super) const WEAK: &str = "5";

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// The target's keys are none of the handshake.
    Malformed,
    /// The target has not proven itself, for this reason.
    Unproven(&'static str),
}

/// One handshake.
pub(super) struct Handshake<'a> {
    account: &'a Account,
    target: Option<&'a Account>,
    offer: &'static str,
    challenge: Option<(Algorithm, u8, [u8; 16])>,
    /// Whether everything was said and checked.
    pub is_done: bool,
    /// The algorithm that the target chose.
    pub chosen: Option<Algorithm>,
}

impl<'a> Handshake<'a> {
    pub fn new(account: &'a Account, target: Option<&'a Account>, offer: &'static str) -> Self {
        Self { account, target, offer, challenge: None, is_done: false, chosen: None }
    }

    /// The first keys.
    pub fn begin(&self, say: &mut Vec<u8>) {
        text::push(say, "CHAP_A", self.offer);
    }

    /// Takes the target's keys; adds the answers to `say`. `random` makes the own challenge.
    pub fn step(&mut self, pairs: &[(&str, &str)], random: [u8; 17], say: &mut Vec<u8>) -> Result<(), Flaw> {
        let value = |key: &str| pairs.iter().find(|(known, _)| *known == key).map(|(_, value)| *value);
        if self.is_done {
            return Ok(());
        }
        if let Some((algorithm, id, challenge)) = self.challenge {
            let target = self.target.ok_or(Flaw::Malformed)?;
            let name = value("CHAP_N").ok_or(Flaw::Unproven("it sends no proof"))?;
            let proof = value("CHAP_R").and_then(text::binary).ok_or(Flaw::Unproven("it sends no proof"))?;
            if name != target.name {
                return Err(Flaw::Unproven("its user is another one"));
            }
            if !is_equal(&proof, &algorithm.response(id, target.secret.bytes(), &challenge)) {
                return Err(Flaw::Unproven("its password is another one"));
            }
            self.is_done = true;
            return Ok(());
        }
        let Some(chosen) = value("CHAP_A") else { return Err(Flaw::Malformed) };
        if !self.offer.split(',').any(|offer| offer == chosen) {
            return Err(Flaw::Malformed);
        }
        let algorithm = Algorithm::choose(chosen).ok_or(Flaw::Malformed)?;
        self.chosen = Some(algorithm);
        let id = value("CHAP_I").and_then(text::number).and_then(|id| u8::try_from(id).ok()).ok_or(Flaw::Malformed)?;
        let theirs = value("CHAP_C").and_then(text::binary).ok_or(Flaw::Malformed)?;
        let response = algorithm.response(id, self.account.secret.bytes(), &theirs);
        text::push(say, "CHAP_N", &self.account.name);
        text::push(say, "CHAP_R", &text::hexadecimal(&response));
        match self.target {
            None => self.is_done = true,
            Some(_) => {
                let mut challenge = [0; 16];
                challenge.copy_from_slice(&random[1..]);
                text::push(say, "CHAP_I", &random[0].to_string());
                text::push(say, "CHAP_C", &text::hexadecimal(&challenge));
                self.challenge = Some((algorithm, random[0], challenge));
            }
        }
        Ok(())
    }
}
