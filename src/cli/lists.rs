//! Lists that people give: CSV files with a header, and text files with one subject id per line.
//!
//! Does not know what the columns mean, or servers.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use csv::{ByteRecord, ReaderBuilder};

use super::error::CliError;
use crate::model::{Hand, Invalid};

/// Why a list cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: csv::Error },
    /// The header lacks a column that must be there.
    #[error("{} has no column {column}; its header is: {found}", path.display())]
    NoColumn { path: PathBuf, column: &'static str, found: String },
    #[error("{} has the column {column} more than once", path.display())]
    ColumnTwice { path: PathBuf, column: &'static str },
}

/// A CSV file that is read line by line.
pub(crate) struct CsvFile<R = File> {
    path: PathBuf,
    names: Vec<String>,
    reader: csv::Reader<UnixLines<BufReader<R>>>,
    record: ByteRecord,
}

impl CsvFile {
    /// Opens the file at `path` and reads its header.
    ///
    /// # Errors
    /// [`ListError::Unreadable`].
    pub(crate) fn open(path: &Path) -> Result<Self, ListError> {
        Self::open_through(path, |file| file)
    }
}

impl<R: Read> CsvFile<R> {
    /// As [`CsvFile::open`], reading through what `wrap` makes of the file.
    pub(crate) fn open_through(path: &Path, wrap: impl FnOnce(File) -> R) -> Result<Self, ListError> {
        let unreadable = |source: csv::Error| ListError::Unreadable { path: path.to_owned(), source };
        let file = File::open(path).map_err(|error| unreadable(error.into()))?;
        let text = BufReader::with_capacity(1 << 18, wrap(file));
        let mut reader = ReaderBuilder::new().flexible(true).buffer_capacity(1 << 18).from_reader(UnixLines {
            text,
            held: false,
            last: b'\n',
        });
        let header = reader.byte_headers().map_err(unreadable)?;
        let name = |name| String::from_utf8_lossy(name).trim_start_matches('\u{feff}').trim().to_owned();
        let names = header.iter().map(name).collect();
        Ok(Self { path: path.to_owned(), names, reader, record: ByteRecord::new() })
    }

    /// The columns' names, in order.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// The place of a column, if there is one.
    ///
    /// # Errors
    /// [`ListError::ColumnTwice`].
    pub(crate) fn column(&self, column: &'static str) -> Result<Option<usize>, ListError> {
        let mut places = (0..self.names.len()).filter(|at| self.names[*at] == column);
        let first = places.next();
        match places.next() {
            Some(_) => Err(ListError::ColumnTwice { path: self.path.clone(), column }),
            None => Ok(first),
        }
    }

    /// The place of a column that must be there.
    ///
    /// # Errors
    /// [`ListError::NoColumn`] with the columns that are there, [`ListError::ColumnTwice`].
    pub(crate) fn required_column(&self, column: &'static str) -> Result<usize, ListError> {
        self.column(column)?.ok_or_else(|| ListError::NoColumn {
            path: self.path.clone(),
            column,
            found: if self.names.is_empty() { "empty".to_owned() } else { self.names.join(", ") },
        })
    }

    /// Moves to the next line; false at the end.
    ///
    /// # Errors
    /// [`ListError::Unreadable`].
    pub(crate) fn advance(&mut self) -> Result<bool, ListError> {
        let read = self.reader.read_byte_record(&mut self.record);
        read.map_err(|source| ListError::Unreadable { path: self.path.clone(), source })
    }

    /// A field of this line without the spaces around it; empty if the line or the header has none.
    pub(crate) fn field(&self, column: Option<usize>) -> &[u8] {
        column.and_then(|at| self.record.get(at)).unwrap_or_default().trim_ascii()
    }

    /// A field as text. Bytes that are not UTF-8 are replaced, so that a bad id is refused by name.
    pub(crate) fn text(&self, column: Option<usize>) -> String {
        String::from_utf8_lossy(self.field(column)).into_owned()
    }

    /// The number of this line, counted from 1, the header included: what an editor shows.
    pub(crate) fn line(&self) -> u64 {
        // The reader stands behind the record's line break; only breaks within the record lie
        // between. (Where the record began does not help: blank lines before it count to it.)
        let breaks = self.record.as_slice().iter().filter(|byte| **byte == b'\n').count() as u64;
        self.reader.position().line().saturating_sub(1 + breaks)
    }
}

/// Text with every line ended by one line feed, the last one too: so that the reader's count of
/// lines means the same in files of every system.
struct UnixLines<R> {
    text: R,
    /// A carriage return that has been read and not been passed on.
    held: bool,
    last: u8,
}

impl<R: BufRead> Read for UnixLines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut written = 0;
        while written == 0 {
            let chunk = self.text.fill_buf()?;
            if chunk.is_empty() {
                if self.last == b'\n' || buffer.is_empty() {
                    return Ok(0);
                }
                (self.held, self.last, buffer[0]) = (false, b'\n', b'\n');
                return Ok(1);
            }
            let mut taken = 0;
            for &byte in chunk {
                // A held byte may be written before this one.
                if written + 2 > buffer.len() {
                    break;
                }
                taken += 1;
                if self.held && byte != b'\n' {
                    buffer[written] = b'\r';
                    written += 1;
                }
                self.held = byte == b'\r';
                self.last = byte;
                if !self.held {
                    buffer[written] = byte;
                    written += 1;
                }
            }
            self.text.consume(taken);
            if taken == 0 {
                return Err(std::io::Error::other("a buffer of at least two bytes is needed"));
            }
        }
        Ok(written)
    }
}

/// The subject ids of a text file, one per line, each with its origin for messages.
///
/// # Errors
/// [`CliError::File`] if it cannot be read.
pub(crate) fn subject_ids(path: &Path) -> Result<Vec<(String, String)>, CliError> {
    let text = std::fs::read_to_string(path).map_err(CliError::file("read", path))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    Ok(lines.map(|(at, line)| (origin(path, at as u64 + 1), line.trim().to_owned())).collect())
}

/// The column `hand` of a CSV file. Shape: `[lines]`.
///
/// # Errors
/// [`CliError`] if the file cannot be read or a hand is invalid.
pub(crate) fn hands(path: &Path) -> Result<Vec<Hand>, CliError> {
    let mut file = CsvFile::open(path)?;
    let Some(column) = file.column("hand")? else {
        let invalid =
            Invalid::new("hand", format!("there is no such column; the header is: {}", file.names().join(", ")));
        return Err(CliError::value(path.display())(invalid));
    };
    let mut hands = Vec::new();
    while file.advance()? {
        let hand = file.text(Some(column)).parse();
        hands.push(hand.map_err(CliError::value(origin(path, file.line())))?);
    }
    Ok(hands)
}

fn origin(path: &Path, line: u64) -> String {
    format!("{} line {line}", path.display())
}
