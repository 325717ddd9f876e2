//! Files and folders: what the index asks of a disk, and what it keeps there.
//!
//! [`Storage`] and [`StoredFile`] are all that the index asks of a file system. [`Files`] is the real
//! one. Tests insert one that loses what was not synced, tears writes at sector boundaries or fails the
//! n-th operation. Above it are the folder with its manifest and lock, and segment files with
//! their mapped pages.
//!
//! A program that changes the files of a folder without the index breaks it: files are mapped, and the
//! lock is only advisory.

mod destroy;
pub(crate) mod directory;
mod files;
mod lock;
mod map;
mod pages;
pub(crate) mod readable;
mod segment;

use std::fmt;
use std::io;
use std::path::Path;

pub(crate) use destroy::destroy;
pub use files::Files;
pub(crate) use lock::Lock;
pub use map::Map;
pub(crate) use pages::Pages;
pub(crate) use segment::Segment;

/// The operations of a file system that the index needs.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Creates a file, or truncates an existing one, and opens it for reading and writing.
    ///
    /// # Errors
    /// The system's error.
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoredFile>>;

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// The system's error; `NotFound` if there is no such file.
    fn open(&self, path: &Path) -> io::Result<Box<dyn StoredFile>>;

    /// Renames a file, replacing any file that has the new name.
    ///
    /// # Errors
    /// The system's error.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name.
    ///
    /// # Errors
    /// The system's error.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Returns once all changes of names in `dir` will survive a power cut.
    ///
    /// # Errors
    /// The system's error.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// The names in `dir`; empty if there is no such folder.
    ///
    /// # Errors
    /// The system's error.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// A number that no segment had before. It distinguishes segments that had the same file name.
    fn fresh_identity(&self) -> u64;
}

/// An open file.
pub trait StoredFile: Send + Sync + fmt::Debug {
    /// The file's length in bytes.
    ///
    /// # Errors
    /// The system's error.
    fn size(&self) -> io::Result<u64>;

    /// Fills `bytes` with the file's bytes from offset `at`.
    ///
    /// # Errors
    /// The system's error; `UnexpectedEof` if the file ends earlier.
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `bytes` at offset `at`.
    ///
    /// # Errors
    /// The system's error, such as a full disk. Some of the bytes may have been written.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Sets the file's length. New bytes read as zero and take no room on the disk.
    ///
    /// # Errors
    /// The system's error.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Returns once everything written before will survive a power cut.
    ///
    /// # Errors
    /// The system's error.
    fn sync(&self) -> io::Result<()>;

    /// Maps the first `len` bytes for reading. The file must be at least that long.
    ///
    /// # Errors
    /// The system's error.
    fn map(&self, len: usize) -> io::Result<Map>;
}
