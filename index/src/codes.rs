//! Codes: what sifting reads instead of rows, a fraction of their bytes.
//!
//! Three codes of every row x, each a vector of small odd integers that points nearly where x
//! does, each with the cosine of the angle between the two:
//!
//! | code | integers c_i | bytes a row of 512 | usual cosine |
//! |---|---|---|---|
//! | sign | -1, 1 | 64 | 0.80 |
//! | two | -3, -1, 1, 3 | 64 more: the signs are those of the sign code | 0.94 |
//! | fine | -15, -13, ..., 15 | 256 | 0.994 |
//!
//! Codes are kept for *blocks* of [`BLOCK_ROWS`] rows. The sign and two codes of a block lie in
//! lines of 64 bytes: byte r of line j holds the bits of components 8j to 8j + 7 of row r, so that
//! one vector register reads the same components of 64 rows. The fine codes lie row by row.
//!
//! A code is a function of its row, to the bit, on every machine: it is made in f64 by operations
//! that IEEE 754 fixes, in one order. Pure: slices in, slices out. Does not know files, searches
//! or what a cosine is good for (`src/certificate.rs` of the server does).
//!
//! Invariant: a stored cosine is at most the true one.

use bytemuck::{Pod, Zeroable};
use half::f16;

/// Rows of a block.
pub const BLOCK_ROWS: usize = 64;
/// Boundary between magnitudes 1 and 3 of the two code, in units of the row's root mean square:
/// the step of the uniform quantiser of four levels that keeps most of a normal variable (Max,
/// Quantizing for minimum distortion, 1960, table II).
const TWO_STEP: f64 = 0.9957;
/// Step of the fine code's magnitudes, likewise for sixteen levels.
const FINE_STEP: f64 = 0.3352;
/// Stored cosines are whole parts of this.
const COSINE_PARTS: f64 = 65_536.0;
/// Larger than the rounding of a computed cosine in those parts (a few times 2^-53 times
/// [`COSINE_PARTS`] times the dimension), so that rounding down is down from the true one.
const COSINE_SLACK: f64 = 1e-5;

/// What is known of a row's codes beside their bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Terms {
    sign_cosine: u16,
    two_cosine: u16,
    fine_cosine: u16,
    /// Components of magnitude 3 in the two code.
    threes: u16,
    /// Squared length of the fine code.
    fine_square: u32,
}

impl Terms {
    /// Lower bound of the cosine between the row and its sign code.
    #[must_use]
    pub fn sign_cosine(self) -> f32 {
        cosine(self.sign_cosine)
    }

    /// Lower bound of the cosine between the row and its two code.
    #[must_use]
    pub fn two_cosine(self) -> f32 {
        cosine(self.two_cosine)
    }

    /// Lower bound of the cosine between the row and its fine code.
    #[must_use]
    pub fn fine_cosine(self) -> f32 {
        cosine(self.fine_cosine)
    }

    /// Squared length of the two code of a row of `dim` components.
    #[must_use]
    pub fn two_square(self, dim: usize) -> u32 {
        dim as u32 + 8 * u32::from(self.threes)
    }

    /// Squared length of the fine code.
    #[must_use]
    pub fn fine_square(self) -> u32 {
        self.fine_square
    }
}

fn cosine(parts: u16) -> f32 {
    f32::from(parts) / COSINE_PARTS as f32
}

fn parts(cosine: f64) -> u16 {
    // The cast saturates, and takes what is not a number (of a row of zeros) to zero.
    (cosine * COSINE_PARTS - COSINE_SLACK).floor() as u16
}

/// The codes of whole blocks of consecutive rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Codes<'a> {
    /// Shape: `[blocks, dim / 8, 64]`, bits; a set bit is -1.
    pub sign: &'a [u8],
    /// Shape: `[blocks, dim / 8, 64]`, bits; a set bit is a magnitude of 3.
    pub two: &'a [u8],
    /// Shape: `[rows, dim / 2]`. Byte j holds component j in its low half and component
    /// j + dim / 2 in its high half, as (c + 15) / 2.
    pub fine: &'a [u8],
    /// Shape: `[rows]`, a multiple of [`BLOCK_ROWS`].
    pub terms: &'a [Terms],
}

impl<'a> Codes<'a> {
    /// How many rows have codes: those of whole blocks.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.terms.len()
    }

    /// The codes of `count` blocks from the block `first` on.
    ///
    /// # Panics
    /// Where there are not that many.
    #[must_use]
    pub fn blocks(&self, dim: usize, first: usize, count: usize) -> Self {
        let take = |bytes: &'a [u8], each: usize| &bytes[first * each..(first + count) * each];
        Self {
            sign: take(self.sign, sign_bytes(dim)),
            two: take(self.two, sign_bytes(dim)),
            fine: take(self.fine, fine_bytes(dim)),
            terms: &self.terms[first * BLOCK_ROWS..(first + count) * BLOCK_ROWS],
        }
    }
}

