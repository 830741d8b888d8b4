//! Promises of PDUs: bytes as RFC 7143 draws them, and any bytes are survived.

use proptest::prelude::*;

use super::*;

const SEQUENCE: Sequence = Sequence { status: 0x0102_0304, expected: 0x0506_0708, most: 0x090A_0B0C };

fn typed(text: &str) -> Vec<u8> {
    text.split_whitespace().map(|digits| u8::from_str_radix(digits, 16).unwrap()).collect()
}

#[test]
fn a_scsi_command_has_its_fields_where_11_3_draws_them() {
    let bytes = typed(
        "41 e1 00 00  00 00 00 08  00 05 00 00 00 00 00 00  00 00 00 2a  00 00 10 00  00 00 00 07  00 00 00 09
         28 00 00 00 00 01 00 00 08 00 00 00 00 00 00 00",
    );
    let header = Header(bytes.try_into().unwrap());
    assert!(header.is_immediate());
    assert_eq!((header.data_length(), header.additional_length()), (8, 0));
    let Ok(Request::Command(command)) = Request::decode(&header) else { panic!("no command") };
    assert!(command.is_final && command.reads && command.writes);
    assert_eq!((command.attribute, command.tag, command.expected, command.number), (1, 0x2A, 0x1000, 7));
    assert_eq!((command.lun[1], command.cdb[0], command.cdb[8]), (5, 0x28, 8));
}

#[test]
fn a_login_request_has_its_fields_where_11_12_draws_them() {
    let bytes = typed(
        "43 87 00 00  00 00 00 10  00 02 3d 00 00 01 00 00  00 00 00 01  00 03 00 00  00 00 00 05  00 00 00 06
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
    );
    let Ok(Request::Login(login)) = Request::decode(&Header(bytes.try_into().unwrap())) else { panic!("no login") };
    assert_eq!((login.transit, login.continues, login.current, login.next), (true, false, 1, 3));
    assert_eq!((login.isid, login.tsih, login.connection), ([0, 2, 0x3D, 0, 0, 1], 0, 3));
    assert_eq!((login.number, login.expected_status), (5, 6));
}

#[test]
fn answers_have_their_fields_where_the_standard_draws_them() {
    let response = ScsiResponse { tag: 9, response: 0, status: 2, data_count: 3, residual: Residual::Underflow(0x200) };
    let expected = typed(
        "21 82 00 02  00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 09  00 00 00 00  01 02 03 04  05 06 07 08
         09 0a 0b 0c  00 00 00 03  00 00 00 00  00 00 02 00",
    );
    assert_eq!(response.encode(SEQUENCE).to_vec(), expected);

    let data =
        DataIn { is_final: true, tag: 9, number: 4, offset: 0x1000, status: Some((0, Residual::Overflow(0x10))) };
    let expected = typed(
        "25 85 00 00  00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 09  ff ff ff ff  01 02 03 04  05 06 07 08
         09 0a 0b 0c  00 00 00 04  00 00 10 00  00 00 00 10",
    );
    assert_eq!(data.encode(SEQUENCE).to_vec(), expected);

    let ready = ReadyToTransfer { lun: [0; 8], tag: 9, transfer_tag: 5, number: 1, offset: 0x2000, length: 0x4000 };
    let expected = typed(
        "31 80 00 00  00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 09  00 00 00 05  01 02 03 04  05 06 07 08
         09 0a 0b 0c  00 00 00 01  00 00 20 00  00 00 40 00",
    );
    assert_eq!(ready.encode(SEQUENCE).to_vec(), expected);

    let login = LoginResponse {
        transit: true,
        continues: false,
        current: 1,
        next: 3,
        isid: [1, 2, 3, 4, 5, 6],
        tsih: 0x0A0B,
        tag: 9,
        status: (2, 1),
    };
    let expected = typed(
        "23 87 00 00  00 00 00 00  01 02 03 04 05 06 0a 0b  00 00 00 09  00 00 00 00  01 02 03 04  05 06 07 08
         09 0a 0b 0c  02 01 00 00  00 00 00 00  00 00 00 00",
    );
    assert_eq!(login.encode(SEQUENCE).to_vec(), expected);
}

#[test]
fn a_digest_is_the_one_of_the_examples_of_the_standard() {
    // RFC 7143, appendix A.4: 32 bytes of zeros, of ones, and rising.
    assert_eq!(digest(&[0; 32]), [0xAA, 0x36, 0x91, 0x8A]);
    assert_eq!(digest(&[0xFF; 32]), [0x43, 0xAB, 0xA8, 0x62]);
    let rising: Vec<u8> = (0..32).collect();
    assert_eq!(digest(&rising), [0x4E, 0x79, 0xDD, 0x46]);
}

#[test]
fn data_are_padded_and_followed_by_their_digest() {
    let mut stream = Vec::new();
    append(&mut stream, [0; HEADER], &[1, 2, 3, 4, 5], Digests { header: true, data: true });
    assert_eq!(stream.len(), HEADER + 4 + 8 + 4);
    assert_eq!(stream[5..8], [0, 0, 5]);
    assert_eq!(stream[HEADER..HEADER + 4], digest(&stream[..HEADER]));
    assert_eq!(stream[HEADER + 12..], digest(&[1, 2, 3, 4, 5, 0, 0, 0]));
    stream.clear();
    append(&mut stream, [0; HEADER], &[], Digests { header: false, data: true });
    assert_eq!(stream.len(), HEADER, "no data, no digest");
}

