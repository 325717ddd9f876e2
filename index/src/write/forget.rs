//! Takes subjects and templates out of later publications.

use std::cmp::Ordering;

use super::Index;
use super::slots::Slot;
use crate::types::{Row, SubjectNumber, TemplateId};

impl Index {
    /// Removes a subject from the next publication and all later ones. Returns its rows, including copies
    /// that a compaction has made: publish, then erase them. Empty if the subject has no rows.
    pub fn forget(&mut self, subject: SubjectNumber) -> Vec<Row> {
        let mut rows = self.shared.subject_rows.read().rows_of(subject.0);
        rows.retain(|row| !self.forgotten.contains_key(row));
        for &row in &rows {
            self.forget_row(row);
        }
        rows.into_iter().map(Row).collect()
    }

    /// Removes one template from the next publication and all later ones. Returns its row, and the copy if a
    /// compaction has made one. Empty if the index has no such template.
    pub fn forget_template(&mut self, template: TemplateId) -> Vec<Row> {
        let in_range = |slot: &Slot| slot.range.is_some_and(|(first, last)| (first..=last).contains(&template));
        let held = self.slots.all().filter(|(_, slot)| in_range(slot));
        let found: Vec<(u32, u32)> =
            held.filter_map(|(number, slot)| Some((number, self.live_offset(slot, template)?))).collect();
        let mut rows = Vec::new();
        for (number, offset) in found {
            let row = number * self.shared.geometry.segment_rows + offset;
            self.forget_row(row);
            rows.push(Row(row));
        }
        rows
    }

    /// The offset in a segment of the live row of a template.
    fn live_offset(&self, slot: &Slot, template: TemplateId) -> Option<u32> {
        let records = slot.segment.pages.records(&self.token);
        let (mut from, mut end) = (0, slot.rows);
        while from < end {
            let middle = from + (end - from) / 2;
            // Erased rows have lost their template number, so the binary search compares live rows only.
            let Some(at) = slot.live.next(middle, end) else {
                end = middle;
                continue;
            };
            match records[at as usize].template.cmp(&template.0) {
                Ordering::Less => from = at + 1,
                Ordering::Greater => end = middle,
                Ordering::Equal => return Some(at),
            }
        }
        None
    }

    fn forget_row(&mut self, row: u32) {
        let (number, offset) = self.place_of(row);
        let slot = &mut self.slots[number];
        slot.live.clear(offset);
        let record = &slot.segment.pages.records(&self.token)[offset as usize];
        assert!(self.forgotten.insert(row, record.subject).is_none());
        if slot.listed {
            self.contents.remove(&record.meta());
            self.dead += 1;
        }
    }

    /// The slot of a row and its offset in the segment.
    pub(crate) fn place_of(&self, row: u32) -> (u32, u32) {
        let segment_rows = self.shared.geometry.segment_rows;
        (row / segment_rows, row % segment_rows)
    }
}
