//! Promises of commands as futures.

use std::cell::Cell;
use std::rc::Rc;

use super::*;

/// Runs `work` with a session that is driven beside it, all on one thread.
fn drive<F: Future<Output = ()>>(initiator: Initiator, work: impl FnOnce(Rc<Initiator>) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let initiator = Rc::new(initiator);
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let driven = initiator.clone();
        let driver = tokio::task::spawn_local(async move { driven.drive().await });
        work(initiator).await;
        driver.abort();
    });
}

fn always() -> bool {
    true
}

#[test]
fn many_commands_of_one_thread_are_in_flight_at_once_beside_those_of_other_threads() {
    const FUTURES: usize = 24;
    // Answered last come first served, once all are there.
    let target = Scripted::new(|_, peer| {
        for _ in 0..20 {
            let mut commands: Vec<_> = (0..FUTURES + 1).map(|_| peer.command().unwrap().0).collect();
            while let Some(command) = commands.pop() {
                let status = Some((0, Residual::None));
                let data = DataIn { is_final: true, tag: command.tag, number: 0, offset: 0, status };
                peer.data(data, &vec![command.cdb[1]; command.expected as usize]);
            }
        }
        peer.serve();
    });
    drive(target.connect(), |initiator| async move {
        let shared = initiator.shared.clone();
        let thread = std::thread::spawn(move || {
            for round in 0..20 {
                let mut buffer = vec![0; 5000];
                assert!(shared.execute(&[0x28, 100 + round], PathData::In(&mut buffer), LONG).is_ok());
                assert!(buffer.iter().all(|byte| *byte == 100 + round));
            }
        });
        let futures: Vec<_> = (0..FUTURES)
            .map(|nth| {
                let initiator = initiator.clone();
                tokio::task::spawn_local(async move {
                    let mut memory = vec![0; 512 + 900 * nth];
                    for round in 0..20 {
                        let cdb = [0x28, nth as u8 + round];
                        let (answer, back) = initiator.perform(&cdb, Data::In(memory), LONG, &always).await;
                        assert_eq!(answer, good(512 + 900 * nth));
                        assert!(back.len() == 512 + 900 * nth && back.iter().all(|byte| *byte == nth as u8 + round));
                        memory = back;
                    }
                })
            })
            .collect();
        for future in futures {
            future.await.unwrap();
        }
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    });
}

#[test]
fn a_target_that_first_wants_its_own_data_taken_is_no_standstill() {
    const LENGTH: u32 = 16 << 20;
    let target = Scripted::new(|_, peer| {
        let (reading, _) = peer.command().unwrap();
        let (writing, first) = peer.command().unwrap();
        // All of the data that are still wanted are asked for, and more than any socket keeps is sent, before any of them is received.
        let (mut offset, mut number) = (first.len() as u32, 0);
        let mut wanted = Vec::new();
        while offset < LENGTH {
            let length = (LENGTH - offset).min(1 << 18);
            wanted.push(ReadyToTransfer {
                lun: writing.lun,
                tag: writing.tag,
                transfer_tag: number,
                number,
                offset,
                length,
            });
            (offset, number) = (offset + length, number + 1);
        }
        let mut wanted = wanted.into_iter();
        let mut received = first;
        for nth in 0..LENGTH >> 18 {
            if let Some(ready) = wanted.next() {
                let sequence = peer.without_status();
                peer.send(ready.encode(sequence), &[]);
            }
            // As long as this is not taken nothing is received.
            let status = ((nth + 1) << 18 == LENGTH).then_some((0, Residual::None));
            let is_final = status.is_some();
            let data = DataIn { is_final, tag: reading.tag, number: nth, offset: nth << 18, status };
            peer.data(data, &[5; 1 << 18]);
            while (received.len() as u32) < LENGTH {
                let (Request::Data(out), data) = peer.receive().unwrap() else { panic!("no data") };
                assert_eq!(out.offset, received.len() as u32);
                received.extend(data);
                if out.is_final {
                    break;
                }
            }
        }
        assert!(received.len() as u32 == LENGTH && received.iter().enumerate().all(|(at, byte)| *byte == at as u8));
        peer.good(writing.tag);
        peer.serve();
    });
    let options = Options { max_transfer: LENGTH as usize, ..options() };
    drive(target.connect_with(options), |initiator| async move {
        let out: Vec<u8> = (0..LENGTH).map(|at| at as u8).collect();
        let reading = initiator.perform(&[0x28], Data::In(vec![0; LENGTH as usize]), LONG, &always);
        let writing = initiator.perform(&[0x2A], Data::Out(out), LONG, &always);
        let ((read, memory), (written, _)) = tokio::join!(reading, writing);
        assert_eq!((read, written), (good(LENGTH as usize), good(LENGTH as usize)));
        assert!(memory.iter().all(|byte| *byte == 5));
    });
}

