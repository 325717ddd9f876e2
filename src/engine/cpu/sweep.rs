//! One sift, divided: threads take pieces of the gallery from a counter until none are left, and
//! compare each piece with every probe of the request.
//!
//! Knows kernels, floors and live bits; does not know thread pools. Invariant: every row of the
//! view is in exactly one piece, so no list has a row twice.

use std::sync::atomic::{AtomicUsize, Ordering};

use zeroize::Zeroize;

use super::floors::{Floor, Shortlist};
use super::kernels::{DOTS_PROBES_MAX, DOTS_ROWS, DotsNumbers, Kernels, Line, Precision, TILE_PROBES_MAX, TileHits};
use super::slack::{coarse_slack, lowered, sift_slack};
use crate::engine::{BlockView, GalleryView, SiftRequest};

/// Bytes of stored rows in a piece that dots read: they stay in a core's own cache while the
/// groups of probes sweep over them.
const PIECE_BYTES: usize = 256 << 10;
/// Bytes of panels made before the probes sweep over them: they stay in a core's own cache.
const PANELS_BYTES: usize = 256 << 10;
/// Panels at most, so that small dimensions still make many pieces.
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

/// What one thread works in. Kept between sifts.
#[derive(Default)]
pub(super) struct Bench {
    panels: Vec<Line>,
    lists: Vec<Shortlist>,
}

impl Bench {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.panels.capacity() * size_of::<Line>()
            + self.lists.capacity() * size_of::<Shortlist>()
            + self.lists.iter().map(Shortlist::bytes).sum::<usize>()
    }

    /// Overwrites the copies of rows.
    pub(super) fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<Line, f32>(&mut self.panels).zeroize();
    }

    /// Whether anything but zeros is left of the rows last read.
    #[cfg(test)]
    pub(super) fn holds_rows(&self) -> bool {
        self.panels.iter().any(|line| line.0.iter().any(|value| value.to_bits() != 0))
    }

    /// The list of `probe`, if this bench took part in the sift.
    pub(super) fn list(&mut self, probe: usize) -> Option<&mut Shortlist> {
        self.lists.get_mut(probe)
    }
}

/// One sift, as all its threads see it.
pub(super) struct Sweep<'a> {
    kernels: &'static Kernels,
    view: &'a GalleryView<'a>,
    probes: &'a [f32],
    pub(super) floors: Vec<Floor>,
    /// Whether tiles do the work, or dots.
    by_tiles: bool,
    groups: Vec<Group>,
    /// The groups packed for tiles, in their order; empty for dots.
    packed: &'a [Line],
    /// Slack of the tiles beyond that of the floors. Shape: `[probes]`, zeros in f32.
    coarse: Vec<f32>,
    piece_rows: usize,
    /// Pieces before each block of the view, and in all at the end.
    pieces: Vec<usize>,
    next_piece: AtomicUsize,
}

