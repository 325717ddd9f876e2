//! The live gallery: the index and the engine, following the registry's log.
//!
//! [`Gallery::apply`] takes the records a commit made, shows them to searches and erases what they
//! took away; when it returns, the next search sees the change, and no byte of a forgotten template
//! is left in the index's files, its map or the engine. [`open`] brings the index up after a
//! restart or a loss.
//!
//! Knows the index, the log and the engine. Does not know who asked for a change, or scores.
//!
//! A template that does not open is damage of the registry: it is reported and left out, and the others
//! are served.
//!
//! Invariants: records are applied in order of LSN, each once; one thread applies at a time; the
//! engine follows rows before searches see them, and erases them when no search does; an index that
//! failed to write is never trusted again but reopened and replayed, and searches go on over what was in
//! force until its files are changed.

pub mod open;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use self::open::claim;
use parking_lot::{Mutex, RwLock};
use thenar_index::storage::Storage;
use thenar_index::{
    Compacting, Error as IndexError, GalleryId, Index, Lsn, NewRow, Origin, Reader, Row, Snapshot, SubjectNumber,
    TemplateId, source_of,
};

use crate::engine::failover::Failover;
use crate::engine::{CandidateRows, Engine, EngineDescription, GalleryView, Yielding};
use crate::model::TemplateRow;
use crate::registry::{Event, LogRecord, Registry, RegistryError, StoredTemplate};
use crate::search::batch::{Priority, Searcher};
use crate::search::{Answer, BatchTiming, Search, SearchError, plan};
use crate::telemetry;
use crate::vault::Sealer;

/// Rows and erasures after which the index is checkpointed, so that a replay stays short.
const CHECKPOINT_ROWS: u64 = 65_536;
/// Room a reopened index needs to be sure of getting through.
const REOPEN_FREE_BYTES: u64 = 4 << 20;
/// Between looks at whether there is something to compact.
const COMPACTION_IDLE: Duration = Duration::from_secs(1);
/// Log records read at once while catching up.
pub(crate) const REPLAY_CHUNK: usize = 4096;

/// Why the gallery could not follow the registry.
#[derive(Debug, thiserror::Error)]
pub enum GalleryError {
    /// The index failed.
    #[error("the index: {0}")]
    Index(#[source] thenar_index::Error),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The index is that of another gallery than the registry.
    #[error(
        "the registry is that of gallery {registry}, but the index in {} is that of gallery {index}: one of them is from \
         another data folder. Put the registry back that belongs here. If this registry is the right one, remove the \
         index folder, and the index is made anew",
        dir.display()
    )]
    Swapped {
        /// The index's folder.
        dir: PathBuf,
        /// Whose index it is.
        index: GalleryId,
        /// Whose registry it is.
        registry: GalleryId,
    },
    /// An index made from the registry's log is not what the registry says its templates are.
    #[error(
        "the registry contradicts itself: its change log does not lead to the templates it counts. It is damaged; \
         restore it from a backup"
    )]
    Contradiction,
    /// The disk has too little room to bring the index up to the registry.
    #[error("the disk of {} has {free_bytes} bytes left; the index follows once there is room", path.display())]
    DiskFull {
        /// The index's folder.
        path: PathBuf,
        /// Room that is left.
        free_bytes: u64,
    },
    /// The folder of the data could not be used.
    #[error("could not use {}: {source}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl From<thenar_index::Error> for GalleryError {
    fn from(error: thenar_index::Error) -> Self {
        match error {
            thenar_index::Error::WrongGallery { dir, expected, found } => {
                Self::Swapped { dir, index: found, registry: expected }
            }
            error => Self::Index(error),
        }
    }
}

/// What a gallery is made of, the same for its whole life.
pub struct Setup {
    /// Folder of the index's files.
    pub dir: PathBuf,
    /// What they are read and written through.
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
    standby: Option<Arc<Failover>>,
    /// `None` only if an index that was being opened again could not be finished; nothing is searched
    /// then, since an answer over less than the gallery would be a lie.
    reader: RwLock<Option<Reader>>,
    writer: Mutex<Writer>,
    lsn: AtomicU64,
    registry_lsn: AtomicU64,
    /// Templates that are left out since they do not open.
    left_out: AtomicU64,
    closing: AtomicBool,
    opened: open::OpenReport,
}

struct Writer {
    /// `None` after a failure, until it is reopened.
    index: Option<Index>,
    progress: Progress,
    since_checkpoint: u64,
}