/// Bytes of a block's sign code, and of its two code.
#[must_use]
pub const fn sign_bytes(dim: usize) -> usize {
    dim / 8 * BLOCK_ROWS
}

/// Bytes of a block's fine code.
#[must_use]
pub const fn fine_bytes(dim: usize) -> usize {
    dim / 2 * BLOCK_ROWS
}

/// The codes of one block, to be written or compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedCodes {
    dim: usize,
    /// As [`Codes::sign`].
    pub sign: Vec<u8>,
    /// As [`Codes::two`].
    pub two: Vec<u8>,
    /// As [`Codes::fine`].
    pub fine: Vec<u8>,
    /// As [`Codes::terms`].
    pub terms: Vec<Terms>,
}

impl OwnedCodes {
    /// Room for the codes of `rows` rows of `dim` components, all zero.
    ///
    /// # Panics
    /// Where `dim` is not a multiple of 32 or `rows` not one of [`BLOCK_ROWS`].
    #[must_use]
    pub fn zeroed(dim: usize, rows: usize) -> Self {
        assert!(dim.is_multiple_of(32) && rows.is_multiple_of(BLOCK_ROWS));
        let blocks = rows / BLOCK_ROWS;
        Self {
            dim,
            sign: vec![0; blocks * sign_bytes(dim)],
            two: vec![0; blocks * sign_bytes(dim)],
            fine: vec![0; blocks * fine_bytes(dim)],
            terms: vec![Terms::zeroed(); rows],
        }
    }

    /// The codes of `rows`, row-major `[count, dim]`, where `count` is a multiple of
    /// [`BLOCK_ROWS`]. The codes of a row of zeros are zero.
    #[must_use]
    pub fn of(rows: &[f16], dim: usize) -> Self {
        let mut codes = Self::zeroed(dim, rows.len() / dim);
        for (at, row) in rows.chunks_exact(dim).enumerate() {
            codes.put(at, row);
        }
        codes
    }

    /// Replaces the codes of the row at `at`.
    ///
    /// # Panics
    /// Where there is no such place or the row has another dimension.
    pub fn put(&mut self, at: usize, row: &[f16]) {
        let dim = self.dim;
        assert_eq!(row.len(), dim);
        let (block, lane) = (at / BLOCK_ROWS, at % BLOCK_ROWS);
        let sign = &mut self.sign[block * sign_bytes(dim)..][..sign_bytes(dim)];
        let two = &mut self.two[block * sign_bytes(dim)..][..sign_bytes(dim)];
        let fine = &mut self.fine[at * dim / 2..][..dim / 2];

        let square: f64 = row.iter().map(|v| v.to_f64() * v.to_f64()).sum();
        if square == 0.0 {
            sign.iter_mut().skip(lane).step_by(BLOCK_ROWS).for_each(|byte| *byte = 0);
            two.iter_mut().skip(lane).step_by(BLOCK_ROWS).for_each(|byte| *byte = 0);
            fine.fill(0);
            self.terms[at] = Terms::zeroed();
            return;
        }
        let norm = square.sqrt();
        let rms = (square / dim as f64).sqrt();
        let (two_step, fine_step) = (rms * TWO_STEP, rms * FINE_STEP);
        let (mut sign_dot, mut two_dot, mut fine_dot) = (0.0, 0.0, 0.0);
        let (mut threes, mut fine_square) = (0_u16, 0_u32);
        for (j, eight) in row.as_chunks::<8>().0.iter().enumerate() {
            let (mut signs, mut larges) = (0_u8, 0_u8);
            for (bit, value) in eight.iter().enumerate() {
                let negative = value.is_sign_negative();
                let magnitude = value.to_f64().abs();
                let large = magnitude > two_step;
                // At most 7, and magnitudes are finite.
                let level = ((magnitude / fine_step) as u32).min(7) as u8;
                let fine_magnitude = u32::from(2 * level + 1);
                signs |= u8::from(negative) << bit;
                larges |= u8::from(large) << bit;
                sign_dot += magnitude;
                two_dot += if large { 3.0 * magnitude } else { magnitude };
                fine_dot += f64::from(fine_magnitude) * magnitude;
                threes += u16::from(large);
                fine_square += fine_magnitude * fine_magnitude;
                let nibble = if negative { 7 - level } else { 8 + level };
                let i = 8 * j + bit;
                if i < dim / 2 {
                    fine[i] = nibble;
                } else {
                    fine[i - dim / 2] |= nibble << 4;
                }
            }
            sign[j * BLOCK_ROWS + lane] = signs;
            two[j * BLOCK_ROWS + lane] = larges;
        }
        let two_square = f64::from(dim as u32 + 8 * u32::from(threes));
        self.terms[at] = Terms {
            sign_cosine: parts(sign_dot / (norm * (dim as f64).sqrt())),
            two_cosine: parts(two_dot / (norm * two_square.sqrt())),
            fine_cosine: parts(fine_dot / (norm * f64::from(fine_square).sqrt())),
            threes,
            fine_square,
        };
    }

