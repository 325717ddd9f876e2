//! The one writer of a folder: append, forget, publish.
//!
//! Knows rows and files. Does not know what a change means or who reads.
//!
//! Invariants:
//! - Template numbers ascend from segment to segment and inside of each.
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

use crate::compact::Compaction;
use crate::error::Error;
use crate::fill::{Piece, check_new};
use crate::format::Layout;
use crate::live::LiveBits;
use crate::nouns::{Contents, Geometry, Lsn, NewRow, Origin, Row, SubjectNumber, TemplateId};
use crate::open::file_numbers_spent;
use crate::reader_barrier::Writer;
use crate::segment::Segment;
use crate::slots::{Slot, Slots, slots_max};
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
    pub(crate) slots: Slots,
    pub(crate) compaction: Option<Compaction>,
    /// Rows that are no longer live and still have their bytes, each with its subject, whose list has it;
    /// of a row that was copied, the copy too.
    pub(crate) forgotten: BTreeMap<u32, u64>,
    /// The live rows that count, published or not.
    pub(crate) contents: Contents,
    pub(crate) last_template: Option<TemplateId>,
    /// Rows no longer live, erased or awaiting it.
    pub(crate) dead: u64,
    pub(crate) next_file: u32,
    /// Whether names were made or removed since the folder was synced.
    pub(crate) dir_dirty: bool,
    pub(crate) stopped: bool,
    pub(crate) left_over: Vec<PathBuf>,
    pub(crate) reader_wait: Duration,
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

    /// How long [`Index::erase`] waits for readers: 10 s unless set.
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

    /// The largest template number ever appended, as far as the index knows: one that was erased
    /// and compacted before the index was opened is not known any more.
    #[must_use]
    pub fn last_template(&self) -> Option<TemplateId> {
        self.last_template
    }

    /// What the live rows are, published or not: to compare with what the registry has.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.contents
    }

    /// The segments that count, in the order of their templates.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let info = |(number, slot): (u32, &Slot)| SegmentInfo {
            path: slot.segment.path.clone(),
            identity: slot.segment.identity,
            first_row: Row(number * self.shared.geometry.segment_rows),
            rows: slot.rows,
            live: slot.live.count(slot.rows),
            templates: slot.range,
        };
        self.slots.listed().map(info).collect()
    }

    /// The slot of the segment that rows are appended to: the last one, unless it is being compacted.
    pub(crate) fn growing(&self) -> Option<u32> {
        let last = *self.slots.order().last()?;
        let sealed = self.compaction.as_ref().is_some_and(|compaction| compaction.sources.contains(&last));
        (!sealed).then_some(last)
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
        let segment_rows = self.shared.geometry.segment_rows;
        let limit = u64::from(slots_max(segment_rows)) * u64::from(segment_rows);
        let taken = u64::from(self.slots.taken()) * u64::from(segment_rows)
            - self.growing().map_or(0, |number| u64::from(segment_rows - self.slots[number].rows));
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
        let (mut number, mut tail) = match self.growing() {
            Some(number) => (number, self.slots[number].rows),
            None => (0, segment_rows),
        };
        let (mut rest, mut fresh) = (rows, fresh.into_iter());
        let mut pieces = Vec::new();
        let mut piece = Piece::new(Layout::of(self.shared.geometry));
        while !rest.is_empty() {
            if tail == segment_rows {
                number = self.add_segment(fresh.next().expect("segments were made for all of the rows"));
                self.slots.list(number);
                tail = 0;
            }
            let count = rest.len().min((segment_rows - tail) as usize).min(piece.rows_max());
            let (now, later) = rest.split_at(count);
            let slot = &mut self.slots[number];
            slot.dirty = true;
            piece.write(&slot.segment, tail, now, &mut self.writer)?;
            pieces.push((number, tail, now));
            tail += count as u32;
            rest = later;
        }
        // Only now that every row is written does any of them count.
        let mut chains = self.shared.chains.write();
        for (number, offset, now) in pieces {
            let slot = &mut self.slots[number];
            assert_eq!(slot.rows, offset);
            for (offset, row) in (offset..).zip(now) {
                chains.link(row.subject.0, number * segment_rows + offset);
                slot.live.set(offset);
                self.contents.add(&row.meta());
            }
            slot.rows += now.len() as u32;
            let first = slot.range.map_or(now[0].template, |(first, _)| first);
            slot.range = Some((first, now[now.len() - 1].template));
        }
        self.last_template = rows.last().map(|row| row.template).or(self.last_template);
        Ok(())
    }

    /// Makes the segments that so many more rows need, before any of those is written: that takes
    /// descriptors and room on the disk, and if there are none nothing has happened.
    fn new_segments(&mut self, rows: usize) -> Result<Vec<Segment>, Error> {
        let layout = Layout::of(self.shared.geometry);
        let segment_rows = layout.capacity as usize;
        let room = self.growing().map_or(0, |number| segment_rows - self.slots[number].rows as usize);
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

    /// Gives a slot to a segment that does not count yet. There must be one that is free.
    pub(crate) fn add_segment(&mut self, segment: Segment) -> u32 {
        let number = self.slots.free().expect("rows were checked against the slots there are");
        self.dir_dirty = true;
        self.shared.chains.write().add_segment(number);
        let live = LiveBits::none(self.shared.geometry.segment_rows);
        let slot = Slot { segment: Arc::new(segment), live, rows: 0, range: None, dirty: true, listed: false };
        self.slots.put(number, slot);
        number
    }

    pub(crate) fn take_file_number(&mut self) -> Result<u32, Error> {
        let file = self.next_file;
        self.next_file = file.checked_add(1).ok_or_else(file_numbers_spent)?;
        Ok(file)
    }

    /// Takes a subject out of the next publication and all after it, and returns its rows, and the copies
    /// that a compaction has made of them: publish, then erase them. Empty where the subject has none.
    pub fn forget(&mut self, subject: SubjectNumber) -> Vec<Row> {
        let mut rows = self.shared.chains.read().rows_of(subject.0);
        rows.retain(|row| !self.forgotten.contains_key(row));
        for &row in &rows {
            self.retire(row);
        }
        rows.into_iter().map(Row).collect()
    }

    /// Takes one template out of the next publication and all after it, and returns its row, and the
    /// copy that a compaction has made of it. Empty where the index has no such template.
    pub fn forget_template(&mut self, template: TemplateId) -> Vec<Row> {
        let in_range = |slot: &Slot| slot.range.is_some_and(|(first, last)| (first..=last).contains(&template));
        let held = self.slots.all().filter(|(_, slot)| in_range(slot));
        let found: Vec<(u32, u32)> =
            held.filter_map(|(number, slot)| Some((number, self.live_offset(slot, template)?))).collect();
        let mut rows = Vec::new();
        for (number, offset) in found {
            let row = number * self.shared.geometry.segment_rows + offset;
            self.retire(row);
            rows.push(Row(row));
        }
        rows
    }

    /// Where in a segment the live row of a template is.
    fn live_offset(&self, slot: &Slot, template: TemplateId) -> Option<u32> {
        let records = slot.segment.pages.records(&self.writer);
        let (mut from, mut end) = (0, slot.rows);
        while from < end {
            let middle = from + (end - from) / 2;
            // Erased rows have lost their number, so the search steps from live row to live row.
            let Some(at) = slot.live.next(middle, end) else {
                end = middle;
                continue;
            };
            match records[at as usize].template.cmp(&template.0) {
                std::cmp::Ordering::Less => from = at + 1,
                std::cmp::Ordering::Greater => end = middle,
                std::cmp::Ordering::Equal => return Some(at),
            }
        }
        None
    }

    fn retire(&mut self, row: u32) {
        let (number, offset) = self.place_of(row);
        let slot = &mut self.slots[number];
        slot.live.clear(offset);
        let record = &slot.segment.pages.records(&self.writer)[offset as usize];
        assert!(self.forgotten.insert(row, record.subject).is_none());
        if slot.listed {
            self.contents.remove(&record.meta());
            self.dead += 1;
        }
    }

    /// The slot of a row, and its offset in the segment there.
    pub(crate) fn place_of(&self, row: u32) -> (u32, u32) {
        let segment_rows = self.shared.geometry.segment_rows;
        (row / segment_rows, row % segment_rows)
    }

    /// Makes everything appended so far visible to readers, as of `lsn`, and returns it. Drop the
    /// snapshot before [`Index::erase`]: it waits for this one too.
    ///
    /// # Panics
    /// Where `lsn` is less than the one published before.
    pub fn publish(&mut self, lsn: Lsn) -> Arc<Snapshot> {
        self.show_listed(lsn);
        let view = Arc::new(self.view(lsn));
        *self.shared.current.lock() = Arc::clone(&view);
        self.shared.enter(|_| view)
    }

    /// What [`Index::publish`] would make visible now, without making it so: for an engine that
    /// must have its copy of the rows before searches may see them. While a compaction runs it has
    /// more segments: those of which searches may be told next, and those that searches which run may
    /// still be reading. So rows may be in it twice, and it is not for searching.
    ///
    /// # Panics
    /// Where `lsn` is less than the one published last.
    pub fn stage(&mut self, lsn: Lsn) -> Arc<Snapshot> {
        self.show_listed(lsn);
        let mut segments = self.segments_beside();
        let view = self.view(lsn);
        segments.extend(view.segments);
        let view = Arc::new(View::new(lsn, segments, view.live, view.erased));
        self.shared.enter(|_| view)
    }

    fn show_listed(&mut self, lsn: Lsn) {
        assert!(lsn >= self.shared.current.lock().lsn, "changes are published in their order");
        for (_, slot) in self.slots.listed() {
            slot.segment.pages.show(slot.rows, &mut self.writer);
        }
    }

    /// The rows that count, as readers are to see them.
    pub(crate) fn view(&self, lsn: Lsn) -> View {
        let segments = self.slots.listed().map_while(|(number, slot)| view_segment(number, slot));
        View::new(lsn, segments.collect(), self.contents.rows, self.dead)
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
        write!(f, "Index({}, {} segments, {} live)", self.dir.display(), self.slots.order().len(), self.contents.rows)
    }
}

/// The rows of a slot as readers are to see them; none before there are any.
pub(crate) fn view_segment(number: u32, slot: &Slot) -> Option<ViewSegment> {
    let (first_template, last_template) = slot.range?;
    Some(ViewSegment {
        segment: Arc::clone(&slot.segment),
        live: slot.live.clone(),
        slot: number,
        rows: slot.rows,
        first_template,
        last_template,
    })
}
