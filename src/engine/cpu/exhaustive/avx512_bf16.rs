//! Exhaustive tiles in AVX-512 BF16: two products per lane and instruction, twice the rate of f32. Twin, but
//! for its rounding: [`super::portable`].
//!
//! Numbers are coarse ([`super::slack::coarse_slack`]); rows that pass are compared again in f32.
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512Bf16`]; layouts are
//! those of [`super::layout`].

use std::arch::x86_64::*;

use half::f16;

use super::avx512::{report, transposed};
use super::kernels::Tile;
use super::layout::{Line, TileHits, each_probe, row_starts, sixteen};
use crate::engine::dot::avx512::widened;

/// Rows of a panel: two registers.
pub(super) const PANEL_ROWS: usize = 32;

pub(super) const TILES: [Tile; 12] = [
    tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>, tile::<7>, tile::<8>, tile::<9>, tile::<10>,
    tile::<11>, tile::<12>,
];

/// See [`super::kernels::Tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn tile<const P: usize>(panel: &[Line], probes: &[Line], dim: usize, thresholds: &[f32], hits: &mut TileHits) -> bool {
    assert!(panel.len() * 32 >= dim * PANEL_ROWS && probes.len() * 32 >= dim * P);
    let thresholds = &thresholds[..P];
    let mut low = [_mm512_setzero_ps(); P];
    let mut high = [_mm512_setzero_ps(); P];
    let mut rows: *const u32 = panel.as_ptr().cast();
    let mut column: *const i32 = probes.as_ptr().cast();
    for _ in 0..dim / 2 {
        // SAFETY: the panel holds `dim / 2` times 32 words and the block `dim / 2` times P, as
        // asserted; both pointers move on by that much in each of `dim / 2` turns.
        unsafe {
            let x_low = words(_mm512_load_si512(rows.cast()));
            let x_high = words(_mm512_load_si512(rows.add(16).cast()));
            each_probe!(p in P {
                let q = words(_mm512_set1_epi32(*column.add(p)));
                low[p] = _mm512_dpbf16_ps(low[p], x_low, q);
                high[p] = _mm512_dpbf16_ps(high[p], x_high, q);
            });
            rows = rows.add(PANEL_ROWS);
            column = column.add(P);
        }
    }
    report(low, high, thresholds, hits)
}

/// Sixteen words of two bf16 each.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn words(bits: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes for which every bit pattern is valid.
    unsafe { std::mem::transmute(bits) }
}

/// See [`super::kernels::PackRows`]. Rounds to the nearest bf16, ties to even.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_rows(rows: &[f16], dim: usize, panel: &mut [Line]) {
    assert!(panel.len() * 32 >= dim * PANEL_ROWS && dim.is_multiple_of(32));
    let to: *mut u32 = panel.as_mut_ptr().cast();
    for half in 0..2 {
        let starts = row_starts(rows, dim, half * 16);
        for at in (0..dim).step_by(32) {
            // SAFETY: 32 components from `at <= dim - 32` of a row.
            let block = sixteen!(r => unsafe { rounded(starts[r].wrapping_add(at)) });
            let next = starts[0].wrapping_add(16 * dim + at * 16);
            sixteen!(i => _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(i * 32).cast()));
            let columns = transposed(block);
            let to = to.wrapping_add(at / 2 * PANEL_ROWS + half * 16);
            sixteen!(i => {
                // SAFETY: half of the 32 words of pair `at / 2 + i < dim / 2`, as asserted.
                unsafe { _mm512_store_si512(to.wrapping_add(i * PANEL_ROWS).cast(), columns[i]) }
            });
        }
    }
}

/// 32 f16 as the nearest bf16.
///
/// # Safety
/// `from` points to 32 readable f16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn rounded(from: *const f16) -> __m512i {
    // SAFETY: the caller's; both vector types are 64 bytes of any pattern.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(widened(from.wrapping_add(16)), widened(from))) }
}
