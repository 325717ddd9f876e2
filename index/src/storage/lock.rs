//! The lock of a folder: at most one writer at a time, across processes and within one.
//!
//! It is held until the index, every reader and every snapshot are dropped, because a second writer
//! could erase rows under a snapshot of the first. If the process that has an index opens it again, the
//! new one takes over the lock and waits for those snapshots itself.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Name of the lock file in its folder. The file stays when the lock is released.
const LOCK_NAME: &str = "LOCK";

/// A locked folder.
#[derive(Debug)]
pub(crate) struct Lock {
    pub(crate) dir: PathBuf,
    /// Closing it releases the lock.
    _file: File,
}

impl Lock {
    /// Locks `dir`, which must exist.
    ///
    /// # Errors
    /// [`Error::Locked`] if it is already locked, [`Error::Io`] if it cannot be locked.
    pub(crate) fn take(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(LOCK_NAME);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io(&path, "open"))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => Err(Error::Io { path, action: "lock", source }),
        }
    }

    /// Creates `dir` if necessary, then locks it.
    ///
    /// # Errors
    /// As [`Lock::take`].
    pub(crate) fn create_and_take(dir: &Path) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
        Self::take(dir)
    }
}
