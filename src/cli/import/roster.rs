//! Reads the CSV file that says whose palm each row of an array is.
//!
//! The header names the columns: `subject_id` must be there; `hand` and `request_id` may be;
//! others are ignored and named. Line after line belongs to row after row. The file is read
//! twice: [`Roster::scan`] counts it and finds subject ids that come more than once, before
//! anything is sent; [`Roster::lines`] then gives it out line by line. Of a list of millions
//! only eight bytes a subject are held, and only while scanning.
//!
//! Does not know vectors or servers.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use csv::{ByteRecord, ReaderBuilder};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Why a list of subjects cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum RosterError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why, with the place where there is one.
        source: csv::Error,
    },
    /// The header lacks the one column that must be there.
    #[error("{} has no column subject_id; its header is: {found}", path.display())]
    NoSubjectColumn {
        /// The file.
        path: PathBuf,
        /// The columns it has.
        found: String,
    },
    /// The same column twice.
    #[error("{} has the column {column} more than once", path.display())]
    ColumnTwice {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
    },
}

/// Places of the columns that mean something.
#[derive(Debug, Clone, Copy)]
struct Columns {
    subject_id: usize,
    hand: Option<usize>,
    request_id: Option<usize>,
}

/// A list of subjects on disk, scanned once.
#[derive(Debug)]
pub struct Roster {
    path: PathBuf,
    ignored: Vec<String>,
    rows: u64,
    digest: u64,
    /// Digests of subject ids that begin more than one run of lines (or collide with one that does).
    suspects: HashSet<u64>,
}

/// One line of the list: as it stands there, nothing checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RosterLine {
    /// Counted from 1, the header included: what an editor shows.
    pub line: u64,
    /// Bytes that are not UTF-8 are replaced, so that a bad id is refused by name.
    pub subject_id: String,
    /// Empty where there is no such column.
    pub hand: String,
    /// Empty where there is no such column.
    pub request_id: String,
}

impl Roster {
    /// Reads the whole file once.
    ///
    /// # Errors
    /// [`RosterError`] where it cannot be read or its header does not do.
    pub fn scan(path: &Path) -> Result<Self, RosterError> {
        let mut digest = Xxh3::new();
        let (columns, ignored, mut reader) = open(path, |file| Digesting { file, digest: &mut digest })?;
        let unreadable = |source| RosterError::Unreadable { path: path.to_owned(), source };
        let mut runs: Vec<u64> = Vec::new();
        let mut rows = 0_u64;
        let mut record = ByteRecord::new();
        while reader.read_byte_record(&mut record).map_err(unreadable)? {
            rows += 1;
            let subject = xxh3_64(trimmed(record.get(columns.subject_id)));
            if runs.last() != Some(&subject) {
                runs.push(subject);
            }
        }
        drop(reader);
        runs.sort_unstable();
        let suspects = runs.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
        Ok(Self { path: path.to_owned(), ignored, rows, digest: digest.digest(), suspects })
    }

    /// Where the list is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lines after the header.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// A digest of the file's bytes.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Columns that mean nothing here.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Whether `subject_id` may begin more than one run of lines. Never false where it does.
    #[must_use]
    pub fn suspects(&self, subject_id: &str) -> bool {
        self.suspects.contains(&xxh3_64(subject_id.as_bytes()))
    }

    /// The lines in order.
    ///
    /// # Errors
    /// [`RosterError`] where the file cannot be opened again.
    pub fn lines(&self) -> Result<RosterLines, RosterError> {
        let (columns, _, reader) = open(&self.path, |file| file)?;
        Ok(RosterLines { path: self.path.clone(), columns, reader, record: ByteRecord::new() })
    }
}

/// The lines of a [`Roster`].
pub struct RosterLines {
    path: PathBuf,
    columns: Columns,
    reader: RecordReader<File>,
    record: ByteRecord,
}

impl Iterator for RosterLines {
    type Item = Result<RosterLine, RosterError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.reader.read_byte_record(&mut self.record) {
            Ok(false) => None,
            Ok(true) => {
                let text = |at: Option<usize>| {
                    String::from_utf8_lossy(trimmed(at.and_then(|at| self.record.get(at)))).into_owned()
                };
                // The reader stands behind the record's line break; only breaks within the record
                // lie between. (Where it began is no help: blank lines before it count to it.)
                let breaks = self.record.as_slice().iter().filter(|byte| **byte == b'\n').count() as u64;
                Some(Ok(RosterLine {
                    line: self.reader.position().line().saturating_sub(1 + breaks),
                    subject_id: text(Some(self.columns.subject_id)),
                    hand: text(self.columns.hand),
                    request_id: text(self.columns.request_id),
                }))
            }
            Err(source) => Some(Err(RosterError::Unreadable { path: self.path.clone(), source })),
        }
    }
}

/// Feeds a digest with what is read.
struct Digesting<'a> {
    file: File,
    digest: &'a mut Xxh3,
}

impl Read for Digesting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.digest.update(&buffer[..count]);
        Ok(count)
    }
}

