//! Promises of the table of tasks against a target that says anything.

use proptest::prelude::*;

use super::*;

fn begun(count: usize) -> Tasks {
    let mut tasks = Tasks::new(count);
    let agreed = Agreed { outstanding: 2, burst: 8192, ..Agreed::default() };
    tasks.begin(agreed, Sequence { status: 9, expected: 1, most: 64 });
    tasks
}

fn sent(tasks: &mut Tasks, work: Work, expected: u32) -> (usize, u32) {
    let (slot, tag) = tasks.open(work, expected).expect("a slot");
    tasks.send(slot).expect("a turn");
    (slot, tag)
}

fn data(tag: u32, number: u32, offset: u32, status: Option<(u8, Residual)>) -> DataIn {
    DataIn { is_final: true, tag, number, offset, status }
}

fn ready(tag: u32, number: u32, offset: u32, length: u32) -> ReadyToTransfer {
    ReadyToTransfer { lun: [0; 8], tag, transfer_tag: 7, number, offset, length }
}

fn response(tag: u32) -> ScsiResponse {
    ScsiResponse { tag, response: 0, status: 0, data_count: 0, residual: Residual::None }
}

#[test]
fn data_come_in_order_and_not_beyond_what_was_asked_for() {
    let mut tasks = begun(4);
    let (slot, tag) = sent(&mut tasks, Work::Read, 1024);
    let first = data(tag, 0, 0, None);
    assert_eq!(tasks.take_data(&first, 512).unwrap(), slot);
    tasks.end_data(slot, &first, 512);
    for wrong in [data(tag, 0, 512, None), data(tag, 2, 512, None), data(tag, 1, 0, None), data(tag, 1, 1024, None)] {
        assert!(tasks.take_data(&wrong, 512).is_err(), "{wrong:?}");
    }
    assert!(tasks.take_data(&data(tag, 1, 512, None), 513).is_err(), "too much");
    let last = data(tag, 1, 512, Some((0, Residual::None)));
    tasks.take_data(&last, 512).unwrap();
    tasks.end_data(slot, &last, 512);
    assert!(matches!(tasks.outcome(slot), Some(Outcome::Answered { status: 0, received: 1024, .. })));
    assert!(tasks.take_data(&data(tag, 2, 1024, None), 0).is_err(), "it has ended");
    let (_, write) = sent(&mut tasks, Work::Write, 1024);
    assert!(tasks.take_data(&data(write, 0, 0, None), 512).is_err(), "a write");
}

#[test]
fn data_are_asked_for_in_order_within_the_bounds() {
    let mut tasks = begun(4);
    let (slot, tag) = sent(&mut tasks, Work::Write, 65_536);
    for wrong in [ready(tag, 1, 0, 512), ready(tag, 0, 0, 0), ready(tag, 0, 0, 8193), ready(tag, 0, 65_536, 1)] {
        assert!(tasks.take_ready(&wrong).is_err(), "{wrong:?}");
    }
    assert!(tasks.take_ready(&ready(tag, 0, u32::MAX, u32::MAX)).is_err());
    tasks.take_ready(&ready(tag, 0, 0, 512)).unwrap();
    tasks.take_ready(&ready(tag, 1, 512, 512)).unwrap();
    assert!(tasks.take_ready(&ready(tag, 2, 1024, 512)).is_err(), "more at once than was agreed on");
    assert_eq!(tasks.wish(slot).map(|wish| wish.offset), Some(0));
    tasks.take_ready(&ready(tag, 2, 1024, 512)).unwrap();
    assert_eq!(tasks.wish(slot).map(|wish| wish.offset), Some(512));
    assert_eq!(tasks.wish(slot).map(|wish| wish.offset), Some(1024));
    assert!(tasks.wish(slot).is_none());
    let (_, read) = sent(&mut tasks, Work::Read, 65_536);
    assert!(tasks.take_ready(&ready(read, 0, 0, 512)).is_err(), "a read");
}

