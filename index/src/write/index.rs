//! The one writer of a folder: its state, and what it tells about itself.
//!
//! Knows rows and files. Does not know what a change means or who reads.
//!
//! Invariants:
//! - Template numbers ascend from segment to segment and within each.
//! - A row is live, or forgotten and not yet erased, or erased. The live bits of a view do not change: a
//!   row that is forgotten later stays live in it, and in its subject's list, until it is erased, which
//!   waits for the view's readers.
//! - The manifest never counts a row that is not on disk, and names every row that is forgotten but not
//!   erased, so that no restart brings it back.
//! - After an I/O error nothing more is written.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::compaction::Compaction;
use super::slots::{Slot, Slots};
use crate::error::Error;
use crate::format::Manifest;
use crate::read::{Reader, Shared, Snapshot, SubjectRows, View};
use crate::reader_barrier::{ReaderBarrier, WriteToken};
use crate::storage::{Lock, Storage};
use crate::types::{Contents, Geometry, Origin, Row, TemplateId};

/// How long the writer waits for readers to drop their snapshots by default.
pub(crate) const READER_WAIT_DEFAULT: Duration = Duration::from_secs(10);

/// The one writer of an index.
pub struct Index {
    pub(crate) dir: PathBuf,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) origin: Origin,
    pub(crate) shared: Arc<Shared>,
    pub(crate) token: WriteToken,
    pub(crate) slots: Slots,
    pub(crate) compaction: Option<Compaction>,
    /// Rows that are no longer live but not yet erased, each with its subject, whose list still has it. If a
    /// compaction has copied such a row, the copy too.
    pub(crate) forgotten: BTreeMap<u32, u64>,
    /// Summary of the live rows that count, published or not.
    pub(crate) contents: Contents,
    pub(crate) last_template: Option<TemplateId>,
    /// Number of rows that are no longer live, whether already erased or not.
    pub(crate) dead: u64,
    pub(crate) next_file: u32,
    /// Whether file names were created or removed since the folder was last synced.
    pub(crate) dir_dirty: bool,
    pub(crate) stopped: bool,
    pub(crate) left_over: Vec<PathBuf>,
    pub(crate) reader_wait: Duration,
}

/// A segment, for status pages and repairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Its file.
    pub path: PathBuf,
    /// Identifies its contents.
    pub identity: u64,
    /// Number of its first row.
    pub first_row: Row,
    /// Number of rows appended to it.
    pub rows: u32,
    /// Number of live rows among them.
    pub live: u64,
    /// The smallest and largest template number that belong to it.
    pub templates: Option<(TemplateId, TemplateId)>,
}

impl Index {
    /// An index without segments, for the folder of `lock`.
    pub(crate) fn empty(
        storage: Arc<dyn Storage>,
        lock: Arc<Lock>,
        (reader_barrier, token): (Arc<ReaderBarrier>, WriteToken),
        manifest: &Manifest,
    ) -> Self {
        let geometry = manifest.geometry;
        Self {
            dir: lock.dir.clone(),
            storage,
            origin: manifest.origin,
            shared: Arc::new(Shared {
                reader_barrier,
                current: Mutex::new(Arc::new(View::new(manifest.lsn, Vec::new(), 0, 0))),
                subject_rows: RwLock::new(SubjectRows::new(geometry.segment_rows)),
                geometry,
                lock,
            }),
            token,
            slots: Slots::new(geometry),
            compaction: None,
            forgotten: BTreeMap::new(),
            last_template: None,
            contents: Contents::default(),
            dead: 0,
            next_file: manifest.next_file,
            dir_dirty: false,
            stopped: false,
            left_over: Vec::new(),
            reader_wait: READER_WAIT_DEFAULT,
        }
    }

    /// Adds a segment from disk, which has the largest templates so far and `dead` dead rows.
    pub(crate) fn add_opened(&mut self, number: u32, slot: Slot, dead: u64) {
        let first_row = number * self.shared.geometry.segment_rows;
        let records = slot.segment.pages.records(&self.token);
        let mut subject_rows = self.shared.subject_rows.write();
        subject_rows.add_segment(number);
        let mut from = 0;
        while let Some(offset) = slot.live.next(from, slot.rows) {
            let record = &records[offset as usize];
            subject_rows.link(record.subject, first_row + offset);
            self.contents.add(&record.meta());
            from = offset + 1;
        }
        drop(subject_rows);
        self.last_template = slot.range.map(|(_, last)| last);
        self.dead += dead;
        self.slots.put(number, slot);
        self.slots.list(number);
    }

    /// The geometry that the index was created with.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// Sets how long [`Index::erase`] waits for readers. The default is 10 s.
    pub fn set_reader_wait(&mut self, wait: Duration) {
        self.reader_wait = wait;
    }

    /// Gives snapshots to search threads.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader { shared: Arc::clone(&self.shared) }
    }

    /// The last publication.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.reader().snapshot()
    }

    /// Whether an I/O error has stopped this writer.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Files that opening this index should have overwritten and removed, but could not because of a disk
    /// error. They are not served, but may hold templates of forgotten people.
    #[must_use]
    pub fn left_over(&self) -> &[PathBuf] {
        &self.left_over
    }

    /// Rows that are forgotten and not yet erased, ascending: what [`Index::erase`] still has to do.
    #[must_use]
    pub fn forgotten(&self) -> Vec<Row> {
        self.forgotten.keys().map(|&row| Row(row)).collect()
    }

    /// The largest template number that was ever appended, as far as the index knows: it does not know
    /// templates that were erased and compacted before it was opened.
    #[must_use]
    pub fn last_template(&self) -> Option<TemplateId> {
        self.last_template
    }

    /// Summary of the live rows, published or not, for comparison with the registry.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.contents
    }

    /// The segments in the order of their templates.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let info = |(number, slot): (u32, &Slot)| SegmentInfo {
            path: slot.segment.path.clone(),
            identity: slot.segment.identity,
            first_row: Row(number * self.shared.geometry.segment_rows),
            rows: slot.rows,
            live: slot.live.count(slot.rows),
            templates: slot.range,
        };
        self.slots.listed().map(info).collect()
    }

    pub(crate) fn running(&self) -> Result<(), Error> {
        if self.stopped { Err(Error::Stopped) } else { Ok(()) }
    }

    /// After a failed write or sync the contents of the disk are unknown: pages that failed to sync may
    /// read as written and be lost. So the writer stops, and a new one starts from the files.
    pub(crate) fn stop_if_failed<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if matches!(result, Err(Error::Io { .. })) {
            self.stopped = true;
        }
        result
    }
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Index({}, {} segments, {} live)", self.dir.display(), self.slots.order().len(), self.contents.rows)
    }
}
