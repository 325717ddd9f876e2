//! What readers see: snapshots of the rows published so far.
//!
//! A snapshot is the gallery at one moment: how many rows there are, and which of them are live. A row
//! that is forgotten later stays live in it. A snapshot holds a ticket of the barrier: as long as it lives,
//! no row that is live in it is erased, and no byte of its rows changes.
//!
//! Does not know how rows are written.
//!
//! Invariants: a block's rows are all shown; snapshots are held for the time of one search.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use half::f16;
use parking_lot::{Mutex, RwLock};

use crate::chains::Chains;
use crate::codes::Codes;
use crate::error::Error;
use crate::live::LiveBits;
use crate::lock::Lock;
use crate::nouns::{Geometry, Lsn, Row, RowMeta, SubjectNumber, TemplateId};
use crate::reader_barrier::{ReaderBarrier, Ticket, Writer};
use crate::segment::Segment;

/// What the writer shares with readers. The lock is in here so that it outlives them all; whoever
/// opens the index again shares it too.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) reader_barrier: Arc<ReaderBarrier>,
    pub(crate) current: Mutex<Arc<View>>,
    pub(crate) chains: RwLock<Chains>,
    pub(crate) geometry: Geometry,
    pub(crate) lock: Arc<Lock>,
}

/// The segments and row counts of one publication.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) lsn: Lsn,
    /// By ascending templates.
    pub(crate) segments: Vec<ViewSegment>,
    pub(crate) live: u64,
    pub(crate) erased: u64,
    /// By slot: the place among `segments`, or none.
    places: Vec<Option<u32>>,
}

impl View {
    pub(crate) fn new(lsn: Lsn, segments: Vec<ViewSegment>, live: u64, erased: u64) -> Self {
        let mut places = Vec::new();
        for (place, part) in (0..).zip(&segments) {
            let slot = part.slot as usize;
            if places.len() <= slot {
                places.resize(slot + 1, None);
            }
            assert_eq!(places[slot].replace(place), None);
        }
        Self { lsn, segments, live, erased, places }
    }

    /// The place among the segments of the one in a slot.
    fn place(&self, slot: u32) -> Option<usize> {
        Some((*self.places.get(slot as usize)?)? as usize)
    }

    /// What is shown of the segment in a slot, if it is.
    pub(crate) fn part(&self, slot: u32) -> Option<&ViewSegment> {
        Some(&self.segments[self.place(slot)?])
    }
}

#[derive(Debug, Clone)]
pub(crate) struct ViewSegment {
    pub(crate) segment: Arc<Segment>,
    pub(crate) live: LiveBits,
    pub(crate) slot: u32,
    pub(crate) rows: u32,
    pub(crate) first_template: TemplateId,
    pub(crate) last_template: TemplateId,
}

impl Shared {
    /// Enters the barrier, then takes a view: `pick` runs with the ticket held.
    pub(crate) fn enter(self: &Arc<Self>, pick: impl FnOnce(&Self) -> Arc<View>) -> Arc<Snapshot> {
        let ticket = self.reader_barrier.enter();
        let view = pick(self);
        Arc::new(Snapshot { view, ticket, shared: Arc::clone(self) })
    }
}

/// Hands out snapshots to search threads. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    pub(crate) shared: Arc<Shared>,
}

impl Reader {
    /// What was published last. Waits while rows are being overwritten, or a writer waits to do
    /// so: microseconds, or as long as the searches that run take.
    ///
    /// A thread takes one snapshot and drops it when its search is done. Whoever asks for a second
    /// one while holding a first can make an erasure wait for itself, until that gives up.
    ///
    /// # Panics
    /// If the reader [is retired](Reader::is_retired).
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.enter(|shared| Arc::clone(&shared.current.lock()))
    }

    /// The lock of the folder and the place of its writer, which must be free.
    pub(crate) fn take_over(&self) -> Result<(Arc<Lock>, Writer), Error> {
        let lock = Arc::clone(&self.shared.lock);
        let writer = self.shared.reader_barrier.writer().ok_or_else(|| Error::Locked { dir: lock.dir.clone() })?;
        Ok((lock, writer))
    }

    /// Whether the index was opened again since ([`Index::reopen_on`](crate::Index::reopen_on)), so that there
    /// are no more snapshots to be had here.
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

/// The rows published up to one change of the log. Hold it for one search, not longer: erasures
/// wait until no snapshot is held.
pub struct Snapshot {
    view: Arc<View>,
    ticket: Ticket,
    shared: Arc<Shared>,
}

