//! Computes codes from rows.
//!
//! A code is a function of its row, to the bit, on every machine. Magnitudes are compared through the bits
//! of their f16, which ascend with the value. Sums are f64, by operations that IEEE 754 fixes, in one
//! order: component i is added to partial sum i mod 8, components ascending; then the upper half of the
//! partial sums is added to the lower half until one is left. Products fit f64 exactly, so fused
//! multiply-adds would change nothing. The code is written so that the compiler vectorises it.

use half::f16;

use super::codebook::{self, CODEWORD_BITS, GROUP_DIMS};
use super::{BLOCK_ROWS, CODEBOOK_COSINE_PARTS, COSINE_PARTS, Factors, OwnedCodes, codebook_bytes, one_bit_bytes};
use crate::types::{DIM_MAX, DIM_STEP};

/// Components processed at once, and number of partial sums. Eight bits of a plane make a byte, so this
/// cannot be any other number.
const LANES: usize = 8;
/// Number of magnitudes in the 4-bit code.
const FOUR_BIT_MAGNITUDES: usize = 8;
/// The bits of an f16 without its sign.
const MAGNITUDE: u16 = 0x7fff;
const _: () = assert!(DIM_STEP.is_multiple_of(2 * LANES) && DIM_MAX <= u16::MAX as usize);
/// Codewords whose numbers fill whole bytes. Every dimension has a multiple of them.
const CODEWORDS_TOGETHER: usize = 4;
const _: () = assert!(GROUP_DIMS == LANES && DIM_STEP.is_multiple_of(CODEWORDS_TOGETHER * GROUP_DIMS));
/// Boundary between magnitudes 1 and 3 of the 2-bit code, in units of the row's root mean square: the step
/// of the uniform quantiser with four levels that has the least distortion for a normal variable (Max,
/// Quantizing for minimum distortion, 1960, table II).
const TWO_BIT_STEP: f64 = 0.9957;
/// Step of the 4-bit code's magnitudes: likewise, for sixteen levels.
const FOUR_BIT_STEP: f64 = 0.3352;
/// More than the rounding error of a computed cosine in [`COSINE_PARTS`] (a few times 2^-53 times
/// [`COSINE_PARTS`] times the dimension), so that rounding down gives at most the true cosine.
const COSINE_SLACK: f64 = 1e-5;

/// The value of a magnitude. A multiplication corrects the exponent's bias, which is exact for subnormal
/// numbers too.
fn value_of(magnitude: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    f32::from_bits(u32::from(magnitude) << 13) * BIAS
}

/// The smallest magnitude whose value is `least` or more, as bits; above [`MAGNITUDE`] if there is none.
fn bits_from(least: f64) -> u16 {
    // The conversion to f16 may round either way, so it is only the start of the search.
    let mut bits = f16::from_f64(least).to_bits().min(MAGNITUDE - 1);
    while bits > 0 && f64::from(value_of(bits - 1)) >= least {
        bits -= 1;
    }
    while bits <= MAGNITUDE && f64::from(value_of(bits)) < least {
        bits += 1;
    }
    bits
}

/// The smallest magnitude whose value is greater than `value`, as bits.
fn bits_above(value: f64) -> u16 {
    let bits = bits_from(value);
    bits + u16::from(f64::from(value_of(bits)) <= value)
}

/// The squared length of a row.
fn square_of(row: &[f16]) -> f64 {
    let mut sums = [0.0; LANES];
    for eight in row.as_chunks::<LANES>().0 {
        for (sum, component) in sums.iter_mut().zip(eight) {
            let value = f64::from(value_of(component.to_bits() & MAGNITUDE));
            *sum += value * value;
        }
    }
    fold(sums)
}

/// The sum of the partial sums: the upper half is added to the lower half until one sum is left.
fn fold(mut sums: [f64; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        (0..half).for_each(|i| sums[i] += sums[i + half]);
        half /= 2;
    }
    sums[0]
}

