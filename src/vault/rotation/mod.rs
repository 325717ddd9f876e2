//! The secret rotation R: a dim x dim orthogonal matrix, uniform among all (Haar), made from the
//! vault's seed.
//!
//! A Haar matrix is the Q of the QR decomposition of a matrix of independent Gaussians, once the
//! diagonal of R is made positive (F. Mezzadri, "How to generate random matrices from the classical
//! compact groups", Notices of the AMS 54, 2007). The k-th Householder reflection of that
//! decomposition sees a vector that is again independent and Gaussian, so the matrix need not be
//! factored at all: Q is the product of reflections of fresh Gaussian vectors of falling length
//! (G. W. Stewart, "The efficient generation of random orthogonal matrices", SIAM J. Numer. Anal.
//! 17, 1980). That halves the randomness and the work, and makes every column of Q a computation of
//! its own, which is how the work is divided among threads.
//!
//! The same seed gives the same bits everywhere: only + - * / and sqrt of IEEE 754, the logarithm
//! of `libm` (written in these), sums in a fixed order, and never a fused multiply-add. Threads and
//! vector widths change nothing. Anything else would lock a gallery to the machine that made it.

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use rayon::prelude::*;
use zeroize::Zeroizing;

use crate::model::{Invalid, LENGTH_ERROR_MAX, TemplateRow, checked_dim};
use crate::vault::kernel::{self, PANEL};
use crate::vault::locked::Locked;
use crate::vault::{Purpose, Vault};

/// Partial sums of a dot product, added up in a fixed tree.
const LANES: usize = 8;
/// Columns that are made together, so that a reflection is read once for all of them.
const GROUP: usize = 8;

/// A secret rotation of embeddings.
///
/// It keeps lengths and angles, except for rounding. An image that its f32 sums have made longer or
/// shorter than its vector by half of [`LENGTH_ERROR_MAX`] is scaled, so that every image of a unit vector
/// in f32 is within `LENGTH_ERROR_MAX` of length 1: certificates rely on it. (Sums of 2048
/// components can be off by more, for vectors that are almost rows of the secret matrix.) An inner
/// product of two images is within 2e-6 of that of their vectors in tests over dimensions 32 to 2048;
/// the proven bound is `dim * 2^-23`.
pub struct Rotation {
    dim: usize,
    /// Panels of `PANEL` outputs; in each, for every input in turn, the panel's coefficients.
    /// Shape: `[dim / PANEL, dim, PANEL]`.
    panels: Locked<f32>,
}

impl Rotation {
    /// Makes the rotation of `dim` dimensions that belongs to this vault. Uses rayon's threads; the
    /// result does not depend on how many.
    ///
    /// # Errors
    /// [`Invalid`] if no gallery can have that dimension.
    pub fn new(vault: &Vault, dim: usize) -> Result<Self, Invalid> {
        checked_dim(dim)?;
        let context = u32::try_from(dim).expect("dimensions are small").to_le_bytes();
        let seed = vault.derive(Purpose::RotationSeed, &context);
        Ok(Self::from_seed(&seed, dim))
    }

    fn from_seed(seed: &[u8; 32], dim: usize) -> Self {
        let reflections = Reflections::draw(&mut Gaussians::new(seed), dim);
        let mut panels = Locked::<f32>::zeroed(dim * dim);
        let mut columns = Zeroizing::new(vec![0.0_f64; dim * dim]);
        columns.par_chunks_mut(GROUP * dim).enumerate().for_each(|(g, group)| reflections.columns(g * GROUP, group));
        panels.par_chunks_mut(PANEL * dim).enumerate().for_each(|(p, panel)| {
            for (j, coefficients) in panel.chunks_exact_mut(PANEL).enumerate() {
                for (to, from) in coefficients.iter_mut().zip(&columns[j * dim + p * PANEL..]) {
                    #[expect(clippy::cast_possible_truncation, reason = "an entry rounds to f32")]
                    {
                        *to = *from as f32;
                    }
                }
            }
        });
        Self { dim, panels }
    }

    /// Components of a vector.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The vector, rotated. Shape: `[dim]` in and out.
    ///
    /// # Panics
    /// If the vector has another dimension.
    #[must_use]
    pub fn rotate(&self, vector: &[f32]) -> Vec<f32> {
        assert_eq!(vector.len(), self.dim, "a rotation rotates vectors of its own dimension");
        let mut out = vec![0.0; self.dim];
        self.rotate_many(vector, &mut out);
        out
    }

    /// Rotates many vectors on this thread: bit for bit the same as one by one, but faster. Shape of
    /// `vectors` and `out`: `[count, dim]`.
    ///
    /// # Panics
    /// If the shapes are different.
    pub fn rotate_many(&self, vectors: &[f32], out: &mut [f32]) {
        assert!(vectors.len().is_multiple_of(self.dim), "whole vectors are rotated");
        assert_eq!(vectors.len(), out.len(), "as many vectors come out as go in");
        kernel::rotate_many(&self.panels, self.dim, vectors, out);
        for (vector, image) in vectors.chunks_exact(self.dim).zip(out.chunks_exact_mut(self.dim)) {
            keep_length(vector, image);
        }
    }
}

