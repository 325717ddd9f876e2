//! The live gallery: the index and the engine, following the registry's log.
//!
//! [`Gallery::apply`] takes the records of a commit, shows them to searches and erases what they
//! removed; when it returns, the next search sees the change, and no byte of a forgotten template
//! is left in the index's files, its map or the engine. Searches come through
//! [`Searcher`], which the gallery implements.
//!
//! - `open`: brings the index up at a start, and after a failure or a loss.
//! - `publish`: follows the log while searches run.
//! - `progress`: what a record of the log does to an index.
//! - `compaction`: reclaims the room of erased rows.
//!
//! Knows the index, the log and the engine. Does not know who asked for a change, or scores.
//!
//! A template that cannot be opened is damage of the registry: it is reported and left out, and the
//! others are served.
//!
//! Invariants: records are applied in order of LSN, each once; one thread applies at a time; the
//! engine follows rows before searches see them, and erases them when no search does; an index that
//! failed to write is never trusted again but reopened and replayed, and searches go on over what was in
//! force until its files are changed.

mod compaction;
mod error;
mod open;
mod progress;
mod publish;
mod status;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use thenar_index::storage::Storage;
use thenar_index::{Lsn, Origin, Reader, Snapshot};

pub use self::compaction::compact_forever;
pub use self::error::GalleryError;
pub use self::open::{OpenReport, claim};
use self::publish::Writer;
pub use self::status::GalleryStatus;
use crate::engine::failover::Failover;
use crate::engine::{CandidateRows, Engine, GalleryView};
use crate::registry::Registry;
use crate::search::batch::{Priority, Searcher};
use crate::search::{Answer, BatchTiming, Search, SearchError, plan};
use crate::vault::Sealer;

/// What a gallery is made of, the same for its whole life.
pub struct Setup {
    /// Folder of the index's files.
    pub dir: PathBuf,
    /// How they are read and written.
    pub storage: Arc<dyn Storage>,
    /// Components of a row.
    pub dim: usize,
    /// The gallery, and the key that rotated its rows.
    pub origin: Origin,
    /// The system of record.
    pub registry: Arc<dyn Registry>,
    /// Opens templates.
    pub sealer: Arc<Sealer>,
}

/// The live gallery.
pub struct Gallery {
    setup: Setup,
    engine: Arc<dyn Engine>,
    /// The same engine, if it is a preferred one with a standby.
    failover: Option<Arc<Failover>>,
    /// `None` only if an index that was being reopened could not be finished. Nothing is searched
    /// then, since an answer over less than the gallery would be wrong.
    reader: RwLock<Option<Reader>>,
    writer: Mutex<Writer>,
    lsn: AtomicU64,
    registry_lsn: AtomicU64,
    /// Templates that are left out because they cannot be opened.
    left_out: AtomicU64,
    closing: AtomicBool,
    opened: OpenReport,
}

impl Gallery {
    /// Opens the index, repairs and replays it, and brings the engine up to it.
    ///
    /// # Errors
    /// [`GalleryError`] if neither the index nor the registry can give the gallery.
    pub fn open(setup: Setup, engine: Arc<dyn Engine>, failover: Option<Arc<Failover>>) -> Result<Self, GalleryError> {
        let started = Instant::now();
        let (index, progress, mut opened) = open::check(&setup, None)?.finish(&setup, None)?;
        let reader = index.reader();
        let lsn = {
            let snapshot = reader.snapshot();
            if let Err(error) = engine.follow(&GalleryView::of(&snapshot)) {
                tracing::error!(%error, "the engine could not take the gallery");
            }
            snapshot.lsn()
        };
        opened.took = started.elapsed();
        let gallery = Self {
            setup,
            engine,
            failover,
            reader: RwLock::new(Some(reader)),
            left_out: AtomicU64::new(progress.left_out.len() as u64),
            writer: Mutex::new(Writer { index: Some(index), progress, since_checkpoint: 0 }),
            lsn: AtomicU64::new(lsn.0),
            registry_lsn: AtomicU64::new(lsn.0),
            closing: AtomicBool::new(false),
            opened,
        };
        gallery.report();
        Ok(gallery)
    }

    /// What searches see now; `None` while the index is lost. Hold it for one search only.
    #[must_use]
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.reader.read().as_ref().map(Reader::snapshot)
    }

    /// The last change that searches see.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        Lsn(self.lsn.load(Ordering::Acquire))
    }

    /// Ends [`recover_engine_forever`] and [`compact_forever`].
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

impl Searcher for Gallery {
    fn search(
        &self,
        searches: &[&Search],
        priority: Priority,
        candidates: &mut CandidateRows,
    ) -> Result<(Vec<Answer>, BatchTiming), SearchError> {
        let snapshot = self.snapshot().ok_or(SearchError::IndexLost)?;
        let yields = priority == Priority::Low;
        Ok(plan::search_batch(&*self.engine, &snapshot, searches, yields, candidates)?)
    }
}

/// The body of the thread that brings a lost engine back while its standby answers.
pub fn recover_engine_forever(gallery: &Gallery) {
    const PAUSE: Duration = Duration::from_millis(500);
    let Some(failover) = &gallery.failover else { return };
    while !gallery.closing.load(Ordering::Acquire) {
        if !failover.is_preferred_answering()
            && let Some(snapshot) = gallery.snapshot()
        {
            failover.mend(&GalleryView::of(&snapshot));
        }
        std::thread::park_timeout(PAUSE);
    }
}

/// Room left on the disk of `path`.
///
/// # Errors
/// [`GalleryError::Folder`] if the operating system does not say.
pub fn free_bytes(path: &Path) -> Result<u64, GalleryError> {
    let stat =
        rustix::fs::statvfs(path).map_err(|e| GalleryError::Folder { path: path.to_owned(), source: e.into() })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
