//! Structures whose checksums are right and which contradict each other: each lie is told with the structure that tells it.

use std::collections::BTreeMap;

use super::content::filled;
use super::damage::after_a_flip;
use super::{MIB, World, listed};
use proptest::prelude::*;
use vmfs_core::check::{Finding, Severity, Structure, check};
use vmfs_core::units::CellSize;

/// Cell kinds as FORMAT.md numbers them.
const BLOCK_TABLE: u8 = 5;
const UNIT_TABLE: u8 = 6;
const ROOT: u8 = 7;
const BODY: u8 = 9;
const POINTER_BLOCK: u8 = 10;
const INNER: u8 = 11;
const BUCKET: u8 = 12;

fn content() -> World {
    filled(&[128 * MIB], CellSize::B512, 16, 60)
}

/// The cells of the first LUN, in order.
fn cells(world: &World) -> Vec<(u64, Vec<u8>)> {
    let all = world.disks[0].peek(0, 128 * MIB as usize);
    let found = all.chunks(512).enumerate().filter(|(_, cell)| cell[..5][..4] == *b"VMFc");
    found.map(|(nth, cell)| (nth as u64 * 512, cell.to_vec())).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Writes a cell with a right checksum.
fn put(world: &World, offset: u64, mut cell: Vec<u8>) {
    cell[8..12].fill(0);
    let crc = crc32c::crc32c(&cell);
    cell[8..12].copy_from_slice(&crc.to_le_bytes());
    world.disks[0].damage(offset, &cell);
}

/// Root cells of live objects (`creating` until their first change): FD, offset, cell. The body's place is at 96 + 0x58.
fn roots(world: &World) -> Vec<(u64, u64, Vec<u8>)> {
    let in_use = |(_, cell): &(u64, Vec<u8>)| cell[4] == ROOT && matches!(cell[96], 1 | 2);
    cells(world).into_iter().filter(in_use).map(|(offset, cell)| (u64_at(&cell, 72), offset, cell)).collect()
}

/// Offset of the unit that a unit reference names: blocks of 64 KiB begin at `data`.
fn unit_offset(reference: u64, data: u64) -> u64 {
    let (block, unit) = (reference >> 20 & 0xf_ffff_ffff, reference >> 8 & 0xfff);
    data + block * 65536 + unit * 8192
}

fn data_offset(world: &World) -> u64 {
    u64_at(&world.disks[0].peek(0x10_0000, 512), 96 + 0xe0 + 24)
}

/// Changes the body of an object and makes its root cell agree with it.
fn change_body(world: &World, root: &(u64, u64, Vec<u8>), change: impl FnOnce(&mut [u8])) {
    let (_, root_at, mut root) = root.clone();
    let reference = u64_at(&root, 96 + 0x58);
    let (at, used) = (unit_offset(reference, data_offset(world)), (reference & 0xff) as usize);
    let images = world.disks[0].peek(at, used * 512);
    let mut stream: Vec<u8> = images.chunks(512).flat_map(|cell| cell[96..].to_vec()).collect();
    change(&mut stream);
    let mut crc = 0;
    for (nth, payload) in stream.chunks(416).enumerate() {
        let mut cell = images[nth * 512..nth * 512 + 512].to_vec();
        cell[96..].copy_from_slice(payload);
        put(world, at + nth as u64 * 512, cell);
        crc = crc32c::crc32c_append(crc, &world.disks[0].peek(at + nth as u64 * 512, 512));
    }
    root[96 + 0x60..96 + 0x64].copy_from_slice(&crc.to_le_bytes());
    put(world, root_at, root);
}

/// The object whose body satisfies `wanted`.
fn object(world: &World, wanted: impl Fn(&[u8]) -> bool) -> (u64, u64, Vec<u8>) {
    let body_of = |root: &(u64, u64, Vec<u8>)| {
        let at = unit_offset(u64_at(&root.2, 96 + 0x58), data_offset(world));
        world.disks[0].peek(at, 8192).chunks(512).flat_map(|cell| cell[96..].to_vec()).collect::<Vec<u8>>()
    };
    roots(world).into_iter().find(|root| wanted(&body_of(root))).expect("the volume has such an object")
}

/// A body of this content kind and name hint.
fn named(kind: u8, name: &'static str) -> impl Fn(&[u8]) -> bool {
    move |body| body[0] == kind && usize::from(body[3]) == name.len() && body[72..].starts_with(name.as_bytes())
}

#[track_caller]
fn told(world: &World, structure: Structure, field: &str) -> Vec<Finding> {
    let (report, findings) = world.check();
    let there = findings.iter().any(|f| f.severity == Severity::Error && f.structure == structure && f.field == field);
    assert!(there && !report.is_clean(), "no {field} of a {} in {}", structure.name(), listed(&findings));
    findings
}

/// What it is, the structure and the field that tell it, and how it is made.
type Lie<'a> = (&'a str, Structure, &'a str, &'a dyn Fn(&World));

