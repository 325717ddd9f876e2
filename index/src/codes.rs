//! Codes: what sifting reads instead of rows, a fraction of their bytes.
//!
//! Four codes of every row x, each a vector of small integers that points nearly where x does, each
//! with the cosine of the angle between the two:
//!
//! | code | integers c_i | bytes a row of 512 | usual cosine |
//! |---|---|---|---|
//! | codebook code | those of one of 64 words for every eight components ([`crate::codebook`]) | 49 | 0.75 |
//! | sign | -1, 1 | 64 | 0.80 |
//! | two | -3, -1, 1, 3 | 64 more: the signs are those of the sign code | 0.94 |
//! | fine | -15, -13, ..., 15 | 256 | 0.994 |
//!
//! Codes are kept for *blocks* of [`BLOCK_ROWS`] rows. The sign and two codes of a block lie in
//! lines of 64 bytes: byte r of line j holds the bits of components 8j to 8j + 7 of row r, so that
//! one vector register reads the same components of 64 rows. So do codebook codes, which are strings of
//! bits as well, six for each group; one more line at the end has the codebook codes' cosines, so that a
//! scan of codebook codes reads nothing else. The fine codes lie row by row.
//!
//! A code is a function of its row, to the bit, on every machine. Magnitudes are told apart by
//! comparing the bits of f16, which ascend with the value. Sums are f64, by operations that
//! IEEE 754 fixes, in one order: component i is added to partial sum i mod 8, components
//! ascending; then the upper half of the partial sums is added to the lower until one is left.
//! Products fit f64 exactly, so fused multiply-adds would change nothing. All of it is written for
//! the compiler to vectorise.
//!
//! Pure: slices in, slices out. Does not know files, searches or what a cosine is good for
//! (`src/certificate.rs` of the server does).
//!
//! Invariant: a stored cosine is at most the true one, of rows whose components are finite.

use bytemuck::{Pod, Zeroable};
use half::f16;

use crate::codebook;
use crate::format::is_zero;
use crate::nouns::{DIM_MAX, DIM_STEP};

/// Rows of a block.
pub const BLOCK_ROWS: usize = 64;
/// Components handled at once, and partial sums: component i goes to the one numbered i mod this.
/// Eight bits of a plane make a byte, so it is not free to be anything else.
const LANES: usize = 8;
/// Levels of the fine code's magnitudes.
const LEVELS: usize = 8;
/// The bits of an f16 without its sign.
const MAGNITUDE: u16 = 0x7fff;
const _: () = assert!(DIM_STEP.is_multiple_of(2 * LANES) && DIM_MAX <= u16::MAX as usize);
/// Words of a codebook code whose bits make whole bytes, and those are in every dimension.
const WORDS_TOGETHER: usize = 4;
const _: () = assert!(codebook::GROUP_DIMS == LANES && DIM_STEP.is_multiple_of(WORDS_TOGETHER * codebook::GROUP_DIMS));
/// Boundary between magnitudes 1 and 3 of the two code, in units of the row's root mean square:
/// the step of the uniform quantiser of four levels that keeps most of a normal variable (Max,
/// Quantizing for minimum distortion, 1960, table II).
const TWO_BIT_STEP: f64 = 0.9957;
/// Step of the fine code's magnitudes, likewise for sixteen levels.
const FOUR_BIT_STEP: f64 = 0.3352;
/// Stored cosines are whole parts of this.
const COSINE_PARTS: f64 = 65_536.0;
/// Cosines of codebook codes are whole parts of this: what a coarser one loses matters less than its byte.
const CODEBOOK_PARTS: f64 = 256.0;
/// Larger than the rounding of a computed cosine in those parts (a few times 2^-53 times
/// [`COSINE_PARTS`] times the dimension), so that rounding down is down from the true one.
const COSINE_SLACK: f64 = 1e-5;

/// What is known of a row's codes beside their bits. Kernels may read it as `FORMAT.md` lays it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Factors {
    one_bit_cosine: u16,
    two_bit_cosine: u16,
    four_bit_cosine: u16,
    /// Components of magnitude 3 in the two code.
    threes: u16,
    /// Squared length of the fine code.
    four_bit_square: u32,
}

