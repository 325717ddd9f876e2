//! The folder of an index: the names of its files, and how the manifest is read and replaced.
//!
//! Does not know rows. Invariant: the manifest is replaced as a whole and durably, or not at all.

use std::io;
use std::path::{Path, PathBuf};

use super::Storage;
use super::readable::is_unreadable;
use crate::error::Error;
use crate::format::{MANIFEST_BYTES_MAX, Manifest};

/// Name of the manifest in its folder.
pub(crate) const MANIFEST_NAME: &str = "MANIFEST";
/// Name under which a new manifest is written before it replaces the old one.
const MANIFEST_NEW_NAME: &str = "MANIFEST.new";

/// Name of the file with number `file`.
pub(crate) fn file_name(file: u32) -> String {
    format!("seg-{file:08x}.idx")
}

/// The number in the name of a segment file; none if it is not one.
pub(crate) fn file_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("seg-")?.strip_suffix(".idx")?;
    let file = u32::from_str_radix(digits, 16).ok()?;
    (file_name(file) == name).then_some(file)
}

/// Numbers of the segment files in `dir`.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn segment_files(storage: &dyn Storage, dir: &Path) -> Result<Vec<u32>, Error> {
    let names = storage.list(dir).map_err(Error::io(dir, "list"))?;
    Ok(names.iter().filter_map(|name| file_number(name)).collect())
}

/// Whether `dir` holds an index or the remains of one.
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
    let len = file.size().map_err(Error::io(&path, "measure"))?;
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

/// Replaces the manifest. If this succeeds, the new one will survive a power cut. If it fails, the
/// folder has the old or the new one.
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

/// Removes the manifest that was being written when the power failed, if there is one.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_and_numbers_are_inverse() {
        for file in [0, 1, 0x2a, u32::MAX] {
            assert_eq!(file_number(&file_name(file)), Some(file));
        }
        for name in
            ["seg-2a.idx", "seg-0000002A.idx", "seg-0000002a.tmp", "seg-+000002a.idx", "MANIFEST", "seg-000000002a.idx"]
        {
            assert_eq!(file_number(name), None, "{name}");
        }
    }
}
