//! How far can a kernel's f32 score lie from the exact one?
//!
//! Pure arithmetic: knows probes and dimensions, no device. Invariant: a row whose exact score
//! reaches a floor has a device score of at least [`cut`] of that floor, on every adapter that
//! keeps the promises of WGSL.
//!
//! The proof. Let `q` be the probe (f32), `x` the row (f16, so exact in f32), `n` the dimension
//! and `S = sum(q_i * x_i)` over the reals.
//!
//! - *Rounding.* WGSL calls f32 `+`, `-` and `*` correctly rounded but leaves the direction to the
//!   adapter, so each carries a factor `1 + d` with `|d| <= u = 2^-23` (a fused multiply-add one
//!   factor in place of two). A product takes part in at most `n` additions whatever the order
//!   of the sum, as additions of zero are exact; with its own rounding that is at most `n + 1`
//!   factors. So `|fl(S) - S| <= g * sum|q_i * x_i|` with `g = m*u / (1 - m*u)`, `m = n + 8`
//!   (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1; the 7 are margin).
//! - *Norms.* By Cauchy and Schwarz `sum|q_i * x_i| <= |q| * |x|`. A row is a unit vector rounded
//!   to f16, which moves each component by at most `2^-11` of itself or `2^-25`, so
//!   `|x| <= 1 + 2^-9` for every dimension up to 2048.
//! - *Flushed f32 subnormals.* An adapter may replace any f32 operand or result below `2^-126` by
//!   zero: `n` probe components (times at most 2), `n` products and `n` sums: less than
//!   `8 * n * 2^-126`.
//! - *Flushed f16 subnormals.* An adapter may unpack f16 values below `2^-14` as zero. Where the
//!   start-up test saw that, `2^-14 * sum|q_i|` is added.
//! - *The exact score itself* is an f64 sum, so off by at most `m * 2^-52 * |q| * |x|`.

/// Most that the length of a stored row can be.
const ROW_NORM_MAX: f64 = 1.0 + 1.0 / 512.0;
/// Relative error of one f32 operation in WGSL, whatever the direction of rounding.
const UNIT_F32: f64 = 1.0 / 8_388_608.0;
/// Relative error of one f64 operation, with as much margin.
const UNIT_F64: f64 = f64::EPSILON;
/// The least normal f16.
const F16_NORMAL_MIN: f64 = 1.0 / 16_384.0;

/// Most that the device's score of any row can differ from the exact score.
///
/// `f16_subnormals_kept`: whether the adapter was seen to unpack f16 subnormals to their value.
/// Not finite if the probe is not.
#[must_use]
pub(super) fn slack(probe: &[f32], f16_subnormals_kept: bool) -> f64 {
    let n = f64::from(u32::try_from(probe.len()).expect("a dimension is far below 2^32"));
    let (mut squares, mut absolutes) = (0.0_f64, 0.0_f64);
    for &value in probe {
        let value = f64::from(value);
        squares += value * value;
        absolutes += value.abs();
    }
    let products = squares.sqrt() * ROW_NORM_MAX;
    let factors = n + 8.0;
    let rounding = factors * UNIT_F32 / (1.0 - factors * UNIT_F32) + factors * UNIT_F64;
    let flushed_f32 = 8.0 * n * f64::from(f32::MIN_POSITIVE);
    let flushed_f16 = if f16_subnormals_kept { 0.0 } else { F16_NORMAL_MIN * absolutes };
    // The few f64 roundings of this very function are covered by the margin in `factors`.
    rounding * products + flushed_f32 + flushed_f16
}

/// The f32 that a device score must reach so that no row with an exact score of `floor` or more
/// is missed: the largest f32 not above `floor - slack`, and never a subnormal, which the
/// adapter's comparison might take for zero.
#[must_use]
pub(super) fn cut(floor: f64, slack: f64) -> f32 {
    let exact = floor - slack;
    #[expect(clippy::cast_possible_truncation, reason = "rounded down again where the cast rounded up")]
    let mut cut = exact as f32;
    if f64::from(cut) > exact {
        cut = cut.next_down();
    }
    if cut.is_subnormal() {
        cut = -f32::MIN_POSITIVE;
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_never_above_floor_less_slack() {
        let mut state = 7_u64;
        for _ in 0..10_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let floor = (state >> 11) as f64 / (1_u64 << 53) as f64 * 2.4 - 1.2;
            let cut = cut(floor, 1e-4);
            assert!(f64::from(cut) <= floor - 1e-4, "floor {floor}");
            assert!(f64::from(cut) > floor - 1e-4 - 2.4e-7, "floor {floor}");
        }
    }

    #[test]
    fn a_cut_is_never_subnormal() {
        assert_eq!(cut(1e-40, 0.0), -f32::MIN_POSITIVE);
        assert_eq!(cut(-1e-40, 0.0), -f32::MIN_POSITIVE);
        assert_eq!(cut(0.0, 0.0), 0.0);
    }

    #[test]
    fn slack_of_a_unit_probe_is_small_and_grows_where_subnormals_are_flushed() {
        let probe = vec![1.0 / 512.0_f32.sqrt(); 512];
        let kept = slack(&probe, true);
        assert!(kept > 512.0 * 5.9e-8 && kept < 7e-5, "{kept}");
        let flushed = slack(&probe, false);
        assert!((flushed - kept - 512.0_f64.sqrt() * F16_NORMAL_MIN).abs() < 1e-8);
    }

    #[test]
    fn slack_covers_the_worst_directed_rounding_of_a_long_sum() {
        // Round every product and partial sum up by hand; the drift must stay within the slack.
        let n = 1024;
        let probe = vec![1.0 / 32.0_f32; n];
        let row = 1.0 / 32.0_f32;
        let mut sum = 0.0_f32;
        for &q in &probe {
            sum = (sum + (q * row).next_up()).next_up();
        }
        assert!(f64::from(sum) - 1.0 <= slack(&probe, true));
        assert!(f64::from(sum) > 1.0);
    }
}
