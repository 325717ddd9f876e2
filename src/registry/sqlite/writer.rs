//! The writing connection: one transaction per call, and the meaning of failures.
//!
//! The counters in memory move only when SQLite's COMMIT has returned. What a failed write leaves is
//! known, except after a failed sync: then the registry is in doubt, and nothing more is written.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, Transaction, TransactionBehavior, ffi};
use thenar_index::GalleryId;

use super::commit::{Commit, Ended};
use super::read::{self, Counters};
use super::slots::Slots;
use super::{damaged, failed, requests, scrub, stored, sums};
use crate::registry::{Change, Committed, GalleryIdentity, RegistryError};
use crate::vault::RegistryKeys;

/// The writing connection, with what it knows of the committed state.
pub(super) struct Writer {
    conn: Connection,
    keys: RegistryKeys,
    counters: Counters,
    slots: Slots,
    opened: Instant,
    /// How long the registry had been open before `opened`.
    open_ms_before: i64,
    /// A sync failed, so nothing more is written (see [`RegistryError::WriterStopped`]).
    stopped: bool,
}

impl Writer {
    /// Reads the counters, and checks that they were stored under this key and that no row is beyond
    /// them: otherwise numbers would be assigned twice.
    pub(super) fn new(conn: Connection, path: &Path, keys: RegistryKeys) -> Result<Self, RegistryError> {
        let counters = read::counters(&conn, path)?;
        if let Some((claimed, _)) = read::identity(&conn, path)? {
            let found = GalleryIdentity { key_id: keys.key_id(), ..claimed };
            refuse_another(&claimed, &found)?;
        }
        if !sums::are_sound(&conn, &keys, &counters).map_err(|e| failed(path, "checking its counters", e))? {
            return Err(damaged(path, "row of counters", 1));
        }
        let number = |sql| {
            conn.query_row(sql, [], |row| row.get::<_, Option<i64>>(0))
                .map(Option::unwrap_or_default)
                .map_err(|e| failed(path, "reading its newest rows", e))
        };
        if number("SELECT max(lsn) FROM log")? != counters.last_lsn {
            return Err(damaged(path, "counter of log records", counters.last_lsn));
        }
        if number("SELECT max(number) FROM subjects")? > counters.last_subject {
            return Err(damaged(path, "counter of subjects", counters.last_subject));
        }
        if number("SELECT max(id) FROM templates")? > counters.last_template {
            return Err(damaged(path, "counter of templates", counters.last_template));
        }
        let slots = Slots::read(&conn).map_err(|e| failed(path, "counting its slots", e))?;
        Ok(Self {
            conn,
            keys,
            counters,
            slots,
            opened: Instant::now(),
            open_ms_before: counters.open_ms,
            stopped: false,
        })
    }

    #[cfg(test)]
    pub(super) fn connection(&self) -> &Connection {
        &self.conn
    }

    /// See `Registry::scrub`. A registry in doubt is left as it is: its log may hold the commit.
    pub(super) fn scrub(&self, path: &Path) -> Result<(), RegistryError> {
        self.refuse_if_stopped(path)?;
        scrub::scrub(&self.conn, path)
    }

    /// See `Registry::claim_identity`.
    pub(super) fn claim_identity(
        &mut self,
        path: &Path,
        identity: &GalleryIdentity,
    ) -> Result<GalleryId, RegistryError> {
        if let Some((claimed, id)) = read::identity(&self.conn, path)? {
            // As long as its log is empty, it may become another gallery.
            if claimed.key_id != identity.key_id || claimed.dim == identity.dim || self.counters.last_lsn > 0 {
                return refuse_another(&claimed, identity).map(|()| id);
            }
        }
        self.refuse_if_stopped(path)?;
        let dim = stored(identity.dim as u64);
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(RegistryError::NoRandomness)?;
        let claim = |writer: &mut Self| -> rusqlite::Result<()> {
            let tx = Transaction::new(&mut writer.conn, TransactionBehavior::Immediate)?;
            tx.execute("INSERT OR REPLACE INTO gallery VALUES (1, ?1, ?2, ?3)", (dim, identity.key_id, id))?;
            sums::store(&tx, &writer.keys, &writer.counters)?;
            tx.commit()
        };
        claim(self).map(|()| GalleryId(id)).map_err(|e| self.write_failed(path, "claiming its identity", e))
    }

    /// See `Registry::commit`.
    pub(super) fn commit(&mut self, path: &Path, changes: &[Change]) -> Result<Committed, RegistryError> {
        self.refuse_if_stopped(path)?;
        self.try_commit(path, changes).map_err(|failure| self.failure(path, failure))
    }