#[test]
fn a_lost_connection_leaves_what_was_in_flight_unknown_and_the_next_one_goes_on() {
    let target = Scripted::new(|nth, peer| {
        if nth > 0 {
            return peer.serve();
        }
        peer.command().unwrap();
        peer.command().unwrap();
    });
    drive(target.connect(), |initiator| async move {
        let first = initiator.perform(&[0x28], Data::In(vec![0; 512]), LONG, &always);
        let second = initiator.perform(&[0x2A], Data::Out(vec![1; 512]), LONG, &always);
        let ((first, memory), (second, data)) = tokio::join!(first, second);
        assert_eq!((memory.len(), data.len()), (512, 512), "each has its memory back");
        is_unknown(first, "closed");
        is_unknown(second, "closed");
        let (third, memory) = initiator.perform(&[0x28], Data::In(vec![0; 512]), LONG, &always).await;
        assert_eq!((third, memory), (good(512), vec![0x28; 512]));
    });
}

#[test]
fn what_may_not_be_sent_any_more_is_not_and_is_asked_last() {
    let target = Scripted::new(|_, peer| peer.serve());
    drive(target.connect(), |initiator| async move {
        let asked = Cell::new(0);
        let never = || {
            asked.set(asked.get() + 1);
            false
        };
        let (answer, memory) = initiator.perform(&[0x2A], Data::Out(vec![1; 512]), LONG, &never).await;
        is_not_sent(answer, "may not be sent");
        assert_eq!((memory.len(), asked.get()), (512, 1));
        let (answer, _) = initiator.perform(&[0; 6], Data::None, LONG, &always).await;
        assert_eq!(answer, good(0));
        let (answer, memory) = initiator.perform(&[0; 17], Data::Out(vec![1; 512]), LONG, &always).await;
        is_not_sent(answer, "17 bytes");
        assert_eq!(memory.len(), 512);
    });
}

#[test]
fn a_late_command_is_aborted_and_one_that_is_forgotten_costs_the_connection() {
    let target = Scripted::new(|nth, peer| match nth {
        0 => {
            let (command, _) = peer.command().unwrap();
            let (Request::Task(task), _) = peer.receive().unwrap() else { panic!("no abort") };
            assert_eq!((task.function, task.referenced), (1, command.tag));
            let sequence = peer.with_status();
            peer.send(TaskManagementAnswer { tag: task.tag, response: 0 }.encode(sequence), &[]);
            while peer.receive_raw().is_some() {}
        }
        _ => peer.serve(),
    });
    drive(target.connect_with(Options { abort_time: LONG, ..options() }), |initiator| async move {
        let (late, _) = initiator.perform(&[0x28], Data::In(vec![0; 512]), SHORT, &always).await;
        is_unknown(late, "aborted");
        let forgotten = initiator.perform(&[0x28], Data::In(vec![0; 512]), LONG, &always);
        assert!(tokio::time::timeout(SHORT, forgotten).await.is_err());
        let (next, memory) = initiator.perform(&[0x28], Data::In(vec![0; 512]), LONG, &always).await;
        assert_eq!((next, memory), (good(512), vec![0x28; 512]), "over another connection");
    });
}
