//! Exhaustive comparison: every row of a piece with every probe, in f32 or coarser.
//!
//! Two ways, see [`kernels`]: *dots* read rows as they are stored, at the speed of memory for a few
//! probes; *tiles* read panels of rows that were widened once for all probes, at the arithmetic peak.
//!
//! Knows rows, probes and thresholds. Does not know segments, live bits or filters.
//!
//! - `layout`: panels and packed probes. `kernels`: the table of functions of one instruction set.
//! - `avx512`, `avx512_bf16`, `avx2`: their twin is `portable`. `slack`: how far bf16 may be off.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
pub(super) mod kernels;
pub(super) mod layout;
mod portable;
mod slack;

use half::f16;
use zeroize::Zeroize;

use self::kernels::{Kernels, Precision};
use self::layout::{DOTS_PROBES_MAX, DOTS_ROWS, DotsNumbers, Line, TILE_PROBES_MAX, TileHits};
use self::slack::coarse_slack;
use crate::engine::top_k::{TopK, lowered};

/// Bytes of stored rows in a piece that dots read: they stay in a core's own cache while group after
/// group of probes reads them.
const PIECE_BYTES: usize = 256 << 10;
/// Bytes of the panels of a piece: they stay in a core's own cache likewise.
const PANELS_BYTES: usize = 256 << 10;
/// Panels of a piece at most, so that small dimensions still make many pieces.
const PANELS_MAX: usize = 8;

/// Consecutive probes that one call of a kernel compares.
struct Group {
    /// Number of the first probe.
    first: usize,
    count: usize,
}

/// Divides `count` probes into groups as even as can be, so that none is left with a few.
fn groups(count: usize, group_max: usize) -> Vec<Group> {
    let groups = count.div_ceil(group_max);
    let start = |i: usize| count * i / groups;
    (0..groups).map(|i| Group { first: start(i), count: start(i + 1) - start(i) }).collect()
}

/// At least `lines` lines. Never shrinks, and wipes before it grows, so that no copy of a row is
/// left in memory that was given back.
fn room(memory: &mut Vec<Line>, lines: usize) -> &mut [Line] {
    if memory.len() < lines {
        bytemuck::cast_slice_mut::<Line, f32>(memory).zeroize();
        memory.resize(lines, Line([0.0; 16]));
    }
    memory
}

/// One thread's memory for panels. Kept between requests.
#[derive(Default)]
pub(super) struct Panels(Vec<Line>);

impl Panels {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<Line>()
    }

    /// Overwrites the copies of rows.
    pub(super) fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<Line, f32>(&mut self.0).zeroize();
    }

    #[cfg(test)]
    pub(super) fn holds_rows(&self) -> bool {
        self.0.iter().any(|line| line.0.iter().any(|value| value.to_bits() != 0))
    }
}

/// The probes of one request, ready to be compared with rows. Shared by its threads.
pub(super) struct Exhaustive<'a> {
    kernels: &'static Kernels,
    dim: usize,
    /// Shape: `[count, dim]`.
    probes: &'a [f32],
    /// Whether tiles do the work, or dots.
    by_tiles: bool,
    groups: Vec<Group>,
    /// The groups packed for tiles, in their order; empty for dots.
    packed: &'a [Line],
    /// Slack of the tiles beyond that of the thresholds. Shape: `[count]`, zeros in f32.
    coarse: Vec<f32>,
    piece_rows: usize,
}

impl<'a> Exhaustive<'a> {
    /// Packs the probes into `packed` if tiles will read them.
    pub(super) fn new(kernels: &'static Kernels, dim: usize, probes: &'a [f32], packed: &'a mut Vec<Line>) -> Self {
        let count = probes.len() / dim;
        let by_tiles = count > kernels.dots_up_to;
        let mut coarse = vec![0.0; count];
        let (groups, piece_rows) = if by_tiles {
            let groups = groups(count, kernels.tile_probes());
            let packed = room(packed, kernels.packed_lines(count, dim));
            let mut moved = vec![0.0; count];
            for group in &groups {
                let end = group.first + group.count;
                kernels.pack_probes(
                    &probes[group.first * dim..end * dim],
                    dim,
                    &mut packed[kernels.packed_lines(group.first, dim)..],
                    &mut moved[group.first..end],
                );
            }
            if kernels.precision == Precision::Bf16 {
                coarse = moved.iter().map(|moved| coarse_slack(dim, *moved)).collect();
            }
            let panel_bytes = kernels.panel_lines(dim) * size_of::<Line>();
            let panels = (PANELS_BYTES / panel_bytes).clamp(1, PANELS_MAX);
            (groups, kernels.panel_rows * panels)
        } else {
            (groups(count, kernels.dots_probes()), PIECE_BYTES / (2 * dim))
        };
        Self { kernels, dim, probes, by_tiles, groups, packed, coarse, piece_rows }
    }

