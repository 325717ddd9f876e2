//! The data folder: its layout, and the lock that gives it to one process.
//!
//! ```text
//! DATA/LOCK               held while a server (or a local import) runs
//! DATA/registry.sqlite    the system of record
//! DATA/index/             derived from it
//! DATA/kernels-*          compiled GPU kernels, a cache
//! ```

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A data folder, locked for this process until the value is dropped.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    _lock: File,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process uses it.
    #[error("the data folder {} is in use by another Thenar process; stop that one first", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// There is no gallery in it.
    #[error("{} holds no Thenar data", path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("could not use the data folder {}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl DataFolder {
    /// Creates the folder (for its owner only) if it is missing, and locks it.
    ///
    /// # Errors
    /// [`FolderError::InUse`] if another process uses it.
    pub fn take(path: &Path) -> Result<Self, FolderError> {
        let io = |source| FolderError::Io { path: path.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(path.join("LOCK"))
            .map_err(io)?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => FolderError::InUse { path: path.to_owned() },
            TryLockError::Error(source) => io(source),
        })?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// As [`DataFolder::take`], but refuses a folder without a gallery.
    ///
    /// # Errors
    /// [`FolderError::Empty`] if there is none.
    pub fn take_existing(path: &Path) -> Result<Self, FolderError> {
        if !registry_file(path).exists() {
            return Err(FolderError::Empty { path: path.to_owned() });
        }
        Self::take(path)
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The registry's database.
    #[must_use]
    pub fn registry(&self) -> PathBuf {
        registry_file(&self.path)
    }

    /// The index's folder.
    #[must_use]
    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }
}

fn registry_file(data: &Path) -> PathBuf {
    data.join("registry.sqlite")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_has_one_owner_at_a_time_and_is_closed_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let folder = DataFolder::take(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(DataFolder::take(&path), Err(FolderError::InUse { .. })));
        drop(folder);
        assert!(DataFolder::take(&path).is_ok());
    }

    #[test]
    fn an_empty_folder_is_not_a_gallery() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(DataFolder::take_existing(dir.path()), Err(FolderError::Empty { .. })));
    }
}
