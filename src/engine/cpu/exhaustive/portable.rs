//! Exhaustive kernels in plain Rust, in shapes that compilers vectorise: the twin that `avx2`, `avx512` and
//! `avx512_bf16` are held against. Layouts are those of [`super::layout`].

use half::f16;

use super::kernels::Tile;
use super::layout::{Line, TileHits};
use crate::engine::dot::portable::widened;

/// Rows of a panel.
pub(super) const PANEL_ROWS: usize = 32;

pub(super) const TILES: [Tile; 4] = [tile::<1>, tile::<2>, tile::<3>, tile::<4>];

/// See [`super::kernels::Tile`].
fn tile<const P: usize>(panel: &[Line], probes: &[Line], dim: usize, thresholds: &[f32], hits: &mut TileHits) -> bool {
    let rows = bytemuck::cast_slice::<Line, f32>(panel).as_chunks::<PANEL_ROWS>().0;
    let columns = bytemuck::cast_slice::<Line, f32>(probes).as_chunks::<P>().0;
    let sums = sums(&rows[..dim], &columns[..dim]);
    let mut any = 0;
    for p in 0..P {
        let mut mask = 0;
        for (r, sum) in sums[p].iter().enumerate() {
            mask |= u32::from(*sum >= thresholds[p]) << r;
        }
        hits.masks[p] = mask;
        hits.numbers[p][..PANEL_ROWS].copy_from_slice(&sums[p]);
        any |= mask;
    }
    any != 0
}

/// The sums of a tile.
///
/// Four components at a time, and the rows innermost in a loop too long to be unrolled: compilers
/// vectorise this, whatever the width of a register.
#[inline(never)]
fn sums<const P: usize>(rows: &[[f32; PANEL_ROWS]], columns: &[[f32; P]]) -> [[f32; PANEL_ROWS]; P] {
    let mut sums = [[0.0_f32; PANEL_ROWS]; P];
    for ([a, b, c, d], q) in rows.as_chunks().0.iter().zip(columns.as_chunks::<4>().0) {
        for p in 0..P {
            let sums = &mut sums[p];
            for r in 0..PANEL_ROWS {
                sums[r] += (a[r] * q[0][p] + b[r] * q[1][p]) + (c[r] * q[2][p] + d[r] * q[3][p]);
            }
        }
    }
    sums
}

/// See [`super::kernels::PackRows`].
pub(super) fn pack_rows(rows: &[f16], dim: usize, panel: &mut [Line]) {
    const STEP: usize = 32;
    let panel = bytemuck::cast_slice_mut::<Line, f32>(panel).as_chunks_mut::<PANEL_ROWS>().0;
    let last = rows.len() / dim - 1;
    for r in 0..PANEL_ROWS {
        let row = &rows[r.min(last) * dim..(r.min(last) + 1) * dim];
        // Widened first, several at a time, then transposed.
        for (values, columns) in row.as_chunks::<STEP>().0.iter().zip(panel.chunks_exact_mut(STEP)) {
            let wide = values.map(widened);
            for (column, value) in columns.iter_mut().zip(wide) {
                column[r] = value;
            }
        }
    }
}
