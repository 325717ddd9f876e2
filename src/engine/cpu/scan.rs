//! One request as a job that threads share: each takes pieces of the gallery from a counter until none are
//! left, and compares each piece with every probe.
//!
//! Rows that have codes are prefiltered by them ([`super::prefilter`]) or compared exhaustively
//! ([`super::exhaustive`]), whichever has turned out to be faster so far ([`super::tuner`]). Rows without
//! codes (the last few of a segment) are compared exhaustively.
//!
//! Knows top-k lists and live bits; does not know thread pools. Invariant: every row of the
//! view is in exactly one piece, so no list has a row twice.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use roaring::RoaringBitmap;

use super::exhaustive::kernels::Kernels;
use super::exhaustive::layout::Line;
use super::exhaustive::{Exhaustive, Panels};
use super::prefilter::kernels::CodeKernels;
use super::prefilter::{Level, Prefilter, PrefilterScratch, TILE_ROWS};
use super::tuner::{Strategy, Tuner};
use crate::engine::certificate::Certificate;
use crate::engine::dot::dot_slack;
use crate::engine::top_k::{TopK, TopKList};
use crate::engine::{CandidateRequest, CandidateRows, GalleryView, SegmentView, narrow_filter};

/// Pairs of rows and probes in a piece of coded rows, about: so many that taking the next piece costs
/// nothing. And rows: so few that every thread gets some and the indices of a piece stay in its cache.
const CODED_PAIRS: usize = 1 << 18;
const CODED_ROWS: RangeInclusive<usize> = 5 * TILE_ROWS..=10 * TILE_ROWS;
/// The most rows of a piece without indices: reading the clock costs as much as hundreds of rows. And the
/// fewest pieces of a gallery, for many threads.
const PLANES_ROWS: usize = 32 * TILE_ROWS;
const PLANES_PIECES: usize = 128;

/// How long the calling thread has been running. Unlike the time that has passed, this says what the work
/// costs when other threads want the processor too.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The working memory of one thread. Kept between requests.
#[derive(Default)]
pub(super) struct ThreadScratch {
    panels: Panels,
    lists: Vec<TopKList>,
    prefilter: PrefilterScratch,
    /// Levels whose tables are known to be made, in the request under way.
    prepared: Vec<Level>,
}

impl ThreadScratch {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.panels.bytes()
            + self.lists.capacity() * size_of::<TopKList>()
            + self.lists.iter().map(TopKList::bytes).sum::<usize>()
            + self.prefilter.bytes()
    }

    /// Overwrites the copies of rows.
    pub(super) fn wipe(&mut self) {
        self.panels.wipe();
        self.prefilter.wipe();
    }

    /// Whether anything but zeros is left of the rows last read.
    #[cfg(test)]
    pub(super) fn holds_rows(&self) -> bool {
        self.panels.holds_rows() || self.prefilter.holds_rows()
    }
}

/// One request, as all its threads see it.
pub(super) struct Scan<'a> {
    view: &'a GalleryView<'a>,
    top_k: Vec<TopK>,
    exhaustive: Exhaustive<'a>,
    prefilter: Prefilter<'a>,
    tuner: Tuner<'a>,
    filters: &'a [Option<&'a RoaringBitmap>],
    /// Rows of a piece that has codes: a whole number of tiles.
    coded_rows: usize,
    /// Pieces before the coded and before the other rows of each segment of the view, alternately,
    /// and in all at the end.
    pieces: Vec<usize>,
    next_piece: AtomicUsize,
}

impl<'a> Scan<'a> {
    /// Prepares a scan: packs the probes into `packed` if tiles will read them.
    pub(super) fn new(
        (kernels, code_kernels): (&'static Kernels, &'static CodeKernels),
        view: &'a GalleryView<'a>,
        request: &CandidateRequest<'a>,
        packed: &'a mut Vec<Line>,
        exhaustive_time: &'a AtomicU64,
    ) -> Self {
        let dim = view.dim;
        let count = request.floors.len();
        assert!(dim.is_multiple_of(crate::model::DIM_STEP) && dim > 0, "dimension {dim}");
        assert_eq!(request.probes.len(), count * dim, "a floor for every probe");
        assert_eq!(request.keep.len(), count, "a number to keep for every probe");

        let slack = dot_slack(dim);
        let exhaustive = Exhaustive::new(kernels, dim, request.probes, packed);
        let coded_rows = if code_kernels.scans_planes(count) {
            let rows = view.segments.iter().map(|segment| segment.coded(dim)).sum::<usize>();
            (rows / PLANES_PIECES).clamp(*CODED_ROWS.end(), PLANES_ROWS)
        } else {
            (CODED_PAIRS / count.max(1)).clamp(*CODED_ROWS.start(), *CODED_ROWS.end())
        };
        let coded_rows = coded_rows.next_multiple_of(TILE_ROWS);
        let mut pieces = vec![0];
        for segment in &view.segments {
            let coded = segment.coded(dim);
            let before = pieces[pieces.len() - 1] + coded.div_ceil(coded_rows);
            pieces.extend([before, before + (segment.count(dim) - coded).div_ceil(exhaustive.piece_rows())]);
        }
        let seeds = (0..count).map(|probe| request.seed(probe));
        Self {
            view,
            top_k: (0..count).map(|probe| TopK::new(request, probe, slack)).collect(),
            exhaustive,
            prefilter: Prefilter::new(code_kernels, dim, request.probes, seeds, request.certificate),
            tuner: Tuner::new(request.certificate, dim, exhaustive_time),
            filters: request.filters,
            coded_rows,
            pieces,
            next_piece: AtomicUsize::new(0),
        }
    }

    /// The same, by codes of only this level if there is one.
    #[cfg(test)]
    pub(super) fn by(mut self, only: Option<Level>) -> Self {
        self.tuner.only = only;
        self
    }

