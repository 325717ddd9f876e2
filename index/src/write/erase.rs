//! Overwrites forgotten rows.
//!
//! `FORMAT.md` has the order of the writes and why a crash between any two of them is harmless.
//!
//! Invariant: a row and its codes are overwritten only after the disk has recorded that its erasure has
//! begun.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Index;
use super::encode::clear_codes;
use crate::codes::BLOCK_ROWS;
use crate::error::Error;
use crate::format::MetaRecord;
use crate::types::Row;

/// How many rows are overwritten before the barrier opens again to waiting readers.
const ERASE_ROWS_PER_PAUSE: usize = 1024;

/// The block of a row, by its slot and its offset.
fn block_of(&(slot, offset): &(u32, u32)) -> (u32, u32) {
    (slot, offset / BLOCK_ROWS as u32)
}

impl Index {
    /// Overwrites forgotten rows and their codes. When it returns, no byte of them is left in the index's
    /// files or maps, and none can come back. Rows that are already erased are skipped.
    ///
    /// Waits until no snapshot is held. Meanwhile a [`crate::Reader`] waits before it gives a new one, for
    /// as long as the running searches take. The caller must hold no snapshot.
    ///
    /// # Errors
    /// [`Error::NoSuchRow`], [`Error::StillLive`], and [`Error::Unpublished`] if nothing was published since
    /// [`Index::forget`]: nothing was done. [`Error::Readers`] if snapshots are held for longer than the
    /// writer waits: the rows stay forgotten, call again. [`Error::Io`]: the writer stops, and opening the
    /// index again finishes the erasure. [`Error::Stopped`].
    pub fn erase(&mut self, rows: &[Row]) -> Result<(), Error> {
        self.running()?;
        let mut to_erase = BTreeSet::new();
        let view = Arc::clone(&self.shared.current.lock());
        for &row in rows {
            let (number, offset) = self.place_of(row.0);
            let slot = self.slots.get(number).filter(|slot| offset < slot.rows).ok_or(Error::NoSuchRow { row })?;
            if slot.live.has(offset) {
                return Err(Error::StillLive { row });
            }
            // New snapshots still show the row as live.
            if view.segment_in(number).is_some_and(|part| part.live.has(offset)) {
                return Err(Error::Unpublished);
            }
            if self.forgotten.contains_key(&row.0) {
                to_erase.insert(row.0);
            }
        }
        drop(view);
        let erased = self.erase_checked(&to_erase);
        self.stop_if_failed(erased)
    }

    fn erase_checked(&mut self, rows: &BTreeSet<u32>) -> Result<(), Error> {
        let places: Vec<(u32, u32)> = rows.iter().map(|&row| self.place_of(row)).collect();
        let touched: BTreeSet<u32> = places.iter().map(|&(number, _)| number).collect();
        // The disk first records that these rows are being erased. Otherwise a row that a crash left half
        // overwritten would look damaged.
        for &(number, offset) in &places {
            self.slots[number].segment.pages.mark_gone(offset, &mut self.token)?;
        }
        for &number in &touched {
            self.slots[number].segment.pages.sync()?;
        }
        for pause in places.chunks(ERASE_ROWS_PER_PAUSE) {
            let mut exclusive = self.token.exclusive(self.reader_wait)?;
            for &(number, offset) in pause {
                self.slots[number].segment.pages.scrub(offset, &MetaRecord::erased(), &mut exclusive)?;
            }
            for same in pause.chunk_by(|a, b| block_of(a) == block_of(b)) {
                let (number, block) = block_of(&same[0]);
                let slot = &self.slots[number];
                // A block that is not full has no codes.
                if (block + 1) * BLOCK_ROWS as u32 <= slot.rows {
                    let offsets = same.iter().map(|&(_, offset)| offset);
                    clear_codes(&slot.segment.pages, slot.segment.identity, block, offsets, &mut exclusive)?;
                }
            }
        }
        // A compaction may have overwritten a row already, without a sync.
        let wiped = self.zeroed_and_not_synced();
        for &number in touched.iter().chain(&wiped) {
            self.slots[number].segment.pages.sync()?;
            self.slots[number].dirty = false;
        }
        let mut subject_rows = self.shared.subject_rows.write();
        for &row in rows {
            let subject = self.forgotten.remove(&row).expect("only forgotten rows are erased");
            subject_rows.unlink(subject, row);
        }
        Ok(())
    }
}
