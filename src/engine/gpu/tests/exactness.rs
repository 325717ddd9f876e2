//! Nothing that reaches a floor is missed, whatever the gallery looks like.

use super::*;

/// One case: gallery sizes, probes, floor, keep and limit rotate with the case number so that
/// every pair of values meets somewhere.
fn try_sizes(dim: usize, rows_of: impl Fn(usize, &mut ChaCha8Rng) -> Vec<f32>, seed: u64) {
    let Some(engine) = shared_engine() else { return };
    let mut rng = rng(seed);
    let probes_counts = [1, 2, 3, 5, 16, 17, 33, 40];
    let floors = [-1.1_f32, 0.0, 0.5, 0.9];
    let keeps = [0_u32, 1, 10, 100];
    let mut case = usize::try_from(seed).unwrap();
    for count in [1_usize, 63, 64, 65, 1000] {
        let values = rows_of(count, &mut rng);
        let mut gallery = Gallery::new(dim, &to_rows(&values), &[count / 3, count - count / 3]);
        gallery.kill(1, 0);
        engine.follow(&gallery.view()).unwrap();
        for _ in 0..4 {
            let probes = probes_near(&values, probes_counts[case % 8], dim, &mut rng);
            let (floor, keep) = (floors[case % 4], keeps[case / 4 % 4]);
            let asked = Asked::alike(probes, dim, floor, keep, 5000);
            hold(&engine, &gallery, &asked, &format!("seed {seed} dim {dim} rows {count} floor {floor} keep {keep}"));
            case += 5;
        }
    }
}

#[test]
fn every_dimension_finds_a_superset_of_brute_force() {
    for (seed, dim) in (0..).zip([32, 64, 96, 128, 256, 512, 1024]) {
        try_sizes(dim, |count, rng| unit_vectors(count, dim, rng), seed);
    }
}

#[test]
fn clusters_of_near_duplicates_lose_nobody() {
    let dim = 128;
    let clustered = |count: usize, rng: &mut ChaCha8Rng| {
        let centres = unit_vectors(3, dim, rng);
        let noise = unit_vectors(count, dim, rng);
        let near = noise.chunks_exact(dim).enumerate().flat_map(|(i, noise)| {
            let centre = &centres[i % 3 * dim..][..dim];
            let near: Vec<f32> = centre.iter().zip(noise).map(|(c, e)| c + 1e-3 * e).collect();
            normalised(&near)
        });
        near.collect()
    };
    try_sizes(dim, clustered, 11);
}

#[test]
fn equal_rows_antipodes_and_zero_rows_lose_nobody() {
    let dim = 64;
    let equal = |count: usize, rng: &mut ChaCha8Rng| unit_vectors(1, dim, rng).repeat(count);
    try_sizes(dim, equal, 21);
    let antipodes = |count: usize, rng: &mut ChaCha8Rng| {
        let mut values = unit_vectors(1, dim, rng).repeat(count);
        values.chunks_exact_mut(dim).step_by(2).for_each(|row| row.iter_mut().for_each(|v| *v = -*v));
        values
    };
    try_sizes(dim, antipodes, 22);
    let zeros = |count: usize, rng: &mut ChaCha8Rng| {
        let mut values = unit_vectors(count, dim, rng);
        values.chunks_exact_mut(dim).skip(1).step_by(2).for_each(|row| row.fill(0.0));
        values
    };
    try_sizes(dim, zeros, 23);
}

#[test]
fn a_large_gallery_in_several_segments_agrees_with_brute_force() {
    let Some(engine) = shared_engine() else { return };
    for (seed, dim) in [(31, 128), (32, 1024)] {
        let mut rng = rng(seed);
        let count = 20_000;
        let values = unit_vectors(count, dim, &mut rng);
        let mut gallery = Gallery::new(dim, &to_rows(&values), &[1, 7000, 63, 64, 0, 12_872]);
        for dead in (0..7000).step_by(13) {
            gallery.kill(1, dead);
        }
        engine.follow(&gallery.view()).unwrap();
        for (probes, floor, keep) in
            [(1, 0.5, 0), (1, -1.1, 10), (3, 0.0, 1), (20, 0.5, 10), (40, -1.1, 100), (5, 0.5, 100)]
        {
            let asked = Asked::alike(probes_near(&values, probes, dim, &mut rng), dim, floor, keep, 3000);
            let candidates =
                hold(&engine, &gallery, &asked, &format!("seed {seed} probes {probes} floor {floor} keep {keep}"));
            assert!(candidates.overflowed.iter().all(|o| !o), "seed {seed} floor {floor} keep {keep}");
        }
    }
}

