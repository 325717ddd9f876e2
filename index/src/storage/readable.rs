//! Whether the disk can read all bytes of a file.
//!
//! Touching an unreadable page of a map raises SIGBUS, which ends the process; reading it with `pread`
//! returns an error. So a file is read once before its map is used. Its pages are then in the page
//! cache, where the map finds them.
//!
//! Knows bytes. Does not know rows.

use std::io;

use rayon::prelude::*;

use super::StoredFile;

/// Bytes that one task reads at once.
const CHUNK_BYTES: u64 = 1 << 20;
/// Granularity of reports.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Linux's errors for sectors that cannot be read, or whose contents fail the file system's own
/// checksums: EIO, ENODATA, EBADMSG, EUCLEAN.
const UNREADABLE: [i32; 4] = [5, 61, 74, 117];

/// Whether the error says that the disk cannot read the bytes.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| UNREADABLE.contains(&code))
}

/// Reads all `len` bytes of `file` and returns the offset of the first unreadable page, if there is one.
///
/// # Errors
/// Any other error of the system.
pub(crate) fn first_unreadable(file: &dyn StoredFile, len: u64) -> io::Result<Option<u64>> {
    let search = |scratch: &mut Scratch, chunk: u64| {
        let (start, end) = (chunk * CHUNK_BYTES, len.min((chunk + 1) * CHUNK_BYTES));
        if scratch.reads(file, start, end)? {
            return Ok(None);
        }
        for page in (start..end).step_by(PAGE_BYTES) {
            if !scratch.reads(file, page, end.min(page + PAGE_BYTES as u64))? {
                return Ok(Some(page));
            }
        }
        Ok(None)
    };
    let found = (0..len.div_ceil(CHUNK_BYTES)).into_par_iter().map_init(Scratch::default, search);
    found.find_first(|found| !matches!(found, Ok(None))).unwrap_or(Ok(None))
}

/// A buffer for templates, which is zeroed when it is dropped.
#[derive(Default)]
struct Scratch(Vec<u8>);

impl Scratch {
    fn reads(&mut self, file: &dyn StoredFile, start: u64, end: u64) -> io::Result<bool> {
        let bytes = (end - start) as usize;
        if self.0.len() < bytes {
            self.0.resize(bytes, 0);
        }
        match file.read_at(&mut self.0[..bytes], start) {
            Ok(()) => Ok(true),
            Err(error) if is_unreadable(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.0.fill(0);
    }
}
