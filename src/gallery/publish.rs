//! Following the log: applies records to the index, publishes them to searches, erases what they removed,
//! and reopens an index that failed.

use std::sync::atomic::Ordering;

use thenar_index::{Error as IndexError, Index, Lsn, Row};

use super::progress::{Progress, REPLAY_CHUNK};
use super::{Gallery, GalleryError, free_bytes, open};
use crate::engine::GalleryView;
use crate::registry::LogRecord;

/// Rows and erasures after which the index is checkpointed, so that a replay stays short.
const CHECKPOINT_ROWS: u64 = 65_536;
/// Room that must be left on the disk, beyond what the replay takes, before an index is reopened.
const REOPEN_FREE_BYTES: u64 = 4 << 20;

/// What only the thread that applies changes touches.
pub(super) struct Writer {
    /// `None` after a failure, until it is reopened.
    pub(super) index: Option<Index>,
    pub(super) progress: Progress,
    pub(super) since_checkpoint: u64,
}

impl Gallery {
    /// Applies the records of one commit: shows them to searches, then erases what they removed.
    /// Skips records that are already applied and reads missing ones from the registry.
    ///
    /// # Errors
    /// [`GalleryError`] if the index could not follow. The change stays in the registry; the next call
    /// catches up, after reopening the index if necessary.
    pub fn apply(&self, records: &[LogRecord]) -> Result<(), GalleryError> {
        let mut writer = self.writer.lock();
        if let Some(last) = records.last() {
            self.registry_lsn.fetch_max(last.lsn.0, Ordering::AcqRel);
        }
        let result = self.apply_locked(&mut writer, records);
        if let Err(error) = &result {
            tracing::error!(%error, "the index could not follow the registry; it catches up with the next write");
            if !writer.goes_on_after(error) {
                writer.index = None;
            }
        }
        self.report();
        result
    }

    /// Reads what is missing from the registry's log, up to `last` at least.
    ///
    /// # Errors
    /// As [`Gallery::apply`].
    pub fn catch_up(&self, last: Lsn) -> Result<(), GalleryError> {
        self.registry_lsn.fetch_max(last.0, Ordering::AcqRel);
        self.apply(&[])
    }

    fn apply_locked(&self, writer: &mut Writer, records: &[LogRecord]) -> Result<(), GalleryError> {
        if writer.index.is_none() {
            self.reopen(writer)?;
        }
        let Writer { index, progress, since_checkpoint } = &mut *writer;
        let index = index.as_mut().expect("reopened above");
        let fresh = &records[records.partition_point(|r| r.lsn <= progress.given)..];
        let given = progress.given.0;
        let gap = fresh.first().map_or(self.registry_lsn.load(Ordering::Acquire) > given, |r| r.lsn.0 != given + 1);
        if gap {
            loop {
                let missed = self.setup.registry.log_after(progress.given, REPLAY_CHUNK)?;
                if missed.is_empty() {
                    break;
                }
                *since_checkpoint += missed.len() as u64;
                progress.give(index, &self.setup.sealer, &missed)?;
            }
        } else {
            *since_checkpoint += fresh.len() as u64;
            progress.give(index, &self.setup.sealer, fresh)?;
        }
        let last = progress.given;
        self.left_out.store(progress.left_out.len() as u64, Ordering::Release);
        if last > self.lsn() {
            // The engine has its copy before any search sees the rows.
            self.follow_staged(index, last);
            drop(index.publish(last));
            self.lsn.store(last.0, Ordering::Release);
        }
        // Includes rows that could not be erased earlier, and copies made by a compaction.
        let to_erase = index.forgotten();
        if !to_erase.is_empty() {
            // Waits for the searches that began before these rows were removed and may still find them.
            index.erase(&to_erase)?;
            self.erase_in_engine(&to_erase);
        }
        if *since_checkpoint >= CHECKPOINT_ROWS
            && let Err(error) = writer.checkpoint()
        {
            // The change is in force nevertheless.
            tracing::error!(%error, "the index could not be checkpointed");
        }
        Ok(())
    }

    /// Overwrites the engine's copy of rows that no search finds any more.
    fn erase_in_engine(&self, rows: &[Row]) {
        let rows: Vec<u32> = rows.iter().map(|row| row.0).collect();
        if let Err(error) = self.engine.erase(&rows) {
            tracing::error!(%error, "the engine could not erase rows; its memory is given up");
        }
    }

