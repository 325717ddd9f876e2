//! The f32 product of a stored row and a rotated probe, on the host, with a bound on its error.
//!
//! Knows slices only. One kernel per instruction set; `portable` is the twin of the others. Sums in f32
//! differ in their last bits from one kernel to the next; all stay within [`dot_slack`].

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;
#[cfg(test)]
pub(super) mod tests;

use half::f16;

use crate::model::LENGTH_ERROR_MAX;
use crate::simd::Simd;

/// (row, probe) to their f32 product. Dimensions are multiples of 32.
type Kernel = unsafe fn(&[f16], &[f32]) -> f32;

/// The product kernel of one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Dot(Kernel);

impl Dot {
    #[cfg(target_arch = "x86_64")]
    pub(super) const AVX512: Self = Self(avx512::dot);
    #[cfg(target_arch = "x86_64")]
    pub(super) const AVX2: Self = Self(avx2::dot);
    pub(super) const PORTABLE: Self = Self(portable::dot);

    /// The kernel of `path`, which this processor has (see [`crate::simd`]).
    pub(super) fn of(path: Simd) -> Self {
        match path {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Vbmi | Simd::Avx512Bf16 | Simd::Avx512 => Self::AVX512,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => Self::AVX2,
            _ => Self::PORTABLE,
        }
    }

    /// The f32 number of a row and a probe: within [`dot_slack`] of their exact score.
    #[inline]
    pub(super) fn product(self, row: &[f16], probe: &[f32]) -> f32 {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.0)(row, probe) }
    }
}

/// Largest norm of a stored row.
pub(super) const ROW_NORM_MAX: f64 = 1.0 + 1.0 / 1024.0;
/// Largest norm of a rotated probe.
pub(super) const PROBE_NORM_MAX: f64 = 1.0 + LENGTH_ERROR_MAX;
/// Unit roundoff of f32 and f64: half an ulp of 1.
pub(super) const F32_ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;
pub(super) const F64_ROUNDOFF: f64 = f64::EPSILON / 2.0;

/// gamma_n = n u / (1 - n u): n roundings with unit roundoff u multiply a term by at most
/// 1 + gamma_n (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1).
pub(super) fn gamma(n: usize, roundoff: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a dimension is small")]
    let nu = n as f64 * roundoff;
    nu / (1.0 - nu)
}

/// A bound on |a - e| for an f32 sum in any order, with or without fused multiply-add.
///
/// Notation: x is a stored row (f16), q a rotated probe (f32), n the dimension, s = <x, q> over
/// the reals, e the exact score ([`crate::search::score::exact`]), a the number of an f32 kernel.
/// Precondition: ‖x‖ <= 1 + 2^-10 and ‖q‖ <= 1 + 2^-20. The rotation ensures the second
/// ([`LENGTH_ERROR_MAX`]); an image of that length, rounded to f16, has the first (relative error
/// 2^-11 per component, and 2^-25 below the normal range).
///
/// Whatever the order, a term x_i q_i meets at most n roundings on its way to the result: one of
/// its product (none if fused) and one at each of at most n - 1 additions. So (Higham, section
/// 3.1) |a - s| <= gamma_n(2^-24) * sum |x_i q_i|, and by Cauchy-Schwarz the sum is at most
/// ‖x‖ ‖q‖. Products below f32's normal range lose at most 2^-150 each instead; additions there
/// are exact. In the same way |e - s| <= gamma_n(2^-53) ‖x‖ ‖q‖; in f64 nothing underflows.
///
/// So a row with e >= floor has a >= floor - slack. The slack is 3.1e-5 at n = 512.
#[must_use]
pub fn dot_slack(dim: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "a dimension is small")]
    let underflow = dim as f64 * f64::from(f32::from_bits(1));
    rounded_up((gamma(dim, F32_ROUNDOFF) + gamma(dim, F64_ROUNDOFF)) * ROW_NORM_MAX * PROBE_NORM_MAX + underflow)
}

/// These bounds are sums of a few positive f64, each right to some parts in 10^16: one step
/// of f32 upwards, 6 parts in 10^8, covers their own rounding.
pub(super) fn rounded_up(bound: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step up outweighs the rounding")]
    let nearest = bound as f32;
    nearest.next_up()
}
