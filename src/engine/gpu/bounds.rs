//! Which bounds follow from a floor, and how far can a kernel's arithmetic be off?
//!
//! Pure: knows certificates, probes and levels, no device. Invariant: a row whose exact score reaches a floor
//! reaches the bound of that floor on every adapter that keeps the promises of WGSL; under a randomised
//! certificate, except with the probability that the level may miss it with.
//!
//! The proof. Let n = ‖c‖ be the length of a row's code, s = scale, I the integer sum. By
//! `QuantisedProbe`, <q, c> <= s I + n ‖e‖; by `certificate`, a row that reaches the floor has
//! <q, c> >= n (along a - across sqrt(1 - a²) - slack) with the parts of its bound. So it has
//!
//! ```text
//! s I >= n (along a - across sqrt(1 - a²) - r),   r = slack + ‖e‖                               (1)
//! ```
//!
//! The kernel evaluates (1) in f32, with [`DEVICE_SLACK`] added to r. In units of u = 2^-23, the relative
//! error of an operation that WGSL calls correctly rounded but whose direction it leaves to the adapter:
//!
//! - I is exact (below 2^24), s is the very f32 that ‖e‖ was computed with: s I is off by u of at most
//!   n (‖q‖ + ‖e‖) < 1.2 n.
//! - n is exact to u/2 for 1-bit codes, and the root of an exact integer for 4-bit codes: WGSL grants a root
//!   what 1 / inverseSqrt has, 2.5 + 2 ULP, so 5 u.
//! - a in parts of 65,536 is an integer p from 0 to 65,535, exact, and so are 65,536 - p and 65,536 + p.
//!   Their product has one rounding, which the root halves, and the root its 5 u: the sine is off by 5.5 u
//!   of itself, however small it is.
//! - n a is off by 6 u of n, n sqrt(1 - a²) by 11.5 u; times along and across (at most 1 each, whose own
//!   rounding the slack of the bound covers), 7 u and 12.5 u; n r by 6 u of n r, which is at most n/2. Two
//!   subtractions, whose results are below 2.5 n: at most 5 u.
//!
//! In all less than 30 u n < 2^-18 n. Fusing a multiplication with an addition leaves roundings out.
//! Nothing is subnormal where it matters: n >= 1, p >= 1 or the term is zero, and a product with a scale of
//! 10^-20 is of a probe of zeros.
//!
//! Zeroed slots (erased rows, freed and unused slots, and rows of zeros, whose score is 0). Their 4-bit code
//! has the length 0, which no other row's has, and kernels give them the angle (10^30, 0) and the length 1.
//! Certified floors are at least `certificate::FLOOR_MIN`, so that `along` is more than 0.01, and the bound
//! of a zeroed slot more than 10^28 - 1, which no s I reaches. [`DeviceBound::open`] has `along` 0, so
//! that such a slot reaches it like every row.

use super::device::bindings::{COSINE_PARTS, DeviceBound};
use super::device::layout::Level;
use crate::engine::certificate::{Bounds, Certificate, FLOOR_MIN, PASSES};
use crate::engine::quantised_probe::QuantisedProbe;

/// Four times what the kernels' arithmetic loses, for a code of length 1.
pub(super) const DEVICE_SLACK: f64 = 1.0 / 65_536.0;
const _: () = assert!(FLOOR_MIN > 0.01, "zeroed slots must not reach certified bounds");

/// Turns floors into bounds, for one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceBounds {
    randomised: bool,
    /// For the scan of each level; none if it passes nothing over.
    scan: [Option<Bounds>; 2],
    refine: Bounds,
}

impl DeviceBounds {
    /// The bounds of `certificate` for `dim` components. Under a randomised one each level has one of
    /// [`PASSES`] parts of the miss probability. The refinement is deterministic.
    pub(super) fn new(certificate: Certificate, dim: usize) -> Self {
        let refine = Bounds::new(Certificate::Deterministic, dim);
        match certificate {
            Certificate::Deterministic => Self { randomised: false, scan: [None, Some(refine)], refine },
            Certificate::Randomised { miss_probability } => {
                let miss_probability = miss_probability / PASSES as f64;
                let each = Bounds::new(Certificate::Randomised { miss_probability }, dim);
                Self { randomised: true, scan: [Some(each); 2], refine }
            }
        }
    }

    /// Whether 1-bit codes may be scanned at all.
    pub(super) fn randomised(&self) -> bool {
        self.randomised
    }

    /// Parts that a scan at `level` takes off a row's cosine.
    pub(super) fn loss_parts(&self, level: Level) -> u32 {
        self.scan[level.index()].map_or(0, |bounds| loss_parts(&bounds))
    }

