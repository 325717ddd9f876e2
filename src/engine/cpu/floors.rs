//! Per probe: the threshold that rows must pass, raised as good rows are found, and the rows
//! that passed.
//!
//! A [`Floor`] is shared by all threads of one sift, with the best numbers that any has found, so
//! that each row found by one spares the others work; a [`Shortlist`] belongs to one thread.
//! Invariants: a threshold only rises; it never rises above (k-th best exact score) - slack, so
//! a row tied with the k-th best always passes; an overflow is marked and never undone.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::slack::{lifted, lowered};

/// Pushes a list of a probe with `keep` takes between two prunings, beyond twice what it held.
const SLACK_ENTRIES: usize = 24;

/// A row that passed, with the f32 kernel's number for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    approx: f32,
    row: u32,
}

/// What a probe's rows must pass. Shared by the threads of one sift.
#[derive(Debug)]
pub(super) struct Floor {
    /// Rows whose f32 number is below this cannot matter; as an [`order_key`].
    threshold: AtomicI32,
    /// Rows on all lists; only counted where `keep` is 0 and no list is ever pruned.
    collected: AtomicUsize,
    overflowed: AtomicBool,
    /// The `keep` best numbers so far, as [`order_key`]s, the least on top.
    best: Mutex<BinaryHeap<Reverse<i32>>>,
    /// The floor of exact scores that was asked for.
    asked: f32,
    keep: usize,
    candidates_max: usize,
    slack: f32,
}

impl Floor {
    /// A floor of exact scores, for kernels within `slack` of them.
    pub(super) fn new(floor: f32, keep: u32, candidates_max: usize, slack: f32) -> Self {
        Self {
            threshold: AtomicI32::new(order_key(lowered(floor, slack))),
            collected: AtomicUsize::new(0),
            overflowed: AtomicBool::new(false),
            best: Mutex::default(),
            asked: floor,
            keep: keep as usize,
            candidates_max,
            slack,
        }
    }

    /// What an f32 number must reach now. Relaxed: an older, lower value lets more rows pass.
    #[inline]
    pub(super) fn threshold(&self) -> f32 {
        from_order_key(self.threshold.load(Ordering::Relaxed))
    }

    /// Every live row with an exact score of at least this has had a number at or above the threshold of
    /// now, and of any time before. Infinite where the probe was given up.
    pub(super) fn held(&self) -> f32 {
        let threshold = self.threshold();
        if threshold <= lowered(self.asked, self.slack) { self.asked } else { lifted(threshold, self.slack) }
    }

    fn raise(&self, threshold: f32) {
        self.threshold.fetch_max(order_key(threshold), Ordering::Relaxed);
    }

    /// Takes in a live row's number, and raises the threshold by the k-th best.
    ///
    /// With a_k the k-th best number, k live rows have exact scores of at least a_k - slack; so
    /// has the k-th best row of the gallery, and the numbers of it and of all rows tied with it
    /// are at least a_k - 2 slack.
    fn count(&self, number: f32) {
        let key = Reverse(order_key(number));
        let mut best = self.best.lock();
        if best.len() < self.keep {
            best.push(key);
        } else if let Some(mut least) = best.peek_mut()
            && key < *least
        {
            *least = key;
        } else {
            return;
        }
        if best.len() == self.keep
            && let Some(Reverse(kth)) = best.peek()
        {
            let kth = from_order_key(*kth);
            self.raise(lowered(lowered(kth, self.slack), self.slack));
        }
    }

    /// Gives the probe up: nothing passes from now on.
    fn overflow(&self) {
        self.overflowed.store(true, Ordering::Relaxed);
        self.raise(f32::INFINITY);
    }

    pub(super) fn overflowed(&self) -> bool {
        self.overflowed.load(Ordering::Relaxed)
    }
}

/// The rows of one probe that one thread found.
#[derive(Debug, Default)]
pub(super) struct Shortlist {
    entries: Vec<Entry>,
    /// Entries at which the list is pruned.
    prune_at: usize,
}

impl Shortlist {
    /// Takes a live row with an f32 number that reached the threshold.
    pub(super) fn offer(&mut self, floor: &Floor, approx: f32, row: u32) {
        self.entries.push(Entry { approx, row });
        if floor.keep == 0 {
            if floor.collected.fetch_add(1, Ordering::Relaxed) >= floor.candidates_max {
                floor.overflow();
                self.clear();
            }
            return;
        }
        floor.count(approx);
        if self.entries.len() >= self.prune_at.max(2 * floor.keep + SLACK_ENTRIES) {
            self.prune(floor);
            self.prune_at = 2 * self.entries.len() + SLACK_ENTRIES;
            if self.entries.len() > floor.candidates_max {
                floor.overflow();
                self.clear();
            }
        }
    }

    /// Drops what is below the threshold.
    fn prune(&mut self, floor: &Floor) {
        let threshold = floor.threshold();
        self.entries.retain(|entry| entry.approx >= threshold);
    }

    /// Moves the rows of all threads' lists that can matter to `rows`, or marks the overflow.
    /// Returns whether the probe overflowed.
    pub(super) fn merge<'a>(lists: impl Iterator<Item = &'a mut Self>, floor: &Floor, rows: &mut Vec<u32>) -> bool {
        let mut merged = Self::default();
        for list in lists {
            if merged.entries.is_empty() {
                std::mem::swap(&mut merged.entries, &mut list.entries);
            } else {
                merged.entries.append(&mut list.entries);
            }
            list.clear();
        }
        if floor.keep != 0 {
            merged.prune(floor);
        }
        if merged.entries.len() > floor.candidates_max {
            floor.overflow();
        }
        if !floor.overflowed() {
            rows.extend(merged.entries.iter().map(|entry| entry.row));
        }
        floor.overflowed()
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

/// An integer that orders as the number does (numbers are never NaN).
#[inline]
fn order_key(value: f32) -> i32 {
    flipped(value.to_bits().cast_signed())
}

#[inline]
fn from_order_key(key: i32) -> f32 {
    f32::from_bits(flipped(key).cast_unsigned())
}

/// Reverses the order of the negative numbers, whose magnitude grows with their bits; its own
/// inverse, for the sign stays.
#[inline]
fn flipped(bits: i32) -> i32 {
    if bits < 0 { bits ^ i32::MAX } else { bits }
}
