//! How many seeds the long tests run: `VMFS_TEST_SCALE` multiplies them, 1 when unset.

use std::ops::Range;

/// `count` seeds from `first` on, times the scale.
pub fn seeds(first: u64, count: u64) -> Range<u64> {
    let scale = std::env::var("VMFS_TEST_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1);
    first..first + count * scale
}
