//! Reads the CSV file that says whose palm each row of an array is.
//!
//! The header names the columns: `subject_id` must be there; `hand` and `request_id` may be;
//! others are ignored and named. Line after line belongs to row after row. The file is read
//! twice: [`Roster::scan`] counts it and finds subject ids that come more than once, before
//! anything is sent; [`Roster::lines`] then returns it line by line. Of a list of millions only
//! eight bytes per subject are held, and only while scanning.
//!
//! Does not know vectors or servers.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::cli::lists::{CsvFile, ListError};

/// A list of subjects on disk, scanned once.
#[derive(Debug)]
pub(super) struct Roster {
    path: PathBuf,
    ignored: Vec<String>,
    rows: u64,
    digest: u64,
    /// Digests of subject ids that begin more than one run of lines (or collide with one that does).
    suspects: HashSet<u64>,
}

/// One line of the list as it stands there; nothing is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RosterLine {
    /// Counted from 1, the header included.
    pub(super) line: u64,
    pub(super) subject_id: String,
    /// Empty if there is no such column.
    pub(super) hand: String,
    /// Empty if there is no such column.
    pub(super) request_id: String,
}

impl Roster {
    /// Reads the whole file once.
    ///
    /// # Errors
    /// [`ListError`] if it cannot be read or its header is not usable.
    pub(super) fn scan(path: &Path) -> Result<Self, ListError> {
        let mut digest = Xxh3::new();
        let mut list = CsvFile::open_through(path, |file| Digesting { file, digest: &mut digest })?;
        let subject_id = list.required_column("subject_id")?;
        let known = [Some(subject_id), list.column("hand")?, list.column("request_id")?];
        let names = list.names().iter().enumerate();
        let ignored = names.filter(|(at, _)| !known.contains(&Some(*at))).map(|(_, name)| name.clone()).collect();
        let mut runs: Vec<u64> = Vec::new();
        let mut rows = 0_u64;
        while list.advance()? {
            rows += 1;
            let subject = xxh3_64(list.field(Some(subject_id)));
            if runs.last() != Some(&subject) {
                runs.push(subject);
            }
        }
        drop(list);
        runs.sort_unstable();
        let suspects = runs.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
        Ok(Self { path: path.to_owned(), ignored, rows, digest: digest.digest(), suspects })
    }

    /// Lines after the header.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// A digest of the file's bytes.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// Columns that are ignored.
    pub(super) fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Whether `subject_id` may begin more than one run of lines. Never false if it does.
    pub(super) fn suspects(&self, subject_id: &str) -> bool {
        self.suspects.contains(&xxh3_64(subject_id.as_bytes()))
    }

    /// The lines in order.
    ///
    /// # Errors
    /// [`ListError`] if the file cannot be opened again.
    pub(super) fn lines(&self) -> Result<RosterLines, ListError> {
        let list = CsvFile::open(&self.path)?;
        let columns = [Some(list.required_column("subject_id")?), list.column("hand")?, list.column("request_id")?];
        Ok(RosterLines { list, columns })
    }
}

/// The lines of a [`Roster`].
pub(super) struct RosterLines {
    list: CsvFile,
    columns: [Option<usize>; 3],
}

impl Iterator for RosterLines {
    type Item = Result<RosterLine, ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.list.advance() {
            Ok(false) => None,
            Ok(true) => {
                let [subject_id, hand, request_id] = self.columns.map(|column| self.list.text(column));
                Some(Ok(RosterLine { line: self.list.line(), subject_id, hand, request_id }))
            }
            Err(error) => Some(Err(error)),
        }
    }
}

/// Updates a digest with what is read.
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn roster(text: &[u8]) -> (tempfile::NamedTempFile, Result<Roster, ListError>) {
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
        assert!(matches!(scanned.unwrap_err(), ListError::NoColumn { .. }));
        let (_file, scanned) = roster(b"subject_id,hand,hand\n1,left,left\n");
        assert!(matches!(scanned.unwrap_err(), ListError::ColumnTwice { column: "hand", .. }));
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