#[test]
fn probes_of_one_request_may_differ_in_floor_and_keep() {
    let Some(engine) = shared_engine() else { return };
    let (dim, count, seed) = (64, 6000, 41);
    let mut rng = rng(seed);
    let values = unit_vectors(count, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[count]);
    engine.follow(&gallery.view()).unwrap();
    let asked = Asked {
        probes: probes_near(&values, 6, dim, &mut rng),
        floors: vec![0.5, -1.1, -1.1, 0.0, 2.0, 0.6],
        keep: vec![0, 0, 10, 1, 5, 100],
        candidates_max: 500,
    };
    let candidates = hold(&engine, &gallery, &asked, "mixed");
    assert_eq!(candidates.overflowed, [false, true, false, false, false, false], "seed {seed}");
    assert!(candidates.rows[4].is_empty());
}

#[test]
fn a_floor_equal_to_a_score_keeps_its_row() {
    let Some(engine) = shared_engine() else { return };
    let (dim, count, seed) = (256, 500, 51);
    let mut rng = rng(seed);
    let values = unit_vectors(count, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[count]);
    engine.follow(&gallery.view()).unwrap();
    let probe = unit_vectors(1, dim, &mut rng);
    let scores = gallery.scores(&probe);
    for (number, (row, score)) in scores.iter().enumerate().step_by(60) {
        // The next f32 not above the score, so that the row reaches it.
        let mut floor = *score as f32;
        if f64::from(floor) > *score {
            floor = floor.next_down();
        }
        let copies = 1 + number / 60 % 7;
        let asked = Asked::alike(probe.repeat(copies), dim, floor, 0, 500);
        let candidates = hold(&engine, &gallery, &asked, &format!("seed {seed} row {row}"));
        assert!(candidates.rows.iter().all(|rows| rows.contains(row)), "seed {seed} row {row}");
    }
}

#[test]
fn too_many_candidates_are_reported_and_nobody_else_suffers() {
    let Some(engine) = shared_engine() else { return };
    let (dim, count, seed) = (32, 3000, 61);
    let mut rng = rng(seed);
    let values = unit_vectors(count, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[count]);
    engine.follow(&gallery.view()).unwrap();
    for candidates_max in [0, 1, 20, 2999, 3000] {
        let asked = Asked {
            probes: probes_near(&values, 3, dim, &mut rng),
            floors: vec![-1.1, 0.99999, -1.1],
            keep: vec![0, 0, 10],
            candidates_max,
        };
        let candidates = hold(&engine, &gallery, &asked, &format!("seed {seed} candidates_max {candidates_max}"));
        assert_eq!(candidates.overflowed, [candidates_max < 3000, false, candidates_max < 10], "{candidates_max}");
    }
}

#[test]
fn more_ties_than_candidates_overflow_and_fewer_are_all_found() {
    let Some(engine) = shared_engine() else { return };
    let (dim, seed) = (64, 71);
    let mut rng = rng(seed);
    let mut values = unit_vectors(4000, dim, &mut rng);
    let twin = values[..dim].to_vec();
    for copy in 0..50 {
        values[copy * 70 * dim..][..dim].copy_from_slice(&twin);
    }
    let gallery = Gallery::new(dim, &to_rows(&values), &[4000]);
    engine.follow(&gallery.view()).unwrap();
    for (candidates_max, overflows) in [(49, true), (50, false)] {
        let asked = Asked::alike(twin.clone(), dim, -1.1, 10, candidates_max);
        let candidates = hold(&engine, &gallery, &asked, &format!("seed {seed}"));
        assert_eq!(candidates.overflowed, [overflows]);
    }
}

#[test]
fn a_crowded_entries_buffer_is_worked_off_in_smaller_runs() {
    let Some(engine) = engine_with(DeviceOptions { entries_max: 512, ..DeviceOptions::default() }) else { return };
    let (dim, count, seed) = (32, 5000, 81);
    let mut rng = rng(seed);
    let values = unit_vectors(count, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[2000, 3000]);
    engine.follow(&gallery.view()).unwrap();
    for (probes, floor, keep) in [(1, -1.1, 0), (6, 0.0, 0), (6, -1.1, 100), (1, 0.0, 1), (40, -1.1, 10)] {
        let asked = Asked::alike(probes_near(&values, probes, dim, &mut rng), dim, floor, keep, 5000);
        let candidates = hold(&engine, &gallery, &asked, &format!("seed {seed} probes {probes} keep {keep}"));
        assert!(candidates.overflowed.iter().all(|o| !o));
    }
}

