//! Certificates: why a row that was passed over by its code cannot have mattered.
//!
//! A code c of a stored row x is a vector of small integers that points nearly where x does: with
//! u = c / ‖c‖, a lower bound of the cosine a = <x, u> / ‖x‖ is known. Let q be a rotated probe and tau
//! the floor of the search, and suppose <q, x> >= tau. How small can <q, u> be?
//!
//! **Deterministic.** Angles obey the triangle inequality on the sphere: the angle between q and u
//! is at most that between q and x plus that between x and u. With cosines tau and a, both not
//! negative, the cosine of the sum is
//!
//! ```text
//! <q, u> >= tau a - sqrt(1 - tau²) sqrt(1 - a²)                                               (1)
//! ```
//!
//! **Randomised.** Probe and row are the images of two fixed vectors under a rotation R that is
//! Haar-distributed, secret, and drawn without knowledge of either. So, given the rotated row y,
//! the rotated probe is q = tau y + sqrt(1 - tau²) w with w uniform on the unit sphere of the
//! D - 1 dimensions orthogonal to y. The code is a function of y alone, hence so are u, a and the
//! direction v of the part of u orthogonal to y, and
//!
//! ```text
//! <q, u> = tau a + sqrt(1 - tau²) sqrt(1 - a²) <w, v>                                          (2)
//! ```
//!
//! where <w, v> is one coordinate of a uniform point of the sphere in D - 1 dimensions, whatever v
//! is. With t its quantile, P(<w, v> < -t) <= delta, the row of a mate is passed over with a
//! probability of at most delta. The event is about one pair: there is no union over the gallery.
//! The bound also holds for a floor that rises during a search. Such a floor may depend on anything,
//! including other rows and which of them were missed, but as long as the row belongs in the answer, the floor
//! is at most the row's own score. The bounds of (1) and (2) rise with tau, so a row that is below the bound of
//! any such floor is below the bound at its own score, which is fixed: the event of a miss lies inside an event
//! about the pair alone.
//!
//! The quantile. With n = D - 1 and m = (n - 3) / 2, the coordinate z of a uniform point of the
//! sphere in n dimensions has the density C (1 - z²)^m, C = Gamma(n/2) / (sqrt(pi) Gamma((n-1)/2)).
//! For z >= t > 0, 1 <= z/t, so the tail integrates in closed form,
//!
//! ```text
//! P(z > t) <= C / t * integral of z (1 - z²)^m from t to 1 = C (1 - t²)^(m+1) / (2 t (m + 1))  (3)
//! ```
//!
//! and Gautschi's inequality gives C <= sqrt((n - 1) / (2 pi)). (3) is solved for t, rounded up.
//!
//! **Dithered.** An engine sums an estimate of <q, u> from G entries of tables, in whole steps. An
//! entry of x steps is kept as floor(x + U), with a *dither* U, uniform on [0, 1), that the engine draws
//! for this entry and search and subtracts again when entries are summed. What remains is
//!
//! ```text
//! floor(x + U) - U + 1/2 = x + e,   e = 1/2 - frac(x + U)
//! ```
//!
//! and e is uniform on (-1/2, 1/2] whatever x is (subtractive dither: Schuchman, Dither signals and
//! their effect on quantization noise, 1964). So the errors of the G entries are independent of
//! each other and of everything the U do not depend on: rotation, probe and row. If U were not subtracted, the
//! distribution of an error would depend on the fraction of its x, hence on <w, v>, and the two might be
//! correlated: at the steps that are certified here, errors of the worst fractions would break the claim.
//!
//! Let E be `step` times the sum of the e, and suppose the estimate is at least <q, u> - E and is compared
//! with the tangent of the bound at a usual cosine o, for a floor tau' of at most tau and a cosine a'
//! of at most a:
//!
//! ```text
//! tau' a' - T k,   k = sqrt(1 - tau'²) (1 - o a') / sqrt(1 - o²),   tau' <= tau, a' <= a
//! ```
//!
//! The tangent rises with tau' too, so the argument about rising floors holds: take for tau' the
//! pair's own score, or the highest floor that dithered estimates are compared with, if that is lower.
//! Then k is fixed and independent of the U, even if the floor during the search was not.
//!
//! By (2) a mate is passed over only if sqrt(1 - tau²) sqrt(1 - a²) <w, v> < E - T k. The factor on
//! the left is at most k, since 1 - o a' >= sqrt(1 - o²) sqrt(1 - a'²). So, as long as E < T k,
//! <w, v> < -(T - E/k), which has a probability of at most F(T - E/k), given E, with F the right side
//! of (3). ln F is concave for t² >= 1 / (2 (m + 1)): it lies under its tangent at T, of slope -h with
//! h = 2 (m + 1) T / (1 - T²) + 1 / T. The mean of exp(s e) is sinh(s/2) / (s/2) <= exp(s² / 24), so
//!
//! ```text
//! P(miss) <= F(T) exp(h² G step² / (24 k²)) <= f F(T)   if step <= k sqrt(24 ln f / G) / h      (4)
//! ```
//!
//! as long as T - G step / (2 k) stays in the range in which ln F is concave. So T is the quantile of the miss probability
//! divided by f, `DITHER_FACTOR`; with 64 entries and 512 components a step may be a 27th of <w, v>'s
//! deviation.
//!
//! What is not exact is covered by slack, each term rounded to the safe side:
//! - Rows are rounded to f16 after the rotation. (1) is about the stored row and needs no slack;
//!   (2) is about the row before rounding, which is within [`row_rounding`] of the stored one.
//! - Lengths: ‖q‖ is within [`LENGTH_ERROR_MAX`] of 1, which the rotation ensures for every probe and
//!   row, whatever the embedding; so ‖x‖ <= 1 + 2^-10 for a stored row, as in `engine::dot::dot_slack`.
//! - f32 arithmetic of bounds and estimates: `ARITHMETIC_SLACK`.
//!
//! What is not covered: R is taken to be exact. Its entries and the sums of its images are rounded to f32,
//! which moves <q, u> by some parts in 10^6 (less than the half of `ARITHMETIC_SLACK` that is not used
//! otherwise), but it makes the last bits of a row, and with them now and then a bit of its code, a function
//! of R and not of y alone. Nobody can choose them without knowing R.
//!
//! Sources: the randomised argument is that of RaBitQ (Gao and Long, SIGMOD 2024, arXiv
//! 2405.12497), with the row's code fixed and the probe random, and an exact tail in place of
//! Hoeffding's; (1) is the spherical triangle inequality, used for exact search by Schubert (A
//! triangle inequality for cosine similarity, SISAP 2021, arXiv 2107.04071).
//!
//! Pure: numbers in, numbers out. Does not know engines, galleries or probes.

