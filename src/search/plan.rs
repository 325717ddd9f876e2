//! Which rows to ask an engine for until the ranking is complete.
//!
//! The argument: let `c` be a score such that every live row of probe `p` with an exact score of at least `c`
//! has been looked at, for every probe `p` of a search. A subject whose fused score is at least `c` has, for
//! some probe, a comparable row of at least `c` (a mean does not exceed the largest of its terms), so the row
//! has been looked at, and the subject's fused score was computed from all its rows. Hence the ranking is
//! complete down to `c`: if `k` subjects reach `c`, or `c` is the search's floor, the answer is that of an
//! exhaustive scan.
//!
//! 1. Ask for the `keep` best rows of each probe at or above the floor. `c` is the highest of the floors
//!    that the engine says it held the probes to in the end ([`CandidateRows::floors`]).
//! 2. If that is not enough (many templates per subject, hands that cannot be compared, fused
//!    scores), ask again for everything at or above the `k`-th best fused score seen; or, if
//!    fewer than `k` subjects were seen, for eight times as many rows.
//! 3. A probe whose candidates overflow is answered by [`scan`], which scores every live row.
//!
//! # One moment
//!
//! All rounds read one snapshot, and which rows are live in a snapshot never changes: no round sees what is
//! enrolled or deleted while the search is under way. So the answer is that of an exhaustive scan at the
//! moment when the snapshot was taken, and deletions never make a search start again. Nobody is found after
//! their deletion was acknowledged: it is acknowledged only when every earlier snapshot has been dropped and
//! the bytes of the rows, in the files and in the engine, have been overwritten.
//!
//! # What a randomised certificate promises of a whole search
//!
//! Take a subject that belongs in the answer, and its best pair of probe and row; the pair's score is at
//! least the subject's fused score. Whatever earlier rounds did, the last round decides. It is the last
//! because the floors it held are at most the search's floor, or at most the `k`-th best fused score seen.
//! That score is reached by `k` subjects and is therefore at most this subject's. So the subject can be
//! missing only if the last round passed its pair over at a floor of at most the pair's own score.
//!
//! How many rounds there are, which codes the last one used, and which engine it was (a standby may
//! take over between two rounds, or within one) may depend on anything, including what was missed. So
//! the probability of a miss is bounded by that of a union of events, one per pass of an engine over codes in a
//! round: that the pass rules the pair out at a floor of at most the pair's score. These events are few:
//!
//! - A pass is over one kind of code in one engine, and draws its random numbers from the probe's [`Seed`],
//!   which is the same in every round and for every engine. Tables and their steps depend on probe, seed
//!   and certificate, never on floors.
//! - So for one pass and one pair only the floor differs from round to round. Bounds
//!   rise with the floor, hence each of these events lies inside the pass's event at the pair's own score
//!   (`certificate`), which is the same for all rounds.
//! - The passes of all engines together share the miss probability:
//!   [`PASSES`](crate::engine::certificate::PASSES) parts, one for each. The 4-bit codes of both engines have
//!   one part between them: each engine compares an upper bound of <q, u>, so both events lie inside the
//!   event that the exact <q, u> is below the higher of their two bounds.
//!
//! So nothing adds up over rounds: the probability of a miss, over rotation and seeds, is at most that of the
//! certificate, however many rounds a search takes and whichever engines answer it.

use std::ops::Range;
use std::time::Instant;

use rayon::prelude::*;
use roaring::RoaringBitmap;
use thenar_index::{Row, Snapshot, SubjectNumber};

use super::rank::{self, Best};
use super::{Answer, BatchTiming, Certificate, Found, NO_FLOOR, Search, score};
use crate::engine::{CandidateRequest, CandidateRows, Engine, EngineError, GalleryView, Seed};
use crate::model::Hand;

/// Most candidates of one probe that an engine may return. A probe with more is answered by [`scan`].
pub const CANDIDATE_ROWS_MAX: usize = 1 << 16;
/// Rounds before a search is answered by a scan. Each multiplies the rows asked for by eight, so
/// more would exceed [`CANDIDATE_ROWS_MAX`] anyway.
const ROUNDS_MAX: usize = 6;
/// Rows of a piece of a scan. Pieces are scored in parallel.
const SCAN_CHUNK: usize = 4096;