#[test]
fn a_gallery_that_gets_better_and_better_is_searched_right() {
    // Ascending scores are the worst order for rising floors.
    let Some(engine) = engine_with(DeviceOptions { entries_max: 2048, ..DeviceOptions::default() }) else { return };
    let (dim, count, seed) = (32, 12_000, 91);
    let mut rng = rng(seed);
    let probe = unit_vectors(1, dim, &mut rng);
    let mut rows: Vec<Vec<f32>> = unit_vectors(count, dim, &mut rng).chunks_exact(dim).map(<[f32]>::to_vec).collect();
    let score = |row: &[f32]| row.iter().zip(&probe).map(|(x, q)| x * q).sum::<f32>();
    rows.sort_by(|a, b| score(a).total_cmp(&score(b)));
    let gallery = Gallery::new(dim, &to_rows(&rows.concat()), &[count]);
    engine.follow(&gallery.view()).unwrap();
    for keep in [1, 10, 100] {
        let asked = Asked::alike(probe.clone(), dim, -1.1, keep, 1000);
        let candidates = hold(&engine, &gallery, &asked, &format!("seed {seed} keep {keep}"));
        assert_eq!(candidates.overflowed, [false]);
    }
}

#[test]
fn more_probes_than_a_batch_holds_are_searched_in_turns() {
    let Some(engine) = shared_engine() else { return };
    let (dim, count, seed) = (32, 700, 101);
    let mut rng = rng(seed);
    let values = unit_vectors(count, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[count]);
    engine.follow(&gallery.view()).unwrap();
    let asked = Asked::alike(probes_near(&values, 517, dim, &mut rng), dim, 0.5, 0, 700);
    hold(&engine, &gallery, &asked, &format!("seed {seed}"));
}

#[test]
fn an_empty_gallery_and_an_empty_request_have_no_candidates() {
    let Some(engine) = shared_engine() else { return };
    let gallery = Gallery::new(64, &[], &[]);
    engine.follow(&gallery.view()).unwrap();
    let asked = Asked::alike(vec![0.125; 64], 64, -1.1, 3, 10);
    let candidates = hold(&engine, &gallery, &asked, "no rows");
    assert_eq!((candidates.rows.len(), candidates.overflowed[0]), (1, false));
    let nothing = Asked::alike(Vec::new(), 64, 0.0, 0, 10);
    assert!(hold(&engine, &gallery, &nothing, "no probes").rows.is_empty());
}

#[test]
fn kernels_for_large_batches_agree_with_plain_ones_on_every_pair_of_a_gallery() {
    let Some(engine) = shared_engine() else { return };
    let dim = 96;
    let values = unit_vectors(3000, dim, &mut rng(5));
    let mut gallery = Gallery::new(dim, &to_rows(&values), &[1000, 2000]);
    gallery.kill(0, 7);
    engine.follow(&gallery.view()).unwrap();
    let probes = probes_near(&values, 70, dim, &mut rng(6));
    let mut passed = Vec::new();
    for deviations in [-20.0, 0.0, 2.0, 20.0] {
        let check = engine.check_matrices(&gallery.view(), &probes, deviations).unwrap();
        assert_eq!(check.wrong, None, "{deviations} deviations");
        assert_eq!(check.listed, check.passed, "all of them fit the list");
        passed.push(check.passed);
    }
    // Whole blocks have codes: 960 and 1984 rows, dead ones included, at two levels.
    let all = 2 * 70 * (960 + 1984);
    assert_eq!((passed[0], passed[3]), (all, 0));
    assert!(passed[1].abs_diff(all / 2) < all / 10, "{passed:?} of {all}");
    assert!((all / 200..all / 20).contains(&passed[2]), "{passed:?} of {all}");
}

#[test]
fn without_matrices_an_engine_opens_and_finds_all_the_same() {
    let Some(engine) = engine_with(DeviceOptions { matrices: false, ..DeviceOptions::default() }) else { return };
    assert_eq!(engine.kernels(), "packed dot products");
    let dim = 64;
    let values = unit_vectors(500, dim, &mut rng(8));
    let gallery = Gallery::new(dim, &to_rows(&values), &[500]);
    engine.follow(&gallery.view()).unwrap();
    let asked = Asked::alike(probes_near(&values, 60, dim, &mut rng(9)), dim, 0.5, 10, 500);
    hold(&engine, &gallery, &asked, "matrices off");
}
