//! The resident copy follows the gallery: growth, change, removal, death and erasure.

use super::super::device::layout::{DeviceCodes, Level, row_bytes};
use super::*;

/// Slabs of one step of slots at `dim`, so that small galleries span many.
fn tiny(dim: usize) -> DeviceOptions {
    DeviceOptions { buffer_bytes_max: 512 * dim as u64 / 2, ..DeviceOptions::default() }
}

fn ask(gallery: &Gallery, values: &[f32], rng: &mut ChaCha8Rng) -> Asked {
    Asked::alike(probes_near(values, 5, gallery.dim, rng), gallery.dim, 0.4, 10, 2000)
}

#[test]
fn a_gallery_over_many_slabs_grows_row_by_row_and_loses_nobody() {
    let (dim, seed) = (64, 1);
    let Some(engine) = engine_with(tiny(dim)) else { return };
    let mut rng = rng(seed);
    let values = unit_vectors(9000, dim, &mut rng);
    let rows = to_rows(&values);
    let mut gallery = Gallery::new(dim, &rows[..3000 * dim], &[1000, 2000]);
    let mut taken = 3000;
    // The last segment grows, across words, extents and slabs.
    for grow in [0, 1, 62, 1, 1, 500, 3, 2000, 700, 2732] {
        let segment = gallery.segments.last_mut().unwrap();
        segment.append(&rows[taken * dim..(taken + grow) * dim], dim);
        taken += grow;
        engine.follow(&gallery.view()).unwrap();
        assert!(engine.is_ready());
        let asked = ask(&gallery, &values[..taken * dim], &mut rng);
        hold(&engine, &gallery, &asked, &format!("seed {seed} after {taken} rows"));
    }
    assert_eq!(taken, 9000);
    let slabs = engine.resident.read().slab_count();
    assert!(slabs >= 18, "{slabs} slabs");
}

#[test]
fn a_view_the_device_does_not_hold_is_refused() {
    let dim = 32;
    let Some(engine) = shared_engine() else { return };
    let mut rng = rng(2);
    let values = unit_vectors(300, dim, &mut rng);
    let mut gallery = Gallery::new(dim, &to_rows(&values), &[100, 200]);
    engine.follow(&gallery.view()).unwrap();
    let asked = ask(&gallery, &values, &mut rng);
    hold(&engine, &gallery, &asked, "followed");
    let refused = |gallery: &Gallery| {
        let mut candidates = CandidateRows::default();
        let result = engine.find_candidates(&gallery.view(), &asked.request(), &mut candidates);
        assert!(matches!(result, Err(EngineError::Rebuilding)), "{result:?}");
    };
    // A row without a code is compared on the host; the codes of a full block must be uploaded first.
    let more = gallery.segments[1].rows[..56 * dim].to_vec();
    gallery.segments[1].append(&more[..dim], dim);
    hold(&engine, &gallery, &asked, "one more");
    gallery.segments[1].append(&more[dim..], dim);
    refused(&gallery);
    gallery.segments[1].rows.truncate(200 * dim);
    gallery.segments[1].recode(dim);
    gallery.segments[1].identity = fresh_identity();
    refused(&gallery);
    engine.follow(&gallery.view()).unwrap();
    hold(&engine, &gallery, &asked, "followed again");
}

#[test]
fn an_older_view_of_fewer_rows_is_answered_without_the_newer_ones() {
    let dim = 32;
    let Some(engine) = shared_engine() else { return };
    let mut rng = rng(3);
    let values = unit_vectors(500, dim, &mut rng);
    let rows = to_rows(&values);
    let mut gallery = Gallery::new(dim, &rows, &[500]);
    engine.follow(&gallery.view()).unwrap();
    gallery.segments[0].rows.truncate(321 * dim);
    gallery.segments[0].recode(dim);
    let asked = Asked::alike(probes_near(&values, 8, dim, &mut rng), dim, -1.1, 10, 400);
    hold(&engine, &gallery, &asked, "older");
    gallery.segments[0].rows = rows;
    gallery.segments[0].recode(dim);
    hold(&engine, &gallery, &asked, "newer");
}

