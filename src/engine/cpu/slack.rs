//! How far a sifting kernel's number can be from the exact score, proved and rounded up.
//!
//! Notation: x is a stored row (f16), q a rotated probe (f32), n the dimension, s = <x, q> over
//! the reals, e the exact score ([`crate::search::score::exact`]), a the number of an f32 kernel.
//! Precondition of every bound: ‖x‖ <= 1 + 2^-10 and ‖q‖ <= 1 + 2^-20. The rotation sees to the second
//! ([`LENGTH_ERROR_MAX`]), and an image of that length, rounded to f16, has the first (relative error
//! 2^-11 a component and 2^-25 below the normal range).

use crate::model::LENGTH_ERROR_MAX;

/// Largest norm of a stored row.
const ROW_NORM_MAX: f64 = 1.0 + 1.0 / 1024.0;
/// Largest norm of a rotated probe.
const PROBE_NORM_MAX: f64 = 1.0 + LENGTH_ERROR_MAX;
/// Unit roundoff of f32 and f64: half an ulp of 1.
const F32_ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;
const F64_ROUNDOFF: f64 = f64::EPSILON / 2.0;
/// Unit roundoff of bf16, which has 8 significant bits.
const BF16_ROUNDOFF: f64 = 1.0 / 256.0;

/// gamma_n = n u / (1 - n u): n roundings with unit roundoff u multiply a term by at most
/// 1 + gamma_n (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1).
fn gamma(n: usize, roundoff: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a dimension is small")]
    let nu = n as f64 * roundoff;
    nu / (1.0 - nu)
}

/// A bound on |a - e| for an f32 sum in any order, with or without fused multiply-add.
///
/// Whatever the order, a term x_i q_i meets at most n roundings on its way to the result: one of
/// its product (none if fused) and one at each of at most n - 1 additions. So (Higham, section
/// 3.1) |a - s| <= gamma_n(2^-24) * sum |x_i q_i|, and by Cauchy-Schwarz the sum is at most
/// ‖x‖ ‖q‖. Products below f32's normal range lose at most 2^-150 each instead, additions there
/// are exact. In the same way |e - s| <= gamma_n(2^-53) ‖x‖ ‖q‖; in f64 nothing underflows.
///
/// So a row with e >= floor has a >= floor - slack: 3.1e-5 at n = 512.
#[must_use]
pub fn sift_slack(dim: usize) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "a dimension is small")]
    let underflow = dim as f64 * f64::from(f32::from_bits(1));
    rounded_up((gamma(dim, F32_ROUNDOFF) + gamma(dim, F64_ROUNDOFF)) * ROW_NORM_MAX * PROBE_NORM_MAX + underflow)
}

/// A bound on |b - e| for the number b of a bf16 kernel: rows and probe rounded to the nearest
/// bf16 (x', q'), products accumulated in f32. `probe_error` is ‖q' - q‖ of this probe.
///
/// s' - s = <x' - x, q'> + <x, q' - q>, so |s' - s| <= 2^-8 ‖x‖ ‖q'‖ + ‖x‖ ‖q' - q‖: every
/// component of a row that is not zero is at least 2^-24, a normal bf16, so its relative error is
/// at most 2^-8. A product of two bf16 is exact in f32; as in [`sift_slack`] each meets at most n
/// additions. Instructions may add in an order of their own, truncate (so 2^-23 a rounding) and
/// flush results below f32's normal range to zero (2^-126 each, at most twice a term).
pub(super) fn coarse_slack(dim: usize, probe_error: f64) -> f32 {
    let probe_norm = PROBE_NORM_MAX + probe_error;
    let inputs = BF16_ROUNDOFF * ROW_NORM_MAX * probe_norm + ROW_NORM_MAX * probe_error;
    let sums = gamma(dim, 2.0 * F32_ROUNDOFF) * ROW_NORM_MAX * (1.0 + BF16_ROUNDOFF) * probe_norm;
    #[expect(clippy::cast_precision_loss, reason = "a dimension is small")]
    let flushes = 2.0 * dim as f64 * f64::from(f32::MIN_POSITIVE);
    let score = gamma(dim, F64_ROUNDOFF) * ROW_NORM_MAX * PROBE_NORM_MAX;
    rounded_up(inputs + sums + flushes + score)
}

