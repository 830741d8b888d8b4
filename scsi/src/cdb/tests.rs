//! Promises of the CDB parser.

use super::*;
use proptest::prelude::*;

#[test]
fn the_table_is_sorted_and_its_lengths_follow_the_operation_code_group() {
    for pair in OPERATIONS.windows(2) {
        let order = |operation: &Operation| (operation.opcode(), operation.service_action);
        assert!(order(&pair[0]) < order(&pair[1]));
    }
    for operation in OPERATIONS {
        let length = match operation.opcode() >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            group => panic!("no length for group {group}"),
        };
        assert_eq!(operation.usage.len(), length, "operation {:02x}", operation.opcode());
    }
}

#[test]
fn every_operation_of_the_table_parses() {
    for operation in OPERATIONS {
        let mut cdb = vec![0; operation.usage.len()];
        cdb[0] = operation.opcode();
        cdb[1] = operation.service_action.unwrap_or(0);
        Cdb::parse(&cdb).unwrap_or_else(|sense| panic!("{cdb:02x?}: {sense:?}"));
    }
}

#[test]
fn block_ranges_are_where_each_form_has_them() {
    let read = |cdb: &[u8]| match Cdb::parse(cdb) {
        Ok(Cdb::Read { blocks }) => (blocks.lba, blocks.count),
        other => panic!("{other:?}"),
    };
    assert_eq!(read(&[0x08, 0x1F, 0xFF, 0xFE, 7, 0]), (0x1F_FFFE, 7));
    assert_eq!(read(&[0x08, 0, 0, 1, 0, 0]), (1, 256));
    assert_eq!(read(&[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0]), (0x0102_0304, 0x0506));
    assert_eq!(read(&[0x28, 0, 0, 0, 0, 4, 0, 0, 0, 0]), (4, 0));
    assert_eq!(read(&[0xA8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]), (0x0102_0304, 0x0506_0708));
    let sixteen = [0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0];
    assert_eq!(read(&sixteen), (0x0102_0304_0506_0708, 0x090A_0B0C));
}

#[test]
fn a_reserved_bit_is_refused_with_a_pointer_to_it() {
    // RDPROTECT: protection information is not supported.
    let cdb = [0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(Cdb::parse(&cdb), Err(Sense::cdb_field(1, Some(5))));
    // NACA
    assert_eq!(Cdb::parse(&[0, 0, 0, 0, 0, 4]), Err(Sense::cdb_field(5, Some(2))));
}

#[test]
fn unknown_commands_and_short_ones_are_told_apart() {
    assert_eq!(Cdb::parse(&[]), Err(Sense::INVALID_OPCODE));
    assert_eq!(Cdb::parse(&[0xFF; 16]), Err(Sense::INVALID_OPCODE));
    assert_eq!(Cdb::parse(&[0x28, 0, 0]), Err(Sense::cdb_field(3, None)));
    assert_eq!(Cdb::parse(&[0x9E, 0x1F]), Err(Sense::cdb_field(1, Some(4))));
    assert_eq!(Cdb::parse(&[0x12, 0, 0x80, 0, 36, 0]), Err(Sense::cdb_field(2, Some(7))));
}

proptest! {
    #[test]
    fn any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
        let _ = Cdb::parse(&bytes);
    }

    #[test]
    fn what_parses_is_in_the_table(bytes in prop::collection::vec(any::<u8>(), 16)) {
        if Cdb::parse(&bytes).is_ok() {
            prop_assert!(OPERATIONS.iter().any(|operation| operation.opcode() == bytes[0]));
        }
    }
}
