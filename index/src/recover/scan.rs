//! Checks every row of a segment and the codes of its full blocks, in parallel.
//!
//! Reads only. Rows that the manifest counts must be whole and live, or erased. Rows beyond those are not
//! trusted; they are listed for scrubbing if they are not all zeros. Codes can be computed from their rows
//! at any time, so wrong codes are listed for encoding again.

use rayon::prelude::*;

use super::check_codes::{CodesCheck, check_codes, is_uncoded};
use crate::bytes::is_zero;
use crate::codes::BLOCK_ROWS;
use crate::error::{DamageKind, Fault};
use crate::format::{Found, HEADER_BYTES, META_BYTES, SegmentEntry, check_row};
use crate::reader_barrier::WriteToken;
use crate::storage::Pages;

/// Rows per task: a multiple of 64, so that tasks do not share a word of live bits, and about a megabyte
/// at 512 components.
const TASK_ROWS: u32 = 1024;
const ROWS_PER_BLOCK: u32 = BLOCK_ROWS as u32;
/// Rows between two reports of progress.
const STEP_ROWS: u32 = 64 * TASK_ROWS;

/// The result of checking a segment.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Live bits, 64 rows per word.
    pub(super) live: Vec<u64>,
    pub(super) live_count: u64,
    /// Number of erased rows, including half-erased ones.
    pub(super) erased: u64,
    /// Rows whose erasure must be finished.
    pub(super) half_erased: Vec<u32>,
    /// Rows beyond those that count which are not all zeros.
    pub(super) stale: Vec<u32>,
    pub(super) bad_rows: u64,
    pub(super) first_fault: Option<Fault>,
    /// Full blocks with an erased row whose codes are wrong because an erasure was interrupted.
    pub(super) unfinished_codes: Vec<u32>,
    /// Full blocks whose codes are damaged.
    pub(super) wrong_codes: Vec<u32>,
    pub(super) first_code_fault: Option<Fault>,
    /// Blocks that are not full but have codes that are not all zeros.
    pub(super) stale_codes: Vec<u32>,
    /// The first and last live template.
    templates: Option<(u64, u64)>,
}

impl Scan {
    /// The result for a new segment: `live_count` live rows and nothing else.
    pub(super) fn of_new(capacity: u32, live_count: u32) -> Self {
        let live = (0..capacity / 64).map(|word| {
            let rows = live_count.saturating_sub(word * 64).min(64);
            if rows == 64 { u64::MAX } else { (1 << rows) - 1 }
        });
        Self { live: live.collect(), live_count: u64::from(live_count), ..Self::default() }
    }

    /// Whether the row was found live.
    pub(super) fn is_live(&self, offset: u32) -> bool {
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
        self.half_erased.append(&mut later.half_erased);
        self.stale.append(&mut later.stale);
        self.bad_rows += later.bad_rows;
        self.first_fault = self.first_fault.or(later.first_fault);
        self.unfinished_codes.append(&mut later.unfinished_codes);
        self.wrong_codes.append(&mut later.wrong_codes);
        self.first_code_fault = self.first_code_fault.or(later.first_code_fault);
        self.stale_codes.append(&mut later.stale_codes);
    }
}

/// Template numbers that do not ascend under correct checksums are not decay, so the offset is that of the
/// segment's first record.
fn order_fault(entry: &SegmentEntry, before: u64, found: u64) -> Fault {
    let expected = before.saturating_add(1).max(entry.first_template);
    Fault { offset: HEADER_BYTES as u64, kind: DamageKind::Order, expected, found }
}

/// Checks every row of `pages`, and the codes. After each step `progress` gets the number of rows that
/// were checked in it; if it returns false, the scan ends without a result.
pub(super) fn scan(
    pages: &Pages,
    entry: &SegmentEntry,
    check: CodesCheck,
    token: &WriteToken,
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
            .map(|from| scan_task(pages, entry, check, token, from, step_end.min(from + TASK_ROWS)))
            .collect();
        found.into_iter().for_each(|part| whole.absorb(part, entry));
        if !progress(u64::from(entry.rows.min(step_end).saturating_sub(step))) {
            return None;
        }
    }
    assert_eq!(whole.live.len(), capacity as usize / 64);
    Some(whole)
}

fn scan_task(pages: &Pages, entry: &SegmentEntry, check: CodesCheck, token: &WriteToken, from: u32, end: u32) -> Scan {
    let mut scan = Scan { live: vec![0; (end - from) as usize / 64], ..Scan::default() };
    for block in from / ROWS_PER_BLOCK..end / ROWS_PER_BLOCK {
        let erased = scan.rows(pages, entry, token, block, from);
        scan.codes(pages, entry, check, token, block, erased);
    }
    scan
}

