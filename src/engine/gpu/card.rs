//! How do codes lie on the card, and what does a row take there?
//!
//! The files keep codes as the CPU's kernels read them; here neighbouring rows' words lie side by
//! side, so that neighbouring invocations read neighbouring words. `shaders/bindings.wgsl` has the
//! layout. Pure; knows slices alone.

use rayon::prelude::*;
use thenar_index::codes::{BLOCK_ROWS, Codes, Factors};
use zeroize::Zeroize;

use super::level::{Level, QUAD};

/// Bytes of a row's factors on the card.
pub(super) const TERMS_BYTES: usize = 8;

/// Bytes of codes and factors that a row takes on the card.
pub(super) fn row_bytes(dim: usize) -> usize {
    Level::ALL.iter().map(|level| level.row_bytes(dim)).sum::<usize>() + TERMS_BYTES
}

/// Codes of whole blocks in the layout of the card. Wiped when it is dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct CardCodes {
    /// Shape: `[blocks, quads, 64, 4]`.
    pub one_bit: Vec<u32>,
    /// Shape: `[blocks, quads, 64, 4]`.
    pub four_bit: Vec<u32>,
    /// Shape: `[rows]`.
    pub factors: Vec<[u32; 2]>,
}

impl CardCodes {
    /// `codes` laid out anew.
    pub(super) fn new(codes: &Codes<'_>, dim: usize) -> Self {
        let blocks = codes.rows() / BLOCK_ROWS;
        let sign_words = Level::OneBit.quads(dim) * QUAD * BLOCK_ROWS;
        let fine_words = Level::FourBit.quads(dim) * QUAD * BLOCK_ROWS;
        let mut card = Self {
            one_bit: vec![0; blocks * sign_words],
            four_bit: vec![0; blocks * fine_words],
            factors: codes.factors.iter().map(|factors| packed(*factors)).collect(),
        };
        let of_signs =
            codes.one_bit.par_chunks_exact(dim / 8 * BLOCK_ROWS).zip(card.one_bit.par_chunks_exact_mut(sign_words));
        of_signs.for_each(|(lines, to)| {
            // Word w of a row is made of its bytes in lines 4w to 4w + 3.
            for (word, lines) in lines.chunks_exact(4 * BLOCK_ROWS).enumerate() {
                for row in 0..BLOCK_ROWS {
                    let bytes = std::array::from_fn(|line| lines[line * BLOCK_ROWS + row]);
                    to[(word / QUAD * BLOCK_ROWS + row) * QUAD + word % QUAD] = u32::from_le_bytes(bytes);
                }
            }
        });
        let of_fine =
            codes.four_bit.par_chunks_exact(dim / 2 * BLOCK_ROWS).zip(card.four_bit.par_chunks_exact_mut(fine_words));
        of_fine.for_each(|(rows, to)| {
            for (row, code) in rows.chunks_exact(dim / 2).enumerate() {
                for (word, bytes) in code.as_chunks::<4>().0.iter().enumerate() {
                    to[(word / QUAD * BLOCK_ROWS + row) * QUAD + word % QUAD] = u32::from_le_bytes(*bytes);
                }
            }
        });
        card
    }
}

impl Drop for CardCodes {
    fn drop(&mut self) {
        self.one_bit.zeroize();
        self.four_bit.zeroize();
        bytemuck::cast_slice_mut::<[u32; 2], u32>(&mut self.factors).zeroize();
    }
}

/// The factors of a row as the card has them.
fn packed(factors: Factors) -> [u32; 2] {
    // Stored cosines are whole parts, so these products are exact.
    let parts = |cosine: f32| (cosine * super::bindings::COSINE_PARTS) as u32;
    [parts(factors.one_bit_cosine()) | parts(factors.four_bit_cosine()) << 16, factors.four_bit_square()]
}

#[cfg(test)]
mod tests {
    use half::f16;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use thenar_index::codes::OwnedCodes;

    use super::*;

    #[test]
    fn every_component_of_every_row_lies_where_the_kernels_read_it() {
        for dim in [32, 96, 128, 544] {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            let rows: Vec<f16> = (0..128 * dim).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect();
            let owned = OwnedCodes::of(&rows, dim);
            let codes = owned.as_codes();
            let card = CardCodes::new(&codes, dim);
            for row in 0..128 {
                assert_eq!(card.factors[row][1], codes.factors[row].four_bit_square());
                assert_eq!((card.factors[row][0] & 0xffff) as f32 / 65_536.0, codes.factors[row].one_bit_cosine());
                assert_eq!((card.factors[row][0] >> 16) as f32 / 65_536.0, codes.factors[row].four_bit_cosine());
                for level in Level::ALL {
                    let words = if level == Level::OneBit { &card.one_bit } else { &card.four_bit };
                    let mut seen = vec![0; dim];
                    for quad in 0..level.quads(dim) {
                        for (word, nth) in (0..QUAD).flat_map(|word| (0..level.spreads()).map(move |nth| (word, nth))) {
                            let at = (((row / 64) * level.quads(dim) + quad) * 64 + row % 64) * QUAD + word;
                            let bytes = super::super::bindings::spread(words[at], level, nth as u32).to_le_bytes();
                            for (byte, found) in bytes.into_iter().enumerate() {
                                let i = level.component(dim, quad, nth, word, byte);
                                let Some(seen) = seen.get_mut(i) else {
                                    assert_eq!(found, 0, "padding");
                                    continue;
                                };
                                *seen += 1;
                                let expected = match level {
                                    Level::OneBit => {
                                        codes.one_bit[(row / 64 * dim / 8 + i / 8) * 64 + row % 64] >> (i % 8) & 1
                                    }
                                    Level::FourBit => {
                                        let byte = codes.four_bit[row * dim / 2 + i % (dim / 2)];
                                        if i < dim / 2 { byte & 15 } else { byte >> 4 }
                                    }
                                };
                                assert_eq!(found, expected, "dim {dim} row {row} {level:?} component {i}");
                            }
                        }
                    }
                    assert!(seen.iter().all(|&times| times == 1), "dim {dim} {level:?}");
                }
            }
        }
    }
}
