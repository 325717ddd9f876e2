use half::f16;
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use thenar_index::codebook;
use thenar_index::codes::{OwnedCodes, codebook_cosine};

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
    let sign: Vec<f64> = (0..dim).map(|i| if bit(&codes.one_bit, i) { -1.0 } else { 1.0 }).collect();
    let two: Vec<f64> = (0..dim).map(|i| sign[i] * if bit(&codes.two_bit, i) { 3.0 } else { 1.0 }).collect();
    let fine: Vec<f64> = (0..dim)
        .map(|i| {
            let byte = codes.four_bit[i % (dim / 2)];
            f64::from(2 * i32::from(if i < dim / 2 { byte & 15 } else { byte >> 4 }) - 15)
        })
        .collect();
    let bits = |g: usize| (0..codebook::CODEWORD_BITS).map(move |n| g * codebook::CODEWORD_BITS + n);
    let word = |g: usize| bits(g).rev().fold(0, |word, at| word << 1 | usize::from(bit(&codes.codebook, at)));
    let words = (0..codebook::groups(dim)).flat_map(|g| codebook::CODEWORDS[word(g)]).map(f64::from).collect();
    let factors = codes.factors[0];
    let codebook_cosine = codebook_cosine(codes.as_codes().codebook_cosines(dim, 0)[0]);
    let cosines = [codebook_cosine, factors.one_bit_cosine(), factors.two_bit_cosine(), factors.four_bit_cosine()];
    let mut cosines = cosines.into_iter();
    let codes = [words, sign, two, fine].map(|c| (scaled(&c, 1.0 / dot(&c, &c).sqrt()), cosines.next().unwrap()));
    (row.iter().map(|v| v.to_f64()).collect(), codes)
}

/// P(z > t) for t from -1 to 1 by Simpson's rule: not the bound under test.
fn tails(dim: usize) -> impl Fn(f64) -> f64 {
    const STEPS: usize = 50_000;
    const WIDTH: f64 = 2.0 / STEPS as f64;
    let power = (dim as f64 - 4.0) / 2.0;
    // From the top down, so that small numbers are added to small ones.
    let density = |steps: f64| (1.0 - (1.0 - WIDTH * steps).powi(2)).max(0.0).powf(power);
    let parts = (0..STEPS).map(|i| i as f64).map(|i| density(i) + 4.0 * density(i + 0.5) + density(i + 1.0));
    let sums = parts.scan(0.0, |sum, part| {
        *sum += part;
        Some(*sum)
    });
    let sums: Vec<f64> = std::iter::once(0.0).chain(sums).collect();
    move |t| {
        let at = ((1.0 - t) / WIDTH).clamp(0.0, STEPS as f64);
        let (i, part) = (at as usize, at.fract());
        let (below, above) = (sums[i], sums[(i + 1).min(STEPS)]);
        // Tails fall about exponentially.
        let sum = if below > 0.0 { below * (above / below).powf(part) } else { above * part };
        sum / sums[STEPS]
    }
}

#[test]
fn quantiles_are_above_the_true_ones_and_near_them() {
    for dim in [32, 64, 128, 256, 512, 1024, 2048] {
        let tail = tails(dim);
        for probability in [1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12, 1e-15] {
            let t = sphere_quantile(dim, probability);
            let found = tail(t);
            assert!(found <= probability, "dim {dim}, {probability:e}: {found:e}");
            // The bound is looser where the tail is fatter.
            let near = if probability > 1e-6 { 0.93 } else { 0.99 };
            assert!(tail(near * t) > probability, "dim {dim}, {probability:e}: t {t} is far too large");
        }
    }
    for (dim, t) in [(512, 0.304), (256, 0.421), (128, 0.571)] {
        assert!((sphere_quantile(dim, 1e-12) - t).abs() < 0.002, "dim {dim}: {}", sphere_quantile(dim, 1e-12));
    }
}

/// Cells of a step in which the law of a sum of errors is computed.
const CELLS: usize = 16;

