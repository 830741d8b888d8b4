//! Owns: the CDBs and parameter lists that are sent.
//! Promises: each function is one command of the standard, with every other bit 0.
//! Must not know: who sends it, what the answer means.

/// READ(16) (SBC-4, 5.17).
pub fn read(block: u64, blocks: u32) -> [u8; 16] {
    with_range(0x88, 0, block, blocks)
}

/// WRITE(16) (SBC-4, 5.44); `force`: durable when it is answered (FUA).
pub fn write(block: u64, blocks: u32, force: bool) -> [u8; 16] {
    with_range(0x8A, u8::from(force) << 3, block, blocks)
}

/// COMPARE AND WRITE of one block (SBC-4, 5.2): its data are the block that is expected, then the one to be written.
pub fn compare_and_write(block: u64, force: bool) -> [u8; 16] {
    let mut cdb = with_range(0x89, u8::from(force) << 3, block, 0);
    cdb[13] = 1;
    cdb
}

/// SYNCHRONIZE CACHE(16) of the whole unit (SBC-4, 5.35).
pub fn synchronize_cache() -> [u8; 16] {
    with_range(0x91, 0, 0, 0)
}

/// WRITE SAME(16) of one block of data (SBC-4, 5.52); `unmap`: the blocks may be given back, if they read as zeros then.
pub fn write_same(block: u64, blocks: u32, unmap: bool) -> [u8; 16] {
    with_range(0x93, u8::from(unmap) << 3, block, blocks)
}

/// UNMAP with one descriptor (SBC-4, 5.36): CDB and parameter list.
pub fn unmap(block: u64, blocks: u32) -> ([u8; 10], [u8; 24]) {
    let mut list = [0; 24];
    list[..2].copy_from_slice(&22u16.to_be_bytes());
    list[2..4].copy_from_slice(&16u16.to_be_bytes());
    list[8..16].copy_from_slice(&block.to_be_bytes());
    list[16..20].copy_from_slice(&blocks.to_be_bytes());
    ([0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], list)
}

/// READ CAPACITY(16) (SBC-4, 5.21): 32 bytes.
pub fn read_capacity() -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = 0x9E;
    cdb[1] = 0x10;
    cdb[13] = 32;
    cdb
}

/// TEST UNIT READY (SPC-5, 6.47).
pub fn test_unit_ready() -> [u8; 6] {
    [0; 6]
}

/// INQUIRY (SPC-5, 6.7): standard data, or a page of vital product data.
pub fn inquiry(page: Option<u8>, room: u16) -> [u8; 6] {
    let [high, low] = room.to_be_bytes();
    [0x12, u8::from(page.is_some()), page.unwrap_or(0), high, low, 0]
}

/// MODE SENSE(6) of the caching page without block descriptors (SPC-5, 6.14).
pub fn mode_sense_caching(room: u8) -> [u8; 6] {
    [0x1A, 0x08, 0x08, 0, room, 0]
}

/// REPORT SUPPORTED OPERATION CODES of one command (SPC-5, 6.35), by its service action if it has one.
pub fn report_supported(operation: u8, service_action: Option<u8>, room: u16) -> [u8; 12] {
    let [high, low] = room.to_be_bytes();
    let options = if service_action.is_some() { 2 } else { 1 };
    [0xA3, 0x0C, options, operation, 0, service_action.unwrap_or(0), 0, 0, high, low, 0, 0]
}

/// PERSISTENT RESERVE IN: READ KEYS (SPC-4, 6.15.2).
pub const READ_KEYS: u8 = 0;
/// READ RESERVATION (SPC-4, 6.15.3).
pub const READ_RESERVATION: u8 = 1;
/// REPORT CAPABILITIES (SPC-4, 6.15.4).
pub const REPORT_CAPABILITIES: u8 = 2;

/// PERSISTENT RESERVE IN (SPC-4, 6.15).
pub fn reserve_in(action: u8, room: u16) -> [u8; 10] {
    let [high, low] = room.to_be_bytes();
    [0x5E, action, 0, 0, 0, 0, 0, high, low, 0]
}

/// PERSISTENT RESERVE OUT: REGISTER (SPC-4, 6.16.2).
pub const REGISTER: u8 = 0;
/// RESERVE.
pub const RESERVE: u8 = 1;
/// PREEMPT AND ABORT.
pub const PREEMPT_AND_ABORT: u8 = 5;
/// REGISTER AND IGNORE EXISTING KEY.
pub const REGISTER_AND_IGNORE: u8 = 6;

/// PERSISTENT RESERVE OUT (SPC-4, 6.16): CDB and parameter list. `kind`: type of the reservation, for RESERVE and PREEMPT.
pub fn reserve_out(action: u8, kind: u8, key: u64, action_key: u64, persist: bool) -> ([u8; 10], [u8; 24]) {
    let mut list = [0; 24];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&action_key.to_be_bytes());
    list[20] = u8::from(persist);
    ([0x5F, action, kind, 0, 0, 0, 0, 0, list.len() as u8, 0], list)
}

fn with_range(operation: u8, flags: u8, block: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = operation;
    cdb[1] = flags;
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_standard() {
        assert_eq!(write(0x0102, 3, true), [0x8A, 8, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 3, 0, 0]);
        assert_eq!(compare_and_write(5, true), [0x89, 8, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0]);
        assert_eq!(write_same(1, 2, true), [0x93, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0]);
        assert_eq!(read_capacity(), [0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]);
        let (cdb, list) = unmap(0x0A0B, 0x10);
        assert_eq!(cdb, [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(list, [0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0A, 0x0B, 0, 0, 0, 0x10, 0, 0, 0, 0]);
        let (cdb, list) = reserve_out(PREEMPT_AND_ABORT, 7, 1, 2, true);
        assert_eq!(cdb, [0x5F, 5, 7, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(list, [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0]);
    }
}
