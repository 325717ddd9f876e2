//! The live gallery: the index and the engine, following the registry's log.
//!
//! [`Gallery::apply`] takes the records a commit made, shows them to searches and erases what they
//! took away; when it returns, the next search sees the change, and no byte of a forgotten template
//! is left in the index's files, its map or the engine. [`open`] brings the index up after a
//! restart or a loss.
//!
//! Knows the index, the log and the engine. Does not know who asked for a change, or scores.
//!
//! Invariants: records are applied in order of LSN, each once; one thread applies at a time; the
//! engine follows rows before searches see them; an index that failed to write is never trusted again
//! but reopened and replayed.

pub mod open;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use thenar_index::{GalleryId, Index, Lsn, NewRow, Origin, Reader, Row, Snapshot, source_of};

use crate::engine::standby::WithStandby;
use crate::engine::{Engine, EngineDescription, Survivors};
use crate::palm::TemplateRow;
use crate::registry::{Event, LogRecord, Registry, RegistryError, StoredTemplate};
use crate::search::{Answer, BatchTiming, Search, plan};
use crate::telemetry;
use crate::vault::{SealError, Sealer};

/// Rows and erasures after which the index is checkpointed, so that a replay stays short.
const CHECKPOINT_ROWS: u64 = 65_536;
/// Room a reopened index needs to be sure of getting through.
const REOPEN_FREE_BYTES: u64 = 4 << 20;
/// Log records read at once while catching up.
pub(crate) const REPLAY_CHUNK: usize = 4096;

