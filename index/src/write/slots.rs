//! The writer's segments, by slot and in the order of their templates.
//!
//! A row's number is its segment's slot times the rows per segment, plus its offset. A segment gets a slot
//! when it is created and frees it when its file is removed, so row numbers do not run out, however often
//! a gallery is replaced. It gets the lowest free slot, so tables by slot stay short.
//!
//! Knows slots and segments. Does not know files or what is being done to a segment.
//!
//! Invariants: a slot has at most one segment; listed segments have ascending templates.

use std::ops::{Index, IndexMut, Range};
use std::sync::Arc;

use crate::read::LiveBits;
use crate::storage::Segment;
use crate::types::{Geometry, TemplateId};

/// A segment with the writer's data about it.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) segment: Arc<Segment>,
    /// Which rows are live, published or not.
    pub(crate) live: LiveBits,
    /// Number of rows written, published or not.
    pub(crate) rows: u32,
    /// The smallest and largest template number that belong to it; none before the first row.
    pub(crate) range: Option<(TemplateId, TemplateId)>,
    /// Whether anything was written since the file was last synced.
    pub(crate) dirty: bool,
    /// Whether its rows count. Those of an unfinished copy, and those that were copied, do not.
    pub(crate) listed: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Slots {
    by_number: Vec<Option<Slot>>,
    /// The listed ones, by ascending templates.
    order: Vec<u32>,
    count: u32,
}

impl Slots {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { by_number: Vec::new(), order: Vec::new(), count: geometry.slot_count() }
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Slot> {
        self.by_number.get(number as usize)?.as_ref()
    }

    /// Number of slots that have a segment.
    pub(crate) fn taken(&self) -> u32 {
        self.by_number.iter().flatten().count() as u32
    }

    /// The lowest free slot.
    pub(crate) fn free(&self) -> Option<u32> {
        let free = self.by_number.iter().position(Option::is_none).unwrap_or(self.by_number.len()) as u32;
        (free < self.count).then_some(free)
    }

    /// Puts a segment that does not count yet into a free slot.
    pub(crate) fn put(&mut self, number: u32, slot: Slot) {
        assert!(number < self.count && self.get(number).is_none() && !slot.listed);
        if self.by_number.len() <= number as usize {
            self.by_number.resize_with(number as usize + 1, || None);
        }
        self.by_number[number as usize] = Some(slot);
    }

    /// Makes the segment with the largest templates count.
    pub(crate) fn list(&mut self, number: u32) {
        let end = self.order.len();
        self.replace(end..end, Some(number));
    }

    /// Frees the slot of a segment that does not count.
    pub(crate) fn take(&mut self, number: u32) -> Slot {
        assert!(!self[number].listed);
        self.by_number[number as usize].take().expect("checked above")
    }

    /// Replaces the segments at `places` of the order by one segment, or by none.
    pub(crate) fn replace(&mut self, places: Range<usize>, number: Option<u32>) {
        for old in self.order.splice(places, number).collect::<Vec<_>>() {
            self[old].listed = false;
        }
        if let Some(number) = number {
            self[number].listed = true;
        }
    }

    /// The slots of the segments that count, by ascending templates.
    pub(crate) fn order(&self) -> &[u32] {
        &self.order
    }

    /// The segments that count, by ascending templates.
    pub(crate) fn listed(&self) -> impl DoubleEndedIterator<Item = (u32, &Slot)> {
        self.order.iter().map(|&number| (number, &self[number]))
    }

    /// All segments, including those that do not count.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.by_number).filter_map(|(number, slot)| Some((number, slot.as_ref()?)))
    }
}

impl Index<u32> for Slots {
    type Output = Slot;

    fn index(&self, number: u32) -> &Slot {
        self.get(number).expect("the slot has a segment")
    }
}

impl IndexMut<u32> for Slots {
    fn index_mut(&mut self, number: u32) -> &mut Slot {
        self.by_number[number as usize].as_mut().expect("the slot has a segment")
    }
}
