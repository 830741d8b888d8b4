//! Owns a function's MSI-X table and pending bits (PCI 3.0, 6.8.2): which vector goes where, which is masked, which waits.
//! Promises that a vector raised while masked is sent once when it is let through, and that no access reaches beyond the table.
//! Must not know what raises a vector, or how a message reaches a vCPU.

use crate::irq::MsiMessage;

/// Size of the memory window with table and pending bits, in bytes.
pub const WINDOW_SIZE: u32 = 0x1000;
/// Where the pending bits are in it.
pub const PENDING_OFFSET: u32 = 0x800;
/// Vectors that the window has room for.
pub const MOST_VECTORS: u16 = 64;
/// Bytes of a table entry: address, upper address, data, vector control.
const ENTRY: usize = 16;

/// What the guest has written into the capability's message control register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsixControl {
    /// MSI-X is on.
    pub enabled: bool,
    /// No vector is let through.
    pub masked: bool,
}

/// One vector. At power-on it is masked.
#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

/// The table of a function.
#[derive(Debug)]
pub struct VectorTable {
    control: MsixControl,
    entries: Vec<Entry>,
}

impl VectorTable {
    /// A table of `vectors`, at most [`MOST_VECTORS`], as after power-on.
    pub fn new(vectors: u16) -> VectorTable {
        assert!(vectors <= MOST_VECTORS, "{vectors} vectors do not fit into the window");
        let entry = Entry { address: 0, data: 0, masked: true, pending: false };
        VectorTable { control: MsixControl::default(), entries: vec![entry; usize::from(vectors)] }
    }

    /// Follows the capability's control register.
    pub fn set_control(&mut self, control: MsixControl) {
        self.control = control;
    }

    /// Where `vector` goes, if it is let through at present.
    pub fn message(&self, vector: usize) -> Option<MsiMessage> {
        let entry = self.entries.get(vector).filter(|entry| !entry.masked)?;
        let open = self.control.enabled && !self.control.masked;
        open.then_some(MsiMessage { address: entry.address, data: entry.data })
    }

    /// Raises `vector`: true if its message is to be sent now, otherwise it waits until it is let through. A vector that is not there
    /// is ignored.
    pub fn raise(&mut self, vector: usize) -> bool {
        let open = self.message(vector).is_some();
        if let Some(entry) = self.entries.get_mut(vector).filter(|_| !open && self.control.enabled) {
            entry.pending = true;
        }
        open
    }

    /// The next vector that waited and is let through now; it waits no longer.
    pub fn take_released(&mut self) -> Option<usize> {
        let released = |vector: &usize| self.entries[*vector].pending && self.message(*vector).is_some();
        let vector = (0..self.entries.len()).find(released)?;
        self.entries[vector].pending = false;
        Some(vector)
    }

    /// Reads at `offset` in the window: 4 or 8 bytes, aligned (PCI 3.0, 6.8.2); anything else reads as zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if is_whole(offset, data.len()) {
            for (at, word) in (offset as usize..).step_by(4).zip(data.chunks_exact_mut(4)) {
                word.copy_from_slice(&self.word(at).to_le_bytes());
            }
        }
    }

    /// Writes at `offset` in the window: 4 or 8 bytes, aligned; anything else, and the pending bits, are left alone.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if is_whole(offset, data.len()) {
            for (at, word) in (offset as usize..).step_by(4).zip(data.chunks_exact(4)) {
                self.set_word(at, u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
            }
        }
    }

    fn word(&self, at: usize) -> u32 {
        let pending = PENDING_OFFSET as usize;
        if (pending..pending + 8).contains(&at) {
            let bits = self.entries.iter().skip((at - pending) * 8).take(32).enumerate();
            return bits.fold(0, |word, (bit, entry)| word | u32::from(entry.pending) << bit);
        }
        let Some(entry) = self.entries.get(at / ENTRY) else { return 0 };
        match at % ENTRY {
            0 => entry.address as u32,
            4 => (entry.address >> 32) as u32,
            8 => entry.data,
            _ => u32::from(entry.masked),
        }
    }

    fn set_word(&mut self, at: usize, value: u32) {
        let Some(entry) = self.entries.get_mut(at / ENTRY) else { return };
        match at % ENTRY {
            0 => entry.address = entry.address >> 32 << 32 | u64::from(value & !3),
            4 => entry.address = entry.address & u64::from(u32::MAX) | u64::from(value) << 32,
            8 => entry.data = value,
            _ => entry.masked = value & 1 != 0,
        }
    }
}

fn is_whole(offset: u64, length: usize) -> bool {
    matches!(length, 4 | 8) && offset.is_multiple_of(length as u64) && offset < u64::from(WINDOW_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ON: MsixControl = MsixControl { enabled: true, masked: false };

    fn pointed() -> VectorTable {
        let mut table = VectorTable::new(3);
        for vector in 0..3u64 {
            table.write(vector * 16, &(0x1_FEE0_0000u64 + (vector << 12)).to_le_bytes());
            table.write(vector * 16 + 8, &(0x40 + vector as u32).to_le_bytes());
        }
        table
    }

    #[test]
    fn a_vector_is_let_through_when_neither_it_nor_the_function_is_masked() {
        let mut table = pointed();
        table.set_control(ON);
        assert_eq!(table.message(1), None, "masked at power-on");
        table.write(16 + 12, &[0; 4]);
        assert_eq!(table.message(1), Some(MsiMessage { address: 0x1_FEE0_1000, data: 0x41 }));
        assert!(table.raise(1) && !table.raise(2) && !table.raise(3));
        table.set_control(MsixControl { masked: true, ..ON });
        assert!(!table.raise(1));
        table.set_control(MsixControl::default());
        assert!(!table.raise(1));
    }

    #[test]
    fn what_waited_is_sent_once() {
        let mut table = pointed();
        table.set_control(ON);
        assert!(!table.raise(2) && !table.raise(2));
        let mut bits = [0; 4];
        table.read(u64::from(PENDING_OFFSET), &mut bits);
        assert_eq!((bits, table.take_released()), ([4, 0, 0, 0], None));
        table.write(2 * 16 + 12, &[0; 4]);
        assert_eq!((table.take_released(), table.take_released()), (Some(2), None));
    }

    #[test]
    fn pending_bits_cannot_be_written() {
        let mut table = pointed();
        table.write(u64::from(PENDING_OFFSET), &[0xFF; 8]);
        let mut bits = [1; 8];
        table.read(u64::from(PENDING_OFFSET), &mut bits);
        assert_eq!(bits, [0; 8]);
    }

    proptest! {
        #[test]
        fn any_access_is_answered_and_messages_are_aligned(
            vectors in 0u16..=MOST_VECTORS,
            accesses in prop::collection::vec((0u64..0x2000, prop::collection::vec(any::<u8>(), 1..9)), 0..60),
        ) {
            let mut table = VectorTable::new(vectors);
            table.set_control(ON);
            for (offset, mut data) in accesses {
                table.write(offset, &data);
                table.read(offset, &mut data);
            }
            for vector in 0..usize::from(vectors) {
                prop_assert!(table.message(vector).is_none_or(|message| message.address.is_multiple_of(4)));
            }
        }
    }
}