/// A number at or below `floor - slack`, within two ulps of it.
///
/// The difference is taken in f64, whose rounding is far below half an ulp of f32; the step down
/// at the end outweighs both roundings.
pub(super) fn lowered(floor: f32, slack: f32) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step down outweighs the rounding")]
    let nearest = (f64::from(floor) - f64::from(slack)) as f32;
    nearest.next_down()
}

/// A number at or above `threshold + slack`, within two ulps of it, as [`lowered`] is below.
pub(super) fn lifted(threshold: f32, slack: f32) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step up outweighs the rounding")]
    let nearest = (f64::from(threshold) + f64::from(slack)) as f32;
    nearest.next_up()
}

/// The bounds above are sums of a few positive f64, each right to some parts in 10^16: one step
/// of f32 upwards, 6 parts in 10^8, covers their own rounding.
fn rounded_up(bound: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the step up outweighs the rounding")]
    let nearest = bound as f32;
    nearest.next_up()
}

#[cfg(test)]
mod tests {
    use half::f16;
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::kernels::{Kernels, Line, Precision, TileHits};
    use super::*;
    use crate::search::score::exact;
    use crate::simd::Simd;

    /// Rows and probes whose sums round badly: all factors positive, one value again and again so
    /// that rounding errors keep their sign, values in the middle between two bf16, and noise.
    fn bad_pairs(seed: u64, dim: usize) -> Vec<(Vec<f16>, Vec<f32>)> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut pairs = Vec::new();
        let wanted = 1.0 / (dim as f64).sqrt();
        for _ in 0..4 {
            let constant = f16::from_f64(wanted * rng.random_range(0.9..1.0));
            pairs.push((vec![constant; dim], vec![(wanted * rng.random_range(0.9..1.0)) as f32; dim]));
        }
        // 1 + 2^-8 times a power of two, in as many components as a norm of 1 takes.
        let power = 2.0_f64.powi(wanted.log2().ceil() as i32);
        let tie = power * (1.0 + 1.0 / 256.0);
        let count = ((1.0 / (tie * tie)) as usize).min(dim);
        let mut row = vec![f16::ZERO; dim];
        let mut probe = vec![0.0; dim];
        row[..count].fill(f16::from_f64(tie));
        probe[..count].fill(tie as f32);
        pairs.push((row, probe));
        for _ in 0..4 {
            let (mut row, mut probe): (Vec<f64>, Vec<f64>) =
                (0..dim).map(|_| (rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0))).unzip();
            if rng.random_bool(0.5) {
                probe.copy_from_slice(&row);
            }
            for values in [&mut row, &mut probe] {
                let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
                values.iter_mut().for_each(|v| *v /= norm);
            }
            pairs.push((row.into_iter().map(f16::from_f64).collect(), probe.into_iter().map(|v| v as f32).collect()));
        }
        for (row, probe) in &pairs {
            let norm = |square: f64| square.sqrt();
            assert!(norm(row.iter().map(|v| v.to_f64().powi(2)).sum()) <= ROW_NORM_MAX);
            assert!(norm(probe.iter().map(|v| f64::from(*v).powi(2)).sum()) <= PROBE_NORM_MAX);
        }
        pairs
    }

    /// f32 sums of the factors in the given order: fused, with rounded products, and pairwise.
    fn sums_of(row: &[f16], probe: &[f32], order: &[usize]) -> [f32; 3] {
        let mut fused = 0.0_f32;
        let mut rounded = 0.0_f32;
        for &i in order {
            fused = row[i].to_f32().mul_add(probe[i], fused);
            rounded += row[i].to_f32() * probe[i];
        }
        let mut factors: Vec<f32> = order.iter().map(|&i| row[i].to_f32() * probe[i]).collect();
        while factors.len() > 1 {
            factors = factors.chunks(2).map(|pair| pair.iter().sum()).collect();
        }
        [fused, rounded, factors[0]]
    }

    #[test]
    fn f32_sums_in_any_order_stay_within_the_slack() {
        let mut worst = 0.0_f64;
        for dim in [32, 64, 512, 2048] {
            let slack = f64::from(sift_slack(dim));
            for seed in 0..20 {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                for (row, probe) in bad_pairs(seed, dim) {
                    let score = exact(&row, &probe);
                    let mut order: Vec<usize> = (0..dim).collect();
                    for _ in 0..3 {
                        for sum in sums_of(&row, &probe, &order) {
                            let error = (f64::from(sum) - score).abs();
                            assert!(error <= slack, "seed {seed}, dim {dim}: {error:e} of {slack:e}");
                            worst = worst.max(error / slack);
                        }
                        order.shuffle(&mut rng);
                    }
                    // Largest factors first: partial sums, and their errors, are as large as can be.
                    order.sort_by(|&a, &b| (row[b].to_f32() * probe[b]).total_cmp(&(row[a].to_f32() * probe[a])));
                    for sum in sums_of(&row, &probe, &order) {
                        let error = (f64::from(sum) - score).abs();
                        assert!(error <= slack, "seed {seed}, dim {dim}: {error:e} of {slack:e}");
                        worst = worst.max(error / slack);
                    }
                }
            }
        }
        assert!(worst > 0.05, "the test comes nowhere near the bound: {worst}");
    }

    #[test]
    fn numbers_of_every_kernel_stay_within_its_slack() {
        for path in Simd::ALL.into_iter().filter(|path| path.is_available()) {
            let kernels = Kernels::of(path);
            let mut worst = 0.0_f64;
            for dim in [32, 96, 512, 2048] {
                for seed in 0..6 {
                    for (row, probe) in bad_pairs(seed, dim) {
                        let score = exact(&row, &probe);
                        let dot = f64::from(kernels.dot(&row, &probe));
                        assert!((dot - score).abs() <= f64::from(sift_slack(dim)), "{path}, seed {seed}, dim {dim}");

                        let mut panel = vec![Line([0.0; 16]); kernels.panel_lines(dim)];
                        let mut packed = vec![Line([0.0; 16]); kernels.packed_lines(1, dim)];
                        let mut moved = [f64::NAN];
                        let mut hits = TileHits::EMPTY;
                        kernels.pack_rows(&row, dim, &mut panel);
                        kernels.pack_probes(&probe, dim, &mut packed, &mut moved);
                        assert!(kernels.tile(&panel, &packed, dim, &[f32::NEG_INFINITY], &mut hits));
                        let slack = match kernels.precision {
                            Precision::F32 => sift_slack(dim),
                            Precision::Bf16 => coarse_slack(dim, moved[0]),
                        };
                        let error = (f64::from(hits.numbers[0][0]) - score).abs();
                        assert!(error <= f64::from(slack), "{path}, seed {seed}, dim {dim}: {error:e} of {slack:e}");
                        worst = worst.max(error / f64::from(slack));
                    }
                }
            }
            if kernels.precision == Precision::Bf16 {
                assert!(worst > 0.9, "the worst pair is known for bf16: {worst}");
            }
        }
    }

    #[test]
    fn a_lowered_floor_is_below_the_difference_and_a_lifted_one_above_the_sum_and_both_are_close() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..10_000 {
            let floor: f32 = rng.random_range(-1.2..1.2);
            let slack = sift_slack(32 * rng.random_range(1..=64));
            let difference = f64::from(floor) - f64::from(slack);
            let lowered = lowered(floor, slack);
            assert!(f64::from(lowered) < difference, "{floor} - {slack}");
            assert!(f64::from(lowered.next_up().next_up()) > difference, "{floor} - {slack}");
            let (sum, lifted) = (f64::from(floor) + f64::from(slack), lifted(floor, slack));
            assert!(f64::from(lifted) > sum && f64::from(lifted.next_down().next_down()) < sum, "{floor} + {slack}");
        }
        assert_eq!(lowered(f32::NEG_INFINITY, 1e-5), f32::NEG_INFINITY);
        assert!(lowered(0.0, 1e-5) < -1e-5);
    }

    #[test]
    fn the_slack_is_as_documented_and_grows_with_the_dimension() {
        assert!((sift_slack(512) - 3.1e-5).abs() < 0.06e-5, "{}", sift_slack(512));
        for dim in (32..2048).step_by(32) {
            assert!(sift_slack(dim) < sift_slack(dim + 32));
        }
    }
}