use crate::model::LENGTH_ERROR_MAX;

/// The largest probability of a miss that may be asked for, and the smallest.
pub const MISS_PROBABILITY_MAX: f64 = 1e-6;
/// See [`MISS_PROBABILITY_MAX`].
pub const MISS_PROBABILITY_MIN: f64 = 1e-15;
/// The miss probability if none is given.
pub const MISS_PROBABILITY_DEFAULT: f64 = 1e-12;
/// The passes that may pass a row over at random under a randomised certificate, of all engines together: the
/// CPU engine's over codebook codes and over 2-bit codes, the GPU engine's over 1-bit codes, and that of either
/// over 4-bit codes. Which of them see a row is decided by timing, by what passes, and by which engine answers,
/// so each has an equal part of the miss probability.
pub const PASSES: usize = 4;
/// Floors below this are not certified: the arguments need angles under 90 degrees.
pub const FLOOR_MIN: f64 = 0.02;
/// Largest length of a stored row and of a rotated probe, multiplied.
const NORMS_MAX: f64 = (1.0 + 1.0 / 1024.0) * (1.0 + LENGTH_ERROR_MAX);
/// The factor by which dithering may multiply a miss probability: the f of (4). With this one, steps for 256
/// components and more may be so coarse that the sum of eight entries fits a byte; coarser ones would
/// gain nothing, and a larger f would lower all bounds.
const DITHER_FACTOR: f64 = 1.26;
/// The highest floor that dithered estimates are compared with, so that the k of (4) is never small.
/// Hardly any non-mated row reaches the bound of this floor.
pub const DITHERED_FLOOR_MAX: f64 = 0.6;
/// More than the total error of f32 arithmetic on bounds and estimates. Values are at most a few
/// units and go through fewer than thirty roundings of 2^-24: 30 * 4 * 2^-24 < 2^-17.
const ARITHMETIC_SLACK: f64 = 1.0 / 65_536.0;

/// Why an answer is that of an exhaustive scan.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Certificate {
    /// No row at or above the floor can have been missed.
    #[default]
    Deterministic,
    /// A row at or above the floor is missed with at most this probability, over the choice of
    /// the secret rotation.
    Randomised {
        /// The probability, for each row that belongs in the answer.
        miss_probability: f64,
    },
}

