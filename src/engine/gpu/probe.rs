//! A probe as the kernels multiply it: eight-bit integers, a scale, and a bound on what they miss.
//!
//! Pure; knows levels and layouts, no device. Packs probes for each kernel.

use half::f16;
use zeroize::Zeroizing;

use super::kernels::Kernel;
use super::level::{Level, QUAD};

/// A rotated probe q = scale * k + e, with whole numbers k of at most 127.
///
/// For a code c of length n, u = c / n: <q, u> = scale <k, c> / n + <e, u> <= scale <k, c> / n + ‖e‖.
/// With the unsigned integers m that codes keep, c = factor m + constant, so that <k, c> = base +
/// factor <k, m>: integers of at most 15 * 127 * 2048 < 2^24, exact in i32 and in f32.
#[derive(Debug, Clone)]
pub(super) struct Quantised {
    integers: Zeroizing<Vec<i8>>,
    /// The scale.
    pub scale: f32,
    sum: i32,
    /// At least ‖e‖.
    pub error: f64,
}

impl Quantised {
    /// Rounds every component to the nearest whole number of steps.
    pub(super) fn new(probe: &[f32]) -> Self {
        let largest = probe.iter().fold(0.0_f32, |most, q| most.max(q.abs()));
        // A probe of zeros has no scale, and any will do.
        let scale = (largest / 127.0).max(1e-20);
        let integers: Vec<i8> = probe.iter().map(|q| (q / scale).round() as i8).collect();
        let square: f64 =
            probe.iter().zip(&integers).map(|(q, k)| (f64::from(*q) - f64::from(scale) * f64::from(*k)).powi(2)).sum();
        let sum = integers.iter().map(|k| i32::from(*k)).sum();
        // The sum of squares is right to some parts in 10^13.
        Self { integers: integers.into(), scale, sum, error: square.sqrt() * (1.0 + 1e-9) }
    }

    /// What is added to factor times the dot product.
    pub(super) fn base(&self, level: Level) -> i32 {
        match level {
            Level::OneBit => self.sum,
            Level::FourBit => -15 * self.sum,
        }
    }

    /// The integer of a component; zero beyond the last.
    pub(super) fn integer(&self, component: usize) -> i8 {
        self.integers.get(component).copied().unwrap_or(0)
    }

    /// The words that the `nth` spread of a quad is multiplied with.
    fn words(&self, level: Level, quad: usize, nth: usize) -> [u32; QUAD] {
        let dim = self.integers.len();
        std::array::from_fn(|word| {
            let byte = |byte| self.integer(level.component(dim, quad, nth, word, byte)).cast_unsigned();
            u32::from_le_bytes(std::array::from_fn(byte))
        })
    }
}

/// A batch of probes as a kernel reads them, padded with zeros.
pub(super) fn pack(kernel: Kernel, level: Level, probes: &[&Quantised], dim: usize) -> Zeroizing<Vec<u32>> {
    let wide = kernel.tile_probes();
    let padded = kernel.padded(probes.len());
    let (quads, spreads) = (level.quads(dim), level.spreads());
    match kernel {
        Kernel::Few { .. } => {
            let mut packed = Zeroizing::new(look(level, probes, dim).to_vec());
            packed.resize(padded * quads * spreads * QUAD, 0);
            packed
        }
        Kernel::Many => {
            let mut packed = Zeroizing::new(vec![0; padded * quads * spreads * QUAD]);
            for (number, probe) in probes.iter().enumerate() {
                let (tile, column) = (number / wide, number % wide);
                for (quad, nth) in (0..quads).flat_map(|quad| (0..spreads).map(move |nth| (quad, nth))) {
                    let at = (((tile * quads + quad) * spreads + nth) * wide + column) * QUAD;
                    packed[at..at + QUAD].copy_from_slice(&probe.words(level, quad, nth));
                }
            }
            packed
        }
        Kernel::Coop { .. } => {
            let chunks = dim / 32;
            let halves: [u32; 256] =
                std::array::from_fn(|byte| f16::from_f32(f32::from((byte as u8).cast_signed())).to_bits().into());
            let mut packed = Zeroizing::new(vec![0; padded * dim / 2]);
            for (number, probe) in probes.iter().enumerate() {
                let (tile, column) = (number / wide, number % wide);
                for chunk in 0..chunks {
                    let at = ((tile * chunks + chunk) * wide + column) * 16;
                    for (pair, word) in packed[at..at + 16].iter_mut().enumerate() {
                        let integer = |place| probe.integer(level.unpacked(dim, chunk, place));
                        let half = |place| halves[usize::from(integer(place).cast_unsigned())];
                        *word = half(2 * pair) | half(2 * pair + 1) << 16;
                    }
                }
            }
            packed
        }
    }
}

/// Probe after probe, as `scan_few` and `look` read them.
pub(super) fn look(level: Level, probes: &[&Quantised], dim: usize) -> Zeroizing<Vec<u32>> {
    let (quads, spreads) = (level.quads(dim), level.spreads());
    let mut packed = Zeroizing::new(Vec::with_capacity(probes.len() * quads * spreads * QUAD));
    for probe in probes {
        for (quad, nth) in (0..quads).flat_map(|quad| (0..spreads).map(move |nth| (quad, nth))) {
            packed.extend(probe.words(level, quad, nth));
        }
    }
    packed
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
                let quantised = Quantised::new(&probe);
                // The code along the error is the worst there is.
                let errors: Vec<f64> = (0..dim)
                    .map(|i| f64::from(probe[i]) - f64::from(quantised.scale) * f64::from(quantised.integer(i)))
                    .collect();
                let length = errors.iter().map(|e| e * e).sum::<f64>().sqrt();
                assert!(length <= quantised.error, "dim {dim}");
                assert!(quantised.error <= length * 1.000_001 + 1e-12, "dim {dim}");
                worst = worst.max(quantised.error);
                let sum: i32 = (0..dim).map(|i| i32::from(quantised.integer(i))).sum();
                assert_eq!((quantised.base(Level::OneBit), quantised.base(Level::FourBit)), (sum, -15 * sum));
            }
            assert!(worst < 0.012, "dim {dim}: {worst}");
        }
    }
}
