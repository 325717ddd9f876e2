//! What the right answers are, and how right a peer's are.
//!
//! The oracle is a brute force in f64 over the stored rows, written without any of Thenar's code.
//! Knows rows, probes and answers; does not know who gave them.

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::gallery::{Gallery, Probes};
use crate::peer::{Answered, Hit, PeerKind};

/// How far a sum in f32 of at most 1024 products of unit vectors may be off.
const F32_ERROR_MAX: f64 = 1e-4;
/// How far two sums of the same products in f64 may be apart.
const F64_ERROR_MAX: f64 = 1e-12;
/// Rows compared with every probe before the next are read.
const BLOCK_ROWS: usize = 256;

/// The k best rows of every probe.
pub struct Truth {
    k: usize,
    /// For each probe, best first; ties by the smaller row.
    best: Vec<Vec<Hit>>,
}

impl Truth {
    /// Scores every row against every probe.
    #[must_use]
    pub fn new(gallery: &Gallery, probes: &Probes, k: usize) -> Self {
        let (dim, count) = (gallery.dim(), probes.len());
        let best = gallery
            .rows()
            .par_chunks(BLOCK_ROWS * dim)
            .enumerate()
            .fold(
                || vec![Vec::new(); count],
                |mut best: Vec<Vec<Hit>>, (block, rows)| {
                    let mut wide = vec![0.0; rows.len()];
                    rows.convert_to_f32_slice(&mut wide);
                    for (probe, best) in best.iter_mut().enumerate() {
                        let probe = probes.values(probe..probe + 1);
                        let bar = if best.len() < k { f64::NEG_INFINITY } else { best[k - 1].score };
                        let before = best.len();
                        for (at, row) in wide.chunks_exact(dim).enumerate() {
                            let row_number = u32::try_from(block * BLOCK_ROWS + at).expect("a row number");
                            let score = product(row, probe);
                            // Rows come by ascending number, so one that ties with the last is after it.
                            if score >= bar {
                                best.push(Hit { row: row_number, score });
                            }
                        }
                        if best.len() > before {
                            keep_best(best, k);
                        }
                    }
                    best
                },
            )
            .reduce(
                || vec![Vec::new(); count],
                |mut all, more| {
                    for (best, more) in all.iter_mut().zip(more) {
                        best.extend(more);
                        keep_best(best, k);
                    }
                    all
                },
            );
        Self { k, best }
    }

    /// The best rows of a probe that reach `tau`, best first.
    #[must_use]
    pub fn wanted(&self, probe: usize, tau: Option<f64>) -> &[Hit] {
        let best = &self.best[probe];
        let reach = best.partition_point(|hit| tau.is_none_or(|tau| hit.score >= tau));
        &best[..reach]
    }
}

fn keep_best(best: &mut Vec<Hit>, k: usize) {
    best.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
    best.truncate(k);
}

/// The product of a row and a probe: a sum in f64 over eight lanes. Both have a multiple of 8
/// components.
#[must_use]
pub fn product(row: &[f32], probe: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; 8];
    for (row, probe) in row.chunks_exact(8).zip(probe.chunks_exact(8)) {
        for lane in 0..8 {
            lanes[lane] += f64::from(row[lane]) * f64::from(probe[lane]);
        }
    }
    lanes.iter().sum()
}

fn exact(row: &[f16], probe: &[f32]) -> f64 {
    row.iter().zip(probe).map(|(row, probe)| f64::from(row.to_f32()) * f64::from(*probe)).sum()
}

/// How right the answers of one peer are.
pub struct Judge<'a> {
    gallery: &'a Gallery,
    probes: &'a Probes,
    truth: &'a Truth,
    kind: PeerKind,
    answers: Vec<Option<Vec<Hit>>>,
    wanted: u64,
    found: u64,
    mates_missed: u64,
    score_error_max: f64,
    wrong: Option<String>,
}

/// The judgement.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Probes that were answered.
    pub judged: usize,
    /// Share of the rows that belong in the answers and are there.
    pub recall: f64,
    /// Probes whose mate belongs in the answer and is not there.
    pub mates_missed: u64,
    /// Largest difference between a peer's score and the exact one; meaningless where scores are approximate.
    pub score_error_max: f64,
    /// Hash of all answers by probe: rows and the bits of their scores.
    pub hash: u64,
    /// Why a peer that must be right is not.
    pub wrong: Option<String>,
}

