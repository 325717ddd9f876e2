//! Publishes what was appended and forgotten, and checkpoints publications.
//!
//! `FORMAT.md` has the order of the writes and why a crash between any two of them is harmless.
//!
//! Invariant: a manifest is written only after the rows that it counts, and their codes, are durable.

use std::sync::Arc;

use super::Index;
use super::slots::Slot;
use crate::error::Error;
use crate::format::{Manifest, SegmentEntry};
use crate::read::{PublishedSegment, Snapshot, View};
use crate::storage::directory;
use crate::types::Lsn;

impl Index {
    /// Makes everything appended and forgotten so far visible to readers, as of `lsn`, and returns it. Drop
    /// the snapshot before [`Index::erase`], which waits for it too.
    ///
    /// # Panics
    /// If `lsn` is less than the last published one.
    pub fn publish(&mut self, lsn: Lsn) -> Arc<Snapshot> {
        self.show_listed(lsn);
        let view = Arc::new(self.view(lsn));
        *self.shared.current.lock() = Arc::clone(&view);
        Snapshot::enter(&self.shared, |_| view)
    }

    /// What [`Index::publish`] would make visible now, without publishing it: for an engine that must have
    /// its copy of the rows before searches may see them. During a compaction it has more segments: those
    /// that may be published next, and those that running searches may still read. So rows may be in it
    /// twice, and it must not be searched.
    ///
    /// # Panics
    /// If `lsn` is less than the last published one.
    pub fn stage(&mut self, lsn: Lsn) -> Arc<Snapshot> {
        self.show_listed(lsn);
        let mut segments = self.segments_to_stage();
        let view = self.view(lsn);
        segments.extend(view.segments);
        let view = Arc::new(View::new(lsn, segments, view.live, view.dead));
        Snapshot::enter(&self.shared, |_| view)
    }

    fn show_listed(&mut self, lsn: Lsn) {
        assert!(lsn >= self.shared.current.lock().lsn, "changes are published in order");
        for (_, slot) in self.slots.listed() {
            slot.segment.pages.show(slot.rows, &mut self.token);
        }
    }

    /// The rows that count, for a publication.
    pub(crate) fn view(&self, lsn: Lsn) -> View {
        let segments = self.slots.listed().map_while(|(number, slot)| published_segment(number, slot));
        View::new(lsn, segments.collect(), self.contents.rows, self.dead)
    }

    /// Makes the last publication durable, as of its LSN. The manifest does not count rows appended since,
    /// and names rows that are forgotten and not yet erased.
    ///
    /// # Errors
    /// [`Error::Io`]: the writer stops, unless the step [changed nothing](Error::changed_nothing); then call
    /// again. [`Error::Stopped`].
    pub fn checkpoint(&mut self) -> Result<(), Error> {
        self.running()?;
        let done = self.checkpoint_now();
        if done.as_ref().is_err_and(Error::changed_nothing) {
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
            directory::sync_dir(&*self.storage, &self.dir)?;
            self.dir_dirty = false;
        }
        let view = Arc::clone(&self.shared.current.lock());
        let counted = |row: u32| {
            let (number, offset) = self.place_of(row);
            view.segment_in(number).is_some_and(|part| offset < part.rows)
        };
        let entry = |part: &PublishedSegment| SegmentEntry {
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
        // If the new name does not become durable now, the next checkpoint syncs it.
        self.dir_dirty = true;
        directory::write_manifest(&*self.storage, &self.dir, &manifest)?;
        self.dir_dirty = false;
        Ok(())
    }
}

/// The segment in a slot, for a publication; none before it has rows.
pub(crate) fn published_segment(number: u32, slot: &Slot) -> Option<PublishedSegment> {
    let (first_template, last_template) = slot.range?;
    Some(PublishedSegment {
        segment: Arc::clone(&slot.segment),
        live: slot.live.clone(),
        slot: number,
        rows: slot.rows,
        first_template,
        last_template,
    })
}
