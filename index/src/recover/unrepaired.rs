//! What opening finds: an index that is checked but not yet repaired.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::scan::Scan;
use crate::error::Damage;
use crate::format::{Manifest, SegmentEntry};
use crate::reader_barrier::{ReaderBarrier, WriteToken};
use crate::storage::{Lock, Segment, Storage};
use crate::types::{Geometry, Lsn};

/// An index that was read and checked but is not yet served.
pub struct Unrepaired {
    pub(super) lock: Arc<Lock>,
    /// The token of the writer of the index that is being opened again. Its readers may hold snapshots.
    pub(super) before: Option<WriteToken>,
    pub(super) reader_wait: Duration,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) dir: PathBuf,
    pub(super) manifest: Manifest,
    pub(super) reader_barrier: Arc<ReaderBarrier>,
    pub(super) token: WriteToken,
    pub(super) parts: Vec<Part>,
    pub(super) damage: Vec<Damage>,
    pub(super) codes_damage: Vec<Damage>,
    /// Files to destroy once a manifest that does not name them is durable.
    pub(super) obsolete: Vec<PathBuf>,
    pub(super) replaced: bool,
    /// Files that could not be destroyed because of a disk error.
    pub(super) left_over: Vec<PathBuf>,
}

/// One segment of the manifest. `found` is none while it is damaged.
pub(super) struct Part {
    pub(super) entry: SegmentEntry,
    pub(super) found: Option<(Segment, Scan)>,
}

impl Unrepaired {
    /// The LSN up to which the index is complete: replay the log from there.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.manifest.lsn
    }

    /// The geometry that the index was created with.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.manifest.geometry
    }

    /// The damaged segments that have not been replaced yet, each once.
    #[must_use]
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Segments whose rows are whole but whose codes are wrong, each once. No row is lost:
    /// [`Unrepaired::finish`] encodes the rows again.
    #[must_use]
    pub fn codes_damage(&self) -> &[Damage] {
        &self.codes_damage
    }

    /// Sets how long [`Unrepaired::finish`] waits for the readers of an index that is opened again. The
    /// default is 10 s.
    pub fn set_reader_wait(&mut self, wait: Duration) {
        self.reader_wait = wait;
    }

    /// Number of rows that the manifest calls forgotten and whose erasure has not begun.
    pub(super) fn forgotten_live(&self) -> u64 {
        let rows = self.manifest.geometry.segment_rows;
        let is_live = |&&row: &&u32| {
            let part = self.parts.iter().find(|part| part.entry.slot == row / rows);
            let found = part.and_then(|part| part.found.as_ref());
            found.is_some_and(|(_, scan)| scan.is_live(row % rows))
        };
        self.manifest.forgotten.iter().filter(is_live).count() as u64
    }
}

impl fmt::Debug for Unrepaired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unrepaired({}, lsn {}, {} damaged)", self.dir.display(), self.manifest.lsn.0, self.damage.len())
    }
}