impl<'a> Judge<'a> {
    /// Nothing judged yet.
    #[must_use]
    pub fn new(gallery: &'a Gallery, probes: &'a Probes, truth: &'a Truth, kind: PeerKind) -> Self {
        Self {
            gallery,
            probes,
            truth,
            kind,
            answers: vec![None; probes.len()],
            wanted: 0,
            found: 0,
            mates_missed: 0,
            score_error_max: 0.0,
            wrong: None,
        }
    }

    /// Takes the answers of one call. A probe that was answered before must be answered the same by
    /// a peer that is exact.
    pub fn take(&mut self, answered: &Answered) {
        for (probe, hits) in (answered.first..).zip(&answered.hits) {
            match &self.answers[probe] {
                None => {
                    self.judge(probe, hits);
                    self.answers[probe] = Some(hits.clone());
                }
                Some(before) => {
                    if matches!(self.kind, PeerKind::Exact { .. }) && before != hits {
                        self.fail(probe, "two searches had two answers");
                    }
                }
            }
        }
    }

    fn judge(&mut self, probe: usize, hits: &[Hit]) {
        let tau = if let PeerKind::Exact { tau } = self.kind { tau } else { None };
        let truth = self.truth;
        let wanted = truth.wanted(probe, tau);
        let own = |hit: &Hit| {
            let row = self.gallery.row(hit.row as usize);
            exact(row, self.probes.values(probe..probe + 1))
        };
        let true_scores: Vec<f64> = hits.iter().map(own).collect();
        let error = hits.iter().zip(&true_scores).map(|(hit, score)| (hit.score - score).abs()).fold(0.0, f64::max);
        self.score_error_max = self.score_error_max.max(error);

        // A row that ties with the last wanted one, to rounding, is as good as it.
        let last = wanted.last().map_or(f64::INFINITY, |hit| hit.score);
        let slack = if matches!(self.kind, PeerKind::Exact { .. }) { F64_ERROR_MAX } else { F32_ERROR_MAX / 10.0 };
        let good = true_scores.iter().filter(|score| **score >= last - slack).count().min(wanted.len());
        self.wanted += wanted.len() as u64;
        self.found += good as u64;
        let mate = self.probes.mate(probe);
        let mate_wanted = wanted.iter().any(|hit| hit.row == mate);
        self.mates_missed += u64::from(mate_wanted && !hits.iter().any(|hit| hit.row == mate));

        match self.kind {
            PeerKind::Exact { .. } => {
                if hits.len() != wanted.len() || hits.len() > truth.k {
                    self.fail(probe, &format!("{} rows were found, {} are right", hits.len(), wanted.len()));
                }
                for (hit, right) in hits.iter().zip(wanted) {
                    let tie = (hit.score - right.score).abs() <= F64_ERROR_MAX;
                    if !tie {
                        self.fail(probe, &format!("row {} with {}, not {right:?}", hit.row, hit.score));
                    }
                }
                if error > F64_ERROR_MAX {
                    self.fail(probe, &format!("a score is off by {error:e}"));
                }
            }
            PeerKind::Baseline => {
                if good < wanted.len() {
                    self.fail(probe, &format!("only {good} of {} rows", wanted.len()));
                }
                if error > F32_ERROR_MAX {
                    self.fail(probe, &format!("a score is off by {error:e}"));
                }
            }
            PeerKind::Approximate => {}
        }
    }

    fn fail(&mut self, probe: usize, why: &str) {
        self.wrong.get_or_insert_with(|| format!("probe {probe}: {why}"));
    }

    /// The answer to a probe, if it was given.
    #[must_use]
    pub fn answer(&self, probe: usize) -> Option<&[Hit]> {
        self.answers[probe].as_deref()
    }

