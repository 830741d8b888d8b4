//! Promises of the initiator's login: it meets the target's side of this crate, and survives any other.

use proptest::prelude::*;

use super::*;
use crate::initiator::chap::{STRONG, WEAK};
use crate::initiator::secret::Secret;
use crate::login::chap::Credentials;
use crate::login::{Admission, Doorkeeper, Login as TargetLogin, Status};
use crate::pdu::LoginResponse;

struct Door(Option<Credentials>);

impl Doorkeeper for Door {
    fn admit(&self, _: &str, _: Option<&str>) -> Result<Admission, Status> {
        Ok(Admission { group: 1, credentials: self.0.clone() })
    }

    fn random(&self, bytes: &mut [u8]) {
        bytes.fill(7);
    }
}

fn account(name: &str, secret: &str) -> Account {
    Account { name: name.to_owned(), secret: Secret::new(secret.to_owned()) }
}

fn wanted<'a>() -> Wanted<'a> {
    Wanted {
        initiator: "iqn.2026-01.test:host",
        target: Some("iqn.2026-01.test:disk"),
        account: None,
        target_account: None,
        algorithms: STRONG,
        header_digest: DigestChoice::None,
        data_digest: DigestChoice::None,
        isid: [0x80, 1, 2, 3, 0, 0],
    }
}

/// Lets both sides of this crate talk to each other.
fn meet<'a>(wanted: Wanted<'a>, door: &Door) -> Result<Login<'a>, ConnectCause> {
    let (mut login, mut target) = (Login::new(wanted), TargetLogin::new());
    let (mut request, mut text) = login.begin();
    for _ in 0..20 {
        let (status, answer) = match target.step(&request, &text, door) {
            Ok(answer) => (crate::login::SUCCESS, Some(answer)),
            Err(status) => (status, None),
        };
        let response = LoginResponse {
            transit: answer.as_ref().is_some_and(|answer| answer.transit),
            continues: false,
            current: request.current,
            next: answer.as_ref().map_or(0, |answer| answer.next),
            isid: request.isid,
            tsih: 5,
            tag: request.tag,
            status,
        };
        match login.step(&response, answer.as_ref().map_or(&[], |answer| &answer.text), [9; 17])? {
            Step::Send(next, say) => (request, text) = (next, say),
            Step::Done => return Ok(login),
            Step::Moved(to) => panic!("moved to {to}"),
        }
    }
    panic!("no end");
}

#[test]
fn both_sides_of_this_crate_agree() {
    let offers = Wanted { header_digest: DigestChoice::Required, data_digest: DigestChoice::Preferred, ..wanted() };
    let login = meet(offers, &Door(None)).unwrap();
    assert_eq!(login.tsih, 5);
    assert!(login.agreed.digests.header && login.agreed.digests.data);
    assert!(!login.agreed.initial_ready && login.agreed.immediate_data);
    assert_eq!((login.agreed.segment, login.agreed.burst, login.agreed.outstanding), (262_144, 4 << 20, 4));
    let discovery = Wanted { target: None, ..wanted() };
    assert!(meet(discovery, &Door(None)).is_ok());
}

#[test]
fn chap_goes_one_way_or_both_and_wrong_secrets_are_told_apart() {
    let credentials = |target: Option<&str>| {
        Door(Some(Credentials {
            initiator: ("user".into(), "long-secret-1".into()),
            target: target.map(|secret| ("disk".into(), secret.into())),
        }))
    };
    let (own, wrong, theirs) = (account("user", "long-secret-1"), account("user", "guess"), account("disk", "theirs"));
    for algorithms in [STRONG, WEAK] {
        let one_way = Wanted { account: Some(&own), algorithms, ..wanted() };
        assert!(meet(one_way, &credentials(None)).is_ok());
        let both = Wanted { target_account: Some(&theirs), ..one_way };
        assert!(meet(both, &credentials(Some("theirs"))).is_ok());
        let impostor = meet(both, &credentials(Some("other"))).err();
        assert!(matches!(impostor, Some(ConnectCause::Unproven(_))), "{impostor:?}");
        // A target that asks for no proof gives none.
        assert!(meet(both, &Door(None)).is_err());
        let refused = meet(Wanted { account: Some(&wrong), algorithms, ..wanted() }, &credentials(None)).err();
        assert!(matches!(refused, Some(ConnectCause::Refused((2, 1)))), "{refused:?}");
        assert!(refused.unwrap().is_lasting());
    }
    let nobody = meet(wanted(), &credentials(None)).err();
    assert!(matches!(nobody, Some(ConnectCause::Refused((2, 1)))), "{nobody:?}");
    // Who has a password can use a target that wants none.
    assert!(meet(Wanted { account: Some(&own), ..wanted() }, &Door(None)).is_ok());
}

