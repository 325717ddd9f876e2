//! The table under random growth, change and removal, against a plain list of rows.

use std::collections::BTreeMap;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thenar_index::codes::OwnedCodes;

use super::*;

const DIM: usize = 32;

/// Blocks of rows that are all zero, with their codes: the table never reads them.
struct Segments {
    rows: Vec<f16>,
    codes: OwnedCodes,
    live: Vec<u64>,
    /// first row -> (identity, count)
    segments: BTreeMap<u32, (u64, usize)>,
}

impl Segments {
    fn view(&self) -> GalleryView<'_> {
        let segments = self.segments.iter().map(|(&first_row, &(identity, count))| SegmentView {
            identity,
            first_row,
            rows: &self.rows[..count * DIM],
            live: &self.live,
            codes: self.codes.as_codes().blocks(DIM, 0, count / 64),
        });
        GalleryView { dim: DIM, segments: segments.collect() }
    }
}

#[test]
fn every_row_has_a_slot_of_its_own_whatever_came_and_went() {
    for seed in 0..20 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut segments = Segments {
            rows: vec![f16::ZERO; 9000 * DIM],
            codes: OwnedCodes::zeroed(DIM, 9024),
            live: vec![u64::MAX; 9000 / 64 + 1],
            segments: BTreeMap::new(),
        };
        let mut resident = Resident::empty(1, DIM);
        // What lies in which slot, according to uploads and zeroing.
        let mut device: BTreeMap<(usize, u32), (u64, u32)> = BTreeMap::new();
        for step in 0..60 {
            let first_row = 10_000 * rng.random_range(0..6_u32);
            match rng.random_range(0..5) {
                0 => drop(segments.segments.remove(&first_row)),
                1 => drop(segments.segments.insert(first_row, (1000 + step, rng.random_range(0..3000)))),
                _ => {
                    let segment = segments.segments.entry(first_row).or_insert((1000 + step, 0));
                    segment.1 = (segment.1 + rng.random_range(0..700)).min(9000);
                }
            }
            let view = segments.view();
            for extent in resident.drop_stale(&view) {
                for slot in extent.slot..extent.slot + extent.room {
                    device.remove(&(extent.slab, slot));
                }
            }
            let placements = loop {
                match resident.place(&view) {
                    Ok(placements) => break placements,
                    Err(wanted) => {
                        assert!(wanted.slots_least <= wanted.slots && wanted.slots_least > 0);
                        resident.add_slab(wanted.slots.min(2048));
                    }
                }
            };
            for placement in placements {
                let segment = &view.segments[placement.segment];
                for (slot, offset) in (placement.slot..).zip(placement.rows.clone()) {
                    let before = device.insert((placement.slab, slot), (segment.identity, offset));
                    assert_eq!(before, None, "seed {seed} step {step}: a slot was given twice");
                }
            }
            let rows_of = resident.rows_of(&view);
            let mut rows = 0;
            for (&first_row, &(identity, count)) in &segments.segments {
                let coded = count as u32 / 64 * 64;
                for offset in 0..coded {
                    let place = resident.slot_of(first_row + offset).expect("resident");
                    assert_eq!(device.get(&place), Some(&(identity, offset)), "seed {seed} step {step}");
                    let slot = resident.slabs[place.0].base + place.1;
                    let found = rows_of.live_row(slot).map(|(segment, offset)| segment.first_row + offset as u32);
                    assert_eq!(found, Some(first_row + offset));
                    rows += 1;
                }
                assert_eq!(resident.slot_of(first_row + coded), None);
            }
            assert_eq!(device.len(), rows, "seed {seed} step {step}: slots that no row has");
            // The runs cover every row.
            let runs = resident.runs(&(0..resident.slots()));
            let covered = |&(slab, slot): &(usize, u32)| {
                runs.iter().any(|run| run.slab == slab && (run.slot_first..run.slot_end).contains(&slot))
            };
            assert!(device.keys().all(covered), "seed {seed} step {step}");
        }
    }
}

#[test]
fn a_table_covers_a_view_only_with_its_identities_and_all_its_codes() {
    let mut segments = Segments {
        rows: vec![f16::ZERO; 200 * DIM],
        codes: OwnedCodes::zeroed(DIM, 256),
        live: vec![0; 4],
        segments: [(5, (1, 70)), (900, (2, 190))].into(),
    };
    let mut resident = Resident::empty(1, DIM);
    assert!(!resident.covers(&segments.view()));
    assert_eq!(resident.missing_bytes(&segments.view()), 192 * row_bytes(DIM) as u64);
    resident.add_slab(SLOT_STEP);
    resident.place(&segments.view()).unwrap();
    assert!(resident.covers(&segments.view()));
    assert_eq!(resident.missing_bytes(&segments.view()), 0);
    // Rows that have no codes yet are not in the table.
    segments.segments.insert(5, (1, 127));
    assert!(resident.covers(&segments.view()));
    segments.segments.insert(5, (1, 128));
    assert!(!resident.covers(&segments.view()));
    segments.segments.insert(5, (7, 70));
    assert!(!resident.covers(&segments.view()));
    segments.segments.remove(&5);
    assert!(resident.covers(&segments.view()));
}
