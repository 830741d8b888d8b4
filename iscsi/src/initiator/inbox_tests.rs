//! Promises of cutting a stream into PDUs: however it comes, and whatever is in it.

use std::io::Write;
use std::net::TcpListener;
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::pdu::append;

const LIMIT: usize = 40_000;

/// An inbox, and what it receives from.
fn pair(digests: Digests) -> (Inbox, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut inbox = Inbox::new(Arc::new(listener.accept().unwrap().0), LIMIT, LIMIT);
    inbox.set_tick(Duration::from_millis(50)).unwrap();
    inbox.agree(digests, LIMIT, LIMIT);
    (inbox, sender)
}

fn next(inbox: &mut Inbox) -> Result<Header, Broken> {
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(header) = inbox.whole()? {
            return Ok(header);
        }
        assert!(Instant::now() < patience, "nothing comes");
    }
}

#[test]
fn what_is_wrong_is_refused_by_its_name() {
    let both = Digests { header: true, data: true };
    let mut good = Vec::new();
    append(&mut good, [0; 48], b"data", both);
    for (at, name) in [(9, "a header"), (48, "a header"), (53, "data"), (57, "data")] {
        let (mut inbox, mut sender) = pair(both);
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        sender.write_all(&bad).unwrap();
        assert!(matches!(next(&mut inbox), Err(Broken::Digest(what)) if what == name), "{at}");
    }
    let (mut inbox, mut sender) = pair(Digests::default());
    sender.write_all(&[0xFF; 48]).unwrap();
    assert!(matches!(next(&mut inbox), Err(Broken::TooLong(0x00FF_FFFF))));
    let (mut inbox, mut sender) = pair(Digests::default());
    sender.write_all(&[0; 20]).unwrap();
    drop(sender);
    assert!(matches!(next(&mut inbox), Err(Broken::Closed)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn pdus_come_out_as_they_went_in_however_they_are_cut(
        lengths in prop::collection::vec((0usize..LIMIT, 0u8..3), 1..6),
        cuts in prop::collection::vec(1usize..9000, 1..20),
        header: bool,
        data: bool,
    ) {
        let digests = Digests { header, data };
        let mut stream = Vec::new();
        for (nth, (length, extra)) in lengths.iter().enumerate() {
            let mut head = [nth as u8; 48];
            head[4] = *extra;
            head[5..8].copy_from_slice(&(*length as u32).to_be_bytes()[1..]);
            // Additional headers count for the header's digest.
            let start = stream.len();
            stream.extend_from_slice(&head);
            stream.resize(start + 48 + usize::from(*extra) * 4, 0xAA);
            if header {
                let sum = digest(&stream[start..]);
                stream.extend_from_slice(&sum);
            }
            let start = stream.len();
            stream.extend((0..*length).map(|at| (at * 7 + nth) as u8));
            crate::pdu::finish(&mut stream, start, digests);
        }
        let (mut inbox, mut sender) = pair(digests);
        std::thread::scope(|scope| -> Result<(), TestCaseError> {
            scope.spawn(move || {
                let mut rest = &stream[..];
                for cut in cuts.iter().cycle() {
                    let (now, later) = rest.split_at((*cut).min(rest.len()));
                    sender.write_all(now).unwrap();
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
            });
            for (nth, (length, _)) in lengths.iter().enumerate() {
                let header = next(&mut inbox).unwrap();
                prop_assert_eq!((header.0[0], header.data_length()), (nth as u8, *length));
                prop_assert!(inbox.small.iter().enumerate().all(|(at, byte)| *byte == (at * 7 + nth) as u8));
                prop_assert_eq!(inbox.small.len(), *length);
            }
            Ok(())
        })?;
    }
}