/// The published rows of one segment.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// Names the contents: under one identity rows are only appended, and erased.
    pub identity: u64,
    /// Number of the first row; a multiple of 64.
    pub first_row: u32,
    /// The rows, row-major, dead ones too (an erased row is all zeros). Shape: `[count, dim]`.
    pub rows: &'a [f16],
    /// Bit `i % 64` of word `i / 64` is set if row `first_row + i` is live. Bits at `count` and
    /// beyond mean nothing here.
    pub live: &'a [u64],
    /// The codes of the whole blocks of 64 rows among `rows`, straight from the map; those of an
    /// erased row are zero. Rows behind the last whole block have none yet.
    pub codes: Codes<'a>,
}

impl Snapshot {
    /// Components of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.shared.geometry.dim
    }

    /// The change up to which everything is in.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.view.lsn
    }

    /// One past the largest row number. Numbers have gaps: a segment need not be full, and not every
    /// slot has one.
    #[must_use]
    pub fn rows_end(&self) -> u32 {
        let segment_rows = self.shared.geometry.segment_rows;
        self.view.segments.iter().map(|part| part.slot * segment_rows + part.rows).max().unwrap_or(0)
    }

    /// Rows that are live in this snapshot.
    #[must_use]
    pub fn live(&self) -> u64 {
        self.view.live
    }

    /// Rows that were forgotten when this was published, overwritten already or not.
    #[must_use]
    pub fn erased(&self) -> u64 {
        self.view.erased
    }

    /// The rows, a segment at a time, by ascending templates: the last one may get more rows. Numbers
    /// of rows do not overlap, and need not ascend from one to the next.
    pub fn blocks(&self) -> impl Iterator<Item = Block<'_>> {
        let segment_rows = self.shared.geometry.segment_rows;
        self.view.segments.iter().filter(|part| part.rows > 0).map(move |part| Block {
            identity: part.segment.identity,
            first_row: part.slot * segment_rows,
            rows: part.segment.pages.rows(part.rows, &self.ticket),
            live: &part.live.words()[..(part.rows as usize).div_ceil(64)],
            codes: part.segment.pages.codes(part.rows, &self.ticket),
        })
    }

    /// The part of a row, and its place in there, if this snapshot has it.
    fn locate(&self, row: Row) -> Option<(&ViewSegment, u32)> {
        let segment_rows = self.shared.geometry.segment_rows;
        let part = &self.view.segments[self.view.place(row.0 / segment_rows)?];
        let offset = row.0 % segment_rows;
        (offset < part.rows).then_some((part, offset))
    }

    /// Whether this snapshot has the row and it is live in it.
    #[must_use]
    pub fn is_live(&self, row: Row) -> bool {
        self.locate(row).is_some_and(|(part, offset)| part.live.has(offset))
    }

    /// The row. Shape: `[dim]`. It may be dead, and then it may be all zeros.
    ///
    /// # Panics
    /// Where this snapshot has no such row.
    #[must_use]
    pub fn row(&self, row: Row) -> &[f16] {
        let (part, offset) = self.locate(row).expect("the row is one of this snapshot's");
        part.segment.pages.row(offset, &self.ticket)
    }

    /// What a row says of itself; none if it is not live or not in this snapshot.
    #[must_use]
    pub fn meta(&self, row: Row) -> Option<RowMeta<'_>> {
        let (part, offset) = self.locate(row).filter(|(part, offset)| part.live.has(*offset))?;
        // Should it be forgotten by now, its bytes still stay until this snapshot is gone.
        Some(part.segment.pages.meta(offset, &self.ticket))
    }

    /// The live rows of a subject in this snapshot.
    #[must_use]
    pub fn rows_of(&self, subject: SubjectNumber) -> RowsOf {
        let mut rows = self.shared.chains.read().rows_of(subject.0);
        // Of a row that is being compacted, the one of its numbers that this snapshot has.
        rows.retain(|&row| self.is_live(Row(row)));
        let segment_rows = self.shared.geometry.segment_rows;
        rows.sort_unstable_by_key(|row| (self.view.place(row / segment_rows), row % segment_rows));
        RowsOf(rows.into_iter().map(Row).collect())
    }

    /// Bytes of files mapped, used or not.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.view.segments.iter().map(|part| part.segment.pages.layout().file_bytes() as u64).sum()
    }

    /// Bytes of heap memory the index holds beside the maps: the rows of each subject, live bits.
    #[must_use]
    pub fn host_bytes(&self) -> u64 {
        let segments: u64 =
            self.view.segments.iter().map(|part| size_of::<Segment>() as u64 + part.live.host_bytes()).sum();
        segments + self.shared.chains.read().host_bytes()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot(lsn {}, {} live, {} erased)", self.view.lsn.0, self.view.live, self.view.erased)
    }
}

/// The live rows of one subject, by ascending templates. Reads as a slice of [`Row`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RowsOf(Vec<Row>);

impl Deref for RowsOf {
    type Target = [Row];

    fn deref(&self) -> &[Row] {
        &self.0
    }
}

impl IntoIterator for RowsOf {
    type Item = Row;
    type IntoIter = std::vec::IntoIter<Row>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
