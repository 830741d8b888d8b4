//! Promises of commands that get no answer, of lost connections, and of the end of a session.

use super::*;

fn abort(peer: &mut Peer, of: u32, response: u8) {
    let (Request::Task(task), _) = peer.receive().unwrap() else { panic!("no abort") };
    assert_eq!((task.function, task.referenced), (1, of));
    let sequence = peer.with_status();
    peer.send(TaskManagementAnswer { tag: task.tag, response }.encode(sequence), &[]);
}

#[test]
fn a_late_command_is_aborted_and_unknown_unless_that_proves_that_nothing_was_done() {
    let target = Scripted::new(|nth, peer| {
        if nth > 0 {
            return peer.serve();
        }
        let (command, _) = peer.command().unwrap();
        abort(peer, command.tag, 0);
        // One that was answered while the abort was under way.
        let (command, _) = peer.command().unwrap();
        let (Request::Task(task), _) = peer.receive().unwrap() else { panic!("no abort") };
        peer.good(command.tag);
        // The two answers do not come in one segment: nobody may take the first for the end of it.
        std::thread::sleep(Duration::from_millis(50));
        let sequence = peer.with_status();
        peer.send(TaskManagementAnswer { tag: task.tag, response: 1 }.encode(sequence), &[]);
        // A write that got none of its data out.
        let (command, data) = peer.command().unwrap();
        assert!(data.is_empty());
        abort(peer, command.tag, 0);
        // One that did.
        let (command, _) = peer.command().unwrap();
        abort(peer, command.tag, 0);
        // A target that does not abort.
        let (command, _) = peer.command().unwrap();
        abort(peer, command.tag, 5);
        while peer.receive_raw().is_some() {}
    });
    let initiator = target.connect_with(Options { abort_time: LONG, ..options() });
    is_unknown(read(&initiator, &mut [0; 512], SHORT), "aborted");
    assert_eq!(plain(&initiator, SHORT), good(0));
    initiator.shared.wire.lock().agreed.immediate_data = false;
    initiator.shared.wire.lock().agreed.initial_ready = true;
    is_not_sent(write(&initiator, &[0; 512], SHORT), "before any of its data");
    initiator.shared.wire.lock().agreed.immediate_data = true;
    is_unknown(write(&initiator, &[0; 512], SHORT), "aborted");
    is_unknown(plain(&initiator, SHORT), "does not abort it");
    assert_eq!(plain(&initiator, LONG), good(0), "over another connection");
}

#[test]
fn a_target_that_answers_nothing_costs_the_connection() {
    let target = Scripted::new(|nth, peer| match nth {
        0 => while peer.receive_raw().is_some() {},
        _ => peer.serve(),
    });
    let initiator = target.connect();
    is_unknown(read(&initiator, &mut [0; 512], SHORT), "abort");
    assert_eq!(plain(&initiator, LONG), good(0));
}

#[test]
fn a_target_that_takes_nothing_more_costs_the_connection() {
    let (is_enough, enough) = std::sync::mpsc::channel::<()>();
    let target = Scripted::new(move |nth, peer| match nth {
        0 => {
            let (command, data) = peer.command().unwrap();
            let length = 4 << 20;
            for number in 0..3 {
                let offset = data.len() as u32 + number * length;
                let ready =
                    ReadyToTransfer { lun: command.lun, tag: command.tag, transfer_tag: 1, number, offset, length };
                let sequence = peer.without_status();
                peer.send(ready.encode(sequence), &[]);
            }
            // It reads no more.
            let _ = enough.recv_timeout(LONG);
        }
        _ => peer.serve(),
    });
    let initiator = target.connect_with(Options { max_transfer: 32 << 20, ..options() });
    is_unknown(write(&initiator, &vec![0; 15 << 20], SHORT), "takes no data");
    is_enough.send(()).unwrap();
    assert_eq!(plain(&initiator, LONG), good(0));
}

