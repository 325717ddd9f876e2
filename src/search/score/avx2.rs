//! The score in AVX2 with FMA and F16C: four registers of four f64 lanes.
//!
//! Same order of additions as the definition in the parent module, so the same bits.

use std::arch::x86_64::*;

use half::f16;

use super::LANES;

/// See [`super::exact`]. Lengths are equal and multiples of [`LANES`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn exact(row: &[f16], probe: &[f32]) -> f64 {
    let steps = probe.len() / LANES;
    assert!(row.len() >= steps * LANES);
    // sums[j] holds lanes 4j to 4j + 3.
    let mut sums = [_mm256_setzero_pd(); 4];
    for step in 0..steps {
        for (j, sum) in sums.iter_mut().enumerate() {
            let at = step * LANES + j * 4;
            // SAFETY: `at + 4 <= steps * LANES`, which is within `probe`.
            let q = _mm256_cvtps_pd(unsafe { _mm_loadu_ps(probe.as_ptr().add(at)) });
            // SAFETY: as above, and by the assertion within the row; the load takes four f16.
            let x = unsafe { _mm_loadl_epi64(row.as_ptr().add(at).cast()) };
            *sum = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_cvtph_ps(x)), q, *sum);
        }
    }
    let [a, b, c, d] = sums;
    let four = _mm256_add_pd(_mm256_add_pd(a, c), _mm256_add_pd(b, d));
    let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
    _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
}
