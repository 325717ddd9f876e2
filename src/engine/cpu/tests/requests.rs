//! Requests with filters, and requests that yield.

use super::*;

#[test]
fn a_filter_lets_through_what_it_holds_and_nothing_else() {
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for dim in [64, 160] {
        let gallery = Gallery::new(&mut rng, Kind::Clustered, dim, 3000, 0.1);
        let view = gallery.view();
        let values = gallery.probes(&mut rng, 40);
        let probes = values.len() / dim;
        let all: Vec<u32> = gallery.scores(&values[..dim]).into_iter().map(|(_, row)| row).collect();
        // None, nearly none, one in a hundred, one in three, all.
        let filters: Vec<Option<RoaringBitmap>> = (0..probes)
            .map(|p| match p % 5 {
                0 => None,
                1 => Some(RoaringBitmap::new()),
                2 => Some(all.iter().copied().filter(|_| rng.random_bool(0.01)).collect()),
                3 => Some(all.iter().copied().filter(|_| rng.random_bool(0.3)).collect()),
                _ => Some(all.iter().copied().collect()),
            })
            .collect();
        let filters: Vec<Option<&RoaringBitmap>> = filters.iter().map(Option::as_ref).collect();
        for (floor, keep) in [(0.4, 0), (-2.0, 10), (0.2, 5)] {
            let request = CandidateRequest {
                probes: &values,
                floors: &vec![floor; probes],
                keep: &vec![keep; probes],
                candidates_max: 4000,
                filters: &filters,
                ..CandidateRequest::default()
            };
            for path in paths() {
                let mut candidates = CandidateRows::default();
                CpuEngine::with_simd(2, path).unwrap().find_candidates(&view, &request, &mut candidates).unwrap();
                for (probe, filter) in filters.iter().enumerate() {
                    let what = format!("{path}, dim {dim}, floor {floor}, keep {keep}, probe {probe}");
                    let mut wanted = gallery.scores(&values[probe * dim..(probe + 1) * dim]);
                    wanted.retain(|(_, row)| filter.is_none_or(|filter| filter.contains(*row)));
                    check_held(&wanted, floor, keep, candidates.floors[probe], &candidates.rows[probe], &what);
                    let kth =
                        if keep > 0 && wanted.len() >= keep as usize { wanted[keep as usize - 1].0 } else { -3.0 };
                    wanted.retain(|(score, _)| *score >= f64::from(floor) && *score >= kth);
                    let found = &candidates.rows[probe];
                    assert!(!candidates.overflowed[probe], "{what}");
                    for (score, row) in &wanted {
                        assert!(found.contains(row), "{what}: row {row} of score {score} is missing");
                    }
                    if let Some(filter) = filter {
                        assert!(found.iter().all(|row| filter.contains(*row)), "{what}: a row that is filtered out");
                    }
                }
            }
        }
    }
}

/// The thread of the pool is never free while yielding requests follow each other, each taking many times as
/// long as the others. If the others waited for one to end, they would take as long.
#[test]
fn a_yielding_request_lets_those_of_other_threads_go_first_and_finds_what_any_request_does() {
    const OTHERS: usize = 15;
    let (dim, many, few) = (32, 128, 5);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let gallery = Gallery::new(&mut rng, Kind::Random, dim, 30_000, 0.0);
    let view = gallery.view();
    let values = gallery.probes(&mut rng, many);
    let scores: Vec<Vec<(f64, u32)>> = values.chunks_exact(dim).take(few).map(|probe| gallery.scores(probe)).collect();
    let (floors, keep) = (vec![-1.1; many], vec![7; many]);
    let request = |probes: usize| CandidateRequest {
        probes: &values[..probes * dim],
        floors: &floors[..probes],
        keep: &keep[..probes],
        candidates_max: 1000,
        ..CandidateRequest::default()
    };
    assert!(few * dim * 30_000 > ALONE_PRODUCTS, "it needs the pool");
    let engine = CpuEngine::new(1).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let (mut aside, mut others) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (mut candidates, mut took) = (CandidateRows::default(), Vec::new());
            while !done.load(Ordering::Relaxed) {
                let begun = std::time::Instant::now();
                let request = CandidateRequest { yields: true, ..request(many) };
                engine.find_candidates(&view, &request, &mut candidates).unwrap();
                took.push(begun.elapsed());
                for (probe, scores) in scores.iter().enumerate() {
                    check(scores, -1.1, 7, dim, &candidates.rows[probe], "aside");
                }
            }
            took
        });
        let mut candidates = CandidateRows::default();
        for _ in 0..OTHERS {
            let begun = std::time::Instant::now();
            engine.find_candidates(&view, &request(few), &mut candidates).unwrap();
            others.push(begun.elapsed());
            for (probe, scores) in scores.iter().enumerate() {
                check(scores, -1.1, 7, dim, &candidates.rows[probe], "meanwhile");
            }
        }
        done.store(true, Ordering::Relaxed);
        aside = thread.join().unwrap();
    });
    aside.sort_unstable();
    others.sort_unstable();
    let (aside, other) = (aside[aside.len() / 2], others[OTHERS / 2]);
    assert!(other < aside / 3, "{other:?} beside requests of {aside:?}");
}
