//! Promises against targets that break the protocol: no panic, bounded work, an error that says what is known.

use super::*;

/// Plays `wrong` on the first connection once a read and a write are in flight; both must end, and the session must go on after it.
fn broken_by(name: &str, wrong: impl Fn(&mut Peer, &ScsiCommand, &ScsiCommand) + Send + 'static) {
    let target = Scripted::new(move |nth, peer| {
        if nth > 0 {
            return peer.serve();
        }
        let (one, _) = peer.command().unwrap();
        let (other, _) = peer.command().unwrap();
        let (read, write) = if one.reads { (one, other) } else { (other, one) };
        wrong(peer, &read, &write);
        while peer.receive_raw().is_some() {}
    });
    let initiator = target.connect();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&initiator, &mut [0; 4096], LONG));
        let writer = scope.spawn(|| write(&initiator, &[0; 4096], LONG));
        for result in [reader.join().unwrap(), writer.join().unwrap()] {
            assert!(matches!(result, Err(PathError::Unknown(_))), "{name}: {result:?}");
        }
    });
    assert_eq!(plain(&initiator, LONG), good(0), "{name}: over another connection");
}

fn data(tag: u32, number: u32, offset: u32) -> DataIn {
    DataIn { is_final: false, tag, number, offset, status: None }
}

#[test]
fn whatever_does_not_belong_there_costs_the_connection() {
    broken_by("a status number left out", |peer, read, _| {
        peer.status += 1;
        peer.good(read.tag);
    });
    broken_by("a status twice", |peer, read, _| {
        peer.status -= 1;
        peer.good(read.tag);
    });
    broken_by("an unknown tag", |peer, read, _| peer.good(read.tag ^ 1 << 20));
    broken_by("no tag", |peer, _, _| peer.good(NO_TAG));
    broken_by("the number of data", |peer, read, _| peer.data(data(read.tag, 1, 0), &[0; 512]));
    broken_by("a hole in the data", |peer, read, _| peer.data(data(read.tag, 0, 512), &[0; 512]));
    broken_by("too much data", |peer, read, _| peer.data(data(read.tag, 0, 0), &[0; 4097]));
    broken_by("data beyond all", |peer, read, _| peer.data(data(read.tag, 0, u32::MAX), &[0; 4096]));
    broken_by("data for a write", |peer, _, write| peer.data(data(write.tag, 0, 0), &[0; 512]));
    broken_by("a segment longer than declared", |peer, read, _| peer.data(data(read.tag, 0, 0), &[0; 300_000]));
    let ready =
        |tag, number, offset, length| ReadyToTransfer { lun: [0; 8], tag, transfer_tag: 1, number, offset, length };
    broken_by("data asked of a read", move |peer, read, _| {
        let sequence = peer.without_status();
        peer.send(ready(read.tag, 0, 0, 512).encode(sequence), &[]);
    });
    broken_by("data beyond what there is", move |peer, _, write| {
        let sequence = peer.without_status();
        peer.send(ready(write.tag, 0, 4096, 1).encode(sequence), &[]);
    });
    broken_by("data without a tag", move |peer, _, write| {
        let sequence = peer.without_status();
        peer.send(ReadyToTransfer { transfer_tag: NO_TAG, ..ready(write.tag, 0, 0, 512) }.encode(sequence), &[]);
    });
    broken_by("a request's operation", |peer, _, _| peer.send([1; HEADER], &[]));
    broken_by("an operation that there is not", |peer, _, _| peer.send([0x3A; HEADER], &[]));
    broken_by("a login response", |peer, read, _| {
        let mut header = [0; HEADER];
        header[0] = 0x23;
        header[16..20].copy_from_slice(&read.tag.to_be_bytes());
        header[24..28].copy_from_slice(&peer.status.to_be_bytes());
        peer.send(header, &[]);
    });
    broken_by("the answer to a logout that nobody sent", |peer, _, _| {
        let sequence = peer.with_status();
        peer.send(LogoutResponse { tag: 2 << 8 | 1, response: 0 }.encode(sequence), &[]);
        let _ = peer.stream.shutdown(Shutdown::Both);
    });
    broken_by("the answer to an abort that nobody sent", |peer, read, _| {
        let sequence = peer.with_status();
        peer.send(TaskManagementAnswer { tag: read.tag, response: 0 }.encode(sequence), &[]);
    });
    broken_by("a reject of nothing", |peer, _, _| {
        let sequence = peer.with_status();
        peer.send(Reject(RejectReason::Protocol).encode(sequence), &[1, 2, 3]);
    });
    broken_by("a flood of pings", |peer, _, _| {
        for transfer_tag in 0..10_000 {
            let sequence = peer.without_status();
            peer.send(NopIn { lun: [0; 8], tag: NO_TAG, transfer_tag }.encode(sequence), &[]);
        }
        let _ = peer.stream.shutdown(Shutdown::Both);
    });
    for at in [0, 20, 48, 100, 600] {
        broken_by("a close", move |peer, read, _| {
            let mut bytes = Vec::new();
            append(&mut bytes, data(read.tag, 0, 0).encode(peer.without_status()), &[0; 4096], peer.digests);
            let _ = peer.stream.write_all(&bytes[..at]);
            let _ = peer.stream.shutdown(Shutdown::Both);
        });
    }
}