#[test]
fn a_tag_is_that_of_one_task_only() {
    let mut tasks = begun(1);
    let (slot, tag) = sent(&mut tasks, Work::Plain, 0);
    assert!(tasks.open(Work::Plain, 0).is_none());
    tasks.take_response(&response(tag), &[]).unwrap();
    assert!(tasks.take_response(&response(tag), &[]).is_err(), "twice");
    tasks.close(slot);
    let (_, next) = sent(&mut tasks, Work::Plain, 0);
    assert_ne!(tag, next);
    assert!(tasks.take_response(&response(tag), &[]).is_err(), "an old tag");
    for strange in [NO_TAG, PING, LOGOUT, next | ABORT, 200] {
        assert!(tasks.take_response(&response(strange), &[]).is_err(), "{strange:#x}");
    }
}

#[test]
fn statuses_come_in_order_and_the_window_only_grows() {
    let mut tasks = begun(4);
    assert!(tasks.take_status(9).is_err() && tasks.take_status(11).is_err());
    tasks.take_status(10).unwrap();
    assert!(tasks.take_status(10).is_err());
    assert!(!tasks.take_window(Sequence { status: 0, expected: 1, most: 5 }), "it shrinks");
    assert!(!tasks.take_window(Sequence { status: 0, expected: 100, most: 80 }), "nonsense");
    assert!(tasks.take_window(Sequence { status: 0, expected: 1, most: 65 }));
    let mut tasks = Tasks::new(4);
    tasks.begin(Agreed::default(), Sequence { status: 0, expected: 1, most: 1 });
    let (slot, _) = sent(&mut tasks, Work::Plain, 0);
    let (other, _) = tasks.open(Work::Plain, 0).unwrap();
    assert_eq!(tasks.send(other), None, "the window is used up");
    tasks.unsend(slot);
    assert_eq!(tasks.send(other), Some(1), "the number is free again");
}

#[test]
fn a_reset_ends_what_was_sent_before_it() {
    let mut tasks = begun(4);
    let (before, _) = sent(&mut tasks, Work::Read, 512);
    let (reset, tag) = sent(&mut tasks, Work::Manage, 0);
    let (after, _) = sent(&mut tasks, Work::Read, 512);
    tasks.take_managed(tag, 0).unwrap();
    assert!(matches!(tasks.outcome(before), Some(Outcome::Lost(_))));
    assert!(matches!(tasks.outcome(reset), Some(Outcome::Managed(0))));
    assert!(tasks.outcome(after).is_none());
    assert!(tasks.take_managed(tag, 0).is_err(), "twice");
}

#[test]
fn a_task_that_ends_while_it_is_aborted_keeps_its_slot_until_the_abort_is_answered() {
    let mut tasks = begun(2);
    let (slot, tag) = sent(&mut tasks, Work::Plain, 0);
    assert!(tasks.take_managed(tag | ABORT, 0).is_err(), "nothing was aborted");
    tasks.begin_abort(slot);
    tasks.take_response(&response(tag), &[]).unwrap();
    assert!(tasks.outcome(slot).is_some() && !tasks.is_over(slot));
    tasks.take_managed(tag | ABORT, 1).unwrap();
    assert!(tasks.is_over(slot) && tasks.take_managed(tag | ABORT, 1).is_err(), "twice");
    // Without an answer it is over with the connection, and its own answer stands.
    let (slot, tag) = sent(&mut tasks, Work::Plain, 0);
    tasks.begin_abort(slot);
    tasks.take_response(&response(tag), &[]).unwrap();
    tasks.lose_all(&"over".into());
    assert!(tasks.is_over(slot) && matches!(tasks.outcome(slot), Some(Outcome::Answered { .. })));
}