/// Scales an image whose length is off by more than half of [`LENGTH_ERROR_MAX`]. The other half covers
/// what rounding to f32 does to the length of a unit vector and of a scaled image: 2^-24 each.
fn keep_length(vector: &[f32], image: &mut [f32]) {
    let square = |values: &[f32]| values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let (wanted, found) = (square(vector), square(image));
    // Squares are off by twice as much as lengths.
    if (found / wanted - 1.0).abs() > LENGTH_ERROR_MAX {
        let scale = (wanted / found).sqrt();
        #[expect(clippy::cast_possible_truncation, reason = "a component rounds to f32")]
        image.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
    }
}

impl std::fmt::Debug for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rotation").field("dim", &self.dim).finish_non_exhaustive()
    }
}

/// A rotated vector as the index stores it: rounded to f16, to nearest, ties to even.
#[must_use]
pub fn to_row(rotated: &[f32]) -> TemplateRow {
    let mut row = vec![f16::ZERO; rotated.len()].into_boxed_slice();
    row.convert_from_f32_slice(rotated);
    TemplateRow(row)
}

/// Independent standard normal numbers, by Marsaglia's polar method (G. Marsaglia and T. A. Bray,
/// "A convenient method for generating normal variables", SIAM Review 6, 1964).
struct Gaussians {
    rng: ChaCha20Rng,
    /// Numbers are made in pairs; this is the second one.
    second: Option<f64>,
}

impl Gaussians {
    fn new(seed: &[u8; 32]) -> Self {
        Self { rng: ChaCha20Rng::from_seed(*seed), second: None }
    }

    fn next(&mut self) -> f64 {
        if let Some(second) = self.second.take() {
            return second;
        }
        loop {
            let (x, y) = (self.symmetric(), self.symmetric());
            let s = x * x + y * y;
            if s < 1.0 && s > 0.0 {
                let scale = (-2.0 * libm::log(s) / s).sqrt();
                self.second = Some(y * scale);
                return x * scale;
            }
        }
    }

    /// Uniform in [-1, 1), a multiple of 2^-52.
    fn symmetric(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64")]
        let integer = (self.rng.next_u64() >> 11) as f64;
        integer * (1.0 / 4_503_599_627_370_496.0) - 1.0
    }
}

/// The Householder reflections whose product is Q, and the signs on its right.
struct Reflections {
    dim: usize,
    /// Reflection k acts on coordinates from k: its vector is `[dim - k]` long, the rest is unused.
    /// Shape: `[dim, dim]`.
    vectors: Zeroizing<Vec<f64>>,
    /// 2 / (v . v) for each vector v.
    scales: Vec<f64>,
    /// The signs that make the diagonal of R positive.
    signs: Vec<f64>,
}

impl Reflections {
    fn draw(gaussians: &mut Gaussians, dim: usize) -> Self {
        let mut vectors = Zeroizing::new(vec![0.0; dim * dim]);
        let (mut scales, mut signs) = (Vec::with_capacity(dim), Vec::with_capacity(dim));
        for k in 0..dim {
            let v = &mut vectors[k * dim..][..dim - k];
            v.iter_mut().for_each(|x| *x = gaussians.next());
            // v = x + sign(x_0) |x| e_0 sends x to -sign(x_0) |x| e_0, without cancellation.
            let length = dot(v, v).sqrt();
            let sign = if v[0] < 0.0 { -1.0 } else { 1.0 };
            v[0] += sign * length;
            scales.push(2.0 / dot(v, v));
            signs.push(-sign);
        }
        Self { dim, vectors, scales, signs }
    }

    /// Columns of Q from the `first`. `columns` holds zeros. Shape: `[some, dim]`.
    fn columns(&self, first: usize, columns: &mut [f64]) {
        let some = columns.len() / self.dim;
        for (j, column) in (first..).zip(columns.chunks_exact_mut(self.dim)) {
            column[j] = self.signs[j];
        }
        // A reflection after the j-th acts on coordinates of column j that are zero, and leaves
        // them zero: reflections after the last column are skipped, those in between change nothing.
        for k in (0..first + some).rev() {
            let v = &self.vectors[k * self.dim..][..self.dim - k];
            for column in columns.chunks_exact_mut(self.dim) {
                let tail = &mut column[k..];
                let factor = self.scales[k] * dot(v, tail);
                for (x, v) in tail.iter_mut().zip(v) {
                    *x -= factor * v;
                }
            }
        }
    }
}

/// The inner product, in `LANES` partial sums and a fixed order.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for ((sum, a), b) in sums.iter_mut().zip(a.remainder()).zip(b.remainder()) {
        *sum += a * b;
    }
    for (a, b) in a.zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7] = sums;
    ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
}

#[cfg(test)]
mod tests;
