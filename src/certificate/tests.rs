use half::f16;
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use thenar_index::codes::{OwnedCodes, sketch_cosine};
use thenar_index::sketch;

use super::*;

fn unit(rng: &mut SmallRng, dim: usize) -> Vec<f64> {
    let values: Vec<f64> = (0..dim).map(|_| rng.sample(StandardNormal)).collect();
    scaled(&values, 1.0 / dot(&values, &values).sqrt())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn scaled(a: &[f64], factor: f64) -> Vec<f64> {
    a.iter().map(|a| a * factor).collect()
}

/// The part of a orthogonal to the unit vector b, normalised.
fn across(a: &[f64], b: &[f64]) -> Vec<f64> {
    let along = dot(a, b);
    let rest: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - along * b).collect();
    scaled(&rest, 1.0 / dot(&rest, &rest).sqrt())
}

/// tau y + sqrt(1 - tau²) w.
fn at_cosine(tau: f64, y: &[f64], w: &[f64]) -> Vec<f64> {
    let sine = (1.0 - tau * tau).sqrt();
    y.iter().zip(w).map(|(y, w)| tau * y + sine * w).collect()
}

/// How many codes a row has.
const CODES: usize = 4;

/// A stored row and its codes as unit vectors, each with the cosine kept for it.
fn stored(y: &[f64]) -> (Vec<f64>, [(Vec<f64>, f32); CODES]) {
    let dim = y.len();
    let row: Vec<f16> = y.iter().map(|v| f16::from_f64(*v)).collect();
    let mut codes = OwnedCodes::zeroed(dim, 64);
    codes.put(0, &row);
    let bit = |plane: &[u8], i: usize| plane[i / 8 * 64] >> (i % 8) & 1 == 1;
    let sign: Vec<f64> = (0..dim).map(|i| if bit(&codes.sign, i) { -1.0 } else { 1.0 }).collect();
    let two: Vec<f64> = (0..dim).map(|i| sign[i] * if bit(&codes.two, i) { 3.0 } else { 1.0 }).collect();
    let fine: Vec<f64> = (0..dim)
        .map(|i| {
            let byte = codes.fine[i % (dim / 2)];
            f64::from(2 * i32::from(if i < dim / 2 { byte & 15 } else { byte >> 4 }) - 15)
        })
        .collect();
    let bits = |g: usize| (0..sketch::WORD_BITS).map(move |n| g * sketch::WORD_BITS + n);
    let word = |g: usize| bits(g).rev().fold(0, |word, at| word << 1 | usize::from(bit(&codes.sketch, at)));
    let words = (0..sketch::groups(dim)).flat_map(|g| sketch::WORDS[word(g)]).map(f64::from).collect();
    let terms = codes.terms[0];
    let sketch_cosine = sketch_cosine(codes.as_codes().sketch_cosines(dim, 0)[0]);
    let cosines = [sketch_cosine, terms.sign_cosine(), terms.two_cosine(), terms.fine_cosine()];
    let mut cosines = cosines.into_iter();
    let codes = [words, sign, two, fine].map(|c| (scaled(&c, 1.0 / dot(&c, &c).sqrt()), cosines.next().unwrap()));
    (row.iter().map(|v| v.to_f64()).collect(), codes)
}

/// P(z > t) by Simpson's rule: not the bound under test.
fn tail(dim: usize, t: f64) -> f64 {
    let power = (dim as f64 - 4.0) / 2.0;
    let integral = |from: f64, to: f64| {
        let steps = 20_000;
        let width = (to - from) / f64::from(steps);
        let density = |i: i32| (1.0 - (from + width * f64::from(i)).powi(2)).max(0.0).powf(power);
        (0..=steps)
            .map(|i| {
                density(i)
                    * if i == 0 || i == steps {
                        1.0
                    } else if i % 2 == 1 {
                        4.0
                    } else {
                        2.0
                    }
            })
            .sum::<f64>()
            * width
            / 3.0
    };
    integral(t, 1.0) / (2.0 * integral(0.0, 1.0))
}

#[test]
fn quantiles_are_above_the_true_ones_and_near_them() {
    for dim in [32, 64, 128, 256, 512, 1024, 2048] {
        for probability in [1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12, 1e-15] {
            let t = sphere_quantile(dim, probability);
            let found = tail(dim, t);
            assert!(found <= probability, "dim {dim}, {probability:e}: {found:e}");
            // The bound is looser where the tail is fatter.
            let near = if probability > 1e-6 { 0.93 } else { 0.99 };
            assert!(tail(dim, near * t) > probability, "dim {dim}, {probability:e}: t {t} is far too large");
        }
    }
    for (dim, t) in [(512, 0.304), (256, 0.421), (128, 0.571)] {
        assert!((sphere_quantile(dim, 1e-12) - t).abs() < 0.002, "dim {dim}: {}", sphere_quantile(dim, 1e-12));
    }
}