proptest! {
    #[test]
    fn any_header_is_decoded_or_rejected(bytes: [u8; HEADER]) {
        let header = Header(bytes);
        prop_assert!(header.data_length() < 1 << 24);
        if let Ok(request) = Request::decode(&header) {
            prop_assert_eq!(request.number().is_none(), matches!(request, Request::Login(_) | Request::Data(_)));
        }
    }

    #[test]
    fn any_header_is_an_answer_or_malformed(bytes: [u8; HEADER]) {
        if let Ok(Answer::Data(data)) = Answer::decode(&Header(bytes)) {
            prop_assert!(data.is_final || data.status.is_none());
        }
    }

    #[test]
    fn what_an_initiator_sends_a_target_reads(words: [u32; 5], lun: [u8; 8], cdb: [u8; 16], bits: [bool; 3], small in 0u8..4) {
        let [tag, transfer_tag, number, offset, expected] = words;
        let [one, two, three] = bits;
        let is = |header: [u8; HEADER], request: Request| {
            prop_assert_eq!(Request::decode(&Header(header)), Ok(request));
            Ok(())
        };
        let nop = NopOut { lun, tag, transfer_tag, number };
        is(nop.encode(9), Request::Nop(nop))?;
        let command = ScsiCommand { is_final: one, reads: two, writes: three, attribute: small, lun, tag, expected, number, cdb };
        is(command.encode(9), Request::Command(command))?;
        let task = TaskRequest { function: small, lun, tag, referenced: offset, number, referenced_number: expected };
        is(task.encode(9), Request::Task(task))?;
        let text = TextRequest { is_final: one, continues: two && !one, tag, transfer_tag, number };
        is(text.encode(9), Request::Text(text))?;
        let out = DataOut { is_final: one, tag, transfer_tag, number, offset };
        is(out.encode(lun, 9), Request::Data(out))?;
        let logout = LogoutRequest { reason: small, tag, connection: number as u16, number };
        is(logout.encode(9), Request::Logout(logout))?;
        let login = LoginRequest {
            transit: one, continues: two, current: small, next: if one { 3 } else { 0 }, version_max: 0, version_min: 0,
            isid: [small; 6], tsih: offset as u16, tag, connection: expected as u16, number, expected_status: transfer_tag,
        };
        is(login.encode(), Request::Login(login))?;
    }

    #[test]
    fn what_a_target_sends_an_initiator_reads(words: [u32; 5], lun: [u8; 8], bits: [bool; 2], small: u8, kind in 0u8..3) {
        let [tag, transfer_tag, number, offset, length] = words;
        let [one, two] = bits;
        let is = |header: [u8; HEADER], answer: Answer| {
            prop_assert_eq!(Answer::decode(&Header(header)), Ok(answer));
            prop_assert_eq!(Sequence::decode(&Header(header)).most, SEQUENCE.most);
            Ok(())
        };
        let residual = [Residual::None, Residual::Underflow(length), Residual::Overflow(length)][usize::from(kind)];
        let nop = NopIn { lun, tag, transfer_tag };
        is(nop.encode(SEQUENCE), Answer::Nop(nop))?;
        let response = ScsiResponse { tag, response: small, status: kind, data_count: number, residual };
        is(response.encode(SEQUENCE), Answer::Response(response))?;
        let task = TaskManagementAnswer { tag, response: small };
        is(task.encode(SEQUENCE), Answer::Task(task))?;
        let data = DataIn { is_final: one, tag, number, offset, status: one.then_some((small, residual)) };
        is(data.encode(SEQUENCE), Answer::Data(data))?;
        let ready = ReadyToTransfer { lun, tag, transfer_tag, number, offset, length };
        is(ready.encode(SEQUENCE), Answer::Ready(ready))?;
        let text = TextResponse { is_final: one, continues: two, tag, transfer_tag };
        is(text.encode(SEQUENCE), Answer::Text(text))?;
        let logout = LogoutResponse { tag, response: small };
        is(logout.encode(SEQUENCE), Answer::Logout(logout))?;
        let event = AsyncMessage { event: small, seconds: number as u16 };
        is(event.encode(SEQUENCE), Answer::Async { event: small, parameters: [0, 0, number as u16] })?;
        let reject = Reject(RejectReason::Protocol);
        is(reject.encode(SEQUENCE), Answer::Reject(4))?;
        let login = LoginResponse {
            transit: one, continues: two, current: kind, next: if one { 3 } else { 0 }, isid: [small; 6], tsih: number as u16, tag, status: (kind, small),
        };
        is(login.encode(SEQUENCE), Answer::Login(login))?;
    }

    #[test]
    fn a_residual_is_what_is_missing_or_beyond(expected: u32, moved: u32, beyond in 0u64..10) {
        let moved = moved.min(expected);
        let told = Residual::of(expected, moved.into(), beyond);
        match told {
            Residual::None => prop_assert!(beyond == 0 && moved == expected),
            Residual::Underflow(rest) => prop_assert_eq!(moved + rest, expected),
            Residual::Overflow(more) => prop_assert_eq!(u64::from(more), beyond),
        }
    }
}