    /// The judgement of everything taken.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let mut hash = Xxh3::new();
        for (probe, hits) in self.answers.iter().enumerate() {
            let Some(hits) = hits else { continue };
            hash.update(&(probe as u64).to_le_bytes());
            for hit in hits {
                hash.update(&hit.row.to_le_bytes());
                hash.update(&hit.score.to_bits().to_le_bytes());
            }
        }
        Verdict {
            judged: self.answers.iter().flatten().count(),
            recall: if self.wanted == 0 { 1.0 } else { self.found as f64 / self.wanted as f64 },
            mates_missed: self.mates_missed,
            score_error_max: self.score_error_max,
            hash: hash.digest(),
            wrong: self.wrong.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gallery::GalleryKind;

    const EXACT: PeerKind = PeerKind::Exact { tau: None };

    fn verdict(kind: PeerKind, change: impl Fn(usize, &mut Vec<Hit>)) -> Verdict {
        let gallery = Gallery::new(GalleryKind::Standard, 1, 3000, 64);
        let probes = gallery.probes(8);
        let truth = Truth::new(&gallery, &probes, 5);
        let tau = if let PeerKind::Exact { tau } = kind { tau } else { None };
        let mut judge = Judge::new(&gallery, &probes, &truth, kind);
        let hits = (0..8).map(|probe| {
            let mut hits = truth.wanted(probe, tau).to_vec();
            change(probe, &mut hits);
            hits
        });
        judge.take(&Answered { first: 0, hits: hits.collect() });
        judge.verdict()
    }

    #[test]
    fn the_truth_is_that_of_sorting_every_score() {
        let gallery = Gallery::new(GalleryKind::Clustered, 2, 1100, 64);
        let probes = gallery.probes(3);
        let truth = Truth::new(&gallery, &probes, 7);
        for probe in 0..3 {
            let mut all: Vec<(f64, usize)> =
                (0..1100).map(|row| (exact(gallery.row(row), probes.values(probe..probe + 1)), row)).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let rows: Vec<usize> = truth.best[probe].iter().map(|hit| hit.row as usize).collect();
            assert_eq!(rows, all[..7].iter().map(|(_, row)| *row).collect::<Vec<_>>());
        }
    }

    #[test]
    fn right_answers_pass_with_full_recall() {
        for kind in [EXACT, PeerKind::Exact { tau: Some(0.5) }, PeerKind::Baseline, PeerKind::Approximate] {
            let verdict = verdict(kind, |_, _| {});
            assert_eq!((verdict.recall, verdict.mates_missed, verdict.judged), (1.0, 0, 8));
            assert_eq!(verdict.wrong, None, "{kind:?}");
        }
    }

    #[test]
    fn a_missing_row_is_wrong_for_the_exact_and_less_recall_for_the_approximate() {
        let without_mate = |probe: usize, hits: &mut Vec<Hit>| {
            if probe == 3 {
                hits.remove(0);
            }
        };
        for kind in [EXACT, PeerKind::Baseline] {
            assert!(verdict(kind, without_mate).wrong.unwrap().starts_with("probe 3"), "{kind:?}");
        }
        let approximate = verdict(PeerKind::Approximate, without_mate);
        assert_eq!(approximate.wrong, None);
        assert_eq!(approximate.mates_missed, 1);
        assert!((approximate.recall - 39.0 / 40.0).abs() < 1e-9);
    }

    #[test]
    fn a_score_that_is_off_is_wrong_for_the_exact_from_the_last_bits_on() {
        let off = |by: f64| move |_: usize, hits: &mut Vec<Hit>| hits[1].score += by;
        assert!(verdict(EXACT, off(1e-9)).wrong.is_some());
        assert!(verdict(PeerKind::Baseline, off(1e-6)).wrong.is_none());
        assert!(verdict(PeerKind::Baseline, off(1e-3)).wrong.is_some());
    }

    #[test]
    fn another_row_in_place_of_a_right_one_is_wrong() {
        let worse = |_: usize, hits: &mut Vec<Hit>| hits[4].row = (hits[4].row + 1) % 3000;
        assert!(verdict(EXACT, worse).wrong.is_some());
        assert!(verdict(PeerKind::Baseline, worse).wrong.is_some());
    }

    #[test]
    fn the_hash_sees_rows_and_scores() {
        let hash = |change: fn(usize, &mut Vec<Hit>)| verdict(PeerKind::Approximate, change).hash;
        let right = hash(|_, _| {});
        assert_eq!(right, hash(|_, _| {}));
        assert_ne!(right, hash(|_, hits| hits[0].score = hits[0].score.next_up()));
        assert_ne!(right, hash(|_, hits| hits[2].row ^= 1));
    }
}
