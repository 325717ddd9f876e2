//! The comparison score: the one number that ranks and decides, the same to the bit everywhere.
//!
//! The score of a stored row and a rotated probe is their dot product, summed in f64 in this
//! order and no other:
//!
//! 1. [`LANES`] accumulators start at +0; component `i` is added to accumulator `i % LANES`, by
//!    ascending `i`.
//! 2. The upper half of the accumulators is added to the lower half, lane by lane, until one is
//!    left.
//!
//! A product of an f16 and an f32 has at most 11 + 24 bits and an exponent far inside f64's, so
//! it is exact and a fused multiply-add gives the same bits as a multiplication and an addition.
//! Only the order of the additions could make a difference, and it is fixed above. So every kernel
//! here returns the same bits, and every machine responds with the same scores.
//!
//! Knows numbers only: no rows of a gallery, no thresholds, no engines.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::sync::OnceLock;

use half::f16;

use crate::simd::{self, Simd};

/// Accumulators of the sum. Rows and probes are multiples of this long.
pub const LANES: usize = 16;

/// A kernel of one path: (row, probe) to score.
type Kernel = unsafe fn(&[f16], &[f32]) -> f64;

/// The score of one stored row against one rotated probe.
///
/// `row` and `probe` are `[dim]`, `dim` a multiple of [`LANES`], all values finite.
///
/// # Panics
/// If the lengths differ or are not a multiple of [`LANES`].
#[must_use]
pub fn exact(row: &[f16], probe: &[f32]) -> f64 {
    assert_eq!(row.len(), probe.len(), "a row and a probe of one dimension");
    assert!(row.len().is_multiple_of(LANES), "a dimension in whole lanes");
    let kernel = kernel();
    // SAFETY: `kernel()` returns one that this processor can run.
    unsafe { kernel(row, probe) }
}

/// The kernel of this process, chosen once. If a path is forced that cannot run here, the engine that asks
/// for it reports that; the score takes the best path, since its bits are the same on every path.
fn kernel() -> Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    *KERNEL.get_or_init(|| kernel_of(simd::chosen().unwrap_or_else(|_| Simd::best())))
}

/// The kernel of `path`, which this processor must be able to run.
fn kernel_of(path: Simd) -> Kernel {
    match path {
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512Vbmi | Simd::Avx512Bf16 | Simd::Avx512 => avx512::exact,
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => avx2::exact,
        _ => portable,
    }
}

/// The definition, on plain slices; tests compare the other kernels with it.
fn portable(row: &[f16], probe: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    for (row, probe) in row.chunks_exact(LANES).zip(probe.chunks_exact(LANES)) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(row[lane].to_f32()) * f64::from(probe[lane]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Written from the module's documentation alone, index by index.
    fn twin(row: &[f16], probe: &[f32]) -> f64 {
        let mut sums = [0.0_f64; 16];
        for i in 0..row.len() {
            let product = f64::from(row[i]) * f64::from(probe[i]);
            sums[i % 16] += product;
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
        }
        sums[0]
    }

    fn paths() -> impl Iterator<Item = (Simd, Kernel)> {
        Simd::ALL.into_iter().filter(|path| path.is_available()).map(|path| (path, kernel_of(path)))
    }

    fn check(row: &[f16], probe: &[f32], what: &str) {
        let expected = twin(row, probe).to_bits();
        for (path, kernel) in paths() {
            // SAFETY: only paths this processor can run.
            let found = unsafe { kernel(row, probe) };
            assert_eq!(found.to_bits(), expected, "{path}, {what}: {found}");
        }
        assert_eq!(exact(row, probe).to_bits(), expected, "{what}");
    }

    #[test]
    fn every_path_gives_the_bits_of_the_definition_on_random_rows() {
        for seed in 0..200 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let dim = 32 * rng.random_range(1..=64);
            let row: Vec<f16> = (0..dim).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect();
            let probe: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            check(&row, &probe, &format!("seed {seed}, dim {dim}"));
        }
    }

    #[test]
    fn every_path_gives_the_bits_of_the_definition_on_every_finite_bit_pattern() {
        for seed in 0..400 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let dim = 32 * rng.random_range(1..=8);
            let row: Vec<f16> = (0..dim)
                .map(|_| {
                    loop {
                        let value = f16::from_bits(rng.random());
                        if value.is_finite() {
                            break value;
                        }
                    }
                })
                .collect();
            let probe: Vec<f32> = (0..dim)
                .map(|_| {
                    loop {
                        let value = f32::from_bits(rng.random());
                        if value.is_finite() {
                            break value;
                        }
                    }
                })
                .collect();
            check(&row, &probe, &format!("seed {seed}, dim {dim}"));
        }
    }

    #[test]
    fn every_path_gives_the_bits_of_the_definition_at_the_edges() {
        let rows = [
            f16::MAX,
            f16::MIN,
            f16::from_bits(1),
            f16::from_bits(0x8001),
            f16::from_bits(0x03ff),
            f16::MIN_POSITIVE,
            f16::ZERO,
            f16::NEG_ZERO,
        ];
        let probes =
            [f32::MAX, f32::MIN, f32::from_bits(1), f32::from_bits(0x8000_0001), f32::MIN_POSITIVE, 1.0, 0.0, -0.0];
        for row in rows {
            for probe in probes {
                check(&[row; 64], &[probe; 64], &format!("{row:?} x {probe:?}"));
            }
        }
        // Cancellation leaves only what the order of the sum leaves.
        let row: Vec<f16> = (0..256).map(|i| f16::from_f32([1.0, -1.0, 1e-7, 3e-5][(i / 16) % 4])).collect();
        let probe: Vec<f32> = (0..256_u16).map(|i| 1.0 + f32::from(i) * 1e-6).collect();
        check(&row, &probe, "cancellation");
    }

    #[test]
    fn a_sum_of_negative_zeros_is_positive_zero() {
        let score = exact(&[f16::NEG_ZERO; 32], &[1.0; 32]);
        assert_eq!(score.to_bits(), 0.0_f64.to_bits());
    }

    #[test]
    fn the_order_of_the_sum_is_the_published_one() {
        // Lanes 0 and 8 meet first: 1e16 - 1e16 leaves room for the 1 in lane 4.
        let mut row = [f16::ZERO; 32];
        let mut probe = [0.0_f32; 32];
        (row[0], probe[0]) = (f16::ONE, 1e16);
        (row[8], probe[8]) = (f16::ONE, -1e16);
        (row[4], probe[4]) = (f16::ONE, 1.0);
        check(&row, &probe, "lanes 0, 8 and 4");
        assert_eq!(exact(&row, &probe), 1.0);
        // Lanes 0 and 4 meet before lanes 0 and 2.
        (row[8], probe[8]) = (f16::ZERO, 0.0);
        (row[2], probe[2]) = (f16::ONE, -1e16);
        check(&row, &probe, "lanes 0, 2 and 4");
        assert_eq!(exact(&row, &probe), 0.0);
    }
}
