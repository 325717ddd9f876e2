//! Turns an array and its list of subjects into messages, one subject for each run of lines.
//!
//! Consecutive lines with one subject id are one subject. A subject with a bad line is left out
//! entirely, so that the line can be corrected and the subject enrolled as it was meant; what was
//! wrong is reported line by line. Nothing here waits or sends.
//!
//! Invariant: batches cover the rows in order without gaps, and never end inside a subject.

use std::collections::HashMap;
use std::iter::Peekable;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::roster::{Roster, RosterLine, RosterLines};
use crate::api::proto::{BulkEnrollItem, BulkEnrollRequest, EnrollRequest};
use crate::cli::client::sample;
use crate::cli::embeddings::{self, EmbeddingRows, EmbeddingsFile};
use crate::cli::error::CliError;
use crate::model::{Hand, RequestId, SubjectId, TEMPLATES_PER_SUBJECT_MAX};

/// Subjects a message may have (`enrollment.proto`).
pub(super) const ITEMS_MAX: usize = 1024;
/// A message is closed once it holds this many bytes: half the protocol's limit, and more than
/// the largest subject (16 templates of 2048 values: 128 KiB).
pub(super) const MESSAGE_BYTES: usize = 4 << 20;
/// Reports that are gathered before they are passed on, even if no subject goes with them.
const REJECTIONS_MAX: usize = 1024;

/// A line that cannot be enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rejection {
    /// Line in the list of subjects, from 1.
    pub(super) line: u64,
    /// As the list has it.
    pub(super) subject_id: String,
    /// What is wrong and what the limit is; never biometric data.
    pub(super) reason: String,
}

/// Consecutive rows of the array, ready to be sent.
#[derive(Debug)]
pub(super) struct Batch {
    /// The subjects that can be enrolled; `sequence` is the subject's first line in the list.
    pub(super) message: BulkEnrollRequest,
    /// First row.
    pub(super) first_row: u64,
    /// Row after the last one.
    pub(super) end_row: u64,
    /// What was found wrong among these rows.
    pub(super) rejections: Vec<Rejection>,
    /// Subjects that were left out for it.
    pub(super) rejected: u64,
}

/// Reads batches in order.
pub(super) struct Batches {
    rows: EmbeddingRows,
    lines: Peekable<RosterLines>,
    roster: Arc<Roster>,
    /// First line of each subject that the roster suspects of coming again.
    seen: HashMap<String, u64>,
    /// The row of the next line.
    row: u64,
    /// The first batch ends here, if it reaches so far.
    first_end_row: u64,
    items_max: usize,
    dim: usize,
}

impl Batches {
    /// Batches of the rows from `resumed.start` on, which must be the first row of a subject.
    /// The first batch goes no further than `resumed.end`, if that is after the start: so a run that
    /// continues begins with rows that were acknowledged already, and with no others.
    ///
    /// # Errors
    /// [`CliError`] if a file cannot be opened or read.
    pub(super) fn new(
        embeddings: &EmbeddingsFile,
        roster: Arc<Roster>,
        resumed: Range<u64>,
        items_max: usize,
    ) -> Result<Self, CliError> {
        let mut batches = Self {
            rows: embeddings.rows_from(resumed.start)?,
            lines: roster.lines()?.peekable(),
            roster,
            seen: HashMap::new(),
            row: 0,
            first_end_row: if resumed.is_empty() { u64::MAX } else { resumed.end },
            items_max: items_max.clamp(1, ITEMS_MAX),
            dim: embeddings.dim(),
        };
        // The lines before are read again for the ids in them.
        while batches.row < resumed.start {
            let Some(line) = batches.lines.next().transpose()? else { break };
            batches.row += 1;
            if batches.roster.suspects(&line.subject_id) {
                batches.seen.entry(line.subject_id).or_insert(line.line);
            }
        }
        Ok(batches)
    }