impl Factors {
    /// Lower bound of the cosine between the row and its sign code.
    #[must_use]
    pub fn one_bit_cosine(self) -> f32 {
        cosine(self.one_bit_cosine)
    }

    /// Lower bound of the cosine between the row and its two code.
    #[must_use]
    pub fn two_bit_cosine(self) -> f32 {
        cosine(self.two_bit_cosine)
    }

    /// Lower bound of the cosine between the row and its fine code.
    #[must_use]
    pub fn four_bit_cosine(self) -> f32 {
        cosine(self.four_bit_cosine)
    }

    /// Squared length of the two code of a row of `dim` components.
    #[must_use]
    pub fn two_bit_square(self, dim: usize) -> u32 {
        two_bit_square(dim, self.threes)
    }

    /// Squared length of the fine code.
    #[must_use]
    pub fn four_bit_square(self) -> u32 {
        self.four_bit_square
    }
}

/// Squared length of a two code of `dim` components of which `threes` have magnitude 3.
#[must_use]
pub fn two_bit_square(dim: usize, threes: u16) -> u32 {
    dim as u32 + 8 * u32::from(threes)
}

/// The cosine that the parts stored in [`Factors`] stand for.
#[must_use]
pub fn cosine(parts: u16) -> f32 {
    f32::from(parts) / COSINE_PARTS as f32
}

/// The cosine that the byte kept of a codebook code stands for.
#[must_use]
pub fn codebook_cosine(parts: u8) -> f32 {
    f32::from(parts) / CODEBOOK_PARTS as f32
}

/// The value of a magnitude's bits. The exponent's bias is put right by a multiplication, which is
/// exact for subnormal numbers too.
fn value_of(magnitude: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    f32::from_bits(u32::from(magnitude) << 13) * BIAS
}

/// The least magnitude of a value of `least` or more, as bits; above [`MAGNITUDE`] if there is none.
fn bits_from(least: f64) -> u16 {
    // Conversion to f16 may round either way, so it is only where the search starts.
    let mut bits = f16::from_f64(least).to_bits().min(MAGNITUDE - 1);
    while bits > 0 && f64::from(value_of(bits - 1)) >= least {
        bits -= 1;
    }
    while bits <= MAGNITUDE && f64::from(value_of(bits)) < least {
        bits += 1;
    }
    bits
}

/// The least magnitude of a value above `value`, as bits.
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

/// The sum of partial sums: the upper half is added to the lower until one is left.
fn fold(mut sums: [f64; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        (0..half).for_each(|i| sums[i] += sums[i + half]);
        half /= 2;
    }
    sums[0]
}