/// Tells lies about the same volume, one after another.
fn each_lie(lies: &[Lie<'_>]) {
    let world = content();
    let sound = world.disks[0].snapshot();
    for (what, structure, field, lie) in lies {
        lie(&world);
        let (_, findings) = world.check();
        let is = |f: &&Finding| f.severity == Severity::Error && f.structure == *structure && f.field == *field;
        assert!(
            findings.iter().any(|f| is(&f)),
            "{what}: no {field} of a {} in {}",
            structure.name(),
            listed(&findings)
        );
        world.disks[0].restore(&sound);
    }
    world.assert_clean();
}

#[test]
fn a_flipped_byte_in_each_kind_of_cell_in_use_is_told_with_the_structure() {
    let world = content();
    let all = cells(&world);
    let structures = BTreeMap::from([
        (BLOCK_TABLE, Structure::BlockTable),
        (UNIT_TABLE, Structure::UnitTable),
        (ROOT, Structure::RootCell),
        (BODY, Structure::Body),
        (POINTER_BLOCK, Structure::PointerBlock),
        (INNER, Structure::InnerUnit),
        (BUCKET, Structure::Bucket),
    ]);
    let bodies: Vec<u64> =
        roots(&world).iter().map(|root| unit_offset(u64_at(&root.2, 96 + 0x58), data_offset(&world))).collect();
    for (kind, structure) in structures {
        let of_kind: Vec<_> = all.iter().filter(|(_, cell)| cell[4] == kind).collect();
        // Units are given back and keep their last content: a body is in use when a root cell names it; of the other kinds some are.
        let in_use: Vec<u64> = match kind {
            BODY => bodies.clone(),
            _ => of_kind.iter().map(|(offset, _)| *offset).collect(),
        };
        let step = (in_use.len() / 4).max(1);
        let mut hits = 0;
        for offset in in_use.iter().step_by(step) {
            for at in [1, 9, 70, 100, 511] {
                hits += usize::from(after_a_flip(&world, *offset, at).contains(&structure));
            }
        }
        assert!(hits >= 5, "{}: {hits} of its damaged cells were told as that", structure.name());
    }
    world.assert_clean();
}

#[test]
fn lies_of_root_cells_are_told() {
    let change = |world: &World, name: &'static str, at: usize, bytes: &[u8]| {
        let (_, offset, mut cell) = object(world, named(1, name));
        cell[at..at + bytes.len()].copy_from_slice(bytes);
        put(world, offset, cell);
    };
    each_lie(&[
        ("another parent", Structure::RootCell, "name", &|w| {
            let other = object(w, named(5, "other")).0.to_le_bytes();
            change(w, "inline", 96 + 0x10, &other);
        }),
        ("a later link", Structure::RootCell, "name", &|w| change(w, "inline", 80, &[9])),
        ("another type", Structure::Body, "content", &|w| change(w, "inline", 97, &[4])),
        ("no LUN", Structure::RootCell, "luns", &|w| change(w, "inline", 96 + 0x38, &[0])),
        ("a foreign LUN", Structure::RootCell, "luns", &|w| change(w, "inline", 96 + 0x38, &[6])),
        ("a lock of nobody", Structure::RootCell, "holders", &|w| {
            change(w, "inline", 96 + 4, &[1, 1]);
            change(w, "inline", 96 + 0x68, &[3, 0, 0, 0, 0, 17]);
        }),
        ("another body's checksum", Structure::Body, "crc of the unit", &|w| {
            change(w, "inline", 96 + 0x60, &[1, 2, 3])
        }),
        ("an impossible state", Structure::RootCell, "state", &|w| change(w, "inline", 96, &[9])),
        ("unlinking for ever", Structure::RootCell, "kind", &|w| {
            let (_, offset, mut cell) = object(w, named(1, "inline"));
            cell[96] = 4;
            put(w, offset, cell);
        }),
        ("unclean beyond its token", Structure::RootCell, "unclean_token", &|w| {
            change(w, "inline", 96 + 0x20, &[0xff; 4])
        }),
    ]);
}

