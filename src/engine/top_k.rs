//! Per probe: what a row's number must reach, raised as good rows are found, and the rows that reached it.
//!
//! A *number* is an f32 product that is within a known slack of the exact score ([`super::dot`]). A
//! [`TopK`] is shared by all threads that search for one probe, with the best numbers that any of them
//! has found, so that each row found by one spares the others work; a [`TopKList`] belongs to one thread.
//!
//! Invariants: a threshold only rises; it never rises above (k-th best exact score) - slack, so
//! a row tied with the k-th best always passes; an overflow is marked and never undone.
//!
//! Why raising is sound: with a_k the k-th best number, k live rows have exact scores of at least
//! a_k - slack. So has the k-th best row of the gallery, and the numbers of it and of all rows tied with
//! it are at least a_k - 2 slack. No row may be counted twice.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{CandidateRequest, CandidateRows};

/// How many pushes a list accepts before it is pruned again, beyond twice the rows that it held.
const PUSHES_BEFORE_PRUNING: usize = 24;
/// Rows that a list may hold while its threshold still rises, if that is more than the candidates allowed.
const RISING_ROWS_MAX: usize = 1 << 16;

/// What a probe's rows must reach. Shared by the threads of one request.
#[derive(Debug)]
pub(super) struct TopK {
    /// Rows whose number is below this cannot matter; as an [`order_key`].
    threshold: AtomicI32,
    /// Rows on all lists; only counted if `keep` is 0 and no list is ever pruned.
    collected: AtomicUsize,
    overflowed: AtomicBool,
    /// The `keep` best numbers so far, the least on top.
    best: Mutex<Best>,
    /// The floor of exact scores that was asked for.
    asked: f32,
    keep: usize,
    candidates_max: usize,
    slack: f32,
}

/// The best numbers, as [`order_key`]s.
type Best = BinaryHeap<Reverse<i32>>;

impl TopK {
    /// For a probe of the request, and numbers within `slack` of the exact scores.
    pub(super) fn new(request: &CandidateRequest<'_>, probe: usize, slack: f32) -> Self {
        let asked = request.floors[probe];
        Self {
            threshold: AtomicI32::new(order_key(lowered(asked, slack))),
            collected: AtomicUsize::new(0),
            overflowed: AtomicBool::new(false),
            best: Mutex::default(),
            asked,
            keep: request.keep[probe] as usize,
            candidates_max: request.candidates_max,
            slack,
        }
    }

    /// What a number must reach now. Relaxed: an older, lower value lets more rows pass.
    #[inline]
    pub(super) fn threshold(&self) -> f32 {
        from_order_key(self.threshold.load(Ordering::Relaxed))
    }

    /// The floor of exact scores that the threshold stands for: every live row with an exact score of at
    /// least this has a number at or above the threshold of now, and of any time before. Infinite after
    /// an overflow.
    pub(super) fn floor(&self) -> f32 {
        let threshold = self.threshold();
        if threshold <= lowered(self.asked, self.slack) { self.asked } else { lifted(threshold, self.slack) }
    }

    fn raise(&self, threshold: f32) {
        self.threshold.fetch_max(order_key(threshold), Ordering::Relaxed);
    }

    /// Raises the threshold to what the k-th best of `best` allows, once there are that many.
    fn raise_by(&self, best: &Best) {
        if best.len() == self.keep
            && let Some(Reverse(kth)) = best.peek()
        {
            let kth = from_order_key(*kth);
            self.raise(lowered(lowered(kth, self.slack), self.slack));
        }
    }

    /// Takes in a live row's number, and raises the threshold by the k-th best.
    fn count(&self, number: f32) {
        let mut best = self.best.lock();
        if enter(&mut best, self.keep, number) {
            self.raise_by(&best);
        }
    }

    /// Raises the threshold by the numbers of live rows that have not been offered to any list, and that
    /// may be offered later: they are forgotten again.
    pub(super) fn scout(&self, numbers: impl Iterator<Item = f32>) {
        let mut best = self.best.lock().clone();
        for number in numbers {
            enter(&mut best, self.keep, number);
        }
        self.raise_by(&best);
    }