/// Text with every line ended by one line feed, the last one too: so that the reader's count of
/// lines means the same in files of every system.
struct UnixLines<R> {
    text: R,
    /// A carriage return that has been read and not been given out.
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
                // A held byte may go out before this one.
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

/// Reads CSV records from a file, or from what a file is wrapped in.
type RecordReader<R> = csv::Reader<UnixLines<BufReader<R>>>;

/// Opens the list at `path` and reads its header: the places of the columns, the names of those
/// that mean nothing, and the reader at the first line after it.
fn open<R: Read>(
    path: &Path,
    wrap: impl FnOnce(File) -> R,
) -> Result<(Columns, Vec<String>, RecordReader<R>), RosterError> {
    let unreadable = |source: csv::Error| RosterError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(|error| unreadable(error.into()))?;
    let mut reader = ReaderBuilder::new().flexible(true).buffer_capacity(1 << 18).from_reader(UnixLines {
        text: BufReader::with_capacity(1 << 18, wrap(file)),
        held: false,
        last: b'\n',
    });
    let header = reader.byte_headers().map_err(unreadable)?;
    let names: Vec<String> = header
        .iter()
        .map(|name| String::from_utf8_lossy(name).trim_start_matches('\u{feff}').trim().to_owned())
        .collect();
    let place = |column: &'static str| -> Result<Option<usize>, RosterError> {
        let mut places = names.iter().enumerate().filter(|(_, name)| *name == column).map(|(at, _)| at);
        let first = places.next();
        match places.next() {
            Some(_) => Err(RosterError::ColumnTwice { path: path.to_owned(), column }),
            None => Ok(first),
        }
    };
    let subject_id = place("subject_id")?.ok_or_else(|| RosterError::NoSubjectColumn {
        path: path.to_owned(),
        found: if names.is_empty() { "empty".to_owned() } else { names.join(", ") },
    })?;
    let columns = Columns { subject_id, hand: place("hand")?, request_id: place("request_id")? };
    let ignored = names
        .iter()
        .enumerate()
        .filter(|(at, _)| ![Some(columns.subject_id), columns.hand, columns.request_id].contains(&Some(*at)))
        .map(|(_, name)| name.clone())
        .collect();
    Ok((columns, ignored, reader))
}

fn trimmed(field: Option<&[u8]>) -> &[u8] {
    field.unwrap_or_default().trim_ascii()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn roster(text: &[u8]) -> (tempfile::NamedTempFile, Result<Roster, RosterError>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        let scanned = Roster::scan(file.path());
        (file, scanned)
    }

    fn line(line: u64, subject_id: &str, hand: &str, request_id: &str) -> RosterLine {
        RosterLine { line, subject_id: subject_id.to_owned(), hand: hand.to_owned(), request_id: request_id.to_owned() }
    }

    #[test]
    fn columns_are_found_by_name_in_any_order() {
        let (_file, scanned) =
            roster(b"\xef\xbb\xbfhand, phone ,subject_id,request_id\r\nleft,1,ann,r1\r\n,2,\"bo,b\",\r\n");
        let scanned = scanned.unwrap();
        assert_eq!(scanned.rows(), 2);
        assert_eq!(scanned.ignored(), ["phone"]);
        let lines: Vec<_> = scanned.lines().unwrap().map(Result::unwrap).collect();
        assert_eq!(lines, [line(2, "ann", "left", "r1"), line(3, "bo,b", "", "")]);
    }

    #[test]
    fn optional_columns_may_be_missing_and_lines_may_be_short() {
        let (_file, scanned) = roster(b"subject_id,hand\nann\nbob,right,more\n");
        let lines: Vec<_> = scanned.unwrap().lines().unwrap().map(Result::unwrap).collect();
        assert_eq!(lines, [line(2, "ann", "", ""), line(3, "bob", "right", "")]);
    }

    #[test]
    fn bytes_that_are_not_text_do_not_stop_the_list() {
        let (_file, scanned) = roster(b"subject_id\n\xff\xfe\nbob\n");
        let lines: Vec<_> = scanned.unwrap().lines().unwrap().map(Result::unwrap).collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].subject_id.contains('\u{fffd}'));
    }

    #[test]
    fn a_header_without_subject_id_is_refused_with_what_was_found() {
        let (_file, scanned) = roster(b"id,hand\n1,left\n");
        let message = scanned.unwrap_err().to_string();
        assert!(message.contains("subject_id") && message.contains("id, hand"), "{message}");
        let (_file, scanned) = roster(b"");
        assert!(matches!(scanned.unwrap_err(), RosterError::NoSubjectColumn { .. }));
        let (_file, scanned) = roster(b"subject_id,hand,hand\n1,left,left\n");
        assert!(matches!(scanned.unwrap_err(), RosterError::ColumnTwice { column: "hand", .. }));
    }

    #[test]
    fn only_ids_that_come_again_after_others_are_suspect() {
        let (_file, scanned) = roster(b"subject_id\nann\nann\nbob\ncid\nbob\n");
        let scanned = scanned.unwrap();
        assert!(scanned.suspects("bob"));
        assert!(!scanned.suspects("ann") && !scanned.suspects("cid"));
    }

    #[test]
    fn the_digest_follows_every_byte() {
        let (_one, one) = roster(b"subject_id\nann\n");
        let (_two, two) = roster(b"subject_id\nanm\n");
        let (_again, again) = roster(b"subject_id\nann\n");
        let (one, two, again) = (one.unwrap(), two.unwrap(), again.unwrap());
        assert_ne!(one.digest(), two.digest());
        assert_eq!(one.digest(), again.digest());
    }

    #[test]
    fn line_numbers_are_those_of_an_editor_on_every_system() {
        let text = "subject_id,note\nann,\"two\nlines\"\n\n\nbob,x\ncid,y";
        for text in [text.to_owned(), format!("{text}\n"), text.replace('\n', "\r\n")] {
            let (_file, scanned) = roster(text.as_bytes());
            let scanned = scanned.unwrap();
            assert_eq!(scanned.rows(), 3);
            let lines: Vec<u64> = scanned.lines().unwrap().map(|line| line.unwrap().line).collect();
            assert_eq!(lines, [2, 6, 7], "{text:?}");
        }
    }
}