    /// Moves what all threads found to `candidates`, once all are done.
    pub(super) fn file(&self, threads: &mut [Mutex<ThreadScratch>], candidates: &mut CandidateRows) {
        for (probe, top_k) in self.top_k.iter().enumerate() {
            // A thread that took no part has no list.
            let lists = threads.iter_mut().filter_map(|scratch| scratch.get_mut().lists.get_mut(probe));
            top_k.file(lists, probe, candidates);
        }
        candidates.certificate =
            if self.tuner.used_codes() { self.prefilter.certificate() } else { Certificate::Deterministic };
    }

    /// Works on pieces until none are left. With `yields`, other requests have the thread after every piece.
    pub(super) fn work(&self, scratch: &mut ThreadScratch, yields: bool) {
        scratch.prepared.clear();
        if self.view.segments.iter().any(|segment| segment.coded(self.view.dim) > 0) {
            scratch.prefilter.begin(&self.prefilter, self.coded_rows);
        }
        scratch.lists.resize_with(self.top_k.len().max(scratch.lists.len()), TopKList::default);
        self.exhaustive.begin(&mut scratch.panels);
        let total = self.pieces[self.pieces.len() - 1];
        loop {
            let piece = self.next_piece.fetch_add(1, Ordering::Relaxed);
            if piece >= total {
                return;
            }
            let at = self.pieces.partition_point(|before| *before <= piece) - 1;
            let segment = &self.view.segments[at / 2];
            let coded = segment.coded(self.view.dim);
            let piece = piece - self.pieces[at];
            if at.is_multiple_of(2) {
                let first = piece * self.coded_rows;
                self.coded(segment, first, self.coded_rows.min(coded - first), scratch);
            } else {
                let first = coded + piece * self.exhaustive.piece_rows();
                self.compare_all(segment, first, segment.count(self.view.dim), scratch);
            }
            if yields {
                // This thread does what other requests have for it here and now. They have scratch of their own.
                rayon::yield_now();
            }
        }
    }

    /// Works on coded rows by the strategy that is the fastest so far.
    fn coded(&self, segment: &SegmentView<'_>, first: usize, count: usize, scratch: &mut ThreadScratch) {
        let pairs = count * self.top_k.len();
        let strategy = self.tuner.choose(&self.top_k);
        // Not timed with the piece: it is done once, not for every piece.
        if let Strategy::Codes(level) = strategy
            && !scratch.prepared.contains(&level)
        {
            self.prefilter.prepare(level, self.next_piece.load(Ordering::Relaxed) * 37);
            scratch.prepared.push(level);
        }
        let begun = thread_time();
        let mut passed = 0;
        match strategy {
            Strategy::Exhaustive => {
                for at in (first..first + count).step_by(self.exhaustive.piece_rows()) {
                    self.compare_all(segment, at, first + count, scratch);
                }
            }
            Strategy::Codes(level) => {
                let ThreadScratch { lists, prefilter, .. } = scratch;
                passed =
                    self.prefilter.piece(level, segment, (first, count), &self.top_k, prefilter, |probe, offset| {
                        self.compare(segment, offset, probe, lists);
                    });
            }
        }
        self.tuner.took(strategy, thread_time().saturating_sub(begun), pairs, passed);
    }

    /// Compares one row with one probe in f32.
    fn compare(&self, segment: &SegmentView<'_>, offset: usize, probe: usize, lists: &mut [TopKList]) {
        let number = self.exhaustive.product(segment.row(offset, self.view.dim), probe);
        self.offer(segment, offset, probe, number, lists);
    }

    /// Compares a probe with the rows that its filter allows, one by one: for narrow filters.
    pub(super) fn follow_filter(&self, probe: usize, filter: &RoaringBitmap, scratch: &mut ThreadScratch) {
        scratch.prefilter.begin(&self.prefilter, 0);
        scratch.lists.resize_with(self.top_k.len().max(scratch.lists.len()), TopKList::default);
        for segment in &self.view.segments {
            let (coded, count) = (segment.coded(self.view.dim), segment.count(self.view.dim));
            let ThreadScratch { lists, prefilter, .. } = &mut *scratch;
            let allowed = |offsets| narrow_filter::allowed(segment, filter, offsets);
            let top_k = &self.top_k[probe];
            self.prefilter.refine_rows(probe, &segment.codes, allowed(0..coded), top_k, prefilter, |offset| {
                self.compare(segment, offset, probe, lists);
            });
            allowed(coded..count).for_each(|offset| self.compare(segment, offset, probe, lists));
        }
    }

    /// Compares the rows of a segment from `first` on, before `end` and at most a piece, with all probes.
    fn compare_all(&self, segment: &SegmentView<'_>, first: usize, end: usize, scratch: &mut ThreadScratch) {
        let ThreadScratch { panels, lists, .. } = scratch;
        let count = self.exhaustive.piece_rows().min(end - first);
        let rows = &segment.rows[first * self.view.dim..(first + count) * self.view.dim];
        self.exhaustive.compare(rows, &self.top_k, panels, |row, probe, number| {
            self.offer(segment, first + row, probe, number, lists);
        });
    }

    /// Lists a row whose number reaches the probe's threshold of now, if the row is live and allowed.
    fn offer(&self, segment: &SegmentView<'_>, offset: usize, probe: usize, number: f32, lists: &mut [TopKList]) {
        let top_k = &self.top_k[probe];
        if number >= top_k.threshold() && segment.is_live(offset) {
            let row = segment.number(offset);
            if self.filters.get(probe).copied().flatten().is_some_and(|filter| !filter.contains(row)) {
                return;
            }
            lists[probe].offer(top_k, number, row);
        }
    }
}