    /// Gives the probe up: nothing passes from now on.
    fn overflow(&self) {
        self.overflowed.store(true, Ordering::Relaxed);
        self.raise(f32::INFINITY);
    }

    /// Whether the probe was given up.
    pub(super) fn overflowed(&self) -> bool {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Moves the rows of all threads' lists that can matter to the candidates of `probe`, with the floor
    /// that they are complete from, or marks the overflow.
    pub(super) fn file<'a>(
        &self,
        lists: impl Iterator<Item = &'a mut TopKList>,
        probe: usize,
        candidates: &mut CandidateRows,
    ) {
        let mut merged = TopKList::default();
        for list in lists {
            if merged.entries.is_empty() {
                std::mem::swap(&mut merged.entries, &mut list.entries);
            } else {
                merged.entries.append(&mut list.entries);
            }
            list.clear();
        }
        if self.keep != 0 {
            merged.prune(self);
        }
        if merged.entries.len() > self.candidates_max {
            self.overflow();
        }
        if !self.overflowed() {
            candidates.rows[probe].extend(merged.entries.iter().map(|entry| entry.row));
        }
        candidates.overflowed[probe] = self.overflowed();
        candidates.floors[probe] = self.floor();
    }
}

/// Puts a number among the `keep` best, if it belongs there. Returns whether it did.
fn enter(best: &mut Best, keep: usize, number: f32) -> bool {
    let key = Reverse(order_key(number));
    if best.len() < keep {
        best.push(key);
        return true;
    }
    match best.peek_mut() {
        Some(mut least) if key < *least => {
            *least = key;
            true
        }
        _ => false,
    }
}

/// A row that passed, with its number.
#[derive(Debug, Clone, Copy)]
struct Entry {
    number: f32,
    row: u32,
}

/// The rows of one probe that one thread found.
#[derive(Debug, Default)]
pub(super) struct TopKList {
    entries: Vec<Entry>,
    /// Entries at which the list is pruned.
    prune_at: usize,
}

impl TopKList {
    /// Takes a live row with a number that reached the threshold.
    pub(super) fn offer(&mut self, top_k: &TopK, number: f32, row: u32) {
        self.entries.push(Entry { number, row });
        if top_k.keep == 0 {
            if top_k.collected.fetch_add(1, Ordering::Relaxed) >= top_k.candidates_max {
                top_k.overflow();
                self.clear();
            }
            return;
        }
        top_k.count(number);
        if self.entries.len() >= self.prune_at.max(2 * top_k.keep + PUSHES_BEFORE_PRUNING) {
            self.prune(top_k);
            self.prune_at = 2 * self.entries.len() + PUSHES_BEFORE_PRUNING;
            if self.entries.len() > top_k.candidates_max.max(RISING_ROWS_MAX) {
                top_k.overflow();
                self.clear();
            }
        }
    }

    /// Drops what is below the threshold.
    fn prune(&mut self, top_k: &TopK) {
        let threshold = top_k.threshold();
        self.entries.retain(|entry| entry.number >= threshold);
    }

    /// Empties the list; one that grew large gives its memory back.
    fn clear(&mut self) {
        const CAPACITY_KEPT: usize = 4096;
        self.entries.clear();
        self.entries.shrink_to(CAPACITY_KEPT);
        self.prune_at = 0;
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
    }
}

/// A number at or below `floor - slack`, within two ulps of it.
///
/// The difference is taken in f64, whose rounding is far below half an ulp of f32; the step down
/// at the end outweighs both roundings.
pub(super) fn lowered(floor: f32, slack: f32) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step down outweighs the rounding")]
    let nearest = (f64::from(floor) - f64::from(slack)) as f32;
    nearest.next_down()
}

/// A number at or above `threshold + slack`, within two ulps of it, as [`lowered`] is below.
fn lifted(threshold: f32, slack: f32) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step up outweighs the rounding")]
    let nearest = (f64::from(threshold) + f64::from(slack)) as f32;
    nearest.next_up()
}

