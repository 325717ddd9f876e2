//! Whether the disk gives all bytes of a file.
//!
//! A page of a map that the disk does not give is a SIGBUS, which ends the process; read with `pread`
//! it is an error. So a file is read once before its map is trusted. Its pages are in the page cache
//! then, which is where the map finds them.
//!
//! Knows bytes. Does not know rows.

use std::io;

use rayon::prelude::*;

use crate::storage::StoredFile;

/// Bytes one task reads at once.
const PIECE_BYTES: u64 = 1 << 20;
/// What is read, and reported, as one.
pub(crate) const PAGE_BYTES: usize = 4096;
/// What Linux answers for sectors that cannot be read, or that a file system finds to be wrong by its
/// own checksums: EIO, ENODATA, EBADMSG, EUCLEAN.
const UNREADABLE: [i32; 4] = [5, 61, 74, 117];

/// Whether the system did its part, and the disk does not give the bytes.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| UNREADABLE.contains(&code))
}

/// Reads all `len` bytes of `file`. The first page that the disk does not give, by its first byte; none
/// if it gives every one.
///
/// # Errors
/// What else the system says.
pub(crate) fn first_unreadable(file: &dyn StoredFile, len: u64) -> io::Result<Option<u64>> {
    let search = |scratch: &mut Scratch, piece: u64| {
        let (start, end) = (piece * PIECE_BYTES, len.min((piece + 1) * PIECE_BYTES));
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
    let found = (0..len.div_ceil(PIECE_BYTES)).into_par_iter().map_init(Scratch::default, search);
    found.find_first(|found| !matches!(found, Ok(None))).unwrap_or(Ok(None))
}

/// Memory that templates are read into, and that is overwritten when it is no longer needed.
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
