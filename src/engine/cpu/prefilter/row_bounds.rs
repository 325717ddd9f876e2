//! The bounds of the first pass in whole steps, so that integers decide which rows pass.
//!
//! A row of length n and cosine c' with its code passes the first pass if
//!
//! ```text
//! offset - step * deficit >= n b(c' - loss),   b(x) = along x - across sqrt(1 - x²) - slack
//! ```
//!
//! (`Tables`, [`Bound::least_product`], [`Bounds::loss`]; b rises.) That is one bound per row and probe.
//! b is convex, so it lies above each of its tangents. With the tangent at the level's usual cosine,
//! of slope beta, and gamma its value at a reference r - loss below nearly all rows,
//!
//! ```text
//! n b(c' - loss) >= gamma n + beta n (c' - r)                                                 (1)
//! ```
//!
//! After a random rotation cosines are close to the usual one, so little is lost: a ten thousandth
//! if c' is a hundredth off. The numbers n (c' - r) and n belong to the row and are kept as whole
//! numbers of 16 bits, [`TileRowBounds`]; gamma and beta belong to the probe, [`MaxDeficit`]. A row's largest
//! deficit that counts takes three multiplications in 16 bits. Rows below the reference, or of a
//! length below the usual ones, *always pass*. A cosine above the usual ones counts as
//! the largest of them: together with the length, this limits what dithered tables may be off by, see
//! [`crate::engine::certificate`].
//!
//! Each number is rounded so that the largest deficit is never below the one of (1).

use thenar_index::codes::{self, BLOCK_ROWS, Factors};

use super::Level;
use super::layout::TILE_BLOCKS;
use crate::engine::certificate::{Bound, Bounds};

/// A whole number per row of a block, in the order in which a path's scan has the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(super) struct Parts(pub(super) [u16; BLOCK_ROWS]);

impl Parts {
    pub(super) const ZERO: Self = Self([0; BLOCK_ROWS]);
}

/// How the bounds of a tile's rows differ.
#[derive(Debug)]
pub(super) struct TileRowBounds {
    /// Of each block, the rows that always pass.
    pub(super) always_pass: [u64; TILE_BLOCKS],
    /// n (c' - r) in units of [`Scale::along_unit`], rounded down.
    pub(super) along: [Parts; TILE_BLOCKS],
    /// n - [`Scale::length_base`] in units of [`Scale::length_unit`], rounded down. Not read if all
    /// are of one length.
    pub(super) length: [Parts; TILE_BLOCKS],
}

impl TileRowBounds {
    pub(super) const EMPTY: Self =
        Self { always_pass: [0; TILE_BLOCKS], along: [Parts::ZERO; TILE_BLOCKS], length: [Parts::ZERO; TILE_BLOCKS] };
}

/// Of the components of a usual row, the share that has magnitude 3 in the 2-bit code: the share of
/// a normal variable outside the code's step.
const LARGE_SHARE: f32 = 0.3194;

/// The units of a level's whole numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    pub(super) dim: usize,
    /// The usual cosine of a row with its code.
    pub(super) usual: f32,
    /// The reference r, in parts as the codes have them, and as a cosine.
    pub(super) reference_parts: u16,
    pub(super) reference: f32,
    /// Likewise, the largest cosine that counts.
    pub(super) max_parts: u16,
    pub(super) max: f32,
    pub(super) along_unit: f32,
    /// The least length of rows that do not always pass, as it is and squared.
    pub(super) length_base: f32,
    pub(super) square_base: u32,
    /// Zero if all codes are of one length.
    pub(super) length_unit: f32,
}

impl Scale {
    pub(super) fn new(level: Level, dim: usize) -> Self {
        let (usual, norm) = (level.usual_cosine(), level.least_norm(dim));
        // Cosines deviate by about 0.2 / sqrt(dim) with 2-bit codes, and by 0.5 / sqrt(dim) with codebook codes.
        let root = (dim as f32).sqrt();
        let reference = (usual - 2.5 / root).max(0.0);
        let max = usual + if level == Level::Codebook { 1.5 } else { 0.6 } / root;
        // In parts, as the codes have cosines; always fewer parts than make a cosine of one.
        let part = if level == Level::Codebook { codes::codebook_cosine(1) } else { codes::cosine(1) };
        let [reference_parts, max_parts] =
            [reference, max].map(|cosine| (cosine / part).min(part.recip() - 1.0) as u16);
        let along_unit = match level {
            // Parts of a cosine times the one length: no rounding at all. Those of codebook codes are 256
            // times larger, and are multiplied, since the probe's number must be under 1.
            Level::Codebook => norm * part / 256.0,
            // n is at most three times the least, and (1 - r) is under a quarter for 200 components and
            // more. Larger numbers are cut off, which rounds down.
            Level::TwoBit => 0.75 * norm / f32::from(u16::MAX),
        };
        // The number of large components deviates by half a root of the dimension at most; four times that is rare.
        let large = (LARGE_SHARE * dim as f32 - 2.0 * root).max(0.0) as u16;
        let square_base = if level.has_lengths() { codes::two_bit_square(dim, large) } else { 0 };
        let length_base = if level.has_lengths() { (square_base as f32).sqrt() } else { norm };
        let length_unit = if level.has_lengths() { 2.0 * norm / f32::from(u16::MAX) } else { 0.0 };
        Self {
            dim,
            usual,
            reference_parts,
            reference: f32::from(reference_parts) * part,
            max_parts,
            max: f32::from(max_parts) * part,
            along_unit,
            length_base,
            square_base,
            length_unit,
        }
    }
}