/// Eight values of 0 or 1 as the bits of a byte, the first the lowest.
fn packed(eight: [u8; 8]) -> u8 {
    // Value i, at bit 8i, is multiplied up to bit 56 + i; no two products meet in one bit.
    (u64::from_le_bytes(eight).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

fn parts(cosine: f64) -> u16 {
    // The cast saturates, and takes what is not a number (of a row of zeros) to zero.
    (cosine * COSINE_PARTS - COSINE_SLACK).floor() as u16
}

/// As [`parts`], for a codebook code.
fn codebook_parts(cosine: f64) -> u8 {
    (cosine * CODEBOOK_PARTS - COSINE_SLACK).floor() as u8
}

/// The codes of whole blocks of consecutive rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Codes<'a> {
    /// Shape: `[blocks, codebook::lines(dim) + 1, 64]`. A row's bits have the number of the word of
    /// group g at 6g to 6g + 5, the lowest first. The last line is the lower bounds of cosines
    /// between rows and codebook codes, see [`codebook_cosine`].
    pub codebook: &'a [u8],
    /// Shape: `[blocks, dim / 8, 64]`, bits; a set bit is -1.
    pub one_bit: &'a [u8],
    /// Shape: `[blocks, dim / 8, 64]`, bits; a set bit is a magnitude of 3.
    pub two_bit: &'a [u8],
    /// Shape: `[rows, dim / 2]`. Byte j holds component j in its low half and component
    /// j + dim / 2 in its high half, as (c + 15) / 2.
    pub four_bit: &'a [u8],
    /// Shape: `[rows]`, a multiple of [`BLOCK_ROWS`].
    pub factors: &'a [Factors],
}

impl<'a> Codes<'a> {
    /// How many rows have codes: those of whole blocks.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.factors.len()
    }

    /// Whether the codes of the row at `at` are zero, as those of an erased row are.
    ///
    /// # Panics
    /// Where there is no such row.
    #[must_use]
    pub fn is_clear(&self, dim: usize, at: usize) -> bool {
        is_lane_zero(self.codebook, codebook_bytes(dim), at)
            && self.factors[at] == Factors::zeroed()
            && is_zero(&self.four_bit[at * dim / 2..][..dim / 2])
            && is_lane_zero(self.one_bit, one_bit_bytes(dim), at)
            && is_lane_zero(self.two_bit, one_bit_bytes(dim), at)
    }

    /// What is known of the cosines between the rows of `block` and their codebook codes, see
    /// [`codebook_cosine`].
    ///
    /// # Panics
    /// Where there is no such block.
    #[must_use]
    pub fn codebook_cosines(&self, dim: usize, block: usize) -> &'a [u8; BLOCK_ROWS] {
        self.codebook[..(block + 1) * codebook_bytes(dim)].last_chunk().expect("a block ends with a line of them")
    }

    /// The codes of `count` blocks from the block `first` on.
    ///
    /// # Panics
    /// Where there are not that many.
    #[must_use]
    pub fn blocks(&self, dim: usize, first: usize, count: usize) -> Self {
        let take = |bytes: &'a [u8], each: usize| &bytes[first * each..(first + count) * each];
        Self {
            codebook: take(self.codebook, codebook_bytes(dim)),
            one_bit: take(self.one_bit, one_bit_bytes(dim)),
            two_bit: take(self.two_bit, one_bit_bytes(dim)),
            four_bit: take(self.four_bit, four_bit_bytes(dim)),
            factors: &self.factors[first * BLOCK_ROWS..(first + count) * BLOCK_ROWS],
        }
    }
}

/// Whether the row at `at` has only zeros in a plane of `bytes` a block.
fn is_lane_zero(plane: &[u8], bytes: usize, at: usize) -> bool {
    let lines = plane[at / BLOCK_ROWS * bytes..][..bytes].as_chunks::<BLOCK_ROWS>().0;
    lines.iter().all(|line| line[at % BLOCK_ROWS] == 0)
}

/// Overwrites with zeros what the row at `at` has in a plane of `bytes` a block.
///
/// # Panics
/// Where there is no such place.
pub fn clear_lane(plane: &mut [u8], bytes: usize, at: usize) {
    let block = &mut plane[at / BLOCK_ROWS * bytes..][..bytes];
    block.iter_mut().skip(at % BLOCK_ROWS).step_by(BLOCK_ROWS).for_each(|byte| *byte = 0);
}

/// Bytes of a block's codebook codes, with their cosines.
#[must_use]
pub const fn codebook_bytes(dim: usize) -> usize {
    (codebook::lines(dim) + 1) * BLOCK_ROWS
}

/// Bytes of a block's sign code, and of its two code.
#[must_use]
pub const fn one_bit_bytes(dim: usize) -> usize {
    dim / 8 * BLOCK_ROWS
}

/// Bytes of a block's fine code.
#[must_use]
pub const fn four_bit_bytes(dim: usize) -> usize {
    dim / 2 * BLOCK_ROWS
}

/// The codes of one block, to be written or compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedCodes {
    dim: usize,
    /// As [`Codes::codebook code`].
    pub codebook: Vec<u8>,
    /// As [`Codes::sign`].
    pub one_bit: Vec<u8>,
    /// As [`Codes::two`].
    pub two_bit: Vec<u8>,
    /// As [`Codes::fine`].
    pub four_bit: Vec<u8>,
    /// As [`Codes::factors`].
    pub factors: Vec<Factors>,
}

