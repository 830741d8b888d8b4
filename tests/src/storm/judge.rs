//! Owns: the judgement over the notes of all writers and what the files hold in the end.
//! Promises: it names two hosts that had one file at one time, an acknowledged fsync whose bytes are gone, and bytes that nobody wrote.
//! Must not know: processes, signals.
//!
//! What a record may hold is a set: a write that was asked for adds its value, an acknowledged fsync leaves the last one only, and so does
//! whoever reads it. Sessions that got no answer at all have done nothing and count for nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::notes::{Note, Value};

/// One session of a writer with a file.
#[derive(Debug)]
pub struct Session<'a> {
    host: usize,
    session: u64,
    target: &'a str,
    opened: u64,
    /// When its last call that succeeded was begun: until then it certainly had the file.
    held_until: u64,
    notes: &'a [Note],
}

/// What the notes show.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Sessions.
    pub sessions: usize,
    /// Acknowledged writes.
    pub writes: u64,
    /// Acknowledged fsyncs and closes.
    pub syncs: u64,
    /// Acknowledged publications.
    pub published: u64,
    /// What must not have happened.
    pub wrong: Vec<String>,
}

/// The sessions in the notes of one host that got an answer after the open.
fn sessions(host: usize, notes: &[Note]) -> Vec<Session<'_>> {
    let starts: Vec<usize> = (0..notes.len()).filter(|n| matches!(notes[*n], Note::Opened { .. })).collect();
    let ends = starts.iter().skip(1).copied().chain([notes.len()]);
    let mut all = Vec::new();
    for (start, end) in starts.iter().copied().zip(ends) {
        let Note::Opened { session, target, at } = &notes[start] else { continue };
        let notes = &notes[start + 1..end];
        let answered = notes.iter().filter_map(|note| match note {
            Note::Found { at, .. } | Note::Wrote { at, .. } | Note::Synced { at } => Some(*at),
            _ => None,
        });
        if let Some(held_until) = answered.max() {
            all.push(Session { host, session: *session, target, opened: *at, held_until, notes });
        }
    }
    all
}

/// Judges the notes of all hosts. `finally` gives what a record of a file holds in the end, `publications` what each host's published
/// file holds.
pub fn judge(
    notes: &[Vec<Note>],
    finally: impl Fn(&str, u64) -> Result<Value, String>,
    publications: &[Option<u64>],
) -> Verdict {
    let mut verdict = Verdict::default();
    let mut by_target: BTreeMap<&str, Vec<Session<'_>>> = BTreeMap::new();
    for session in notes.iter().enumerate().flat_map(|(host, notes)| sessions(host, notes)) {
        by_target.entry(session.target).or_default().push(session);
    }
    for (target, sessions) in &mut by_target {
        sessions.sort_by_key(|session| session.opened);
        verdict.sessions += sessions.len();
        exclusive(target, sessions, &mut verdict.wrong);
        let mut records: BTreeMap<u64, BTreeSet<Value>> = BTreeMap::new();
        sessions.iter().for_each(|session| follow(session, &mut records, &mut verdict));
        for (record, possible) in &records {
            check(
                &format!("{target} record {record} in the end"),
                &finally(target, *record),
                possible,
                &mut verdict.wrong,
            );
        }
    }
    for (host, (notes, found)) in notes.iter().zip(publications).enumerate() {
        verdict.published += publication(host, notes, *found, &mut verdict.wrong);
    }
    verdict
}

