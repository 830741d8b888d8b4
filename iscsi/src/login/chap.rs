//! Owns: the challenge handshake of login (RFC 7143, 12.1.3; RFC 1994): what is sent, what is believed.
//! Promises: a challenge is used once; secrets are compared in constant time; a reflected challenge is refused.
//! Must not know: stages, PDUs.

use md5::{Digest, Md5};
use sha2::Sha256;

use crate::text;

/// The secrets that a target wants to hear and to tell.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Name and secret of initiators.
    pub initiator: (String, String),
    /// Name and secret by which the target proves itself, if it can.
    pub target: Option<(String, String)>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let target = self.target.as_ref().map(|(name, _)| name);
        formatter.debug_struct("Credentials").field("initiator", &self.initiator.0).field("target", &target).finish()
    }
}

/// The hash of a handshake, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Md5 = 5,
    Sha256 = 7,
}

impl Algorithm {
    /// The first of a list that is known here.
    pub(crate) fn choose(list: &str) -> Option<Algorithm> {
        list.split(',').find_map(|offer| match text::number(offer)? {
            5 => Some(Algorithm::Md5),
            7 => Some(Algorithm::Sha256),
            _ => None,
        })
    }

    /// What proves the secret.
    pub(crate) fn response(self, id: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
        match self {
            Algorithm::Md5 => {
                Md5::new().chain_update([id]).chain_update(secret).chain_update(challenge).finalize().to_vec()
            }
            Algorithm::Sha256 => {
                Sha256::new().chain_update([id]).chain_update(secret).chain_update(challenge).finalize().to_vec()
            }
        }
    }
}

/// Where a handshake is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Progress {
    /// The initiator says which algorithms it has.
    Algorithms,
    /// A challenge is out.
    Challenged { algorithm: Algorithm, id: u8, challenge: [u8; 16] },
    /// The initiator has proven itself.
    Proven,
}

/// One handshake.
#[derive(Clone, Debug)]
pub struct Handshake {
    credentials: Credentials,
    progress: Progress,
}

/// The handshake failed: nothing is said about why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

impl Handshake {
    /// A handshake by these secrets.
    pub fn new(credentials: Credentials) -> Self {
        Self { credentials, progress: Progress::Algorithms }
    }

    /// Has the initiator proven itself?
    pub fn is_proven(&self) -> bool {
        self.progress == Progress::Proven
    }

    /// Takes the keys of one request; adds the answers to `answer`. `challenge` is 16 random bytes and `id` a random byte.
    pub fn step(
        &mut self,
        pairs: &[(&str, &str)],
        (id, challenge): (u8, [u8; 16]),
        answer: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        let value = |key: &str| pairs.iter().find(|(known, _)| *known == key).map(|(_, value)| *value);
        match self.progress.clone() {
            Progress::Algorithms => {
                let Some(list) = value("CHAP_A") else { return Ok(()) };
                let algorithm = Algorithm::choose(list).ok_or(Refused)?;
                text::push(answer, "CHAP_A", &(algorithm as u8).to_string());
                text::push(answer, "CHAP_I", &id.to_string());
                text::push(answer, "CHAP_C", &text::hexadecimal(&challenge));
                self.progress = Progress::Challenged { algorithm, id, challenge };
            }
            Progress::Challenged { algorithm, id, challenge } => {
                let (name, secret) = &self.credentials.initiator;
                let told = text::binary(value("CHAP_R").ok_or(Refused)?).ok_or(Refused)?;
                let expected = algorithm.response(id, secret.as_bytes(), &challenge);
                if value("CHAP_N") != Some(name.as_str()) || !is_equal(&told, &expected) {
                    return Err(Refused);
                }
                match (value("CHAP_I"), value("CHAP_C")) {
                    (Some(id), Some(theirs)) => {
                        let (name, secret) = self.credentials.target.as_ref().ok_or(Refused)?;
                        let id = text::number(id).and_then(|id| u8::try_from(id).ok()).ok_or(Refused)?;
                        let theirs = text::binary(theirs).ok_or(Refused)?;
                        // One that only sends back what it was asked wants the answer from us (12.1.3).
                        if theirs == challenge {
                            return Err(Refused);
                        }
                        let proof = algorithm.response(id, secret.as_bytes(), &theirs);
                        text::push(answer, "CHAP_N", name);
                        text::push(answer, "CHAP_R", &text::hexadecimal(&proof));
                    }
                    (None, None) => {}
                    _ => return Err(Refused),
                }
                self.progress = Progress::Proven;
            }
            Progress::Proven => {}
        }
        Ok(())
    }
}

