//! The bars of the first look in whole steps, so that integers tell which rows pass.
//!
//! A row of length n and cosine c' with its code passes the first look where
//!
//! ```text
//! offset - step * deficit >= n b(c' - loss),   b(x) = along x - across sqrt(1 - x²) - slack
//! ```
//!
//! (`Tables`, [`Bound::least_product`], [`Bounds::loss`]; b rises.) That is one bar for each row and probe.
//! b is convex, so it lies above each of its tangents. With the tangent at the level's usual cosine,
//! of slope beta, and gamma its value at a reference r - loss below nearly all rows,
//!
//! ```text
//! n b(c' - loss) >= gamma n + beta n (c' - r)                                                 (1)
//! ```
//!
//! After a random rotation cosines are close to the usual one, so little is lost: a ten thousandth
//! where c' is a hundredth off. The factors n (c' - r) and n belong to the row and are kept as whole
//! numbers of 16 bits, [`TileBars`]; gamma and beta belong to the probe, [`Most`]. The largest
//! deficit that counts takes three multiplications in 16 bits. Rows below the reference, or of a
//! length below the usual ones, are *odd*: they always pass. A cosine above the usual ones counts as
//! the largest of them: with the length that bounds what dithered tables may be off by, see
//! [`crate::engine::certificate`].
//!
//! Each number is rounded so that the largest deficit is never below the one of (1).

use thenar_index::codes::{self, BLOCK_ROWS, Factors};

use super::Level;
use super::kernels::TILE_BLOCKS;
use crate::engine::certificate::{Bound, Bounds};

/// Of each row of a block, a whole number; in the order in which a path's scan has the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(super) struct Parts(pub(super) [u16; BLOCK_ROWS]);

impl Parts {
    pub(super) const ZERO: Self = Self([0; BLOCK_ROWS]);
}

/// How the bars of a tile's rows differ.
#[derive(Debug)]
pub(super) struct TileBars {
    /// Of each block, the rows that always pass.
    pub(super) odd: [u64; TILE_BLOCKS],
    /// n (c' - r) in units of [`Scale::along_unit`], rounded down.
    pub(super) along: [Parts; TILE_BLOCKS],
    /// n - [`Scale::length_base`] in units of [`Scale::length_unit`], rounded down. Not read where all
    /// are of one length.
    pub(super) length: [Parts; TILE_BLOCKS],
}

impl TileBars {
    pub(super) const EMPTY: Self =
        Self { odd: [0; TILE_BLOCKS], along: [Parts::ZERO; TILE_BLOCKS], length: [Parts::ZERO; TILE_BLOCKS] };
}

/// Of the components of a usual row, those of magnitude 3 in the two code: what a normal variable is
/// outside of its step.
const LARGE_SHARE: f32 = 0.3194;

/// What the whole numbers of a level stand for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    pub(super) dim: usize,
    /// The usual cosine of a row with its code.
    pub(super) usual: f32,
    /// The reference r, in parts as the codes have them, and as a cosine.
    pub(super) reference_parts: u16,
    pub(super) reference: f32,
    /// Likewise, the largest cosine that counts.
    pub(super) most_parts: u16,
    pub(super) most: f32,
    pub(super) along_unit: f32,
    /// The least length of rows that are not odd, as it is and squared.
    pub(super) length_base: f32,
    pub(super) square_base: u32,
    /// Zero where all codes are of one length.
    pub(super) length_unit: f32,
}

impl Scale {
    pub(super) fn new(level: Level, dim: usize) -> Self {
        let (usual, norm) = (level.usual_cosine(), level.least_norm(dim));
        // Cosines deviate by about 0.2 / sqrt(dim) with signs, and by 0.5 / sqrt(dim) with codebook codes.
        let root = (dim as f32).sqrt();
        let reference = (usual - 2.5 / root).max(0.0);
        let most = usual + if level == Level::Codebook { 1.5 } else { 0.6 } / root;
        // As the codes have cosines: in parts, of which there are at most as many as make a cosine of one.
        let part = if level == Level::Codebook { codes::codebook_cosine(1) } else { codes::cosine(1) };
        let [reference_parts, most_parts] =
            [reference, most].map(|cosine| (cosine / part).min(part.recip() - 1.0) as u16);
        let along_unit = match level {
            // Parts of a cosine times the one length: no rounding at all. Those of codebook codes are 256
            // times larger, and are multiplied, since the probe's number must be under 1.
            Level::Codebook => norm * part / 256.0,
            Level::OneBit => norm * part,
            // n is at most three times the least, and (1 - r) is under a quarter for 200 components and
            // more: what is larger is cut off, which is downwards.
            Level::TwoBit => 0.75 * norm / f32::from(u16::MAX),
        };
        // Numbers of large components deviate by half a root of all at most; four times that is rare.
        let large = (LARGE_SHARE * dim as f32 - 2.0 * root).max(0.0) as u16;
        let square_base = if level.has_lengths() { codes::two_bit_square(dim, large) } else { 0 };
        let length_base = if level.has_lengths() { (square_base as f32).sqrt() } else { norm };
        let length_unit = if level.has_lengths() { 2.0 * norm / f32::from(u16::MAX) } else { 0.0 };
        Self {
            dim,
            usual,
            reference_parts,
            reference: f32::from(reference_parts) * part,
            most_parts,
            most: f32::from(most_parts) * part,
            along_unit,
            length_base,
            square_base,
            length_unit,
        }
    }
}

