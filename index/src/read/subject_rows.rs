//! Which rows belong to a subject: one linked list of rows per subject, about eight bytes per row.
//!
//! `heads` has the first row of each subject, `next` the row after each row. Subject numbers are dense
//! except for forgotten subjects, so heads are an array. It is paged, so that a gap in the numbers costs
//! one pointer per 4,096 numbers.
//!
//! Knows numbers. Does not know files. A row stays in its list until it is erased; views know which rows
//! are live.
//!
//! Invariants: a row is in at most one list; no list has a cycle.

/// No row: the end of a list.
const NONE: u32 = u32::MAX;
/// Heads in one page.
const PAGE: usize = 4096;

/// The first rows of subjects with consecutive numbers.
#[derive(Debug, Clone)]
struct Page {
    heads: [u32; PAGE],
    /// Number of heads that are rows.
    used: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SubjectRows {
    /// A page is none if no subject in it has a row, so that forgotten subjects cost nothing.
    heads: Vec<Option<Box<Page>>>,
    /// By slot, then by offset.
    next: Vec<Option<Box<[u32]>>>,
    segment_rows: u32,
}

impl SubjectRows {
    pub(crate) fn new(segment_rows: u32) -> Self {
        Self { heads: Vec::new(), next: Vec::new(), segment_rows }
    }

    /// Allocates memory for the rows of a slot.
    pub(crate) fn add_segment(&mut self, slot: u32) {
        let slot = slot as usize;
        if self.next.len() <= slot {
            self.next.resize(slot + 1, None);
        }
        assert!(self.next[slot].is_none());
        self.next[slot] = Some(vec![NONE; self.segment_rows as usize].into_boxed_slice());
    }

    /// Frees the memory of a slot. None of its rows may be in a list.
    pub(crate) fn drop_segment(&mut self, slot: u32) {
        self.next[slot as usize] = None;
    }

    fn next(&self, row: u32) -> u32 {
        let rows = self.next[(row / self.segment_rows) as usize].as_ref().expect("the slot has a segment");
        rows[(row % self.segment_rows) as usize]
    }

    fn set_next(&mut self, row: u32, next: u32) {
        let rows = self.next[(row / self.segment_rows) as usize].as_mut().expect("the slot has a segment");
        rows[(row % self.segment_rows) as usize] = next;
    }

    fn head(&self, subject: u64) -> u32 {
        let subject = usize::try_from(subject).unwrap_or(usize::MAX);
        match self.heads.get(subject / PAGE) {
            Some(Some(page)) => page.heads[subject % PAGE],
            _ => NONE,
        }
    }

    fn set_head(&mut self, subject: u64, row: u32) {
        let subject = usize::try_from(subject).expect("subject numbers are checked against SUBJECT_NUMBER_MAX");
        let number = subject / PAGE;
        if self.heads.len() <= number {
            self.heads.resize(number + 1, None);
        }
        let page = self.heads[number].get_or_insert_with(|| Box::new(Page { heads: [NONE; PAGE], used: 0 }));
        let before = std::mem::replace(&mut page.heads[subject % PAGE], row);
        page.used = page.used + usize::from(row != NONE) - usize::from(before != NONE);
        if page.used == 0 {
            self.heads[number] = None;
        }
    }

    /// Adds `row` to the rows of `subject`.
    pub(crate) fn link(&mut self, subject: u64, row: u32) {
        assert_ne!(row, NONE);
        let head = self.head(subject);
        assert_ne!(head, row);
        self.set_next(row, head);
        self.set_head(subject, row);
    }

    /// Removes `row` from the rows of `subject`, which must have it.
    pub(crate) fn unlink(&mut self, subject: u64, row: u32) {
        let after = self.next(row);
        let mut at = self.head(subject);
        if at == row {
            self.set_head(subject, after);
        } else {
            loop {
                assert_ne!(at, NONE, "the row is not in its subject's list");
                let next = self.next(at);
                if next == row {
                    break;
                }
                at = next;
            }
            self.set_next(at, after);
        }
        self.set_next(row, NONE);
    }

    /// The rows of `subject`, ascending.
    pub(crate) fn rows_of(&self, subject: u64) -> Vec<u32> {
        let mut rows = Vec::new();
        let mut at = self.head(subject);
        while at != NONE {
            rows.push(at);
            at = self.next(at);
        }
        rows.sort_unstable();
        rows
    }

    /// Bytes of heap memory.
    pub(crate) fn host_bytes(&self) -> u64 {
        let bytes = self.heads.iter().flatten().count() * size_of::<Page>()
            + self.heads.capacity() * size_of::<Option<Box<Page>>>()
            + self.next.iter().flatten().count() * self.segment_rows as usize * 4
            + self.next.capacity() * size_of::<Option<Box<[u32]>>>();
        bytes as u64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lists_agree_with_a_map_of_sets(steps in prop::collection::vec((0u8..3, 0u64..6, 0u32..192), 0..300)) {
            let mut lists = SubjectRows::new(64);
            (0..3).for_each(|slot| lists.add_segment(slot));
            let mut model: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
            let mut owner = BTreeMap::new();
            for (what, near, row) in steps {
                // Subject numbers far apart, so that heads are on several pages.
                let subject = near * 3000;
                match (what, owner.get(&row).copied()) {
                    (0 | 1, None) => {
                        lists.link(subject, row);
                        model.entry(subject).or_default().insert(row);
                        owner.insert(row, subject);
                    }
                    (2, Some(owned_by)) => {
                        lists.unlink(owned_by, row);
                        model.get_mut(&owned_by).unwrap().remove(&row);
                        owner.remove(&row);
                    }
                    _ => {}
                }
                for near in 0..6 {
                    let rows: Vec<u32> = model.get(&(near * 3000)).into_iter().flatten().copied().collect();
                    prop_assert_eq!(lists.rows_of(near * 3000), rows);
                }
            }
        }
    }

    #[test]
    fn a_gap_in_the_numbers_costs_little() {
        let mut lists = SubjectRows::new(64);
        lists.add_segment(0);
        lists.link(u64::from(u32::MAX), 5);
        assert_eq!(lists.rows_of(u64::from(u32::MAX)), [5]);
        assert!(lists.rows_of(u64::MAX).is_empty());
        assert!(lists.host_bytes() < 17 << 20, "{} bytes", lists.host_bytes());
    }

    #[test]
    fn removed_subjects_and_segments_cost_almost_nothing() {
        let mut lists = SubjectRows::new(64);
        lists.add_segment(0);
        lists.link(1, 5);
        let before = lists.host_bytes();
        for round in 1..100 {
            lists.add_segment(1);
            (0..64).for_each(|row| lists.link(round * 64 * 64 + u64::from(row), 64 + row));
            (0..64).for_each(|row| lists.unlink(round * 64 * 64 + u64::from(row), 64 + row));
            lists.drop_segment(1);
        }
        assert!(lists.host_bytes() < before + 4096, "{before}, now {}", lists.host_bytes());
        assert_eq!(lists.rows_of(1), [5]);
    }

    #[test]
    #[should_panic(expected = "not in its subject's list")]
    fn a_row_of_another_subject_is_not_unlinked() {
        let mut lists = SubjectRows::new(64);
        lists.add_segment(0);
        lists.link(1, 5);
        lists.link(2, 6);
        lists.unlink(2, 5);
    }
}
