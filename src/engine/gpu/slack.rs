//! Which bars does a floor make, and how far can a kernel's arithmetic be off?
//!
//! Pure: knows certificates, probes and levels, no device. Invariant: a row whose exact score reaches
//! a floor reaches the bar of that floor on every adapter that keeps the promises of WGSL; under
//! a randomised certificate but for the probability that the level has.
//!
//! The proof. Let n = ‖c‖ be the length of a row's code, s = scale, I the integer sum. By
//! `probe::Quantised`, <q, c> <= s I + n ‖e‖; by `certificate`, a row that reaches the floor has
//! <q, c> >= n (along a - across sqrt(1 - a²) - slack) with the parts of its cut. So it has
//!
//! ```text
//! s I >= n (along a - across sqrt(1 - a²) - rest),   rest = slack + ‖e‖                         (1)
//! ```
//!
//! The kernel evaluates (1) in f32, with [`DEVICE_SLACK`] added to `rest`. In units of u = 2^-23, the
//! relative error of an operation that WGSL calls correctly rounded but whose direction it leaves
//! to the adapter:
//!
//! - I is exact (below 2^24), s is the very f32 that ‖e‖ was computed with: s I is off by u of at
//!   most n (‖q‖ + ‖e‖) < 1.2 n.
//! - n is exact to u/2 for signs, and the root of an exact integer for fine codes: WGSL grants a root
//!   what 1 / inverseSqrt has, 2.5 + 2 ULP, so 5 u.
//! - a in parts of 65,536 is an integer p from 0 to 65,535, exact, and so are 65,536 - p and
//!   65,536 + p. Their product has one rounding, which the root halves, and the root its 5 u: the sine
//!   is off by 5.5 u of itself, however small it is.
//! - n a is off by 6 u of n, n sqrt(1 - a²) by 11.5 u; times along and across (at most 1 each, whose own
//!   rounding the cut's slack covers), 7 u and 12.5 u; n rest by 6 u of n rest, which is at most
//!   n/2. Two subtractions, whose results are below 2.5 n: at most 5 u.
//!
//! In all less than 30 u n < 2^-18 n. Fusing a multiplication with an addition leaves roundings out.
//! Nothing is subnormal where it matters: n >= 1, p >= 1 or the term is zero, and a product with a
//! scale of 10^-20 is of a probe of zeros.

use super::bindings::{Bar, COSINE_PARTS};
use super::level::Level;
use super::probe::Quantised;
use crate::engine::certificate::{Bounds, Certificate, PASSES};

/// Four times what the kernels' arithmetic loses, for a code of length 1.
pub(super) const DEVICE_SLACK: f64 = 1.0 / 65_536.0;

/// Turns floors into bars, for one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bars {
    randomised: bool,
    /// For the scan of each level; none where it passes nothing over.
    scan: [Option<Bounds>; 2],
    look: Bounds,
}

impl Bars {
    /// The bars of `certificate` for `dim` components. Under a randomised one each level has one of
    /// [`PASSES`] parts of the miss probability. The second look is deterministic.
    pub(super) fn new(certificate: Certificate, dim: usize) -> Self {
        let look = Bounds::new(Certificate::Deterministic, dim);
        match certificate {
            Certificate::Deterministic => Self { randomised: false, scan: [None, Some(look)], look },
            Certificate::Randomised { miss_probability } => {
                let miss_probability = miss_probability / PASSES as f64;
                let each = Bounds::new(Certificate::Randomised { miss_probability }, dim);
                Self { randomised: true, scan: [Some(each); 2], look }
            }
        }
    }

    /// Whether signs may be scanned at all.
    pub(super) fn randomised(&self) -> bool {
        self.randomised
    }

    /// Parts that a scan at `level` takes off a row's cosine.
    pub(super) fn parts_off(&self, level: Level) -> u32 {
        self.scan[level.index()].map_or(0, |cutter| parts_off(&cutter))
    }

    /// The bar of a scan.
    pub(super) fn scan(&self, level: Level, probe: &Quantised, floor: f64, quota: u32) -> Bar {
        match self.scan[level.index()].and_then(|cutter| cutter.bound(floor)) {
            Some(cut) => least_product(cut.parts(), probe, level, quota),
            None => Bar::open(quota),
        }
    }

    /// The bar of the second look.
    pub(super) fn look(&self, probe: &Quantised, floor: f64) -> Bar {
        match self.look.bound(floor) {
            Some(cut) => least_product(cut.parts(), probe, Level::FourBit, u32::MAX),
            None => Bar::open(u32::MAX),
        }
    }

    /// About the least <q, u> with which a usual row passes a scan; none where every row does.
    pub(super) fn usual_bar(&self, level: Level, probe: &Quantised, floor: f64) -> Option<f64> {
        /// Usual cosines, as `thenar_index::codes` has them.
        const USUAL: [f32; 2] = [0.797, 0.994];
        let cutter = self.scan[level.index()]?;
        let bar = cutter.bound(floor)?.least_product(cutter.angle(USUAL[level.index()]));
        Some(f64::from(bar) - probe.error)
    }
}