/// Eight values of 0 or 1 as the bits of a byte, the first one lowest.
fn packed(eight: [u8; 8]) -> u8 {
    // The multiplication moves value i from bit 8i to bit 56 + i; no two products share a bit.
    (u64::from_le_bytes(eight).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

/// A cosine as stored in [`Factors`], rounded down.
fn cosine_parts(cosine: f64) -> u16 {
    // The cast saturates, and turns NaN (for a row of zeros) into zero.
    (cosine * COSINE_PARTS - COSINE_SLACK).floor() as u16
}

/// As [`cosine_parts`], for a codebook code.
fn codebook_cosine_parts(cosine: f64) -> u8 {
    (cosine * CODEBOOK_COSINE_PARTS - COSINE_SLACK).floor() as u8
}

impl OwnedCodes {
    /// Replaces the codes of the row at `at`.
    ///
    /// # Panics
    /// If there is no such row, or `row` has another dimension.
    pub fn put(&mut self, at: usize, row: &[f16]) {
        let dim = self.dim;
        assert_eq!(row.len(), dim);
        let (block, lane) = (at / BLOCK_ROWS, at % BLOCK_ROWS);
        let one_bit = &mut self.one_bit[block * one_bit_bytes(dim)..][..one_bit_bytes(dim)];
        let two_bit = &mut self.two_bit[block * one_bit_bytes(dim)..][..one_bit_bytes(dim)];
        let four_bit = &mut self.four_bit[at * dim / 2..][..dim / 2];

        let square = square_of(row);
        if square == 0.0 {
            return self.clear(at);
        }
        let norm = square.sqrt();
        let rms = (square / dim as f64).sqrt();
        let above_one = bits_above(rms * TWO_BIT_STEP);
        let steps: [u16; FOUR_BIT_MAGNITUDES - 1] =
            std::array::from_fn(|k| bits_from((k + 1) as f64 * (rms * FOUR_BIT_STEP)));

        let (mut one_bit_dot, mut two_bit_dot, mut four_bit_dot) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        let (mut threes, mut squares) = ([0_u16; LANES], [0_u32; LANES]);
        for (j, eight) in row.as_chunks::<LANES>().0.iter().enumerate() {
            let (mut magnitude, mut negative, mut large) = ([0_u16; LANES], [0_u8; LANES], [0_u16; LANES]);
            for i in 0..LANES {
                let bits = eight[i].to_bits();
                magnitude[i] = bits & MAGNITUDE;
                negative[i] = (bits >> 15) as u8;
                large[i] = u16::from(magnitude[i] >= above_one);
            }
            let mut index = [0_u16; LANES];
            for least in steps {
                (0..LANES).for_each(|i| index[i] += u16::from(magnitude[i] >= least));
            }
            let (mut nibble, mut weight) = ([0_u8; LANES], [0_u16; LANES]);
            for i in 0..LANES {
                // 7 - index for a negative component, 8 + index for any other.
                nibble[i] = (8 + index[i] as u8) ^ (negative[i] * 15);
                weight[i] = 2 * index[i] + 1;
                threes[i] += large[i];
                squares[i] += u32::from(weight[i] * weight[i]);
            }
            for i in 0..LANES {
                let value = f64::from(value_of(magnitude[i]));
                one_bit_dot[i] += value;
                two_bit_dot[i] += f64::from(1 + 2 * large[i]) * value;
                four_bit_dot[i] += f64::from(weight[i]) * value;
            }
            one_bit[j * BLOCK_ROWS + lane] = packed(negative);
            two_bit[j * BLOCK_ROWS + lane] = packed(large.map(|large| large as u8));
            let at = j * LANES;
            if at < dim / 2 {
                four_bit[at..at + LANES].copy_from_slice(&nibble);
            } else {
                let low = &mut four_bit[at - dim / 2..][..LANES];
                (0..LANES).for_each(|i| low[i] |= nibble[i] << 4);
            }
        }
        let threes = threes.iter().map(|&threes| u32::from(threes)).sum::<u32>();
        let four_bit_square = squares.iter().sum::<u32>();
        let [one_bit_dot, two_bit_dot, four_bit_dot] = [one_bit_dot, two_bit_dot, four_bit_dot].map(fold);
        let two_bit_square = f64::from(dim as u32 + 8 * threes);
        self.factors[at] = Factors {
            one_bit_cosine: cosine_parts(one_bit_dot / (norm * (dim as f64).sqrt())),
            two_bit_cosine: cosine_parts(two_bit_dot / (norm * two_bit_square.sqrt())),
            four_bit_cosine: cosine_parts(four_bit_dot / (norm * f64::from(four_bit_square).sqrt())),
            threes: u16::try_from(threes).expect("at most the number of components"),
            four_bit_square,
        };
        self.put_codebook_code(at, row, norm);
    }

    /// Replaces the codebook code of the row at `at`, whose length is `norm`.
    fn put_codebook_code(&mut self, at: usize, row: &[f16], norm: f64) {
        let (dim, lane) = (self.dim, at % BLOCK_ROWS);
        let lines = &mut self.codebook[at / BLOCK_ROWS * codebook_bytes(dim)..][..codebook_bytes(dim)];
        let lines = lines.as_chunks_mut::<BLOCK_ROWS>().0;
        let (cosines, lines) = lines.split_last_mut().expect("there is at least one line");
        let mut dots = [0.0; LANES];
        let mut lines = lines.iter_mut();
        for groups in row.as_chunks::<{ GROUP_DIMS }>().0.chunks(CODEWORDS_TOGETHER) {
            let mut bits = 0_u32;
            for (n, group) in groups.iter().enumerate() {
                let values = group.map(|component| {
                    let bits = component.to_bits();
                    f32::from_bits(value_of(bits & MAGNITUDE).to_bits() | u32::from(bits >> 15) << 31)
                });
                let codeword = codebook::nearest(&values);
                for i in 0..LANES {
                    dots[i] += f64::from(values[i]) * f64::from(codebook::CODEWORDS[codeword][i]);
                }
                bits |= (codeword as u32) << (n * CODEWORD_BITS);
            }
            for byte in &bits.to_le_bytes()[..CODEWORDS_TOGETHER * CODEWORD_BITS / 8] {
                lines.next().expect("there is one line per byte")[lane] = *byte;
            }
        }
        cosines[lane] = codebook_cosine_parts(fold(dots) / (norm * f64::from(codebook::square(dim)).sqrt()));
    }
}

#[cfg(test)]
mod tests;