    fn try_commit(&mut self, path: &Path, changes: &[Change]) -> Result<Committed, Failure> {
        let open_ms = self.open_ms();
        // If an error drops it, it rolls back.
        let tx = Transaction::new(&mut self.conn, TransactionBehavior::Immediate).map_err(sql("beginning a commit"))?;
        let mut commit = Commit::begin(&tx, path, &self.keys, open_ms, self.counters, self.slots)?;
        let outcomes = changes.iter().map(|change| commit.apply(change)).collect::<Result<Vec<_>, _>>()?;
        let Ended { mut counters, slots, records } = commit.end();
        if counters != self.counters {
            counters.open_ms = open_ms;
            sums::store(&tx, &self.keys, &counters).map_err(sql("storing its counters"))?;
        }
        tx.commit().map_err(Failure::Commit)?;
        self.counters = counters;
        self.slots = slots;
        Ok(Committed { outcomes, records })
    }

    /// See `Registry::prune_requests`. Also stores how long the registry has been open, for a registry that
    /// gets no commits.
    pub(super) fn prune_requests(&mut self, path: &Path, kept: Duration, limit: usize) -> Result<u64, RegistryError> {
        self.refuse_if_stopped(path)?;
        self.try_prune(kept, limit).map_err(|failure| self.failure(path, failure))
    }

    fn try_prune(&mut self, kept: Duration, limit: usize) -> Result<u64, Failure> {
        let at = sql("forgetting old requests");
        let mut counters = self.counters;
        counters.open_ms = self.open_ms();
        let young = counters.open_ms.saturating_sub(i64::try_from(kept.as_millis()).unwrap_or(i64::MAX));
        let tx = Transaction::new(&mut self.conn, TransactionBehavior::Immediate).map_err(&at)?;
        let pruned = requests::prune(&tx, &self.keys, &mut counters, young, limit).map_err(&at)?;
        tx.commit().map_err(Failure::Commit)?;
        self.counters = counters;
        Ok(pruned)
    }

    /// How long the registry has been open in total, in milliseconds: the clock that dates requests.
    /// It does not depend on a clock that can be set, so setting one does not make a request older.
    fn open_ms(&self) -> i64 {
        let elapsed = i64::try_from(self.opened.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.open_ms_before.saturating_add(elapsed)
    }

    /// Advances the clock that dates requests.
    #[cfg(test)]
    pub(super) fn pass(&mut self, time: Duration) {
        self.open_ms_before += i64::try_from(time.as_millis()).unwrap();
    }

    /// The error for a failure that undid a transaction.
    fn failure(&mut self, path: &Path, failure: Failure) -> RegistryError {
        match failure {
            Failure::Sql(doing, e) => self.write_failed(path, doing, e),
            Failure::Commit(e) => self.commit_failed(path, "committing", e),
            Failure::Registry(e) => e,
        }
    }

    fn refuse_if_stopped(&self, path: &Path) -> Result<(), RegistryError> {
        if self.stopped { Err(RegistryError::WriterStopped { path: path.to_owned() }) } else { Ok(()) }
    }

    /// The error for a failed statement. A statement syncs only if it commits by itself.
    fn write_failed(&mut self, path: &Path, doing: &'static str, e: rusqlite::Error) -> RegistryError {
        match e.sqlite_error().map(|e| e.extended_code) {
            Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC) => self.commit_failed(path, doing, e),
            _ => failed(path, doing, e),
        }
    }

    /// The error for a failed COMMIT. The commit mark of a transaction is written last, so if a write
    /// failed (for lack of space, say), the transaction is not stored. After any other failure it may be:
    /// SQLite recovers it if its log is complete. And after a failed sync the kernel may have dropped the
    /// dirty pages and report the next sync as a success, so there must be no next one.
    fn commit_failed(&mut self, path: &Path, doing: &'static str, source: rusqlite::Error) -> RegistryError {
        if let Some(ffi::SQLITE_FULL | ffi::SQLITE_IOERR_WRITE) = source.sqlite_error().map(|e| e.extended_code) {
            return failed(path, doing, source);
        }
        self.stopped = true;
        RegistryError::InDoubt { path: path.to_owned(), doing, source }
    }
}

/// A failure that undoes a commit.
pub(super) enum Failure {
    Sql(&'static str, rusqlite::Error),
    /// The COMMIT itself failed.
    Commit(rusqlite::Error),
    Registry(RegistryError),
}

impl From<RegistryError> for Failure {
    fn from(e: RegistryError) -> Self {
        Self::Registry(e)
    }
}

pub(super) fn sql(doing: &'static str) -> impl Fn(rusqlite::Error) -> Failure {
    move |e| Failure::Sql(doing, e)
}

/// An error unless both are equal.
fn refuse_another(claimed: &GalleryIdentity, found: &GalleryIdentity) -> Result<(), RegistryError> {
    if claimed == found {
        return Ok(());
    }
    let advice = if claimed.key_id == found.key_id {
        "set the dimension the gallery was made with, or use another data folder"
    } else {
        "give the master key the gallery was made with, or use another data folder"
    };
    Err(RegistryError::WrongIdentity { expected: in_words(claimed), found: in_words(found), advice })
}

fn in_words(identity: &GalleryIdentity) -> String {
    let key: String = identity.key_id.iter().map(|b| format!("{b:02x}")).collect();
    format!("dimension {} and key {key}", identity.dim)
}
