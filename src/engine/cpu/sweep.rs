//! One sift, divided: threads take pieces of the gallery from a counter until none are left, and
//! compare each piece with every probe of the request.
//!
//! Rows that have codes are sieved by them ([`super::sieve`]), by the way that has turned out to be
//! the fastest so far; an exhaustive comparison is one of the ways. Rows without codes (the last
//! few of a segment) are compared exhaustively.
//!
//! Knows kernels, floors and live bits; does not know thread pools. Invariant: every row of the
//! view is in exactly one piece, so no list has a row twice.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use roaring::RoaringBitmap;
use zeroize::Zeroize;

use super::kernels::{DOTS_PROBES_MAX, DOTS_ROWS, DotsNumbers, Kernels, Line, Precision, TILE_PROBES_MAX, TileHits};
use super::pace::{Pace, Way};
use super::sieve::kernels::CodeKernels;
use super::sieve::{Level, Sieve, SieveBench, TILE_ROWS};
use super::slack::coarse_slack;
use crate::engine::certificate::Certificate;
use crate::engine::dot::dot_slack;
use crate::engine::top_k::{TopK, TopKList, lowered};
use crate::engine::{CandidateRequest, CandidateRows, GalleryView, SegmentView, narrow_filter};

/// Bytes of stored rows in a piece that dots read: they stay in a core's own cache while the
/// groups of probes sweep over them.
const PIECE_BYTES: usize = 256 << 10;
/// Bytes of panels made before the probes sweep over them: they stay in a core's own cache.
const PANELS_BYTES: usize = 256 << 10;
/// Panels at most, so that small dimensions still make many pieces.
const PANELS_MAX: usize = 8;

/// Pairs of rows and probes in a piece of coded rows, about, so that looking for the next piece is
/// no cost; and rows, so that every thread gets some and the indices of a piece stay in its cache.
const CODED_PAIRS: usize = 1 << 18;
const CODED_ROWS: RangeInclusive<usize> = 5 * TILE_ROWS..=10 * TILE_ROWS;
/// Rows of a piece without indices, at most: taking the time costs as much as looking at hundreds of
/// rows. And pieces of a gallery at least, for many threads.
const PLANES_ROWS: usize = 32 * TILE_ROWS;
const PLANES_PIECES: usize = 128;

/// Consecutive probes that one call of a kernel compares.
struct Group {
    /// Number of the first probe.
    first: usize,
    count: usize,
}

/// Whether a sift keeps its threads until it is done, or lets others have them after every piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    First,
    Yielding,
}

/// Time the calling thread has been running: unlike the time that has passed, it says what the work
/// costs where other threads want the processor too.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
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
    lists: Vec<TopKList>,
    sieve: SieveBench,
    /// Levels whose tables are known to be there, in the sift under way.
    prepared: Vec<Level>,
}

impl Bench {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.panels.capacity() * size_of::<Line>()
            + self.lists.capacity() * size_of::<TopKList>()
            + self.lists.iter().map(TopKList::bytes).sum::<usize>()
            + self.sieve.bytes()
    }

    /// Overwrites the copies of rows.
    pub(super) fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<Line, f32>(&mut self.panels).zeroize();
        self.sieve.wipe();
    }

    /// Whether anything but zeros is left of the rows last read.
    #[cfg(test)]
    pub(super) fn holds_rows(&self) -> bool {
        self.panels.iter().any(|line| line.0.iter().any(|value| value.to_bits() != 0)) || self.sieve.holds_rows()
    }
}

/// One sift, as all its threads see it.
pub(super) struct Sweep<'a> {
    kernels: &'static Kernels,
    view: &'a GalleryView<'a>,
    probes: &'a [f32],
    top_k: Vec<TopK>,
    /// Whether tiles do the work, or dots.
    by_tiles: bool,
    groups: Vec<Group>,
    /// The groups packed for tiles, in their order; empty for dots.
    packed: &'a [Line],
    /// Slack of the tiles beyond that of the floors. Shape: `[probes]`, zeros in f32.
    coarse: Vec<f32>,
    /// Rows of a piece that is compared exhaustively.
    piece_rows: usize,
    /// Rows of a piece that has codes: a whole number of tiles.
    coded_rows: usize,
    /// Pieces before the coded and before the other rows of each block of the view, alternately,
    /// and in all at the end.
    pieces: Vec<usize>,
    next_piece: AtomicUsize,
    filters: &'a [Option<&'a RoaringBitmap>],
    sieve: Sieve<'a>,
    pace: Pace<'a>,
}

