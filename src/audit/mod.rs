//! Is every answer that of an exhaustive search, on this gallery? Asks FAISS.
//!
//! Each probe is answered by Thenar's own search path, under every certificate, with and without a
//! threshold, and by FAISS's exhaustive inner product search over the same stored rows; the answers
//! are compared subject by subject.
//!
//! - [`exhaustive`]: FAISS's scores, and the ranking of subjects that follows from them.
//! - [`mod@compare`]: what is a difference, and what is rounding.
//! - [`faiss`]: FAISS itself.
//!
//! Knows snapshots, probes and answers. Does not know data folders, keys, files of embeddings or
//! who asked. Changes nothing. Searches have one probe each: the fusion of several is not audited.
//!
//! Invariant: whatever the size of the gallery, memory holds no more than one chunk of rows for FAISS
//! and the answers of one pass.

pub mod compare;
pub mod exhaustive;
pub mod faiss;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thenar_index::{Row, Snapshot, SubjectNumber};

use self::compare::{Difference, compare, tolerance};
use self::faiss::FaissError;
use crate::engine::certificate::Certificate;
use crate::model::synthetic::SyntheticGallery;
use crate::model::{Embedding, Hand};
use crate::search::{Answer, NO_FLOOR, Probe, Search, SearchError};
use crate::vault::Rotation;

/// Probes of one pass over the gallery, at most.
const PROBES_PER_PASS_MAX: usize = 1024;
/// Subjects that the answers of one pass may list in all: their rows are scored one by one.
const LISTED_PER_PASS_MAX: usize = 16_384;
/// Differences kept for the report; all are counted.
const DIFFERENCES_KEPT: usize = 20;

/// Why an audit did not finish.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// FAISS failed.
    #[error(transparent)]
    Faiss(#[from] FaissError),
    /// Thenar could not answer.
    #[error("Thenar could not answer: {0}")]
    Search(#[from] SearchError),
    /// There is no template to make a probe from.
    #[error("the gallery is empty: there is no template to make a probe from")]
    EmptyGallery,
    /// There is nothing to compare.
    #[error("there are no probes: an audit without probes would prove nothing")]
    NoProbes,
    /// It was asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// The searches that both sides answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Subjects that each search ranks. At least 1.
    pub k: usize,
    /// The floor of the searches that have one.
    pub threshold: f64,
    /// Under which certificates.
    pub certificates: Vec<Certificate>,
    /// Searches of a batch.
    pub batch: usize,
}

/// What was found about the searches of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// The certificate asked for.
    pub certificate: Certificate,
    /// The floor; none if the search is for the k best of all.
    pub threshold: Option<f64>,
    /// Searches compared.
    pub searches: u64,
    /// Searches answered under the deterministic certificate, whether it was asked for or not.
    pub held_deterministic: u64,
    /// Listed subjects whose scores were compared.
    pub compared: u64,
    /// The largest distance between two scores of one subject.
    pub score_difference_max: f64,
    /// Ranks at which rounding to f32 puts another subject.
    pub ranks_within_rounding: u64,
    /// Searches whose answer is not that of the exhaustive search.
    pub disagreements: u64,
    /// Time that Thenar needed.
    pub thenar: Duration,
}

/// One search whose answer is wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Disagreement {
    /// Number of the probe, from 0.
    pub probe: u64,
    /// The certificate asked for.
    pub certificate: Certificate,
    /// The floor; none if the search is for the k best of all.
    pub threshold: Option<f64>,
    /// What is wrong.
    pub difference: Difference,
}

/// What an audit found so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// One per certificate and floor.
    pub lines: Vec<Line>,
    /// Probes compared.
    pub probes: u64,
    /// Live templates that FAISS compared each probe with.
    pub templates: u64,
    /// The largest tolerance that was applied to any probe.
    pub tolerance: f64,
    /// The first differences.
    pub disagreements: Vec<Disagreement>,
    /// Time that FAISS needed, including the reading of rows.
    pub faiss: Duration,
}

impl Report {
    /// Whether every answer was that of the exhaustive search.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.lines.iter().all(|line| line.disagreements == 0)
    }
}

/// An audit in progress.
pub struct Audit<'a> {
    answer: &'a mut Answering<'a>,
    asked: Asked,
    report: Report,
}

