//! Promises that hold for whatever comes over the wire: corpora of headers and login texts, and mutations of them.

use crate::login::tests::{Door, request};
use crate::login::{FORBIDDEN, Login};
use crate::pdu::{Answer, HEADER, Header, LoginRequest, Request, Sequence};
use crate::text;

#[path = "../../scsi/src/tests/mutation.rs"]
mod mutation;
use mutation::for_each;

/// A header of whatever bytes there are.
fn header(input: &[u8]) -> Header {
    let mut bytes = [0; HEADER];
    let length = input.len().min(HEADER);
    bytes[..length].copy_from_slice(&input[..length]);
    Header(bytes)
}

#[test]
fn headers_are_requests_or_answers_or_refused_and_lengths_are_bounded() {
    for_each(include_str!("corpus/pdu.txt"), |input| {
        let header = header(input);
        assert!(header.data_length() < 1 << 24 && header.additional_length() <= 255 * 4);
        if let Ok(request) = Request::decode(&header) {
            // 11.2.1.2: what a target sends is no request.
            assert!(header.opcode() < 0x20, "{input:02x?}");
            assert_eq!(Request::decode(&header), Ok(request), "the same bytes mean the same");
        }
        if Answer::decode(&header).is_ok() {
            assert!(header.opcode() >= 0x20, "{input:02x?}");
        }
        let _ = Sequence::decode(&header);
    });
}

#[test]
fn texts_are_pairs_that_are_written_alike_or_refused() {
    for_each(include_str!("corpus/login.txt"), |input| {
        let text = &input[input.len().min(2)..];
        let Ok(pairs) = text::parse(text) else { return };
        let mut again = Vec::new();
        pairs.iter().for_each(|(key, value)| text::push(&mut again, key, value));
        assert_eq!(text::parse(&again).as_ref(), Ok(&pairs));
        for (_, value) in pairs {
            let _ = (text::number(value), text::binary(value));
        }
    });
}

#[test]
fn logins_end_in_a_status_or_with_a_name_and_no_guarded_target_opens() {
    let mut login = Login::new();
    let mut steps = 0;
    for_each(include_str!("corpus/login.txt"), |input| {
        let (&stages, rest) = input.split_first().unwrap_or((&0, &[]));
        let (&continues, text) = rest.split_first().unwrap_or((&0, &[]));
        let next = (stages & 0x0F != 0x0F).then_some(stages & 0x03);
        let asked = LoginRequest { continues: continues == 1, ..request(stages >> 4 & 0x03, next) };
        // Each input goes on with the login before it, until that ends.
        steps += 1;
        match login.step(&asked, text, &Door) {
            Ok(answer) if answer.is_last() => {
                assert!(login.initiator.is_some(), "{input:02x?}");
                assert!(login.target.as_deref().is_none_or(|name| !name.ends_with(":guarded")), "{input:02x?}");
            }
            Ok(_) if steps < 6 => return,
            Ok(_) => {}
            Err(status) => assert!((1..=3).contains(&status.0) && FORBIDDEN.0 == 2, "{status:?}"),
        }
        (login, steps) = (Login::new(), 0);
    });
}
