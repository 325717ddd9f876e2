//! Creates and wipes indexes.
//!
//! Invariant: an index is never created over the remains of another.

use std::path::Path;
use std::sync::Arc;

use crate::error::Error;
use crate::format::Manifest;
use crate::read::Reader;
use crate::reader_barrier::reader_barrier;
use crate::storage::{Files, Lock, Storage, destroy, directory};
use crate::types::{Geometry, Lsn, Origin};
use crate::write::{Index, READER_WAIT_DEFAULT};

/// # Errors
/// [`Error::Geometry`].
fn check_geometry(geometry: Geometry) -> Result<(), Error> {
    let Geometry { dim, segment_rows } = geometry;
    if geometry.is_valid() { Ok(()) } else { Err(Error::Geometry { dim, segment_rows }) }
}

impl Index {
    /// Creates an empty index in `dir`, and `dir` if it does not exist.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is an index or the remains of one, [`Error::Locked`],
    /// [`Error::Geometry`], [`Error::Io`].
    pub fn create(dir: &Path, geometry: Geometry, origin: Origin) -> Result<Self, Error> {
        Self::create_on(Arc::new(Files), dir, geometry, origin)
    }

    /// [`Index::create`] on the caller's storage.
    ///
    /// # Errors
    /// As [`Index::create`].
    pub fn create_on(storage: Arc<dyn Storage>, dir: &Path, geometry: Geometry, origin: Origin) -> Result<Self, Error> {
        check_geometry(geometry)?;
        Self::create_locked(storage, Arc::new(Lock::create_and_take(dir)?), geometry, origin)
    }

    fn create_locked(
        storage: Arc<dyn Storage>,
        lock: Arc<Lock>,
        geometry: Geometry,
        origin: Origin,
    ) -> Result<Self, Error> {
        if directory::has_index(&*storage, &lock.dir)? {
            return Err(Error::Exists { dir: lock.dir.clone() });
        }
        let manifest =
            Manifest { geometry, origin, lsn: Lsn(0), next_file: 0, segments: Vec::new(), forgotten: Vec::new() };
        directory::write_manifest(&*storage, &lock.dir, &manifest)?;
        Ok(Self::empty(storage, lock, reader_barrier(), &manifest))
    }

    /// Wipes the index that `before` reads from, whose writer must have been dropped, and creates an empty
    /// one in its place, without releasing its lock. Waits for at most 10 s until no snapshot is held. From
    /// then on `before` [is retired](Reader::is_retired).
    ///
    /// # Errors
    /// [`Error::Locked`] if there is another writer, and [`Error::Readers`]: nothing was done.
    /// [`Error::Geometry`], [`Error::Io`].
    pub fn create_over(
        storage: Arc<dyn Storage>,
        before: &Reader,
        geometry: Geometry,
        origin: Origin,
    ) -> Result<Self, Error> {
        check_geometry(geometry)?;
        let (lock, mut token) = before.take_over()?;
        token.retire(READER_WAIT_DEFAULT)?;
        Self::wipe_locked(&*storage, &lock.dir)?;
        Self::create_locked(storage, lock, geometry, origin)
    }

    /// Whether `dir` holds an index or the remains of one: a manifest or segment files.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        // A folder that cannot be listed may hold an index.
        directory::has_index(&Files, dir).unwrap_or(true)
    }

    /// Overwrites and removes every file of the index in `dir`, so that it can be created again.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Io`].
    pub fn wipe(dir: &Path) -> Result<(), Error> {
        Self::wipe_on(&Files, dir)
    }

    /// [`Index::wipe`] on the caller's storage.
    ///
    /// # Errors
    /// As [`Index::wipe`].
    pub fn wipe_on(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
        let _lock = Lock::create_and_take(dir)?;
        Self::wipe_locked(storage, dir)
    }

    fn wipe_locked(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
        directory::remove_new_manifest(storage, dir)?;
        directory::remove_manifest(storage, dir)?;
        // The segments are removed once no manifest names them.
        directory::sync_dir(storage, dir)?;
        for file in directory::segment_files(storage, dir)? {
            destroy(storage, &dir.join(directory::file_name(file)))?;
        }
        directory::sync_dir(storage, dir)
    }
}
