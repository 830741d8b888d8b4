//! What initiators must not do, in the full feature phase and by going away: each item with its section of RFC 7143. The login's items are
//! those of `iscsi::login`, those of CHAP are there too.

use super::*;

/// What comes of a wrong PDU.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// A Reject with this reason (11.17.1); the session goes on.
    Rejected(u8),
    /// An answer of this operation with this byte 2; the session goes on.
    Answered(u8, u8),
    /// CHECK CONDITION with ABORTED COMMAND and these additional sense bytes; the session goes on.
    Failed(u8, u8),
    /// Nothing at all; the session goes on.
    Ignored,
    /// The connection ends.
    Dropped,
}

/// A name with its section, what is sent, what comes of it.
type Item = (&'static str, fn(&mut RawInitiator), Outcome);

/// A write of one block at block 9, with its flags, length and immediate data.
fn write(session: &mut RawInitiator, flags: u8, expected: u32, data: &[u8]) -> [u8; 48] {
    let mut header = session.header(0x01, flags);
    header[20..24].copy_from_slice(&expected.to_be_bytes());
    header[32..42].copy_from_slice(&[0x2A, 0, 0, 0, 0, 9, 0, 0, 1, 0]);
    session.wire.send(header, data).unwrap();
    header
}

/// Waits for the R2T of a write and gives its Data-Out, of the whole block, to be spoiled.
fn data_out(session: &mut RawInitiator) -> [u8; 48] {
    let command = write(session, 0xA1, 512, &[]);
    let (ready, _) = session.wire.receive().unwrap();
    assert_eq!(ready[0] & 0x3F, 0x31, "an R2T");
    let mut header = [0; 48];
    header[..2].copy_from_slice(&[0x05, 0x80]);
    header[16..20].copy_from_slice(&command[16..20]);
    header[20..24].copy_from_slice(&ready[20..24]);
    header
}

fn send(session: &mut RawInitiator, header: [u8; 48], data: &[u8]) {
    session.wire.send(header, data).unwrap();
}

const ITEMS: [Item; 25] = [
    (
        "11.2.1.2: an operation that there is not",
        |it| {
            let pdu = it.header(0x5E, 0x80);
            send(it, pdu, &[])
        },
        Outcome::Rejected(0x05),
    ),
    (
        "11.2.1.2: an operation of targets",
        |it| {
            let pdu = it.header(0x65, 0x80);
            send(it, pdu, &[])
        },
        Outcome::Rejected(0x05),
    ),
    (
        "11.16: SNACK at error recovery level 0",
        |it| {
            let pdu = it.header(0x50, 0x80);
            send(it, pdu, &[])
        },
        Outcome::Rejected(0x03),
    ),
    (
        "11.12: a login after the login",
        |it| {
            let pdu = it.header(0x43, 0x87);
            send(it, pdu, b"InitiatorName=iqn.x\0")
        },
        Outcome::Rejected(0x04),
    ),
    (
        "11.10.2: text that is final and goes on",
        |it| {
            let pdu = it.header(0x44, 0xC0);
            send(it, pdu, b"A=B\0")
        },
        Outcome::Rejected(0x09),
    ),
    (
        "11.10.4: the rest of a text that nobody has",
        |it| {
            let mut pdu = it.header(0x44, 0x80);
            pdu[20..24].copy_from_slice(&[0, 0, 0, 9]);
            send(it, pdu, &[]);
        },
        Outcome::Rejected(0x09),
    ),
    (
        "6.1: text that is none",
        |it| {
            let pdu = it.header(0x44, 0x80);
            send(it, pdu, b"SendTargets")
        },
        Outcome::Rejected(0x09),
    ),
    (
        "6.4: a key that cannot be asked for here",
        |it| {
            let pdu = it.header(0x44, 0x80);
            send(it, pdu, b"MaxBurstLength=512\0")
        },
        Outcome::Answered(0x24, 0),
    ),
    (
        "11.5.1: a function that there is not",
        |it| {
            let pdu = it.header(0x42, 0x80 | 0x7F);
            send(it, pdu, &[])
        },
        Outcome::Answered(0x22, 5),
    ),
    (
        "11.5.1: the abort of a task that there is not",
        |it| {
            let pdu = it.header(0x42, 0x81);
            send(it, pdu, &[])
        },
        Outcome::Answered(0x22, 1),
    ),
    (
        "11.5.1: TASK REASSIGN at error recovery level 0",
        |it| {
            let pdu = it.header(0x42, 0x88);
            send(it, pdu, &[])
        },
        Outcome::Answered(0x22, 4),
    ),
    (
        "11.14.1: the logout of another connection",
        |it| {
            let mut pdu = it.header(0x46, 0x81);
            pdu[20..22].copy_from_slice(&[0, 77]);
            send(it, pdu, &[]);
        },
        Outcome::Answered(0x26, 1),
    ),
    (
        "11.14.1: a logout for recovery",
        |it| {
            let pdu = it.header(0x46, 0x82);
            send(it, pdu, &[])
        },
        Outcome::Answered(0x26, 2),
    ),
    (
        "11.3.1: data both ways",
        |it| {
            write(it, 0xE1, 512, &[]);
        },
        Outcome::Answered(0x21, 1),
    ),
    (
        "4.2.2.1: a command number that was used",
        |it| {
            let mut pdu = it.header(0x41, 0x81);
            pdu[0] = 0x01;
            pdu[24..28].copy_from_slice(&[0, 0, 0, 1]);
            send(it, pdu, &[]);
        },
        Outcome::Ignored,
    ),
    (
        "4.2.2.1: a command number beyond the window",
        |it| {
            let mut pdu = it.header(0x41, 0x81);
            pdu[0] = 0x01;
            pdu[24] = 0x20;
            send(it, pdu, &[]);
        },
        Outcome::Ignored,
    ),
    (
        "11.7: data of a task that there is not",
        |it| {
            let pdu = it.header(0x45, 0x80);
            send(it, pdu, &[7; 512])
        },
        Outcome::Ignored,
    ),
    (
        "11.4.7.2: more immediate data than were announced",
        |it| {
            write(it, 0xA1, 512, &[7; 1024]);
        },
        Outcome::Failed(0x0C, 0x0C),
    ),
    (
        "11.3.1: unsolicited data where InitialR2T=Yes",
        |it| {
            write(it, 0x21, 512, &[7; 256]);
        },
        Outcome::Failed(0x0C, 0x0C),
    ),
    (
        "11.7.4: data with the tag of no R2T",
        |it| {
            let mut pdu = data_out(it);
            pdu[23] ^= 0x40;
            send(it, pdu, &[7; 512])
        },
        Outcome::Failed(0x4B, 0x00),
    ),
    (
        "11.7.5: data with a number of their own",
        |it| {
            let mut pdu = data_out(it);
            pdu[39] = 3;
            send(it, pdu, &[7; 512])
        },
        Outcome::Failed(0x4B, 0x00),
    ),
    (
        "11.7.6: data at another offset",
        |it| {
            let mut pdu = data_out(it);
            pdu[42] = 1;
            send(it, pdu, &[7; 256])
        },
        Outcome::Failed(0x4B, 0x00),
    ),
    (
        "11.7.1: a sequence that ends early",
        |it| {
            let pdu = data_out(it);
            send(it, pdu, &[7; 100])
        },
        Outcome::Failed(0x0C, 0x0D),
    ),
    (
        "4.2.2.1: a command number was left out",
        |it| {
            it.header(0x01, 0x81);
            let pdu = it.header(0x01, 0x81);
            send(it, pdu, &[])
        },
        Outcome::Dropped,
    ),
    (
        "13.12: more data than MaxRecvDataSegmentLength",
        |it| {
            let mut pdu = it.header(0x40, 0x80);
            pdu[5..8].fill(0xFF);
            it.wire.send_bytes(&pdu).unwrap();
        },
        Outcome::Dropped,
    ),
];

#[test]
fn each_wrong_pdu_has_the_outcome_of_its_section_and_writes_nothing() {
    let target = Target::start("");
    let mut other = RawInitiator::log_in_port(&target.portals[1], NAME, "", 9);
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
    for (item, wrong, outcome) in ITEMS {
        wrong(&mut session);
        if matches!(outcome, Outcome::Dropped) {
            assert!(session.wire.has_ended(), "{item}");
            session = RawInitiator::log_in(&target.portals[0], NAME, "");
        } else if !matches!(outcome, Outcome::Ignored) {
            let (answer, data) = session.wire.receive().unwrap_or_else(|error| panic!("{item}: {error}"));
            let (operation, byte) = (answer[0] & 0x3F, answer[2]);
            match outcome {
                Outcome::Rejected(reason) => assert_eq!((operation, byte), (0x3F, reason), "{item}"),
                Outcome::Answered(kind, response) => assert_eq!((operation, byte), (kind, response), "{item}"),
                Outcome::Failed(code, qualifier) => {
                    assert_eq!((operation, answer[3]), (0x21, 2), "{item}");
                    assert_eq!((data[4] & 0x0F, data[14], data[15]), (0x0B, code, qualifier), "{item}");
                }
                Outcome::Ignored | Outcome::Dropped => unreachable!(),
            }
        }
        // The next answer is of this command: nothing else was on its way.
        assert_eq!(session.check_read(&[0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], 512), [0; 512], "{item}");
        assert_eq!(other.check_read(&[0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], 512), [0; 512], "{item}");
    }
    drop((session, other));
    target.stop();
}

#[test]
fn a_tag_that_is_in_use_is_rejected_and_its_task_goes_on() {
    let target = Target::start("");
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
    let out = data_out(&mut session);
    // 11.17.1, reason 7: task in progress.
    let mut again = session.header(0x01, 0x81);
    again[16..20].copy_from_slice(&out[16..20]);
    send(&mut session, again, &[]);
    let (answer, _) = session.wire.receive().unwrap();
    assert_eq!((answer[0] & 0x3F, answer[2]), (0x3F, 0x07));
    send(&mut session, out, &[7; 512]);
    let (answer, _) = session.wire.receive().unwrap();
    assert_eq!((answer[0] & 0x3F, answer[3]), (0x21, 0));
    assert_eq!(session.check_read(&[0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], 512), [7; 512]);
    drop(session);
    target.stop();
}

/// Memory in use, sessions, connections that have not logged in.
fn in_use(target: &Target) -> [u64; 3] {
    let told = target.status();
    ["memory", "sessions", "arrivals"].map(|what| told[what][1].as_u64().unwrap())
}

#[test]
fn who_goes_away_in_any_state_leaves_nothing_behind() {
    let target = Target::start("");
    let disk = || fs::read(target.folder.path().join("disk.img")).unwrap();
    let portal = &target.portals[0];
    let session = || RawInitiator::log_in(portal, NAME, "");
    let connection = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(portal).unwrap();
        stream.write_all(bytes).unwrap();
    };
    // 4.3: before and within the login.
    connection(&[]);
    connection(&[0x43, 0x87, 0, 0, 0]);
    let mut login = [0; 48];
    login[..2].copy_from_slice(&[0x43, 0x81]);
    login[6..8].copy_from_slice(&[1, 0]);
    connection(&login);
    // Within the security stage, after the answer to its first request.
    let mut stream = TcpStream::connect(portal).unwrap();
    let text = format!("InitiatorName=iqn.2026-01.test:raw\0TargetName={NAME}\0AuthMethod=None\0");
    let mut first = [0; 48];
    first[..2].copy_from_slice(&[0x43, 0x00]);
    first[7] = text.len() as u8;
    stream.write_all(&first).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream.write_all(&vec![0; text.len().next_multiple_of(4) - text.len()]).unwrap();
    stream.read_exact(&mut [0; 48]).unwrap();
    drop(stream);
    // Within a header, within immediate data, within large ones that are on the way to their place.
    session().wire.send_bytes(&[0x01, 0xA1, 0, 0]).unwrap();
    for length in [512u32, 128 << 10] {
        let mut it = session();
        let mut header = it.header(0x01, 0xA1);
        header[20..24].copy_from_slice(&length.to_be_bytes());
        header[4..8].copy_from_slice(&length.to_be_bytes());
        header[32..42].copy_from_slice(&[0x2A, 0, 0, 0, 0, 9, 0, 1, 0, 0]);
        it.wire.send_bytes(&header).unwrap();
        it.wire.send_bytes(&vec![7; length as usize - 100]).unwrap();
    }
    // With an R2T that is not answered, and within its answer.
    data_out(&mut session());
    let mut it = session();
    let mut out = data_out(&mut it);
    out[6] = 2;
    it.wire.send_bytes(&out).unwrap();
    it.wire.send_bytes(&[7; 300]).unwrap();
    drop(it);
    // With answers that nobody takes: 8 reads of 4 MiB.
    let mut it = session();
    for _ in 0..8 {
        let mut header = it.header(0x01, 0xC1);
        header[20..24].copy_from_slice(&(4u32 << 20).to_be_bytes());
        header[32..42].copy_from_slice(&[0x28, 0, 0, 0, 0, 0, 0, 0x20, 0, 0]);
        send(&mut it, header, &[]);
    }
    drop(it);
    // After a logout was asked for, without waiting for the answer (11.14).
    let mut it = session();
    let header = it.header(0x46, 0x80);
    send(&mut it, header, &[]);
    drop(it);
    wait_for("everything to be given back", || in_use(&target) == [0, 0, 0]);
    assert!(disk().iter().all(|byte| *byte == 0), "nothing was written that was not complete");
    session().check_write(&[0x2A, 0, 0, 0, 0, 9, 0, 0, 1, 0], &[7; 512]);
    target.stop();
}

#[test]
fn connections_that_never_log_in_do_not_keep_others_out() {
    let target = Target::start("");
    let most = target.status()["arrivals"][0].as_u64().unwrap() as usize;
    let silent: Vec<TcpStream> = (0..most + 20).map(|_| TcpStream::connect(&target.portals[0]).unwrap()).collect();
    let log = || fs::read_to_string(target.folder.path().join("log")).unwrap();
    wait_for("the oldest ones to make room", || log().contains("the oldest one is closed"));
    assert!(in_use(&target)[2] <= most as u64);
    let mut session = RawInitiator::log_in(&target.portals[0], NAME, "");
    session.check_read(&[0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], 512);
    let mut oldest = &silent[0];
    oldest.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(oldest.read(&mut [0; 48]).unwrap(), 0);
    // The others are given up after a while (4.3 leaves the time to the target).
    wait_for("the others to be given up", || in_use(&target)[2] == 0);
    drop((session, silent));
    target.stop();
}
