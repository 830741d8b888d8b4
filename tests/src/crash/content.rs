//! Owns: what may be read of a file whose host was killed: the bytes at the last acknowledged fsync and the changes since.
//! Promises: content is accepted exactly if each byte is that of the last fsync or of a change since, and its length lies between theirs.
//! Must not know: names, mounts.

/// A change that was asked for and not yet made durable by an acknowledged fsync.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes written at an offset.
    Write(usize, Vec<u8>),
    /// A new length.
    Resize(usize),
    /// A hole: offset and length.
    Punch(usize, usize),
}

impl Change {
    /// What it is, without the bytes.
    pub fn name(&self) -> String {
        match self {
            Change::Write(at, bytes) => format!("write of {} at {at}", bytes.len()),
            other => format!("{other:?}"),
        }
    }

    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Write(at, new) => {
                bytes.resize(bytes.len().max(at + new.len()), 0);
                bytes[*at..at + new.len()].copy_from_slice(new);
            }
            Change::Resize(length) => bytes.resize(*length, 0),
            Change::Punch(at, length) => {
                let end = bytes.len().min(at + length);
                bytes[(*at).min(end)..end].fill(0);
            }
        }
    }

    /// Whether this change may have put `byte` at offset `at`.
    fn explains(&self, at: usize, byte: u8) -> bool {
        match self {
            Change::Write(from, new) => at.checked_sub(*from).and_then(|n| new.get(n)) == Some(&byte),
            Change::Resize(length) => byte == 0 && at >= *length,
            Change::Punch(from, length) => byte == 0 && (*from..from + length).contains(&at),
        }
    }
}

/// The content of one file as its only writer knows it.
#[derive(Clone, Debug, Default)]
pub struct Content {
    durable: Vec<u8>,
    since: Vec<Change>,
}

impl Content {
    /// Notes a change before it is asked for: from then on it may land.
    pub fn change(&mut self, change: Change) {
        self.since.push(change);
    }

    /// What a reader on the writer's own mount sees when every change was carried out.
    pub fn current(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        self.since.iter().for_each(|change| change.apply(&mut bytes));
        bytes
    }

    /// Length of [`Content::current`].
    pub fn length(&self) -> usize {
        self.lengths().last().expect("the first is the durable one")
    }

    fn lengths(&self) -> impl Iterator<Item = usize> {
        let after = |length: &mut usize, change: &Change| {
            *length = match change {
                Change::Write(at, new) => (*length).max(at + new.len()),
                Change::Resize(to) => *to,
                Change::Punch(..) => *length,
            };
            Some(*length)
        };
        std::iter::once(self.durable.len()).chain(self.since.iter().scan(self.durable.len(), after))
    }

    /// An fsync was acknowledged: all changes so far are durable.
    pub fn synced(&mut self) {
        self.durable = self.current();
        self.since.clear();
    }

    /// Takes what was found after the writer's host was killed, if the rules allow it; from then on it is what every host must read.
    pub fn settle(&mut self, found: Vec<u8>) -> Result<(), String> {
        let (least, most) = (self.lengths().min().unwrap_or(0), self.lengths().max().unwrap_or(0));
        if !(least..=most).contains(&found.len()) {
            return Err(format!("{} bytes long, not {least} to {most}", found.len()));
        }
        let wrong = found.iter().enumerate().position(|(at, byte)| {
            let kept = self.durable.get(at).map_or(*byte == 0, |durable| durable == byte);
            !kept && !self.since.iter().any(|change| change.explains(at, *byte))
        });
        if let Some(at) = wrong {
            let durable = self.durable.get(at).map_or("behind the end".to_owned(), |byte| format!("{byte:#04x}"));
            return Err(format!(
                "byte {at} of {} is {:#04x}, at the last fsync it was {durable}, and none of {} later changes wrote that",
                found.len(),
                found[at],
                self.since.len()
            ));
        }
        self.durable = found;
        self.since.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        let mut content = Content::default();
        content.change(Change::Write(0, vec![1, 2, 3]));
        content.synced();
        content
    }

    #[test]
    fn what_fsync_acknowledged_must_be_there() {
        assert!(content().settle(vec![1, 2, 3]).is_ok());
        assert!(content().settle(vec![1, 2]).is_err());
        assert!(content().settle(vec![1, 2, 0]).is_err());
        assert!(content().settle(vec![1, 2, 3, 0]).is_err());
    }

    #[test]
    fn later_changes_may_be_there_wholly_partly_or_not() {
        let mut changed = content();
        changed.change(Change::Write(2, vec![7, 8]));
        changed.change(Change::Punch(0, 1));
        assert_eq!((changed.current(), changed.length()), (vec![0, 2, 7, 8], 4));
        for found in [&[1, 2, 3][..], &[0, 2, 3], &[1, 2, 7], &[0, 2, 7, 8], &[1, 2, 7, 0]] {
            assert!(changed.clone().settle(found.to_vec()).is_ok(), "{found:?}");
        }
        for found in [&[1, 2][..], &[1, 0, 3], &[1, 2, 8], &[1, 2, 7, 9], &[0, 2, 7, 8, 0]] {
            assert!(changed.clone().settle(found.to_vec()).is_err(), "{found:?}");
        }
        changed.change(Change::Resize(1));
        assert!(changed.clone().settle(vec![1]).is_ok());
        changed.settle(vec![1, 0]).unwrap();
        assert!(changed.settle(vec![1, 2]).is_err(), "what was found once stays");
    }
}
