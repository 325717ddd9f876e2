//! 4-bit codes bound the cosine from above, on every path.

use super::*;

#[test]
fn four_bit_codes_bound_the_cosine_from_above_and_closely_on_every_path() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        for dim in DIMS {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            let (rows, codes) = coded(&mut rng, dim, 2);
            let codes = codes.as_codes();
            let probes: Vec<f32> = (0..5).flat_map(|_| unit(&mut rng, dim)).collect();
            for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
                let prefilter =
                    Prefilter::new(kernels, dim, &probes, std::iter::repeat_n(Seed::default(), 5), certificate);
                let floor_bounds: Vec<FloorBounds> =
                    [0.05, 0.1, 0.2, 0.3].into_iter().map(|floor| prefilter.floor_bounds(floor)).collect();
                let floor_bounds =
                    [&floor_bounds[..], &[FloorBounds { floor: 0.0, bound: None, dithered: None }]].concat();
                let all = (0..codes.rows()).flat_map(|row| (0..5).map(move |probe| Hit::new(probe, row)));
                let mut hits: Vec<Hit> = all.collect();
                let refine_probes = floor_bounds
                    .iter()
                    .enumerate()
                    .map(|(p, floor_bounds)| RefineProbe::new(prefilter.quantised(p), floor_bounds.bound));
                let refine_probes: Vec<RefineProbe<'_>> = refine_probes.collect();
                let passed = prefilter.refine_hits(&mut hits, &codes, &refine_probes, &prefilter.bounds);
                let passed: std::collections::HashSet<(usize, usize)> =
                    hits[..passed].iter().map(|hit| (hit.probe(), hit.row())).collect();
                for (probe, row) in (0..5).flat_map(|probe| (0..codes.rows()).map(move |row| (probe, row))) {
                    let what = format!("{path} dim {dim} probe {probe} row {row}");
                    let zero = rows[row * dim..(row + 1) * dim].iter().all(|v| v.to_f32() == 0.0);
                    let Some(bound) = floor_bounds[probe].bound else {
                        assert!(passed.contains(&(probe, row)), "{what}");
                        continue;
                    };
                    // It reaches no floor that has a bound.
                    if zero {
                        continue;
                    }
                    let code = &codes.four_bit[row * dim / 2..(row + 1) * dim / 2];
                    let integer = |i: usize| {
                        let byte = code[i % (dim / 2)];
                        f64::from(2 * i32::from(if i < dim / 2 { byte & 15 } else { byte >> 4 }) - 15)
                    };
                    let norm = (0..dim).map(|i| integer(i).powi(2)).sum::<f64>().sqrt();
                    let exact = (0..dim).map(|i| integer(i) * f64::from(prefilter.probe(probe)[i])).sum::<f64>() / norm;
                    let least =
                        f64::from(bound.least_product(prefilter.bounds.angle(codes.factors[row].four_bit_cosine())));
                    let error = prefilter.quantised(probe).error();
                    if exact >= least + 1e-6 {
                        assert!(passed.contains(&(probe, row)), "{what}: {exact} reaches {least}");
                    } else if exact + 2.0 * error + 1e-6 < least {
                        assert!(!passed.contains(&(probe, row)), "{what}: {exact} is far from {least}");
                    }
                }
            }
        }
    }
}
