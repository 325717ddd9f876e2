//! The gallery as engines see it: rows by segment, and which of them are live.
//!
//! Knows rows, live bits and codes. Does not know subjects or files. Invariant: a view shows one
//! moment; which rows are live in it never changes.

use half::f16;
use thenar_index::Snapshot;
use thenar_index::codes::Codes;

/// The gallery at one moment: its segments, and which of their rows are live.
pub struct GalleryView<'a> {
    /// Components of a row.
    pub dim: usize,
    /// The segments. Row numbers do not overlap; there are gaps between them, and they need not ascend from
    /// one segment to the next. Only the last segment may still get more rows.
    pub segments: Vec<SegmentView<'a>>,
}

impl<'a> GalleryView<'a> {
    /// What engines see of a snapshot.
    #[must_use]
    pub fn of(snapshot: &'a Snapshot) -> Self {
        let segments = snapshot.segments().map(|segment| SegmentView {
            identity: segment.identity,
            first_row: segment.first_row,
            rows: segment.rows,
            live: segment.live,
            codes: segment.codes,
        });
        Self { dim: snapshot.dim(), segments: segments.collect() }
    }

    /// Rows of all segments, live or not.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.count(self.dim)).sum()
    }
}

/// Consecutive rows: those of one segment.
#[derive(Clone, Copy)]
pub struct SegmentView<'a> {
    /// Names the contents: a segment with the same `first_row` but another `identity` holds other
    /// rows, and an engine with a copy must copy it again. Under one identity rows are only appended.
    pub identity: u64,
    /// Number of the first row.
    pub first_row: u32,
    /// The rows, row-major. Shape: `[count, dim]`.
    pub rows: &'a [f16],
    /// Bit `i % 64` of word `i / 64` is set if row `first_row + i` is live. At least `count` bits.
    pub live: &'a [u64],
    /// Codes of the first rows, as many as have them; an engine compares the other rows directly.
    pub codes: Codes<'a>,
}

impl<'a> SegmentView<'a> {
    /// Rows in the segment.
    #[must_use]
    pub fn count(&self, dim: usize) -> usize {
        self.rows.len() / dim
    }

    /// How many rows have codes: they are the first ones.
    #[must_use]
    pub fn coded(&self, dim: usize) -> usize {
        self.codes.rows().min(self.count(dim))
    }

    /// Whether the row at `offset` is live in this view.
    #[must_use]
    pub fn is_live(&self, offset: usize) -> bool {
        self.live[offset / 64] >> (offset % 64) & 1 == 1
    }

    /// The row at `offset`. Shape: `[dim]`.
    #[must_use]
    pub fn row(&self, offset: usize, dim: usize) -> &'a [f16] {
        &self.rows[offset * dim..][..dim]
    }

    /// The number of the row at `offset`.
    #[must_use]
    pub fn number(&self, offset: usize) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "rows are numbered in u32")]
        let offset = offset as u32;
        self.first_row + offset
    }
}
