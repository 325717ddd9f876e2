//! What the writer makes last, and what it makes go for good: erase and checkpoint.
//!
//! `FORMAT.md` has the order of these writes and why each crash in between is harmless.
//!
//! Invariants: a row's bytes go only after the disk has heard that they will, and its codes with
//! them; a manifest is written only after the rows it counts and their codes are durable.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::codes::BLOCK_ROWS;
use crate::coding::clear_codes;
use crate::error::Error;
use crate::folder;
use crate::format::MetaRecord;
use crate::manifest::{Manifest, SegmentEntry};
use crate::nouns::Row;
use crate::snapshot::ViewSegment;
use crate::writer::Index;

/// Rows overwritten while readers wait, before the barrier opens to them again.
const ERASE_ROWS_PER_PAUSE: usize = 1024;

/// The block of a row, by its slot and its offset.
fn block_of(&(slot, offset): &(u32, u32)) -> (u32, u32) {
    (slot, offset / BLOCK_ROWS as u32)
}

impl Index {
    /// Overwrites forgotten rows and their codes and returns once no byte of them is left in the index's files or
    /// maps, for good. Rows erased already are passed over.
    ///
    /// Waits until no snapshot is held; who asks a [`crate::Reader`] for one meanwhile waits too, for as
    /// long as the searches that run take. The caller must hold none itself.
    ///
    /// # Errors
    /// [`Error::NoSuchRow`], [`Error::StillLive`], and [`Error::Unpublished`] where no publication has
    /// followed [`Index::forget`]: nothing was done. [`Error::Readers`]: snapshots
    /// are held for longer than the writer waits; the rows stay forgotten, ask again.
    /// [`Error::Io`]: the writer stops; opening the index again finishes what was begun.
    /// [`Error::Stopped`].
    pub fn erase(&mut self, rows: &[Row]) -> Result<(), Error> {
        self.running()?;
        let mut doomed = BTreeSet::new();
        let view = Arc::clone(&self.shared.current.lock());
        for &row in rows {
            let (number, offset) = self.place_of(row.0);
            let slot = self.slots.get(number).filter(|slot| offset < slot.rows).ok_or(Error::NoSuchRow { row })?;
            if slot.live.has(offset) {
                return Err(Error::StillLive { row });
            }
            // Snapshots of a view that has the row as live are still handed out.
            if view.part(number).is_some_and(|part| part.live.has(offset)) {
                return Err(Error::Unpublished);
            }
            if self.forgotten.contains_key(&row.0) {
                doomed.insert(row.0);
            }
        }
        drop(view);
        let erased = self.erase_checked(&doomed);
        self.stop_if_failed(erased)
    }

    fn erase_checked(&mut self, rows: &BTreeSet<u32>) -> Result<(), Error> {
        let places: Vec<(u32, u32)> = rows.iter().map(|&row| self.place_of(row)).collect();
        let touched: BTreeSet<u32> = places.iter().map(|&(number, _)| number).collect();
        // First the disk learns that these rows are going, then they go: a row half overwritten
        // by a crash would otherwise look damaged.
        for &(number, offset) in &places {
            self.slots[number].segment.pages.mark_gone(offset, &mut self.writer)?;
        }
        for &number in &touched {
            self.slots[number].segment.pages.sync()?;
        }
        for pause in places.chunks(ERASE_ROWS_PER_PAUSE) {
            let mut quiet = self.writer.quiet(self.reader_wait)?;
            for &(number, offset) in pause {
                self.slots[number].segment.pages.scrub(offset, &MetaRecord::gone(), &mut quiet)?;
            }
            for same in pause.chunk_by(|a, b| block_of(a) == block_of(b)) {
                let (number, block) = block_of(&same[0]);
                let slot = &self.slots[number];
                // A block that is not full has no codes yet.
                if (block + 1) * BLOCK_ROWS as u32 <= slot.rows {
                    let offsets = same.iter().map(|&(_, offset)| offset);
                    clear_codes(&slot.segment.pages, slot.segment.identity, block, offsets, &mut quiet)?;
                }
            }
        }
        // A row may have been overwritten already, in a segment that was compacted.
        let wiped = self.wiped_and_not_synced();
        for &number in touched.iter().chain(&wiped) {
            self.slots[number].segment.pages.sync()?;
            self.slots[number].dirty = false;
        }
        let mut chains = self.shared.chains.write();
        for &row in rows {
            let subject = self.forgotten.remove(&row).expect("only forgotten rows are erased");
            chains.unlink(subject, row);
        }
        Ok(())
    }

    /// Makes what was published durable, as of the last publication's LSN. Rows appended since
    /// stay unseen by the manifest; rows forgotten and not erased are named in it.
    ///
    /// # Errors
    /// [`Error::Io`]: the writer stops, unless the error [left everything as it
    /// was](Error::left_all_as_it_was); then ask again. [`Error::Stopped`].
    pub fn checkpoint(&mut self) -> Result<(), Error> {
        self.running()?;
        let done = self.checkpoint_now();
        if done.as_ref().is_err_and(Error::left_all_as_it_was) {
            return done;
        }
        self.stop_if_failed(done)
    }

    pub(crate) fn checkpoint_now(&mut self) -> Result<(), Error> {
        for number in self.slots.order().to_vec() {
            let slot = &mut self.slots[number];
            if slot.dirty {
                slot.segment.pages.sync()?;
                slot.dirty = false;
            }
        }
        if self.dir_dirty {
            folder::sync_dir(&*self.storage, &self.dir)?;
            self.dir_dirty = false;
        }
        let view = Arc::clone(&self.shared.current.lock());
        let counted = |row: u32| {
            let (number, offset) = self.place_of(row);
            view.part(number).is_some_and(|part| offset < part.rows)
        };
        let entry = |part: &ViewSegment| SegmentEntry {
            identity: part.segment.identity,
            first_template: part.first_template.0,
            last_template: part.last_template.0,
            file: part.segment.file,
            rows: part.rows,
            slot: part.slot,
            reserved: 0,
        };
        let manifest = Manifest {
            geometry: self.shared.geometry,
            origin: self.origin,
            lsn: view.lsn,
            next_file: self.next_file,
            segments: view.segments.iter().map(entry).collect(),
            forgotten: self.forgotten.keys().copied().filter(|&row| counted(row)).collect(),
        };
        // Should its new name not become durable now, it does with the next checkpoint.
        self.dir_dirty = true;
        folder::write_manifest(&*self.storage, &self.dir, &manifest)?;
        self.dir_dirty = false;
        Ok(())
    }
}