/// No two hosts had the file at one time.
fn exclusive(target: &str, sessions: &[Session<'_>], wrong: &mut Vec<String>) {
    let mut latest: Option<&Session<'_>> = None;
    for session in sessions {
        if let Some(before) = latest
            && before.host != session.host
            && before.held_until > session.opened
        {
            wrong.push(format!(
                "{target}: host {} opened it at {} (session {:016x}), host {} still used it at {} (session {:016x})",
                session.host, session.opened, session.session, before.host, before.held_until, before.session
            ));
        }
        if latest.is_none_or(|before| before.held_until < session.held_until) {
            latest = Some(session);
        }
    }
}

fn check(what: &str, found: &Result<Value, String>, possible: &BTreeSet<Value>, wrong: &mut Vec<String>) {
    match found {
        Ok(value) if possible.contains(value) => {}
        Ok(value) => wrong.push(format!("{what}: {value:x?} was found, {possible:x?} would be right")),
        Err(foreign) => wrong.push(format!("{what}: {foreign}")),
    }
}

/// Follows what a session did to the records.
fn follow(session: &Session<'_>, records: &mut BTreeMap<u64, BTreeSet<Value>>, verdict: &mut Verdict) {
    let mut last: BTreeMap<u64, Value> = BTreeMap::new();
    for note in session.notes {
        match note {
            Note::Found { record, value, .. } => {
                let possible = records.entry(*record).or_insert_with(|| BTreeSet::from([None]));
                let what = format!("{} record {record}, read in session {:016x}", session.target, session.session);
                match last.get(record) {
                    // What the session has written itself it reads, and nothing else.
                    Some(own) => check(&what, value, &BTreeSet::from([*own]), &mut verdict.wrong),
                    None => check(&what, value, possible, &mut verdict.wrong),
                }
                if let (Ok(value), false) = (value, last.contains_key(record)) {
                    *possible = BTreeSet::from([*value]);
                }
            }
            Note::Write { record, number } => {
                let value = Some((session.session, *number));
                records.entry(*record).or_insert_with(|| BTreeSet::from([None])).insert(value);
                last.insert(*record, value);
            }
            Note::Wrote { .. } => verdict.writes += 1,
            Note::Synced { .. } => {
                verdict.syncs += 1;
                for (record, value) in &last {
                    records.insert(*record, BTreeSet::from([*value]));
                }
            }
            _ => {}
        }
    }
}

/// The published file of a host is the last that was acknowledged or one that was tried since; gives how many were acknowledged.
fn publication(host: usize, notes: &[Note], found: Option<u64>, wrong: &mut Vec<String>) -> u64 {
    let mut possible = BTreeSet::from([None]);
    let mut acknowledged = 0;
    for note in notes {
        match note {
            Note::Publish(number) => drop(possible.insert(Some(*number))),
            Note::Withheld(number) => drop(possible.remove(&Some(*number))),
            Note::Published(number) => {
                acknowledged += 1;
                possible = BTreeSet::from([Some(*number)]);
            }
            _ => {}
        }
    }
    if !possible.contains(&found) {
        wrong.push(format!("host {host} published {possible:x?}, {found:x?} is there"));
    }
    acknowledged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(session: u64, at: u64) -> Note {
        Note::Opened { session, target: "f".to_owned(), at }
    }

    fn write(number: u64, at: u64) -> [Note; 2] {
        [Note::Write { record: 0, number }, Note::Wrote { number, at }]
    }

    fn found(value: Value, at: u64) -> Note {
        Note::Found { record: 0, value: Ok(value), at }
    }

    fn wrong(notes: &[Vec<Note>], finally: Value) -> Vec<String> {
        judge(notes, |_, _| Ok(finally), &vec![None; notes.len()]).wrong
    }

    #[test]
    fn a_lost_fsync_is_noticed_and_a_lost_write_is_allowed() {
        let [asked, done] = write(1, 20);
        let synced = vec![opened(7, 10), found(None, 11), asked.clone(), done.clone(), Note::Synced { at: 30 }];
        assert_eq!(wrong(std::slice::from_ref(&synced), Some((7, 1))), Vec::<String>::new());
        assert_eq!(wrong(&[synced], None).len(), 1);
        let unsynced = vec![opened(7, 10), found(None, 11), asked, done];
        let alone = std::slice::from_ref(&unsynced);
        assert!(wrong(alone, None).is_empty() && wrong(alone, Some((7, 1))).is_empty());
        assert_eq!(wrong(&[unsynced], Some((8, 1))).len(), 1, "nobody wrote that");
    }

    #[test]
    fn two_hosts_with_one_file_are_noticed() {
        let [asked, done] = write(1, 50);
        let first = vec![opened(7, 10), found(None, 11), asked, done, Note::Synced { at: 51 }];
        let second = vec![opened(8, 40), found(None, 41)];
        let said = wrong(&[first, second], Some((7, 1)));
        assert!(said.iter().any(|what| what.contains("still used it")), "{said:?}");
    }

    #[test]
    fn an_old_write_over_a_newer_one_is_noticed() {
        let [asked, done] = write(1, 20);
        let first = vec![opened(7, 10), found(None, 11), asked, done];
        let [asked, done] = write(1, 60);
        let second = vec![opened(8, 40), found(Some((7, 1)), 41), asked, done, Note::Synced { at: 61 }];
        let both = [first, second];
        assert!(wrong(&both, Some((8, 1))).is_empty());
        assert_eq!(wrong(&both, Some((7, 1))).len(), 1);
    }

    #[test]
    fn a_session_without_an_answer_has_not_held_the_file() {
        let [asked, done] = write(1, 50);
        let first = vec![opened(7, 10), found(None, 11), asked, done, Note::Synced { at: 51 }];
        let second = vec![opened(8, 40), Note::Ended("the mount was gone".to_owned())];
        assert!(wrong(&[first, second], Some((7, 1))).is_empty());
    }

    #[test]
    fn publications_are_never_lost() {
        let notes = [Note::Publish(1), Note::Published(1), Note::Publish(2)];
        for (found, is_right) in [(None, false), (Some(1), true), (Some(2), true), (Some(3), false)] {
            let mut wrong = Vec::new();
            publication(0, &notes, found, &mut wrong);
            assert_eq!(wrong.is_empty(), is_right, "{found:?}: {wrong:?}");
        }
    }
}
