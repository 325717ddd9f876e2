//! The score in AVX-512: lanes 0 to 7 in one register of f64, lanes 8 to 15 in another.
//!
//! Same order of additions as the definition in the parent module, so the same bits.

use std::arch::x86_64::*;

use half::f16;

use super::LANES;

/// Rows that [`many`] scores together: they share the widening of the probe, and their eight
/// chains of additions hide each other's latency.
const ROWS: usize = 4;

/// See [`super::exact`]. Lengths are equal and multiples of [`LANES`].
#[target_feature(enable = "avx512f")]
pub(super) fn one(row: &[f16], probe: &[f32]) -> f64 {
    let [score] = rows([row], probe);
    score
}

/// See [`super::exact_many`].
#[target_feature(enable = "avx512f")]
pub(super) fn many(all: &[f16], probe: &[f32], scores: &mut [f64]) {
    let dim = probe.len();
    let (fours, rest) = scores.as_chunks_mut::<ROWS>();
    for (i, four) in fours.iter_mut().enumerate() {
        *four = rows(
            std::array::from_fn(|r| {
                let row = i * ROWS + r;
                &all[row * dim..(row + 1) * dim]
            }),
            probe,
        );
    }
    let done = fours.len() * ROWS;
    for (i, score) in rest.iter_mut().enumerate() {
        let row = done + i;
        *score = one(&all[row * dim..(row + 1) * dim], probe);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn rows<const R: usize>(rows: [&[f16]; R], probe: &[f32]) -> [f64; R] {
    let steps = probe.len() / LANES;
    assert!(rows.iter().all(|row| row.len() >= steps * LANES));
    let mut low = [_mm512_setzero_pd(); R];
    let mut high = [_mm512_setzero_pd(); R];
    for step in 0..steps {
        let at = step * LANES;
        // SAFETY: `at + LANES <= steps * LANES`, which is within `probe` and, by the assertion,
        // within every row.
        let q = unsafe { _mm512_loadu_ps(probe.as_ptr().add(at)) };
        let (q_low, q_high) = widened(q);
        for r in 0..R {
            // SAFETY: as above.
            let x = unsafe { _mm256_loadu_si256(rows[r].as_ptr().add(at).cast()) };
            let (x_low, x_high) = widened(_mm512_cvtph_ps(x));
            low[r] = _mm512_fmadd_pd(x_low, q_low, low[r]);
            high[r] = _mm512_fmadd_pd(x_high, q_high, high[r]);
        }
    }
    std::array::from_fn(|r| {
        let eight = _mm512_add_pd(low[r], high[r]);
        let four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd::<1>(eight));
        let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    })
}

/// Sixteen f32 as two registers of f64, exactly.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(x: __m512) -> (__m512d, __m512d) {
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
    (_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(high))
}