fn least_product((along, across, slack): (f32, f32, f32), probe: &Quantised, level: Level, quota: u32) -> Bar {
    let rest = f64::from(slack) + probe.error + DEVICE_SLACK;
    Bar { scale: probe.scale, along, across, rest: rest as f32, base: probe.base(level), quota }
}

/// A bar on an estimate of the score, <q, u> / a, that proves nothing: for finding good rows to raise
/// a floor with.
pub(super) fn estimate(probe: &Quantised, level: Level, score: f64, quota: u32) -> Bar {
    Bar { scale: probe.scale, along: score as f32, across: 0.0, rest: 0.0, base: probe.base(level), quota }
}

/// Whole parts of at least what `Bounds::angle` takes off a cosine. Its f32 arithmetic is off by far
/// less than the hundredth of a part that is added.
fn parts_off(cutter: &Bounds) -> u32 {
    let parts = (1.0 - f64::from(cutter.angle(1.0).along)) * f64::from(COSINE_PARTS);
    if parts > 0.0 { (parts + 0.01).ceil() as u32 } else { 0 }
}

/// The f32 that a number within `slack` of the exact score must reach so that no row with an exact
/// score of `floor` or more is missed: the largest f32 not above `floor - slack`.
#[must_use]
pub(super) fn threshold(floor: f64, slack: f64) -> f32 {
    let exact = floor - slack;
    #[expect(clippy::cast_possible_truncation, reason = "rounded down again where the cast rounded up")]
    let cut = exact as f32;
    if f64::from(cut) > exact { cut.next_down() } else { cut }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use rand_distr::StandardNormal;
    use thenar_index::codes::OwnedCodes;

    use super::super::bindings::{Card, Slice, reaches, spread};
    use super::super::card::CardCodes;
    use super::super::level::QUAD;
    use super::*;
    use crate::engine::certificate::row_rounding;

    #[test]
    fn a_cut_is_never_above_floor_less_slack() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for _ in 0..10_000 {
            let floor: f64 = rng.random_range(-1.0..1.0);
            let cut = threshold(floor, 1e-4);
            assert!(f64::from(cut) <= floor - 1e-4, "floor {floor}");
            assert!(f64::from(cut) > floor - 1e-4 - 2.4e-7, "floor {floor}");
        }
    }

    #[test]
    fn parts_taken_off_cover_the_rounding_of_rows_and_hardly_more() {
        for dim in [32, 512, 2048] {
            let bars = Bars::new(Certificate::Randomised { miss_probability: 1e-12 }, dim);
            for level in Level::ALL {
                let off = f64::from(bars.parts_off(level)) / 65_536.0;
                assert!(off >= 2.0 * row_rounding(dim) && off < 2.0 * row_rounding(dim) + 2.5e-5, "dim {dim}: {off}");
            }
            assert_eq!(Bars::new(Certificate::Deterministic, dim).parts_off(Level::FourBit), 0);
        }
    }

    /// The bar of (1) in f64, for a code of length 1 and a true cosine.
    fn exact_bar(certificate: Certificate, dim: usize, floor: f64, cosine: f64) -> Option<f64> {
        let cutter = Bounds::new(certificate, dim);
        let (along, across, _) = cutter.bound(floor)?.parts();
        let moved = match certificate {
            Certificate::Deterministic => 0.0,
            Certificate::Randomised { .. } => 2.0 * row_rounding(dim),
        };
        let cosine = (cosine - moved).max(0.0);
        Some(f64::from(along) * cosine - f64::from(across) * (1.0 - cosine * cosine).sqrt())
    }

    /// Rows on the edge: with the largest sum that the bar may still turn away, and the smallest that
    /// it must let pass, for every cosine from none to all of it.
    #[test]
    fn a_bar_lets_every_sum_pass_that_may_belong_to_a_row_at_the_floor_and_few_more() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let randomised = Certificate::Randomised { miss_probability: 1e-9 };
        let (mut passed, mut stopped) = (0, 0);
        for round in 0..200_000_u32 {
            let dim = [32, 128, 512, 2048][round as usize % 4];
            let values: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
            let probe = Quantised::new(&values.iter().map(|v| v / norm).collect::<Vec<_>>());
            for _ in 0..50 {
                let level = Level::ALL[rng.random_range(0..2)];
                let certificate = if level == Level::OneBit || rng.random_bool(0.5) {
                    randomised
                } else {
                    Certificate::Deterministic
                };
                let each = match certificate {
                    Certificate::Randomised { miss_probability } => {
                        Certificate::Randomised { miss_probability: miss_probability / PASSES as f64 }
                    }
                    Certificate::Deterministic => certificate,
                };
                let floor: f64 = rng.random_range(0.03..0.99);
                let parts: u32 = match round % 5 {
                    0 => rng.random_range(0..65_536),
                    1 => 65_535 - rng.random_range(0..3),
                    _ => rng.random_range(48_000..65_536),
                };
                let square =
                    if level == Level::OneBit { dim as u32 } else { rng.random_range(dim as u32..225 * dim as u32) };
                let length = f64::from(square).sqrt();
                let Some(bar) = exact_bar(each, dim, floor, f64::from(parts) / 65_536.0) else { continue };
                let sum_at = (bar - probe.error) * length / f64::from(probe.scale);
                if sum_at.abs() > f64::from(1 << 23) {
                    continue;
                }
                let factors = [[parts << (16 * level.index()), square]];
                let bars = Bars::new(certificate, dim);
                let bar = bars.scan(level, &probe, floor, 1);
                let slice = Slice { sign_norm: (dim as f32).sqrt(), ..bytemuck::Zeroable::zeroed() };
                let card = Card { codes: &[], factors: &factors, live: &[1], slice, bars: &[bar] };
                let row = card.row(0, level, bars.parts_off(level));
                assert!(
                    reaches(&bar, row, sum_at.ceil() as i32),
                    "{level:?} {certificate:?} floor {floor} parts {parts}"
                );
                // Well below the bar is stopped: slacks are of a few parts in 10^5, parts of 2^-16.
                let below = sum_at - (3e-4 * length / f64::from(probe.scale)) - 1.0;
                let stops = !reaches(&bar, row, below.floor() as i32);
                // Where a row leans on its code but for its rounding, the parts taken off are much.
                if (1_000..65_000).contains(&parts) {
                    assert!(stops, "{level:?} {certificate:?} floor {floor} parts {parts}");
                }
                passed += 1;
                stopped += u32::from(stops);
            }
            if round > 400 {
                break;
            }
        }
        assert!(passed > 8_000 && stopped > 6_000, "{passed} {stopped}");
    }

    /// Mates in random directions, as after a Haar rotation, each at a floor of its own score: the part
    /// that a scan passes over is at most the level's share of the miss probability, and for signs
    /// not far below it.
    #[test]
    fn mates_are_passed_over_as_often_as_the_share_of_a_level_allows_and_no_more() {
        const DIM: usize = 128;
        const MISS: f64 = 0.01 * PASSES as f64;
        const BLOCKS: usize = 1500;
        let bars = Bars::new(Certificate::Randomised { miss_probability: MISS }, DIM);
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut unit = || -> Vec<f64> {
            let values: Vec<f64> = (0..DIM).map(|_| rng.sample(StandardNormal)).collect();
            let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
            values.iter().map(|v| v / norm).collect()
        };
        let (mut missed, mut pairs) = ([0_u32; 2], 0_u32);
        for block in 0..BLOCKS {
            let rows: Vec<Vec<f64>> = (0..64).map(|_| unit()).collect();
            let stored: Vec<f16> = rows.iter().flatten().map(|v| f16::from_f64(*v)).collect();
            let card_codes = CardCodes::new(&OwnedCodes::of(&stored, DIM).as_codes(), DIM);
            let slice = Slice { sign_norm: (DIM as f32).sqrt(), ..bytemuck::Zeroable::zeroed() };
            for (slot, row) in rows.iter().enumerate() {
                let tau = 0.4 + 0.4 * (block as f64 / BLOCKS as f64);
                let other = unit();
                let along: f64 = row.iter().zip(&other).map(|(x, w)| x * w).sum();
                let across = (1.0 - tau * tau).sqrt() / (1.0 - along * along).sqrt();
                let probe: Vec<f32> =
                    row.iter().zip(&other).map(|(x, w)| (tau * x + across * (w - along * x)) as f32).collect();
                let of_row = &stored[slot * DIM..][..DIM];
                let floor: f64 = of_row.iter().zip(&probe).map(|(x, q)| x.to_f64() * f64::from(*q)).sum();
                let quantised = Quantised::new(&probe);
                pairs += 1;
                for level in Level::ALL {
                    let codes = if level == Level::OneBit { &card_codes.one_bit } else { &card_codes.four_bit };
                    let bar = bars.scan(level, &quantised, floor, 1);
                    let card = Card { codes, factors: &card_codes.factors, live: &[u64::MAX], slice, bars: &[bar] };
                    let quads = level.quads(DIM);
                    let mut sum = bar.base;
                    for (quad, word) in (0..quads).flat_map(|quad| (0..QUAD).map(move |word| (quad, word))) {
                        let code = card.word(slot as u32, quads as u32, quad as u32, word as u32);
                        for nth in 0..level.spreads() {
                            for (byte, value) in spread(code, level, nth as u32).to_le_bytes().into_iter().enumerate() {
                                let k = quantised.integer(level.component(DIM, quad, nth, word, byte));
                                sum += level.factor() * i32::from(k) * i32::from(value);
                            }
                        }
                    }
                    let row = card.row(slot as u32, level, bars.parts_off(level));
                    missed[level.index()] += u32::from(!reaches(&bar, row, sum));
                }
            }
        }
        let share = MISS / PASSES as f64;
        let most = share + 4.0 * (share / f64::from(pairs)).sqrt();
        let rates = missed.map(|missed| f64::from(missed) / f64::from(pairs));
        assert!(rates.iter().all(|rate| *rate <= most), "{rates:?} of {pairs} pairs, where {share} are allowed");
        assert!(rates[0] > share / 4.0, "{rates:?}: far fewer than {share}, so this tests little");
    }
}
