//! Repairs what opening found, and turns it into an [`Index`].

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::Unrepaired;
use super::scan::Scan;
use super::unrepaired::Part;
use crate::codes::BLOCK_ROWS;
use crate::error::Error;
use crate::format::{Layout, MetaRecord, SegmentEntry};
use crate::read::LiveBits;
use crate::storage::readable::is_unreadable;
use crate::storage::{destroy, directory};
use crate::types::{OwnedRow, TemplateId};
use crate::write::{Index, Slot, file_numbers_exhausted, re_encode, write_segment};

impl Unrepaired {
    /// Writes a new file for a segment, with `rows`: every live template of the registry from the damage's
    /// first to its last template, ascending. [`Unrepaired::finish`] overwrites and removes the old file.
    ///
    /// # Errors
    /// [`Error::NoSuchSegment`], [`Error::Order`], [`Error::TemplateRange`], [`Error::RowLimit`],
    /// [`Error::Dim`], [`Error::Label`], [`Error::SubjectRange`] if a row is invalid; [`Error::Io`].
    pub fn replace_segment(&mut self, segment: usize, rows: Vec<OwnedRow>) -> Result<(), Error> {
        let entry = self.parts.get(segment).ok_or(Error::NoSuchSegment { segment })?.entry;
        let file = self.manifest.next_file;
        self.manifest.next_file = file.checked_add(1).ok_or_else(file_numbers_exhausted)?;
        let layout = Layout::of(self.manifest.geometry);
        let range = (TemplateId(entry.first_template), TemplateId(entry.last_template));
        let (new, count) =
            write_segment(&*self.storage, &self.dir, file, layout, &mut self.token, range, rows.into_iter())?;
        directory::sync_dir(&*self.storage, &self.dir)?;
        let scan = Scan::of_new(layout.capacity, count);
        let entry = SegmentEntry { identity: new.identity, file, rows: count, ..entry };
        let old = std::mem::replace(&mut self.parts[segment], Part { entry, found: Some((new, scan)) });
        self.manifest.segments[segment] = entry;
        let rows = self.manifest.geometry.segment_rows;
        self.manifest.forgotten.retain(|row| row / rows != entry.slot);
        self.damage.retain(|damage| damage.segment != segment);
        self.codes_damage.retain(|damage| damage.segment != segment);
        self.obsolete.push(self.dir.join(directory::file_name(old.entry.file)));
        self.replaced = true;
        Ok(())
    }

    /// Finishes what a crash interrupted and opens the index to readers.
    ///
    /// If the index is being opened again, this waits until no snapshot of it is held. From then on the old
    /// reader [is retired](crate::Reader::is_retired), whether this succeeds or not.
    ///
    /// # Errors
    /// [`Error::Damaged`] if there is damage, and [`Error::Readers`]: nothing was done. [`Error::Io`] if a
    /// repair could not be written. An obsolete file that cannot be overwritten because of a disk error is
    /// only [reported](Index::left_over).
    pub fn finish(mut self) -> Result<Index, Error> {
        if let Some(first) = self.damage.first() {
            return Err(Error::Damaged { count: self.damage.len(), first: Box::new(first.clone()) });
        }
        if let Some(before) = &mut self.before {
            before.retire(self.reader_wait)?;
        }
        // An earlier process may have renamed the manifest without syncing the folder. Rows that only the
        // manifest before it counts must not be overwritten while that one can come back.
        directory::sync_dir(&*self.storage, &self.dir)?;
        self.finish_erasures()?;
        if self.replaced {
            // All forgotten rows are erased and synced by now.
            self.manifest.forgotten.clear();
            directory::write_manifest(&*self.storage, &self.dir, &self.manifest)?;
        }
        let mut removed = false;
        for path in std::mem::take(&mut self.obsolete) {
            match destroy(&*self.storage, &path) {
                // The damage was that the file is missing.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                // No manifest names it, so it is not served. The next opening tries again.
                Err(Error::Io { source, .. }) if is_unreadable(&source) => self.left_over.push(path),
                destroyed => destroyed?,
            }
            removed = true;
        }
        directory::remove_new_manifest(&*self.storage, &self.dir)?;
        if removed {
            directory::sync_dir(&*self.storage, &self.dir)?;
        }
        Ok(self.into_index())
    }

    /// Erases rows that the manifest calls forgotten or whose erasure has begun, and scrubs rows that the
    /// manifest does not count: they may be templates of people who were forgotten since. Then makes their
    /// codes follow.
    fn finish_erasures(&mut self) -> Result<(), Error> {
        let segment_rows = self.manifest.geometry.segment_rows;
        for part in &mut self.parts {
            let (segment, scan) = part.found.as_mut().expect("no segment is damaged");
            let forgotten: Vec<u32> = self
                .manifest
                .forgotten
                .iter()
                .filter(|&row| row / segment_rows == part.entry.slot)
                .map(|row| row % segment_rows)
                .collect();
            let mut erased = std::mem::take(&mut scan.half_erased);
            let live: Vec<u32> = forgotten.into_iter().filter(|&offset| scan.is_live(offset)).collect();
            for &offset in &live {
                segment.pages.mark_gone(offset, &mut self.token)?;
            }
            // Also if only interrupted erasures were found: their states may not have reached the disk.
            if !live.is_empty() || !erased.is_empty() {
                segment.pages.sync()?;
            }
            for offset in live {
                scan.live[offset as usize / 64] &= !(1 << (offset % 64));
                scan.live_count -= 1;
                scan.erased += 1;
                erased.push(offset);
            }
            // There are no readers, so this does not wait.
            let mut exclusive = self.token.exclusive(Duration::ZERO)?;
            for &offset in &erased {
                segment.pages.scrub(offset, &MetaRecord::erased(), &mut exclusive)?;
            }
            for &offset in &scan.stale {
                segment.pages.scrub(offset, &MetaRecord::unwritten(), &mut exclusive)?;
            }
            // Codes follow once the rows have their final contents.
            let mut codes: BTreeSet<u32> = scan.unfinished_codes.drain(..).chain(scan.wrong_codes.drain(..)).collect();
            let full = part.entry.rows / BLOCK_ROWS as u32;
            codes.extend(erased.iter().map(|offset| offset / BLOCK_ROWS as u32).filter(|&block| block < full));
            for &block in &codes {
                re_encode(&segment.pages, segment.identity, block, &mut exclusive)?;
            }
            for &block in &scan.stale_codes {
                segment.pages.scrub_codes(block, &mut exclusive)?;
            }
            drop(exclusive);
            if !(erased.is_empty() && scan.stale.is_empty() && codes.is_empty() && scan.stale_codes.is_empty()) {
                segment.pages.sync()?;
                scan.stale.clear();
                scan.stale_codes.clear();
            }
        }
        Ok(())
    }

    /// Opens the repaired index to readers.
    fn into_index(self) -> Index {
        let Self { lock, storage, manifest, reader_barrier, token, parts, left_over, .. } = self;
        let mut index = Index::empty(storage, lock, (reader_barrier, token), &manifest);
        for Part { entry, found } in parts {
            let (segment, scan) = found.expect("no segment is damaged");
            let range = Some((TemplateId(entry.first_template), TemplateId(entry.last_template)));
            let (segment, live) = (Arc::new(segment), LiveBits::of(scan.live));
            let slot = Slot { segment, live, rows: entry.rows, range, dirty: false, listed: false };
            index.add_opened(entry.slot, slot, scan.erased);
        }
        index.left_over = left_over;
        drop(index.publish(manifest.lsn));
        index
    }
}
