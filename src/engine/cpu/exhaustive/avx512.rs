//! Exhaustive kernels in AVX-512: f32 products, 24 sums in registers. Twin: [`super::portable`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512`]; layouts are those
//! of [`super::layout`].

use std::arch::x86_64::*;

use half::f16;

use super::kernels::{Dots, Tile};
use super::layout::{DOTS_ROWS, DOTS_ROWS_AHEAD, DotsNumbers, Line, TileHits, each_probe, row_starts, sixteen};
use crate::engine::dot::avx512::widened;

/// Rows of a panel: two registers.
pub(super) const PANEL_ROWS: usize = 32;

pub(super) const TILES: [Tile; 12] = [
    tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>, tile::<7>, tile::<8>, tile::<9>, tile::<10>,
    tile::<11>, tile::<12>,
];

pub(super) const DOTS: [Dots; 6] = [dots::<1>, dots::<2>, dots::<3>, dots::<4>, dots::<5>, dots::<6>];

/// See [`super::kernels::Tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tile<const P: usize>(panel: &[Line], probes: &[Line], dim: usize, thresholds: &[f32], hits: &mut TileHits) -> bool {
    assert!(panel.len() * 16 >= dim * PANEL_ROWS && probes.len() * 16 >= dim * P);
    let thresholds = &thresholds[..P];
    let mut low = [_mm512_setzero_ps(); P];
    let mut high = [_mm512_setzero_ps(); P];
    let mut rows: *const f32 = panel.as_ptr().cast();
    let mut column: *const f32 = probes.as_ptr().cast();
    for _ in 0..dim {
        // SAFETY: the panel holds `dim` times 32 numbers and the block `dim` times P, as
        // asserted; both pointers move on by that much in each of `dim` turns.
        unsafe {
            let x_low = _mm512_load_ps(rows);
            let x_high = _mm512_load_ps(rows.add(16));
            each_probe!(p in P {
                let q = _mm512_set1_ps(*column.add(p));
                low[p] = _mm512_fmadd_ps(x_low, q, low[p]);
                high[p] = _mm512_fmadd_ps(x_high, q, high[p]);
            });
            rows = rows.add(PANEL_ROWS);
            column = column.add(P);
        }
    }
    report(low, high, thresholds, hits)
}

/// Compares the sums of a tile with the thresholds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn report<const P: usize>(
    low: [__m512; P],
    high: [__m512; P],
    thresholds: &[f32],
    hits: &mut TileHits,
) -> bool {
    let mut any = 0;
    each_probe!(p in P {
        let threshold = _mm512_set1_ps(thresholds[p]);
        let mask = u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(low[p], threshold))
            | u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(high[p], threshold)) << 16;
        hits.masks[p] = mask;
        any |= mask;
    });
    if any == 0 {
        return false;
    }
    each_probe!(p in P {
        let numbers = hits.numbers[p].as_mut_ptr();
        // SAFETY: a probe's numbers are 32, at a multiple of 128 bytes from an aligned start.
        unsafe {
            _mm512_storeu_ps(numbers, low[p]);
            _mm512_storeu_ps(numbers.add(16), high[p]);
        }
    });
    true
}