fn response(current: u8, transit: bool) -> LoginResponse {
    LoginResponse {
        transit,
        continues: false,
        current,
        next: if transit { if current == 0 { 1 } else { 3 } } else { 0 },
        isid: wanted().isid,
        tsih: 1,
        tag: 1,
        status: (0, 0),
    }
}

#[test]
fn a_target_that_agrees_to_what_was_not_offered_is_refused() {
    for keys in [
        "HeaderDigest=CRC32C\0",
        "MaxBurstLength=16777215\0",
        "FirstBurstLength=0\0",
        "MaxOutstandingR2T=64\0",
        "MaxRecvDataSegmentLength=100\0",
        "DataPDUInOrder=No\0",
        "ErrorRecoveryLevel=2\0",
        "InitialR2T=Perhaps\0",
    ] {
        let mut login = Login::new(wanted());
        assert!(matches!(login.step(&response(0, true), b"AuthMethod=None\0", [0; 17]), Ok(Step::Send(..))));
        let answer = login.step(&response(1, true), keys.as_bytes(), [0; 17]);
        assert!(matches!(answer, Err(ConnectCause::Key { .. })), "{keys}: {answer:?}");
    }
    // A digest that is insisted on and not given.
    let mut login = Login::new(Wanted { data_digest: DigestChoice::Required, ..wanted() });
    login.step(&response(0, true), b"AuthMethod=None\0", [0; 17]).unwrap();
    assert!(matches!(login.step(&response(1, true), b"", [0; 17]), Err(ConnectCause::Key { .. })));
}

#[test]
fn a_target_that_has_moved_says_where() {
    let mut login = Login::new(wanted());
    let moved = LoginResponse { status: (1, 1), ..response(0, false) };
    let step = login.step(&moved, b"TargetAddress=10.0.0.2:3261,1\0", [0; 17]);
    assert!(matches!(step, Ok(Step::Moved(to)) if to == "10.0.0.2:3261,1"));
    assert!(matches!(Login::new(wanted()).step(&moved, b"", [0; 17]), Err(ConnectCause::Protocol(_))));
}

proptest! {
    #[test]
    fn any_responses_end_in_a_session_or_in_an_error(
        responses in prop::collection::vec(
            (0u8..4, any::<bool>(), any::<bool>(), 0u8..4, prop::collection::vec(
                "(AuthMethod|CHAP_[AINCR]|HeaderDigest|MaxBurstLength|FirstBurstLength|InitialR2T|X)=[A-Za-z0-9]{0,12}\0|[a-z\0=]{0,9}", 0..4)),
            40,
        ),
        proves: bool,
    ) {
        let (own, theirs) = (account("user", "secret"), account("disk", "theirs"));
        let wanted = Wanted { account: Some(&own), target_account: proves.then_some(&theirs), ..wanted() };
        let mut login = Login::new(wanted);
        let mut is_over = false;
        for (current, transit, continues, class, texts) in responses {
            let status = (if class == 3 { 2 } else { 0 }, 0);
            let answer = LoginResponse { continues, next: 3, status, ..response(current, transit) };
            let answer = LoginResponse { next: if current == 0 { 1 } else { 3 }, ..answer };
            match login.step(&answer, texts.concat().as_bytes(), [1; 17]) {
                Ok(Step::Send(request, text)) => prop_assert!(request.next <= 3 && text.len() < 8192),
                Ok(Step::Done) => {
                    // No noise proves a target.
                    prop_assert!(!proves);
                    prop_assert!(login.agreed.first_burst <= login.agreed.burst && login.agreed.burst <= BURST);
                    is_over = true;
                }
                Ok(Step::Moved(_)) | Err(_) => is_over = true,
            }
            if is_over {
                break;
            }
        }
        prop_assert!(is_over, "no end");
    }
}
