//! How far the number of a bf16 tile can be from the exact score, proved and rounded up. For f32 see
//! [`dot_slack`](crate::engine::dot::dot_slack), whose notation this uses.

use crate::engine::dot::{F32_ROUNDOFF, F64_ROUNDOFF, PROBE_NORM_MAX, ROW_NORM_MAX, gamma, rounded_up};

/// Unit roundoff of bf16, which has 8 significant bits.
const BF16_ROUNDOFF: f64 = 1.0 / 256.0;

/// A bound on |b - e| for the number b of a bf16 kernel: rows and probe rounded to the nearest
/// bf16 (x', q'), products accumulated in f32. `probe_error` is ‖q' - q‖ of this probe.
///
/// s' - s = <x' - x, q'> + <x, q' - q>, so |s' - s| <= 2^-8 ‖x‖ ‖q'‖ + ‖x‖ ‖q' - q‖: every
/// component of a row that is not zero is at least 2^-24, a normal bf16, so its relative error is
/// at most 2^-8. A product of two bf16 is exact in f32; as in `dot_slack` each meets at most n
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

#[cfg(test)]
mod tests {
    use super::super::kernels::{Kernels, Precision};
    use super::super::layout::{Line, TileHits};
    use super::*;
    use crate::engine::dot::dot_slack;
    use crate::engine::dot::tests::bad_pairs;
    use crate::search::score::exact;
    use crate::simd::Simd;

    #[test]
    fn numbers_of_every_kernel_stay_within_its_slack() {
        for path in Simd::ALL.into_iter().filter(|path| path.is_available()) {
            let kernels = Kernels::of(path);
            let mut worst = 0.0_f64;
            for dim in [32, 96, 512, 2048] {
                for seed in 0..6 {
                    for (row, probe) in bad_pairs(seed, dim) {
                        let score = exact(&row, &probe);
                        let mut panel = vec![Line([0.0; 16]); kernels.panel_lines(dim)];
                        let mut packed = vec![Line([0.0; 16]); kernels.packed_lines(1, dim)];
                        let mut moved = [f64::NAN];
                        let mut hits = TileHits::EMPTY;
                        kernels.pack_rows(&row, dim, &mut panel);
                        kernels.pack_probes(&probe, dim, &mut packed, &mut moved);
                        assert!(kernels.tile(&panel, &packed, dim, &[f32::NEG_INFINITY], &mut hits));
                        let slack = match kernels.precision {
                            Precision::F32 => dot_slack(dim),
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
}
