//! Flipped bytes and overwritten cells.

use super::{MIB, World, listed, world};
use proptest::prelude::*;
use vmfs_core::check::{Severity, Structure};
use vmfs_core::units::CellSize;

/// Flips a byte of the cell at `offset` of the first LUN and gives the structures that errors name.
pub(crate) fn after_a_flip(world: &World, offset: u64, at: u64) -> Vec<Structure> {
    let byte = world.disks[0].peek(offset + at, 1)[0];
    world.disks[0].damage(offset + at, &[byte ^ 0x40]);
    let (_, findings) = world.check();
    world.disks[0].damage(offset + at, &[byte]);
    let errors: Vec<_> = findings.iter().filter(|f| f.severity == Severity::Error).map(|f| f.structure).collect();
    assert!(!errors.is_empty(), "byte {at} of {offset:#x}: {}", listed(&findings));
    errors
}

#[test]
fn a_flipped_byte_in_each_fixed_structure_is_told_with_the_structure() {
    for cell in [CellSize::B512, CellSize::B4096] {
        let one = world(&[64 * MIB], cell).make(20);
        // 64 MiB with 1 MiB blocks: blocks from 5 MiB on; block 0 has the root cells, block 1 the units.
        let places = [
            (0x10_0000, Structure::Header),
            (0x1f_f000, Structure::HeaderCopy),
            (0x10_1000, Structure::Member),
            (0x10_2000, Structure::Member),
            (0x20_3000, Structure::Heartbeat),
            (0x30_3000, Structure::Arena),
            (0x40_0000, Structure::BlockTable),
            (0x50_0000, Structure::RootCell),
            (0x50_0000 + 9 * cell.bytes() as u64, Structure::RootCell),
            (0x60_0000, Structure::UnitTable),
            (0x60_2000, Structure::Body),
            (0x60_4000, Structure::FreeUnit),
        ];
        for (offset, structure) in places {
            for at in [0, 5, 9, 16, 40, 80, 96, 130, cell.bytes() as u64 - 1] {
                let errors = after_a_flip(&one, offset, at);
                assert!(errors.contains(&structure), "byte {at} of {offset:#x}: {errors:?}");
            }
        }
        one.assert_clean();
    }
}

/// Cells of a new volume that say something.
const MADE: [u64; 9] =
    [0x10_0000, 0x10_1000, 0x20_3000, 0x30_3000, 0x40_0000, 0x50_0000, 0x50_1200, 0x60_0000, 0x60_2000];

/// Changes bytes of a 512-byte cell and makes its checksum right again.
pub(crate) fn lie(world: &World, offset: u64, at: usize, bytes: &[u8]) {
    let mut image = world.disks[0].peek(offset, 512);
    let end = (at + bytes.len()).min(512);
    image[at..end].copy_from_slice(&bytes[..end - at]);
    image[8..12].fill(0);
    let crc = crc32c::crc32c(&image);
    image[8..12].copy_from_slice(&crc.to_le_bytes());
    world.disks[0].damage(offset, &image);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_lie_with_a_right_checksum_makes_it_panic(
        lies in proptest::collection::vec((0usize..MADE.len(), 0usize..512, any::<u8>()), 1..40),
    ) {
        let one = world(&[64 * MIB], CellSize::B512).make(20);
        for (place, at, byte) in lies {
            lie(&one, MADE[place], at, &[byte]);
        }
        let mut findings = Vec::new();
        let _ = one.sim.block_on(vmfs_core::check::check(&one.luns, &mut findings));
    }

    #[test]
    fn no_damage_makes_it_panic(
        places in proptest::collection::vec((0u64..8 * MIB / 512, proptest::collection::vec(any::<u8>(), 1..600)), 1..12),
    ) {
        let one = world(&[64 * MIB], CellSize::B512).make(16);
        for (sector, bytes) in places {
            one.disks[0].damage(MIB + sector * 512, &bytes);
        }
        let mut findings = Vec::new();
        let _ = one.sim.block_on(vmfs_core::check::check(&one.luns, &mut findings));
    }
}
