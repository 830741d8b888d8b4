//! Owns: corpora of inputs that parsers are fed with, and their mutations.
//! Promises: the same seeds give the same mutations; `VMFS_TEST_SCALE` multiplies their number and changes nothing of the first ones.
//! Must not know: what is parsed.

/// Mutations of one corpus in an ordinary run.
const COUNT: usize = 4000;
/// Values at which lengths and counts go wrong.
const EDGES: [u8; 8] = [0x00, 0x01, 0x02, 0x07, 0x7F, 0x80, 0xFE, 0xFF];

/// Bytes of a corpus: a line each, hexadecimal digits in any groups, with a remark behind `#`.
fn parse(corpus: &str) -> Vec<Vec<u8>> {
    let seed = |line: &str| {
        let digits: Vec<u8> = line.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).expect("two digits");
        assert!(digits.len().is_multiple_of(2), "an odd number of digits: {line}");
        digits.chunks(2).map(byte).collect()
    };
    let lines = corpus.lines().map(|line| line.split('#').next().unwrap_or("").trim());
    lines.filter(|line| !line.is_empty()).map(seed).collect()
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// Feeds `check` with every seed of `corpus`, and with mutations of them.
pub(crate) fn for_each(corpus: &str, mut check: impl FnMut(&[u8])) {
    let seeds = parse(corpus);
    assert!(!seeds.is_empty(), "an empty corpus");
    seeds.iter().for_each(|seed| check(seed));
    let scale = std::env::var("VMFS_TEST_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1);
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for _ in 0..COUNT * scale {
        let mut input = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut input, &seeds, &mut random);
        }
        check(&input);
    }
}

fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len());
    match random.below(8) {
        0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
        1 if !input.is_empty() => input[at] = EDGES[random.below(EDGES.len())],
        2 if !input.is_empty() => input[at] = random.below(256) as u8,
        3 => input.truncate(at),
        4 => input.insert(at, EDGES[random.below(EDGES.len())]),
        5 if !input.is_empty() => drop(input.remove(at)),
        // A number of two or four bytes.
        6 => {
            let length = 2 << random.below(2);
            let edge = EDGES[random.below(EDGES.len())];
            input.iter_mut().skip(at).take(length).for_each(|byte| *byte = edge);
        }
        // The start of one and the end of another.
        _ => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
    }
}