    /// The next batch; none at the end of the list.
    ///
    /// # Errors
    /// [`CliError`] if a file cannot be read.
    pub(super) fn read(&mut self) -> Result<Option<Batch>, CliError> {
        let first_row = self.row;
        let mut batch = Batch {
            message: BulkEnrollRequest { items: Vec::with_capacity(self.items_max), after_forget: None },
            first_row,
            end_row: first_row,
            rejections: Vec::new(),
            rejected: 0,
        };
        let mut bytes = 0;
        while batch.message.items.len() < self.items_max
            && bytes < MESSAGE_BYTES
            && batch.rejections.len() < REJECTIONS_MAX
            && self.row < self.first_end_row
        {
            let Some(line) = self.lines.next().transpose()? else { break };
            match self.subject(line)? {
                Ok(item) => {
                    bytes += self.encoded_bytes(&item);
                    batch.message.items.push(item);
                }
                Err(rejections) => {
                    batch.rejections.extend(rejections);
                    batch.rejected += 1;
                }
            }
        }
        self.first_end_row = u64::MAX;
        batch.end_row = self.row;
        Ok((batch.end_row > first_row).then_some(batch))
    }

    /// Reads the subject that begins with `first`, all its lines and rows.
    fn subject(&mut self, first: RosterLine) -> Result<Result<BulkEnrollItem, Vec<Rejection>>, CliError> {
        let (sequence, subject_id) = (first.line, first.subject_id.clone());
        let mut rejections = Vec::new();
        let mut reject = |line: u64, reason: String| {
            rejections.push(Rejection { line, subject_id: subject_id.clone(), reason });
        };
        if let Err(invalid) = SubjectId::new(&subject_id) {
            reject(sequence, invalid.to_string());
        }
        if self.roster.suspects(&subject_id)
            && let Some(earlier) = self.seen.insert(subject_id.clone(), sequence)
        {
            reject(
                sequence,
                format!(
                    "subject_id: comes again here after line {earlier}; the lines of a subject must follow one another"
                ),
            );
        }
        let request_id = first.request_id.clone();
        if !request_id.is_empty()
            && let Err(invalid) = RequestId::new(&request_id)
        {
            reject(sequence, invalid.to_string());
        }
        let mut samples = Vec::with_capacity(1);
        let mut digest = Sha256::new();
        digest.update((subject_id.len() as u64).to_le_bytes());
        digest.update(subject_id.as_bytes());
        let mut next = Some(first);
        let mut templates = 0;
        while let Some(line) = next {
            self.row += 1;
            templates += 1;
            if templates <= TEMPLATES_PER_SUBJECT_MAX {
                let values = self.rows.read()?;
                if let Some(problem) = embeddings::problem(&values) {
                    reject(line.line, problem);
                } else {
                    match line.hand.parse::<Hand>() {
                        Ok(hand) => {
                            digest.update([hand as u8]);
                            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                            digest.update(&bytes);
                            samples.push(sample(values, hand));
                        }
                        Err(invalid) => reject(line.line, invalid.to_string()),
                    }
                }
            } else {
                self.rows.skip(1)?;
            }
            next = match self.lines.peek() {
                Some(Ok(line)) if line.subject_id == subject_id => self.lines.next().transpose()?,
                _ => None,
            };
        }
        if templates > TEMPLATES_PER_SUBJECT_MAX {
            reject(
                sequence,
                format!(
                    "subject_id: has {templates} lines, a subject has at most {TEMPLATES_PER_SUBJECT_MAX} templates"
                ),
            );
        }
        if !rejections.is_empty() {
            return Ok(Err(rejections));
        }
        let request_id = if request_id.is_empty() { derived_request_id(digest) } else { request_id };
        let enrollment = EnrollRequest { request_id, subject_id, samples };
        Ok(Ok(BulkEnrollItem { sequence, enrollment: Some(enrollment) }))
    }

    /// An upper bound of an item's bytes on the wire.
    fn encoded_bytes(&self, item: &BulkEnrollItem) -> usize {
        let samples = item.enrollment.as_ref().map_or(0, |enrollment| enrollment.samples.len());
        256 + samples * (4 * self.dim + 32)
    }
}

