//! Appends rows, and segments for them.

use std::sync::Arc;

use super::Index;
use super::segment_writer::{RowBatch, check_new};
use super::slots::Slot;
use crate::error::Error;
use crate::format::Layout;
use crate::read::LiveBits;
use crate::storage::Segment;
use crate::types::NewRow;

impl Index {
    /// Writes rows after the last one. They become visible with [`Index::publish`].
    ///
    /// # Errors
    /// [`Error::Order`], [`Error::Dim`], [`Error::Label`], [`Error::SubjectRange`],
    /// [`Error::RowLimit`], and [`Error::Io`] if a new segment could not be created: nothing was written
    /// and the writer continues. Any other [`Error::Io`]: the writer stops. [`Error::Stopped`].
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
        let limit = u64::from(self.shared.geometry.slot_count()) * u64::from(segment_rows);
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
        let mut batches = Vec::new();
        let mut batch = RowBatch::new(Layout::of(self.shared.geometry));
        while !rest.is_empty() {
            if tail == segment_rows {
                number = self.add_segment(fresh.next().expect("segments were created for all rows"));
                self.slots.list(number);
                tail = 0;
            }
            let count = rest.len().min((segment_rows - tail) as usize).min(batch.rows_max());
            let (now, later) = rest.split_at(count);
            let slot = &mut self.slots[number];
            slot.dirty = true;
            batch.write(&slot.segment, tail, now, &mut self.token)?;
            batches.push((number, tail, now));
            tail += count as u32;
            rest = later;
        }
        // Rows count only once all of them are written.
        let mut subject_rows = self.shared.subject_rows.write();
        for (number, offset, now) in batches {
            let slot = &mut self.slots[number];
            assert_eq!(slot.rows, offset);
            for (offset, row) in (offset..).zip(now) {
                subject_rows.link(row.subject.0, number * segment_rows + offset);
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

    /// Creates the segments that `rows` more rows need, before any of the rows is written. If descriptors or
    /// disk space run out here, nothing has changed.
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
                        // If this fails, the next opening removes the file.
                        let _ = self.storage.remove(&empty.path);
                    }
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    /// Puts a segment that does not count yet into a slot. There must be a free one.
    pub(crate) fn add_segment(&mut self, segment: Segment) -> u32 {
        let number = self.slots.free().expect("the number of rows was checked against the free slots");
        self.dir_dirty = true;
        self.shared.subject_rows.write().add_segment(number);
        let live = LiveBits::none(self.shared.geometry.segment_rows);
        let slot = Slot { segment: Arc::new(segment), live, rows: 0, range: None, dirty: true, listed: false };
        self.slots.put(number, slot);
        number
    }

    pub(crate) fn take_file_number(&mut self) -> Result<u32, Error> {
        let file = self.next_file;
        self.next_file = file.checked_add(1).ok_or_else(file_numbers_exhausted)?;
        Ok(file)
    }

    /// The slot of the segment to which rows are appended: the last one, unless it is being compacted.
    fn growing(&self) -> Option<u32> {
        let last = *self.slots.order().last()?;
        let sealed = self.compaction.as_ref().is_some_and(|compaction| compaction.sources.contains(&last));
        (!sealed).then_some(last)
    }
}

/// Every possible file number has been used.
pub(crate) fn file_numbers_exhausted() -> Error {
    Error::RowLimit { found: u64::from(u32::MAX) + 1, limit: u64::from(u32::MAX) }
}
