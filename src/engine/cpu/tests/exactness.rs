//! Candidates are a tight superset of the rows that matter, in every kind of gallery.

use super::*;

/// One gallery, some probes, many floors, on every path and with one and three threads.
fn check_gallery(seed: u64, kind: Kind, dim: usize, count: usize, probes: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let dead = [0.0, 0.2, 0.9][rng.random_range(0..3)];
    let gallery = Gallery::new(&mut rng, kind, dim, count, dead);
    let values = gallery.probes(&mut rng, probes);
    let scores: Vec<Vec<(f64, u32)>> = values.chunks_exact(dim).map(|probe| gallery.scores(probe)).collect();
    let keep: Vec<u32> = (0..probes).map(|_| [0, 1, 10, 100][rng.random_range(0..4)]).collect();
    let floors: Vec<f32> = scores
        .iter()
        .map(|scores| match rng.random_range(0..6) {
            0 => -1.1,
            1 => 0.0,
            2 => 0.5,
            3 => 1.0,
            // The f32 at or next below some score: the row is just in, or exactly at the floor.
            _ if scores.is_empty() => 0.25,
            _ => {
                let score = scores[rng.random_range(0..scores.len().min(30))].0;
                let nearest = score as f32;
                if f64::from(nearest) <= score { nearest } else { nearest.next_down() }
            }
        })
        .collect();
    let request = CandidateRequest {
        probes: &values,
        floors: &floors,
        keep: &keep,
        candidates_max: count + 1,
        ..CandidateRequest::default()
    };
    let view = gallery.view();
    for path in paths() {
        for threads in [1, 3] {
            let engine = CpuEngine::with_simd(threads, path).unwrap();
            let mut candidates = CandidateRows::default();
            for round in 0..2 {
                engine.find_candidates(&view, &request, &mut candidates).unwrap();
                // The next round reads copies of codebook codes.
                engine.follow(&view).unwrap();
                assert_eq!(candidates.rows.len(), probes);
                for p in 0..probes {
                    let what = format!(
                        "{path}, {threads} threads, round {round}, seed {seed}, {kind:?}, {count} x {dim}, probe {p} of {probes}, floor {}, keep {}",
                        floors[p], keep[p]
                    );
                    assert!(!candidates.overflowed[p], "overflow: {what}");
                    check(&scores[p], floors[p], keep[p], dim, &candidates.rows[p], &what);
                    check_held(&scores[p], floors[p], keep[p], candidates.floors[p], &candidates.rows[p], &what);
                }
            }
        }
    }
}

#[test]
fn candidates_are_a_tight_superset_for_every_dimension_and_odd_count() {
    let mut seed = 0;
    for dim in [32, 64, 128, 256, 512, 1024, 2048] {
        for count in [0, 1, 63, 64, 65] {
            seed += 1;
            let kind = KINDS[seed as usize % 5];
            check_gallery(seed, kind, dim, count, 1 + seed as usize * 7 % 20);
        }
    }
}

#[test]
fn candidates_are_a_tight_superset_in_every_kind_of_gallery() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (j, probes) in [1, 2, 5, 13, 26, 40].into_iter().enumerate() {
            let seed = 100 + (i * 10 + j) as u64;
            check_gallery(seed, kind, [64, 128, 512][(i + j) % 3], 1000, probes);
        }
    }
}

#[test]
fn candidates_are_a_tight_superset_in_a_larger_gallery() {
    check_gallery(200, Kind::Random, 128, 20_000, 3);
    check_gallery(201, Kind::Clustered, 64, 20_000, 40);
    check_gallery(202, Kind::Random, 512, 20_000, 14);
}

#[test]
fn tiles_of_every_width_agree_with_brute_force() {
    // More probes than any path gives to dots, in numbers that leave every remainder.
    for probes in 66..=78 {
        check_gallery(300 + probes as u64, Kind::Random, 64, 333, probes);
    }
}

