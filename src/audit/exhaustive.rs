//! The other answer: FAISS's scores of every live row, turned into ranked subjects.
//!
//! Shares nothing with `search` but the reading of rows and metadata: which rows a probe is
//! compared with, what a subject's score is and which subjects are the best is computed here
//! independently.
//!
//! Memory does not grow with the gallery. FAISS gets [`chunk_rows`] rows at a time, and returns the
//! `depth` best of each chunk for every probe. The argument that the k best subjects are all among
//! those: let `complete_above` be the highest of the chunks' last scores (of chunks with more rows
//! than that). Every row above it has been seen, so the ranking is complete above it. If fewer than k
//! subjects reach it (many templates per subject, many equal scores), the probe is searched again,
//! eight times as deep, in the worst case with every row of a chunk.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use thenar_index::{Row, RowMeta, Snapshot, SubjectNumber, TemplateId};

use super::AuditError;
use super::faiss::{FaissError, Flat};
use crate::search::Probe;

/// Values of the rows that FAISS holds at a time: 128 MiB.
const CHUNK_VALUES: usize = 1 << 25;
/// Values that are widened to f32 before FAISS copies them.
const STAGED_VALUES: usize = 1 << 20;
/// Rows of named subjects that are scored together, each with every probe.
const NAMED_ROWS: usize = 2048;
/// Scores that one search of FAISS may return: 48 MiB with their labels.
const RESULTS_MAX: usize = 1 << 22;
/// How much deeper a probe is searched if its ranking was not complete.
const DEEPER: usize = 8;
/// Rows between two reports of progress.
const PROGRESS_ROWS: u64 = 4096;
/// Codes of hands: unspecified, left, right.
const HANDS: usize = 3;

/// Rows that FAISS holds at a time.
#[must_use]
pub fn chunk_rows(dim: usize) -> usize {
    (CHUNK_VALUES / dim).max(1)
}

/// A subject and its score: that of its best row that can be compared with the probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// The registry's number of the subject.
    pub subject: SubjectNumber,
    /// The client's name, from the row's metadata.
    pub subject_id: Box<str>,
    /// FAISS's score.
    pub score: f32,
}

/// A row of a subject that Thenar found for a probe.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedRow {
    /// Whose it is.
    pub subject: SubjectNumber,
    /// The client's name, from the row's metadata.
    pub subject_id: Box<str>,
    /// The template it holds.
    pub template: TemplateId,
    /// The code of its hand.
    pub hand: u8,
    /// FAISS's score.
    pub score: f32,
}

/// What FAISS says of one probe.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Exhaustive {
    /// The best subjects, best first: as many as were asked for, or all there are.
    pub best: Vec<Ranked>,
    /// Every live row that can be compared, of the subjects that were named.
    pub named: Vec<NamedRow>,
}

/// What a pass over the gallery found.
#[derive(Debug, Default)]
pub struct Seen {
    /// One per probe, in order.
    pub found: Vec<Exhaustive>,
    /// Live rows.
    pub rows: u64,
    /// The length of the longest row.
    pub row_norm_max: f64,
}

