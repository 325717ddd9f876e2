//! One segment: a mapped file of rows.
//!
//! Knows its file. Does not know its place in the index, or which of its rows count or are live.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::format::{Layout, encode_header};
use crate::map::Pages;
use crate::readable::{PAGE_BYTES, is_unreadable};
use crate::storage::{Storage, StoredFile};

/// Name of the file with number `file`.
pub(crate) fn file_name(file: u32) -> String {
    format!("seg-{file:08x}.idx")
}

/// The number in a segment file's name, if it is one.
pub(crate) fn file_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("seg-")?.strip_suffix(".idx")?;
    let file = u32::from_str_radix(digits, 16).ok()?;
    (file_name(file) == name).then_some(file)
}

#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) identity: u64,
    /// Number in the file's name.
    pub(crate) file: u32,
    pub(crate) path: PathBuf,
    pub(crate) pages: Pages,
}

impl Segment {
    /// Makes the file of a new segment, empty and at its full length. Not synced.
    ///
    /// # Errors
    /// [`Error::Io`]; there is no such file then, or one that holds no rows and counts for nothing.
    pub(crate) fn create(storage: &dyn Storage, dir: &Path, file: u32, layout: Layout) -> Result<Self, Error> {
        let path = dir.join(file_name(file));
        Self::create_at(storage, path.clone(), file, layout).inspect_err(|_| {
            // If it stays, the next opening removes it.
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

/// Overwrites with zeros what a file holds, then removes it: segment files hold templates, and an
/// unlinked file's bytes stay on the disk. What is zero already is not written, so that holes of
/// a sparse file stay holes and this works on a full disk; what cannot be read is, which makes a disk
/// put other sectors in the place of the bad ones.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn destroy(storage: &dyn Storage, path: &Path) -> Result<(), Error> {
    let file = storage.open(path).map_err(Error::io(path, "open"))?;
    zero_out(&*file).map_err(Error::io(path, "overwrite"))?;
    file.sync().map_err(Error::io(path, "sync"))?;
    storage.remove(path).map_err(Error::io(path, "remove"))
}

fn zero_out(file: &dyn StoredFile) -> std::io::Result<()> {
    const PIECE: usize = 1 << 16;
    let (len, zeros) = (file.len()?, vec![0; PIECE]);
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let count = PIECE.min(usize::try_from(len - at).unwrap_or(PIECE));
        match file.read_at(&mut piece[..count], at) {
            Ok(()) if crate::format::is_zero(&piece[..count]) => {}
            Ok(()) => file.write_at(&zeros[..count], at)?,
            // Whole pages: of one that is written in part, the system would read the rest.
            Err(error) if is_unreadable(&error) => file.write_at(&zeros[..count.next_multiple_of(PAGE_BYTES)], at)?,
            Err(error) => return Err(error),
        }
        at += count as u64;
    }
    piece.fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Files;

    #[test]
    fn file_names_and_numbers_are_each_others_inverse() {
        for file in [0, 1, 0x2a, u32::MAX] {
            assert_eq!(file_number(&file_name(file)), Some(file));
        }
        for name in
            ["seg-2a.idx", "seg-0000002A.idx", "seg-0000002a.tmp", "seg-+000002a.idx", "MANIFEST", "seg-000000002a.idx"]
        {
            assert_eq!(file_number(name), None, "{name}");
        }
    }

    #[test]
    fn a_destroyed_file_is_overwritten_before_its_name_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("seg-00000000.idx"), dir.path().join("another name"));
        std::fs::write(&path, vec![5; 200_000]).unwrap();
        std::fs::hard_link(&path, &other).unwrap();
        destroy(&Files, &path).unwrap();
        assert!(!path.exists());
        assert!(std::fs::read(&other).unwrap() == vec![0; 200_000]);
    }
}
