//! Sums that round as badly as they can, in every order and on every instruction set.

use half::f16;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::search::score::exact;

/// Rows and probes whose sums round badly: all factors positive, one value again and again so
/// that rounding errors keep their sign, values in the middle between two bf16, and noise.
pub(in crate::engine) fn bad_pairs(seed: u64, dim: usize) -> Vec<(Vec<f16>, Vec<f32>)> {
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
        let slack = f64::from(dot_slack(dim));
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
fn the_slack_is_as_documented_and_grows_with_the_dimension() {
    assert!((dot_slack(512) - 3.1e-5).abs() < 0.06e-5, "{}", dot_slack(512));
    for dim in (32..2048).step_by(32) {
        assert!(dot_slack(dim) < dot_slack(dim + 32));
    }
}

#[test]
fn products_of_every_kernel_stay_within_the_slack() {
    for path in Simd::ALL.into_iter().filter(|path| path.is_available()) {
        for dim in [32, 96, 512, 2048] {
            for seed in 0..6 {
                for (row, probe) in bad_pairs(seed, dim) {
                    let error = f64::from(Dot::of(path).product(&row, &probe)) - exact(&row, &probe);
                    assert!(error.abs() <= f64::from(dot_slack(dim)), "{path}, seed {seed}, dim {dim}");
                }
            }
        }
    }
}