#[test]
fn lies_of_tables_are_told() {
    // The first entry of this kind in a cell of that kind: where it lies.
    let entry = |world: &World, cell_kind: u8, entry_kind: u8| {
        let in_cell = |cell: &[u8]| (0..26).map(|n| 96 + n * 16).find(|at| cell[at + 12] == entry_kind);
        let all = cells(world).into_iter().filter(move |(_, cell)| cell[4] == cell_kind);
        all.filter_map(|(offset, cell)| in_cell(&cell).map(|at| (offset, at, cell))).next().expect("there is one")
    };
    let change = |world: &World, (cell_kind, entry_kind): (u8, u8), field: usize, bytes: &[u8]| {
        let (offset, at, mut cell) = entry(world, cell_kind, entry_kind);
        cell[at + field..at + field + bytes.len()].copy_from_slice(bytes);
        put(world, offset, cell);
    };
    let (data, body, pointers) = ((BLOCK_TABLE, 1), (UNIT_TABLE, 9), (UNIT_TABLE, 10));
    each_lie(&[
        ("a used block is free", Structure::BlockTable, "entry", &|w| change(w, data, 0, &[0; 16])),
        ("of another file block", Structure::BlockTable, "entry", &|w| change(w, data, 8, &[77])),
        ("of another object", Structure::BlockTable, "entry", &|w| change(w, data, 0, &[99])),
        ("a kind of units", Structure::BlockTable, "kind", &|w| change(w, data, 12, &[9])),
        ("no object", Structure::BlockTable, "fd", &|w| change(w, data, 0, &[0; 8])),
        ("a free block with an owner", Structure::BlockTable, "kind", &|w| change(w, (BLOCK_TABLE, 0), 0, &[5])),
        ("data that nothing reaches", Structure::BlockTable, "kind", &|w| {
            let (_, at, cell) = entry(w, BLOCK_TABLE, 1);
            change(w, (BLOCK_TABLE, 0), 0, &cell[at..at + 16]);
        }),
        ("retiring by nobody", Structure::BlockTable, "kind", &|w| change(w, data, 12, &[6, 44, 3, 1])),
        ("formatting by nobody", Structure::BlockTable, "kind", &|w| change(w, (BLOCK_TABLE, 0), 12, &[3, 44, 3])),
        ("a used unit is free", Structure::UnitTable, "entry", &|w| change(w, body, 0, &[0; 16])),
        ("a body of another object", Structure::UnitTable, "entry", &|w| change(w, body, 0, &[9])),
        ("another pointer block", Structure::UnitTable, "entry", &|w| change(w, pointers, 8, &[9])),
        ("a kind of blocks", Structure::UnitTable, "kind", &|w| change(w, body, 12, &[1])),
        ("a table behind the table", Structure::UnitTable, "kind", &|w| change(w, (UNIT_TABLE, 0), 12, &[8])),
        ("a table that is none", Structure::UnitTable, "kind", &|w| change(w, (UNIT_TABLE, 8), 12, &[0])),
        ("a table cell with an owner", Structure::BlockTable, "owner", &|w| {
            let (offset, _, mut cell) = entry(w, BLOCK_TABLE, 1);
            cell[72..80].copy_from_slice(&roots(w)[0].0.to_le_bytes());
            put(w, offset, cell);
        }),
        ("pooled by nobody", Structure::UnitTable, "kind", &|w| change(w, (UNIT_TABLE, 0), 12, &[2, 44, 3])),
    ]);
}

#[test]
fn lies_of_pointers_are_told() {
    // A cell of a pointer block that is in use: the disk's, whose first pointer block holds blocks 0 and 1.
    let pointers = |world: &World| {
        let owner = object(world, named(2, "two")).0;
        let is = |cell: &[u8]| cell[4] == POINTER_BLOCK && u64_at(cell, 72) == owner && u64_at(cell, 96) != 0;
        cells(world).into_iter().find(|(_, cell)| is(cell)).expect("the disk has a pointer block")
    };
    let change = |world: &World, at: usize, bytes: &[u8]| {
        let (offset, mut cell) = pointers(world);
        cell[at..at + bytes.len()].copy_from_slice(bytes);
        put(world, offset, cell);
    };
    each_lie(&[
        ("one block twice", Structure::PointerBlock, "reached", &|w| {
            let first = pointers(w).1[96..104].to_vec();
            change(w, 104, &first);
        }),
        ("a block behind the end", Structure::PointerBlock, "block", &|w| change(w, 100, &[0xff])),
        ("a LUN that is not there", Structure::PointerBlock, "lun", &|w| change(w, 103, &[7])),
        ("shared", Structure::PointerBlock, "shared", &|w| {
            let low = pointers(w).1[96];
            change(w, 96, &[low | 2]);
        }),
        ("unknown bits", Structure::PointerBlock, "flags", &|w| {
            let low = pointers(w).1[96];
            change(w, 96, &[low | 8]);
        }),
        ("a token of the future", Structure::PointerBlock, "token", &|w| change(w, 94, &[1])),
        ("another index", Structure::PointerBlock, "index", &|w| change(w, 12, &[1])),
        ("another owner", Structure::PointerBlock, "owner", &|w| change(w, 72, &[0])),
    ]);
}

