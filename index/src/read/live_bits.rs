//! Which rows of a segment are live: one bit per row.
//!
//! Views share the bits with the writer. To change them the writer makes its own copy, 8 KiB for a
//! segment of 65,536 rows. So the bits of a view never change.

use std::sync::Arc;

/// Bit `i % 64` of word `i / 64` is set if row `i` is live. A clone is cheap, and later changes of the
/// original do not affect it.
#[derive(Debug, Clone)]
pub(crate) struct LiveBits(Arc<[u64]>);

impl LiveBits {
    /// Bits for `capacity` rows, none of which is live.
    pub(crate) fn none(capacity: u32) -> Self {
        Self((0..capacity / 64).map(|_| 0).collect())
    }

    /// The bits in `words`.
    pub(crate) fn of(words: Vec<u64>) -> Self {
        Self(words.into())
    }

    /// The bits as 64-bit words.
    pub(crate) fn words(&self) -> &[u64] {
        &self.0
    }

    /// Whether nothing has changed since one was cloned from the other.
    pub(crate) fn is_unchanged_since(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether the row is live.
    pub(crate) fn has(&self, offset: u32) -> bool {
        self.0[offset as usize / 64] >> (offset % 64) & 1 == 1
    }

    /// Makes a dead row live.
    pub(crate) fn set(&mut self, offset: u32) {
        assert!(!self.has(offset));
        Arc::make_mut(&mut self.0)[offset as usize / 64] |= 1 << (offset % 64);
    }

    /// Makes a live row dead.
    pub(crate) fn clear(&mut self, offset: u32) {
        assert!(self.has(offset));
        Arc::make_mut(&mut self.0)[offset as usize / 64] &= !(1 << (offset % 64));
    }

    /// The first live row at or after `from` and before `end`.
    pub(crate) fn next(&self, from: u32, end: u32) -> Option<u32> {
        let mut at = from;
        while at < end {
            let word = self.0[at as usize / 64] >> (at % 64);
            if word != 0 {
                let found = at + word.trailing_zeros();
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Number of live rows before `end`.
    pub(crate) fn count(&self, end: u32) -> u64 {
        let (whole, rest) = self.0.split_at(end as usize / 64);
        let rest = if end.is_multiple_of(64) { 0 } else { rest[0] & ((1 << (end % 64)) - 1) };
        whole.iter().chain([&rest]).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Bytes of heap memory.
    pub(crate) fn host_bytes(&self) -> u64 {
        size_of_val(&*self.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_rows_are_found_and_counted_across_words() {
        let mut bits = LiveBits::none(256);
        let live = [0, 1, 63, 64, 127, 200, 255];
        live.iter().for_each(|&row| bits.set(row));
        for end in 0..=256 {
            assert_eq!(bits.count(end), live.iter().filter(|&&row| row < end).count() as u64);
            for from in 0..=end {
                let expected = live.iter().copied().find(|&row| row >= from && row < end);
                assert_eq!(bits.next(from, end), expected, "{from} to {end}");
            }
        }
        let shared = bits.clone();
        live.iter().for_each(|&row| bits.clear(row));
        assert_eq!((bits.count(256), bits.next(0, 256)), (0, None));
        assert_eq!(shared.count(256), 7, "a clone does not change");
    }
}
