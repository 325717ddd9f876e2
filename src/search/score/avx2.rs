//! The score in AVX2 with FMA and F16C: four registers of four f64 lanes.
//!
//! Same order of additions as the definition in the parent module, so the same bits.

use std::arch::x86_64::*;

use half::f16;

use super::LANES;

/// Rows that [`many`] scores together: they share the widening of the probe.
const ROWS: usize = 2;

/// See [`super::exact`]. Lengths are equal and multiples of [`LANES`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn one(row: &[f16], probe: &[f32]) -> f64 {
    let [score] = rows([row], probe);
    score
}

/// See [`super::exact_many`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn many(all: &[f16], probe: &[f32], scores: &mut [f64]) {
    let dim = probe.len();
    let (pairs, rest) = scores.as_chunks_mut::<ROWS>();
    for (i, pair) in pairs.iter_mut().enumerate() {
        *pair = rows(
            std::array::from_fn(|r| {
                let row = i * ROWS + r;
                &all[row * dim..(row + 1) * dim]
            }),
            probe,
        );
    }
    let done = pairs.len() * ROWS;
    for (i, score) in rest.iter_mut().enumerate() {
        let row = done + i;
        *score = one(&all[row * dim..(row + 1) * dim], probe);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[expect(clippy::needless_range_loop, reason = "r and j number lanes of several arrays")]
fn rows<const R: usize>(rows: [&[f16]; R], probe: &[f32]) -> [f64; R] {
    let steps = probe.len() / LANES;
    assert!(rows.iter().all(|row| row.len() >= steps * LANES));
    // sums[r][j] holds lanes 4j to 4j + 3.
    let mut sums = [[_mm256_setzero_pd(); 4]; R];
    for step in 0..steps {
        for j in 0..4 {
            let at = step * LANES + j * 4;
            // SAFETY: `at + 4 <= steps * LANES`, which is within `probe` and, by the assertion,
            // within every row.
            let q = _mm256_cvtps_pd(unsafe { _mm_loadu_ps(probe.as_ptr().add(at)) });
            for r in 0..R {
                // SAFETY: as above; the load takes four f16.
                let x = unsafe { _mm_loadl_epi64(rows[r].as_ptr().add(at).cast()) };
                let x = _mm256_cvtps_pd(_mm_cvtph_ps(x));
                sums[r][j] = _mm256_fmadd_pd(x, q, sums[r][j]);
            }
        }
    }
    std::array::from_fn(|r| {
        let [a, b, c, d] = sums[r];
        let four = _mm256_add_pd(_mm256_add_pd(a, c), _mm256_add_pd(b, d));
        let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    })
}