/// The law of the sum of `errors` independent numbers, each uniform from -1/2 to 1/2, in cells: of the
/// n-th, the middle, and the probability.
fn sum_of_uniform(errors: usize) -> Vec<(f64, f64)> {
    let mut law = vec![1.0_f64];
    for _ in 0..errors {
        // Each error adds one of `CELLS` cells. Sums of small numbers alone, so that none is lost.
        let wider = law.len() + CELLS - 1;
        let window = |n: usize| &law[n.saturating_sub(CELLS - 1).min(law.len())..(n + 1).min(law.len())];
        law = (0..wider).map(|n| window(n).iter().sum::<f64>() / CELLS as f64).collect();
    }
    let middle = (law.len() - 1) as f64 / 2.0;
    law.into_iter().enumerate().map(|(n, share)| ((n as f64 - middle) / CELLS as f64, share)).collect()
}

/// The law of the sum of `errors` independent numbers, each half a step up or down by the toss of a
/// coin: that of a dither that is not taken off, if all fractions are one half.
fn sum_of_tosses(errors: usize) -> Vec<(f64, f64)> {
    let mut share = 0.5_f64.powi(errors as i32);
    let next = |up: usize| {
        let this = (up as f64 - errors as f64 / 2.0, share);
        share *= (errors - up) as f64 / (up + 1) as f64;
        this
    };
    (0..=errors).map(next).collect()
}

#[test]
fn dithered_bounds_spend_what_they_claim() {
    for (dim, errors) in [(32, 4), (64, 22), (128, 16), (256, 86), (512, 64), (512, 171), (2048, 1024)] {
        let tail = tails(dim);
        let (uniform, tosses) = (sum_of_uniform(errors), sum_of_tosses(errors));
        for probability in [1e-3, 1e-6, 1e-9, 1e-12] {
            let bounds = Bounds::dithered(Certificate::Randomised { miss_probability: probability }, dim);
            let (usual, max) = (0.75_f32, 0.8_f32);
            let step = f64::from(bounds.dither_step(errors, usual, max).expect("a step"));
            // Of the longest k that rows and floors may have it is the shortest that counts.
            let k = 0.8 * (1.0 - 0.75 * f64::from(max)) / (1.0 - 0.75_f64 * 0.75).sqrt();
            let missed = |step: f64, law: &[(f64, f64)]| {
                // What lies beyond has less than 1e-25 of the law, and could not miss more.
                let likely = law.iter().filter(|(_, share)| *share > 1e-30);
                likely.map(|(off, share)| share * tail(bounds.spread - step * off / k)).sum::<f64>()
            };
            let what = format!("dim {dim}, {errors} errors, {probability:e}");
            let spent = missed(step, &uniform) / probability;
            assert!(spent <= 1.0, "{what}: {spent}");
            // Where what is certified is bounded by (4), not by how far all errors together can go.
            if probability < 1e-6 && errors < 1000 {
                assert!(spent >= 0.93, "{what}: {spent}");
                let coarser = missed(1.2 * step, &uniform) / probability;
                assert!(coarser > 1.0, "{what}: {coarser} at a larger step");
                let tossed = missed(step, &tosses) / probability;
                assert!(tossed > 1.2, "{what}: {tossed} if the dither were not taken off");
            }
        }
    }
    let bounds = Bounds::dithered(Certificate::Deterministic, 512);
    assert_eq!(bounds.dither_step(64, 0.75, 0.8), None, "what may not miss may not leave it to chance");
}

#[test]
fn dithered_bounds_are_those_of_low_floors() {
    let certificate = Certificate::Randomised { miss_probability: 1e-12 };
    let (bounds, rest) = (
        Bounds::dithered(certificate, 512),
        Bounds::new(Certificate::Randomised { miss_probability: 1e-12 / DITHER_FACTOR }, 512),
    );
    assert_eq!(bounds.bound(0.5), rest.bound(0.5), "some of the probability is for the dither");
    assert_eq!(bounds.dithered_bound(0.5), bounds.bound(0.5));
    assert_eq!(bounds.dithered_bound(0.9), bounds.bound(DITHERED_FLOOR_MAX));
    assert_eq!(bounds.dithered_bound(f64::NAN), None);
    assert_eq!(bounds.dithered_bound(0.0), None);
}