#[test]
fn lies_of_directories_and_bodies_are_told() {
    // The entry of a name in a body: its first byte. An entry is 20 bytes and the name.
    let entry = |body: &[u8], name: &[u8]| body.windows(name.len()).rposition(|w| w == name).expect("it is there") - 20;
    each_lie(&[
        ("a name twice", Structure::Body, "name", &|w| {
            change_body(w, &object(w, named(5, "vm")), |body| {
                let at = entry(body, b"inline") + 20;
                body[at..at + 6].copy_from_slice(b"mapped");
            });
        }),
        ("a child of the future", Structure::Body, "link", &|w| {
            change_body(w, &object(w, named(5, "vm")), |body| {
                let at = entry(body, b"inline");
                body[at + 8] = 99;
            });
        }),
        ("an orphan", Structure::RootCell, "name", &|w| {
            change_body(w, &object(w, named(5, "vm")), |body| {
                let at = entry(body, b"inline");
                body[at + 8] = 99;
            });
        }),
        ("another type", Structure::Body, "type", &|w| {
            change_body(w, &object(w, named(5, "vm")), |body| {
                let at = entry(body, b"inline");
                body[at + 16] = 2;
            });
        }),
        ("a child that is no root cell", Structure::Body, "fd", &|w| {
            change_body(w, &object(w, named(5, "vm")), |body| {
                let at = entry(body, b"inline");
                body[at + 4] = 0x77;
            });
        }),
        ("a wrong count", Structure::Body, "size", &|w| {
            change_body(w, &object(w, named(5, "vm")), |body| body[0x10] += 1);
        }),
        ("a link's length", Structure::Body, "size", &|w| {
            change_body(w, &object(w, named(3, "link2")), |body| body[0x10] += 1);
        }),
        ("more inline bytes than the size", Structure::Body, "size", &|w| {
            change_body(w, &object(w, named(1, "inline")), |body| body[0x10..0x12].fill(0));
        }),
        ("a disk's kind on a file", Structure::Body, "disk", &|w| {
            change_body(w, &object(w, named(1, "inline")), |body| body[2] = 1);
        }),
        ("an unknown content", Structure::Body, "content and height", &|w| {
            change_body(w, &object(w, named(1, "inline")), |body| body[0] = 9);
        }),
        ("a pointer block twice", Structure::PointerBlock, "reached", &|w| {
            change_body(w, &object(w, named(2, "two")), |body| {
                let from = 72 + 3;
                let first = body[from..from + 8].to_vec();
                body[from + 8..from + 16].copy_from_slice(&first);
            });
        }),
    ]);
}

#[test]
fn a_wrong_count_of_blocks_is_a_hint_and_no_error() {
    let world = content();
    change_body(&world, &object(&world, named(2, "two")), |body| body[0x18] += 1);
    let (report, findings) = world.check();
    assert!(report.is_clean() && report.recoverable == 1, "{}", listed(&findings));
    assert_eq!((findings[0].structure, findings[0].field), (Structure::Body, "blocks"));
}

#[test]
fn a_damaged_table_cell_does_not_make_everything_behind_it_an_error() {
    let world = content();
    // The cell that names the first containers.
    world.disks[0].damage(0x40_0000 + 200, &[0xff; 8]);
    let findings = told(&world, Structure::BlockTable, "crc");
    let errors = findings.iter().filter(|f| f.severity == Severity::Error).count();
    assert_eq!(errors, 1, "{}", listed(&findings));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_lie_about_a_volume_with_content_makes_it_panic(
        lies in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..512, any::<u8>()), 1..60),
    ) {
        thread_local! {
            static WORLD: (World, Vec<u64>) = {
                let world = content();
                let useful = |(_, cell): &(u64, Vec<u8>)| cell[4] != 8 && (cell[4] != ROOT || cell[96] != 0);
                let places = cells(&world).into_iter().filter(useful).map(|(offset, _)| offset).collect();
                (world, places)
            };
        }
        WORLD.with(|(world, places)| {
            let sound = world.disks[0].snapshot();
            for (place, at, byte) in &lies {
                let offset = *place.get(places);
                let mut cell = world.disks[0].peek(offset, 512);
                cell[*at] = *byte;
                put(world, offset, cell);
            }
            let _ = world.sim.block_on(check(&world.luns, &mut Vec::new()));
            world.disks[0].restore(&sound);
        });
    }
}
