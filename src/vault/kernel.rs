//! The matrix product behind a rotation, for the vector units of the machine.
//!
//! Each output is the sum of its products in the order of the inputs, with a rounded multiplication and a
//! rounded addition each: the width of vectors and the grouping of outputs do not change a bit, but a
//! fused multiply-add would. So every kernel here gives the same bits as the portable one.

/// Outputs whose coefficients are stored together. Dimensions are multiples of it.
pub(super) const PANEL: usize = 32;
const _: () = assert!(crate::model::DIM_STEP.is_multiple_of(PANEL));

/// Vectors that are multiplied with the whole matrix before the next ones: they stay in the level-2
/// cache while the matrix streams through it.
const BLOCK: usize = 64;

/// One panel of outputs for some vectors: `(panel, dim, vectors, out)`, `out` beginning at the
/// panel's first output of the first vector and `dim` apart.
pub(super) type Kernel = fn(&[f32], usize, &[f32], &mut [f32]);

/// `out[n][i] = sum over j of R[i][j] * vectors[n][j]`. Shapes: `panels` `[dim / PANEL, dim, PANEL]`,
/// `vectors` and `out` `[count, dim]`.
pub(super) fn rotate_many(panels: &[f32], dim: usize, vectors: &[f32], out: &mut [f32]) {
    rotate_with(best(), panels, dim, vectors, out);
}

/// [`rotate_many`] by a given kernel.
pub(super) fn rotate_with(kernel: Kernel, panels: &[f32], dim: usize, vectors: &[f32], out: &mut [f32]) {
    assert!(dim.is_multiple_of(PANEL) && panels.len() == dim * dim && vectors.len() == out.len());
    for (vectors, out) in vectors.chunks(BLOCK * dim).zip(out.chunks_mut(BLOCK * dim)) {
        for (p, panel) in panels.chunks_exact(PANEL * dim).enumerate() {
            kernel(panel, dim, vectors, &mut out[p * PANEL..]);
        }
    }
}

/// The widest kernel that this processor supports.
fn best() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            return x86::avx512;
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            return x86::avx2;
        }
    }
    portable
}

/// The definition.
fn portable(panel: &[f32], dim: usize, vectors: &[f32], out: &mut [f32]) {
    for (vector, out) in vectors.chunks_exact(dim).zip(out.chunks_mut(dim)) {
        let mut sums = [0.0_f32; PANEL];
        for (coefficients, x) in panel.chunks_exact(PANEL).zip(vector) {
            for (sum, r) in sums.iter_mut().zip(coefficients) {
                *sum += r * x;
            }
        }
        out[..PANEL].copy_from_slice(&sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Versions of `portable` that keep the sums of several vectors in registers.

    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
        _mm512_add_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::PANEL;

    macro_rules! kernel {
        ($entry:ident, $all:ident, $some:ident, $feature:tt, $lanes:literal, $wide:literal, $together:literal,
         $zero:ident, $load:ident, $store:ident, $set:ident, $mul:ident, $add:ident) => {
            /// `portable` in wider registers.
            pub(super) fn $entry(panel: &[f32], dim: usize, vectors: &[f32], out: &mut [f32]) {
                assert!(std::arch::is_x86_feature_detected!($feature));
                // SAFETY: the processor has the feature.
                unsafe { $all(panel, dim, vectors, out) }
            }

            #[target_feature(enable = $feature)]
            fn $all(panel: &[f32], dim: usize, vectors: &[f32], out: &mut [f32]) {
                let count = vectors.len() / dim;
                let mut first = 0;
                while first + $together <= count {
                    $some::<$together>(panel, dim, &vectors[first * dim..], &mut out[first * dim..]);
                    first += $together;
                }
                while first < count {
                    $some::<1>(panel, dim, &vectors[first * dim..], &mut out[first * dim..]);
                    first += 1;
                }
            }

            /// `N` vectors. `$wide` registers of `$lanes` outputs are summed for each at a time.
            #[target_feature(enable = $feature)]
            fn $some<const N: usize>(panel: &[f32], dim: usize, vectors: &[f32], out: &mut [f32]) {
                const STEP: usize = $lanes * $wide;
                const { assert!(PANEL.is_multiple_of(STEP)) };
                assert!(panel.len() == PANEL * dim && vectors.len() >= N * dim && out.len() >= (N - 1) * dim + PANEL);
                for offset in (0..PANEL).step_by(STEP) {
                    let mut sums = [[$zero(); $wide]; N];
                    for j in 0..dim {
                        let mut coefficients = [$zero(); $wide];
                        for (w, c) in coefficients.iter_mut().enumerate() {
                            // SAFETY: ends at PANEL * j + offset + STEP <= PANEL * dim floats.
                            *c = unsafe { $load(panel.as_ptr().add(PANEL * j + offset + $lanes * w)) };
                        }
                        for (n, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: n < N and j < dim, and there are N * dim floats.
                            let x = $set(unsafe { *vectors.get_unchecked(n * dim + j) });
                            for (sum, c) in sums.iter_mut().zip(coefficients) {
                                *sum = $add(*sum, $mul(c, x));
                            }
                        }
                    }
                    for (n, sums) in sums.iter().enumerate() {
                        for (w, sum) in sums.iter().enumerate() {
                            // SAFETY: ends at n * dim + offset + STEP <= (N - 1) * dim + PANEL floats.
                            unsafe { $store(out.as_mut_ptr().add(n * dim + offset + $lanes * w), *sum) };
                        }
                    }
                }
            }
        };
    }

    kernel!(
        avx512,
        avx512_all,
        avx512_some,
        "avx512f",
        16,
        2,
        8,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_mul_ps,
        _mm512_add_ps
    );
    kernel!(
        avx2,
        avx2_all,
        avx2_some,
        "avx2",
        8,
        2,
        6,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_mul_ps,
        _mm256_add_ps
    );
}

/// The kernels this machine runs, by name.
#[cfg(test)]
pub(super) fn all() -> Vec<(&'static str, Kernel)> {
    let mut kernels: Vec<(&'static str, Kernel)> = vec![("portable", portable)];
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") {
            kernels.push(("avx2", x86::avx2));
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            kernels.push(("avx512f", x86::avx512));
        }
    }
    kernels.push(("best", best()));
    kernels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_equals_the_definition_to_the_bit() {
        // Numbers of many magnitudes, so that another order of additions or a fused one shows.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mantissa = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            mantissa * [1.0, 1e-3, 30.0, 1e-6][(state >> 37) as usize & 3]
        };
        for dim in [32, 96, 512] {
            let panels: Vec<f32> = (0..dim * dim).map(|_| number()).collect();
            for count in [0, 1, 5, 6, 7, 8, 17, 64, 65, 71] {
                let vectors: Vec<f32> = (0..count * dim).map(|_| number()).collect();
                // By the definition in the docs, one output at a time.
                let expected: Vec<f32> = (0..count * dim)
                    .map(|at| {
                        let (n, i) = (at / dim, at % dim);
                        let coefficient = |j| panels[(i / PANEL * dim + j) * PANEL + i % PANEL];
                        (0..dim).fold(0.0, |sum, j| sum + coefficient(j) * vectors[n * dim + j])
                    })
                    .collect();
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                for (name, kernel) in all() {
                    let mut out = vec![f32::NAN; count * dim];
                    rotate_with(kernel, &panels, dim, &vectors, &mut out);
                    assert!(bits(&out) == bits(&expected), "{name}, dim {dim}, {count} vectors");
                }
            }
        }
    }
}