#[test]
fn dithered_bars_spend_what_they_claim() {
    // The worst errors of mean zero within a step: half a step up or down, by chance.
    for (dim, errors) in [(32, 4), (64, 22), (128, 16), (256, 86), (512, 64), (512, 171), (2048, 1024)] {
        for probability in [1e-3, 1e-6, 1e-9, 1e-12] {
            let cutter = Cutter::dithered(Certificate::Randomised { miss_probability: probability }, dim);
            let (usual, most) = (0.75_f32, 0.8_f32);
            let step = f64::from(cutter.dither_step(errors, usual, most).expect("a step"));
            // Of the longest k that rows and floors may have it is the shortest that counts.
            let k = 0.8 * (1.0 - 0.75 * f64::from(most)) / (1.0 - 0.75_f64 * 0.75).sqrt();
            let missed = |step: f64| {
                let mut share = 0.5_f64.powi(errors as i32);
                let mut sum = 0.0;
                for up in 0..=errors {
                    let off = step * (up as f64 - errors as f64 / 2.0);
                    if share > 1e-30 {
                        sum += share * tail(dim, (cutter.spread - off / k).max(-1.0));
                    }
                    share *= (errors - up) as f64 / (up + 1) as f64;
                }
                sum
            };
            let what = format!("dim {dim}, {errors} errors, {probability:e}");
            assert!(missed(step) <= probability, "{what}: {:e}", missed(step));
            // Where what is certified is bounded by (4), not by how far all errors together can go.
            if probability < 1e-6 && errors < 1000 {
                assert!(missed(step) >= 0.8 * probability, "{what}: {:e}", missed(step));
                assert!(missed(1.2 * step) > probability, "{what}: {:e}", missed(1.2 * step));
            }
        }
    }
    let cutter = Cutter::dithered(Certificate::Deterministic, 512);
    assert_eq!(cutter.dither_step(64, 0.75, 0.8), None, "what may not miss may not leave it to chance");
}

#[test]
fn dithered_bars_are_those_of_low_floors() {
    let certificate = Certificate::Randomised { miss_probability: 1e-12 };
    let (cutter, half) =
        (Cutter::dithered(certificate, 512), Cutter::new(Certificate::Randomised { miss_probability: 0.5e-12 }, 512));
    assert_eq!(cutter.cut(0.5), half.cut(0.5), "half of the probability is for the dither");
    assert_eq!(cutter.dithered_cut(0.5), cutter.cut(0.5));
    assert_eq!(cutter.dithered_cut(0.9), cutter.cut(DITHERED_FLOOR_MAX));
    assert_eq!(cutter.dithered_cut(f64::NAN), None);
    assert_eq!(cutter.dithered_cut(0.0), None);
}

#[test]
fn bars_rise_with_the_floor_and_with_the_cosine() {
    for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
        let cutter = Cutter::new(certificate, 512);
        let bar = |floor: f64, cosine: f32| cutter.cut(floor).unwrap().bar(cutter.leaning(cosine));
        for i in 3..99 {
            for j in 50..99 {
                let (floor, cosine) = (f64::from(i) / 100.0, j as f32 / 100.0);
                assert!(bar(floor, cosine) < bar(floor + 0.01, cosine), "{certificate:?} {floor} {cosine}");
                assert!(bar(floor, cosine) < bar(floor, cosine + 0.01), "{certificate:?} {floor} {cosine}");
            }
        }
        assert_eq!(cutter.cut(0.0), None, "orthogonal vectors certify nothing");
        assert_eq!(cutter.cut(-0.5), None);
        assert_eq!(cutter.cut(f64::NAN), None);
        assert!(cutter.cut(1.5).is_some(), "a floor nobody reaches is a floor");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The probe that lies as far from the code as a probe of that score can: the bar is below it,
    /// by little. A bar that were any higher would fail here.
    #[test]
    fn no_deterministic_bar_is_above_the_worst_probe_and_none_is_far_below(
        seed in any::<u64>(),
        size in 1_usize..=32,
        tau in 0.05_f64..0.99,
        flat in any::<bool>(),
    ) {
        let dim = 32 * size;
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut y = unit(&mut rng, dim);
        if flat {
            // A row that codes cannot follow: one component holds nearly all of it.
            y[dim / 3] = 20.0;
            y = scaled(&y, 1.0 / dot(&y, &y).sqrt());
        }
        let (row, codes) = stored(&y);
        let length = dot(&row, &row).sqrt();
        let direction = scaled(&row, 1.0 / length);
        let cutter = Cutter::new(Certificate::Deterministic, dim);
        for (nth, (u, cosine)) in codes.into_iter().enumerate() {
            let away = scaled(&across(&u, &direction), -1.0);
            let worst = at_cosine(tau, &direction, &away);
            let score = dot(&worst, &row);
            let reach = dot(&worst, &u);
            let bar = f64::from(cutter.cut(score).unwrap().bar(cutter.leaning(cosine)));
            prop_assert!(bar <= reach, "tau {tau}: bar {bar}, reach {reach}");
            // A sketch's cosine, the first, is within two parts of 256, and near a score of 1 a
            // thousandth of the length is as much again.
            let near = if nth == 0 { 0.02 } else { 0.01 };
            prop_assert!(reach - bar < near, "tau {tau}: bar {bar}, reach {reach}");
        }
    }

    #[test]
    fn no_probe_of_any_score_is_below_its_deterministic_bar(seed in any::<u64>(), size in 1_usize..=16) {
        let dim = 32 * size;
        let mut rng = SmallRng::seed_from_u64(seed);
        let (row, codes) = stored(&unit(&mut rng, dim));
        let cutter = Cutter::new(Certificate::Deterministic, dim);
        for _ in 0..32 {
            let noise = unit(&mut rng, dim);
            let strength = rng.random_range(0.0..2.0);
            let mixed: Vec<f64> = row.iter().zip(&noise).map(|(x, n)| x + strength * n).collect();
            let probe = scaled(&mixed, 1.0 / dot(&mixed, &mixed).sqrt());
            for (u, cosine) in &codes {
                if let Some(cut) = cutter.cut(dot(&probe, &row)) {
                    prop_assert!(f64::from(cut.bar(cutter.leaning(*cosine))) <= dot(&probe, u));
                }
            }
        }
    }
}

