//! The registry in one SQLite database, for one server.
//!
//! One connection writes, behind a mutex; a few others read, and each call sees one snapshot. The
//! database is in WAL mode with `synchronous=FULL`: a commit returns after its log is synced.
//! Durability is SQLite's, so nothing but `scrub` touches the files directly.
//!
//! Sealed bytes and subjects' names never move. They are stored in `slots`, rows of their own that are
//! appended, overwritten in place with bytes of the same length, and never deleted: a slot whose content is
//! forgotten is zeroed and kept for the next template or name of that length. SQLite's `secure_delete`
//! alone would not be enough: it zeroes a deleted cell, but when SQLite balances b-tree pages it can leave
//! stale copies of *live* cells in the unused middle of a page, and no later deletion finds those.
//! Cells that never move have no copies. Only numbers and keyed hashes move and are in indexes: subjects
//! and requests are looked up by them ([`RegistryKeys`]), and the id of a request is not stored at all.
//!
//! Invariants: counters are stored with each commit, so deleted numbers are not assigned again;
//! `log` has no gaps; every subject has a template; a row of `templates` or `subjects` owns its slot,
//! every other slot is in `free_slots` and holds zeros.

mod commit;
mod read;
mod readers;
mod requests;
mod schema;
mod scrub;
mod slots;
mod statements;
mod sums;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rusqlite::{ErrorCode, ffi};
use thenar_index::{Contents, GalleryId, Lsn, SubjectNumber, TemplateId};

use self::readers::Readers;
pub use self::verify::RegistryReport;
use self::writer::Writer;
use super::{
    Change, Committed, GalleryIdentity, LogRecord, Registry, RegistryCounts, RegistryError, StoredTemplate,
    SubjectRecord,
};
use crate::model::SubjectId;
use crate::vault::RegistryKeys;

/// Free space in bytes below which a failed write counts as a full disk. SQLite reports some
/// writes that found no space as plain I/O errors.
const DISK_FULL_BYTES: u64 = 1 << 20;

/// A registry in one SQLite file; see the module.
pub struct SqliteRegistry {
    path: PathBuf,
    keys: RegistryKeys,
    writer: Mutex<Writer>,
    readers: Readers,
}

impl SqliteRegistry {
    /// Opens the registry at `path`, and creates it if there is none (mode 0600, as SQLite's
    /// `-wal` and `-shm` files beside it). An older schema is migrated.
    ///
    /// Subjects and requests are looked up by hashes under `keys`: with keys other than those it was made
    /// with, nobody is found. Only one process at a time may have it open for writing; the caller sees to
    /// that.
    ///
    /// # Errors
    /// [`RegistryError::Unusable`] if the file is something else,
    /// [`RegistryError::SchemaTooNew`] if a newer program wrote it,
    /// [`RegistryError::Damaged`] if its counters contradict its rows, and the errors of the
    /// system or the database.
    pub fn open(path: &Path, keys: RegistryKeys) -> Result<Self, RegistryError> {
        let path = std::path::absolute(path).map_err(|source| RegistryError::File {
            path: path.to_owned(),
            doing: "resolving the path",
            source,
        })?;
        schema::create_file(&path)?;
        let conn = schema::open_writer(&path)?;
        let writer = Writer::new(conn, &path, keys.clone())?;
        let readers = Readers::open(&path)?;
        Ok(Self { path, keys, writer: Mutex::new(writer), readers })
    }
}

impl Registry for SqliteRegistry {
    fn claim_identity(&self, identity: &GalleryIdentity) -> Result<GalleryId, RegistryError> {
        self.writer.lock().claim_identity(&self.path, identity)
    }

    fn identity(&self) -> Result<Option<(GalleryIdentity, GalleryId)>, RegistryError> {
        read::identity(&self.readers.get(), &self.path)
    }

    fn commit(&self, changes: &[Change]) -> Result<Committed, RegistryError> {
        self.writer.lock().commit(&self.path, changes)
    }

    fn log_after(&self, after: Lsn, limit: usize) -> Result<Vec<LogRecord>, RegistryError> {
        read::log_after(&self.readers.get(), &self.path, after, limit)
    }

    fn last_lsn(&self) -> Result<Lsn, RegistryError> {
        Ok(read::counters(&self.readers.get(), &self.path)?.last_lsn())
    }

    fn contents(&self) -> Result<(Lsn, Contents), RegistryError> {
        let counters = read::counters(&self.readers.get(), &self.path)?;
        Ok((counters.last_lsn(), counters.contents))
    }

    fn templates_between(
        &self,
        first: TemplateId,
        last: TemplateId,
        limit: usize,
    ) -> Result<Vec<StoredTemplate>, RegistryError> {
        read::templates_between(&self.readers.get(), &self.path, first, last, limit)
    }

    fn subject(&self, id: &SubjectId) -> Result<Option<SubjectRecord>, RegistryError> {
        read::subject(&self.readers.get(), &self.path, &self.keys.subject(id.as_str()), id)
    }

    fn subject_numbers(&self, ids: &[SubjectId]) -> Result<Vec<SubjectNumber>, RegistryError> {
        let keys = ids.iter().map(|id| self.keys.subject(id.as_str()));
        read::subject_numbers(&self.readers.get(), &self.path, keys)
    }

    fn counts(&self) -> Result<RegistryCounts, RegistryError> {
        Ok(read::counters(&self.readers.get(), &self.path)?.counts())
    }

    /// Copies the write-ahead log into the database, overwrites the log with zeros and truncates it.
    /// Reads of this registry wait meanwhile, and so do searches.
    ///
    /// A program cannot promise more: storage that writes elsewhere (copy on write, snapshots, wear
    /// levelling in a flash drive) keeps the old blocks until it reuses them.
    fn scrub(&self) -> Result<(), RegistryError> {
        let writer = self.writer.lock();
        let _no_readers = self.readers.hold_back();
        writer.scrub(&self.path)
    }

    fn prune_requests(&self, kept: Duration, limit: usize) -> Result<u64, RegistryError> {
        self.writer.lock().prune_requests(&self.path, kept, limit)
    }
}

/// The error for a failed database call: a full disk if it was that, otherwise the database's own.
fn failed(path: &Path, doing: &'static str, source: rusqlite::Error) -> RegistryError {
    let full = match &source {
        rusqlite::Error::SqliteFailure(ffi::Error { code: ErrorCode::DiskFull, .. }, _) => true,
        rusqlite::Error::SqliteFailure(
            ffi::Error {
                extended_code: ffi::SQLITE_IOERR_WRITE | ffi::SQLITE_IOERR_SHMSIZE | ffi::SQLITE_IOERR_TRUNCATE,
                ..
            },
            _,
        ) => rustix::fs::statvfs(path).is_ok_and(|fs| fs.f_bavail.saturating_mul(fs.f_frsize) < DISK_FULL_BYTES),
        _ => false,
    };
    if full {
        RegistryError::DiskFull { path: path.to_owned() }
    } else {
        RegistryError::Database { path: path.to_owned(), doing, source }
    }
}

/// The error for a stored value that this program never writes.
fn damaged(path: &Path, what: &'static str, key: i64) -> RegistryError {
    RegistryError::Damaged { path: path.to_owned(), what, key }
}

/// A number as SQLite stores it. Numbers beyond its range are never assigned, so all of them may become
/// one number that no row has.
fn stored(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Milliseconds since 1970; earlier times count as 1970.
fn to_millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The time of stored milliseconds.
fn from_millis(millis: i64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_millis(u64::try_from(millis).ok()?))
}