#[test]
fn what_was_in_flight_at_a_loss_is_unknown_and_what_was_not_goes_out_later() {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let seen = sent.clone();
    let target = Scripted::new(move |nth, peer| {
        while let Some((command, _)) = peer.command() {
            seen.lock().unwrap().push((nth, command.cdb[0]));
            if nth == 0 {
                return;
            }
            peer.answer(&command);
        }
    });
    let initiator = target.connect();
    is_unknown(write(&initiator, &[1; 512], LONG), "closed");
    assert_eq!(plain(&initiator, LONG), good(0));
    // Nothing is sent twice.
    assert_eq!(*sent.lock().unwrap(), [(0, 0x2A), (1, 0)]);
}

#[test]
fn without_a_connection_commands_fail_as_not_sent_when_patience_ends() {
    let target = Scripted::new(|_, peer| {
        peer.command();
    });
    let initiator = target.connect_with(Options { patience: SHORT, longest_pause: SHORT, ..options() });
    let url = target.url.clone();
    is_unknown(plain(&initiator, LONG), "closed");
    drop(target);
    // It may have connected once more before the target went, and not know that this connection has ended too.
    let why = match plain(&initiator, LONG) {
        Err(PathError::Unknown(_)) => plain(&initiator, LONG),
        first => first,
    };
    is_not_sent(why.clone(), "no connection");
    assert!(format!("{why:?}").contains(&url.to_string()), "the path is named");
    assert!(!initiator.end(), "nothing is proven without the target");
    // Without waiting for a first connection.
    let later = Initiator::start(&url, Options { patience: SHORT, ..options() }).unwrap();
    is_not_sent(plain(&later, LONG), "no connection");
    assert!(later.state().is_err());
    let refused = Initiator::connect(&url, options()).err().unwrap();
    assert!(matches!(refused.cause, ConnectCause::Connect(_)), "{refused}");
}

#[test]
fn the_end_is_proven_by_a_logout_or_by_taking_the_sessions_place() {
    // Acknowledged, with a command in flight.
    let target = Scripted::new(|_, peer| {
        peer.command().unwrap();
        assert!(peer.command().is_none(), "a logout");
    });
    let initiator = target.connect();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&initiator, &mut [0; 512], LONG));
        while initiator.shared.core.lock().tasks.next_number() == 1 {
            std::thread::yield_now();
        }
        assert!(initiator.end());
        is_unknown(reader.join().unwrap(), "logged out");
    });
    assert!(initiator.end(), "it stays ended");
    // A target that closes instead: the login of the same port proves it.
    let logins = Arc::new(AtomicU32::new(0));
    let counted = logins.clone();
    let target = Scripted::new(move |nth, peer| {
        counted.fetch_add(1, Ordering::SeqCst);
        match nth {
            0 => drop(peer.receive_raw()),
            _ => peer.serve(),
        }
    });
    let initiator = target.connect();
    assert!(initiator.end());
    assert_eq!(logins.load(Ordering::SeqCst), 2);
    // A logout that is refused proves nothing by itself.
    let target = Scripted::new(|nth, peer| {
        let (Request::Logout(logout), _) = peer.receive().unwrap() else { panic!("no logout") };
        let sequence = peer.with_status();
        peer.send(LogoutResponse { tag: logout.tag, response: if nth == 0 { 3 } else { 0 } }.encode(sequence), &[]);
    });
    assert!(target.connect().end());
}

#[test]
fn a_target_that_asks_for_a_logout_gets_one_and_the_session_goes_on() {
    let target = Scripted::new(|nth, peer| {
        if nth == 0 {
            let (command, _) = peer.command().unwrap();
            let sequence = peer.with_status();
            peer.send(AsyncMessage { event: 1, seconds: 5 }.encode(sequence), &[]);
            peer.answer(&command);
            // What comes now waits for the next connection.
            assert!(peer.command().is_none(), "a logout");
        } else {
            peer.serve();
        }
    });
    let initiator = target.connect();
    for _ in 0..10 {
        assert_eq!(plain(&initiator, LONG), good(0));
    }
}