impl Certificate {
    /// The randomised certificate of that probability.
    ///
    /// # Errors
    /// [`crate::model::Invalid`] if it is not from [`MISS_PROBABILITY_MIN`] to
    /// [`MISS_PROBABILITY_MAX`].
    pub fn randomised(miss_probability: f64) -> Result<Self, crate::model::Invalid> {
        if (MISS_PROBABILITY_MIN..=MISS_PROBABILITY_MAX).contains(&miss_probability) {
            Ok(Self::Randomised { miss_probability })
        } else {
            Err(crate::model::Invalid::new(
                "miss_probability",
                format!("{miss_probability:e} is not from {MISS_PROBABILITY_MIN:e} to {MISS_PROBABILITY_MAX:e}"),
            ))
        }
    }

    /// The largest probability that a row that belongs in the answer was missed.
    #[must_use]
    pub fn miss_probability(self) -> f64 {
        match self {
            Self::Deterministic => 0.0,
            Self::Randomised { miss_probability } => miss_probability,
        }
    }
}

impl std::fmt::Display for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Deterministic => f.write_str("deterministic"),
            Self::Randomised { miss_probability } => write!(f, "randomised:{miss_probability:e}"),
        }
    }
}

impl std::str::FromStr for Certificate {
    type Err = crate::model::Invalid;

    /// `deterministic`, `randomised` (of [`MISS_PROBABILITY_DEFAULT`]) or `randomised:P`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = |problem: String| crate::model::Invalid::new("certificate", problem);
        match text.split_once(':') {
            None if text == "deterministic" => Ok(Self::Deterministic),
            None if text == "randomised" => Ok(Self::Randomised { miss_probability: MISS_PROBABILITY_DEFAULT }),
            Some(("randomised", probability)) => {
                let probability = probability.parse().map_err(|_| bad(format!("{probability:?} is not a number")))?;
                Self::randomised(probability).map_err(|e| e.within("certificate"))
            }
            _ => Err(bad(format!("{text:?} is not deterministic, randomised or randomised:P"))),
        }
    }
}

/// Turns floors into bounds, for rows of one dimension under one certificate.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The quantile t, or 1 under the deterministic certificate.
    spread: f64,
    /// How far rounding may have moved the row, if that matters.
    moved: f64,
    dim: usize,
}

impl Bounds {
    /// The bounds of `certificate` for `dim` components.
    ///
    /// # Panics
    /// If `dim` is under 8: the sphere of (3) would have too few dimensions.
    #[must_use]
    pub fn new(certificate: Certificate, dim: usize) -> Self {
        match certificate {
            Certificate::Deterministic => Self { spread: 1.0, moved: 0.0, dim },
            Certificate::Randomised { miss_probability } => {
                Self { spread: sphere_quantile(dim, miss_probability), moved: row_rounding(dim), dim }
            }
        }
    }

    /// The bounds of `certificate` for estimates that may be dithered, in steps of at most
    /// [`Bounds::dither_step`] and for [`Bounds::dithered_bound`].
    #[must_use]
    pub fn dithered(certificate: Certificate, dim: usize) -> Self {
        match certificate {
            Certificate::Deterministic => Self::new(certificate, dim),
            Certificate::Randomised { miss_probability } => {
                Self::new(Certificate::Randomised { miss_probability: miss_probability / DITHER_FACTOR }, dim)
            }
        }
    }

    /// The largest step of estimates of <q, u> with `errors` dithered entries, compared with the tangent
    /// at the cosine `usual` for rows whose cosine counts as `max` at most. None under the deterministic
    /// certificate, for which dithering is not certified.
    #[must_use]
    pub fn dither_step(&self, errors: usize, usual: f32, max: f32) -> Option<f32> {
        if self.spread >= 1.0 || max >= 1.0 {
            return None;
        }
        let (t, usual, max) = (self.spread, f64::from(usual), f64::from(max));
        // 2 (m + 1) = n - 1 with n = dim - 1.
        let power = self.dim as f64 - 2.0;
        let slope = power * t / (1.0 - t * t) + 1.0 / t;
        let k = (1.0 - DITHERED_FLOOR_MAX.powi(2)).sqrt() * (1.0 - usual * max) / (1.0 - usual * usual).sqrt();
        let of_k = (24.0 * DITHER_FACTOR.ln() / errors as f64).sqrt() / slope;
        // ln F is concave over the whole range that the summed error can reach: half a step per entry.
        let of_k = of_k.min((t - power.recip().sqrt()) / (0.5 * errors as f64));
        // Reduced by what the arithmetic of steps may add.
        (of_k > 0.0).then_some((k * of_k * (1.0 - 1e-4)) as f32)
    }

    /// The bound of a floor for dithered estimates.
    #[must_use]
    pub fn dithered_bound(&self, floor: f64) -> Option<Bound> {
        self.bound(if floor > DITHERED_FLOOR_MAX { DITHERED_FLOOR_MAX } else { floor })
    }

