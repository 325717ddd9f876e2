//! What readers see: snapshots of the published rows.
//!
//! A snapshot is the gallery at one moment: which rows there are, and which of them are live. A row that
//! is forgotten later stays live in it. A snapshot holds a ticket of the barrier: while it lives, no row
//! that is live in it is erased, and no byte of its rows changes.
//!
//! Does not know how rows are written.
//!
//! Invariants: all rows of a [`SegmentView`] are shown; snapshots are held for the duration of one search.

use std::fmt;
use std::sync::Arc;

use half::f16;

use super::{PublishedSegment, Shared, View};
use crate::codes::Codes;
use crate::error::Error;
use crate::reader_barrier::{Ticket, WriteToken};
use crate::storage::{Lock, Segment};
use crate::types::{Lsn, Row, RowMeta, SubjectNumber};

/// Hands out snapshots to search threads. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    pub(crate) shared: Arc<Shared>,
}

impl Reader {
    /// The last publication. Waits while rows are being overwritten, or while the writer waits to
    /// overwrite them: microseconds, or as long as the running searches take.
    ///
    /// A thread takes one snapshot and drops it when its search is done. A thread that takes a second one
    /// while it holds the first can block an erasure, which blocks the thread, until the erasure gives up.
    ///
    /// # Panics
    /// If the reader [is retired](Reader::is_retired).
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Snapshot::enter(&self.shared, |shared| Arc::clone(&shared.current.lock()))
    }

    /// The lock of the folder, and the token of its writer, which must have been dropped.
    pub(crate) fn take_over(&self) -> Result<(Arc<Lock>, WriteToken), Error> {
        let lock = Arc::clone(&self.shared.lock);
        let token = self.shared.reader_barrier.token().ok_or_else(|| Error::Locked { dir: lock.dir.clone() })?;
        Ok((lock, token))
    }

    /// Whether the index has been opened again ([`Index::reopen_on`](crate::Index::reopen_on)). This reader
    /// gives no more snapshots then.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.shared.reader_barrier.is_retired()
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reader")
    }
}

/// The rows published up to one change of the log. Hold it for one search only: erasures wait until no
/// snapshot is held.
pub struct Snapshot {
    view: Arc<View>,
    ticket: Ticket,
    shared: Arc<Shared>,
}

/// The published rows of one segment.
#[derive(Clone, Copy)]
pub struct SegmentView<'a> {
    /// Identifies the contents: while it stays the same, rows are only appended and erased.
    pub identity: u64,
    /// Number of the first row: a multiple of 64.
    pub first_row: u32,
    /// All rows, row-major, including dead ones (an erased row is all zeros). Shape: `[count, dim]`.
    pub rows: &'a [f16],
    /// Bit `i % 64` of word `i / 64` is set if row `first_row + i` is live. Bits from `count` have no
    /// meaning.
    pub live: &'a [u64],
    /// The codes of the full blocks of 64 rows in `rows`, straight from the map. The codes of an erased
    /// row are zero. Rows after the last full block have no codes yet.
    pub codes: Codes<'a>,
}

impl Snapshot {
    /// Enters the barrier, then takes a view: `pick` runs while the ticket is held.
    pub(crate) fn enter(shared: &Arc<Shared>, pick: impl FnOnce(&Shared) -> Arc<View>) -> Arc<Self> {
        let ticket =
            shared.reader_barrier.enter().expect("the index was opened again: snapshots come from its own reader");
        Arc::new(Self { view: pick(shared), ticket, shared: Arc::clone(shared) })
    }

    /// Components of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.shared.geometry.dim
    }

    /// The LSN up to which the snapshot is complete.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.view.lsn
    }

    /// One past the largest row number. Numbers have gaps: segments need not be full, and not every slot
    /// has a segment.
    #[must_use]
    pub fn rows_end(&self) -> u32 {
        let segment_rows = self.shared.geometry.segment_rows;
        self.view.segments.iter().map(|part| part.slot * segment_rows + part.rows).max().unwrap_or(0)
    }

    /// Number of rows that are live in this snapshot.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.view.live
    }

    /// Number of rows that are dead in this snapshot: forgotten, whether already erased or not.
    #[must_use]
    pub fn dead(&self) -> u64 {
        self.view.dead
    }

    /// The rows by segment, in the order of their templates. Only the last segment may get more rows. Row
    /// numbers of segments do not overlap, and need not ascend from one to the next.
    pub fn segments(&self) -> impl Iterator<Item = SegmentView<'_>> {
        let segment_rows = self.shared.geometry.segment_rows;
        self.view.segments.iter().filter(|part| part.rows > 0).map(move |part| SegmentView {
            identity: part.segment.identity,
            first_row: part.slot * segment_rows,
            rows: part.segment.pages.rows(part.rows, &self.ticket),
            live: &part.live.words()[..(part.rows as usize).div_ceil(64)],
            codes: part.segment.pages.codes(part.rows, &self.ticket),
        })
    }

    /// The segment of a row and its offset there, if this snapshot has the row.
    fn locate(&self, row: Row) -> Option<(&PublishedSegment, u32)> {
        let segment_rows = self.shared.geometry.segment_rows;
        let part = &self.view.segments[self.view.place(row.0 / segment_rows)?];
        let offset = row.0 % segment_rows;
        (offset < part.rows).then_some((part, offset))
    }

    /// Whether the row is live in this snapshot.
    #[must_use]
    pub fn is_live(&self, row: Row) -> bool {
        self.locate(row).is_some_and(|(part, offset)| part.live.has(offset))
    }

    /// The row. Shape: `[dim]`. A dead row may be all zeros.
    ///
    /// # Panics
    /// If this snapshot has no such row.
    #[must_use]
    pub fn row(&self, row: Row) -> &[f16] {
        let (part, offset) = self.locate(row).expect("this snapshot has the row");
        part.segment.pages.row(offset, &self.ticket)
    }

    /// The metadata of a row; none if the row is not live in this snapshot.
    #[must_use]
    pub fn meta(&self, row: Row) -> Option<RowMeta<'_>> {
        let (part, offset) = self.locate(row).filter(|(part, offset)| part.live.has(*offset))?;
        // Even if it has been forgotten since, its bytes stay until this snapshot is dropped.
        Some(part.segment.pages.meta(offset, &self.ticket))
    }

    /// The live rows of a subject in this snapshot, in the order of their templates.
    #[must_use]
    pub fn rows_of(&self, subject: SubjectNumber) -> Vec<Row> {
        let mut rows = self.shared.subject_rows.read().rows_of(subject.0);
        // A row that is being compacted has two numbers; this snapshot has one of them.
        rows.retain(|&row| self.is_live(Row(row)));
        let segment_rows = self.shared.geometry.segment_rows;
        rows.sort_unstable_by_key(|row| (self.view.place(row / segment_rows), row % segment_rows));
        rows.into_iter().map(Row).collect()
    }

    /// Number of mapped bytes, used or not.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.view.segments.iter().map(|part| part.segment.pages.layout().file_bytes() as u64).sum()
    }

    /// Bytes of heap memory that the index holds besides the maps: rows by subject, live bits.
    #[must_use]
    pub fn host_bytes(&self) -> u64 {
        let segments: u64 =
            self.view.segments.iter().map(|part| size_of::<Segment>() as u64 + part.live.host_bytes()).sum();
        segments + self.shared.subject_rows.read().host_bytes()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot(lsn {}, {} live, {} dead)", self.view.lsn.0, self.view.live, self.view.dead)
    }
}