/// The numbers of a block's rows at the level of signs or two bits, in their order, and the odd ones:
/// the definition, in a shape that compilers vectorise.
#[inline(always)]
pub(super) fn tell_rows(
    scale: &Scale,
    level: Level,
    factors: &[Factors; BLOCK_ROWS],
    along: &mut Parts,
    length: &mut Parts,
) -> u64 {
    let mut odd = 0;
    for (r, factors) in factors.iter().enumerate() {
        let (cosine, square) = match level {
            Level::TwoBit => (factors.two_bit_cosine(), factors.two_bit_square(scale.dim)),
            _ => (factors.one_bit_cosine(), scale.dim as u32),
        };
        let n = (square as f32).sqrt();
        odd |= u64::from(cosine < scale.reference || square < scale.square_base) << r;
        // The casts saturate, and round down.
        along.0[r] = ((cosine.min(scale.most) - scale.reference) * n / scale.along_unit) as u16;
        if level.has_lengths() {
            length.0[r] = ((n - scale.length_base) / scale.length_unit) as u16;
        }
    }
    odd
}

/// The numbers of a block's rows at the level of codebook codes, from the parts of their cosines.
#[inline(always)]
pub(super) fn tell_sketches(scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
    let mut odd = 0;
    for (r, parts) in cosines.iter().enumerate() {
        odd |= u64::from(u16::from(*parts) < scale.reference_parts) << r;
        along.0[r] = u16::from(*parts).min(scale.most_parts).saturating_sub(scale.reference_parts) << 8;
    }
    odd
}

/// The largest deficit of a probe that counts, for a row of certain numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Most {
    pub(super) base: u16,
    /// What the row's numbers are multiplied by, in parts of 65,536; one of the last two is zero.
    pub(super) along: u16,
    pub(super) longer: u16,
    pub(super) shorter: u16,
}

impl Most {
    /// Every row passes.
    pub(super) const ALL: Self = Self { base: u16::MAX, along: 0, longer: 0, shorter: 0 };

    /// For a probe whose deficits stand for offset - step * deficit.
    ///
    /// A quarter of a step is more than what f32 arithmetic is wrong by, on values of a few ten
    /// thousand steps at most and on the row's numbers, which are right to some parts in 10^7 before
    /// they are rounded down. Where gamma is negative, two steps make good that [`Most::of`] rounds down
    /// a summand, and that the length was rounded: |gamma| units, far less than a step.
    pub(super) fn new(scale: &Scale, cutter: &Bounds, cut: Option<Bound>, (offset, step): (f32, f32)) -> Self {
        let Some(cut) = cut else { return Self::ALL };
        let (value, slope) = cut.tangent(scale.usual);
        let gamma = value + slope * (scale.reference - cutter.loss() - scale.usual);
        let parts = |value: f32| value / step * 65_536.0;
        let most = f32::from(u16::MAX);
        let shorter = parts(-gamma * scale.length_unit).max(0.0).ceil();
        let made_good = if shorter > 0.0 { 2.25 } else { 0.25 };
        let base = ((offset - gamma * scale.length_base) / step + made_good).ceil();
        if base.is_nan() || base >= most || shorter > most {
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

    /// The largest deficit: the definition. Saturating at zero is upwards; at the top everything
    /// passes.
    #[inline(always)]
    pub(super) fn of(self, along: u16, length: u16) -> u16 {
        let times = |part: u16, factor: u16| ((u32::from(part) * u32::from(factor)) >> 16) as u16;
        self.base
            .saturating_sub(times(along, self.along))
            .saturating_sub(times(length, self.longer))
            .saturating_add(times(length, self.shorter))
    }
}