#[test]
fn a_changed_identity_brings_the_new_rows_and_removed_segments_are_zeroed() {
    let (dim, seed) = (64, 4);
    let Some(engine) = engine_with(tiny(dim)) else { return };
    let mut rng = rng(seed);
    let values = unit_vectors(2000, dim, &mut rng);
    let rows = to_rows(&values);
    let mut gallery = Gallery::new(dim, &rows, &[700, 700, 600]);
    engine.follow(&gallery.view()).unwrap();
    let old_places: Vec<_> = {
        let resident = engine.resident.read();
        let row = |offset: u32| resident.slot_of(gallery.segments[1].first_row + offset).unwrap();
        (0..640).map(row).collect()
    };
    let before = engine.describe().device_bytes;

    // Other rows, fewer of them, under the same first row.
    gallery.segments[1].replace(&to_rows(&unit_vectors(150, dim, &mut rng)), dim);
    engine.follow(&gallery.view()).unwrap();
    let values_now: Vec<f32> = gallery.segments.iter().flat_map(|b| b.rows.iter().map(|v| v.to_f32())).collect();
    let asked = ask(&gallery, &values_now, &mut rng);
    hold(&engine, &gallery, &asked, &format!("seed {seed} changed"));
    let in_use: BTreeSet<_> = {
        let resident = engine.resident.read();
        (0..128).map(|offset| resident.slot_of(gallery.segments[1].first_row + offset).unwrap()).collect()
    };
    for &(slab, slot) in old_places.iter().filter(|place| !in_use.contains(place)) {
        assert!(read(&engine, slab, slot).iter().all(|&byte| byte == 0), "slab {slab} slot {slot}");
    }

    // The freed slots are used again before new slabs are asked for.
    gallery.segments.remove(0);
    gallery.segments[1].append(&rows[..600 * dim], dim);
    engine.follow(&gallery.view()).unwrap();
    assert_eq!(engine.describe().device_bytes, before);
    hold(&engine, &gallery, &asked, &format!("seed {seed} removed"));
}

fn read(engine: &GpuEngine, slab: usize, slot: u32) -> Vec<u8> {
    engine.device.with(engine.device.generation(), |device| device.read_row(slab, slot)).unwrap()
}

#[test]
fn another_dimension_starts_over() {
    let Some(engine) = shared_engine() else { return };
    for dim in [32, 256, 96] {
        let mut rng = rng(5);
        let values = unit_vectors(200, dim, &mut rng);
        let gallery = Gallery::new(dim, &to_rows(&values), &[200]);
        engine.follow(&gallery.view()).unwrap();
        let asked = ask(&gallery, &values, &mut rng);
        hold(&engine, &gallery, &asked, &format!("dim {dim}"));
    }
}

#[test]
fn rows_that_die_or_come_alive_after_follow_are_seen_by_the_next_search() {
    let dim = 32;
    let Some(engine) = shared_engine() else { return };
    let mut rng = rng(6);
    let values = unit_vectors(1000, dim, &mut rng);
    let mut gallery = Gallery::new(dim, &to_rows(&values), &[400, 600]);
    gallery.segments[1].live.fill(0);
    engine.follow(&gallery.view()).unwrap();
    let asked = Asked::alike(probes_near(&values, 9, dim, &mut rng), dim, -1.1, 3, 100);
    hold(&engine, &gallery, &asked, "second segment dead");
    gallery.segments[1].live.fill(u64::MAX);
    hold(&engine, &gallery, &asked, "second segment alive");
    // The best rows die one after the other: dead rows must not raise the floor.
    for round in 0..5 {
        let candidates = hold(&engine, &gallery, &asked, &format!("round {round}"));
        for &row in &candidates.rows[0] {
            let segment = usize::from(row >= gallery.segments[1].first_row);
            gallery.kill(segment, (row - gallery.segments[segment].first_row) as usize);
        }
    }
    // Dead rows take no room for candidates either.
    for offset in 0..400 {
        gallery.kill(0, offset);
    }
    let all = Asked::alike(values[..dim].to_vec(), dim, -1.1, 0, 600);
    assert_eq!(hold(&engine, &gallery, &all, "first segment dead").overflowed, [false]);
}

#[test]
fn erased_rows_are_zeros_on_the_device_and_their_neighbours_are_not() {
    let (dim, seed) = (64, 7);
    let Some(engine) = engine_with(tiny(dim)) else { return };
    let mut rng = rng(seed);
    let values = unit_vectors(1500, dim, &mut rng);
    let rows = to_rows(&values);
    let mut gallery = Gallery::new(dim, &rows, &[600, 900]);
    engine.follow(&gallery.view()).unwrap();
    let first = gallery.segments[1].first_row;
    // The last of these has no codes and is not on the device.
    let erased = [first, first + 1, first + 2, first + 400, first + 895, 3, 602];
    for &row in &erased {
        let segment = usize::from(row >= first);
        gallery.kill(segment, (row - gallery.segments[segment].first_row) as usize);
    }
    // Rows that are in no segment are ignored.
    engine.erase(&[erased.as_slice(), &[0, 650, first + 900, u32::MAX]].concat()).unwrap();
    let mut whole = 0;
    for segment in &gallery.segments {
        let laid_out = DeviceCodes::new(&segment.codes.as_codes(), dim);
        for offset in 0..segment.rows.len() / dim {
            let row = segment.first_row + u32::try_from(offset).unwrap();
            let held = engine.resident_codes(row).unwrap();
            if offset >= laid_out.factors.len() {
                assert_eq!(held, None, "row {row} has no codes");
                continue;
            }
            let held = held.unwrap();
            assert_eq!(held.len(), row_bytes(dim));
            if erased.contains(&row) {
                assert!(held.iter().all(|&byte| byte == 0), "row {row}");
            } else {
                let mut stored: Vec<u32> = Vec::new();
                for (level, words) in [(Level::OneBit, &laid_out.one_bit), (Level::FourBit, &laid_out.four_bit)] {
                    let quads = level.quads(dim);
                    let at = |quad| ((offset / 64 * quads + quad) * 64 + offset % 64) * 4;
                    stored.extend((0..quads).flat_map(|quad| &words[at(quad)..at(quad) + 4]));
                }
                stored.extend(laid_out.factors[offset]);
                assert_eq!(held, bytemuck::cast_slice::<u32, u8>(&stored), "row {row}");
                whole += 1;
            }
        }
    }
    assert_eq!(whole, 576 + 896 - 6);
    let asked = ask(&gallery, &values, &mut rng);
    hold(&engine, &gallery, &asked, &format!("seed {seed}"));
}

