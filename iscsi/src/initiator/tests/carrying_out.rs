//! Promises of commands that a target carries out.

use super::*;

#[test]
fn data_and_status_come_together_or_apart_and_residuals_count() {
    let target = Scripted::new(|_, peer| {
        // Status with the data.
        let (command, _) = peer.command().unwrap();
        assert_eq!((command.lun[1], command.expected, command.reads, command.is_final), (1, 8192, true, true));
        peer.answer(&command);
        // Several pieces, and a response.
        let (command, _) = peer.command().unwrap();
        for nth in 0..3 {
            let data = DataIn { is_final: nth == 2, tag: command.tag, number: nth, offset: nth * 1000, status: None };
            peer.data(data, &[nth as u8 + 1; 1000]);
        }
        peer.good(command.tag);
        // Less than was asked for.
        let (command, _) = peer.command().unwrap();
        let status = Some((0, Residual::Underflow(8092)));
        peer.data(DataIn { is_final: true, tag: command.tag, number: 0, offset: 0, status }, &[9; 100]);
        // A check condition.
        let (command, _) = peer.command().unwrap();
        peer.respond(command.tag, 2, Residual::Underflow(8192), &[0x70, 0, 5]);
        // More than was asked for.
        let (command, _) = peer.command().unwrap();
        peer.respond(command.tag, 0, Residual::Overflow(5), &[]);
        peer.serve();
    });
    let initiator = target.connect();
    let mut buffer = vec![0; 8192];
    assert_eq!(read(&initiator, &mut buffer, LONG), good(8192));
    assert!(buffer.iter().all(|byte| *byte == 0x28));
    let mut pieces = vec![0; 3000];
    assert_eq!(read(&initiator, &mut pieces, LONG), good(3000));
    assert!(pieces.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 1000 + 1));
    assert_eq!(read(&initiator, &mut buffer, LONG), good(100));
    let checked = read(&initiator, &mut buffer, LONG).unwrap();
    assert_eq!((checked.status, checked.sense, checked.transferred), (2, vec![0x70, 0, 5], 0));
    assert_eq!(write(&initiator, &[7; 512], LONG), good(512));
    assert_eq!(plain(&initiator, LONG), good(0));
    assert_eq!(read(&initiator, &mut [], LONG), good(0));
    assert!(initiator.end());
    is_not_sent(plain(&initiator, LONG), "ended");
}

#[test]
fn writes_give_what_they_may_at_once_and_the_rest_when_asked() {
    const LENGTH: u32 = 1 << 20;
    let target = Scripted::new(|_, peer| {
        let (command, data) = peer.command().unwrap();
        assert_eq!((command.expected, command.writes, data.len()), (LENGTH, true, 256 << 10));
        let mut all = data;
        // Two at once, each as long as a sequence may be, and the rest.
        for (number, offset, length) in
            [(0, 256 << 10, 300_000), (1, (256 << 10) + 300_000, LENGTH - (256 << 10) - 300_000)]
        {
            let ready = ReadyToTransfer {
                lun: command.lun,
                tag: command.tag,
                transfer_tag: 70 + number,
                number,
                offset,
                length,
            };
            let sequence = peer.without_status();
            peer.send(ready.encode(sequence), &[]);
        }
        for transfer_tag in [70, 71] {
            let mut next = 0;
            loop {
                let (Request::Data(out), data) = peer.receive().unwrap() else { panic!("no data") };
                assert_eq!((out.transfer_tag, out.number, out.offset), (transfer_tag, next, all.len() as u32));
                all.extend(data);
                next += 1;
                if out.is_final {
                    break;
                }
            }
        }
        assert!(all.len() as u32 == LENGTH && all.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
        peer.good(command.tag);
        peer.serve();
    });
    for digests in [DigestChoice::None, DigestChoice::Required] {
        let initiator = target.connect_with(Options { header_digest: digests, data_digest: digests, ..options() });
        let data: Vec<u8> = (0..LENGTH).map(|at| (at % 251) as u8).collect();
        assert_eq!(write(&initiator, &data, LONG), good(LENGTH as usize));
        let mut buffer = vec![0; 200_001];
        assert_eq!(read(&initiator, &mut buffer, LONG), good(200_001));
        assert!(buffer.iter().all(|byte| *byte == 0x28));
    }
}

#[test]
fn many_threads_have_commands_in_flight_at_once_and_each_gets_its_own() {
    const THREADS: usize = 24;
    // Answered last come first served, once all are there.
    let target = Scripted::new(|_, peer| {
        for _ in 0..20 {
            let mut commands: Vec<_> = (0..THREADS).map(|_| peer.command().unwrap().0).collect();
            while let Some(command) = commands.pop() {
                let status = Some((0, Residual::None));
                let data = DataIn { is_final: true, tag: command.tag, number: 0, offset: 0, status };
                peer.data(data, &vec![command.cdb[1]; command.expected as usize]);
            }
        }
        peer.serve();
    });
    let initiator = target.connect();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let initiator = &initiator;
            scope.spawn(move || {
                for round in 0..20 {
                    let mut buffer = vec![0; 512 + 900 * thread];
                    let cdb = [0x28, thread as u8 + round];
                    assert!(initiator.execute(&cdb, PathData::In(&mut buffer), LONG).is_ok());
                    assert!(buffer.iter().all(|byte| *byte == thread as u8 + round));
                }
            });
        }
    });
}

