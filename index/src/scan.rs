//! Checks every row of a segment and the codes of its full blocks, in parallel.
//!
//! Reads only. Rows that the manifest counts must be whole and live, or erased; rows beyond are
//! not trusted, and those that are not all zeros are listed to be scrubbed. Codes can be made from
//! their rows at any time, so those that are not right are listed to be made again.

use rayon::prelude::*;

use crate::codes::BLOCK_ROWS;
use crate::coding::{Depth, check_codes, is_uncoded};
use crate::error::DamageKind;
use crate::format::{Fault, Found, HEADER_BYTES, META_BYTES, check_row, is_zero};
use crate::manifest::SegmentEntry;
use crate::map::Pages;
use crate::reader_barrier::Writer;

/// Rows one task checks: a multiple of 64, so that live words are not shared, and about a
/// megabyte at 512 components.
const TASK_ROWS: u32 = 1024;
const ROWS_PER_BLOCK: u32 = BLOCK_ROWS as u32;
/// Rows between two words of progress.
const STEP_ROWS: u32 = 64 * TASK_ROWS;

/// What a pass over a segment found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Live bits, 64 rows a word.
    pub(crate) live: Vec<u64>,
    pub(crate) live_count: u64,
    /// Erased rows, those with a half-done erasure included.
    pub(crate) erased: u64,
    /// Rows whose erasure is to be finished.
    pub(crate) half_gone: Vec<u32>,
    /// Rows beyond those that count, and not all zeros.
    pub(crate) stale: Vec<u32>,
    pub(crate) bad_rows: u64,
    pub(crate) first_fault: Option<Fault>,
    /// Full blocks with an erased row whose codes are not those of their rows: an erasure was cut
    /// short.
    pub(crate) half_coded: Vec<u32>,
    /// Full blocks of live rows whose codes are not those of their rows: damage.
    pub(crate) miscoded: Vec<u32>,
    pub(crate) first_code_fault: Option<Fault>,
    /// Blocks that are not full, and have codes that are not all zeros.
    pub(crate) stale_codes: Vec<u32>,
    /// First and last template seen live.
    templates: Option<(u64, u64)>,
}

impl Scan {
    /// Of a segment just written: `live_count` live rows and nothing else.
    pub(crate) fn of_new(capacity: u32, live_count: u32) -> Self {
        let live = (0..capacity / 64).map(|word| {
            let rows = live_count.saturating_sub(word * 64).min(64);
            if rows == 64 { u64::MAX } else { (1 << rows) - 1 }
        });
        Self { live: live.collect(), live_count: u64::from(live_count), ..Self::default() }
    }

    /// Whether the row was found live.
    pub(crate) fn is_live(&self, offset: u32) -> bool {
        self.live[offset as usize / 64] >> (offset % 64) & 1 == 1
    }

    fn fault(&mut self, fault: Fault) {
        self.bad_rows += 1;
        self.first_fault.get_or_insert(fault);
    }

    fn absorb(&mut self, mut later: Self, entry: &SegmentEntry) {
        if let (Some((_, before)), Some((first, _))) = (self.templates, later.templates)
            && before >= first
        {
            self.fault(order_fault(entry, before, first));
        }
        self.templates = match (self.templates, later.templates) {
            (Some((first, _)), Some((_, last))) => Some((first, last)),
            (a, b) => a.or(b),
        };
        self.live.append(&mut later.live);
        self.live_count += later.live_count;
        self.erased += later.erased;
        self.half_gone.append(&mut later.half_gone);
        self.stale.append(&mut later.stale);
        self.bad_rows += later.bad_rows;
        self.first_fault = self.first_fault.or(later.first_fault);
        self.half_coded.append(&mut later.half_coded);
        self.miscoded.append(&mut later.miscoded);
        self.first_code_fault = self.first_code_fault.or(later.first_code_fault);
        self.stale_codes.append(&mut later.stale_codes);
    }
}

/// Template numbers that do not ascend are no bit rot (checksums are right): the first record of
/// the segment stands for the place.
fn order_fault(entry: &SegmentEntry, before: u64, found: u64) -> Fault {
    let expected = before.saturating_add(1).max(entry.first_template);
    Fault { offset: HEADER_BYTES as u64, kind: DamageKind::Order, expected, found }
}

