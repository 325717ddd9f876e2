//! The segments by the slots of the row numbers they have, and in the order of their templates.
//!
//! A row's number is its segment's slot times rows a segment, plus its offset. A slot is given to a
//! segment when it is made and taken back when its file is gone, so numbers do not run out however
//! often a gallery is turned over; and the lowest free one is given, so tables by slot stay short.
//!
//! Knows numbers and segments. Does not know files or what is being done to a segment.
//!
//! Invariants: a slot has one segment; listed segments have ascending templates.

use std::ops::{Index, IndexMut, Range};
use std::sync::Arc;

use crate::live::LiveBits;
use crate::nouns::TemplateId;
use crate::segment::Segment;

/// A segment as the writer keeps it.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) segment: Arc<Segment>,
    /// Which rows are live, published or not.
    pub(crate) live: LiveBits,
    /// Rows written, published or not.
    pub(crate) rows: u32,
    /// The smallest and largest template number that belong here; none before the first row.
    pub(crate) range: Option<(TemplateId, TemplateId)>,
    /// Whether something was written since the file was synced.
    pub(crate) dirty: bool,
    /// Whether its rows count: not those of a copy that is being made, nor those that were copied.
    pub(crate) listed: bool,
}

/// How many slots there are: row numbers stay under `u32::MAX`, which stands for no row.
pub(crate) fn slots_max(segment_rows: u32) -> u32 {
    u32::MAX / segment_rows
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Slots {
    by_number: Vec<Option<Slot>>,
    /// Those listed.
    order: Vec<u32>,
    max: u32,
}

impl Slots {
    pub(crate) fn new(segment_rows: u32) -> Self {
        Self { by_number: Vec::new(), order: Vec::new(), max: slots_max(segment_rows) }
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Slot> {
        self.by_number.get(number as usize)?.as_ref()
    }

    /// Slots that have a segment.
    pub(crate) fn taken(&self) -> u32 {
        self.by_number.iter().flatten().count() as u32
    }

    /// The lowest number that no segment has.
    pub(crate) fn free(&self) -> Option<u32> {
        let free = self.by_number.iter().position(Option::is_none).unwrap_or(self.by_number.len()) as u32;
        (free < self.max).then_some(free)
    }

    /// Gives a free number to a segment that does not count yet.
    pub(crate) fn put(&mut self, number: u32, slot: Slot) {
        assert!(number < self.max && self.get(number).is_none() && !slot.listed);
        if self.by_number.len() <= number as usize {
            self.by_number.resize_with(number as usize + 1, || None);
        }
        self.by_number[number as usize] = Some(slot);
    }

    /// Lets a segment count that has the largest templates.
    pub(crate) fn list(&mut self, number: u32) {
        let end = self.order.len();
        self.replace(end..end, Some(number));
    }

    /// Takes the number back from a segment that does not count.
    pub(crate) fn take(&mut self, number: u32) -> Slot {
        assert!(!self[number].listed);
        self.by_number[number as usize].take().expect("checked above")
    }

    /// Lets one segment count, if any, in the place of those at `places` in the order.
    pub(crate) fn replace(&mut self, places: Range<usize>, number: Option<u32>) {
        for old in self.order.splice(places, number).collect::<Vec<_>>() {
            self[old].listed = false;
        }
        if let Some(number) = number {
            self[number].listed = true;
        }
    }

    /// The numbers of the segments that count, by ascending templates.
    pub(crate) fn order(&self) -> &[u32] {
        &self.order
    }

    /// The segments that count, by ascending templates.
    pub(crate) fn listed(&self) -> impl DoubleEndedIterator<Item = (u32, &Slot)> {
        self.order.iter().map(|&number| (number, &self[number]))
    }

    /// Every segment, those that do not count too.
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