#[test]
fn the_standard_gallery_leaves_few_candidates() {
    let (dim, count) = (256, 20_000_u32);
    let standard = SyntheticGallery::new(11, dim);
    let mut rows = vec![f16::ZERO; dim * count as usize];
    let mut row = vec![0.0; dim];
    for (i, to) in (0..).zip(rows.chunks_exact_mut(dim)) {
        standard.row(i, &mut row);
        to.iter_mut().zip(&row).for_each(|(to, value)| *to = f16::from_f32(*value));
    }
    let live = vec![u64::MAX; count.div_ceil(64) as usize];
    let codes = OwnedCodes::of(&rows[..rows.len() / dim / BLOCK_ROWS * BLOCK_ROWS * dim], dim);
    let gallery = Gallery { dim, coded: true, blocks: vec![Block { first_row: 0, rows, live, codes }] };
    let probes = 20;
    let mut values = vec![0.0; probes * dim];
    for (i, probe) in (0..).zip(values.chunks_exact_mut(dim)) {
        if i % 2 == 0 { standard.mate(i * 900, 0, probe) } else { standard.stranger(i, probe) }
    }
    let floors = vec![0.5; probes];
    for keep in [0, 10] {
        let keep = vec![keep; probes];
        let request = CandidateRequest {
            probes: &values,
            floors: &floors,
            keep: &keep,
            candidates_max: 100,
            ..CandidateRequest::default()
        };
        for path in paths() {
            let mut candidates = CandidateRows::default();
            let engine = CpuEngine::with_simd(2, path).unwrap();
            engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
            let found: usize = candidates.rows.iter().map(Vec::len).sum();
            let all = values.chunks_exact(dim).flat_map(|probe| gallery.scores(probe));
            let matter = all.filter(|(score, _)| *score >= 0.5).count();
            assert!(matter >= probes / 2, "every mate counts");
            assert!((matter..=matter + 2).contains(&found), "{path}: {found} candidates, {matter} matter");
        }
    }
}

#[test]
fn more_candidates_than_allowed_are_an_overflow_and_as_many_are_not() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let gallery = Gallery::new(&mut rng, Kind::Equal, 64, 5000, 0.0);
    let count = gallery.scores(&vec![0.1; 64]).len();
    for probes in [1, 70] {
        let mut values = gallery.probes(&mut rng, probes);
        // The first probe is the row of the gallery, the last is its opposite.
        values.copy_within(0..64, (probes - 1) * 64);
        if probes > 1 {
            values[(probes - 1) * 64..].iter_mut().for_each(|v| *v = -*v);
        }
        for path in paths() {
            let engine = CpuEngine::with_simd(2, path).unwrap();
            for keep in [0, 10] {
                for (candidates_max, overflows) in [(count, false), (count - 1, true), (20, true), (0, true)] {
                    let request = CandidateRequest {
                        probes: &values,
                        floors: &vec![0.5; probes],
                        keep: &vec![keep; probes],
                        candidates_max,
                        ..CandidateRequest::default()
                    };
                    let mut candidates = CandidateRows::default();
                    engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
                    assert_eq!(candidates.overflowed[0], overflows, "{path}, keep {keep}, {candidates_max} of {count}");
                    if !overflows {
                        assert_eq!(candidates.rows[0].len(), count);
                    }
                    if probes > 1 {
                        assert!(!candidates.overflowed[probes - 1], "the opposite has no candidates");
                        assert!(candidates.rows[probes - 1].is_empty());
                    }
                }
            }
            // What overflowed once leaves no trace in the next request.
            let request = CandidateRequest {
                probes: &values,
                floors: &vec![0.5; probes],
                keep: &vec![0; probes],
                candidates_max: count,
                ..CandidateRequest::default()
            };
            let mut candidates = CandidateRows::default();
            engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
            assert_eq!(candidates.rows[0].len(), count);
        }
    }
}

#[test]
fn only_live_rows_raise_a_floor() {
    // The best hundred rows are dead; the ten best of the living must all be found.
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut gallery = Gallery::new(&mut rng, Kind::Random, 64, 3000, 0.0);
    for probes in [1, 70] {
        let values = gallery.probes(&mut rng, probes);
        let best: Vec<u32> = gallery.scores(&values[..64]).iter().take(100).map(|s| s.1).collect();
        for block in &mut gallery.blocks {
            for row in best.iter().filter_map(|row| row.checked_sub(block.first_row)) {
                if let Some(word) = block.live.get_mut(row as usize / 64) {
                    *word &= !(1 << (row % 64));
                }
            }
        }
        let request = CandidateRequest {
            probes: &values,
            floors: &vec![-1.1; probes],
            keep: &vec![10; probes],
            candidates_max: 3000,
            ..CandidateRequest::default()
        };
        let scores = gallery.scores(&values[..64]);
        for path in paths() {
            let mut candidates = CandidateRows::default();
            CpuEngine::with_simd(2, path).unwrap().find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
            check(&scores, -1.1, 10, 64, &candidates.rows[0], path.as_str());
        }
    }
}