#[test]
fn a_closed_window_holds_commands_back_until_it_opens() {
    let target = Scripted::new(|_, peer| {
        // One at a time.
        peer.window = 1;
        for _ in 0..40 {
            let (command, _) = peer.command().unwrap();
            // Whether another one comes before the answer is checked by its number, which would be beyond the window.
            peer.answer(&command);
        }
        peer.serve();
    });
    let initiator = target.connect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let mut buffer = [0; 64];
                    assert_eq!(read(&initiator, &mut buffer, LONG), good(64));
                }
            });
        }
    });
}

#[test]
fn more_callers_than_commands_take_turns() {
    let target = Scripted::new(|_, peer| peer.serve());
    let initiator = target.connect_with(Options { commands: 2, ..options() });
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(plain(&initiator, LONG), good(0));
                }
            });
        }
    });
}

#[test]
fn pings_are_answered_whether_or_not_anything_is_under_way() {
    let target = Scripted::new(|_, peer| {
        for round in 0..3 {
            let ping = NopIn { lun: [0; 8], tag: NO_TAG, transfer_tag: 500 + round };
            let sequence = peer.without_status();
            peer.send(ping.encode(sequence), &[]);
        }
        let (mut next, mut held) = (500, None);
        while next < 503 || held.is_none() {
            match peer.receive().unwrap().0 {
                Request::Nop(nop) => {
                    assert_eq!((nop.tag, nop.transfer_tag), (NO_TAG, next));
                    next += 1;
                }
                Request::Command(command) => held = Some(command),
                other => panic!("neither: {other:?}"),
            }
        }
        peer.answer(&held.unwrap());
        peer.serve();
    });
    let initiator = target.connect();
    assert_eq!(plain(&initiator, LONG), good(0));
}

#[test]
fn a_silent_target_is_pinged_and_given_up_when_it_stays_silent() {
    let target = Scripted::new(|nth, peer| {
        match nth {
            // The ping is heard and not answered.
            0 => while peer.receive_raw().is_some() {},
            _ => peer.serve(),
        }
    });
    let quick = Options { ping_after: SHORT, ping_time: SHORT, ..options() };
    let initiator = target.connect_with(quick);
    is_unknown(plain(&initiator, LONG), "silent");
    assert_eq!(plain(&initiator, LONG), good(0), "the connection is had again");
}

#[test]
fn a_reset_ends_the_other_commands() {
    let target = Scripted::new(|_, peer| {
        let (_, _) = peer.command().unwrap();
        let (Request::Task(task), _) = peer.receive().unwrap() else { panic!("no reset") };
        assert_eq!((task.function, task.lun[1]), (5, 1));
        let sequence = peer.with_status();
        peer.send(TaskManagementAnswer { tag: task.tag, response: 0 }.encode(sequence), &[]);
        let (Request::Task(task), _) = peer.receive().unwrap() else { panic!("no reset") };
        let sequence = peer.with_status();
        peer.send(TaskManagementAnswer { tag: task.tag, response: 5 }.encode(sequence), &[]);
        peer.serve();
    });
    let initiator = target.connect();
    std::thread::scope(|scope| {
        // It receives for all, and hears by itself that it has ended: its own time is never over.
        let reader = scope.spawn(|| read(&initiator, &mut [0; 512], Duration::from_secs(3600)));
        let is_receiving = || {
            let core = initiator.shared.core.lock();
            core.tasks.next_number() != 1 && core.inbox.is_none()
        };
        while !is_receiving() {
            std::thread::yield_now();
        }
        initiator.reset(Reset::LogicalUnit, LONG).unwrap();
        is_unknown(reader.join().unwrap(), "reset");
    });
    is_not_sent(initiator.reset(Reset::TargetWarm, LONG), "does not have this function");
    assert_eq!(plain(&initiator, LONG), good(0));
}