impl<'a> Sweep<'a> {
    /// Prepares a sift: packs the probes into `packed` where tiles will read them.
    pub(super) fn new(
        (kernels, code_kernels): (&'static Kernels, &'static CodeKernels),
        view: &'a GalleryView<'a>,
        request: &CandidateRequest<'a>,
        packed: &'a mut Vec<Line>,
        exhaustive_pace: &'a AtomicU64,
    ) -> Self {
        let dim = view.dim;
        let count = request.floors.len();
        assert!(dim.is_multiple_of(crate::model::DIM_STEP) && dim > 0, "dimension {dim}");
        assert_eq!(request.probes.len(), count * dim, "a floor for every probe");
        assert_eq!(request.keep.len(), count, "a number to keep for every probe");

        let slack = dot_slack(dim);
        let top_k = (0..count).map(|probe| TopK::new(request, probe, slack)).collect();

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

        let coded_rows = if code_kernels.scans_planes(count) {
            let rows = view.segments.iter().map(|block| block.coded(dim)).sum::<usize>();
            (rows / PLANES_PIECES).clamp(*CODED_ROWS.end(), PLANES_ROWS)
        } else {
            (CODED_PAIRS / count.max(1)).clamp(*CODED_ROWS.start(), *CODED_ROWS.end())
        };
        let coded_rows = coded_rows.next_multiple_of(TILE_ROWS);
        let mut pieces = vec![0];
        for block in &view.segments {
            let coded = block.coded(dim);
            let before = pieces[pieces.len() - 1] + coded.div_ceil(coded_rows);
            pieces.extend([before, before + (block.count(dim) - coded).div_ceil(piece_rows)]);
        }
        Self {
            kernels,
            view,
            probes: request.probes,
            top_k,
            by_tiles,
            groups,
            packed,
            coarse,
            piece_rows,
            coded_rows,
            pieces,
            next_piece: AtomicUsize::new(0),
            filters: request.filters,
            sieve: Sieve::new(
                code_kernels,
                dim,
                request.probes,
                (0..count).map(|probe| request.seed(probe)),
                request.certificate,
            ),
            pace: Pace::new(request.certificate, dim, exhaustive_pace),
        }
    }

    /// The same, by codes of one level alone if there is one.
    #[cfg(test)]
    pub(super) fn by(mut self, only: Option<Level>) -> Self {
        self.pace.only = only;
        self
    }

    /// Moves what all threads found to `candidates`, once all are done.
    pub(super) fn file(&self, benches: &mut [Mutex<Bench>], candidates: &mut CandidateRows) {
        for (probe, top_k) in self.top_k.iter().enumerate() {
            // A bench that took no part has no list.
            let lists = benches.iter_mut().filter_map(|bench| bench.get_mut().lists.get_mut(probe));
            top_k.file(lists, probe, candidates);
        }
        candidates.certificate =
            if self.pace.was_sieved() { self.sieve.certificate() } else { Certificate::Deterministic };
    }

