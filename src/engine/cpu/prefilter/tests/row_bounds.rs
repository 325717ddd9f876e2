//! The bounds of rows on every path, and the largest deficits that follow from them.

use super::*;

#[test]
fn row_bounds_are_the_same_on_every_path_but_for_the_last_unit() {
    for dim in DIMS {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let (_, codes) = coded(&mut rng, dim, 1);
        let codes = codes.as_codes();
        for level in Level::ALL {
            let scale = Scale::new(level, dim);
            let (along, length, always_pass) = row_bounds_of(CodeKernels::of(Simd::Portable), &scale, level, &codes, 0);
            for r in 0..BLOCK_ROWS {
                let (cosine, norm) = cosine_and_norm(&codes, level, dim, r);
                let always_passes = cosine < f64::from(scale.reference) || norm < f64::from(scale.length_base) - 1e-4;
                assert_eq!(always_pass >> r & 1 == 1, always_passes, "dim {dim} {level:?} row {r}");
                let above = cosine.min(scale.max.into()) - f64::from(scale.reference);
                let exact = (norm * above / f64::from(scale.along_unit)).max(0.0);
                let found = f64::from(along.0[r]);
                assert!(found <= exact * (1.0 + 1e-6), "dim {dim} {level:?} row {r}: {found} of {exact}");
                assert!(found >= exact.min(65_535.0) - 2.0, "dim {dim} {level:?} row {r}: {found} of {exact}");
            }
            assert_ne!(always_pass, 0, "an axis is far from its code");
            for path in paths() {
                let (other_along, other_length, other_always_pass) =
                    row_bounds_of(CodeKernels::of(path), &scale, level, &codes, 0);
                assert_eq!(other_always_pass, always_pass, "{path}");
                for r in 0..BLOCK_ROWS {
                    let at = place(path, r);
                    assert!(along.0[r].abs_diff(other_along.0[at]) <= 1, "{path} dim {dim} {level:?} row {r}");
                    assert!(length.0[r].abs_diff(other_length.0[at]) <= 1, "{path} dim {dim} {level:?} row {r}");
                }
            }
        }
    }
}

#[test]
fn the_largest_deficit_is_never_below_the_bound_and_close_above_it() {
    for dim in DIMS {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let (_, codes) = coded(&mut rng, dim, 2);
        let codes = codes.as_codes();
        let mut counted = 0;
        for (path, level) in paths().flat_map(|path| Level::ALL.map(|level| (path, level))) {
            let kernels = CodeKernels::of(path);
            for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
                let bounds = Bounds::dithered(certificate, dim);
                let scale = Scale::new(level, dim);
                for (block, floor) in [0.25, 0.6].into_iter().enumerate() {
                    let bound = bounds.bound(floor).unwrap();
                    let tables = Tables::new(kernels, level, &unit(&mut rng, dim), None, &mut rng);
                    let most = MaxDeficit::new(&scale, &bounds, Some(bound), (tables.offset, tables.step));
                    let (along, length, always_pass) = row_bounds_of(kernels, &scale, level, &codes, block);
                    for r in (0..BLOCK_ROWS).filter(|r| always_pass >> r & 1 == 0) {
                        let (cosine, n) = cosine_and_norm(&codes, level, dim, block * BLOCK_ROWS + r);
                        let x = (cosine - f64::from(bounds.loss())).max(0.0);
                        let (a, b, slack) = bound.parts();
                        let least = f64::from(a) * x - f64::from(b) * (1.0 - x * x).max(0.0).sqrt() - f64::from(slack);
                        let exact = (f64::from(tables.offset) - n * least) / f64::from(tables.step);
                        let at = place(path, r);
                        let found = f64::from(most.of(along.0[at], length.0[at]));
                        let what = format!("{path} dim {dim} {level:?} floor {floor} row {r}: {found}, {exact}");
                        assert!(found >= exact.min(65_535.0), "{what}");
                        // Usual rows of many components lose a few steps, and a hundredth of the code's
                        // length where their cosine is a tenth off.
                        if dim == 512 && ![5, 7, 9, 11].contains(&(r % 16)) && exact < 65_000.0 {
                            counted += 1;
                            let lost = (x - 0.86).abs().min(0.1) / 10.0 * n / f64::from(tables.step);
                            assert!(found <= exact + 4.0 + lost, "{what}");
                        }
                    }
                }
            }
        }
        assert!(dim != 512 || counted > 0);
    }
}