/// An integer that orders as the number does (numbers are never NaN).
#[inline]
fn order_key(value: f32) -> i32 {
    flipped(value.to_bits().cast_signed())
}

#[inline]
fn from_order_key(key: i32) -> f32 {
    f32::from_bits(flipped(key).cast_unsigned())
}

/// Reverses the order of the negative numbers, whose magnitude grows with their bits. Its own
/// inverse, since the sign stays.
#[inline]
fn flipped(bits: i32) -> i32 {
    if bits < 0 { bits ^ i32::MAX } else { bits }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::engine::dot::dot_slack;

    fn top_k(floor: f32, keep: u32, candidates_max: usize, slack: f32) -> TopK {
        let request = CandidateRequest { floors: &[floor], keep: &[keep], candidates_max, ..Default::default() };
        TopK::new(&request, 0, slack)
    }

    fn filed(top_k: &TopK, lists: &mut [TopKList]) -> (Vec<u32>, f32, bool) {
        let mut candidates = CandidateRows::default();
        candidates.reset(1);
        top_k.file(lists.iter_mut(), 0, &mut candidates);
        candidates.rows[0].sort_unstable();
        (std::mem::take(&mut candidates.rows[0]), candidates.floors[0], candidates.overflowed[0])
    }

    #[test]
    fn a_lowered_floor_is_below_the_difference_and_a_lifted_one_above_the_sum_and_both_are_close() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..10_000 {
            let floor: f32 = rng.random_range(-1.2..1.2);
            let slack = dot_slack(32 * rng.random_range(1..=64));
            let difference = f64::from(floor) - f64::from(slack);
            let lowered = lowered(floor, slack);
            assert!(f64::from(lowered) < difference, "{floor} - {slack}");
            assert!(f64::from(lowered.next_up().next_up()) > difference, "{floor} - {slack}");
            let (sum, lifted) = (f64::from(floor) + f64::from(slack), lifted(floor, slack));
            assert!(f64::from(lifted) > sum && f64::from(lifted.next_down().next_down()) < sum, "{floor} + {slack}");
        }
        assert_eq!(lowered(f32::NEG_INFINITY, 1e-5), f32::NEG_INFINITY);
        assert!(lowered(0.0, 1e-5) < -1e-5);
    }

    #[test]
    fn the_best_rows_of_all_threads_raise_the_threshold_and_ties_stay() {
        let top_k = top_k(0.1, 2, 100, 0.001);
        let mut lists = [TopKList::default(), TopKList::default()];
        lists[0].offer(&top_k, 0.5, 1);
        assert_eq!(top_k.floor(), 0.1, "one row is less than two");
        lists[1].offer(&top_k, 0.4, 2);
        assert!(top_k.threshold() > 0.397 && top_k.threshold() < 0.398, "{}", top_k.threshold());
        lists[0].offer(&top_k, 0.4, 3);
        lists[0].offer(&top_k, 0.399, 4);
        lists[1].offer(&top_k, 0.9, 5);
        // 0.9 and 0.5 are the best: what is within two slacks of the second may tie with it.
        let (rows, floor, overflowed) = filed(&top_k, &mut lists);
        assert_eq!((rows, overflowed), (vec![1, 5], false));
        assert!(floor <= 0.4991 && floor > 0.498, "{floor}");
    }

    #[test]
    fn rows_beyond_the_limit_are_an_overflow_and_promise_nothing() {
        for (keep, rows) in [(0, 11), (3, 11)] {
            let top_k = top_k(0.1, keep, 10, 0.001);
            let mut lists = [TopKList::default()];
            (0..rows).for_each(|row| lists[0].offer(&top_k, 0.5, row));
            let (rows, floor, overflowed) = filed(&top_k, &mut lists);
            assert_eq!((rows, floor, overflowed), (vec![], f32::INFINITY, true), "keep {keep}");
        }
    }
}