#[test]
fn a_rejected_command_was_not_carried_out() {
    let mut tasks = begun(4);
    let (slot, tag) = sent(&mut tasks, Work::Write, 512);
    let mut header = [0; 48];
    header[0] = 0x01;
    header[16..20].copy_from_slice(&tag.to_be_bytes());
    assert_eq!(tasks.take_reject(0x02, &header).unwrap(), None, "its own answer follows");
    assert!(tasks.take_reject(0x04, &header[..20]).is_err());
    assert!(tasks.take_reject(0x07, &header).is_err(), "which of two with one tag goes on nobody knows");
    assert_eq!(tasks.take_reject(0x09, &header).unwrap(), Some(slot));
    assert!(matches!(tasks.outcome(slot), Some(Outcome::Rejected(9))));
    header[0] = 0x05;
    assert!(tasks.take_reject(0x04, &header).is_err());
}

#[test]
fn sense_data_are_cut_to_what_is_kept() {
    let mut tasks = begun(4);
    for (data, kept) in
        [(&[0, 3, 1, 2, 3, 0][..], 3), (&[0xFF, 0xFF, 1][..], 1), (&[0][..], 0), (&[1, 0x44].repeat(400)[..], 252)]
    {
        let (slot, tag) = sent(&mut tasks, Work::Plain, 0);
        tasks.take_response(&response(tag), data).unwrap();
        assert_eq!(tasks.sense(slot).len(), kept);
        tasks.close(slot);
    }
}

proptest! {
    #[test]
    fn whatever_a_target_says_a_task_ends_once_and_is_moved_no_more_than_expected(
        said in prop::collection::vec((0u8..7, 0usize..8, 0u32..4, 0u32..3000, 0u32..3000, any::<u8>()), 0..60),
    ) {
        let mut tasks = begun(4);
        let mut open = vec![
            sent(&mut tasks, Work::Read, 2048),
            sent(&mut tasks, Work::Write, 2048),
            sent(&mut tasks, Work::Plain, 0),
            sent(&mut tasks, Work::Manage, 0),
        ];
        for (kind, which, number, offset, length, code) in said {
            let (slot, tag) = open[which % 4];
            let tag = if which > 5 { tag ^ 1 << (which + 2) } else { tag };
            let had = tasks.outcome(slot).is_some();
            match kind {
                0 | 1 => {
                    let data = data(tag, number, offset, (kind == 1).then_some((code, Residual::Underflow(length))));
                    if let Ok(slot) = tasks.take_data(&data, length) {
                        prop_assert!(offset + length <= 2048);
                        tasks.end_data(slot, &data, length);
                    }
                }
                2 => {
                    let _ = tasks.take_ready(&ready(tag, number, offset, length));
                }
                3 => {
                    let answered = tasks.take_response(&ScsiResponse { response: code & 1, ..response(tag) }, &[code; 40]);
                    prop_assert!(!(had && which <= 5 && answered.is_ok()));
                }
                4 => {
                    let _ = tasks.take_managed(tag ^ u32::from(code & 1) << 8, code);
                }
                5 => {
                    let mut header = [code; 48];
                    header[0] = (code & 0x3F) % 8;
                    header[16..20].copy_from_slice(&tag.to_be_bytes());
                    let _ = tasks.take_reject(code >> 4, &header);
                }
                6 if !had && code & 1 == 1 => tasks.begin_abort(slot),
                _ => while let Some(wish) = tasks.wish(slot) {
                    prop_assert!(wish.offset + wish.length <= 2048);
                },
            }
            if let Some(Outcome::Answered { received, .. }) = tasks.outcome(slot) {
                prop_assert!(*received <= 2048);
            }
            // A new task takes the place of one that has ended.
            if tasks.is_over(slot) && code % 3 == 0 {
                tasks.close(slot);
                open[which % 4] = sent(&mut tasks, Work::Read, 2048);
            }
        }
        tasks.lose_all(&"over".into());
        for (slot, _) in open {
            prop_assert!(tasks.is_over(slot), "every task ends");
        }
    }
}
