//! The one writer of a folder: append, forget, publish.
//!
//! Knows rows and files. Does not know what a change means or who reads.
//!
//! Invariants:
//! - Template numbers ascend with row numbers.
//! - A row is live, or forgotten and awaiting erasure, or erased. The live bits of a view do not
//!   change: a row forgotten since stays live in it, and in its subject's list, until it is erased,
//!   which waits for the view's readers.
//! - The manifest never counts a row that is not on disk, and names every row that is forgotten
//!   but not erased, so that no restart brings it back.
//! - After an I/O error nothing is written any more.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::fill::{Piece, check_new};
use crate::format::Layout;
use crate::gate::Writer;
use crate::live::LiveBits;
use crate::nouns::{Contents, Geometry, Lsn, NewRow, Origin, Row, SubjectNumber, TemplateId};
use crate::open::file_numbers_spent;
use crate::segment::Segment;
use crate::snapshot::{Reader, Shared, Snapshot, View, ViewSegment};
use crate::storage::Storage;

/// How long the writer waits for readers to drop their snapshots, unless told otherwise.
pub(crate) const READER_WAIT_DEFAULT: Duration = Duration::from_secs(10);

/// The one writer of an index.
pub struct Index {
    pub(crate) dir: PathBuf,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) origin: Origin,
    pub(crate) shared: Arc<Shared>,
    pub(crate) writer: Writer,
    pub(crate) slots: Vec<Slot>,
    /// Rows that are no longer live and still have their bytes, each with its subject, whose list has it.
    pub(crate) forgotten: BTreeMap<u32, u64>,
    /// The live rows, published or not.
    pub(crate) contents: Contents,
    /// Rows no longer live, erased or awaiting it.
    pub(crate) dead: u64,
    pub(crate) next_file: u32,
    /// Whether names were made or removed since the folder was synced.
    pub(crate) dir_dirty: bool,
    pub(crate) stopped: bool,
    pub(crate) left_over: Vec<PathBuf>,
    pub(crate) reader_wait: Duration,
}

/// A segment as the writer keeps it.
pub(crate) struct Slot {
    pub(crate) segment: Arc<Segment>,
    /// Which rows are live, published or not.
    pub(crate) live: LiveBits,
    /// Rows appended, published or not.
    pub(crate) rows: u32,
    /// The smallest and largest template number that belong here; none before the first row.
    pub(crate) range: Option<(TemplateId, TemplateId)>,
    /// Whether rows were written since the file was synced.
    pub(crate) dirty: bool,
}

/// What a segment is, for status pages and repairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Its file.
    pub path: PathBuf,
    /// Names its contents.
    pub identity: u64,
    /// Number of its first row.
    pub first_row: Row,
    /// Rows appended to it.
    pub rows: u32,
    /// How many of them are live.
    pub live: u64,
    /// The smallest and largest template number that belong into it.
    pub templates: Option<(TemplateId, TemplateId)>,
}

impl Index {
    /// The shape the index was created with.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// How long [`Index::erase`] and [`Index::replace_segment`] wait for readers: 10 s unless set.
    pub fn set_reader_wait(&mut self, wait: Duration) {
        self.reader_wait = wait;
    }