/// Templates that do not open, with their subjects.
pub(crate) type LeftOut = BTreeMap<TemplateId, SubjectNumber>;

/// How far an index has followed the log.
pub(crate) struct Progress {
    /// The last change that it has whole, whether searches see it or not.
    pub(crate) given: Lsn,
    /// What is left out of it for that.
    pub(crate) left_out: LeftOut,
}

/// The gallery in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GalleryStatus {
    /// Live templates.
    pub templates: u64,
    /// Rows erased and not reclaimed.
    pub tombstones: u64,
    /// Templates of the registry that do not open and are left out.
    pub left_out: u64,
    /// The last change searches see.
    pub lsn: Lsn,
    /// The registry's last change known here.
    pub registry_lsn: Lsn,
    /// Index files in the address space.
    pub mapped_bytes: u64,
    /// What the index holds in main memory.
    pub index_bytes: u64,
    /// The engine that answers now.
    pub engine: EngineDescription,
    /// Whether that is the engine that was chosen.
    pub preferred: bool,
    /// How the gallery was opened.
    pub opened: open::OpenReport,
}

impl GalleryStatus {
    /// Where no gallery has been opened yet.
    #[must_use]
    pub fn nothing(engine: EngineDescription) -> Self {
        Self {
            templates: 0,
            tombstones: 0,
            lsn: Lsn(0),
            registry_lsn: Lsn(0),
            mapped_bytes: 0,
            index_bytes: 0,
            engine,
            preferred: true,
            left_out: 0,
            opened: open::OpenReport::default(),
        }
    }
}

impl Gallery {
    /// Opens the index, repairs and replays it, and brings the engine up to it.
    ///
    /// # Errors
    /// [`GalleryError`] where neither the index nor the registry can give the gallery.
    pub fn open(setup: Setup, engine: Arc<dyn Engine>, standby: Option<Arc<Failover>>) -> Result<Self, GalleryError> {
        let started = std::time::Instant::now();
        let (index, progress, mut opened) = open::check(&setup, None)?.finish(&setup, None)?;
        let reader = index.reader();
        let lsn = {
            let snapshot = reader.snapshot();
            if let Err(error) = engine.follow(&plan::view(&snapshot)) {
                tracing::error!(%error, "the engine could not take the gallery");
            }
            snapshot.lsn()
        };
        opened.took = started.elapsed();
        let gallery = Self {
            setup,
            engine,
            standby,
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

    /// What searches see now, unless the index is lost at the moment. Hold it for one search.
    #[must_use]
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.reader.read().as_ref().map(Reader::snapshot)
    }

    /// The last change searches see.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        Lsn(self.lsn.load(Ordering::Acquire))
    }

