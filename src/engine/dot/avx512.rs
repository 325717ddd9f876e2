//! The product in AVX-512. Twin: [`super::portable`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512`].

use std::arch::x86_64::*;

use half::f16;

/// The sum of products, dimension a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn dot(row: &[f16], probe: &[f32]) -> f32 {
    assert!(row.len() == probe.len() && row.len().is_multiple_of(32));
    let mut sums = [_mm512_setzero_ps(); 2];
    for step in 0..row.len() / 32 {
        for (half, sum) in sums.iter_mut().enumerate() {
            let at = step * 32 + half * 16;
            // SAFETY: sixteen components from `at <= len - 16`, in both.
            unsafe {
                let q = _mm512_loadu_ps(probe.as_ptr().add(at));
                *sum = _mm512_fmadd_ps(widened(row.as_ptr().add(at)), q, *sum);
            }
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// Sixteen f16 as f32.
///
/// # Safety
/// `from` points to sixteen readable f16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in crate::engine) unsafe fn widened(from: *const f16) -> __m512 {
    // SAFETY: the caller's.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
}