/// Misses among `pairs` mated pairs of exactly the floor's score, for each code.
fn misses(dim: usize, tau: f64, probability: f64, pairs: u64) -> [u64; CODES] {
    const PROBES_A_ROW: u64 = 4096;
    let cutter = Cutter::new(Certificate::Randomised { miss_probability: probability }, dim);
    (0..pairs / PROBES_A_ROW)
        .into_par_iter()
        .map(|nth| {
            let mut rng = SmallRng::seed_from_u64(nth);
            let y = unit(&mut rng, dim);
            let (row, codes) = stored(&y);
            let bars = codes.each_ref().map(|(_, cosine)| cutter.leaning(*cosine));
            let mut missed = [0; CODES];
            let mut w = vec![0.0_f32; dim];
            let y32: Vec<f32> = y.iter().map(|v| *v as f32).collect();
            let dot32 = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let row: Vec<f32> = row.iter().map(|v| *v as f32).collect();
            let units = codes.each_ref().map(|(u, _)| u.iter().map(|v| *v as f32).collect::<Vec<f32>>());
            let (cosine, sine) = (tau as f32, (1.0 - tau * tau).sqrt() as f32);
            for _ in 0..PROBES_A_ROW {
                w.iter_mut().for_each(|w| *w = rng.sample(StandardNormal));
                let along = dot32(&w, &y32);
                w.iter_mut().zip(&y32).for_each(|(w, y)| *w -= along * y);
                let scale = sine / dot32(&w, &w).sqrt();
                w.iter_mut().zip(&y32).for_each(|(w, y)| *w = *w * scale + cosine * y);
                // The score that the server would find for this probe is the floor to hold.
                let cut = cutter.cut(f64::from(dot32(&w, &row))).unwrap();
                for i in 0..CODES {
                    missed[i] += u64::from(dot32(&w, &units[i]) < cut.bar(bars[i]));
                }
            }
            missed
        })
        .reduce(|| [0; CODES], |a, b| std::array::from_fn(|i| a[i] + b[i]))
}

#[test]
fn randomised_misses_are_no_more_than_claimed_and_not_far_fewer() {
    // Over 10^8 pairs of each code. Means and three deviations of a Poisson count: a claim that were too
    // small by a tenth would be caught, and so would a bar that never misses.
    const PAIRS: u64 = 26 << 20;
    for (dim, tau, probability) in [(32, 0.5, 1e-3), (32, 0.8, 1e-4), (64, 0.35, 1e-3), (64, 0.6, 1e-4)] {
        let claimed = PAIRS as f64 * probability;
        // The slack for a row's rounding is a large part of the little that a fine code leaves open.
        for (missed, share) in misses(dim, tau, probability, PAIRS).into_iter().zip([0.5, 0.5, 0.5, 0.02]) {
            let what = format!("dim {dim}, tau {tau}: {missed} missed of {PAIRS}, claimed {claimed}");
            assert!(missed as f64 <= claimed + 3.0 * claimed.sqrt(), "{what}");
            assert!(missed as f64 >= share * claimed, "{what}");
        }
    }
}

#[test]
fn a_miss_probability_has_its_range() {
    for good in [1e-6, 1e-12, 1e-15] {
        assert_eq!(Certificate::randomised(good).unwrap().miss_probability(), good);
    }
    for bad in [0.0, -1e-12, 1e-5, 1e-16, f64::NAN] {
        let error = Certificate::randomised(bad).unwrap_err().to_string();
        assert!(error.contains("miss_probability") && error.contains("1e-15"), "{error}");
    }
    assert_eq!(Certificate::Deterministic.miss_probability(), 0.0);
}
