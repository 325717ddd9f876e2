//! Exhaustive kernels in AVX2 with FMA and F16C: f32 products, 12 sums in registers. Twin: [`super::portable`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx2`]; layouts are those
//! of [`super::layout`].

use std::arch::x86_64::*;

use half::f16;

use super::kernels::{Dots, Tile};
use super::layout::{DOTS_ROWS, DOTS_ROWS_AHEAD, DotsNumbers, Line, TileHits, each_probe, row_starts, sixteen};
use crate::engine::dot::avx2::widened;

/// Rows of a panel: two registers.
pub(super) const PANEL_ROWS: usize = 16;

pub(super) const TILES: [Tile; 6] = [tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>];

pub(super) const DOTS: [Dots; 3] = [dots::<1>, dots::<2>, dots::<3>];

/// See [`super::kernels::Tile`].
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const P: usize>(panel: &[Line], probes: &[Line], dim: usize, thresholds: &[f32], hits: &mut TileHits) -> bool {
    assert!(panel.len() * 16 >= dim * PANEL_ROWS && probes.len() * 16 >= dim * P);
    let thresholds = &thresholds[..P];
    let mut low = [_mm256_setzero_ps(); P];
    let mut high = [_mm256_setzero_ps(); P];
    let mut rows: *const f32 = panel.as_ptr().cast();
    let mut column: *const f32 = probes.as_ptr().cast();
    for _ in 0..dim {
        // SAFETY: the panel holds `dim` times 16 numbers and the block `dim` times P, as
        // asserted; both pointers move on by that much in each of `dim` turns.
        unsafe {
            let x_low = _mm256_load_ps(rows);
            let x_high = _mm256_load_ps(rows.add(8));
            each_probe!(p in P {
                let q = _mm256_broadcast_ss(&*column.add(p));
                low[p] = _mm256_fmadd_ps(x_low, q, low[p]);
                high[p] = _mm256_fmadd_ps(x_high, q, high[p]);
            });
            rows = rows.add(PANEL_ROWS);
            column = column.add(P);
        }
    }
    let mut any = 0;
    each_probe!(p in P {
        let threshold = _mm256_set1_ps(thresholds[p]);
        let mask = reached(low[p], threshold) | reached(high[p], threshold) << 8;
        hits.masks[p] = mask;
        any |= mask;
    });
    if any == 0 {
        return false;
    }
    each_probe!(p in P {
        let numbers = hits.numbers[p].as_mut_ptr();
        // SAFETY: a probe has room for 32 numbers.
        unsafe {
            _mm256_storeu_ps(numbers, low[p]);
            _mm256_storeu_ps(numbers.add(8), high[p]);
        }
    });
    true
}

/// A bit for each number that reaches its threshold.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn reached(numbers: __m256, threshold: __m256) -> u32 {
    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(numbers, threshold)).cast_unsigned()
}

/// See [`super::kernels::Dots`].
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<const P: usize>(
    rows: &[f16],
    probes: &[f32],
    dim: usize,
    thresholds: &[f32],
    numbers: &mut DotsNumbers,
) -> u32 {
    assert!(rows.len() >= dim * DOTS_ROWS && probes.len() >= dim * P);
    let thresholds = &thresholds[..P];
    let mut sums = [[_mm256_setzero_ps(); DOTS_ROWS]; P];
    let mut row = rows.as_ptr();
    let mut probe = probes.as_ptr();
    let mut ahead = row.wrapping_add(DOTS_ROWS_AHEAD * dim);
    for _ in 0..dim / 8 {
        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
        let mut q = [_mm256_setzero_ps(); P];
        each_probe!(p in P {
            // SAFETY: eight components from `8 * step` of probe p < P, as asserted.
            q[p] = unsafe { _mm256_loadu_ps(probe.wrapping_add(p * dim)) };
        });
        // SAFETY: eight components from `8 * step` of a row below DOTS_ROWS, as asserted.
        let x = unsafe { widened(row) };
        each_probe!(p in P { sums[p][0] = _mm256_fmadd_ps(x, q[p], sums[p][0]); });
        // SAFETY: as above.
        let x = unsafe { widened(row.wrapping_add(dim)) };
        each_probe!(p in P { sums[p][1] = _mm256_fmadd_ps(x, q[p], sums[p][1]); });
        // SAFETY: as above.
        let x = unsafe { widened(row.wrapping_add(2 * dim)) };
        each_probe!(p in P { sums[p][2] = _mm256_fmadd_ps(x, q[p], sums[p][2]); });
        // SAFETY: as above.
        let x = unsafe { widened(row.wrapping_add(3 * dim)) };
        each_probe!(p in P { sums[p][3] = _mm256_fmadd_ps(x, q[p], sums[p][3]); });
        row = row.wrapping_add(8);
        probe = probe.wrapping_add(8);
        ahead = ahead.wrapping_add(DOTS_ROWS * 8);
    }
    let mut reached = 0;
    each_probe!(p in P {
        let four = totals(sums[p]);
        let mask = _mm_movemask_ps(_mm_cmpge_ps(four, _mm_set1_ps(thresholds[p])));
        reached |= mask.cast_unsigned().wrapping_shl((p * DOTS_ROWS) as u32);
        // SAFETY: a probe has DOTS_ROWS = 4 numbers, and there are P <= DOTS_PROBES_MAX probes.
        unsafe { _mm_storeu_ps(numbers.as_mut_ptr().wrapping_add(p).cast(), four) };
    });
    reached
}

/// The sums over each of four registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn totals(sums: [__m256; 4]) -> __m128 {
    let pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
    _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs))
}

/// See [`super::kernels::PackRows`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn pack_rows(rows: &[f16], dim: usize, panel: &mut [Line]) {
    assert!(panel.len() * 16 >= dim * PANEL_ROWS && dim.is_multiple_of(8));
    let to: *mut f32 = panel.as_mut_ptr().cast();
    let starts = row_starts(rows, dim, 0);
    let mut ahead = rows.as_ptr().wrapping_add(PANEL_ROWS * dim);
    for at in (0..dim).step_by(8) {
        // The next panel's lines, in the order they lie in memory.
        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(32).cast());
        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64).cast());
        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(96).cast());
        ahead = ahead.wrapping_add(PANEL_ROWS * 8);
        // SAFETY: eight components from `at <= dim - 8` of a row.
        let block = sixteen!(r => unsafe { widened(starts[r].wrapping_add(at)) });
        let (low, high) = block.split_at(8);
        let halves = [low, high].map(|eight| transposed(eight.try_into().expect("eight rows")));
        let to = to.wrapping_add(at * PANEL_ROWS);
        sixteen!(i => {
            // SAFETY: half of the 16 numbers of component `at + i / 2 < dim`, as asserted.
            unsafe { _mm256_store_ps(to.wrapping_add(i * 8), halves[i & 1][i / 2]) }
        });
    }
}

/// The transpose of an 8 by 8 block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transposed(rows: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = rows;
    for i in (0..8).step_by(2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // fours[4g + c] holds in its 128-bit lane l the column 4l + c of rows 4g to 4g + 3.
    let mut fours = pairs;
    for i in [0, 4] {
        fours[i] = _mm256_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        columns[c] = _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]);
        columns[4 + c] = _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]);
    }
    columns
}
