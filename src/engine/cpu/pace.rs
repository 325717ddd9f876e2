//! Which way of sifting is the fastest, found by timing the pieces of a sift as it goes.
//!
//! How many rows a code passes over depends on the gallery, the floors and the certificate, none of
//! which is known beforehand, and floors rise on the way. So each piece takes the way that was
//! fastest lately, and after 1, 2, 4, 8, ... pieces each of the others is tried again that might
//! have become faster: without a threshold floors rise with the logarithm of the rows seen. Every
//! way is right; this only decides how long it takes.
//!
//! Knows durations. Does not know codes or rows.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::sieve::Level;
use crate::engine::certificate::{Bounds, Certificate, FLOOR_MIN};
use crate::engine::top_k::TopK;

/// A way to sift a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Every row in full.
    Exhaustive,
    /// By codes, with a first look at this level.
    Codes(Level),
}

/// Femtoseconds a pair of a way that was not tried.
const UNKNOWN: u64 = 0;
/// Of 65,536 pairs, so many must pass the first look at a level before a look at more bits is worth
/// trying: a second look at them takes less time than that one would more.
const PASSED_FEW: u64 = 512;

/// What is known of one way by codes.
#[derive(Debug)]
struct Known {
    level: Level,
    /// Femtoseconds a pair.
    pace: AtomicU64,
    /// Of 65,536 pairs, those that passed the first look lately.
    passed: AtomicU64,
    /// The piece at which to try it again.
    again: AtomicUsize,
    /// The way is not tried for the first time before the bar of a usual row is above this.
    promising: f32,
}

/// The paces of one sift, shared by its threads.
pub(super) struct Pace<'a> {
    ways: [Known; Level::ALL.len()],
    cutter: Bounds,
    /// Whether codebook codes or signs alone can pass a row over.
    randomised: bool,
    /// Kept by the engine from sift to sift: it depends on little but the number of probes.
    exhaustive: &'a AtomicU64,
    pieces: AtomicUsize,
    sieved: AtomicBool,
    /// The one level to sift by.
    #[cfg(test)]
    pub(super) only: Option<Level>,
}

impl<'a> Pace<'a> {
    pub(super) fn new(certificate: Certificate, dim: usize, exhaustive: &'a AtomicU64) -> Self {
        // Of two directions that have nothing to do with each other, the usual cosine.
        let usual = 1.0 / (dim as f32).sqrt();
        let known = |level| Known {
            level,
            pace: AtomicU64::new(UNKNOWN),
            passed: AtomicU64::new(0),
            again: AtomicUsize::new(1),
            // Two bits are worth trying earlier: the others pass more of the rows near the bar.
            promising: if level == Level::TwoBit { usual } else { 2.0 * usual },
        };
        Self {
            ways: Level::ALL.map(known),
            cutter: Bounds::new(certificate, dim),
            randomised: certificate != Certificate::Deterministic,
            exhaustive,
            pieces: AtomicUsize::new(0),
            sieved: AtomicBool::new(false),
            #[cfg(test)]
            only: None,
        }
    }

    fn known(&self, level: Level) -> &Known {
        &self.ways[level as usize]
    }

    /// The way for the next piece.
    pub(super) fn choose(&self, floors: &[TopK]) -> Way {
        // Without a floor everything passes every code.
        if floors.iter().any(|floor| f64::from(floor.threshold()) < 2.0 * FLOOR_MIN) {
            return Way::Exhaustive;
        }
        #[cfg(test)]
        if let Some(level) = self.only {
            return Way::Codes(level);
        }
        let piece = self.pieces.fetch_add(1, Ordering::Relaxed);
        for known in &self.ways {
            if self.is_due(known, piece, floors) {
                return Way::Codes(known.level);
            }
        }
        let exhaustive = self.exhaustive.load(Ordering::Relaxed);
        if exhaustive == UNKNOWN {
            return Way::Exhaustive;
        }
        let paces = self.ways.iter().map(|known| (known.pace.load(Ordering::Relaxed), Way::Codes(known.level)));
        let tried = paces.filter(|(pace, _)| *pace != UNKNOWN);
        tried.chain([(exhaustive, Way::Exhaustive)]).min_by_key(|(pace, _)| *pace).expect("there is one").1
    }

    /// Whether a way should be tried now; only one thread is told so.
    fn is_due(&self, known: &Known, piece: usize, floors: &[TopK]) -> bool {
        let again = known.again.load(Ordering::Relaxed);
        let never = known.pace.load(Ordering::Relaxed) == UNKNOWN;
        if known.level != Level::TwoBit && !self.randomised || piece < again && !never {
            return false;
        }
        let passes_few = |coarser: &Known| {
            coarser.pace.load(Ordering::Relaxed) != UNKNOWN && coarser.passed.load(Ordering::Relaxed) <= PASSED_FEW
        };
        if self.ways[..known.level as usize].iter().any(passes_few) {
            return false;
        }
        if never && !self.is_promising(known, floors) {
            return false;
        }
        known.again.compare_exchange(again, 2 * piece.max(1), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Whether the bar of a usual row at the mean of the probes' floors lies above what codes of
    /// strangers reach: a guess, for the first try alone.
    fn is_promising(&self, known: &Known, floors: &[TopK]) -> bool {
        let mean = floors.iter().map(|floor| floor.threshold().min(1.0)).sum::<f32>() / floors.len() as f32;
        let cosine = known.level.usual_cosine();
        self.cutter.bound(mean.into()).is_some_and(|cut| cut.least_product(self.cutter.angle(cosine)) > known.promising)
    }

    /// Takes in how long a piece of `pairs` pairs took, of which `passed` passed the first look.
    pub(super) fn took(&self, way: Way, took: Duration, pairs: usize, passed: usize) {
        let femtoseconds = took.as_nanos().saturating_mul(1_000_000) / (pairs.max(1) as u128);
        let now = u64::try_from(femtoseconds).unwrap_or(u64::MAX).max(1);
        match way {
            Way::Exhaustive => {
                let before = self.exhaustive.load(Ordering::Relaxed);
                // Losing another thread's figure now and then is no harm.
                let smoothed = if before == UNKNOWN { now } else { before - before / 4 + now / 4 };
                self.exhaustive.store(smoothed, Ordering::Relaxed);
            }
            // What was so before floors rose says little about now.
            Way::Codes(level) => {
                let known = self.known(level);
                let before = known.pace.load(Ordering::Relaxed);
                let smoothed = if before == UNKNOWN || now < before { now } else { before - before / 4 + now / 4 };
                known.pace.store(smoothed, Ordering::Relaxed);
                known.passed.store((passed * 65_536 / pairs.max(1)) as u64, Ordering::Relaxed);
                self.sieved.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Whether any piece was sifted by codes.
    pub(super) fn was_sieved(&self) -> bool {
        self.sieved.load(Ordering::Relaxed)
    }
}
