//! A probe with a filter finds what the filter allows, and costs no more than without.

use roaring::RoaringBitmap;

use super::*;

/// Rows of a gallery that a filter of one in `of` allows.
fn every(gallery: &Gallery, of: usize) -> RoaringBitmap {
    gallery.scores(&vec![0.0; gallery.dim]).iter().map(|(row, _)| *row).step_by(of).collect()
}

#[test]
fn narrow_and_wide_filters_keep_the_best_of_what_they_allow_beside_probes_without_one() {
    let Some(engine) = shared_engine() else { return };
    let (dim, count, seed) = (64, 5000, 1);
    let mut rng = rng(seed);
    let values = unit_vectors(count, dim, &mut rng);
    let mut gallery = Gallery::new(dim, &to_rows(&values), &[1000, 4000]);
    gallery.kill(1, 64);
    engine.follow(&gallery.view()).unwrap();
    let filters = [every(&gallery, 100), every(&gallery, 2), RoaringBitmap::new()];
    let allowed: Vec<Option<&RoaringBitmap>> =
        (0..12).map(|probe| [Some(&filters[0]), None, Some(&filters[1]), Some(&filters[2])][probe % 4]).collect();
    let probes = probes_near(&values, 12, dim, &mut rng);
    for (certificate, (floor, keep)) in
        CERTIFICATES.into_iter().flat_map(|c| [(-1.1, 10), (0.3, 0), (0.3, 10)].map(|asked| (c, asked)))
    {
        let request = CandidateRequest {
            yields: false,
            probes: &probes,
            floors: &[floor; 12],
            keep: &[keep; 12],
            candidates_max: 5000,
            certificate,
            filters: &allowed,
            seeds: &[[1; 32]; 12],
        };
        let mut candidates = CandidateRows::default();
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
        for (number, probe) in probes.chunks_exact(dim).enumerate() {
            let what = format!("seed {seed} probe {number} floor {floor} keep {keep} {certificate:?}");
            let is_allowed = |row: u32| allowed[number].is_none_or(|filter| filter.contains(row));
            let scores: Vec<(u32, f64)> =
                gallery.scores(probe).into_iter().filter(|(row, _)| is_allowed(*row)).collect();
            let mut line = f64::from(floor);
            if keep > 0 && scores.len() >= keep as usize {
                let mut best: Vec<f64> = scores.iter().map(|(_, score)| *score).collect();
                best.sort_by(|a, b| b.total_cmp(a));
                line = line.max(best[keep as usize - 1]);
            }
            let found: BTreeSet<u32> = candidates.rows[number].iter().copied().collect();
            assert!(!candidates.overflowed[number] && found.len() == candidates.rows[number].len(), "{what}");
            assert!(found.iter().all(|row| is_allowed(*row)), "{what}: a row that is not allowed");
            let wanted: Vec<u32> = scores.iter().filter(|(_, score)| *score >= line).map(|(row, _)| *row).collect();
            assert!(wanted.iter().all(|row| found.contains(row)), "{what}: a row is missing");
            let near = scores.iter().filter(|(_, score)| *score >= line - FAR).count();
            assert!(found.len() <= near, "{what}: {} rows where {near} are near the line", found.len());
        }
    }
}

#[test]
fn a_narrow_filter_needs_no_device() {
    let Some(engine) = shared_engine() else { return };
    let (dim, seed) = (64, 2);
    let mut rng = rng(seed);
    let values = unit_vectors(6400, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[6400]);
    engine.follow(&gallery.view()).unwrap();
    let filter = every(&gallery, 100);
    let probe = unit_vectors(1, dim, &mut rng);
    let ask = |filters: &[Option<&RoaringBitmap>]| {
        let mut candidates = CandidateRows::default();
        let request = CandidateRequest {
            yields: false,
            probes: &probe,
            floors: &[-1.1],
            keep: &[10],
            candidates_max: 100,
            certificate: CERTIFICATES[0],
            filters,
            seeds: &[[1; 32]],
        };
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
        candidates
    };
    let all = ask(&[]);
    let narrow = ask(&[Some(&filter)]);
    assert_eq!((narrow.device_time, narrow.certificate), (None, Certificate::Deterministic));
    assert!(matches!(all.certificate, Certificate::Randomised { .. }));
    assert_eq!(narrow.rows[0].len(), 10);
}
