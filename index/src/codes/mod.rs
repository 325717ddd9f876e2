//! Codes: what searches read instead of rows, at a fraction of the bytes.
//!
//! Every row x has four codes. Each is a vector of small integers that points in nearly the same direction
//! as x, stored with the cosine of the angle between the two:
//!
//! | code | integers c_i | bytes per row of 512 | typical cosine |
//! |---|---|---|---|
//! | codebook code | for every eight components, one of 64 codewords ([`codebook`]) | 49 | 0.75 |
//! | 1-bit code | -1, 1 | 64 | 0.80 |
//! | 2-bit code | -3, -1, 1, 3 | 64 more: the signs are those of the 1-bit code | 0.94 |
//! | 4-bit code | -15, -13, ..., 15 | 256 | 0.994 |
//!
//! Codes are kept for *blocks* of [`BLOCK_ROWS`] rows. The 1-bit and 2-bit codes of a block are stored in
//! lines of 64 bytes: byte r of line j has the bits of components 8j to 8j + 7 of row r, so that one vector
//! register reads the same components of 64 rows. Codebook codes are stored in the same way, as strings of
//! six bits per group. One more line at the end has the cosines of the codebook codes, so that a scan of
//! them reads nothing else. The 4-bit codes are stored row by row.
//!
//! `encode` computes codes. Pure: slices in, slices out. Does not know files, searches or what a cosine is
//! used for (`src/engine/certificate` of the server does).
//!
//! Invariant: a stored cosine is at most the true one, for rows whose components are finite.

pub mod codebook;
mod encode;

use bytemuck::{Pod, Zeroable};
use half::f16;

use crate::bytes::is_zero;
use crate::types::{DIM_MAX, DIM_STEP};

/// Rows of a block.
pub const BLOCK_ROWS: usize = 64;
/// A stored cosine is a number of these parts of one.
const COSINE_PARTS: f64 = 65_536.0;
/// Likewise for codebook codes, where the precision of a byte is enough.
const CODEBOOK_COSINE_PARTS: f64 = 256.0;

/// Numbers about a row's codes besides their bits. Kernels may read them in the layout of `FORMAT.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Factors {
    one_bit_cosine: u16,
    two_bit_cosine: u16,
    four_bit_cosine: u16,
    /// Number of components with magnitude 3 in the 2-bit code.
    threes: u16,
    /// Squared length of the 4-bit code.
    four_bit_square: u32,
}

impl Factors {
    /// Lower bound of the cosine between the row and its 1-bit code.
    #[must_use]
    pub fn one_bit_cosine(self) -> f32 {
        cosine(self.one_bit_cosine)
    }

    /// Lower bound of the cosine between the row and its 2-bit code.
    #[must_use]
    pub fn two_bit_cosine(self) -> f32 {
        cosine(self.two_bit_cosine)
    }

    /// Lower bound of the cosine between the row and its 4-bit code.
    #[must_use]
    pub fn four_bit_cosine(self) -> f32 {
        cosine(self.four_bit_cosine)
    }

    /// Squared length of the 2-bit code of a row of `dim` components.
    #[must_use]
    pub fn two_bit_square(self, dim: usize) -> u32 {
        two_bit_square(dim, self.threes)
    }

    /// Squared length of the 4-bit code.
    #[must_use]
    pub fn four_bit_square(self) -> u32 {
        self.four_bit_square
    }
}

/// Squared length of a 2-bit code of `dim` components, `threes` of which have magnitude 3.
#[must_use]
pub fn two_bit_square(dim: usize, threes: u16) -> u32 {
    dim as u32 + 8 * u32::from(threes)
}

/// The cosine for a stored number of [`Factors`].
#[must_use]
pub fn cosine(parts: u16) -> f32 {
    f32::from(parts) / COSINE_PARTS as f32
}

/// The cosine for the stored byte of a codebook code.
#[must_use]
pub fn codebook_cosine(parts: u8) -> f32 {
    f32::from(parts) / CODEBOOK_COSINE_PARTS as f32
}

/// The codes of full blocks of consecutive rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Codes<'a> {
    /// Shape: `[blocks, codebook::lines(dim) + 1, 64]`. Bits 6g to 6g + 5 of a row are the number of the
    /// codeword of group g, lowest bit first. The last line has lower bounds of the cosines between rows
    /// and codebook codes, see [`codebook_cosine`].
    pub codebook: &'a [u8],
    /// 1-bit codes. Shape: `[blocks, dim / 8, 64]`, bits; a set bit is -1.
    pub one_bit: &'a [u8],
    /// 2-bit codes. Shape: `[blocks, dim / 8, 64]`, bits; a set bit is a magnitude of 3.
    pub two_bit: &'a [u8],
    /// 4-bit codes. Shape: `[rows, dim / 2]`. Byte j has component j in its low half and component
    /// j + dim / 2 in its high half, each as (c + 15) / 2.
    pub four_bit: &'a [u8],
    /// Shape: `[rows]`, a multiple of [`BLOCK_ROWS`].
    pub factors: &'a [Factors],
}