/// Checks every row of `pages`, and its codes. After each step `progress` hears how
/// many rows that were; a false from it ends the pass without a result.
pub(crate) fn scan(
    pages: &Pages,
    entry: &SegmentEntry,
    depth: Depth,
    writer: &Writer,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Option<Scan> {
    let capacity = pages.layout().capacity;
    assert!(entry.rows <= capacity && capacity.is_multiple_of(64));
    pages.will_read();
    let mut whole = Scan::default();
    for step in (0..capacity).step_by(STEP_ROWS as usize) {
        let step_end = capacity.min(step + STEP_ROWS);
        let tasks: Vec<u32> = (step..step_end).step_by(TASK_ROWS as usize).collect();
        let found: Vec<Scan> = tasks
            .into_par_iter()
            .map(|from| scan_task(pages, entry, depth, writer, from, step_end.min(from + TASK_ROWS)))
            .collect();
        found.into_iter().for_each(|part| whole.absorb(part, entry));
        if !progress(u64::from(entry.rows.min(step_end).saturating_sub(step))) {
            return None;
        }
    }
    assert_eq!(whole.live.len(), capacity as usize / 64);
    Some(whole)
}

fn scan_task(pages: &Pages, entry: &SegmentEntry, depth: Depth, writer: &Writer, from: u32, end: u32) -> Scan {
    let mut scan = Scan { live: vec![0; (end - from) as usize / 64], ..Scan::default() };
    for block in from / ROWS_PER_BLOCK..end / ROWS_PER_BLOCK {
        let gone = scan.rows(pages, entry, writer, block, from);
        scan.codes(pages, entry, depth, writer, block, gone);
    }
    scan
}

impl Scan {
    /// Checks the rows of a block, in a task that began with the row `from`. The bits of the rows
    /// that are erased, or were being so.
    fn rows(&mut self, pages: &Pages, entry: &SegmentEntry, writer: &Writer, block: u32, from: u32) -> u64 {
        let records = pages.records(writer);
        let (scan, mut gone) = (self, 0);
        for offset in block * ROWS_PER_BLOCK..(block + 1) * ROWS_PER_BLOCK {
            let record = &records[offset as usize];
            let row = pages.row_bytes(offset, writer);
            if offset >= entry.rows {
                if !is_zero(bytemuck::bytes_of(record)) || !is_zero(row) {
                    scan.stale.push(offset);
                }
                continue;
            }
            match check_row(pages.layout(), entry.identity, offset, record, row) {
                Found::Live => {
                    let first = scan.templates.map_or(record.template, |(first, _)| first);
                    let before = scan.templates.map(|(_, last)| last);
                    let in_order = before.is_none_or(|last| last < record.template);
                    if !in_order || record.template < entry.first_template || record.template > entry.last_template {
                        let fault = order_fault(entry, before.unwrap_or(0), record.template);
                        scan.fault(Fault { offset: (HEADER_BYTES + offset as usize * META_BYTES) as u64, ..fault });
                    }
                    scan.templates = Some((first, record.template));
                    scan.live[(offset - from) as usize / 64] |= 1 << (offset % 64);
                    scan.live_count += 1;
                }
                Found::Gone => {
                    scan.erased += 1;
                    gone |= 1 << (offset % 64);
                }
                Found::HalfGone => {
                    scan.erased += 1;
                    gone |= 1 << (offset % 64);
                    scan.half_gone.push(offset);
                }
                Found::Bad(fault) => scan.fault(fault),
            }
        }
        gone
    }

    fn codes(&mut self, pages: &Pages, entry: &SegmentEntry, depth: Depth, writer: &Writer, block: u32, gone: u64) {
        if block >= entry.rows / ROWS_PER_BLOCK {
            if !is_uncoded(pages, block, writer) {
                self.stale_codes.push(block);
            }
            return;
        }
        let Err(wrong) = check_codes(pages, entry.identity, block, gone, depth, writer) else { return };
        if wrong.may_be_cut {
            self.half_coded.push(block);
        } else {
            self.miscoded.push(block);
            self.first_code_fault.get_or_insert(wrong.fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fill::write_segment;
    use crate::format::Layout;
    use crate::nouns::{Geometry, OwnedRow, SubjectNumber, TemplateId};
    use crate::reader_barrier::reader_barrier;
    use crate::storage::Files;

    fn rows(templates: impl Iterator<Item = u64>) -> impl Iterator<Item = OwnedRow> {
        templates.map(|template| OwnedRow {
            template: TemplateId(template),
            subject: SubjectNumber(template),
            hand: 0,
            label: String::new(),
            source: template,
            vector: vec![half::f16::ONE; 32],
        })
    }

    #[test]
    fn a_new_segment_scans_as_what_it_was_said_to_be() {
        let layout = Layout::of(Geometry { dim: 32, segment_rows: 2112 });
        for count in [0, 1, 63, 64, 65, 2111, 2112] {
            let dir = tempfile::tempdir().unwrap();
            let (_, mut writer) = reader_barrier();
            let range = (TemplateId(1), TemplateId(5000));
            let (segment, written) =
                write_segment(&Files, dir.path(), 0, layout, &mut writer, range, rows(1..=count)).unwrap();
            assert_eq!(u64::from(written), count);
            let entry = SegmentEntry {
                identity: segment.identity,
                first_template: 1,
                last_template: 5000,
                file: 0,
                rows: written,
                slot: 0,
                reserved: 0,
            };
            let (found, said) = (
                scan(&segment.pages, &entry, Depth::Bytes, &writer, &mut |_| true).unwrap(),
                Scan::of_new(2112, written),
            );
            assert_eq!((found.live, found.live_count, found.erased), (said.live, said.live_count, 0));
            assert_eq!((found.first_fault, found.stale), (None, Vec::new()));
            assert_eq!((found.first_code_fault, found.half_coded, found.stale_codes), (None, Vec::new(), Vec::new()));
        }
    }

    #[test]
    fn rows_out_of_order_or_range_are_found_across_tasks() {
        let layout = Layout::of(Geometry { dim: 32, segment_rows: 2112 });
        let dir = tempfile::tempdir().unwrap();
        let (_, mut writer) = reader_barrier();
        let range = (TemplateId(1), TemplateId(5000));
        let (segment, _) = write_segment(&Files, dir.path(), 0, layout, &mut writer, range, rows(1..=1030)).unwrap();
        let mut entry = SegmentEntry {
            identity: segment.identity,
            first_template: 1,
            last_template: 1029,
            file: 0,
            rows: 1030,
            slot: 0,
            reserved: 0,
        };
        let found = scan(&segment.pages, &entry, Depth::Bytes, &writer, &mut |_| true).unwrap();
        assert_eq!((found.bad_rows, found.first_fault.unwrap().kind), (1, DamageKind::Order));
        // The same records, counted twice over by a task that comes later.
        entry.last_template = 1030;
        let mut first = scan_task(&segment.pages, &entry, Depth::Sums, &writer, 0, 1024);
        let later = scan_task(&segment.pages, &entry, Depth::Sums, &writer, 0, 64);
        first.absorb(later, &entry);
        assert_eq!((first.bad_rows, first.first_fault.unwrap().kind), (1, DamageKind::Order));
    }
}