/// Why the gallery could not follow the registry.
#[derive(Debug, thiserror::Error)]
pub enum GalleryError {
    /// The index failed.
    #[error("the index: {0}")]
    Index(#[from] thenar_index::Error),
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
    /// A template does not open with this key.
    #[error("template {template} of the registry does not open: {source}")]
    Sealed {
        /// Which.
        template: u64,
        /// Why.
        source: SealError,
    },
    /// The disk has too little room to bring the index up to the registry.
    #[error("the disk of {} has {free_bytes} bytes left; the index follows once there is room", path.display())]
    DiskFull {
        /// The index's folder.
        path: PathBuf,
        /// Room that is left.
        free_bytes: u64,
    },
    /// No engine could answer.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    /// The index could not be opened again after a failure.
    #[error("the index is lost; it is opened again with the next write")]
    Lost,
    /// The folder of the data could not be used.
    #[error("could not use {}: {source}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// What a gallery is made of, the same for its whole life.
pub struct Setup {
    /// Folder of the index's files.
    pub dir: PathBuf,
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
    standby: Option<Arc<WithStandby>>,
    /// `None` only where a failed index could not be opened again; nothing is searched then,
    /// since an answer over less than the gallery would be a lie.
    reader: RwLock<Option<Reader>>,
    writer: Mutex<Writer>,
    lsn: AtomicU64,
    registry_lsn: AtomicU64,
    closing: AtomicBool,
    opened: open::OpenReport,
}

struct Writer {
    /// `None` after a failure, until it is reopened.
    index: Option<Index>,
    since_checkpoint: u64,
    /// Rows forgotten whose bytes could not be erased yet.
    to_erase: Vec<Row>,
}

/// The gallery in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GalleryStatus {
    /// Live templates.
    pub templates: u64,
    /// Rows erased and not reclaimed.
    pub tombstones: u64,
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

impl Gallery {
    /// Opens the index, repairs and replays it, and brings the engine up to it.
    ///
    /// # Errors
    /// [`GalleryError`] where neither the index nor the registry can give the gallery.
    pub fn open(
        setup: Setup,
        engine: Arc<dyn Engine>,
        standby: Option<Arc<WithStandby>>,
    ) -> Result<Self, GalleryError> {
        let started = std::time::Instant::now();
        let (index, mut opened) = open::open_index(&setup)?;
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
            writer: Mutex::new(Writer { index: Some(index), since_checkpoint: 0, to_erase: Vec::new() }),
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
    /// [`GalleryError`] where the index could not follow. The change stays in the registry; the
    /// next call reopens the index and catches up.
    pub fn apply(&self, records: &[LogRecord]) -> Result<(), GalleryError> {
        let mut writer = self.writer.lock();
        if let Some(last) = records.last() {
            self.registry_lsn.fetch_max(last.lsn.0, Ordering::AcqRel);
        }
        let result = self.apply_locked(&mut writer, records);
        if let Err(error) = &result {
            tracing::error!(%error, "the index could not follow the registry; it will be reopened");
            if !matches!(error, GalleryError::Index(thenar_index::Error::Readers { .. })) {
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
        let Writer { index, since_checkpoint, to_erase } = writer;
        let index = index.as_mut().expect("reopened above");
        let applied = self.lsn().0;
        let fresh = &records[records.partition_point(|r| r.lsn.0 <= applied)..];
        let gap = fresh.first().map_or(self.registry_lsn.load(Ordering::Acquire) > applied, |r| r.lsn.0 != applied + 1);
        let mut last = Lsn(applied);
        if gap {
            loop {
                let missed = self.setup.registry.log_after(last, REPLAY_CHUNK)?;
                let Some(end) = missed.last() else { break };
                last = end.lsn;
                *since_checkpoint += missed.len() as u64;
                to_erase.extend(apply_to_index(index, &self.setup.sealer, &missed)?);
            }
        } else if let Some(end) = fresh.last() {
            last = end.lsn;
            *since_checkpoint += fresh.len() as u64;
            to_erase.extend(apply_to_index(index, &self.setup.sealer, fresh)?);
        }
        if last.0 > applied {
            // The engine has its copy before any search sees the rows.
            let staged = index.stage(last);
            if let Err(error) = self.engine.follow(&plan::view(&staged)) {
                tracing::error!(%error, "the engine could not follow the gallery");
            }
            drop(staged);
            drop(index.publish(last));
            self.lsn.store(last.0, Ordering::Release);
        }
        if !to_erase.is_empty() {
            let rows: Vec<u32> = to_erase.iter().map(|r| r.0).collect();
            if let Err(error) = self.engine.erase(&rows) {
                tracing::error!(%error, "the engine could not erase rows; its memory is given up");
            }
            index.erase(to_erase)?;
            to_erase.clear();
        }
        if *since_checkpoint >= CHECKPOINT_ROWS {
            index.checkpoint()?;
            *since_checkpoint = 0;
        }
        Ok(())
    }

    /// Opens a failed index again. Searches wait meanwhile; they go on over the old one where
    /// there is too little room on the disk for the attempt to succeed.
    fn reopen(&self, writer: &mut Writer) -> Result<(), GalleryError> {
        let mut reader = self.reader.write();
        if reader.is_some() {
            let free_bytes = free_bytes(&self.setup.dir)?;
            if free_bytes < REOPEN_FREE_BYTES {
                return Err(GalleryError::DiskFull { path: self.setup.dir.clone(), free_bytes });
            }
        }
        // The old reader keeps the folder locked, and is behind the registry.
        *reader = None;
        let (index, report) = open::open_index(&self.setup)?;
        *reader = Some(index.reader());
        let snapshot = index.snapshot();
        self.lsn.store(snapshot.lsn().0, Ordering::Release);
        self.registry_lsn.fetch_max(snapshot.lsn().0, Ordering::AcqRel);
        if let Err(error) = self.engine.follow(&plan::view(&snapshot)) {
            tracing::error!(%error, "the engine could not take the gallery");
        }
        drop(snapshot);
        *writer = Writer { index: Some(index), since_checkpoint: 0, to_erase: Vec::new() };
        tracing::info!(took_ms = report.took.as_millis(), replayed = report.replayed, "the index is open again");
        Ok(())
    }

    /// Checkpoints if anything changed since the last time.
    ///
    /// # Errors
    /// [`GalleryError`] where the index cannot be written.
    pub fn checkpoint(&self) -> Result<(), GalleryError> {
        let mut writer = self.writer.lock();
        if writer.since_checkpoint == 0 {
            return Ok(());
        }
        if let Some(index) = writer.index.as_mut() {
            if let Err(error) = index.checkpoint() {
                writer.index = None;
                return Err(error.into());
            }
            writer.since_checkpoint = 0;
        }
        Ok(())
    }

    /// Answers a batch of searches over the gallery as it is now.
    ///
    /// # Errors
    /// [`GalleryError::Engine`] where no engine could answer, [`GalleryError::Lost`] where there is
    /// no index to search.
    pub fn search(
        &self,
        searches: &[&Search],
        survivors: &mut Survivors,
    ) -> Result<(Vec<Answer>, BatchTiming), GalleryError> {
        let snapshot = self.snapshot().ok_or(GalleryError::Lost)?;
        Ok(plan::search_batch(&*self.engine, &snapshot, searches, survivors)?)
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

    /// Lets [`mend_forever`] end.
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
        let engine = self.engine.describe();
        telemetry::engine_memory(engine.kind, engine.host_bytes, engine.device_bytes);
    }
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

/// Applies records to the index without publishing them. Returns the rows to be erased.
pub(crate) fn apply_to_index(
    index: &mut Index,
    sealer: &Sealer,
    records: &[LogRecord],
) -> Result<Vec<Row>, GalleryError> {
    let mut gone = Vec::new();
    let mut added: Vec<(&StoredTemplate, TemplateRow)> = Vec::new();
    for record in records {
        match &record.event {
            // Deleted since: the record that says so follows.
            Event::Added { template: None, .. } => {}
            Event::Added { template: Some(template), .. } => {
                added.push((template, open_template(sealer, template)?));
            }
            Event::Removed { id, .. } => {
                append(index, &mut added)?;
                gone.extend(index.forget_template(*id));
            }
            Event::Forgotten { subject } => {
                append(index, &mut added)?;
                gone.extend(index.forget(*subject));
            }
        }
    }
    append(index, &mut added)?;
    Ok(gone)
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

pub(crate) fn open_template(sealer: &Sealer, template: &StoredTemplate) -> Result<TemplateRow, GalleryError> {
    sealer
        .open(template.subject_id.as_str(), template.hand, &template.sealed)
        .map_err(|source| GalleryError::Sealed { template: template.id.0, source })
}