impl Scan {
    /// Checks the rows of a block, in a task that began with row `from`. Returns one bit per row that is
    /// erased or half erased.
    fn rows(&mut self, pages: &Pages, entry: &SegmentEntry, token: &WriteToken, block: u32, from: u32) -> u64 {
        let records = pages.records(token);
        let (scan, mut erased) = (self, 0);
        for offset in block * ROWS_PER_BLOCK..(block + 1) * ROWS_PER_BLOCK {
            let record = &records[offset as usize];
            let row = pages.row_bytes(offset, token);
            if offset >= entry.rows {
                if !is_zero(bytemuck::bytes_of(record)) || !is_zero(row) {
                    scan.stale.push(offset);
                }
                continue;
            }
            match check_row(pages.layout().meta_at(offset), entry.identity, offset, record, row) {
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
                Found::Erased => {
                    scan.erased += 1;
                    erased |= 1 << (offset % 64);
                }
                Found::HalfErased => {
                    scan.erased += 1;
                    erased |= 1 << (offset % 64);
                    scan.half_erased.push(offset);
                }
                Found::Damaged(fault) => scan.fault(fault),
            }
        }
        erased
    }

    fn codes(
        &mut self,
        pages: &Pages,
        entry: &SegmentEntry,
        check: CodesCheck,
        token: &WriteToken,
        block: u32,
        erased: u64,
    ) {
        if block >= entry.rows / ROWS_PER_BLOCK {
            if !is_uncoded(pages, block, token) {
                self.stale_codes.push(block);
            }
            return;
        }
        let Err(wrong) = check_codes(pages, entry.identity, block, erased, check, token) else { return };
        if wrong.may_be_interrupted {
            self.unfinished_codes.push(block);
        } else {
            self.wrong_codes.push(block);
            self.first_code_fault.get_or_insert(wrong.fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Layout;
    use crate::reader_barrier::reader_barrier;
    use crate::storage::Files;
    use crate::types::{Geometry, OwnedRow, SubjectNumber, TemplateId};
    use crate::write::write_segment;

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
    fn a_new_segment_scans_as_expected() {
        let layout = Layout::of(Geometry { dim: 32, segment_rows: 2112 });
        for count in [0, 1, 63, 64, 65, 2111, 2112] {
            let dir = tempfile::tempdir().unwrap();
            let (_, mut token) = reader_barrier();
            let range = (TemplateId(1), TemplateId(5000));
            let (segment, written) =
                write_segment(&Files, dir.path(), 0, layout, &mut token, range, rows(1..=count)).unwrap();
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
            let (found, expected) = (
                scan(&segment.pages, &entry, CodesCheck::Recompute, &token, &mut |_| true).unwrap(),
                Scan::of_new(2112, written),
            );
            assert_eq!((found.live, found.live_count, found.erased), (expected.live, expected.live_count, 0));
            assert_eq!((found.first_fault, found.stale), (None, Vec::new()));
            assert_eq!(
                (found.first_code_fault, found.unfinished_codes, found.stale_codes),
                (None, Vec::new(), Vec::new())
            );
        }
    }

    #[test]
    fn rows_out_of_order_or_range_are_found_across_tasks() {
        let layout = Layout::of(Geometry { dim: 32, segment_rows: 2112 });
        let dir = tempfile::tempdir().unwrap();
        let (_, mut token) = reader_barrier();
        let range = (TemplateId(1), TemplateId(5000));
        let (segment, _) = write_segment(&Files, dir.path(), 0, layout, &mut token, range, rows(1..=1030)).unwrap();
        let mut entry = SegmentEntry {
            identity: segment.identity,
            first_template: 1,
            last_template: 1029,
            file: 0,
            rows: 1030,
            slot: 0,
            reserved: 0,
        };
        let found = scan(&segment.pages, &entry, CodesCheck::Recompute, &token, &mut |_| true).unwrap();
        assert_eq!((found.bad_rows, found.first_fault.unwrap().kind), (1, DamageKind::Order));
        // The same records again, in a later task.
        entry.last_template = 1030;
        let mut first = scan_task(&segment.pages, &entry, CodesCheck::Checksum, &token, 0, 1024);
        let later = scan_task(&segment.pages, &entry, CodesCheck::Checksum, &token, 0, 64);
        first.absorb(later, &entry);
        assert_eq!((first.bad_rows, first.first_fault.unwrap().kind), (1, DamageKind::Order));
    }
}
