//! A probe in eight bits, for exact integer products with codes.
//!
//! Pure. Does not know how codes or kernels lay out their components.

use zeroize::Zeroizing;

/// A rotated probe q = scale * k + e, with whole numbers k from -127 to 127.
///
/// For a code c of length n, with u = c / n: <q, u> = scale <k, c> / n + <e, u> <= scale <k, c> / n + ‖e‖.
/// Codes keep their components as unsigned integers m, c = factor * m + constant, so that <k, c> is
/// factor * <k, m> + constant * [`QuantisedProbe::sum`]: integers of at most 15 * 127 * 2048 < 2^24, exact in
/// i32 and in f32.
#[derive(Debug, Clone)]
pub(super) struct QuantisedProbe {
    integers: Zeroizing<Vec<i8>>,
    scale: f32,
    sum: i32,
    error: f64,
}

impl QuantisedProbe {
    /// Rounds every component to the nearest whole number of steps.
    pub(super) fn new(probe: &[f32]) -> Self {
        let largest = probe.iter().fold(0.0_f32, |largest, q| largest.max(q.abs()));
        // A probe of zeros fits any scale.
        let scale = (largest / 127.0).max(1e-20);
        let integers: Vec<i8> = probe.iter().map(|q| (q / scale).round() as i8).collect();
        let square: f64 =
            probe.iter().zip(&integers).map(|(q, k)| (f64::from(*q) - f64::from(scale) * f64::from(*k)).powi(2)).sum();
        let sum = integers.iter().map(|k| i32::from(*k)).sum();
        // The sum of squares is right to some parts in 10^13.
        Self { integers: integers.into(), scale, sum, error: square.sqrt() * (1.0 + 1e-9) }
    }

    /// The integers k. Shape: `[dim]`.
    pub(super) fn integers(&self) -> &[i8] {
        &self.integers
    }

    /// What one step of the integers stands for.
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// The sum of the integers.
    pub(super) fn sum(&self) -> i32 {
        self.sum
    }

    /// At least ‖e‖.
    pub(super) fn error(&self) -> f64 {
        self.error
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn integers_a_scale_and_an_error_bound_every_product_from_above_and_closely() {
        for dim in [32, 512, 2048] {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            let mut worst = 0.0_f64;
            for round in 0..50 {
                let mut probe: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0_f32..1.0)).collect();
                if round == 0 {
                    probe.fill(0.0);
                    probe[7] = -1.0;
                }
                let norm = probe.iter().map(|v| v * v).sum::<f32>().sqrt();
                probe.iter_mut().for_each(|v| *v /= norm);
                let quantised = QuantisedProbe::new(&probe);
                // A code in the direction of the error is the worst case.
                let errors = probe.iter().zip(quantised.integers());
                let errors = errors.map(|(q, k)| f64::from(*q) - f64::from(quantised.scale()) * f64::from(*k));
                let length = errors.map(|e| e * e).sum::<f64>().sqrt();
                assert!(length <= quantised.error(), "dim {dim}");
                assert!(quantised.error() <= length * 1.000_001 + 1e-12, "dim {dim}");
                worst = worst.max(quantised.error());
                assert_eq!(quantised.sum(), quantised.integers().iter().map(|k| i32::from(*k)).sum::<i32>());
            }
            assert!(worst < 0.012, "dim {dim}: {worst}");
        }
        let zeros = QuantisedProbe::new(&[0.0; 32]);
        assert_eq!((zeros.sum(), zeros.error().to_bits()), (0, 0.0_f64.to_bits()));
        assert!(zeros.scale() > 0.0);
    }
}