#[test]
fn bounds_rise_with_the_floor_and_with_the_cosine() {
    for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
        let bounds = Bounds::new(certificate, 512);
        let least = |floor: f64, cosine: f32| bounds.bound(floor).unwrap().least_product(bounds.angle(cosine));
        for i in 3..99 {
            for j in 50..99 {
                let (floor, cosine) = (f64::from(i) / 100.0, j as f32 / 100.0);
                assert!(least(floor, cosine) < least(floor + 0.01, cosine), "{certificate:?} {floor} {cosine}");
                assert!(least(floor, cosine) < least(floor, cosine + 0.01), "{certificate:?} {floor} {cosine}");
            }
        }
        assert_eq!(bounds.bound(0.0), None, "orthogonal vectors certify nothing");
        assert_eq!(bounds.bound(-0.5), None);
        assert_eq!(bounds.bound(f64::NAN), None);
        assert!(bounds.bound(1.5).is_some(), "a floor nobody reaches is a floor");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The probe that lies as far from the code as a probe of that score can: the bound is below it,
    /// by little. A bound that was any higher would fail here.
    #[test]
    fn no_deterministic_bound_is_above_the_worst_probe_and_none_is_far_below(
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
        let bounds = Bounds::new(Certificate::Deterministic, dim);
        for (nth, (u, cosine)) in codes.into_iter().enumerate() {
            let away = scaled(&across(&u, &direction), -1.0);
            let worst = at_cosine(tau, &direction, &away);
            let score = dot(&worst, &row);
            let reach = dot(&worst, &u);
            let least = f64::from(bounds.bound(score).unwrap().least_product(bounds.angle(cosine)));
            prop_assert!(least <= reach, "tau {tau}: bound {least}, reach {reach}");
            // A codebook code's cosine, the first, is within two parts of 256, and near a score of 1 a
            // thousandth of the length is as much again.
            let near = if nth == 0 { 0.02 } else { 0.01 };
            prop_assert!(reach - least < near, "tau {tau}: bound {least}, reach {reach}");
        }
    }

    #[test]
    fn no_probe_of_any_score_is_below_its_deterministic_bound(seed in any::<u64>(), size in 1_usize..=16) {
        let dim = 32 * size;
        let mut rng = SmallRng::seed_from_u64(seed);
        let (row, codes) = stored(&unit(&mut rng, dim));
        let bounds = Bounds::new(Certificate::Deterministic, dim);
        for _ in 0..32 {
            let noise = unit(&mut rng, dim);
            let strength = rng.random_range(0.0..2.0);
            let mixed: Vec<f64> = row.iter().zip(&noise).map(|(x, n)| x + strength * n).collect();
            let probe = scaled(&mixed, 1.0 / dot(&mixed, &mixed).sqrt());
            for (u, cosine) in &codes {
                if let Some(bound) = bounds.bound(dot(&probe, &row)) {
                    prop_assert!(f64::from(bound.least_product(bounds.angle(*cosine))) <= dot(&probe, u));
                }
            }
        }
    }
}

/// Misses among `pairs` mated pairs of exactly the floor's score, for each code.
fn misses(dim: usize, tau: f64, probability: f64, pairs: u64) -> [u64; CODES] {
    const PROBES_A_ROW: u64 = 4096;
    let bounds = Bounds::new(Certificate::Randomised { miss_probability: probability }, dim);
    (0..pairs / PROBES_A_ROW)
        .into_par_iter()
        .map(|nth| {
            let mut rng = SmallRng::seed_from_u64(nth);
            let y = unit(&mut rng, dim);
            let (row, codes) = stored(&y);
            let angles = codes.each_ref().map(|(_, cosine)| bounds.angle(*cosine));
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
                let bound = bounds.bound(f64::from(dot32(&w, &row))).unwrap();
                for i in 0..CODES {
                    missed[i] += u64::from(dot32(&w, &units[i]) < bound.least_product(angles[i]));
                }
            }
            missed
        })
        .reduce(|| [0; CODES], |a, b| std::array::from_fn(|i| a[i] + b[i]))
}

#[test]
fn randomised_misses_are_no_more_than_claimed_and_not_far_fewer() {
    // Over 10^8 pairs of each code. Means and three deviations of a Poisson count: a claim that were too
    // small by a tenth would be caught, and so would a bound that never misses.
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
