//! Promises of the login, item by item of RFC 7143: what leads in, and what each wrong step is answered with.

use proptest::prelude::*;

use super::*;

const INITIATOR: &str = "iqn.2026-01.test:host";
const OPEN: &str = "iqn.2026-01.test:open";
const GUARDED: &str = "iqn.2026-01.test:guarded";

pub(crate) struct Door;

impl Doorkeeper for Door {
    fn admit(&self, initiator: &str, target: Option<&str>) -> Result<Admission, Status> {
        let credentials = Credentials { initiator: ("user".into(), "long-secret-1".into()), target: None };
        match target {
            _ if initiator.ends_with(":stranger") => Err(FORBIDDEN),
            None | Some(OPEN) => Ok(Admission { group: 3, credentials: None }),
            Some(GUARDED) => Ok(Admission { group: 3, credentials: Some(credentials) }),
            Some(_) => Err(NOT_FOUND),
        }
    }

    fn random(&self, bytes: &mut [u8]) {
        bytes.fill(7);
    }
}

pub(crate) fn request(current: u8, next: Option<u8>) -> LoginRequest {
    LoginRequest {
        transit: next.is_some(),
        continues: false,
        current,
        next: next.unwrap_or(0),
        version_max: 0,
        version_min: 0,
        isid: [0; 6],
        tsih: 0,
        tag: 1,
        connection: 0,
        number: 1,
        expected_status: 0,
    }
}

fn keys(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut text = Vec::new();
    pairs.iter().for_each(|(key, value)| text::push(&mut text, key, value));
    text
}

fn to(target: &str) -> Vec<u8> {
    keys(&[("InitiatorName", INITIATOR), ("TargetName", target), ("SessionType", "Normal")])
}

fn first(request: LoginRequest, text: &[u8]) -> Result<Answer, Status> {
    Login::new().step(&request, text, &Door)
}

fn told(answer: &Answer) -> Vec<(&str, &str)> {
    text::parse(&answer.text).unwrap()
}

#[test]
fn a_login_goes_by_security_and_agreement_to_the_full_feature_phase() {
    let mut login = Login::new();
    let mut text = to(OPEN);
    text.extend(keys(&[("AuthMethod", "CHAP,None")]));
    let answer = login.step(&request(0, Some(1)), &text, &Door).unwrap();
    assert!(answer.transit && answer.next == 1);
    assert_eq!(told(&answer)[..2], [("TargetPortalGroupTag", "3"), ("AuthMethod", "None")]);
    let offer = keys(&[("HeaderDigest", "CRC32C"), ("MaxBurstLength", "1024"), ("FirstBurstLength", "65536")]);
    let answer = login.step(&request(1, Some(3)), &offer, &Door).unwrap();
    assert!(answer.is_last());
    assert!(told(&answer).contains(&("MaxRecvDataSegmentLength", "262144")));
    assert!(login.parameters.digests.header && login.parameters.first_burst == 1024);
    assert_eq!((login.initiator.as_deref(), login.target.as_deref(), login.group()), (Some(INITIATOR), Some(OPEN), 3));
}

#[test]
fn the_first_request_may_be_the_last() {
    let answer = first(request(1, Some(3)), &to(OPEN)).unwrap();
    assert!(answer.is_last());
    let discovery = keys(&[("InitiatorName", INITIATOR), ("SessionType", "Discovery")]);
    let answer = first(request(0, Some(3)), &discovery).unwrap();
    assert!(answer.is_last() && !told(&answer).iter().any(|(key, _)| *key == "TargetPortalGroupTag"));
}

#[test]
fn text_may_come_in_pieces() {
    // 6.2: the C bit; the answer to a piece is empty.
    let (mut login, text) = (Login::new(), to(OPEN));
    let piece = LoginRequest { continues: true, ..request(1, None) };
    let answer = login.step(&piece, &text[..20], &Door).unwrap();
    assert!(answer.text.is_empty() && !answer.transit);
    assert!(login.step(&request(1, Some(3)), &text[20..], &Door).unwrap().is_last());
}

#[test]
fn each_wrong_first_request_has_its_status() {
    let normal = request(1, Some(3));
    let named = |pairs: &[(&str, &str)]| first(normal, &keys(pairs)).unwrap_err();
    // 13.4, 13.5: names that are missing; 13.21: a session type that there is not.
    assert_eq!(named(&[("TargetName", OPEN)]), MISSING_PARAMETER);
    assert_eq!(named(&[("InitiatorName", INITIATOR)]), MISSING_PARAMETER);
    assert_eq!(named(&[("InitiatorName", INITIATOR), ("SessionType", "Other")]), SESSION_TYPE);
    // 11.13.5: not found, forbidden.
    assert_eq!(first(normal, &to("iqn.2026-01.test:none")).unwrap_err(), NOT_FOUND);
    assert_eq!(named(&[("InitiatorName", "iqn.2026-01.test:stranger"), ("TargetName", OPEN)]), FORBIDDEN);
    // 4.2.7.1: names of at most 223 bytes.
    let long = format!("iqn.{}", "a".repeat(MAX_NAME));
    assert_eq!(named(&[("InitiatorName", &long), ("TargetName", OPEN)]), INITIATOR_ERROR);
    // 11.12.4: versions.
    assert_eq!(first(LoginRequest { version_min: 1, version_max: 1, ..normal }, &to(OPEN)).unwrap_err(), VERSION);
    // 11.12.3: stages that there are not, that go back, or that stay.
    for (current, next) in [(2, Some(3)), (3, Some(3)), (1, Some(0)), (1, Some(1)), (0, Some(2))] {
        assert_eq!(first(request(current, next), &to(OPEN)).unwrap_err(), INITIATOR_ERROR, "{current} to {next:?}");
    }
    // 11.12.2: T and C together.
    assert_eq!(first(LoginRequest { continues: true, ..normal }, &to(OPEN)).unwrap_err(), INITIATOR_ERROR);
    // 6.1: text that is none.
    assert_eq!(first(normal, b"InitiatorName\0").unwrap_err(), INITIATOR_ERROR);
    assert_eq!(first(normal, b"InitiatorName=x").unwrap_err(), INITIATOR_ERROR);
}