    /// As slices.
    #[must_use]
    pub fn as_codes(&self) -> Codes<'_> {
        Codes { sign: &self.sign, two: &self.two, fine: &self.fine, terms: &self.terms }
    }

    /// Overwrites everything with zeros.
    pub fn wipe(&mut self) {
        self.sign.fill(0);
        self.two.fill(0);
        self.fine.fill(0);
        self.terms.fill(Terms::zeroed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look normal enough, from a seed.
    fn rows(seed: u64, dim: usize, count: usize) -> Vec<f16> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        let mut rows = Vec::with_capacity(dim * count);
        for _ in 0..count {
            let values: Vec<f64> = (0..dim).map(|_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0).collect();
            let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
            rows.extend(values.iter().map(|v| f16::from_f64(v / norm)));
        }
        rows
    }

    /// The integers of a row, read back out of the bits.
    fn integers(codes: &Codes<'_>, dim: usize, at: usize) -> [Vec<f64>; 3] {
        let (block, lane) = (at / BLOCK_ROWS, at % BLOCK_ROWS);
        let bit = |plane: &[u8], i: usize| plane[block * sign_bytes(dim) + i / 8 * BLOCK_ROWS + lane] >> (i % 8) & 1;
        let sign: Vec<f64> = (0..dim).map(|i| if bit(codes.sign, i) == 1 { -1.0 } else { 1.0 }).collect();
        let two = (0..dim).map(|i| sign[i] * if bit(codes.two, i) == 1 { 3.0 } else { 1.0 }).collect();
        let fine = (0..dim)
            .map(|i| {
                let byte = codes.fine[at * dim / 2 + i % (dim / 2)];
                let nibble = if i < dim / 2 { byte & 15 } else { byte >> 4 };
                f64::from(2 * i32::from(nibble) - 15)
            })
            .collect();
        [sign, two, fine]
    }

    #[test]
    fn bits_read_back_point_where_the_row_does_and_the_terms_say_how_nearly() {
        for dim in [32, 96, 128, 512, 1024] {
            let rows = rows(dim as u64, dim, 128);
            let owned = OwnedCodes::of(&rows, dim);
            let codes = owned.as_codes();
            assert_eq!(codes.rows(), 128);
            for (at, row) in rows.chunks_exact(dim).enumerate() {
                let terms = codes.terms[at];
                let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
                let row: Vec<f64> = row.iter().map(|v| v.to_f64()).collect();
                let [sign, two, fine] = integers(&codes, dim, at);
                assert_eq!(norm(&two).powi(2).round() as u32, terms.two_square(dim));
                assert_eq!(norm(&fine).powi(2).round() as u32, terms.fine_square());
                let stored = [terms.sign_cosine(), terms.two_cosine(), terms.fine_cosine()];
                for ((code, stored), least) in [sign, two, fine].iter().zip(stored).zip([0.6, 0.85, 0.96]) {
                    let dot: f64 = row.iter().zip(code).map(|(x, c)| x * c).sum();
                    let cosine = dot / norm(&row) / norm(code);
                    assert!(f64::from(stored) <= cosine, "dim {dim}: {stored} of {cosine}");
                    assert!(cosine - f64::from(stored) < 2.0 / 65_536.0, "dim {dim}: {stored} of {cosine}");
                    assert!(cosine > least, "dim {dim}: {cosine}");
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_has_codes_of_zeros_and_a_replaced_one_leaves_nothing() {
        let dim = 64;
        let mut codes = OwnedCodes::of(&rows(3, dim, 64), dim);
        for at in 0..64 {
            codes.put(at, &vec![f16::ZERO; dim]);
        }
        assert_eq!(codes, OwnedCodes::zeroed(dim, 64));
    }

    #[test]
    fn blocks_are_cut_out_whole() {
        let dim = 64;
        let rows = rows(5, dim, 256);
        let all = OwnedCodes::of(&rows, dim);
        let part = OwnedCodes::of(&rows[64 * dim..192 * dim], dim);
        let cut = all.as_codes().blocks(dim, 1, 2);
        assert_eq!((cut.sign, cut.two, cut.fine, cut.terms), (&*part.sign, &*part.two, &*part.fine, &*part.terms));
    }
}
