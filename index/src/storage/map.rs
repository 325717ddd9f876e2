//! A read-only memory map of a file. Only [`super::pages`] reads through it.

use std::fs::File;
use std::io;

use memmap2::{Advice, MmapOptions, MmapRaw};

/// The first bytes of a file, mapped for reading. Made by [`StoredFile::map`](super::StoredFile::map).
#[derive(Debug)]
pub struct Map(MmapRaw);

impl Map {
    /// # Errors
    /// The system's error; `UnexpectedEof` if the file is shorter than `len`.
    pub(super) fn of(file: &File, len: usize) -> io::Result<Self> {
        // Touching bytes beyond the end of a file raises SIGBUS.
        if file.metadata()?.len() < len as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(MmapOptions::new().len(len).map_raw_read_only(file)?))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }

    /// Asks the system to read ahead.
    pub(super) fn will_read(&self) {
        // Only advice: if the system ignores it, reading is slower but still correct.
        let _ = self.0.advise(Advice::WillNeed);
    }
}
