//! Removes deleted bytes from the write-ahead log.
//!
//! Deleting zeroes a template's slot, but the log still holds older images of that page: frames
//! not yet copied into the database, and frames of earlier rounds that are left unused at its end.
//!
//! The steps, and what a crash after each leaves:
//! 1. `wal_checkpoint(RESTART)`: every frame is in the database and synced, and no reader uses the
//!    log. After a crash the log is replayed over equal pages.
//! 2. The log's header is zeroed and synced. After a crash, recovery finds no log, which is correct: the
//!    database has everything. (Zeroing frames first could leave a valid *prefix* of the log,
//!    which recovery would write over newer pages. So the header goes first.)
//! 3. The frames are zeroed and synced.
//! 4. `wal_checkpoint(TRUNCATE)`: SQLite forgets the frames and truncates the file.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode};

use super::failed;
use crate::registry::RegistryError;

/// Bytes of the header of a write-ahead log.
const WAL_HEADER_BYTES: usize = 32;
/// Bytes zeroed by one write.
const STEP_BYTES: usize = 1 << 20;

/// Runs the steps. The caller holds the writer, and no reader is active.
pub(super) fn scrub(conn: &Connection, path: &Path) -> Result<(), RegistryError> {
    checkpoint(conn, path, "PRAGMA wal_checkpoint(RESTART)")?;
    let log = log_path(path);
    zero(&log).map_err(|source| RegistryError::File { path: log, doing: "zeroing the write-ahead log", source })?;
    checkpoint(conn, path, "PRAGMA wal_checkpoint(TRUNCATE)")
}

/// The write-ahead log beside the database.
pub(super) fn log_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push("-wal");
    name.into()
}

/// A complete checkpoint, or an error. SQLite waits for other programs' readers for the
/// connection's busy timeout.
fn checkpoint(conn: &Connection, path: &Path, sql: &'static str) -> Result<(), RegistryError> {
    match conn.query_row(sql, [], |row| row.get::<_, i64>(0)) {
        Ok(0) => Ok(()),
        Ok(_) => Err(RegistryError::ScrubBlocked { path: path.to_owned() }),
        Err(e) if matches!(e.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)) => {
            Err(RegistryError::ScrubBlocked { path: path.to_owned() })
        }
        Err(e) => Err(failed(path, "copying its write-ahead log", e)),
    }
}

/// Overwrites the log with zeros, the header first. SQLite's locks are on the database and the
/// `-shm` file, so opening and closing this file releases none of them.
fn zero(log: &Path) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(log) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let bytes = file.metadata()?.len();
    if bytes == 0 {
        return Ok(());
    }
    let zeros = vec![0_u8; STEP_BYTES];
    let mut at = bytes.min(WAL_HEADER_BYTES as u64);
    #[expect(clippy::cast_possible_truncation, reason = "at most STEP_BYTES")]
    let step = |at: u64| (bytes - at).min(STEP_BYTES as u64) as usize;
    file.write_all_at(&zeros[..WAL_HEADER_BYTES.min(step(0))], 0)?;
    file.sync_data()?;
    while at < bytes {
        let some = step(at);
        file.write_all_at(&zeros[..some], at)?;
        at += some as u64;
    }
    file.sync_data()
}
