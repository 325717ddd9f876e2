//! The product in AVX2 with FMA and F16C. Twin: [`super::portable`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx2`].

use std::arch::x86_64::*;

use half::f16;

/// The sum of products, dimension a multiple of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot(row: &[f16], probe: &[f32]) -> f32 {
    assert!(row.len() == probe.len() && row.len().is_multiple_of(32));
    let mut sums = [_mm256_setzero_ps(); 4];
    for step in 0..row.len() / 32 {
        for (part, sum) in sums.iter_mut().enumerate() {
            let at = step * 32 + part * 8;
            // SAFETY: eight components from `at <= len - 8`, in both.
            unsafe {
                let q = _mm256_loadu_ps(probe.as_ptr().add(at));
                *sum = _mm256_fmadd_ps(widened(row.as_ptr().add(at)), q, *sum);
            }
        }
    }
    let eight = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Eight f16 as f32.
///
/// # Safety
/// `from` points to eight readable f16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::engine) unsafe fn widened(from: *const f16) -> __m256 {
    // SAFETY: the caller's.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
}
