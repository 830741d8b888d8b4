//! The bare-metal fast test guest: its image, and what tests need to judge what it did.
//!
//! The image is an ELF program with a PVH entry note that needs no firmware and no operating system. It takes its job
//! from the kernel command line (see [`job`]), drives a PVSCSI, LSI Logic, BusLogic or virtio-scsi adapter by a small driver of its
//! own, reports `key=value` lines on COM1, the last one being `guest: N passed, N failed`, and ends its machine through
//! I/O port 0xF4 with status 0 or 1.
#![forbid(unsafe_code)]

pub mod job;
pub mod pattern;

// Never compiled here (the build script does that): it makes `cargo fmt` see the image's sources.
#[cfg(any())]
#[path = "../image/main.rs"]
mod image;

/// The image: a static ELF64 program loaded at 1 MiB, entered by its PVH note.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/test-guest.elf"));

/// Where `job=spin` counts: the physical address of a little-endian u64.
pub const SPIN_COUNTER: u64 = 0x9000;

#[cfg(test)]
mod tests {
    use super::job::{Discard, Interrupt, Job, Mix, Task};
    use super::pattern::{Content, Order, SECTOR, Stamp, Visit, fill_range, first_mismatch, inspect};
    use proptest::prelude::*;

    #[test]
    fn a_job_is_read_word_by_word() {
        let text = "job=verify size=64M block=4k depth=32 seed=7 pattern=random passes=1 interrupt=intx";
        let job = Job::parse(text).expect("parses");
        assert_eq!((job.task, job.size, job.block, job.depth), (Task::Verify, 64 << 20, 4096, 32));
        assert_eq!((job.seed, job.order, job.passes), (7, Order::Random, 1));
        assert_eq!(job.interrupt, Interrupt::Intx);
        let discard = Job::parse("job=discard by=writesame fua=1").expect("parses");
        assert_eq!((discard.task, discard.discard, discard.force), (Task::Discard, Discard::WriteSame, true));
        let bench = Job::parse("job=bench rw=randwrite bs=1m depth=4 seconds=5").expect("parses");
        assert_eq!((bench.task, bench.mix, bench.block, bench.seconds), (Task::Bench, Mix::RandomWrite, 1 << 20, 5));
    }

    #[test]
    fn a_word_that_cannot_be_is_refused_by_name() {
        for word in [
            "job=dance",
            "depth=0",
            "depth=257",
            "block=100",
            "size",
            "colour=red",
            "seed=-1",
            "fua=2",
            "by=trim",
            "size=99999999999g",
        ] {
            let text = format!("job=info {word}");
            assert_eq!(Job::parse(&text).expect_err(word).word, word);
        }
    }

    #[test]
    fn a_sector_tells_its_generation_and_any_damage() {
        let mut bytes = vec![0; SECTOR];
        assert_eq!(inspect(&bytes, 7, 9), Content::Zero);
        Stamp { seed: 7, sector: 9, generation: 3 }.fill(&mut bytes);
        assert_eq!(inspect(&bytes, 7, 9), Content::Stamped(3));
        assert_eq!(inspect(&bytes, 8, 9), Content::Foreign);
        assert_eq!(inspect(&bytes, 7, 10), Content::Foreign);
        bytes[511] ^= 1;
        assert_eq!(inspect(&bytes, 7, 9), Content::Foreign);
    }

    #[test]
    fn the_pattern_is_the_same_for_ever() {
        let mut bytes = vec![0; SECTOR];
        Stamp { seed: 1, sector: 2, generation: 3 }.fill(&mut bytes);
        assert_eq!(&bytes[..32], b"TGUESTv1\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0");
        assert_ne!(bytes[32..40], bytes[40..48]);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_job_parser_panic(text in "\\PC{0,60}") {
            let _ = Job::parse(&text);
        }

        #[test]
        fn a_visit_touches_each_block_once(blocks in 1u64..3000, seed in any::<u64>(), pass in 0u64..5, random in any::<bool>()) {
            let order = if random { Order::Random } else { Order::Sequential };
            let visit = Visit::new(order, blocks, seed, pass);
            let mut seen = vec![false; blocks as usize];
            for index in 0..blocks {
                prop_assert!(!std::mem::replace(&mut seen[visit.block(index) as usize], true));
            }
        }

        #[test]
        fn any_changed_byte_of_a_range_is_found(at in 0usize..4096, change in 1u8..) {
            let mut bytes = vec![0; 4096];
            fill_range(&mut bytes, 1, 100, 2);
            prop_assert_eq!(first_mismatch(&bytes, 1, 100, 2), None);
            bytes[at] ^= change;
            prop_assert_eq!(first_mismatch(&bytes, 1, 100, 2), Some(100 + (at / SECTOR) as u64));
        }
    }
}
