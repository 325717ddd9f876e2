//! Which strategy is the fastest, found by timing the pieces of a scan as it goes.
//!
//! How many rows a code passes over depends on the gallery, the floors and the certificate, none of
//! which is known beforehand, and floors rise during a scan. So each piece takes the strategy that was
//! fastest lately. After 1, 2, 4, 8, ... pieces each other strategy that may have become faster is tried
//! again: without a threshold, floors rise with the logarithm of the rows seen. Every strategy is
//! right; this only decides how long it takes.
//!
//! Knows durations. Does not know codes or rows.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::prefilter::Level;
use crate::engine::certificate::{Bounds, Certificate, FLOOR_MIN};
use crate::engine::top_k::TopK;

/// How to find candidates in a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strategy {
    /// Compare every row in full.
    Exhaustive,
    /// Prefilter by codes, with a first pass at this level.
    Codes(Level),
}

/// The time per pair of a strategy that was not tried yet.
const UNKNOWN: u64 = 0;
/// Of 65,536 pairs, how many must pass the first pass at a level before a first pass over more bits is
/// worth trying: refining fewer pairs takes less time than reading the additional bits would.
const PASSED_FEW: u64 = 512;

/// What is known of the first pass at one level.
#[derive(Debug)]
struct Measured {
    level: Level,
    /// Femtoseconds per pair.
    time: AtomicU64,
    /// Of 65,536 pairs, those that passed the first pass lately.
    passed: AtomicU64,
    /// The piece at which to try it again.
    again: AtomicUsize,
    /// The level is not tried for the first time before the bound of a usual row is above this.
    promising: f32,
}

/// The timings of one scan, shared by its threads.
pub(super) struct Tuner<'a> {
    levels: [Measured; Level::ALL.len()],
    bounds: Bounds,
    /// Whether a first pass over codebook codes can pass a row over.
    randomised: bool,
    /// Femtoseconds per pair of an exhaustive comparison. The engine keeps it from request to request: it
    /// depends on little but the number of probes.
    exhaustive: &'a AtomicU64,
    pieces: AtomicUsize,
    used_codes: AtomicBool,
    /// The only level to use.
    #[cfg(test)]
    pub(super) only: Option<Level>,
}

impl<'a> Tuner<'a> {
    pub(super) fn new(certificate: Certificate, dim: usize, exhaustive: &'a AtomicU64) -> Self {
        // The usual cosine of two unrelated directions.
        let usual = 1.0 / (dim as f32).sqrt();
        let measured = |level| Measured {
            level,
            time: AtomicU64::new(UNKNOWN),
            passed: AtomicU64::new(0),
            again: AtomicUsize::new(1),
            // Two bits are worth trying earlier: codebook codes let more of the rows near the bound pass.
            promising: if level == Level::TwoBit { usual } else { 2.0 * usual },
        };
        Self {
            levels: Level::ALL.map(measured),
            bounds: Bounds::new(certificate, dim),
            randomised: certificate != Certificate::Deterministic,
            exhaustive,
            pieces: AtomicUsize::new(0),
            used_codes: AtomicBool::new(false),
            #[cfg(test)]
            only: None,
        }
    }

    /// The strategy for the next piece.
    pub(super) fn choose(&self, top_k: &[TopK]) -> Strategy {
        // Without a floor every row passes every code.
        if top_k.iter().any(|top_k| f64::from(top_k.threshold()) < 2.0 * FLOOR_MIN) {
            return Strategy::Exhaustive;
        }
        #[cfg(test)]
        if let Some(level) = self.only {
            return Strategy::Codes(level);
        }
        let piece = self.pieces.fetch_add(1, Ordering::Relaxed);
        for measured in &self.levels {
            if self.is_due(measured, piece, top_k) {
                return Strategy::Codes(measured.level);
            }
        }
        let exhaustive = self.exhaustive.load(Ordering::Relaxed);
        if exhaustive == UNKNOWN {
            return Strategy::Exhaustive;
        }
        let times = self.levels.iter().map(|m| (m.time.load(Ordering::Relaxed), Strategy::Codes(m.level)));
        let tried = times.filter(|(time, _)| *time != UNKNOWN);
        tried.chain([(exhaustive, Strategy::Exhaustive)]).min_by_key(|(time, _)| *time).expect("there is one").1
    }

    /// Whether a level should be tried now. Only one thread is told to.
    fn is_due(&self, measured: &Measured, piece: usize, top_k: &[TopK]) -> bool {
        let again = measured.again.load(Ordering::Relaxed);
        let never = measured.time.load(Ordering::Relaxed) == UNKNOWN;
        if measured.level != Level::TwoBit && !self.randomised || piece < again && !never {
            return false;
        }
        let passes_few = |coarser: &Measured| {
            coarser.time.load(Ordering::Relaxed) != UNKNOWN && coarser.passed.load(Ordering::Relaxed) <= PASSED_FEW
        };
        if self.levels[..measured.level as usize].iter().any(passes_few) {
            return false;
        }
        if never && !self.is_promising(measured, top_k) {
            return false;
        }
        measured.again.compare_exchange(again, 2 * piece.max(1), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Whether the bound of a usual row, at the mean of the probes' floors, lies above what codes of
    /// unrelated rows reach: a guess, for the first try alone.
    fn is_promising(&self, measured: &Measured, top_k: &[TopK]) -> bool {
        let mean = top_k.iter().map(|top_k| top_k.threshold().min(1.0)).sum::<f32>() / top_k.len() as f32;
        let angle = self.bounds.angle(measured.level.usual_cosine());
        self.bounds.bound(mean.into()).is_some_and(|bound| bound.least_product(angle) > measured.promising)
    }

    /// Takes in how long a piece of `pairs` pairs took, of which `passed` passed the first pass.
    pub(super) fn took(&self, strategy: Strategy, took: Duration, pairs: usize, passed: usize) {
        let femtoseconds = took.as_nanos().saturating_mul(1_000_000) / (pairs.max(1) as u128);
        let now = u64::try_from(femtoseconds).unwrap_or(u64::MAX).max(1);
        match strategy {
            Strategy::Exhaustive => {
                let before = self.exhaustive.load(Ordering::Relaxed);
                // Losing another thread's figure now and then does no harm.
                let smoothed = if before == UNKNOWN { now } else { before - before / 4 + now / 4 };
                self.exhaustive.store(smoothed, Ordering::Relaxed);
            }
            // Times from before floors rose say little about now, so a shorter time counts at once.
            Strategy::Codes(level) => {
                let measured = &self.levels[level as usize];
                let before = measured.time.load(Ordering::Relaxed);
                let smoothed = if before == UNKNOWN || now < before { now } else { before - before / 4 + now / 4 };
                measured.time.store(smoothed, Ordering::Relaxed);
                measured.passed.store((passed * 65_536 / pairs.max(1)) as u64, Ordering::Relaxed);
                self.used_codes.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Whether codes passed rows of any piece over.
    pub(super) fn used_codes(&self) -> bool {
        self.used_codes.load(Ordering::Relaxed)
    }
}