/// A request id that follows from the subject id, the hands and the vectors: the same content
/// gets the same name in every run, wherever it is in the files. One-way (SHA-256, 128 bits
/// of it), so that the name of the request tells nothing about the palm.
fn derived_request_id(digest: Sha256) -> String {
    let digest = digest.finalize();
    let half: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("import-{half}")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cli::embeddings::tests::npy_f32;

    fn vector(seed: u16) -> Vec<f32> {
        (0..32).map(|i| f32::from(seed) + if i == 0 { 1.0 } else { 0.0 }).collect()
    }

    fn batches(rows: &[Vec<f32>], list: &str, resumed: Range<u64>, items_max: usize) -> (tempfile::TempDir, Batches) {
        let folder = tempfile::tempdir().unwrap();
        let (npy, csv) = (folder.path().join("g.npy"), folder.path().join("s.csv"));
        fs::write(&npy, npy_f32(rows, 32)).unwrap();
        fs::write(&csv, list).unwrap();
        let embeddings = EmbeddingsFile::open(&npy).unwrap();
        let roster = Arc::new(Roster::scan(&csv).unwrap());
        let batches = Batches::new(&embeddings, roster, resumed, items_max).unwrap();
        (folder, batches)
    }

    fn subjects(batch: &Batch) -> Vec<(u64, &str, usize)> {
        batch
            .message
            .items
            .iter()
            .map(|item| {
                let enrollment = item.enrollment.as_ref().unwrap();
                (item.sequence, enrollment.subject_id.as_str(), enrollment.samples.len())
            })
            .collect()
    }

    #[test]
    fn consecutive_lines_are_one_subject_and_batches_end_between_subjects() {
        let rows: Vec<_> = (0..6).map(vector).collect();
        let list = "subject_id,hand\nann,left\nann,right\nbob,\ncid,left\ncid,left\ncid,right\n";
        let (_folder, mut batches) = batches(&rows, list, 0..0, 2);
        let first = batches.read().unwrap().unwrap();
        assert_eq!(subjects(&first), [(2, "ann", 2), (4, "bob", 1)]);
        assert_eq!((first.first_row, first.end_row), (0, 3));
        let samples = &first.message.items[0].enrollment.as_ref().unwrap().samples;
        assert_eq!(samples[1], sample(vector(1), Hand::Right));
        let second = batches.read().unwrap().unwrap();
        assert_eq!(subjects(&second), [(5, "cid", 3)]);
        assert_eq!((second.first_row, second.end_row), (3, 6));
        assert!(batches.read().unwrap().is_none());
    }

    #[test]
    fn a_bad_line_leaves_out_its_subject_and_nobody_else() {
        let mut rows: Vec<_> = (0..7).map(vector).collect();
        rows[1][5] = f32::NAN;
        rows[2] = vec![0.0; 32];
        let list = "subject_id,hand\nann,left\nann,right\nbob,\ncid,middle\nd d,left\ncid,left\neve,right\n";
        let (_folder, mut batches) = batches(&rows, list, 0..0, 100);
        let batch = batches.read().unwrap().unwrap();
        assert_eq!(subjects(&batch), [(8, "eve", 1)]);
        assert_eq!(batch.rejected, 5);
        let told: Vec<(u64, &str)> =
            batch.rejections.iter().map(|rejection| (rejection.line, rejection.subject_id.as_str())).collect();
        assert_eq!(told, [(3, "ann"), (4, "bob"), (5, "cid"), (6, "d d"), (7, "cid")]);
        for (rejection, word) in batch.rejections.iter().zip(["finite", "zero vector", "hand", "subject_id", "line 5"])
        {
            assert!(rejection.reason.contains(word), "{word}: {}", rejection.reason);
        }
    }

    #[test]
    fn a_subject_has_at_most_sixteen_templates() {
        let rows: Vec<_> = (0..34).map(vector).collect();
        let list = format!("subject_id\n{}{}bob\n", "ann\n".repeat(16), "cid\n".repeat(17));
        let (_folder, mut batches) = batches(&rows, &list, 0..0, 100);
        let batch = batches.read().unwrap().unwrap();
        assert_eq!(subjects(&batch), [(2, "ann", 16), (35, "bob", 1)]);
        assert_eq!(
            batch.message.items[1].enrollment.as_ref().unwrap().samples[0],
            sample(vector(33), Hand::Unspecified)
        );
        assert!(batch.rejections[0].reason.contains("17 lines"), "{}", batch.rejections[0].reason);
    }

    #[test]
    fn going_on_at_a_row_still_knows_the_ids_before_it() {
        let rows: Vec<_> = (0..4).map(vector).collect();
        let (_folder, mut batches) = batches(&rows, "subject_id\nann\nbob\nann\ncid\n", 2..2, 100);
        let batch = batches.read().unwrap().unwrap();
        assert_eq!(subjects(&batch), [(5, "cid", 1)]);
        assert_eq!((batch.first_row, batch.rejections[0].line), (2, 4));
        assert!(batch.rejections[0].reason.contains("after line 2"));
    }

    #[test]
    fn the_first_batch_after_going_on_holds_acknowledged_rows_only() {
        let rows: Vec<_> = (0..5).map(vector).collect();
        let (_folder, mut batches) = batches(&rows, "subject_id\nann\nbob\ncid\ndan\neve\n", 1..3, 100);
        let first = batches.read().unwrap().unwrap();
        assert_eq!((first.first_row, first.end_row), (1, 3));
        let second = batches.read().unwrap().unwrap();
        assert_eq!((second.first_row, second.end_row), (3, 5));
    }

    #[test]
    fn the_request_id_follows_from_the_content_and_from_nothing_else() {
        let id = |rows: &[Vec<f32>], list: &str, at: usize| {
            let (_folder, mut batches) = batches(rows, list, 0..0, 100);
            let batch = batches.read().unwrap().unwrap();
            batch.message.items[at].enrollment.as_ref().unwrap().request_id.clone()
        };
        let alone = id(&[vector(7)], "subject_id,hand\nann,left\n", 0);
        assert_eq!(alone, id(&[vector(1), vector(7)], "hand,subject_id,x\nleft,bob,\nl,ann,y\n", 1), "elsewhere");
        assert_ne!(alone, id(&[vector(8)], "subject_id,hand\nann,left\n", 0), "another vector");
        assert_ne!(alone, id(&[vector(7)], "subject_id,hand\nann,right\n", 0), "another hand");
        assert_ne!(alone, id(&[vector(7)], "subject_id,hand\nanna,left\n", 0), "another subject");
        assert_ne!(alone, id(&[vector(7), vector(7)], "subject_id,hand\nann,left\nann,left\n", 0), "another template");
        assert!(RequestId::new(&alone).is_ok());
        assert_eq!(id(&[vector(7)], "subject_id,request_id\nann,mine\n", 0), "mine");
    }

    #[test]
    fn a_message_stays_under_its_bytes() {
        use prost::Message as _;
        let dim = 2048;
        let rows = vec![vec![1.0_f32; dim]; 16 * 40];
        let folder = tempfile::tempdir().unwrap();
        let (npy, csv) = (folder.path().join("g.npy"), folder.path().join("s.csv"));
        fs::write(&npy, npy_f32(&rows, dim)).unwrap();
        let list: String = (0..40).flat_map(|i| std::iter::repeat_n(format!("s{i}\n"), 16)).collect();
        fs::write(&csv, format!("subject_id\n{list}")).unwrap();
        let embeddings = EmbeddingsFile::open(&npy).unwrap();
        let mut batches = Batches::new(&embeddings, Arc::new(Roster::scan(&csv).unwrap()), 0..0, 1024).unwrap();
        let mut count = 0;
        while let Some(batch) = batches.read().unwrap() {
            assert!(batch.message.encoded_len() <= MESSAGE_BYTES + (160 << 10), "{}", batch.message.encoded_len());
            count += batch.message.items.len();
        }
        assert_eq!(count, 40);
    }
}