/// Answers a batch of searches as the server would.
pub type Answering<'a> = dyn FnMut(&[&Search]) -> Result<Vec<Answer>, SearchError> + 'a;

impl<'a> Audit<'a> {
    /// An audit of the answers that `answer` gives.
    pub fn new(asked: Asked, answer: &'a mut Answering<'a>) -> Self {
        assert!(asked.k > 0 && asked.batch > 0, "the edge refuses empty searches");
        let floors = [Some(asked.threshold), None];
        let kinds = asked.certificates.iter().flat_map(|certificate| floors.map(|floor| (*certificate, floor)));
        let lines = kinds.map(|(certificate, threshold)| Line {
            certificate,
            threshold,
            searches: 0,
            held_deterministic: 0,
            compared: 0,
            score_difference_max: 0.0,
            ranks_within_rounding: 0,
            disagreements: 0,
            thenar: Duration::ZERO,
        });
        let report = Report {
            lines: lines.collect(),
            probes: 0,
            templates: 0,
            tolerance: 0.0,
            disagreements: Vec::new(),
            faiss: Duration::ZERO,
        };
        Self { answer, asked, report }
    }

    /// Probes that [`Audit::pass`] takes at a time, so that memory stays bounded.
    #[must_use]
    pub fn probes_per_pass(&self) -> usize {
        (LISTED_PER_PASS_MAX / self.asked.k).clamp(1, PROBES_PER_PASS_MAX)
    }

    /// Comparisons of a probe with a template in an audit of so many probes.
    #[must_use]
    pub fn comparisons(&self, probes: usize, templates: u64) -> u64 {
        (self.report.lines.len() as u64 + 1) * probes as u64 * templates
    }

    /// Answers `probes` with Thenar and with FAISS over `snapshot`, which must be what `answer`
    /// searches, and compares. `on_progress` gets the comparisons of a probe with a template so far,
    /// of [`Audit::comparisons`], and says whether to continue. A pass that was stopped counts for
    /// nothing.
    ///
    /// # Errors
    /// [`AuditError`] if one of the two fails, or `on_progress` says to stop.
    pub fn pass(
        &mut self,
        snapshot: &Snapshot,
        probes: &[Probe],
        on_progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), AuditError> {
        assert!(probes.len() <= self.probes_per_pass(), "a pass of bounded size");
        let live = snapshot.live();
        let mut done = 0;
        let mut answered = Vec::with_capacity(self.report.lines.len());
        for line in &self.report.lines {
            let searches: Vec<Search> = probes.iter().map(|probe| self.asked.search(line, probe)).collect();
            let started = Instant::now();
            let mut answers = Vec::with_capacity(searches.len());
            for batch in searches.chunks(self.asked.batch) {
                answers.extend((self.answer)(&batch.iter().collect::<Vec<_>>())?);
                done += live * batch.len() as u64;
                if on_progress(done).is_break() {
                    return Err(AuditError::Interrupted);
                }
            }
            answered.push((searches, answers, started.elapsed()));
        }

        let mut named: Vec<HashSet<SubjectNumber>> = vec![HashSet::new(); probes.len()];
        for (_, answers, _) in &answered {
            for (named, answer) in named.iter_mut().zip(answers) {
                named.extend(answer.found.iter().map(|found| found.subject));
            }
        }
        let started = Instant::now();
        // One more than is listed, so that a missing subject is among them.
        let mut on_rows = |rows: u64| on_progress(done + rows * probes.len() as u64);
        let seen = exhaustive::search(snapshot, probes, self.asked.k + 1, &named, &mut on_rows)?;
        self.report.faiss += started.elapsed();
        self.report.templates = seen.rows;

        let first = self.report.probes;
        for (line, (searches, answers, took)) in self.report.lines.iter_mut().zip(answered) {
            line.thenar += took;
            for (at, (search, answer)) in (0..).zip(searches.iter().zip(&answers)) {
                let faiss = &seen.found[usize::try_from(at).unwrap_or(usize::MAX)];
                let probe_norm = norm(&search.probes[0].vector);
                let tolerance = tolerance(snapshot.dim(), seen.row_norm_max, probe_norm);
                self.report.tolerance = self.report.tolerance.max(tolerance);
                let verdict = compare(search, answer, faiss, seen.rows, tolerance);
                line.searches += 1;
                line.held_deterministic += u64::from(answer.certificate == Certificate::Deterministic);
                line.compared += verdict.compared;
                line.score_difference_max = line.score_difference_max.max(verdict.score_difference_max);
                line.ranks_within_rounding += verdict.ranks_within_rounding;
                line.disagreements += u64::from(!verdict.differences.is_empty());
                for difference in verdict.differences {
                    if self.report.disagreements.len() < DIFFERENCES_KEPT {
                        self.report.disagreements.push(Disagreement {
                            probe: first + at,
                            certificate: line.certificate,
                            threshold: line.threshold,
                            difference,
                        });
                    }
                }
            }
        }
        self.report.probes += probes.len() as u64;
        Ok(())
    }

