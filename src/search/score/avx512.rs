//! The score in AVX-512: lanes 0 to 7 in one register of f64, lanes 8 to 15 in another.
//!
//! Same order of additions as the definition in the parent module, so the same bits.

use std::arch::x86_64::*;

use half::f16;

use super::LANES;

/// See [`super::exact`]. Lengths are equal and multiples of [`LANES`].
#[target_feature(enable = "avx512f")]
pub(super) fn exact(row: &[f16], probe: &[f32]) -> f64 {
    let steps = probe.len() / LANES;
    assert!(row.len() >= steps * LANES);
    let (mut low, mut high) = (_mm512_setzero_pd(), _mm512_setzero_pd());
    for step in 0..steps {
        let at = step * LANES;
        // SAFETY: `at + LANES <= steps * LANES`, which is within `probe`.
        let q = unsafe { _mm512_loadu_ps(probe.as_ptr().add(at)) };
        // SAFETY: as above, and by the assertion within the row.
        let x = unsafe { _mm256_loadu_si256(row.as_ptr().add(at).cast()) };
        let ((q_low, q_high), (x_low, x_high)) = (widened(q), widened(_mm512_cvtph_ps(x)));
        low = _mm512_fmadd_pd(x_low, q_low, low);
        high = _mm512_fmadd_pd(x_high, q_high, high);
    }
    let eight = _mm512_add_pd(low, high);
    let four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd::<1>(eight));
    let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
    _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
}

/// Sixteen f32 as two registers of f64, exactly.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(x: __m512) -> (__m512d, __m512d) {
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
    (_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(high))
}