    /// Applies the records of one commit: shows them to searches, then erases what they took away.
    /// Records already applied are skipped, missing ones are read from the registry.
    ///
    /// # Errors
    /// [`GalleryError`] if the index could not follow. The change stays in the registry; the next call
    /// catches up, over an index that is opened again if that is needed.
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
        // Those of before too, where they could not be erased; and copies that a compaction made.
        let to_erase = index.forgotten();
        if !to_erase.is_empty() {
            // Waits for the searches that began before these rows went, which may still find them.
            index.erase(&to_erase)?;
            self.erase_in_engine(&to_erase);
        }
        if *since_checkpoint >= CHECKPOINT_ROWS
            && let Err(error) = writer.checkpoint()
        {
            // The change is in force all the same.
            tracing::error!(%error, "the index could not be checkpointed");
        }
        Ok(())
    }

    /// Overwrites what the engine has of rows that no search finds any more.
    fn erase_in_engine(&self, rows: &[Row]) {
        let rows: Vec<u32> = rows.iter().map(|row| row.0).collect();
        if let Err(error) = self.engine.erase(&rows) {
            tracing::error!(%error, "the engine could not erase rows; its memory is given up");
        }
    }

    fn follow_staged(&self, index: &mut Index, lsn: Lsn) {
        let staged = index.stage(lsn);
        if let Err(error) = self.engine.follow(&plan::view(&staged)) {
            tracing::error!(%error, "the engine could not follow the gallery");
        }
    }

    /// Does a piece of compaction, of some milliseconds, leaving `reserve_bytes` of the disk free. The
    /// engine has its copy of a new segment before searches see it. Returns whether there is more to do.
    ///
    /// # Errors
    /// [`GalleryError::Index`] where the index could not be written, or a row of it is damaged. Nothing
    /// is lost: searches go on, and the compaction begins anew later.
    pub fn compact_some(&self, reserve_bytes: u64) -> Result<bool, GalleryError> {
        let mut writer = self.writer.lock();
        let Some(index) = writer.index.as_mut() else { return Ok(false) };
        let room_bytes = free_bytes(&self.setup.dir)?.saturating_sub(reserve_bytes);
        match index.compact(room_bytes) {
            Ok(Compacting::Nothing) => return Ok(false),
            Ok(Compacting::More) => {}
            Ok(Compacting::Staged) => self.follow_staged(index, self.lsn()),
            // A change that could not be applied whole comes first.
            Err(IndexError::Unpublished) => return Ok(false),
            Err(error) => {
                // A damaged segment is found and made anew when the index is opened again.
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

    /// [`Gallery::compact_some`], and how long to leave the machine to others after that.
    fn compact_and_pause(&self, reserve_bytes: u64) -> Duration {
        const AGAIN: Duration = Duration::from_secs(60);
        const PAUSES: u32 = 4;
        const PAUSE_MIN: Duration = Duration::from_millis(2);
        const PAUSE_MAX: Duration = Duration::from_millis(50);
        let began = Instant::now();
        match self.compact_some(reserve_bytes) {
            Ok(true) => (began.elapsed() * PAUSES).clamp(PAUSE_MIN, PAUSE_MAX),
            Ok(false) => COMPACTION_IDLE,
            Err(error) => {
                tracing::warn!(%error, "the index could not be compacted; it is tried again in a minute");
                AGAIN
            }
        }
    }

    /// Opens a failed index again. Searches go on over the old one while its files are checked, and for
    /// good if that fails. Then those that run are waited for and new ones wait, until everything is
    /// replayed.
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
        let nothing = GalleryView { dim: self.setup.dim, blocks: Vec::new() };
        for view in [nothing, plan::view(&snapshot)] {
            if let Err(error) = self.engine.follow(&view) {
                tracing::error!(%error, "the engine could not take the gallery");
            }
        }
        let lsn = snapshot.lsn();
        // The views gave up what it had of rows; what it worked in may still hold some.
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

    /// Whether rows that are forgotten could not be erased yet. [`Gallery::catch_up`] tries again.
    #[must_use]
    pub fn has_rows_to_erase(&self) -> bool {
        self.writer.lock().index.as_ref().is_some_and(|index| !index.forgotten().is_empty())
    }

    /// Checkpoints if anything changed since the last time. Opens a failed index again, unless a write
    /// that waits for it is to do so.
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

    /// Brings a lost engine back, if one is lost. Called from time to time by [`mend_forever`].
    fn mend(&self) {
        let Some(standby) = &self.standby else { return };
        if standby.is_preferred_answering() {
            return;
        }
        if let Some(snapshot) = self.snapshot() {
            standby.mend(&plan::view(&snapshot));
        }
    }

    /// Lets [`mend_forever`] and [`compact_forever`] end.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// The gallery in numbers; all zero where the index is lost.
    #[must_use]
    pub fn status(&self) -> GalleryStatus {
        let snapshot = self.snapshot();
        let count = |of: fn(&Snapshot) -> u64| snapshot.as_deref().map_or(0, of);
        GalleryStatus {
            templates: count(Snapshot::live),
            tombstones: count(Snapshot::erased),
            left_out: self.left_out.load(Ordering::Acquire),
            lsn: self.lsn(),
            registry_lsn: Lsn(self.registry_lsn.load(Ordering::Acquire)),
            mapped_bytes: count(Snapshot::mapped_bytes),
            index_bytes: count(Snapshot::host_bytes),
            engine: self.engine.describe(),
            preferred: self.standby.as_ref().is_none_or(|s| s.is_preferred_answering()),
            opened: self.opened.clone(),
        }
    }

    fn report(&self) {
        let Some((live, erased)) = self.snapshot().map(|s| (s.live(), s.erased())) else { return };
        let lag = self.registry_lsn.load(Ordering::Acquire).saturating_sub(self.lsn().0);
        telemetry::gallery(live, erased, lag);
        telemetry::left_out(self.left_out.load(Ordering::Acquire));
        let engine = self.engine.describe();
        telemetry::engine_memory(engine.kind, engine.host_bytes, engine.device_bytes);
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
        let engine: &dyn Engine = match priority {
            Priority::High => &*self.engine,
            Priority::Low => &Yielding(&*self.engine),
        };
        Ok(plan::search_batch(engine, &snapshot, searches, candidates)?)
    }
}

impl Writer {
    /// Whether the index has all it had before this error, so that the rest can be given to it again.
    fn goes_on_after(&self, error: &GalleryError) -> bool {
        let runs = self.index.as_ref().is_some_and(|index| !index.is_stopped());
        runs && match error {
            GalleryError::Registry(_) | GalleryError::Index(IndexError::Readers { .. }) => true,
            GalleryError::Index(error) => error.left_all_as_it_was(),
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

/// Room left on the disk of `path`.
///
/// # Errors
/// [`GalleryError::Folder`] where the system does not say.
pub fn free_bytes(path: &std::path::Path) -> Result<u64, GalleryError> {
    let stat =
        rustix::fs::statvfs(path).map_err(|e| GalleryError::Folder { path: path.to_owned(), source: e.into() })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The thread that brings a lost engine back while the CPU engine answers.
pub fn mend_forever(gallery: &Gallery) {
    const PAUSE: Duration = Duration::from_millis(500);
    while !gallery.closing.load(Ordering::Acquire) {
        gallery.mend();
        std::thread::park_timeout(PAUSE);
    }
}

/// The thread that takes the room of erased rows back. At a low priority, and with pauses four times as
/// long as its work, so that searches and writes have the machine to themselves nearly all the time.
pub fn compact_forever(gallery: &Gallery, reserve_bytes: u64) {
    yield_to_others();
    while !gallery.closing.load(Ordering::Acquire) {
        std::thread::park_timeout(gallery.compact_and_pause(reserve_bytes));
    }
}

/// Gives this thread a low priority.
fn yield_to_others() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 10) {
        tracing::debug!(%error, "compaction runs at the priority of searches");
    }
}

impl Progress {
    /// Of an index that has everything up to `given`.
    pub(crate) fn new(given: Lsn) -> Self {
        Self { given, left_out: LeftOut::new() }
    }

    /// Gives records to the index without publishing them. Some may be given even if this fails.
    pub(crate) fn give(
        &mut self,
        index: &mut Index,
        sealer: &Sealer,
        records: &[LogRecord],
    ) -> Result<(), GalleryError> {
        let mut added: Vec<(&StoredTemplate, TemplateRow)> = Vec::new();
        for record in records {
            match &record.event {
                // Deleted since: the record that says so follows.
                Event::Added { template: None, .. } => {}
                Event::Added { template: Some(template), .. } => match open_template(sealer, template) {
                    Some(row) => added.push((template, row)),
                    None => drop(self.left_out.insert(template.id, template.subject)),
                },
                Event::Removed { id, .. } => {
                    append(index, &mut added)?;
                    index.forget_template(*id);
                    self.left_out.remove(id);
                }
                Event::Forgotten { subject } => {
                    append(index, &mut added)?;
                    index.forget(*subject);
                    self.left_out.retain(|_, of| of != subject);
                }
            }
            // Those in `added` are appended together.
            if added.is_empty() {
                self.given = record.lsn;
            }
        }
        append(index, &mut added)?;
        self.given = records.last().map_or(self.given, |record| record.lsn);
        Ok(())
    }
}

fn append(index: &mut Index, added: &mut Vec<(&StoredTemplate, TemplateRow)>) -> Result<(), GalleryError> {
    let rows: Vec<NewRow<'_>> = added
        .iter()
        .map(|(template, row)| NewRow {
            template: template.id,
            subject: template.subject,
            hand: template.hand as u8,
            label: template.subject_id.as_str(),
            source: source_of(&template.sealed),
            vector: &row.0,
        })
        .collect();
    if !rows.is_empty() {
        index.append(&rows)?;
    }
    added.clear();
    Ok(())
}

/// The row of a template. None, and an error in the log, if it does not open: then it is left out.
pub(crate) fn open_template(sealer: &Sealer, template: &StoredTemplate) -> Option<TemplateRow> {
    let opened = sealer.open(template.subject_id.as_str(), template.hand, &template.sealed);
    opened
        .inspect_err(|error| {
            tracing::error!(template = template.id.0, %error, "a template of the registry is damaged; it is left out");
        })
        .ok()
}
