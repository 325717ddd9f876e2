//! The table of exhaustive kernels of one instruction set.
//!
//! - **Dots** read rows as they are stored and keep partial sums along the dimension. Nothing is
//!   copied, so a few probes are compared at the speed of memory.
//! - **Tiles** read *panels*: [`Kernels::panel_rows`] rows widened and interleaved, so that one
//!   register holds one component of many rows. A tile kernel compares a panel with up to
//!   [`Kernels::tile_probes`] probes, all sums in registers; panels are made once and used for
//!   every probe of a batch.
//!
//! Knows slices only: no live bits, no floors beyond the numbers to compare with.

use half::f16;

use super::layout::{DotsNumbers, Line, TileHits};
use super::portable;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, avx512_bf16};
use crate::engine::dot::Dot;
use crate::simd::Simd;

/// (panel, packed block of probes, dim, thresholds, hits) to whether any row reached any.
pub(super) type Tile = unsafe fn(&[Line], &[Line], usize, &[f32], &mut TileHits) -> bool;
/// (`DOTS_ROWS` rows, probes row-major, dim, thresholds, numbers) to a mask: bit
/// `probe * DOTS_ROWS + row` is set if the number reached the threshold.
pub(super) type Dots = unsafe fn(&[f16], &[f32], usize, &[f32], &mut DotsNumbers) -> u32;
/// (one to `panel_rows` rows, dim, panel); the last row stands in for missing ones.
pub(super) type PackRows = unsafe fn(&[f16], usize, &mut [Line]);

/// The number format in which the tiles of a path multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Precision {
    /// f32: a tile's number is within [`dot_slack`](crate::engine::dot::dot_slack) of the exact score.
    F32,
    /// bf16, at twice the rate: numbers are coarse, and rows that pass are compared again in f32.
    Bf16,
}

/// The kernels of one path. Calling them is sound because [`Kernels::of`] is only
/// asked for a path that the processor has.
pub(in crate::engine::cpu) struct Kernels {
    pub(super) panel_rows: usize,
    pub(super) precision: Precision,
    /// Probes up to which dots beat tiles (measured; 0: never).
    pub(super) dots_up_to: usize,
    /// `tiles[p - 1]` takes blocks of p probes.
    tiles: &'static [Tile],
    /// `dots[p - 1]` takes p probes.
    dots: &'static [Dots],
    pub(super) dot: Dot,
    pack_rows: PackRows,
}

impl Kernels {
    /// The kernels of `path`. The caller makes sure that the processor has it.
    pub(in crate::engine::cpu) fn of(path: Simd) -> &'static Self {
        match path {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Vbmi | Simd::Avx512Bf16 => &Self {
                panel_rows: avx512_bf16::PANEL_ROWS,
                precision: Precision::Bf16,
                dots_up_to: 12,
                tiles: &avx512_bf16::TILES,
                dots: &avx512::DOTS,
                dot: Dot::AVX512,
                pack_rows: avx512_bf16::pack_rows,
            },
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => &Self {
                panel_rows: avx512::PANEL_ROWS,
                precision: Precision::F32,
                dots_up_to: 64,
                tiles: &avx512::TILES,
                dots: &avx512::DOTS,
                dot: Dot::AVX512,
                pack_rows: avx512::pack_rows,
            },
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => &Self {
                panel_rows: avx2::PANEL_ROWS,
                precision: Precision::F32,
                dots_up_to: 3,
                tiles: &avx2::TILES,
                dots: &avx2::DOTS,
                dot: Dot::AVX2,
                pack_rows: avx2::pack_rows,
            },
            _ => &Self {
                panel_rows: portable::PANEL_ROWS,
                precision: Precision::F32,
                dots_up_to: 0,
                tiles: &portable::TILES,
                dots: &[],
                dot: Dot::PORTABLE,
                pack_rows: portable::pack_rows,
            },
        }
    }

    /// Probes of the widest tile.
    pub(super) fn tile_probes(&self) -> usize {
        self.tiles.len()
    }

    /// Probes that one dots call takes, at most.
    pub(super) fn dots_probes(&self) -> usize {
        self.dots.len()
    }

    /// Lines of one panel.
    pub(super) fn panel_lines(&self, dim: usize) -> usize {
        self.packed_lines(self.panel_rows, dim)
    }

    /// Lines of a packed block of `count` vectors. Whole: `dim` is a multiple of 32.
    pub(super) fn packed_lines(&self, count: usize, dim: usize) -> usize {
        let components_per_line = match self.precision {
            Precision::F32 => 16,
            Precision::Bf16 => 32,
        };
        count * dim / components_per_line
    }

    /// Packs a block of probes (row-major `[count, dim]`). `moved[p]` becomes ‖packed - probe‖.
    pub(super) fn pack_probes(&self, probes: &[f32], dim: usize, packed: &mut [Line], moved: &mut [f64]) {
        let count = probes.len() / dim;
        match self.precision {
            Precision::F32 => {
                let packed: &mut [f32] = bytemuck::cast_slice_mut(packed);
                for (p, probe) in probes.chunks_exact(dim).enumerate() {
                    for (i, value) in probe.iter().enumerate() {
                        packed[i * count + p] = *value;
                    }
                }
                moved.fill(0.0);
            }
            Precision::Bf16 => {
                let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
                for (p, probe) in probes.chunks_exact(dim).enumerate() {
                    let mut square = 0.0;
                    for (i, pair) in probe.as_chunks::<2>().0.iter().enumerate() {
                        let [low, high] = pair.map(to_bf16);
                        packed[i * count + p] = u32::from(low) | u32::from(high) << 16;
                        for (packed, value) in [low, high].into_iter().zip(pair) {
                            let packed = f32::from_bits(u32::from(packed) << 16);
                            square += (f64::from(packed) - f64::from(*value)).powi(2);
                        }
                    }
                    // Summing and the root are right to some parts in 10^13.
                    moved[p] = square.sqrt() * (1.0 + 1e-9);
                }
            }
        }
    }

    /// Packs consecutive rows into a panel.
    #[inline]
    pub(super) fn pack_rows(&self, rows: &[f16], dim: usize, panel: &mut [Line]) {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.pack_rows)(rows, dim, panel) }
    }

    /// Compares a panel with a block of `thresholds.len()` probes.
    #[inline]
    pub(super) fn tile(
        &self,
        panel: &[Line],
        probes: &[Line],
        dim: usize,
        thresholds: &[f32],
        hits: &mut TileHits,
    ) -> bool {
        let tile = self.tiles[thresholds.len() - 1];
        // SAFETY: the processor has this path, see `of`.
        unsafe { tile(panel, probes, dim, thresholds, hits) }
    }

    /// Compares `DOTS_ROWS` rows with `thresholds.len()` probes.
    #[inline]
    pub(super) fn dots(
        &self,
        rows: &[f16],
        probes: &[f32],
        dim: usize,
        thresholds: &[f32],
        numbers: &mut DotsNumbers,
    ) -> u32 {
        let dots = self.dots[thresholds.len() - 1];
        // SAFETY: the processor has this path, see `of`.
        unsafe { dots(rows, probes, dim, thresholds, numbers) }
    }
}

/// The nearest bf16, ties to even; what is below f32's normal range becomes zero, as the
/// multiplying instruction would take it. For finite values.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = if value.abs() < f32::MIN_POSITIVE { bits & 0x8000_0000 } else { bits + 0x7fff + (bits >> 16 & 1) };
    (rounded >> 16) as u16
}
