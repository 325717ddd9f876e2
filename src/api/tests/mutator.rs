//! A deterministic mutator of bytes that knows what a varint is, and nothing else of Protocol Buffers.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Bytes of a mutated message, at most.
const BYTES_MAX: usize = 64 << 10;
/// Varints at the limits of their types, one of ten bytes that is too large, and one without an end.
const VARINTS: [&[u8]; 8] = [
    &[0x00],
    &[0x7f],
    &[0xff, 0xff, 0x03],
    &[0xff, 0xff, 0xff, 0xff, 0x07],
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
    &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80],
];

pub(in crate::api) struct Mutator(pub(in crate::api) ChaCha8Rng);

impl Mutator {
    pub(in crate::api) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(in crate::api) fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    /// Two places in `bytes`, in order.
    fn range(&mut self, bytes: &[u8]) -> std::ops::Range<usize> {
        let (a, b) = (self.below(bytes.len() + 1), self.below(bytes.len() + 1));
        a.min(b)..a.max(b)
    }

    /// `bytes` after one to four mutations, some of which use `other`.
    pub(in crate::api) fn mutate(&mut self, bytes: &[u8], other: &[u8]) -> Vec<u8> {
        let mut mutated = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(mutated.len() + 1);
            match self.below(8) {
                0 | 1 if at < mutated.len() => mutated[at] ^= 1 << self.below(8),
                2 if at < mutated.len() => mutated[at] = [0, 0x7f, 0x80, 0xff][self.below(4)],
                3 => mutated.truncate(at),
                4 => {
                    let varint = VARINTS[self.below(VARINTS.len())];
                    mutated.splice(at..at, varint.iter().copied());
                }
                5 => {
                    let part = self.range(other);
                    mutated.splice(at..at, other[part].iter().copied());
                }
                6 => {
                    let part = self.range(&mutated);
                    mutated.drain(part);
                }
                _ => {
                    let part = self.range(&mutated);
                    let copies = mutated[part].repeat(1 + self.below(3));
                    mutated.splice(at..at, copies);
                }
            }
            mutated.truncate(BYTES_MAX);
        }
        mutated
    }
}
