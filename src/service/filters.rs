//! Which subjects does a filter name? A cache of their numbers, valid until the next change.
//!
//! The turnstiles of an event send the same thousands of ids with every palm, and looking each up in the
//! registry costs as much as a search. So the numbers of the last long filters are kept, each with
//! the change they belong to: the gallery's last change *before* the registry was asked. While that is
//! still the gallery's last change, every acknowledged change is taken into account.
//!
//! Knows no registry and no clock. Invariant: at most [`KEPT_MAX`] filters are kept.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use roaring::RoaringBitmap;
use thenar_index::Lsn;

use crate::model::SubjectFilter;

/// Filters kept: under 4 MiB of ids in all.
const KEPT_MAX: usize = 16;
/// A filter is kept if it has at least this many subjects; shorter ones are quickly looked up.
const KEPT_FROM: usize = 64;

struct Kept {
    only: SubjectFilter,
    lsn: Lsn,
    numbers: Arc<RoaringBitmap>,
}

/// The filters that are kept, with the most recently used one at the end.
#[derive(Default)]
pub(super) struct Filters(Mutex<VecDeque<Kept>>);

impl Filters {
    /// The numbers of the subjects that `only` names, if they are known as of the change `now`.
    pub(super) fn recall(&self, only: &SubjectFilter, now: Lsn) -> Option<Arc<RoaringBitmap>> {
        let mut kept = self.0.lock();
        kept.retain(|kept| kept.lsn == now);
        let at = kept.iter().position(|kept| kept.only == *only)?;
        let found = kept.remove(at)?;
        let numbers = Arc::clone(&found.numbers);
        kept.push_back(found);
        Some(numbers)
    }

    /// Keeps the registry's answer for `only`, which was asked for after the gallery was at `lsn`.
    pub(super) fn remember(&self, only: SubjectFilter, lsn: Lsn, numbers: Arc<RoaringBitmap>) {
        if only.ids().len() < KEPT_FROM {
            return;
        }
        let mut kept = self.0.lock();
        if kept.len() >= KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(Kept { only, lsn, numbers });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(first: usize, count: usize) -> SubjectFilter {
        SubjectFilter::new(&(first..first + count).map(|n| format!("s{n}")).collect::<Vec<_>>()).unwrap()
    }

    fn numbers(of: u32) -> Arc<RoaringBitmap> {
        Arc::new([of].into_iter().collect())
    }

    #[test]
    fn what_is_kept_holds_until_the_next_change_for_that_filter_alone() {
        let filters = Filters::default();
        filters.remember(filter(0, KEPT_FROM), Lsn(7), numbers(1));
        filters.remember(filter(1, KEPT_FROM), Lsn(7), numbers(2));
        assert_eq!(filters.recall(&filter(0, KEPT_FROM), Lsn(7)), Some(numbers(1)));
        assert_eq!(filters.recall(&filter(1, KEPT_FROM), Lsn(7)), Some(numbers(2)));
        assert_eq!(filters.recall(&filter(0, KEPT_FROM + 1), Lsn(7)), None);
        assert_eq!(filters.recall(&filter(0, KEPT_FROM), Lsn(8)), None, "something changed");
        assert_eq!(filters.recall(&filter(0, KEPT_FROM), Lsn(7)), None, "and it is let go");
    }

    #[test]
    fn the_filters_used_last_are_kept_and_short_ones_take_no_place() {
        let filters = Filters::default();
        for at in 0..KEPT_MAX + 1 {
            filters.remember(filter(at, KEPT_FROM), Lsn(1), numbers(1));
            assert!(filters.recall(&filter(0, KEPT_FROM), Lsn(1)).is_some(), "it is used all the time");
            filters.remember(filter(at, KEPT_FROM - 1), Lsn(1), numbers(1));
            assert_eq!(filters.recall(&filter(at, KEPT_FROM - 1), Lsn(1)), None);
        }
        assert_eq!(filters.0.lock().len(), KEPT_MAX);
        assert_eq!(filters.recall(&filter(1, KEPT_FROM), Lsn(1)), None, "the one not used for longest");
    }
}