    fn probe(&self, probe: usize) -> &'a [f32] {
        &self.probes[probe * self.view.dim..][..self.view.dim]
    }

    /// Works on pieces until none are left.
    pub(super) fn work(&self, bench: &mut Bench, turn: Turn) {
        bench.prepared.clear();
        if self.view.segments.iter().any(|block| block.coded(self.view.dim) > 0) {
            bench.sieve.begin(&self.sieve, self.coded_rows);
        }
        bench.lists.resize_with(self.top_k.len().max(bench.lists.len()), TopKList::default);
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
            let block = &self.view.segments[at / 2];
            let coded = block.coded(self.view.dim);
            let piece = piece - self.pieces[at];
            if at.is_multiple_of(2) {
                let first = piece * self.coded_rows;
                self.coded(block, first, self.coded_rows.min(coded - first), bench);
            } else {
                let first = coded + piece * self.piece_rows;
                let count = self.piece_rows.min(block.count(self.view.dim) - first);
                self.exhaustive(block, first, count, bench);
            }
            if turn == Turn::Yielding {
                // What other sifts have for this thread is done here and now. Their benches are their own.
                rayon::yield_now();
            }
        }
    }

    /// Works on coded rows by the way that is the fastest so far.
    fn coded(&self, block: &SegmentView<'_>, first: usize, count: usize, bench: &mut Bench) {
        let pairs = count * self.top_k.len();
        let way = self.pace.choose(&self.top_k);
        // Outside of what is timed: it is done once, not for every piece.
        if let Way::Codes(level) = way
            && !bench.prepared.contains(&level)
        {
            self.sieve.prepare(level, self.next_piece.load(Ordering::Relaxed) * 37);
            bench.prepared.push(level);
        }
        let begun = thread_time();
        let mut passed = 0;
        match way {
            Way::Exhaustive => {
                for at in (first..first + count).step_by(self.piece_rows) {
                    self.exhaustive(block, at, self.piece_rows.min(first + count - at), bench);
                }
            }
            Way::Codes(level) => {
                let Bench { lists, sieve, .. } = bench;
                passed = self.sieve.piece(level, block, (first, count), &self.top_k, sieve, |probe, offset| {
                    self.compare(block, offset, probe, lists);
                });
            }
        }
        self.pace.took(way, thread_time().saturating_sub(begun), pairs, passed);
    }

    /// Compares one row with one probe in f32.
    fn compare(&self, block: &SegmentView<'_>, offset: usize, probe: usize, lists: &mut [TopKList]) {
        let number = self.kernels.dot.product(block.row(offset, self.view.dim), self.probe(probe));
        self.offer(block, offset, probe, number, lists);
    }

    /// Compares the rows that `filter` lets through with one probe, one by one: for filters that
    /// let few through.
    pub(super) fn filtered(&self, probe: usize, filter: &RoaringBitmap, bench: &mut Bench) {
        bench.sieve.begin(&self.sieve, 0);
        bench.lists.resize_with(self.top_k.len().max(bench.lists.len()), TopKList::default);
        for block in &self.view.segments {
            let (coded, count) = (block.coded(self.view.dim), block.count(self.view.dim));
            let Bench { lists, sieve, .. } = &mut *bench;
            let allowed = |offsets| narrow_filter::allowed(block, filter, offsets);
            let top_k = &self.top_k[probe];
            self.sieve.look_closer(probe, &block.codes, allowed(0..coded), top_k, sieve, |offset| {
                self.compare(block, offset, probe, lists);
            });
            allowed(coded..count).for_each(|offset| self.compare(block, offset, probe, lists));
        }
    }

    /// Compares rows `first..first + count` of a block, at most `piece_rows`, exhaustively.
    fn exhaustive(&self, block: &SegmentView<'_>, first: usize, count: usize, bench: &mut Bench) {
        if self.by_tiles {
            self.tiles(block, first, count, bench);
        } else {
            self.dots(block, first, count, &mut bench.lists);
        }
    }

    /// Compares rows `first..first + count` of a block as they are stored.
    fn dots(&self, block: &SegmentView<'_>, first: usize, count: usize, lists: &mut [TopKList]) {
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
                    let number = self.kernels.dot.product(row, probe);
                    self.offer(block, first + whole + i, group.first + p, number, lists);
                }
            }
        }
    }

    /// Compares rows `first..first + count` of a block by panels.
    fn tiles(&self, block: &SegmentView<'_>, first: usize, count: usize, bench: &mut Bench) {
        let Bench { panels, lists, .. } = bench;
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
                            Precision::Bf16 => {
                                self.kernels.dot.product(block.row(first + within, dim), self.probe(probe))
                            }
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
            *threshold = self.top_k[probe].threshold();
            if self.by_tiles && self.kernels.precision == Precision::Bf16 {
                *threshold = lowered(*threshold, self.coarse[probe]);
            }
        }
    }

    /// Lists a row whose number reaches the probe's threshold of now, if the row is live.
    fn offer(&self, block: &SegmentView<'_>, offset: usize, probe: usize, number: f32, lists: &mut [TopKList]) {
        let top_k = &self.top_k[probe];
        if number >= top_k.threshold() && block.is_live(offset) {
            let row = block.number(offset);
            if self.filters.get(probe).copied().flatten().is_some_and(|filter| !filter.contains(row)) {
                return;
            }
            lists[probe].offer(top_k, number, row);
        }
    }
}