    /// The bound of a scan.
    pub(super) fn scan(&self, level: Level, probe: &QuantisedProbe, floor: f64, quota: u32) -> DeviceBound {
        match self.scan[level.index()].and_then(|bounds| bounds.bound(floor)) {
            Some(bound) => device_bound(bound.parts(), probe, level, quota),
            None => DeviceBound::open(quota),
        }
    }

    /// The bound of the refinement.
    pub(super) fn refine(&self, probe: &QuantisedProbe, floor: f64) -> DeviceBound {
        match self.refine.bound(floor) {
            Some(bound) => device_bound(bound.parts(), probe, Level::FourBit, u32::MAX),
            None => DeviceBound::open(u32::MAX),
        }
    }

    /// About the least <q, u> of a usual row that reaches the bound of a scan; none if every row does.
    pub(super) fn usual_least_product(&self, level: Level, probe: &QuantisedProbe, floor: f64) -> Option<f64> {
        /// Usual cosines, as `thenar_index::codes` has them.
        const USUAL: [f32; 2] = [0.797, 0.994];
        let bounds = self.scan[level.index()]?;
        let least = bounds.bound(floor)?.least_product(bounds.angle(USUAL[level.index()]));
        Some(f64::from(least) - probe.error())
    }
}

fn device_bound(
    (along, across, slack): (f32, f32, f32),
    probe: &QuantisedProbe,
    level: Level,
    quota: u32,
) -> DeviceBound {
    let slack = (f64::from(slack) + probe.error() + DEVICE_SLACK) as f32;
    DeviceBound { scale: probe.scale(), along, across, slack, base: level.base(probe), quota }
}

/// A bound on an estimate of the score, <q, u> / a, that proves nothing: for finding good rows to raise a floor
/// with.
pub(super) fn estimate(probe: &QuantisedProbe, level: Level, score: f64, quota: u32) -> DeviceBound {
    let along = score as f32;
    DeviceBound { scale: probe.scale(), along, across: 0.0, slack: 0.0, base: level.base(probe), quota }
}