    /// What was found.
    #[must_use]
    pub fn into_report(self) -> Report {
        self.report
    }
}

impl Asked {
    fn search(&self, line: &Line, probe: &Probe) -> Search {
        Search {
            probes: vec![probe.clone()],
            floor: line.threshold.unwrap_or(NO_FLOOR),
            k: self.k,
            certificate: line.certificate,
            allowed: None,
        }
    }
}

/// Makes probes from stored templates, as the standard gallery makes captures: the template plus
/// noise of a given length, in a direction that is drawn as the standard gallery draws palms,
/// normalised. The hand of every second probe is not specified.
pub struct Sampler {
    /// Rows, in the order of the probes.
    rows: Vec<Row>,
    noise: f32,
    draws: SyntheticGallery,
}

impl Sampler {
    /// Chooses the templates of `count` probes, each with equal probability.
    ///
    /// # Errors
    /// [`AuditError::EmptyGallery`] if there are none.
    pub fn new(snapshot: &Snapshot, count: usize, noise: f32, seed: u64) -> Result<Self, AuditError> {
        let live: u64 = (0..snapshot.rows_end()).filter(|row| snapshot.is_live(Row(*row))).count() as u64;
        if live == 0 {
            return Err(AuditError::EmptyGallery);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut places: Vec<u64> = (0..count).map(|_| rng.random_range(0..live)).collect();
        places.sort_unstable();
        let mut rows = Vec::with_capacity(count);
        let live_rows = (0..snapshot.rows_end()).map(Row).filter(|row| snapshot.is_live(*row));
        for (place, row) in (0_u64..).zip(live_rows) {
            while places.get(rows.len()) == Some(&place) {
                rows.push(row);
            }
        }
        Ok(Self { rows, noise, draws: SyntheticGallery::new(seed, snapshot.dim()) })
    }

    /// The probes `first..end`.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn probes(&self, snapshot: &Snapshot, rotation: &Rotation, first: usize, end: usize) -> Vec<Probe> {
        let made = (first..end).map(|number| {
            let row = self.rows[number];
            let mut noise = vec![0.0; snapshot.dim()];
            self.draws.stranger(u32::try_from(number).unwrap_or(u32::MAX), &mut noise);
            let mut values = rotation.rotate(&noise);
            for (value, stored) in values.iter_mut().zip(snapshot.row(row)) {
                *value = stored.to_f32() + self.noise * *value;
            }
            let hand = snapshot.meta(row).and_then(|meta| Hand::from_code(meta.hand)).unwrap_or_default();
            Probe {
                hand: if number.is_multiple_of(2) { hand } else { Hand::Unspecified },
                vector: normalised(values).into(),
            }
        });
        made.collect()
    }
}

/// A probe of a client's embedding, whose hand is not known.
#[must_use]
pub fn probe_of(embedding: &Embedding, rotation: &Rotation) -> Probe {
    Probe { hand: Hand::Unspecified, vector: rotation.rotate(embedding.values()).into() }
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}

/// Scaled to unit length, as the engines need it. A zero vector stays as it is.
fn normalised(mut values: Vec<f32>) -> Vec<f32> {
    let norm = norm(&values);
    if norm > 0.0 {
        #[expect(clippy::cast_possible_truncation, reason = "a component of a unit vector rounds to f32")]
        values.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
    }
    values
}
