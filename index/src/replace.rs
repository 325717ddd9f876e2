//! Writing a segment of an open index anew, for repair or to leave out what was erased.
//!
//! Invariants: no reader meets a mixture of the old and the new segment; the old file goes only
//! after a manifest that names the new one is durable.

use std::sync::Arc;

use crate::error::Error;
use crate::fill::write_segment;
use crate::folder;
use crate::format::Layout;
use crate::live::LiveBits;
use crate::nouns::{OwnedRow, TemplateId};
use crate::scan::Scan;
use crate::segment::destroy;
use crate::writer::{Index, Slot, view_of};

impl Index {
    /// Writes a segment anew, in a file of a new identity, with `rows` in it: every template that
    /// is alive and belongs into the segment, ascending. Row numbers inside of it change, so this
    /// waits for readers as [`Index::erase`] does; then the new rows are published under the last
    /// LSN, made durable, and the old file is overwritten and removed.
    ///
    /// # Errors
    /// [`Error::Unpublished`] where rows await publication; [`Error::NoSuchSegment`],
    /// [`Error::Order`], [`Error::TemplateRange`], [`Error::RowLimit`], [`Error::Dim`],
    /// [`Error::Label`], [`Error::SubjectRange`] where the rows do not fit; [`Error::Readers`]:
    /// nothing has changed. [`Error::Io`]: the writer stops. [`Error::Stopped`].
    pub fn replace_segment(&mut self, segment: usize, rows: impl Iterator<Item = OwnedRow>) -> Result<(), Error> {
        self.running()?;
        let slot = self.slots.get(segment).ok_or(Error::NoSuchSegment { segment })?;
        let view = Arc::clone(&self.shared.current.lock());
        let published =
            |(place, slot): (usize, &Slot)| view.segments.get(place).map_or(0, |part| part.rows) == slot.rows;
        if !self.slots.iter().enumerate().all(published) {
            return Err(Error::Unpublished);
        }
        let range = slot.range.ok_or(Error::NoSuchSegment { segment })?;
        drop(view);
        let replaced = self.replace_checked(segment, range, rows);
        self.stop_if_failed(replaced)
    }

    fn replace_checked(
        &mut self,
        place: usize,
        range: (TemplateId, TemplateId),
        rows: impl Iterator<Item = OwnedRow>,
    ) -> Result<(), Error> {
        let file = self.take_file_number()?;
        let layout = Layout::of(self.shared.geometry);
        let (new, count) = write_segment(&*self.storage, &self.dir, file, layout, &mut self.writer, range, rows)?;
        new.pages.show(count, &mut self.writer);
        self.dir_dirty = true;
        let live = LiveBits::of(Scan::of_new(layout.capacity, count).live);
        let new = Slot { segment: Arc::new(new), live, rows: count, range: Some(range), dirty: false };
        let first_row = place as u32 * layout.capacity;
        let mut contents = self.contents;
        let slot = &self.slots[place];
        let old_live = slot.live.count(slot.rows);
        let records = slot.segment.pages.records(&self.writer);
        let live = (0..slot.rows).filter(|&offset| slot.live.has(offset));
        let live = live.inspect(|&offset| contents.remove(&records[offset as usize].meta()));
        let live = live.map(|offset| (first_row + offset, records[offset as usize].subject));
        let forgotten = self.forgotten.range(first_row..first_row + layout.capacity);
        let old_links: Vec<(u32, u64)> = live.chain(forgotten.map(|(&row, &subject)| (row, subject))).collect();
        let new_records = &new.segment.pages.records(&self.writer)[..count as usize];
        let new_subjects: Vec<u64> = new_records.iter().map(|record| record.subject).collect();
        new_records.iter().for_each(|record| contents.add(&record.meta()));
        let quiet = match self.writer.quiet(self.reader_wait) {
            Ok(quiet) => quiet,
            Err(late) => {
                let path = new.segment.path.clone();
                drop(new);
                destroy(&*self.storage, &path)?;
                return Err(late);
            }
        };
        // Nobody reads: rows of one subject, the segment and the view change together.
        let mut chains = self.shared.chains.write();
        for &(row, subject) in &old_links {
            chains.unlink(subject, row);
        }
        for (offset, &subject) in (0..).zip(&new_subjects) {
            chains.link(subject, first_row + offset);
        }
        drop(chains);
        let old = std::mem::replace(&mut self.slots[place], new);
        self.contents = contents;
        self.dead -= u64::from(old.rows) - old_live;
        let lsn = self.shared.current.lock().lsn;
        *self.shared.current.lock() = Arc::new(view_of(&self.slots, lsn, self.contents.rows, self.dead));
        drop(quiet);
        // What was forgotten in there goes with the file.
        self.forgotten.retain(|row, _| row / layout.capacity != place as u32);
        self.checkpoint_now()?;
        let old = Arc::into_inner(old.segment).expect("no snapshot held the old segment, and none can take it now");
        let path = old.path.clone();
        drop(old);
        destroy(&*self.storage, &path)?;
        folder::sync_dir(&*self.storage, &self.dir)
    }
}
