//! Removes a file so that its bytes do not stay on the disk.

use std::io;
use std::path::Path;

use super::readable::{PAGE_BYTES, is_unreadable};
use super::{Storage, StoredFile};
use crate::bytes::is_zero;
use crate::error::Error;

/// Overwrites a file with zeros, then removes it: segment files hold templates, and the bytes of an
/// unlinked file stay on the disk. Bytes that are already zero are not written, so that holes of a
/// sparse file stay holes and this works on a full disk. Unreadable bytes are written: the disk then
/// replaces the bad sectors.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn destroy(storage: &dyn Storage, path: &Path) -> Result<(), Error> {
    let file = storage.open(path).map_err(Error::io(path, "open"))?;
    zero_out(&*file).map_err(Error::io(path, "overwrite"))?;
    file.sync().map_err(Error::io(path, "sync"))?;
    storage.remove(path).map_err(Error::io(path, "remove"))
}

fn zero_out(file: &dyn StoredFile) -> io::Result<()> {
    const CHUNK: usize = 1 << 16;
    let (len, zeros) = (file.size()?, vec![0; CHUNK]);
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < len {
        let count = CHUNK.min(usize::try_from(len - at).unwrap_or(CHUNK));
        match file.read_at(&mut chunk[..count], at) {
            Ok(()) if is_zero(&chunk[..count]) => {}
            Ok(()) => file.write_at(&zeros[..count], at)?,
            // Whole pages: to write a part of a page, the system would read the rest of it.
            Err(error) if is_unreadable(&error) => file.write_at(&zeros[..count.next_multiple_of(PAGE_BYTES)], at)?,
            Err(error) => return Err(error),
        }
        at += count as u64;
    }
    chunk.fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Files;

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