    /// Hands out snapshots to search threads, whatever the writer does meanwhile.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader { shared: Arc::clone(&self.shared) }
    }

    /// What was published last.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.reader().snapshot()
    }

    /// Whether an I/O error has stopped this writer.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Files that opening this index would have overwritten and removed, and could not since the disk
    /// failed at it. Nothing of them is served; they may hold templates of people who were forgotten.
    #[must_use]
    pub fn left_over(&self) -> &[PathBuf] {
        &self.left_over
    }

    /// Rows forgotten and not erased yet, ascending: what [`Index::erase`] still has to do.
    #[must_use]
    pub fn forgotten(&self) -> Vec<Row> {
        self.forgotten.keys().map(|&row| Row(row)).collect()
    }

    /// The largest template number ever appended.
    #[must_use]
    pub fn last_template(&self) -> Option<TemplateId> {
        self.slots.iter().rev().find_map(|slot| slot.range).map(|(_, last)| last)
    }

    /// What the live rows are, published or not: to compare with what the registry has.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.contents
    }

    /// The segments, in the order of their rows.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let info = |(place, slot): (usize, &Slot)| SegmentInfo {
            path: slot.segment.path.clone(),
            identity: slot.segment.identity,
            first_row: Row(place as u32 * self.shared.geometry.segment_rows),
            rows: slot.rows,
            live: slot.live.count(slot.rows),
            templates: slot.range,
        };
        self.slots.iter().enumerate().map(info).collect()
    }

    /// Writes rows behind the last one. They are not visible before [`Index::publish`].
    ///
    /// # Errors
    /// [`Error::Order`], [`Error::Dim`], [`Error::Label`], [`Error::SubjectRange`],
    /// [`Error::RowLimit`], and [`Error::Io`] if a new segment could not be made: nothing was written
    /// and the writer goes on. Otherwise [`Error::Io`]: the writer stops. [`Error::Stopped`].
    pub fn append(&mut self, rows: &[NewRow<'_>]) -> Result<(), Error> {
        self.running()?;
        let mut last = self.last_template();
        for row in rows {
            check_new(row, self.shared.geometry.dim)?;
            if let Some(after) = last.filter(|&last| last >= row.template) {
                return Err(Error::Order { template: row.template, after });
            }
            last = Some(row.template);
        }
        // Row numbers stay under u32::MAX, which stands for no row.
        let segment_rows = self.shared.geometry.segment_rows;
        let limit = u64::from(u32::MAX / segment_rows) * u64::from(segment_rows);
        let taken = self.slots.len() as u64 * u64::from(segment_rows)
            - self.slots.last().map_or(0, |slot| u64::from(segment_rows - slot.rows));
        let found = taken + rows.len() as u64;
        if found > limit {
            return Err(Error::RowLimit { found, limit });
        }
        let fresh = self.new_segments(rows.len())?;
        let written = self.append_checked(rows, fresh);
        self.stop_if_failed(written)
    }

    fn append_checked(&mut self, rows: &[NewRow<'_>], fresh: Vec<Segment>) -> Result<(), Error> {
        let segment_rows = self.shared.geometry.segment_rows;
        let mut tail = self.slots.last().map_or(segment_rows, |slot| slot.rows);
        let (mut rest, mut fresh) = (rows, fresh.into_iter());
        let mut pieces = Vec::new();
        let mut piece = Piece::new(Layout::of(self.shared.geometry));
        while !rest.is_empty() {
            if tail == segment_rows {
                self.add_segment(fresh.next().expect("segments were made for all of the rows"));
                tail = 0;
            }
            let count = rest.len().min((segment_rows - tail) as usize).min(piece.rows_max());
            let (now, later) = rest.split_at(count);
            let place = self.slots.len() - 1;
            let slot = &mut self.slots[place];
            slot.dirty = true;
            piece.write(&slot.segment, tail, now, &mut self.writer)?;
            pieces.push((place, tail, now));
            tail += count as u32;
            rest = later;
        }
        // Only now that every row is written does any of them count.
        let mut chains = self.shared.chains.write();
        for (place, offset, now) in pieces {
            let slot = &mut self.slots[place];
            assert_eq!(slot.rows, offset);
            for (offset, row) in (offset..).zip(now) {
                chains.link(row.subject.0, place as u32 * segment_rows + offset);
                slot.live.set(offset);
                self.contents.add(&row.meta());
            }
            slot.rows += now.len() as u32;
            let first = slot.range.map_or(now[0].template, |(first, _)| first);
            slot.range = Some((first, now[now.len() - 1].template));
        }
        Ok(())
    }

    /// Makes the segments that so many more rows need, before any of those is written: that takes
    /// descriptors and room on the disk, and if there are none nothing has happened.
    fn new_segments(&mut self, rows: usize) -> Result<Vec<Segment>, Error> {
        let layout = Layout::of(self.shared.geometry);
        let segment_rows = layout.capacity as usize;
        let room = self.slots.last().map_or(0, |slot| segment_rows - slot.rows as usize);
        let mut made: Vec<Segment> = Vec::new();
        for _ in 0..rows.saturating_sub(room).div_ceil(segment_rows) {
            let segment =
                self.take_file_number().and_then(|file| Segment::create(&*self.storage, &self.dir, file, layout));
            match segment {
                Ok(segment) => made.push(segment),
                Err(error) => {
                    for empty in made {
                        // If it stays, the next opening removes it.
                        let _ = self.storage.remove(&empty.path);
                    }
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    fn add_segment(&mut self, segment: Segment) {
        self.dir_dirty = true;
        self.shared.chains.write().add_segment();
        let live = LiveBits::none(self.shared.geometry.segment_rows);
        self.slots.push(Slot { segment: Arc::new(segment), live, rows: 0, range: None, dirty: true });
    }

    pub(crate) fn take_file_number(&mut self) -> Result<u32, Error> {
        let file = self.next_file;
        self.next_file = file.checked_add(1).ok_or_else(file_numbers_spent)?;
        Ok(file)
    }

    /// Takes a subject out of the next publication and all after it, and returns its rows: publish,
    /// then erase them. Empty where the subject has none.
    pub fn forget(&mut self, subject: SubjectNumber) -> Vec<Row> {
        let mut rows = self.shared.chains.read().rows_of(subject.0);
        rows.retain(|row| !self.forgotten.contains_key(row));
        for &row in &rows {
            self.retire(row);
        }
        rows.into_iter().map(Row).collect()
    }

    /// Takes one template out of the next publication and all after it, and returns its row.
    pub fn forget_template(&mut self, template: TemplateId) -> Option<Row> {
        let place = self.slots.partition_point(|slot| slot.range.is_some_and(|(_, last)| last < template));
        let slot = self.slots.get(place)?;
        let records = slot.segment.pages.records(&self.writer);
        let (mut from, mut end) = (0, slot.rows);
        let found = loop {
            if from >= end {
                return None;
            }
            let middle = from + (end - from) / 2;
            // Erased rows have lost their number, so the search steps from live row to live row.
            let Some(at) = slot.live.next(middle, end) else {
                end = middle;
                continue;
            };
            match records[at as usize].template.cmp(&template.0) {
                std::cmp::Ordering::Less => from = at + 1,
                std::cmp::Ordering::Greater => end = middle,
                std::cmp::Ordering::Equal => break at,
            }
        };
        let row = place as u32 * self.shared.geometry.segment_rows + found;
        self.retire(row);
        Some(Row(row))
    }

    fn retire(&mut self, row: u32) {
        let (place, offset) = self.place_of(row);
        let slot = &mut self.slots[place];
        slot.live.clear(offset);
        let record = &slot.segment.pages.records(&self.writer)[offset as usize];
        self.contents.remove(&record.meta());
        assert!(self.forgotten.insert(row, record.subject).is_none());
        self.dead += 1;
    }

    pub(crate) fn place_of(&self, row: u32) -> (usize, u32) {
        let segment_rows = self.shared.geometry.segment_rows;
        ((row / segment_rows) as usize, row % segment_rows)
    }

    /// Makes everything appended so far visible to readers, as of `lsn`, and returns it. Drop the
    /// snapshot before [`Index::erase`]: it waits for this one too.
    ///
    /// # Panics
    /// Where `lsn` is less than the one published before.
    pub fn publish(&mut self, lsn: Lsn) -> Arc<Snapshot> {
        let view = self.staged_view(lsn);
        *self.shared.current.lock() = Arc::clone(&view);
        self.shared.enter(|_| view)
    }

    /// What [`Index::publish`] would make visible now, without making it so: for an engine that
    /// must have its copy of the rows before searches may see them.
    ///
    /// # Panics
    /// Where `lsn` is less than the one published last.
    pub fn stage(&mut self, lsn: Lsn) -> Arc<Snapshot> {
        let view = self.staged_view(lsn);
        self.shared.enter(|_| view)
    }

    fn staged_view(&mut self, lsn: Lsn) -> Arc<View> {
        assert!(lsn >= self.shared.current.lock().lsn, "changes are published in their order");
        for slot in &self.slots {
            slot.segment.pages.show(slot.rows, &mut self.writer);
        }
        Arc::new(view_of(&self.slots, lsn, self.contents.rows, self.dead))
    }

    pub(crate) fn running(&self) -> Result<(), Error> {
        if self.stopped { Err(Error::Stopped) } else { Ok(()) }
    }

    /// After a failed write or sync nobody knows what the disk holds: pages that failed to sync
    /// may read as written and be lost. So the writer stops, and a new one starts from the files.
    pub(crate) fn stop_if_failed<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if matches!(result, Err(Error::Io { .. })) {
            self.stopped = true;
        }
        result
    }
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Index({}, {} segments, {} live)", self.dir.display(), self.slots.len(), self.contents.rows)
    }
}

/// The rows of `slots` as readers are to see them.
pub(crate) fn view_of(slots: &[Slot], lsn: Lsn, live: u64, erased: u64) -> View {
    let segments = slots.iter().map_while(|slot| {
        let (first_template, last_template) = slot.range?;
        let (segment, live) = (Arc::clone(&slot.segment), slot.live.clone());
        Some(ViewSegment { segment, live, rows: slot.rows, first_template, last_template })
    });
    View { lsn, segments: segments.collect(), live, erased }
}