impl<'a> Sweep<'a> {
    /// Prepares a sift: packs the probes into `packed` where tiles will read them.
    pub(super) fn new(
        kernels: &'static Kernels,
        view: &'a GalleryView<'a>,
        request: &SiftRequest<'a>,
        packed: &'a mut Vec<Line>,
    ) -> Self {
        let dim = view.dim;
        let count = request.floors.len();
        assert!(dim.is_multiple_of(crate::palm::DIM_STEP) && dim > 0, "dimension {dim}");
        assert_eq!(request.probes.len(), count * dim, "a floor for every probe");
        assert_eq!(request.keep.len(), count, "a number to keep for every probe");

        let slack = sift_slack(dim);
        let floors = request
            .floors
            .iter()
            .zip(request.keep)
            .map(|(floor, keep)| Floor::new(*floor, *keep, request.survivors_max, slack))
            .collect();

        let by_tiles = count > kernels.dots_up_to;
        let mut coarse = vec![0.0; count];
        let (groups, piece_rows) = if by_tiles {
            let groups = groups(count, kernels.tile_probes());
            let packed = room(packed, kernels.packed_lines(count, dim));
            let mut moved = vec![0.0; count];
            for group in &groups {
                let end = group.first + group.count;
                kernels.pack_probes(
                    &request.probes[group.first * dim..end * dim],
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
            let groups = groups(count, kernels.dots_probes());
            (groups, PIECE_BYTES / (2 * dim))
        };

        let mut pieces = vec![0];
        for block in &view.blocks {
            let before = pieces[pieces.len() - 1];
            pieces.push(before + block.count(dim).div_ceil(piece_rows));
        }
        Self {
            kernels,
            view,
            probes: request.probes,
            floors,
            by_tiles,
            groups,
            packed,
            coarse,
            piece_rows,
            pieces,
            next_piece: AtomicUsize::new(0),
        }
    }

    /// Works on pieces until none are left.
    pub(super) fn work(&self, bench: &mut Bench) {
        bench.lists.resize_with(self.floors.len().max(bench.lists.len()), Shortlist::default);
        if self.by_tiles {
            let lines = self.piece_rows / self.kernels.panel_rows * self.kernels.panel_lines(self.view.dim);
            room(&mut bench.panels, lines);
        }
        let total = self.pieces[self.pieces.len() - 1];
        loop {
            let piece = self.next_piece.fetch_add(1, Ordering::Relaxed);
            if piece >= total {
                return;
            }
            let at = self.pieces.partition_point(|before| *before <= piece) - 1;
            let block = &self.view.blocks[at];
            let first = (piece - self.pieces[at]) * self.piece_rows;
            let count = self.piece_rows.min(block.count(self.view.dim) - first);
            if self.by_tiles {
                self.tiles(block, first, count, bench);
            } else {
                self.dots(block, first, count, &mut bench.lists);
            }
        }
    }

    /// Compares rows `first..first + count` of a block as they are stored.
    fn dots(&self, block: &BlockView<'_>, first: usize, count: usize, lists: &mut [Shortlist]) {
        let dim = self.view.dim;
        let rows = &block.rows[first * dim..(first + count) * dim];
        let whole = count - count % DOTS_ROWS;
        let mut thresholds = [0.0; DOTS_PROBES_MAX];
        let mut numbers: DotsNumbers = [[0.0; DOTS_ROWS]; DOTS_PROBES_MAX];
        for group in &self.groups {
            let probes = &self.probes[group.first * dim..(group.first + group.count) * dim];
            let thresholds = &mut thresholds[..group.count];
            self.refresh(group.first, thresholds);
            for (i, four) in rows.chunks_exact(DOTS_ROWS * dim).enumerate() {
                let mut mask = self.kernels.dots(four, probes, dim, thresholds, &mut numbers);
                if mask == 0 {
                    continue;
                }
                while mask != 0 {
                    let bit = mask.trailing_zeros() as usize;
                    mask &= mask - 1;
                    let (probe, row) = (bit / DOTS_ROWS, bit % DOTS_ROWS);
                    let offset = first + i * DOTS_ROWS + row;
                    let number = numbers[probe][row];
                    self.offer(block, offset, group.first + probe, number, lists);
                }
                self.refresh(group.first, thresholds);
            }
            for (i, row) in rows[whole * dim..].chunks_exact(dim).enumerate() {
                for (p, probe) in probes.chunks_exact(dim).enumerate() {
                    let number = self.kernels.dot(row, probe);
                    self.offer(block, first + whole + i, group.first + p, number, lists);
                }
            }
        }
    }

    /// Compares rows `first..first + count` of a block by panels.
    fn tiles(&self, block: &BlockView<'_>, first: usize, count: usize, bench: &mut Bench) {
        let Bench { panels, lists } = bench;
        let dim = self.view.dim;
        let panel_rows = self.kernels.panel_rows;
        let panel_lines = self.kernels.panel_lines(dim);
        let rows = &block.rows[first * dim..(first + count) * dim];
        for (rows, panel) in rows.chunks(panel_rows * dim).zip(panels.chunks_exact_mut(panel_lines)) {
            self.kernels.pack_rows(rows, dim, panel);
        }
        let mut hits = TileHits::EMPTY;
        let mut thresholds = [0.0; TILE_PROBES_MAX];
        for group in &self.groups {
            let thresholds = &mut thresholds[..group.count];
            self.refresh(group.first, thresholds);
            let probes = &self.packed[self.kernels.packed_lines(group.first, dim)..];
            let panels = panels.chunks_exact(panel_lines);
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
                            Precision::Bf16 => self.kernels.dot(
                                &rows[within * dim..(within + 1) * dim],
                                &self.probes[probe * dim..(probe + 1) * dim],
                            ),
                        };
                        self.offer(block, first + within, probe, number, lists);
                    }
                }
                self.refresh(group.first, thresholds);
            }
        }
    }

    /// Reads the thresholds of the probes from `first` on, as they are now.
    fn refresh(&self, first: usize, thresholds: &mut [f32]) {
        for (p, threshold) in thresholds.iter_mut().enumerate() {
            let probe = first + p;
            *threshold = self.floors[probe].threshold();
            if self.by_tiles && self.kernels.precision == Precision::Bf16 {
                *threshold = lowered(*threshold, self.coarse[probe]);
            }
        }
    }

    /// Lists a row whose number reaches the probe's threshold of now, if the row is live.
    fn offer(&self, block: &BlockView<'_>, offset: usize, probe: usize, number: f32, lists: &mut [Shortlist]) {
        let floor = &self.floors[probe];
        if number >= floor.threshold() && block.is_live(offset) {
            #[expect(clippy::cast_possible_truncation, reason = "row numbers are u32")]
            let row = block.first_row + offset as u32;
            lists[probe].offer(floor, number, row);
        }
    }
}