    /// The bound of a floor, or none if the floor is so low that nothing can be certified.
    #[must_use]
    pub fn bound(&self, floor: f64) -> Option<Bound> {
        // A score of at least the floor, as a cosine between probe and (unrounded) row.
        let tau = ((floor - self.moved * NORMS_MAX) / NORMS_MAX).min(1.0);
        if floor.is_nan() || tau < FLOOR_MIN {
            return None;
        }
        let across = self.spread * (1.0 - tau * tau).sqrt();
        // The slack covers rounding these to f32.
        Some(Bound { along: tau as f32, across: across as f32, slack: ARITHMETIC_SLACK as f32 })
    }
}

/// What a code must reach: below [`Bound::least_product`] of its row's cosine, the row cannot matter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    along: f32,
    across: f32,
    slack: f32,
}

/// The angle between a row and its code, as bounds use it: the part of a unit vector along the code, and the part across.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CodeAngle {
    /// A lower bound of the cosine.
    pub along: f32,
    /// The sine that belongs to it.
    pub across: f32,
}

impl Bounds {
    /// What the row's rounding may have taken from the cosine.
    #[must_use]
    pub fn loss(&self) -> f32 {
        // ‖y‖ <y/‖y‖, u> differs from <x, u> by at most `moved`, and so do the lengths.
        (2.0 * self.moved) as f32
    }

    /// The angle for a cosine between row and code (at most the true one), with the slack for
    /// the row's rounding.
    #[inline]
    #[must_use]
    pub fn angle(&self, cosine: f32) -> CodeAngle {
        let along = (cosine - self.loss()).max(0.0);
        CodeAngle { along, across: (1.0 - along * along).max(0.0).sqrt() }
    }
}

impl Bound {
    /// The least <q, u> of a row that reaches the floor. Rises with the cosine, so that a lower
    /// bound of many cosines gives a lower bound of their products.
    #[inline]
    #[must_use]
    pub fn least_product(&self, angle: CodeAngle) -> f32 {
        self.scaled_least_product(angle.along, angle.across, 1.0)
    }

    /// The least <q, c> for a code of length `norm`; the parts of the angle have been multiplied by it.
    #[inline]
    #[must_use]
    pub fn scaled_least_product(&self, along: f32, across: f32, norm: f32) -> f32 {
        self.along * along - self.across * across - self.slack * norm
    }

    /// Value and slope at `cosine` of the tangent of the least product, as a function of a row's cosine
    /// less [`Bounds::loss`]. The function is convex, so the tangent is nowhere above it.
    #[inline]
    #[must_use]
    pub fn tangent(&self, cosine: f32) -> (f32, f32) {
        let sine = (1.0 - cosine * cosine).sqrt();
        (self.along * cosine - self.across * sine - self.slack, self.along + self.across * cosine / sine)
    }

    /// The factors of the part along, the part across, and the length.
    #[must_use]
    pub fn parts(&self) -> (f32, f32, f32) {
        (self.along, self.across, self.slack)
    }
}

/// A bound on the distance between a unit vector and itself rounded to f16: half an ulp, 2^-11, of
/// every component in the normal range, and 2^-25 of every one below.
#[must_use]
pub fn row_rounding(dim: usize) -> f64 {
    (1.0 / 2048.0) * (1.0 + 1e-5) + (dim as f64).sqrt() / f64::from(1 << 25)
}

/// A number t with P(z > t) <= `probability` for one coordinate z of a uniform point of the unit
/// sphere in `dim` - 1 dimensions; less than 1 % above the least such t for probabilities up to
/// [`MISS_PROBABILITY_MAX`].
#[must_use]
pub fn sphere_quantile(dim: usize, probability: f64) -> f64 {
    assert!(dim >= 8, "dimension {dim}");
    assert!(probability > 0.0 && probability < 0.5, "probability {probability}");
    let n = dim as f64 - 1.0;
    let m = (n - 3.0) / 2.0;
    let ln_c = 0.5 * ((n - 1.0) / std::f64::consts::TAU).ln();
    // The logarithm of (3): falls as t grows.
    let ln_tail = |t: f64| ln_c + (m + 1.0) * (-t * t).ln_1p() - (2.0 * t * (m + 1.0)).ln();
    let (mut low, mut high) = (1e-9, 1.0 - 1e-15);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if ln_tail(middle) > probability.ln() { low = middle } else { high = middle }
    }
    // Logarithms are right to some parts in 10^15, and change tens of times as much as t.
    (high * (1.0 + 1e-9)).min(1.0)
}

#[cfg(test)]
mod tests;