#[test]
fn a_wrong_digest_is_never_taken_for_data() {
    for header in [true, false] {
        let target = Scripted::new(move |nth, peer| {
            if nth > 0 {
                return peer.serve();
            }
            let (command, _) = peer.command().unwrap();
            let status = Some((0, Residual::None));
            let whole = DataIn { is_final: true, tag: command.tag, number: 0, offset: 0, status };
            let mut bytes = Vec::new();
            append(&mut bytes, whole.encode(peer.with_status()), &[7; 512], peer.digests);
            bytes[if header { HEADER } else { HEADER + DIGEST + 100 }] ^= 1;
            peer.stream.write_all(&bytes).unwrap();
            while peer.receive_raw().is_some() {}
        });
        let both = DigestChoice::Required;
        let initiator = target.connect_with(Options { header_digest: both, data_digest: both, ..options() });
        is_unknown(read(&initiator, &mut [0; 512], LONG), "digest");
        assert_eq!(read(&initiator, &mut [0; 512], LONG), good(512));
    }
}

#[test]
fn a_rejected_command_was_not_sent() {
    let target = Scripted::new(|_, peer| {
        let (header, _) = peer.receive_raw().unwrap();
        peer.expected += 1;
        let sequence = peer.with_status();
        peer.send(Reject(RejectReason::InvalidField).encode(sequence), &header.0);
        peer.serve();
    });
    let initiator = target.connect();
    is_not_sent(write(&initiator, &[0; 512], LONG), "0x09");
    assert_eq!(plain(&initiator, LONG), good(0));
    is_not_sent(initiator.execute(&[0; 17], PathData::None, LONG), "17 bytes");
    is_not_sent(initiator.execute(&[], PathData::None, LONG), "0 bytes");
    is_not_sent(write(&initiator, &vec![0; (4 << 20) + 1], LONG), "more than one command moves");
}

#[test]
fn a_portal_that_is_no_target_ends_the_login_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("iscsi://{}/iqn.2026-01.test:disk/0", listener.local_addr().unwrap());
    let url = Url::parse_with(&url, &|_| None).unwrap();
    let brief = Options { login_time: SHORT, ..options() };
    // Nobody answers.
    let silent = Initiator::connect(&url, brief.clone()).err().unwrap();
    assert!(matches!(silent.cause, ConnectCause::Time(_)), "{silent}");
    assert!(silent.to_string().contains(&url.to_string()));
    drop(listener.accept());
    for (bytes, word) in [
        (&b""[..], "closed"),
        (&b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"[..], ""),
        (&[0x23; 48][..], ""),
        (&[0; 48][..], ""),
        (&[0xFF; 48][..], ""),
        (&[0x21; 20][..], "closed"),
    ] {
        let refused = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(bytes);
            });
            Initiator::connect(&url, Options { login_time: LONG, ..options() }).err().unwrap()
        });
        assert!(refused.to_string().contains(word), "{bytes:?}: {refused}");
        let _ = format!("{}", discover_nothing(&listener, &url, bytes));
    }
}

/// A discovery at a portal that answers with these bytes.
fn discover_nothing(listener: &TcpListener, url: &Url, bytes: &[u8]) -> ConnectError {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(bytes);
        });
        discover(url, &options()).err().unwrap()
    })
}

/// What a fuzzed target does next.
#[derive(Clone, Debug)]
enum Act {
    /// Bytes as they are.
    Noise(Vec<u8>),
    /// A PDU of one kind for the first command, with fields that may be right or wrong.
    Pdu { opcode: u8, flags: u8, own_tag: bool, right_status: bool, words: [u32; 3], length: u16 },
    /// The right answer.
    Right,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let word = prop_oneof![0u32..3, Just(512), Just(4096), any::<u32>()];
    let opcode = prop_oneof![
        prop::sample::select(&[0x20u8, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3F][..]),
        any::<u8>()
    ];
    let pdu = (opcode, any::<u8>(), any::<bool>(), any::<bool>(), [word.clone(), word.clone(), word], 0u16..5000)
        .prop_map(|(opcode, flags, own_tag, right_status, words, length)| Act::Pdu {
            opcode,
            flags,
            own_tag,
            right_status,
            words,
            length,
        });
    let noise = prop::collection::vec(any::<u8>(), 0..200).prop_map(Act::Noise);
    prop::collection::vec(prop_oneof![1 => noise, 8 => pdu, 1 => Just(Act::Right)], 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_target_sends_commands_end_and_the_session_goes_on(acts in acts(), writes: bool) {
        let target = Scripted::new(move |nth, peer| {
            if nth > 0 {
                return peer.serve();
            }
            let Some((command, _)) = peer.command() else { return };
            for act in &acts {
                match act {
                    Act::Noise(bytes) => drop(peer.stream.write_all(bytes)),
                    Act::Right => peer.answer(&command),
                    Act::Pdu { opcode, flags, own_tag, right_status, words, length } => {
                        let mut header = [0; HEADER];
                        (header[0], header[1]) = (*opcode, *flags);
                        let tag = if *own_tag { command.tag } else { words[0] };
                        header[16..20].copy_from_slice(&tag.to_be_bytes());
                        let status = peer.status.wrapping_add(u32::from(!right_status));
                        header[24..28].copy_from_slice(&status.to_be_bytes());
                        for (at, word) in [36, 40, 44].into_iter().zip(words) {
                            header[at..at + 4].copy_from_slice(&word.to_be_bytes());
                        }
                        peer.send(header, &vec![0x55; usize::from(*length)]);
                    }
                }
            }
        });
        let initiator = target.connect();
        let mut memory = vec![0; 4096];
        let result = match writes {
            true => write(&initiator, &memory, LONG),
            false => read(&initiator, &mut memory, LONG),
        };
        if let Ok(answer) = result {
            prop_assert!(answer.transferred <= 4096 && answer.sense.len() <= 252);
        }
        // The first connection has ended by now, or ends when it is used: either way the next command but one gets through.
        let _ = plain(&initiator, LONG);
        prop_assert_eq!(plain(&initiator, LONG), good(0));
    }
}