/// See [`super::kernels::Dots`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn dots<const P: usize>(
    rows: &[f16],
    probes: &[f32],
    dim: usize,
    thresholds: &[f32],
    numbers: &mut DotsNumbers,
) -> u32 {
    assert!(rows.len() >= dim * DOTS_ROWS && probes.len() >= dim * P);
    let thresholds = &thresholds[..P];
    let mut sums = [[_mm512_setzero_ps(); DOTS_ROWS]; P];
    let mut row = rows.as_ptr();
    let mut probe = probes.as_ptr();
    let mut ahead = row.wrapping_add(DOTS_ROWS_AHEAD * dim);
    for _ in 0..dim / 16 {
        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
        _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(32).cast());
        // SAFETY: sixteen components from `16 * step` of DOTS_ROWS rows, as asserted.
        let x = unsafe {
            [
                widened(row),
                widened(row.wrapping_add(dim)),
                widened(row.wrapping_add(2 * dim)),
                widened(row.wrapping_add(3 * dim)),
            ]
        };
        each_probe!(p in P {
            // SAFETY: sixteen components from `16 * step` of probe p < P, as asserted.
            let q = unsafe { _mm512_loadu_ps(probe.wrapping_add(p * dim)) };
            sums[p][0] = _mm512_fmadd_ps(x[0], q, sums[p][0]);
            sums[p][1] = _mm512_fmadd_ps(x[1], q, sums[p][1]);
            sums[p][2] = _mm512_fmadd_ps(x[2], q, sums[p][2]);
            sums[p][3] = _mm512_fmadd_ps(x[3], q, sums[p][3]);
        });
        row = row.wrapping_add(16);
        probe = probe.wrapping_add(16);
        ahead = ahead.wrapping_add(DOTS_ROWS * 16);
    }
    let mut reached = 0;
    each_probe!(p in P {
        let four = totals(sums[p]);
        let mask = _mm_cmp_ps_mask::<_CMP_GE_OQ>(four, _mm_set1_ps(thresholds[p]));
        reached |= u32::from(mask).wrapping_shl((p * DOTS_ROWS) as u32);
        // SAFETY: a probe has DOTS_ROWS = 4 numbers, and there are P <= DOTS_PROBES_MAX probes.
        unsafe { _mm_storeu_ps(numbers.as_mut_ptr().wrapping_add(p).cast(), four) };
    });
    reached
}

/// The sums over each of four registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn totals(sums: [__m512; DOTS_ROWS]) -> __m128 {
    let mut eight = [_mm256_setzero_ps(); DOTS_ROWS];
    for (eight, sum) in eight.iter_mut().zip(sums) {
        *eight = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
    }
    let pairs = _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
    _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs))
}

/// See [`super::kernels::PackRows`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn pack_rows(rows: &[f16], dim: usize, panel: &mut [Line]) {
    assert!(panel.len() * 16 >= dim * PANEL_ROWS && dim.is_multiple_of(16));
    let to: *mut f32 = panel.as_mut_ptr().cast();
    for half in 0..2 {
        let starts = row_starts(rows, dim, half * 16);
        for at in (0..dim).step_by(16) {
            // SAFETY: sixteen components from `at <= dim - 16` of a row.
            let block = sixteen!(r => _mm512_castps_si512(unsafe {
                widened(starts[r].wrapping_add(at))
            }));
            let next = starts[0].wrapping_add(16 * dim + at * 16);
            sixteen!(i => if i < 8 { _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(i * 32).cast()) });
            let columns = transposed(block);
            let to = to.wrapping_add(at * PANEL_ROWS + half * 16);
            sixteen!(i => {
                // SAFETY: half of the 32 numbers of component `at + i < dim`, as asserted.
                unsafe { _mm512_store_si512(to.wrapping_add(i * PANEL_ROWS).cast(), columns[i]) }
            });
        }
    }
}

/// The transpose of a 16 by 16 block of 32-bit words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut pairs = rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // fours[4g + c] holds in its 128-bit lane l the column 4l + c of rows 4g to 4g + 3.
    let mut fours = pairs;
    for i in (0..16).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        // 0x88 takes the even lanes of both, 0xdd the odd ones.
        let even = _mm512_shuffle_i32x4::<0x88>(fours[c], fours[4 + c]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[c], fours[4 + c]);
        let even_below = _mm512_shuffle_i32x4::<0x88>(fours[8 + c], fours[12 + c]);
        let odd_below = _mm512_shuffle_i32x4::<0xdd>(fours[8 + c], fours[12 + c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even_below);
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_below);
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_below);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_below);
    }
    columns
}