    /// Rows of a piece: the most that [`Exhaustive::compare`] takes.
    pub(super) fn piece_rows(&self) -> usize {
        self.piece_rows
    }

    /// Makes room for the panels of a piece.
    pub(super) fn begin(&self, panels: &mut Panels) {
        if self.by_tiles {
            room(&mut panels.0, self.piece_rows / self.kernels.panel_rows * self.kernels.panel_lines(self.dim));
        }
    }

    /// The f32 number of a row and a probe.
    #[inline]
    pub(super) fn product(&self, row: &[f16], probe: usize) -> f32 {
        self.kernels.dot.product(row, &self.probes[probe * self.dim..][..self.dim])
    }

    /// Compares at most a piece of rows with all probes, and hands (row, probe, number) of what reached
    /// the probe's threshold, if not some more, to `offer`.
    #[inline]
    pub(super) fn compare(
        &self,
        rows: &[f16],
        top_k: &[TopK],
        panels: &mut Panels,
        offer: impl FnMut(usize, usize, f32),
    ) {
        if self.by_tiles {
            self.tiles(rows, top_k, panels, offer);
        } else {
            self.dots(rows, top_k, offer);
        }
    }

    /// Compares rows as they are stored.
    fn dots(&self, rows: &[f16], top_k: &[TopK], mut offer: impl FnMut(usize, usize, f32)) {
        let dim = self.dim;
        let count = rows.len() / dim;
        let whole = count - count % DOTS_ROWS;
        let mut thresholds = [0.0; DOTS_PROBES_MAX];
        let mut numbers: DotsNumbers = [[0.0; DOTS_ROWS]; DOTS_PROBES_MAX];
        for group in &self.groups {
            let probes = &self.probes[group.first * dim..(group.first + group.count) * dim];
            let thresholds = &mut thresholds[..group.count];
            self.refresh(group.first, top_k, thresholds);
            for (i, four) in rows.chunks_exact(DOTS_ROWS * dim).enumerate() {
                let mut mask = self.kernels.dots(four, probes, dim, thresholds, &mut numbers);
                if mask == 0 {
                    continue;
                }
                while mask != 0 {
                    let bit = mask.trailing_zeros() as usize;
                    mask &= mask - 1;
                    let (probe, row) = (bit / DOTS_ROWS, bit % DOTS_ROWS);
                    offer(i * DOTS_ROWS + row, group.first + probe, numbers[probe][row]);
                }
                self.refresh(group.first, top_k, thresholds);
            }
            for (i, row) in rows[whole * dim..].chunks_exact(dim).enumerate() {
                for probe in group.first..group.first + group.count {
                    offer(whole + i, probe, self.product(row, probe));
                }
            }
        }
    }

    /// Compares rows by panels.
    fn tiles(&self, rows: &[f16], top_k: &[TopK], panels: &mut Panels, mut offer: impl FnMut(usize, usize, f32)) {
        let dim = self.dim;
        let count = rows.len() / dim;
        let panel_rows = self.kernels.panel_rows;
        let panel_lines = self.kernels.panel_lines(dim);
        for (rows, panel) in rows.chunks(panel_rows * dim).zip(panels.0.chunks_exact_mut(panel_lines)) {
            self.kernels.pack_rows(rows, dim, panel);
        }
        let mut hits = TileHits::EMPTY;
        let mut thresholds = [0.0; TILE_PROBES_MAX];
        for group in &self.groups {
            let thresholds = &mut thresholds[..group.count];
            self.refresh(group.first, top_k, thresholds);
            let probes = &self.packed[self.kernels.packed_lines(group.first, dim)..];
            let panels = panels.0.chunks_exact(panel_lines);
            for (i, panel) in panels.take(count.div_ceil(panel_rows)).enumerate() {
                if !self.kernels.tile(panel, probes, dim, thresholds, &mut hits) {
                    continue;
                }
                for p in 0..group.count {
                    let mut mask = hits.masks[p];
                    while mask != 0 {
                        let row = mask.trailing_zeros() as usize;
                        mask &= mask - 1;
                        let within = i * panel_rows + row;
                        // Stand-ins that fill up the last panel.
                        if within >= count {
                            break;
                        }
                        let probe = group.first + p;
                        let number = match self.kernels.precision {
                            Precision::F32 => hits.numbers[p][row],
                            Precision::Bf16 => self.product(&rows[within * dim..][..dim], probe),
                        };
                        offer(within, probe, number);
                    }
                }
                self.refresh(group.first, top_k, thresholds);
            }
        }
    }

    /// Reads the thresholds of the probes from `first` on, as they are now.
    fn refresh(&self, first: usize, top_k: &[TopK], thresholds: &mut [f32]) {
        for (p, threshold) in thresholds.iter_mut().enumerate() {
            let probe = first + p;
            *threshold = top_k[probe].threshold();
            if self.by_tiles && self.kernels.precision == Precision::Bf16 {
                *threshold = lowered(*threshold, self.coarse[probe]);
            }
        }
    }
}
