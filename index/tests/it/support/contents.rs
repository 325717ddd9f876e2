//! The rows of a snapshot, with every way to read them checked against the others.

use std::collections::{BTreeMap, BTreeSet};

use thenar_index::codes::{BLOCK_ROWS, OwnedCodes};
use thenar_index::{OwnedRow, Row, SegmentView, Snapshot};

/// Every full block of 64 rows has the codes of its rows, which are zeros for an erased row. If
/// `interrupted`, an erasure has failed halfway, and codes of dead rows may be anything.
fn assert_codes(segment: &SegmentView<'_>, dim: usize, interrupted: bool) {
    let whole = segment.rows.len() / dim / BLOCK_ROWS * BLOCK_ROWS;
    let mut expected = OwnedCodes::of(&segment.rows[..whole * dim], dim);
    let found = segment.codes;
    assert_eq!(found.rows(), whole);
    let factors: &[u8] = bytemuck::cast_slice(found.factors);
    for area in [found.one_bit, found.two_bit, found.four_bit, factors, found.codebook] {
        assert!(area.as_ptr().addr().is_multiple_of(4096));
    }
    let mut copy = OwnedCodes::zeroed(dim, whole);
    copy.codebook.copy_from_slice(found.codebook);
    copy.one_bit.copy_from_slice(found.one_bit);
    copy.two_bit.copy_from_slice(found.two_bit);
    copy.four_bit.copy_from_slice(found.four_bit);
    copy.factors.copy_from_slice(found.factors);
    for (at, row) in segment.rows[..whole * dim].chunks_exact(dim).enumerate() {
        let live = segment.live[at / 64] >> (at % 64) & 1 == 1;
        if interrupted && !live {
            expected.clear(at);
            copy.clear(at);
        } else {
            assert_eq!(found.is_clear(dim, at), row.iter().all(|x| x.to_bits() == 0));
        }
    }
    assert!(copy == expected, "rows from {} on", segment.first_row);
}

/// The live rows of a snapshot, read segment by segment. Each is compared with the same row read alone, and
/// the codes are compared with the rows.
pub(crate) fn live_rows(snapshot: &Snapshot) -> BTreeMap<u64, OwnedRow> {
    rows_and_codes(snapshot, false, false)
}

/// [`live_rows`] of a staged snapshot, which has rows twice that are being compacted.
pub(crate) fn staged_rows(snapshot: &Snapshot) -> BTreeMap<u64, OwnedRow> {
    rows_and_codes(snapshot, false, true)
}

/// [`live_rows`] of an index whose writer stopped, perhaps during an erasure.
pub(crate) fn live_rows_of_a_stopped(snapshot: &Snapshot) -> BTreeMap<u64, OwnedRow> {
    rows_and_codes(snapshot, true, false)
}

fn rows_and_codes(snapshot: &Snapshot, interrupted: bool, staged: bool) -> BTreeMap<u64, OwnedRow> {
    let (dim, mut rows, mut numbers) = (snapshot.dim(), BTreeMap::new(), BTreeSet::new());
    for segment in snapshot.segments() {
        assert_codes(&segment, dim, interrupted);
        assert!(segment.first_row.is_multiple_of(64));
        assert!(segment.rows.as_ptr().addr().is_multiple_of(64));
        for (offset, vector) in segment.rows.chunks_exact(dim).enumerate() {
            let number = Row(segment.first_row + offset as u32);
            let live = segment.live[offset / 64] >> (offset % 64) & 1 == 1;
            assert_eq!(live, snapshot.is_live(number));
            assert_eq!(live, snapshot.meta(number).is_some());
            assert_eq!(vector, snapshot.row(number));
            assert!(numbers.insert(number.0), "two rows have the same number");
            if let Some(meta) = snapshot.meta(number) {
                let row = OwnedRow {
                    template: meta.template,
                    subject: meta.subject,
                    hand: meta.hand,
                    label: meta.label.to_owned(),
                    source: meta.source,
                    vector: vector.to_vec(),
                };
                assert!(staged || rows.last_key_value().is_none_or(|(before, _)| *before < row.template.0));
                if let Some(copy) = rows.insert(row.template.0, row.clone()) {
                    assert_eq!(copy, row);
                }
            }
        }
    }
    assert!(numbers.last().is_none_or(|last| last + 1 == snapshot.rows_end()));
    assert!(!snapshot.is_live(Row(snapshot.rows_end())) && snapshot.meta(Row(u32::MAX)).is_none());
    rows
}
