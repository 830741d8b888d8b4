//! Owns the stamped pattern that the guest writes, and the order in which it visits blocks.
//! Promises the same bytes and the same order for the same numbers, in the guest and on the host.
//! Must not know devices, jobs or where a sector was read from. (Compiled into the guest's image too: `core` only.)

/// Bytes in a stamped sector; stamps count in these, whatever the disk's logical block is.
pub const SECTOR: usize = 512;

/// First word of each stamped sector: `TGUESTv1` in ASCII, first letter lowest.
const MAGIC: u64 = u64::from_le_bytes(*b"TGUESTv1");
const WORDS: usize = SECTOR / 8;

/// What a stamped sector carries in its first words, and what the rest is derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The run's seed.
    pub seed: u64,
    /// Where the sector belongs: byte offset on the disk divided by [`SECTOR`].
    pub sector: u64,
    /// Which write of the sector this is.
    pub generation: u64,
}

/// What a sector turned out to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The stamp of this seed and place, whole, of this generation.
    Stamped(u64),
    /// Zeros only: never written, or discarded.
    Zero,
    /// Anything else: another seed or place, a torn mixture, or foreign bytes.
    Foreign,
}

impl Stamp {
    /// The sector's words in order.
    fn words(self) -> impl Iterator<Item = u64> {
        let Stamp { seed, sector, generation } = self;
        let start = mix(seed ^ mix(sector ^ mix(generation)));
        let head = [MAGIC, seed, sector, generation];
        let body =
            (0..(WORDS - 4) as u64).map(move |index| start.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        head.into_iter().chain(body.map(|word| word ^ (word >> 29)))
    }

    /// Writes the stamped sector into `bytes`, which is [`SECTOR`] long; what is beyond stays as it is.
    pub fn fill(self, bytes: &mut [u8]) {
        for (place, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Does `bytes` hold exactly this stamped sector?
    pub fn matches(self, bytes: &[u8]) -> bool {
        bytes.len() == SECTOR
            && bytes.chunks_exact(8).zip(self.words()).all(|(place, word)| *place == word.to_le_bytes())
    }
}

/// Says what `bytes`, one sector, holds, when `seed` and `sector` are what belongs there.
pub fn inspect(bytes: &[u8], seed: u64, sector: u64) -> Content {
    if bytes.iter().all(|byte| *byte == 0) {
        return Content::Zero;
    }
    let Some(generation) = bytes.get(24..32).and_then(|word| word.try_into().ok()).map(u64::from_le_bytes) else {
        return Content::Foreign;
    };
    if (Stamp { seed, sector, generation }).matches(bytes) { Content::Stamped(generation) } else { Content::Foreign }
}

/// Stamps every sector of `bytes`, a whole number of sectors whose first one is `first`.
pub fn fill_range(bytes: &mut [u8], seed: u64, first: u64, generation: u64) {
    for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
        Stamp { seed, sector, generation }.fill(bytes);
    }
}

/// The first sector of `bytes`, whose first one is `first`, that does not carry its stamp; `None` if all do.
pub fn first_mismatch(bytes: &[u8], seed: u64, first: u64, generation: u64) -> Option<u64> {
    let mut sectors = (first..).zip(bytes.chunks_exact(SECTOR));
    sectors
        .find(|(sector, bytes)| !(Stamp { seed, sector: *sector, generation }).matches(bytes))
        .map(|(sector, _)| sector)
}

/// SplitMix64's finaliser: spreads each bit of `word` over all of them.
pub const fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// How a job visits its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Lowest first.
    Sequential,
    /// Scattered, each block once.
    Random,
}

/// The order of one visit to each of `blocks` blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    blocks: u64,
    step: u64,
    start: u64,
}

impl Visit {
    /// A visit to `blocks` blocks in the order that `seed` and `pass` give.
    pub fn new(order: Order, blocks: u64, seed: u64, pass: u64) -> Visit {
        if order == Order::Sequential || blocks < 2 {
            return Visit { blocks, step: 1, start: 0 };
        }
        let random = mix(seed ^ mix(pass));
        let mut step = random % blocks;
        while greatest_common_divisor(step, blocks) != 1 {
            step = (step + 1) % blocks;
        }
        Visit { blocks, step, start: mix(random) % blocks }
    }

    /// Which block is visited as number `index` (below the number of blocks).
    pub fn block(&self, index: u64) -> u64 {
        let place = u128::from(index) * u128::from(self.step) + u128::from(self.start);
        (place % u128::from(self.blocks.max(1))) as u64
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