/// The numbers of a block's rows for 2-bit codes, in their order. Returns the rows that always pass.
/// The twin of other paths, in a shape that compilers vectorise.
#[inline(always)]
pub(super) fn of_rows(scale: &Scale, factors: &[Factors; BLOCK_ROWS], along: &mut Parts, length: &mut Parts) -> u64 {
    let mut always_pass = 0;
    for (r, factors) in factors.iter().enumerate() {
        let (cosine, square) = (factors.two_bit_cosine(), factors.two_bit_square(scale.dim));
        let n = (square as f32).sqrt();
        always_pass |= u64::from(cosine < scale.reference || square < scale.square_base) << r;
        // The casts saturate, and round down.
        along.0[r] = ((cosine.min(scale.max) - scale.reference) * n / scale.along_unit) as u16;
        length.0[r] = ((n - scale.length_base) / scale.length_unit) as u16;
    }
    always_pass
}

/// The same for codebook codes, from the parts of their cosines.
#[inline(always)]
pub(super) fn of_cosines(scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
    let mut always_pass = 0;
    for (r, parts) in cosines.iter().enumerate() {
        always_pass |= u64::from(u16::from(*parts) < scale.reference_parts) << r;
        along.0[r] = u16::from(*parts).min(scale.max_parts).saturating_sub(scale.reference_parts) << 8;
    }
    always_pass
}

/// The largest deficit with which a row passes, as a function of the row's numbers. One per probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MaxDeficit {
    pub(super) base: u16,
    /// What the row's numbers are multiplied by, in parts of 65,536; one of the last two is zero.
    pub(super) along: u16,
    pub(super) longer: u16,
    pub(super) shorter: u16,
}

impl MaxDeficit {
    /// Every row passes.
    pub(super) const ALL: Self = Self { base: u16::MAX, along: 0, longer: 0, shorter: 0 };

    /// For a probe whose deficits stand for offset - step * deficit.
    ///
    /// A quarter of a step is more than what f32 arithmetic is wrong by, on values of a few ten
    /// thousand steps at most and on the row's numbers, which are right to some parts in 10^7 before
    /// they are rounded down. If gamma is negative, two more steps compensate that [`MaxDeficit::of`] rounds down
    /// a summand, and that the length was rounded: |gamma| units, far less than a step.
    pub(super) fn new(scale: &Scale, bounds: &Bounds, bound: Option<Bound>, (offset, step): (f32, f32)) -> Self {
        let Some(bound) = bound else { return Self::ALL };
        let (value, slope) = bound.tangent(scale.usual);
        let gamma = value + slope * (scale.reference - bounds.loss() - scale.usual);
        let parts = |value: f32| value / step * 65_536.0;
        let largest = f32::from(u16::MAX);
        let shorter = parts(-gamma * scale.length_unit).max(0.0).ceil();
        let margin = if shorter > 0.0 { 2.25 } else { 0.25 };
        let base = ((offset - gamma * scale.length_base) / step + margin).ceil();
        if base.is_nan() || base >= largest || shorter > largest {
            return Self::ALL;
        }
        // The casts saturate, and round down.
        Self {
            base: base as u16,
            along: parts(slope * scale.along_unit) as u16,
            longer: parts(gamma * scale.length_unit) as u16,
            shorter: shorter as u16,
        }
    }

    /// The largest deficit. Saturation at zero rounds up; at the top everything passes.
    #[inline(always)]
    pub(super) fn of(self, along: u16, length: u16) -> u16 {
        let times = |part: u16, factor: u16| ((u32::from(part) * u32::from(factor)) >> 16) as u16;
        self.base
            .saturating_sub(times(along, self.along))
            .saturating_sub(times(length, self.longer))
            .saturating_add(times(length, self.shorter))
    }
}
