//! The thread that reclaims the room of erased rows.
//!
//! It has a low priority and pauses four times as long as it works, so that searches and writes have
//! the machine to themselves nearly all the time.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use thenar_index::{Compacting, Error as IndexError};

use super::{Gallery, GalleryError, free_bytes};

/// Pause if there is nothing to compact.
pub(super) const PAUSE_IDLE: Duration = Duration::from_secs(1);
/// Pause after a failure.
const PAUSE_FAILED: Duration = Duration::from_secs(60);
/// How many times longer than a piece of work the pause after it is, within these bounds.
const PAUSE_FACTOR: u32 = 4;
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// The body of the thread: compacts until the gallery is closed.
pub fn compact_forever(gallery: &Gallery, reserve_bytes: u64) {
    lower_priority();
    while !gallery.closing.load(Ordering::Acquire) {
        std::thread::park_timeout(gallery.compact_and_pause(reserve_bytes));
    }
}

/// Gives this thread a low priority.
pub(super) fn lower_priority() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 10) {
        tracing::debug!(%error, "compaction runs at the priority of searches");
    }
}

impl Gallery {
    /// Does a piece of compaction, which takes some milliseconds, and leaves `reserve_bytes` of the disk free.
    /// The engine gets its copy of a new segment before searches see it. Returns whether there is more to do.
    ///
    /// # Errors
    /// [`GalleryError::Index`] if the index could not be written, or a row of it is damaged. Nothing
    /// is lost: searches go on, and the compaction starts again later.
    pub fn compact_some(&self, reserve_bytes: u64) -> Result<bool, GalleryError> {
        let mut writer = self.writer.lock();
        let Some(index) = writer.index.as_mut() else { return Ok(false) };
        let room_bytes = free_bytes(&self.setup.dir)?.saturating_sub(reserve_bytes);
        match index.compact(room_bytes) {
            Ok(Compacting::Nothing) => return Ok(false),
            Ok(Compacting::More) => {}
            Ok(Compacting::Staged) => self.follow_staged(index, self.lsn()),
            // A change that could not be applied in full comes first.
            Err(IndexError::Unpublished) => return Ok(false),
            Err(error) => {
                // A damaged segment is found and rewritten when the index is reopened.
                if index.is_stopped() || matches!(error, IndexError::Damaged { .. }) {
                    writer.index = None;
                }
                return Err(error.into());
            }
        }
        drop(writer);
        self.report();
        Ok(true)
    }

    /// [`Gallery::compact_some`], and how long to pause after that.
    pub(super) fn compact_and_pause(&self, reserve_bytes: u64) -> Duration {
        let began = Instant::now();
        match self.compact_some(reserve_bytes) {
            Ok(true) => (began.elapsed() * PAUSE_FACTOR).clamp(PAUSE_MIN, PAUSE_MAX),
            Ok(false) => PAUSE_IDLE,
            Err(error) => {
                tracing::warn!(%error, "the index could not be compacted; the next attempt is in a minute");
                PAUSE_FAILED
            }
        }
    }
}
