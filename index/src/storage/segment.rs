//! One segment: a mapped file of rows.
//!
//! Knows its file. Does not know its position in the index, or which of its rows count or are live.

use std::path::{Path, PathBuf};

use super::directory::file_name;
use super::{Pages, Storage};
use crate::error::Error;
use crate::format::{Layout, encode_header};

/// See the module.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) identity: u64,
    /// Number in the file's name.
    pub(crate) file: u32,
    pub(crate) path: PathBuf,
    pub(crate) pages: Pages,
}

impl Segment {
    /// Creates the file of a new segment: without rows, at its full length, not synced.
    ///
    /// # Errors
    /// [`Error::Io`]. There is no file then, or one without rows that the manifest does not name.
    pub(crate) fn create(storage: &dyn Storage, dir: &Path, file: u32, layout: Layout) -> Result<Self, Error> {
        let path = dir.join(file_name(file));
        Self::create_at(storage, path.clone(), file, layout).inspect_err(|_| {
            // If this fails, the next opening removes the file.
            let _ = storage.remove(&path);
        })
    }

    fn create_at(storage: &dyn Storage, path: PathBuf, file: u32, layout: Layout) -> Result<Self, Error> {
        let identity = storage.fresh_identity();
        let stored = storage.create(&path).map_err(Error::io(&path, "create"))?;
        stored.set_len(layout.file_bytes() as u64).map_err(Error::io(&path, "extend"))?;
        stored.write_at(&encode_header(layout, identity), 0).map_err(Error::io(&path, "write"))?;
        let pages = Pages::new(stored, &path, layout)?;
        Ok(Self { identity, file, path, pages })
    }
}
