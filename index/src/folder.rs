//! The folder of an index: what lies in it, and how its manifest is read and replaced.
//!
//! Does not know rows. Invariant: the manifest is replaced whole, and durably, or not at all.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::manifest::{MANIFEST_BYTES_MAX, MANIFEST_NAME, MANIFEST_NEW_NAME, Manifest};
use crate::readable::is_unreadable;
use crate::segment::file_number;
use crate::storage::Storage;

/// Numbers of the segment files in `dir`.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn segment_files(storage: &dyn Storage, dir: &Path) -> Result<Vec<u32>, Error> {
    let names = storage.list(dir).map_err(Error::io(dir, "list"))?;
    Ok(names.iter().filter_map(|name| file_number(name)).collect())
}

/// Whether `dir` holds an index or what is left of one.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn has_index(storage: &dyn Storage, dir: &Path) -> Result<bool, Error> {
    let names = storage.list(dir).map_err(Error::io(dir, "list"))?;
    Ok(names.iter().any(|name| name == MANIFEST_NAME || file_number(name).is_some()))
}

/// # Errors
/// [`Error::ManifestMissing`], [`Error::ManifestCorrupt`], [`Error::Version`] or [`Error::Io`].
pub(crate) fn read_manifest(storage: &dyn Storage, dir: &Path) -> Result<Manifest, Error> {
    let path = dir.join(MANIFEST_NAME);
    let file = match storage.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::ManifestMissing { path });
        }
        file => file.map_err(Error::io(&path, "open"))?,
    };
    let len = file.len().map_err(Error::io(&path, "measure"))?;
    if len > MANIFEST_BYTES_MAX {
        return Err(Error::ManifestCorrupt {
            path,
            offset: MANIFEST_BYTES_MAX,
            expected: MANIFEST_BYTES_MAX,
            found: len,
        });
    }
    let mut bytes = vec![0; usize::try_from(len).expect("the length was checked")];
    match file.read_at(&mut bytes, 0) {
        Err(error) if is_unreadable(&error) => {
            return Err(Error::ManifestCorrupt { path, offset: 0, expected: len, found: 0 });
        }
        read => read.map_err(Error::io(&path, "read"))?,
    }
    Manifest::decode(&bytes, &path)
}

/// Replaces the manifest. When this returns the new one will survive a power cut; when it fails,
/// the old or the new one is there.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_manifest(storage: &dyn Storage, dir: &Path, manifest: &Manifest) -> Result<(), Error> {
    let (new, path) = (dir.join(MANIFEST_NEW_NAME), dir.join(MANIFEST_NAME));
    let bytes = manifest.encode();
    debug_assert_eq!(Manifest::decode(&bytes, &path).ok().as_ref(), Some(manifest));
    let file = storage.create(&new).map_err(Error::io(&new, "create"))?;
    file.write_at(&bytes, 0).map_err(Error::io(&new, "write"))?;
    file.sync().map_err(Error::io(&new, "sync"))?;
    storage.rename(&new, &path).map_err(Error::io(&path, "replace"))?;
    sync_dir(storage, dir)
}

/// # Errors
/// [`Error::Io`].
pub(crate) fn sync_dir(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
    storage.sync_dir(dir).map_err(Error::io(dir, "sync"))
}

/// Removes a manifest that was being written when the power went, if there is one.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_new_manifest(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
    remove_if_there(storage, dir.join(MANIFEST_NEW_NAME))
}

/// Removes the manifest, if there is one. Not synced.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_manifest(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
    remove_if_there(storage, dir.join(MANIFEST_NAME))
}

fn remove_if_there(storage: &dyn Storage, path: PathBuf) -> Result<(), Error> {
    match storage.remove(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io(path, "remove")),
    }
}
