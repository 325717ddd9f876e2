//! Which way of sifting is the fastest, found by timing the pieces of a sift as it goes.
//!
//! How many rows a code passes over depends on the gallery, the floors and the certificate, none of
//! which is known beforehand, and floors rise on the way. So each piece takes the way that was
//! fastest lately, and now and then one of the others, to see whether that still holds. Every way
//! is right; this only decides how long it takes.
//!
//! Knows durations. Does not know codes or rows.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::floors::Floor;
use super::sieve::Level;
use crate::certificate::{Certificate, FLOOR_MIN};

/// A way to sift a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Every row in full.
    Exhaustive,
    /// By codes, with a first look at this level.
    Codes(Level),
}

/// Pieces between looks at whether another way has become the fastest.
const LOOK_AGAIN: usize = 32;
/// Femtoseconds a pair of a way that was not tried.
const UNKNOWN: u64 = 0;
/// Of 65,536 pairs, so many must pass the first look at the signs before a look at more bits is
/// worth trying: that look takes twice as long.
const PASSED_FEW: u64 = 512;

/// The paces of one sift, shared by its threads.
pub(super) struct Pace<'a> {
    /// Whether signs alone can pass a row over.
    randomised: bool,
    sign: AtomicU64,
    two: AtomicU64,
    /// Of 65,536 pairs, those that passed the signs lately.
    passed: AtomicU64,
    /// Kept by the engine from sift to sift: it depends on little but the number of probes.
    exhaustive: &'a AtomicU64,
    pieces: AtomicUsize,
    sieved: AtomicBool,
}

impl<'a> Pace<'a> {
    pub(super) fn new(certificate: Certificate, exhaustive: &'a AtomicU64) -> Self {
        Self {
            randomised: certificate != Certificate::Deterministic,
            sign: AtomicU64::new(UNKNOWN),
            two: AtomicU64::new(UNKNOWN),
            passed: AtomicU64::new(0),
            exhaustive,
            pieces: AtomicUsize::new(0),
            sieved: AtomicBool::new(false),
        }
    }

    fn of(&self, way: Way) -> &AtomicU64 {
        match way {
            Way::Exhaustive => self.exhaustive,
            Way::Codes(Level::Sign) => &self.sign,
            Way::Codes(Level::Two) => &self.two,
        }
    }

    /// The way for the next piece.
    pub(super) fn choose(&self, floors: &[Floor]) -> Way {
        // Without a floor everything passes every code.
        if floors.iter().any(|floor| f64::from(floor.threshold()) < 2.0 * FLOOR_MIN) {
            return Way::Exhaustive;
        }
        let two_is_worth_it = !self.randomised || self.passed.load(Ordering::Relaxed) > PASSED_FEW;
        let sign = self.randomised.then_some(Way::Codes(Level::Sign));
        let two = two_is_worth_it.then_some(Way::Codes(Level::Two));
        let codes: [Option<Way>; 2] = if sign.is_some() { [sign, two] } else { [two, None] };
        let pace = |way: &Way| self.of(*way).load(Ordering::Relaxed);
        let ways = || codes.into_iter().flatten().chain([Way::Exhaustive]);
        if let Some(untried) = ways().find(|way| pace(way) == UNKNOWN) {
            return untried;
        }
        let piece = self.pieces.fetch_add(1, Ordering::Relaxed);
        if piece % LOOK_AGAIN == LOOK_AGAIN - 1 {
            // The codes alone get faster as floors rise.
            let nth = piece / LOOK_AGAIN % codes.iter().flatten().count().max(1);
            return codes[nth].unwrap_or(Way::Exhaustive);
        }
        ways().min_by_key(pace).unwrap_or(Way::Exhaustive)
    }

    /// Takes in how long a piece of `pairs` pairs took, of which `passed` passed the first look.
    pub(super) fn took(&self, way: Way, took: Duration, pairs: usize, passed: usize) {
        let femtoseconds = took.as_nanos().saturating_mul(1_000_000) / (pairs.max(1) as u128);
        let now = u64::try_from(femtoseconds).unwrap_or(u64::MAX).max(1);
        let smooth = |cell: &AtomicU64, now: u64| {
            let before = cell.load(Ordering::Relaxed);
            // Losing another thread's figure now and then is no harm.
            let smoothed = if before == UNKNOWN { now } else { before - before / 4 + now / 4 };
            cell.store(smoothed, Ordering::Relaxed);
        };
        smooth(self.of(way), now);
        if let Way::Codes(level) = way {
            self.sieved.store(true, Ordering::Relaxed);
            if level == Level::Sign {
                smooth(&self.passed, (passed * 65_536 / pairs.max(1)) as u64);
            }
        }
    }

    /// Whether any piece was sifted by codes.
    pub(super) fn was_sieved(&self) -> bool {
        self.sieved.load(Ordering::Relaxed)
    }
}