/// Compares without telling by its time where the difference is.
pub(crate) fn is_equal(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        Credentials {
            initiator: ("user".into(), "secret-of-user".into()),
            target: Some(("disk".into(), "secret-of-disk".into())),
        }
    }

    fn challenged(list: &str) -> (Handshake, String) {
        let mut handshake = Handshake::new(credentials());
        let mut answer = Vec::new();
        handshake.step(&[("CHAP_A", list)], (7, [9; 16]), &mut answer).unwrap();
        (handshake, String::from_utf8(answer).unwrap())
    }

    #[test]
    fn whoever_knows_the_secret_is_believed_and_is_told_the_targets() {
        for (list, algorithm) in [("5", Algorithm::Md5), ("8,7,5", Algorithm::Sha256)] {
            let (mut handshake, answer) = challenged(list);
            assert!(answer.starts_with(&format!("CHAP_A={}\0CHAP_I=7\0CHAP_C=0x0909", algorithm as u8)), "{answer}");
            let response = text::hexadecimal(&algorithm.response(7, b"secret-of-user", &[9; 16]));
            let pairs = [("CHAP_N", "user"), ("CHAP_R", response.as_str()), ("CHAP_I", "3"), ("CHAP_C", "0x0102")];
            let mut answer = Vec::new();
            handshake.step(&pairs, (0, [0; 16]), &mut answer).unwrap();
            assert!(handshake.is_proven());
            let proof = text::hexadecimal(&algorithm.response(3, b"secret-of-disk", &[1, 2]));
            assert_eq!(String::from_utf8(answer).unwrap(), format!("CHAP_N=disk\0CHAP_R={proof}\0"));
        }
    }

    #[test]
    fn a_wrong_secret_a_wrong_name_and_a_reflected_challenge_are_refused() {
        let right = text::hexadecimal(&Algorithm::Md5.response(7, b"secret-of-user", &[9; 16]));
        let wrong = text::hexadecimal(&Algorithm::Md5.response(7, b"guess", &[9; 16]));
        let echo = text::hexadecimal(&[9; 16]);
        for pairs in [
            vec![("CHAP_N", "user"), ("CHAP_R", wrong.as_str())],
            vec![("CHAP_N", "other"), ("CHAP_R", right.as_str())],
            vec![("CHAP_N", "user")],
            vec![("CHAP_N", "user"), ("CHAP_R", "nonsense")],
            vec![("CHAP_N", "user"), ("CHAP_R", right.as_str()), ("CHAP_I", "7"), ("CHAP_C", echo.as_str())],
            vec![("CHAP_N", "user"), ("CHAP_R", right.as_str()), ("CHAP_I", "7")],
        ] {
            let (mut handshake, _) = challenged("5");
            assert_eq!(handshake.step(&pairs, (0, [0; 16]), &mut Vec::new()), Err(Refused), "{pairs:?}");
            assert!(!handshake.is_proven());
        }
        let mut handshake = Handshake::new(credentials());
        assert_eq!(handshake.step(&[("CHAP_A", "6")], (7, [9; 16]), &mut Vec::new()), Err(Refused));
    }

    #[test]
    fn the_hash_is_that_of_rfc_1994() {
        // MD5 of 01 "secret" 02 03.
        let expected = Md5::digest(b"\x01secret\x02\x03").to_vec();
        assert_eq!(Algorithm::Md5.response(1, b"secret", &[2, 3]), expected);
    }
}