#[test]
fn views_of_two_moments_are_answered_each_by_its_own_live_rows() {
    let dim = 32;
    let Some(engine) = shared_engine() else { return };
    let mut rng = rng(9);
    let values = unit_vectors(1200, dim, &mut rng);
    let rows = to_rows(&values);
    // The later view has more rows, and some of the earlier ones are dead in it.
    let mut earlier = Gallery::new(dim, &rows[..1000 * dim], &[400, 600]);
    let mut later = Gallery::new(dim, &rows[..1000 * dim], &[400, 600]);
    for (early, late) in earlier.segments.iter_mut().zip(&mut later.segments) {
        late.identity = early.identity;
        early.live[1] &= !0b1010;
    }
    later.segments[1].append(&rows[1000 * dim..], dim);
    for offset in (0..400).step_by(3) {
        later.kill(0, offset);
    }
    engine.follow(&earlier.view()).unwrap();
    engine.follow(&later.view()).unwrap();
    let asked = Asked::alike(probes_near(&values, 9, dim, &mut rng), dim, -1.1, 5, 100);
    let all = Asked::alike(values[..dim].to_vec(), dim, -1.1, 0, 1200);
    for round in 0..3 {
        for (gallery, what) in [(&earlier, "earlier"), (&later, "later")] {
            hold(&engine, gallery, &asked, &format!("round {round}: {what}"));
            hold(&engine, gallery, &all, &format!("round {round}: {what}, all rows"));
        }
    }
}

#[test]
fn forgotten_and_erased_rows_are_no_candidates_and_leave_the_others_their_places() {
    let dim = 64;
    let sizes = DeviceOptions { entries_max: 512, ..DeviceOptions::default() };
    let Some(engine) = engine_with(sizes) else { return };
    let mut rng = rng(10);
    let mut values = unit_vectors(6000, dim, &mut rng);
    // More rows like the probe than the device can list, nearly all of them forgotten.
    let probe = values[..dim].to_vec();
    for row in values.chunks_exact_mut(dim).take(3000) {
        row.copy_from_slice(&probe);
    }
    let mut gallery = Gallery::new(dim, &to_rows(&values), &[6000]);
    engine.follow(&gallery.view()).unwrap();
    for offset in 0..2990 {
        gallery.kill(0, offset);
    }
    for (floor, keep) in [(0.9, 0), (-1.1, 5), (0.3, 20)] {
        let asked = Asked::alike(probe.repeat(3), dim, floor, keep, 40);
        let candidates = hold(&engine, &gallery, &asked, "forgotten");
        assert_eq!(candidates.overflowed, [false; 3], "dead rows are no candidates");
    }
    let first = gallery.segments[0].first_row;
    engine.erase(&(first..first + 2990).collect::<Vec<_>>()).unwrap();
    for (floor, keep) in [(0.9, 0), (-1.1, 5), (0.3, 20)] {
        let asked = Asked::alike(probe.repeat(3), dim, floor, keep, 40);
        let candidates = hold(&engine, &gallery, &asked, "erased");
        assert_eq!(candidates.overflowed, [false; 3], "erased rows are no candidates");
    }
}

#[test]
fn two_threads_search_at_once_while_a_third_follows() {
    let (dim, seed) = (64, 8);
    let Some(engine) = engine_with(tiny(dim)) else { return };
    let mut rng = rng(seed);
    let values = unit_vectors(2000, dim, &mut rng);
    let rows = to_rows(&values);
    let gallery = Gallery::new(dim, &rows[..1200 * dim], &[1200]).and_more(&rows, 800);
    engine.follow(&gallery.view()).unwrap();
    let requests: Vec<Asked> = (0..2).map(|_| ask(&gallery, &values, &mut rng)).collect();
    std::thread::scope(|scope| {
        for asked in &requests {
            let (engine, gallery) = (&engine, &gallery);
            scope.spawn(move || {
                for round in 0..10 {
                    hold(engine, gallery, asked, &format!("seed {seed} round {round}"));
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..10 {
                engine.follow(&gallery.view()).unwrap();
            }
        });
    });
}

impl Gallery {
    fn and_more(mut self, rows: &[f16], count: usize) -> Self {
        let last = self.segments.last().unwrap();
        let first_row = last.first_row + u32::try_from(last.rows.len() / self.dim).unwrap();
        self.segments.push(Segment::new(first_row, &rows[rows.len() - count * self.dim..], self.dim));
        self
    }
}