#[test]
fn a_key_is_agreed_on_once_and_stages_do_not_go_back() {
    let mut login = Login::new();
    let mut text = to(OPEN);
    text.extend(keys(&[("MaxBurstLength", "4096")]));
    login.step(&request(1, None), &text, &Door).unwrap();
    // 6.2: negotiated a second time.
    assert_eq!(
        login.step(&request(1, None), &keys(&[("MaxBurstLength", "8192")]), &Door).unwrap_err(),
        INITIATOR_ERROR
    );
    let mut login = Login::new();
    login.step(&request(0, Some(1)), &to(OPEN), &Door).unwrap();
    assert_eq!(login.step(&request(0, Some(1)), &[], &Door).unwrap_err(), INITIATOR_ERROR);
}

#[test]
fn endless_text_is_refused() {
    let mut login = Login::new();
    let piece = LoginRequest { continues: true, ..request(1, None) };
    let ended = (0..100).find_map(|_| login.step(&piece, &[b'a'; 8192], &Door).err());
    assert_eq!(ended, Some(INITIATOR_ERROR));
}

#[test]
fn a_guarded_target_lets_nobody_in_unproven() {
    // 12.1: no method, the wrong one, or the stage left out.
    assert_eq!(first(request(1, Some(3)), &to(GUARDED)).unwrap_err(), AUTHENTICATION_FAILED);
    assert_eq!(first(request(0, Some(3)), &to(GUARDED)).unwrap_err(), AUTHENTICATION_FAILED);
    let mut none = to(GUARDED);
    none.extend(keys(&[("AuthMethod", "None")]));
    assert_eq!(first(request(0, Some(1)), &none).unwrap_err(), AUTHENTICATION_FAILED);

    let begin = || {
        let mut login = Login::new();
        let mut text = to(GUARDED);
        text.extend(keys(&[("AuthMethod", "CHAP,None")]));
        let answer = login.step(&request(0, Some(1)), &text, &Door).unwrap();
        assert!(!answer.transit, "the stage does not end before the proof");
        let answer = login.step(&request(0, None), &keys(&[("CHAP_A", "5")]), &Door).unwrap();
        assert!(told(&answer).contains(&("CHAP_I", "7")));
        login
    };
    // Leaving the stage without an answer, and a wrong answer.
    assert_eq!(begin().step(&request(1, Some(3)), &[], &Door).unwrap_err(), INITIATOR_ERROR, "the stage has not ended");
    let wrong = keys(&[("CHAP_N", "user"), ("CHAP_R", "0x00")]);
    assert_eq!(begin().step(&request(0, Some(1)), &wrong, &Door).unwrap_err(), AUTHENTICATION_FAILED);
}

proptest! {
    #[test]
    fn any_requests_end_in_a_status_or_in_a_login_with_a_name(
        requests in prop::collection::vec((0u8..4, prop::option::of(0u8..4), any::<bool>(), "[A-Za-z=,0-9\0.:-]{0,80}", any::<bool>()), 1..8),
    ) {
        let mut login = Login::new();
        for (current, next, continues, noise, named) in requests {
            let mut text = if named { to(OPEN) } else { Vec::new() };
            text.extend_from_slice(noise.as_bytes());
            let request = LoginRequest { continues, ..request(current, next) };
            match login.step(&request, &text, &Door) {
                Err(_) => break,
                Ok(answer) if answer.is_last() => {
                    prop_assert!(login.initiator.is_some() && login.target.is_some());
                    break;
                }
                Ok(_) => {}
            }
        }
    }

    #[test]
    fn no_noise_opens_a_guarded_target(texts in prop::collection::vec("(CHAP_[AINCR]=[0-9a-fx]{0,40}\0){0,4}", 1..6), stage in 0u8..2) {
        let mut login = Login::new();
        let mut text = to(GUARDED);
        text.extend(keys(&[("AuthMethod", "CHAP")]));
        let _ = login.step(&request(0, None), &text, &Door);
        for noise in texts {
            match login.step(&request(stage, Some(3)), noise.as_bytes(), &Door) {
                Err(_) => break,
                Ok(answer) => prop_assert!(!answer.is_last()),
            }
        }
    }
}