    pub(super) fn follow_staged(&self, index: &mut Index, lsn: Lsn) {
        let staged = index.stage(lsn);
        if let Err(error) = self.engine.follow(&GalleryView::of(&staged)) {
            tracing::error!(%error, "the engine could not follow the gallery");
        }
    }

    /// Opens a failed index again. Searches continue over the old one while its files are checked, and
    /// keep doing so if the check fails. After the check, running searches are waited for and new ones wait
    /// until everything is replayed.
    fn reopen(&self, writer: &mut Writer) -> Result<(), GalleryError> {
        let before = self.reader.read().clone();
        if before.is_some() {
            let behind = self.registry_lsn.load(Ordering::Acquire).saturating_sub(self.lsn().0);
            let needed = REOPEN_FREE_BYTES + behind * replay_bytes(self.setup.dim);
            let free_bytes = free_bytes(&self.setup.dir)?;
            if free_bytes < needed {
                return Err(GalleryError::DiskFull { path: self.setup.dir.clone(), free_bytes });
            }
        }
        let checked = open::check(&self.setup, before.as_ref())?;
        let mut reader = self.reader.write();
        let opened = checked.finish(&self.setup, before.as_ref());
        if before.is_some_and(|before| before.is_retired()) {
            *reader = None;
        }
        let (index, progress, report) = opened?;
        let snapshot = index.snapshot();
        // Rows since the last checkpoint may have other numbers now, in segments of the same identity.
        let nothing = GalleryView { dim: self.setup.dim, segments: Vec::new() };
        for view in [nothing, GalleryView::of(&snapshot)] {
            if let Err(error) = self.engine.follow(&view) {
                tracing::error!(%error, "the engine could not take the gallery");
            }
        }
        let lsn = snapshot.lsn();
        // The views made the engine drop its copies of rows; its scratch may still hold some.
        self.erase_in_engine(&[]);
        drop(snapshot);
        self.lsn.store(lsn.0, Ordering::Release);
        self.registry_lsn.fetch_max(lsn.0, Ordering::AcqRel);
        *reader = Some(index.reader());
        self.left_out.store(progress.left_out.len() as u64, Ordering::Release);
        *writer = Writer { index: Some(index), progress, since_checkpoint: 0 };
        tracing::info!(took_ms = report.took.as_millis(), replayed = report.replayed, "the index is open again");
        Ok(())
    }

    /// Whether some forgotten rows could not be erased yet. [`Gallery::catch_up`] tries again.
    #[must_use]
    pub fn has_rows_to_erase(&self) -> bool {
        self.writer.lock().index.as_ref().is_some_and(|index| !index.forgotten().is_empty())
    }

    /// Checkpoints if anything changed since the last time. Reopens a failed index, unless a waiting
    /// write is going to do so.
    ///
    /// # Errors
    /// [`GalleryError`] if the index cannot be written or opened.
    pub fn checkpoint(&self) -> Result<(), GalleryError> {
        let mut writer = self.writer.lock();
        if writer.index.is_none() && self.registry_lsn.load(Ordering::Acquire) <= self.lsn().0 {
            self.reopen(&mut writer)?;
        }
        Ok(writer.checkpoint()?)
    }
}

impl Writer {
    /// Whether the index has everything it had before this error, so that the rest can be given to it again.
    fn goes_on_after(&self, error: &GalleryError) -> bool {
        let runs = self.index.as_ref().is_some_and(|index| !index.is_stopped());
        runs && match error {
            GalleryError::Registry(_) | GalleryError::Index(IndexError::Readers { .. }) => true,
            GalleryError::Index(error) => error.changed_nothing(),
            _ => false,
        }
    }

    fn checkpoint(&mut self) -> Result<(), IndexError> {
        let Some(index) = self.index.as_mut().filter(|_| self.since_checkpoint > 0) else { return Ok(()) };
        let done = index.checkpoint();
        if index.is_stopped() {
            self.index = None;
        }
        done?;
        self.since_checkpoint = 0;
        Ok(())
    }
}

/// About what a replayed template takes on the disk: its record, its row and its codes.
fn replay_bytes(dim: usize) -> u64 {
    128 + 4 * dim as u64
}