impl<'a> Codes<'a> {
    /// Number of rows that have codes: those of full blocks.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.factors.len()
    }

    /// Whether the codes of the row at `at` are zero, as they are for an erased row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn is_clear(&self, dim: usize, at: usize) -> bool {
        is_lane_zero(self.codebook, codebook_bytes(dim), at)
            && self.factors[at] == Factors::zeroed()
            && is_zero(&self.four_bit[at * dim / 2..][..dim / 2])
            && is_lane_zero(self.one_bit, one_bit_bytes(dim), at)
            && is_lane_zero(self.two_bit, one_bit_bytes(dim), at)
    }

    /// Lower bounds of the cosines between the rows of `block` and their codebook codes, see
    /// [`codebook_cosine`].
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn codebook_cosines(&self, dim: usize, block: usize) -> &'a [u8; BLOCK_ROWS] {
        self.codebook[..(block + 1) * codebook_bytes(dim)].last_chunk().expect("a block ends with its line of cosines")
    }

    /// The codes of `count` blocks from block `first`.
    ///
    /// # Panics
    /// If there are not that many.
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

/// Whether the row at `at` has only zeros in a plane with `bytes` bytes per block.
fn is_lane_zero(plane: &[u8], bytes: usize, at: usize) -> bool {
    let lines = plane[at / BLOCK_ROWS * bytes..][..bytes].as_chunks::<BLOCK_ROWS>().0;
    lines.iter().all(|line| line[at % BLOCK_ROWS] == 0)
}

/// Zeroes the row at `at` in a plane with `bytes` bytes per block.
///
/// # Panics
/// If there is no such row.
pub fn clear_lane(plane: &mut [u8], bytes: usize, at: usize) {
    let block = &mut plane[at / BLOCK_ROWS * bytes..][..bytes];
    block.iter_mut().skip(at % BLOCK_ROWS).step_by(BLOCK_ROWS).for_each(|byte| *byte = 0);
}

/// Bytes of a block's codebook codes, including their cosines.
#[must_use]
pub const fn codebook_bytes(dim: usize) -> usize {
    (codebook::lines(dim) + 1) * BLOCK_ROWS
}

/// Bytes of a block's 1-bit codes, and of its 2-bit codes.
#[must_use]
pub const fn one_bit_bytes(dim: usize) -> usize {
    dim / 8 * BLOCK_ROWS
}

/// Bytes of a block's 4-bit codes.
#[must_use]
pub const fn four_bit_bytes(dim: usize) -> usize {
    dim / 2 * BLOCK_ROWS
}

/// Codes in memory of their own: [`Codes`] has the shapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedCodes {
    dim: usize,
    /// As [`Codes::codebook`].
    pub codebook: Vec<u8>,
    /// As [`Codes::one_bit`].
    pub one_bit: Vec<u8>,
    /// As [`Codes::two_bit`].
    pub two_bit: Vec<u8>,
    /// As [`Codes::four_bit`].
    pub four_bit: Vec<u8>,
    /// As [`Codes::factors`].
    pub factors: Vec<Factors>,
}

impl OwnedCodes {
    /// Codes for `rows` rows of `dim` components, all zero.
    ///
    /// # Panics
    /// If no index has rows of `dim` components, or `rows` is not a multiple of [`BLOCK_ROWS`].
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

    /// The codes of `rows`. Shape: `[count, dim]`, row-major; `count` is a multiple of [`BLOCK_ROWS`]. The
    /// codes of a row of zeros are zero.
    #[must_use]
    pub fn of(rows: &[f16], dim: usize) -> Self {
        let mut codes = Self::zeroed(dim, rows.len() / dim);
        for (at, row) in rows.chunks_exact(dim).enumerate() {
            codes.put(at, row);
        }
        codes
    }

    /// A copy of `codes`, for rows of `dim` components.
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

    /// Zeroes the codes of the row at `at`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn clear(&mut self, at: usize) {
        let dim = self.dim;
        clear_lane(&mut self.codebook, codebook_bytes(dim), at);
        clear_lane(&mut self.one_bit, one_bit_bytes(dim), at);
        clear_lane(&mut self.two_bit, one_bit_bytes(dim), at);
        self.four_bit[at * dim / 2..][..dim / 2].fill(0);
        self.factors[at] = Factors::zeroed();
    }

    /// The same codes, borrowed.
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