/// Whole parts of at least what `Bounds::angle` takes off a cosine. Its f32 arithmetic is off by far less than
/// the hundredth of a part that is added.
fn loss_parts(bounds: &Bounds) -> u32 {
    let parts = (1.0 - f64::from(bounds.angle(1.0).along)) * f64::from(COSINE_PARTS);
    if parts > 0.0 { (parts + 0.01).ceil() as u32 } else { 0 }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use rand_distr::StandardNormal;
    use thenar_index::codes::{Factors, OwnedCodes};

    use super::super::twin::{Twin, reaches, row_of};
    use super::*;
    use crate::engine::certificate::row_rounding;

    #[test]
    fn parts_taken_off_cover_the_rounding_of_rows_and_hardly_more() {
        for dim in [32, 512, 2048] {
            let bounds = DeviceBounds::new(Certificate::Randomised { miss_probability: 1e-12 }, dim);
            for level in Level::ALL {
                let off = f64::from(bounds.loss_parts(level)) / 65_536.0;
                assert!(off >= 2.0 * row_rounding(dim) && off < 2.0 * row_rounding(dim) + 2.5e-5, "dim {dim}: {off}");
            }
            assert_eq!(DeviceBounds::new(Certificate::Deterministic, dim).loss_parts(Level::FourBit), 0);
        }
    }

    /// The bound of (1) in f64, for a code of length 1 and a true cosine.
    fn exact_bound(certificate: Certificate, dim: usize, floor: f64, cosine: f64) -> Option<f64> {
        let (along, across, _) = Bounds::new(certificate, dim).bound(floor)?.parts();
        let moved = match certificate {
            Certificate::Deterministic => 0.0,
            Certificate::Randomised { .. } => 2.0 * row_rounding(dim),
        };
        let cosine = (cosine - moved).max(0.0);
        Some(f64::from(along) * cosine - f64::from(across) * (1.0 - cosine * cosine).sqrt())
    }

    /// Factors with one cosine for the 1-bit and the 4-bit code.
    fn factors(parts: u32, square: u32) -> Factors {
        bytemuck::cast::<[u32; 3], Factors>([parts, parts, square])
    }

    fn random_probe(dim: usize, rng: &mut ChaCha8Rng) -> QuantisedProbe {
        let values: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
        let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
        QuantisedProbe::new(&values.iter().map(|v| v / norm).collect::<Vec<_>>())
    }

    /// Rows on the edge: with the largest sum that the bound may still turn away, and the smallest that must
    /// reach it, for every cosine from none to all of it.
    #[test]
    fn every_sum_reaches_its_bound_that_may_belong_to_a_row_at_the_floor_and_few_more() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let randomised = Certificate::Randomised { miss_probability: 1e-9 };
        let (mut passed, mut stopped) = (0, 0);
        for round in 0..400_u32 {
            let dim = [32, 128, 512, 2048][round as usize % 4];
            let probe = random_probe(dim, &mut rng);
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
                let four_bit_square = rng.random_range(dim as u32..225 * dim as u32);
                let square = if level == Level::OneBit { dim as u32 } else { four_bit_square };
                let length = f64::from(square).sqrt();
                let Some(bound) = exact_bound(each, dim, floor, f64::from(parts) / 65_536.0) else { continue };
                let sum_at = (bound - probe.error()) * length / f64::from(probe.scale());
                if sum_at.abs() > f64::from(1 << 23) {
                    continue;
                }
                let bounds = DeviceBounds::new(certificate, dim);
                let bound = bounds.scan(level, &probe, floor, 1);
                let row = row_of(factors(parts, four_bit_square), dim, level, bounds.loss_parts(level));
                assert!(
                    reaches(&bound, row, sum_at.ceil() as i32),
                    "{level:?} {certificate:?} floor {floor} parts {parts}"
                );
                // Well below the bound is stopped: slacks are of a few parts in 10^5, parts of 2^-16.
                let below = sum_at - (3e-4 * length / f64::from(probe.scale())) - 1.0;
                let stops = !reaches(&bound, row, below.floor() as i32);
                // If a row lies along its code but for its rounding, the parts taken off are much.
                if (1_000..65_000).contains(&parts) {
                    assert!(stops, "{level:?} {certificate:?} floor {floor} parts {parts}");
                }
                passed += 1;
                stopped += u32::from(stops);
            }
        }
        assert!(passed > 8_000 && stopped > 6_000, "{passed} {stopped}");
    }

    #[test]
    fn a_zeroed_slot_reaches_no_bound_of_a_certified_floor_whatever_its_sum() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let mut certified = 0;
        for round in 0..2000 {
            let dim = [32, 128, 512, 2048][round % 4];
            let probe = random_probe(dim, &mut rng);
            let certificate =
                [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }][round / 4 % 2];
            let floor = rng.random_range(0.0..1.1);
            for level in Level::ALL {
                let bounds = DeviceBounds::new(certificate, dim);
                let is_certified = bounds.scan[level.index()].is_some_and(|bounds| bounds.bound(floor).is_some());
                let row = row_of(factors(0, 0), dim, level, bounds.loss_parts(level));
                for bound in [bounds.scan(level, &probe, floor, 1), DeviceBound::CLOSED] {
                    // Every row reaches an open bound, also a row of zeros, whose score is 0.
                    let expected = !is_certified && bound != DeviceBound::CLOSED;
                    for sum in [-(1 << 24), -1, 0, 1, 1 << 24] {
                        assert_eq!(reaches(&bound, row, sum), expected, "{certificate:?} floor {floor} {level:?}");
                    }
                }
                certified += u32::from(is_certified);
            }
        }
        assert!((2000..4000).contains(&certified), "{certified}");
    }

    /// Mates in random directions, as after a Haar rotation, each at a floor of its own score: the part that a
    /// scan passes over is at most the level's share of the miss probability, and for 1-bit codes not far
    /// below it.
    #[test]
    fn mates_are_passed_over_as_often_as_the_share_of_a_level_allows_and_no_more() {
        const DIM: usize = 128;
        const MISS: f64 = 0.01 * PASSES as f64;
        const BLOCKS: usize = 1500;
        let bounds = DeviceBounds::new(Certificate::Randomised { miss_probability: MISS }, DIM);
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
            let twin = Twin::new(&OwnedCodes::of(&stored, DIM).as_codes(), DIM, 0);
            for (slot, row) in (0..).zip(&rows) {
                let tau = 0.4 + 0.4 * (block as f64 / BLOCKS as f64);
                let other = unit();
                let along: f64 = row.iter().zip(&other).map(|(x, w)| x * w).sum();
                let across = (1.0 - tau * tau).sqrt() / (1.0 - along * along).sqrt();
                let probe: Vec<f32> =
                    row.iter().zip(&other).map(|(x, w)| (tau * x + across * (w - along * x)) as f32).collect();
                let of_row = &stored[slot as usize * DIM..][..DIM];
                let floor: f64 = of_row.iter().zip(&probe).map(|(x, q)| x.to_f64() * f64::from(*q)).sum();
                let quantised = QuantisedProbe::new(&probe);
                pairs += 1;
                for level in Level::ALL {
                    let bound = bounds.scan(level, &quantised, floor, 1);
                    let found = twin.scan(slot..slot + 1, level, &[&quantised], &[bound], bounds.loss_parts(level));
                    missed[level.index()] += u32::from(found.is_empty());
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