/// Compares `probes` with every live row. `k` subjects are ranked for each; `named` lists, for
/// each, the subjects whose rows are to be scored whatever their rank. `on_progress` gets the rows done
/// and says whether to continue.
///
/// # Errors
/// [`AuditError::Interrupted`] if `on_progress` says so, and any error of FAISS.
pub fn search(
    snapshot: &Snapshot,
    probes: &[Probe],
    k: usize,
    named: &[HashSet<SubjectNumber>],
    on_progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Seen, AuditError> {
    let everyone: Vec<usize> = (0..probes.len()).collect();
    let mut depth = 2 * k + 8;
    let mut pass = Pass::new(snapshot, probes, &everyone, k, depth, named)?;
    let (rows, row_norm_max) = pass.read(on_progress)?;
    let (best, named_rows) = (pass.best, pass.named_rows);
    let mut seen = Seen { found: Vec::with_capacity(probes.len()), rows, row_norm_max };
    let mut incomplete = Vec::new();
    for ((at, best), named) in best.into_iter().enumerate().zip(named_rows) {
        if !best.is_complete(k) {
            incomplete.push(at);
        }
        seen.found.push(Exhaustive { best: best.ranked, named });
    }
    while !incomplete.is_empty() {
        depth = (depth * DEEPER).min(chunk_rows(snapshot.dim()));
        let mut still_incomplete = Vec::new();
        for some in incomplete.chunks((RESULTS_MAX / depth).max(1)) {
            let mut pass = Pass::new(snapshot, probes, some, k, depth, &[])?;
            // The rows of this reading are counted already.
            pass.read(&mut |_| on_progress(rows))?;
            for (best, &at) in pass.best.into_iter().zip(some) {
                if !best.is_complete(k) {
                    still_incomplete.push(at);
                }
                seen.found[at].best = best.ranked;
            }
        }
        incomplete = still_incomplete;
    }
    Ok(seen)
}

/// The best subjects of one probe so far.
struct Best {
    /// By falling score; never more than were asked for.
    ranked: Vec<Ranked>,
    /// Every row above this has been seen.
    complete_above: f32,
}

impl Best {
    fn offer(&mut self, k: usize, row: &HeldRow, score: f32) {
        if let Some(at) = self.ranked.iter().position(|r| r.subject == row.subject) {
            if self.ranked[at].score >= score {
                return;
            }
            self.ranked.remove(at);
        }
        let at = self.ranked.partition_point(|r| r.score >= score);
        if at < k {
            self.ranked.truncate(k - 1);
            let subject_id = row.subject_id.clone();
            self.ranked.insert(at, Ranked { subject: row.subject, subject_id, score });
        }
    }

    fn is_complete(&self, k: usize) -> bool {
        let reached = if self.ranked.len() == k { self.ranked[k - 1].score } else { f32::NEG_INFINITY };
        self.complete_above <= reached
    }
}

/// What is kept of a row that FAISS holds.
struct HeldRow {
    subject: SubjectNumber,
    subject_id: Box<str>,
    template: TemplateId,
    hand: u8,
}

/// Rows that FAISS holds, and whose they are.
struct Rows {
    flat: Flat,
    rows: Vec<HeldRow>,
    /// Widened rows that FAISS does not have yet.
    staged: Vec<f32>,
}

impl Rows {
    fn new(dim: usize) -> Result<Self, FaissError> {
        Ok(Self { flat: Flat::new(dim)?, rows: Vec::new(), staged: Vec::new() })
    }

    /// Adds a row. Returns its squared length.
    fn add(&mut self, meta: &RowMeta<'_>, values: &[f16]) -> Result<f64, FaissError> {
        let at = self.staged.len();
        self.staged.resize(at + values.len(), 0.0);
        values.convert_to_f32_slice(&mut self.staged[at..]);
        let square = square(&self.staged[at..]);
        self.rows.push(HeldRow {
            subject: meta.subject,
            subject_id: meta.label.into(),
            template: meta.template,
            hand: meta.hand,
        });
        if self.staged.len() >= STAGED_VALUES {
            self.flush()?;
        }
        Ok(square)
    }

    fn flush(&mut self) -> Result<(), FaissError> {
        if !self.staged.is_empty() {
            self.flat.add(&self.staged)?;
            self.staged.clear();
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<(), FaissError> {
        self.rows.clear();
        self.flat.clear()
    }
}

/// Whether a probe may be compared with a row, by the codes of their hands: the same one, or one
/// that is not specified (0).
fn comparable(probe: u8, row: u8) -> bool {
    probe == 0 || row == 0 || probe == row
}

/// The group of rows of that hand. A code that no version of this program writes counts as a hand
/// that is not specified.
fn group_of(hand: u8) -> usize {
    let hand = usize::from(hand);
    if hand < HANDS { hand } else { 0 }
}

/// The squared length, in eight sums, so that additions need not wait for each other.
fn square(values: &[f32]) -> f64 {
    let (eights, rest) = values.as_chunks::<8>();
    let mut sums = [0.0_f64; 8];
    for eight in eights {
        for (sum, value) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>()
}

/// One pass over the gallery with some of the probes.
struct Pass<'a> {
    snapshot: &'a Snapshot,
    k: usize,
    depth: usize,
    /// Code of each probe's hand.
    hands: Vec<u8>,
    /// The probes, row-major.
    values: Vec<f32>,
    named: &'a [HashSet<SubjectNumber>],
    /// All subjects named for any probe.
    named_by_any: HashSet<SubjectNumber>,
    best: Vec<Best>,
    named_rows: Vec<Vec<NamedRow>>,
    /// Rows by the code of their hand, so that a probe is compared only with those that it may be.
    by_hand: Vec<Rows>,
    named_held: Rows,
}

impl<'a> Pass<'a> {
    fn new(
        snapshot: &'a Snapshot,
        probes: &[Probe],
        chosen: &[usize],
        k: usize,
        depth: usize,
        named: &'a [HashSet<SubjectNumber>],
    ) -> Result<Self, FaissError> {
        let dim = snapshot.dim();
        Ok(Self {
            snapshot,
            k,
            depth,
            hands: chosen.iter().map(|at| probes[*at].hand as u8).collect(),
            values: chosen.iter().flat_map(|at| &probes[*at].vector).copied().collect(),
            named,
            named_by_any: named.iter().flatten().copied().collect(),
            best: chosen.iter().map(|_| Best { ranked: Vec::new(), complete_above: f32::NEG_INFINITY }).collect(),
            named_rows: vec![Vec::new(); chosen.len()],
            by_hand: (0..HANDS).map(|_| Rows::new(dim)).collect::<Result<_, _>>()?,
            named_held: Rows::new(dim)?,
        })
    }

    /// Reads every live row. Returns how many there are and the length of the longest.
    fn read(&mut self, on_progress: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<(u64, f64), AuditError> {
        let snapshot = self.snapshot;
        let chunk = chunk_rows(snapshot.dim());
        let (mut rows, mut held, mut square_max) = (0_u64, 0, 0.0_f64);
        for number in 0..snapshot.rows_end() {
            let Some(meta) = snapshot.meta(Row(number)) else { continue };
            let values = snapshot.row(Row(number));
            square_max = square_max.max(self.by_hand[group_of(meta.hand)].add(&meta, values)?);
            if self.named_by_any.contains(&meta.subject) {
                self.named_held.add(&meta, values)?;
                if self.named_held.rows.len() >= NAMED_ROWS {
                    self.score_named()?;
                }
            }
            rows += 1;
            held += 1;
            if held == chunk {
                self.search_chunk()?;
                held = 0;
            }
            if rows.is_multiple_of(PROGRESS_ROWS) && on_progress(rows).is_break() {
                return Err(AuditError::Interrupted);
            }
        }
        self.search_chunk()?;
        self.score_named()?;
        Ok((rows, square_max.sqrt()))
    }

    /// Searches the rows that FAISS holds, and removes them.
    fn search_chunk(&mut self) -> Result<(), FaissError> {
        let dim = self.snapshot.dim();
        for (hand, held_rows) in self.by_hand.iter_mut().enumerate() {
            held_rows.flush()?;
            let hand = u8::try_from(hand).expect("hands are few");
            let who: Vec<usize> = (0..self.hands.len()).filter(|at| comparable(self.hands[*at], hand)).collect();
            for who in who.chunks((RESULTS_MAX / self.depth).max(1)) {
                let probes: Vec<f32> =
                    who.iter().flat_map(|at| &self.values[at * dim..(at + 1) * dim]).copied().collect();
                let hits = held_rows.flat.best(&probes, self.depth)?;
                for (&at, hits) in who.iter().zip(hits) {
                    let best = &mut self.best[at];
                    for (row, score) in &hits {
                        best.offer(self.k, &held_rows.rows[*row], *score);
                    }
                    if let Some((_, last)) = hits.last().filter(|_| hits.len() < held_rows.rows.len()) {
                        best.complete_above = best.complete_above.max(*last);
                    }
                }
            }
            held_rows.clear()?;
        }
        Ok(())
    }

    /// Scores the rows of named subjects, and removes them.
    fn score_named(&mut self) -> Result<(), FaissError> {
        let held_rows = &mut self.named_held;
        held_rows.flush()?;
        let dim = self.snapshot.dim();
        let together = (RESULTS_MAX / held_rows.rows.len().max(1)).max(1);
        for (group, probes) in self.values.chunks(together * dim).enumerate() {
            for (at, hits) in (group * together..).zip(held_rows.flat.best(probes, held_rows.rows.len())?) {
                for (place, score) in hits {
                    let row = &held_rows.rows[place];
                    let hand = u8::try_from(group_of(row.hand)).expect("hands are few");
                    if self.named[at].contains(&row.subject) && comparable(self.hands[at], hand) {
                        self.named_rows[at].push(NamedRow {
                            subject: row.subject,
                            subject_id: row.subject_id.clone(),
                            template: row.template,
                            hand,
                            score,
                        });
                    }
                }
            }
        }
        held_rows.clear()
    }
}

impl Exhaustive {
    /// The rows of each named subject.
    pub(super) fn rows_by_subject(&self) -> HashMap<SubjectNumber, Vec<&NamedRow>> {
        let mut rows: HashMap<SubjectNumber, Vec<&NamedRow>> = HashMap::new();
        for row in &self.named {
            rows.entry(row.subject).or_default().push(row);
        }
        rows
    }
}