impl OwnedCodes {
    /// Room for the codes of `rows` rows of `dim` components, all zero.
    ///
    /// # Panics
    /// Where no index has rows of `dim` components or `rows` is not a multiple of [`BLOCK_ROWS`].
    #[must_use]
    pub fn zeroed(dim: usize, rows: usize) -> Self {
        assert!(dim.is_multiple_of(DIM_STEP) && dim <= DIM_MAX && rows.is_multiple_of(BLOCK_ROWS));
        let blocks = rows / BLOCK_ROWS;
        Self {
            dim,
            codebook: vec![0; blocks * codebook_bytes(dim)],
            one_bit: vec![0; blocks * one_bit_bytes(dim)],
            two_bit: vec![0; blocks * one_bit_bytes(dim)],
            four_bit: vec![0; blocks * four_bit_bytes(dim)],
            factors: vec![Factors::zeroed(); rows],
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

    /// A copy of `codes`, of rows of `dim` components.
    #[must_use]
    pub(crate) fn copied(codes: &Codes<'_>, dim: usize) -> Self {
        Self {
            dim,
            codebook: codes.codebook.to_vec(),
            one_bit: codes.one_bit.to_vec(),
            two_bit: codes.two_bit.to_vec(),
            four_bit: codes.four_bit.to_vec(),
            factors: codes.factors.to_vec(),
        }
    }

    /// Replaces the codes of the row at `at`.
    ///
    /// # Panics
    /// Where there is no such place or the row has another dimension.
    pub fn put(&mut self, at: usize, row: &[f16]) {
        let dim = self.dim;
        assert_eq!(row.len(), dim);
        let (block, lane) = (at / BLOCK_ROWS, at % BLOCK_ROWS);
        let sign = &mut self.one_bit[block * one_bit_bytes(dim)..][..one_bit_bytes(dim)];
        let two = &mut self.two_bit[block * one_bit_bytes(dim)..][..one_bit_bytes(dim)];
        let fine = &mut self.four_bit[at * dim / 2..][..dim / 2];

        let square = square_of(row);
        if square == 0.0 {
            return self.clear(at);
        }
        let norm = square.sqrt();
        let rms = (square / dim as f64).sqrt();
        let above_one = bits_above(rms * TWO_BIT_STEP);
        let above_level: [u16; LEVELS - 1] = std::array::from_fn(|k| bits_from((k + 1) as f64 * (rms * FOUR_BIT_STEP)));

        let (mut sign_dot, mut two_dot, mut fine_dot) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        let (mut threes, mut squares) = ([0_u16; LANES], [0_u32; LANES]);
        for (j, eight) in row.as_chunks::<LANES>().0.iter().enumerate() {
            let (mut magnitude, mut negative, mut large) = ([0_u16; LANES], [0_u8; LANES], [0_u16; LANES]);
            for i in 0..LANES {
                let bits = eight[i].to_bits();
                magnitude[i] = bits & MAGNITUDE;
                negative[i] = (bits >> 15) as u8;
                large[i] = u16::from(magnitude[i] >= above_one);
            }
            let mut level = [0_u16; LANES];
            for least in above_level {
                (0..LANES).for_each(|i| level[i] += u16::from(magnitude[i] >= least));
            }
            let (mut nibble, mut weight) = ([0_u8; LANES], [0_u16; LANES]);
            for i in 0..LANES {
                // Of a negative component 7 - level, of another one 8 + level.
                nibble[i] = (8 + level[i] as u8) ^ (negative[i] * 15);
                weight[i] = 2 * level[i] + 1;
                threes[i] += large[i];
                squares[i] += u32::from(weight[i] * weight[i]);
            }
            for i in 0..LANES {
                let value = f64::from(value_of(magnitude[i]));
                sign_dot[i] += value;
                two_dot[i] += f64::from(1 + 2 * large[i]) * value;
                fine_dot[i] += f64::from(weight[i]) * value;
            }
            sign[j * BLOCK_ROWS + lane] = packed(negative);
            two[j * BLOCK_ROWS + lane] = packed(large.map(|large| large as u8));
            let at = j * LANES;
            if at < dim / 2 {
                fine[at..at + LANES].copy_from_slice(&nibble);
            } else {
                let low = &mut fine[at - dim / 2..][..LANES];
                (0..LANES).for_each(|i| low[i] |= nibble[i] << 4);
            }
        }
        let threes = threes.iter().map(|&threes| u32::from(threes)).sum::<u32>();
        let four_bit_square = squares.iter().sum::<u32>();
        let [sign_dot, two_dot, fine_dot] = [sign_dot, two_dot, fine_dot].map(fold);
        let two_bit_square = f64::from(dim as u32 + 8 * threes);
        self.factors[at] = Factors {
            one_bit_cosine: parts(sign_dot / (norm * (dim as f64).sqrt())),
            two_bit_cosine: parts(two_dot / (norm * two_bit_square.sqrt())),
            four_bit_cosine: parts(fine_dot / (norm * f64::from(four_bit_square).sqrt())),
            threes: u16::try_from(threes).expect("no more than there are components"),
            four_bit_square,
        };
        self.put_sketch(at, row, norm);
    }

    /// Replaces the codebook code of the row at `at`, which has the length `norm`.
    fn put_sketch(&mut self, at: usize, row: &[f16], norm: f64) {
        let (dim, lane) = (self.dim, at % BLOCK_ROWS);
        let lines = &mut self.codebook[at / BLOCK_ROWS * codebook_bytes(dim)..][..codebook_bytes(dim)];
        let lines = lines.as_chunks_mut::<BLOCK_ROWS>().0;
        let (cosines, lines) = lines.split_last_mut().expect("one line at least");
        let mut dots = [0.0; LANES];
        let mut lines = lines.iter_mut();
        for groups in row.as_chunks::<{ codebook::GROUP_DIMS }>().0.chunks(WORDS_TOGETHER) {
            let mut bits = 0_u32;
            for (n, group) in groups.iter().enumerate() {
                let values = group.map(|component| {
                    let bits = component.to_bits();
                    f32::from_bits(value_of(bits & MAGNITUDE).to_bits() | u32::from(bits >> 15) << 31)
                });
                let word = codebook::nearest(&values);
                for i in 0..LANES {
                    dots[i] += f64::from(values[i]) * f64::from(codebook::CODEWORDS[word][i]);
                }
                bits |= (word as u32) << (n * codebook::CODEWORD_BITS);
            }
            for byte in &bits.to_le_bytes()[..WORDS_TOGETHER * codebook::CODEWORD_BITS / 8] {
                lines.next().expect("as many lines as the words' bytes")[lane] = *byte;
            }
        }
        cosines[lane] = codebook_parts(fold(dots) / (norm * f64::from(codebook::square(dim)).sqrt()));
    }

    /// Makes the codes of the row at `at` zero, as those of a row of zeros are.
    ///
    /// # Panics
    /// Where there is no such place.
    pub fn clear(&mut self, at: usize) {
        let dim = self.dim;
        clear_lane(&mut self.codebook, codebook_bytes(dim), at);
        clear_lane(&mut self.one_bit, one_bit_bytes(dim), at);
        clear_lane(&mut self.two_bit, one_bit_bytes(dim), at);
        self.four_bit[at * dim / 2..][..dim / 2].fill(0);
        self.factors[at] = Factors::zeroed();
    }

    /// As slices.
    #[must_use]
    pub fn as_codes(&self) -> Codes<'_> {
        let Self { codebook, one_bit, two_bit, four_bit, factors, .. } = self;
        Codes { codebook, one_bit, two_bit, four_bit, factors }
    }

    /// Overwrites everything with zeros.
    pub fn wipe(&mut self) {
        self.codebook.fill(0);
        self.one_bit.fill(0);
        self.two_bit.fill(0);
        self.four_bit.fill(0);
        self.factors.fill(Factors::zeroed());
    }
}

#[cfg(test)]
mod tests;