/// A search between two rounds.
struct Running<'a> {
    search: &'a Search,
    /// One per probe, the same in every round.
    seeds: Vec<Seed>,
    floor: f64,
    keep: u32,
    rounds: usize,
    /// The best of the subjects looked at in all rounds.
    best: Best,
    /// Under which certificate the last round passed rows over.
    held: Certificate,
    answer: Option<Vec<Found>>,
}

/// Answers a batch of searches over one snapshot. With `yields`, the engine lets requests of other threads go
/// first if it can.
///
/// # Errors
/// [`EngineError`] if the engine fails; nothing has been answered then, and the caller takes
/// another engine.
pub fn search_batch(
    engine: &dyn Engine,
    snapshot: &Snapshot,
    searches: &[&Search],
    yields: bool,
    candidates: &mut CandidateRows,
) -> Result<(Vec<Answer>, BatchTiming), EngineError> {
    let view = GalleryView::of(snapshot);
    let mut timing = BatchTiming::default();
    let mut running: Vec<Running<'_>> = searches
        .iter()
        .map(|search| {
            assert!(search.k > 0 && !search.probes.is_empty(), "the service refuses empty searches");
            let keep = u32::try_from(2 * search.k + 8).unwrap_or(u32::MAX);
            Running {
                search,
                seeds: search.probes.iter().map(|_| rand::random()).collect(),
                floor: search.floor,
                keep,
                rounds: 0,
                best: Best::new(search.k),
                held: Certificate::Deterministic,
                answer: None,
            }
        })
        .collect();

    let allowed: Vec<Option<RoaringBitmap>> =
        searches.iter().map(|search| search.allowed.as_deref().map(|subjects| rows_of(snapshot, subjects))).collect();
    // Searches under one certificate go to the engine together, so that none pays for another's.
    while let Some(certificate) = running.iter().find(|r| r.answer.is_none()).map(|r| r.search.certificate) {
        let (mut open, of): (Vec<&mut Running<'_>>, Vec<&Option<RoaringBitmap>>) = running
            .iter_mut()
            .zip(&allowed)
            .filter(|(run, _)| run.answer.is_none() && run.search.certificate == certificate)
            .unzip();
        let mut filters = Vec::new();
        if of.iter().any(|allowed| allowed.is_some()) {
            for (run, allowed) in open.iter().zip(&of) {
                filters.extend(run.search.probes.iter().map(|_| allowed.as_ref()));
            }
        }
        let mut probes = Vec::new();
        let (mut floors, mut keep, mut seeds) = (Vec::new(), Vec::new(), Vec::new());
        for run in &open {
            seeds.extend_from_slice(&run.seeds);
            for probe in &run.search.probes {
                probes.extend_from_slice(&probe.vector);
                floors.push(round_down(run.floor));
                keep.push(run.keep);
            }
        }
        let request = CandidateRequest {
            probes: &probes,
            floors: &floors,
            keep: &keep,
            candidates_max: CANDIDATE_ROWS_MAX,
            certificate,
            filters: &filters,
            seeds: &seeds,
            yields,
        };
        let started = Instant::now();
        engine.find_candidates(&view, &request, candidates)?;
        timing.prefilter += started.elapsed();
        if let Some(device) = candidates.device_time {
            timing.device = Some(timing.device.unwrap_or_default() + device);
        }

        let started = Instant::now();
        let mut first = 0;
        let firsts: Vec<usize> = open
            .iter()
            .map(|run| {
                let at = first;
                first += run.search.probes.len();
                at
            })
            .collect();
        let candidates = &*candidates;
        let step = |(run, first): (&mut &mut Running<'_>, usize)| {
            run.step(snapshot, candidates, first..first + run.search.probes.len());
        };
        if open.len() == 1 {
            // Waking another thread would take longer than this.
            open.iter_mut().zip(firsts).for_each(step);
        } else {
            open.par_iter_mut().zip(firsts).for_each(step);
        }
        timing.refine += started.elapsed();
    }

    let gallery_size = snapshot.live();
    let answers = running
        .into_iter()
        .map(|run| Answer { found: run.answer.unwrap_or_default(), certificate: run.held, gallery_size })
        .collect();
    Ok((answers, timing))
}

impl Running<'_> {
    /// Scores the candidates of one round for this search's probes, `range` of the batch, and either
    /// answers or determines what to ask for next.
    fn step(&mut self, snapshot: &Snapshot, candidates: &CandidateRows, range: Range<usize>) {
        self.rounds += 1;
        self.held = candidates.certificate;
        if candidates.overflowed[range.clone()].contains(&true) || self.rounds > ROUNDS_MAX {
            self.answer = Some(scan(snapshot, self.search));
            self.held = Certificate::Deterministic;
            return;
        }
        let mut seen: Vec<SubjectNumber> = Vec::new();
        for (probe, rows) in self.search.probes.iter().zip(&candidates.rows[range.clone()]) {
            for &row in rows {
                let Some(meta) = snapshot.meta(Row(row)) else { continue };
                let exact = score::exact(snapshot.row(Row(row)), &probe.vector);
                // An engine returns some rows below the floor, to be safe; their subjects may still reach the
                // floor by another row, which is then a candidate itself.
                if exact >= self.floor
                    && self.search.allows(meta.subject)
                    && probe.hand.comparable(Hand::from_code(meta.hand).unwrap_or_default())
                {
                    seen.push(meta.subject);
                }
            }
        }
        seen.sort_unstable();
        seen.dedup();
        for subject in seen {
            if !self.best.holds(subject)
                && let Some(found) = rank::fuse(snapshot, subject, &self.search.probes)
                && found.score >= self.search.floor
            {
                self.best.offer(found);
            }
        }
        let complete_from = f64::from(candidates.floors[range].iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let kth = self.best.kth();
        if complete_from <= self.search.floor || kth.is_some_and(|kth| kth >= complete_from) {
            self.answer = Some(std::mem::replace(&mut self.best, Best::new(0)).into_sorted());
        } else if let Some(kth) = kth {
            self.floor = kth;
            self.keep = 0;
        } else {
            self.keep = self.keep.saturating_mul(8);
        }
    }
}

/// Scores every live row: the answer by definition, for searches that no engine can narrow down (for example
/// in a gallery of equal rows). Bounded memory, all threads.
#[must_use]
pub fn scan(snapshot: &Snapshot, search: &Search) -> Vec<Found> {
    let dim = snapshot.dim();
    let view = GalleryView::of(snapshot);
    let pieces: Vec<(usize, Range<usize>)> = view
        .segments
        .iter()
        .enumerate()
        .flat_map(|(block, b)| {
            let count = b.count(dim);
            (0..count).step_by(SCAN_CHUNK).map(move |at| (block, at..count.min(at + SCAN_CHUNK)))
        })
        .collect();
    pieces
        .into_par_iter()
        .fold(
            || Best::new(search.k),
            |mut best, (block, range)| {
                let block = &view.segments[block];
                for offset in range {
                    if !block.is_live(offset) {
                        continue;
                    }
                    let values = &block.rows[offset * dim..(offset + 1) * dim];
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "an offset is under the rows of a segment, a u32"
                    )]
                    let row = Row(block.first_row + offset as u32);
                    let least = best.kth().unwrap_or(NO_FLOOR).max(search.floor);
                    let Some(meta) = snapshot.meta(row) else { continue };
                    let hand = Hand::from_code(meta.hand).unwrap_or_default();
                    if !search.allows(meta.subject) {
                        continue;
                    }
                    let reaches = search
                        .probes
                        .iter()
                        .any(|p| p.hand.comparable(hand) && score::exact(values, &p.vector) >= least);
                    if reaches
                        && !best.holds(meta.subject)
                        && let Some(found) = rank::fuse(snapshot, meta.subject, &search.probes)
                        && found.score >= search.floor
                    {
                        best.offer(found);
                    }
                }
                best
            },
        )
        .reduce(
            || Best::new(search.k),
            |mut a, b| {
                for found in b.into_sorted() {
                    a.offer(found);
                }
                a
            },
        )
        .into_sorted()
}

/// The live rows of these subjects.
fn rows_of(snapshot: &Snapshot, subjects: &RoaringBitmap) -> RoaringBitmap {
    let mut rows = RoaringBitmap::new();
    for subject in subjects {
        rows.extend(snapshot.rows_of(SubjectNumber(subject.into())).iter().map(|row| row.0));
    }
    rows
}

/// The largest f32 that is not above `x`.
#[must_use]
pub fn round_down(x: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "corrected below if it rounds up")]
    let near = x as f32;
    if f64::from(near) > x { near.next_down() } else { near }
}
