//! Rows compared with probes on the host: their numbers, which are scores in f32.
//!
//! Knows views, filters and rows. Does not know slots, codes or floors.

use rayon::prelude::*;
use roaring::RoaringBitmap;

use crate::engine::dot::Dot;
use crate::engine::narrow_filter::allowed;
use crate::engine::{CandidateRequest, GalleryView, SegmentView};

/// Rows from which those of a narrow filter are divided between threads.
const PARALLEL_ROWS_MIN: usize = 1024;

/// A row and its number, which is within [`crate::engine::dot::dot_slack`] of the exact score.
pub(crate) type Numbered = (f32, u32);

/// Compares the rows of a view with the probes of a request.
#[derive(Clone, Copy)]
pub(super) struct Comparison<'a> {
    pub(super) view: &'a GalleryView<'a>,
    pub(super) request: &'a CandidateRequest<'a>,
    pub(super) dot: Dot,
}

impl Comparison<'_> {
    /// The row at a place of a segment, if the probe's filter allows it.
    pub(super) fn row(&self, segment: &SegmentView<'_>, offset: usize, probe: usize) -> Option<Numbered> {
        let (row, dim) = (segment.number(offset), self.view.dim);
        let is_allowed = self.request.filter(probe).is_none_or(|filter| filter.contains(row));
        is_allowed.then(|| (self.dot.product(segment.row(offset, dim), self.request.probe(probe, dim)), row))
    }

    /// The rows that have no codes, for one probe.
    pub(super) fn without_codes(&self, probe: usize) -> Vec<Numbered> {
        let mut found = Vec::new();
        for segment in &self.view.segments {
            let offsets = segment.coded(self.view.dim)..segment.count(self.view.dim);
            let live = offsets.filter(|&offset| segment.is_live(offset));
            found.extend(live.filter_map(|offset| self.row(segment, offset, probe)));
        }
        found
    }

    /// The rows that a probe's narrow filter allows.
    pub(super) fn filtered(&self, probe: usize, filter: &RoaringBitmap) -> Vec<Numbered> {
        let mut places: Vec<(&SegmentView<'_>, usize)> = Vec::new();
        for segment in &self.view.segments {
            let all = 0..segment.count(self.view.dim);
            places.extend(allowed(segment, filter, all).map(|offset| (segment, offset)));
        }
        let compare = |&(segment, offset): &(&SegmentView<'_>, usize)| self.row(segment, offset, probe);
        places.par_iter().with_min_len(PARALLEL_ROWS_MIN).filter_map(compare).collect()
    }
}
