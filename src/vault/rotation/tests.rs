//! Is it orthogonal, is it Haar, is it the same everywhere?

use sha2::{Digest as _, Sha256};

use super::*;
use crate::vault::MasterKey;
use crate::vault::tests::processor_time;

fn rotation(key: u8, dim: usize) -> Rotation {
    Rotation::new(&Vault::new(MasterKey::from_bytes([key; 32])), dim).unwrap()
}

/// R_ij.
fn entry(rotation: &Rotation, i: usize, j: usize) -> f32 {
    rotation.panels[(i / PANEL * rotation.dim + j) * PANEL + i % PANEL]
}

/// Unit vectors that have nothing to do with the rotation. Shape: `[count, dim]`.
fn unit_vectors(count: usize, dim: usize) -> Vec<f32> {
    let mut gaussians = Gaussians::new(&[0xee; 32]);
    let mut vectors = Vec::with_capacity(count * dim);
    for _ in 0..count {
        let vector: Vec<f64> = (0..dim).map(|_| gaussians.next()).collect();
        let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
        vectors.extend(vector.iter().map(|x| (x / norm) as f32));
    }
    vectors
}

fn inner(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[test]
fn columns_and_rows_are_orthonormal() {
    for dim in [32, 96, 256] {
        let r = rotation(1, dim);
        for by_rows in [false, true] {
            let at = |i, j| f64::from(if by_rows { entry(&r, i, j) } else { entry(&r, j, i) });
            for a in 0..dim {
                for b in 0..=a {
                    let product: f64 = (0..dim).map(|j| at(a, j) * at(b, j)).sum();
                    let error = (product - f64::from(u8::from(a == b))).abs();
                    // Entries are rounded to f32: dim products of at most 2^-24 each, random signs.
                    assert!(error < 2e-7, "dim {dim}, rows {by_rows}, {a} and {b}: off by {error:e}");
                }
            }
        }
    }
}

/// A unit vector, as an embedding is made one.
fn normalised(values: impl Iterator<Item = f64>) -> Vec<f32> {
    let values: Vec<f64> = values.collect();
    let norm = values.iter().map(|x| x * x).sum::<f64>().sqrt();
    values.iter().map(|x| (x / norm) as f32).collect()
}

/// Unit vectors that try a rotation's sums: one component alone, equal ones, signs in turn, thirty
/// powers of ten, numbers below the normal range, two sizes that do not meet, and rows of the matrix
/// itself, whose products all add up.
fn adversarial_vectors(r: &Rotation) -> Vec<f32> {
    let dim = r.dim();
    let of = |f: &dyn Fn(usize) -> f64| normalised((0..dim).map(f));
    let mut vectors = vec![
        of(&|_| 1.0),
        of(&|_| -1.0),
        of(&|i| if i % 2 == 0 { 1.0 } else { -1.0 }),
        of(&|i| 10.0_f64.powf(-30.0 * i as f64 / dim as f64)),
        of(&|i| 10.0_f64.powf(30.0 * i as f64 / dim as f64)),
        of(&|i| if i == 7 { 1.0 } else { 1e-41 }),
        of(&|i| if i % 2 == 0 { 1.0 } else { 1e-8 }),
        of(&|i| if i < dim / 2 { 1.0 } else { 1e-4 }),
    ];
    for at in [0, 1, dim / 2, dim - 1] {
        vectors.push(of(&|i| if i == at { 1.0 } else { 0.0 }));
        vectors.push(of(&|i| if i == at { -1.0 } else { 0.0 }));
    }
    vectors.extend((0..dim).step_by(dim / 32).map(|i| of(&|j| f64::from(entry(r, i, j)))));
    vectors.concat()
}

#[test]
fn lengths_and_inner_products_are_kept_within_the_stated_bounds() {
    let (mut worst_inner, mut worst_sums) = (0.0_f64, 0.0_f64);
    for dim in [32, 512, 1024, 2048] {
        let r = rotation(2, dim);
        let vectors = [unit_vectors(48, dim), adversarial_vectors(&r)].concat();
        let count = vectors.len() / dim;
        let mut rotated = vec![0.0; vectors.len()];
        kernel::rotate_many(&r.panels, dim, &vectors, &mut rotated);
        let norm = |v: &[f32]| inner(v, v).sqrt();
        for image in rotated.chunks(dim) {
            worst_sums = worst_sums.max((norm(image) - 1.0).abs());
        }
        r.rotate_many(&vectors, &mut rotated);
        for a in 0..count {
            for b in 0..=a {
                let before = inner(&vectors[a * dim..][..dim], &vectors[b * dim..][..dim]);
                let after = inner(&rotated[a * dim..][..dim], &rotated[b * dim..][..dim]);
                worst_inner = worst_inner.max((before - after).abs());
            }
            let image = &rotated[a * dim..][..dim];
            let error = (norm(image) - 1.0).abs();
            assert!(error <= LENGTH_ERROR_MAX, "dim {dim}, vector {a}: the length is off by {error:e}");
            let row: Vec<f32> = to_row(image).0.iter().map(|x| x.to_f32()).collect();
            assert!(norm(&row) <= 1.0 + 1.0 / 1024.0, "dim {dim}, vector {a}: a row of length {}", norm(&row));
        }
    }
    println!("worst norm error of sums {worst_sums:e}, worst inner product error {worst_inner:e}");
    assert!(worst_sums > LENGTH_ERROR_MAX, "sums alone would do: {worst_sums:e}");
    assert!(worst_inner < 2e-6, "{worst_inner:e}");
}

#[test]
fn an_image_of_another_length_is_scaled() {
    let mut r = rotation(2, 256);
    let vectors = unit_vectors(3, r.dim());
    for factor in [1.0 + 1e-5, 1.0 - 1e-5_f32] {
        r.panels.iter_mut().for_each(|x| *x *= factor);
        for vector in vectors.chunks(r.dim()) {
            let image = r.rotate(vector);
            let error = (inner(&image, &image).sqrt() - 1.0).abs();
            assert!(error <= LENGTH_ERROR_MAX, "{factor}: off by {error:e}");
        }
    }
}

#[test]
fn an_inputs_image_is_its_column() {
    let r = rotation(3, 64);
    for j in [0, 1, 31, 32, 63] {
        let mut input = vec![0.0; 64];
        input[j] = 1.0;
        let expected: Vec<f32> = (0..64).map(|i| entry(&r, i, j)).collect();
        assert_eq!(r.rotate(&input), expected);
    }
}

#[test]
fn many_vectors_rotate_as_one_by_one() {
    let r = rotation(4, 160);
    let vectors = unit_vectors(75, 160);
    let mut together = vec![0.0; vectors.len()];
    r.rotate_many(&vectors, &mut together);
    for (vector, expected) in vectors.chunks(160).zip(together.chunks(160)) {
        assert_eq!(r.rotate(vector), expected);
    }
}

#[test]
fn entries_have_the_moments_of_a_haar_matrix() {
    let dim = 512;
    let r = rotation(5, dim);
    let entries: Vec<f64> = r.panels.iter().map(|x| f64::from(*x)).collect();
    let n = entries.len() as f64;
    let d = dim as f64;
    let mean = entries.iter().sum::<f64>() / n;
    let fourth = entries.iter().map(|x| x.powi(4)).sum::<f64>() / n;
    // E x = 0 with variance 1/d; E x^4 = 3 / (d (d + 2)), and Var x^4 is about 96 / d^4. Six sigmas.
    assert!(mean.abs() < 6.0 / (d * n).sqrt(), "mean {mean:e}");
    assert!((fourth - 3.0 / (d * (d + 2.0))).abs() < 6.0 * (96.0 / n).sqrt() / (d * d), "fourth moment {fourth:e}");
    // The trace of a Haar matrix is about standard normal, whatever d.
    let trace: f64 = (0..dim).map(|i| f64::from(entry(&r, i, i))).sum();
    assert!(trace.abs() < 6.0, "trace {trace}");
    // Without the signs, Householder's Q would have a biased diagonal: here half of it is negative.
    let negative = (0..dim).filter(|i| entry(&r, *i, *i) < 0.0).count();
    assert!((negative as f64 - d / 2.0).abs() < 6.0 * (d / 4.0).sqrt(), "{negative} of the diagonal are negative");
}

#[test]
fn traces_of_many_small_rotations_are_standard_normal() {
    // Diaconis and Shahshahani, 1994: Tr R tends to N(0, 1) very fast; Tr R^2 to mean 1, variance 2.
    let dim = 32;
    let seeds = 0..400_u32;
    let count = f64::from(seeds.end);
    let (mut sum, mut squares, mut sum_of_squared) = (0.0, 0.0, 0.0);
    for seed in seeds {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&seed.to_le_bytes());
        let r = Rotation::from_seed(&bytes, dim);
        let trace: f64 = (0..dim).map(|i| f64::from(entry(&r, i, i))).sum();
        sum += trace;
        squares += trace * trace;
        for i in 0..dim {
            for j in 0..dim {
                sum_of_squared += f64::from(entry(&r, i, j)) * f64::from(entry(&r, j, i));
            }
        }
    }
    // Five sigmas: 1/sqrt(n) for the mean, sqrt(2/n) for the second moment and for Tr R^2.
    assert!((sum / count).abs() < 5.0 / count.sqrt(), "mean {}", sum / count);
    assert!((squares / count - 1.0).abs() < 5.0 * (2.0 / count).sqrt(), "second moment {}", squares / count);
    assert!((sum_of_squared / count - 1.0).abs() < 5.0 * (2.0 / count).sqrt(), "Tr R^2 {}", sum_of_squared / count);
}

#[test]
fn images_of_fixed_vectors_are_uniform_on_the_sphere() {
    // All entries of R e for two fixed vectors (not the axes) against N(0, 1/dim), by Kolmogorov and
    // Smirnov: sqrt(n) * distance exceeds 2.2 with probability 1.3e-4 for independent normal numbers.
    let dim = 2048;
    let r = rotation(6, dim);
    let flat = vec![(1.0 / (dim as f32)).sqrt(); dim];
    let mut steps: Vec<f32> = (0..dim).map(|i| (i % 7) as f32 - 3.0).collect();
    let norm = inner(&steps, &steps).sqrt() as f32;
    steps.iter_mut().for_each(|x| *x /= norm);
    for vector in [flat, steps] {
        let mut sample: Vec<f64> = r.rotate(&vector).iter().map(|x| f64::from(*x) * (dim as f64).sqrt()).collect();
        sample.sort_by(f64::total_cmp);
        let n = sample.len() as f64;
        let distance = sample.iter().enumerate().fold(0.0_f64, |worst, (i, x)| {
            let normal = 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
            worst.max((normal - i as f64 / n).abs()).max((normal - (i + 1) as f64 / n).abs())
        });
        assert!(distance * n.sqrt() < 2.2, "distance {distance}");
    }
}

#[test]
fn gaussians_have_the_moments_of_a_standard_normal() {
    let mut gaussians = Gaussians::new(&[9; 32]);
    let n = 200_000;
    let mut moments = [0.0; 4];
    for _ in 0..n {
        let x = gaussians.next();
        for (power, moment) in (1..).zip(&mut moments) {
            *moment += x.powi(power) / f64::from(n);
        }
    }
    // Variances of x, x^2, x^3, x^4: 1, 2, 15, 96. Five sigmas.
    for ((moment, expected), variance) in moments.iter().zip([0.0, 1.0, 0.0, 3.0]).zip([1.0, 2.0, 15.0, 96.0_f64]) {
        assert!((moment - expected).abs() < 5.0 * (variance / f64::from(n)).sqrt(), "{moments:?}");
    }
}

#[test]
fn one_master_key_gives_one_rotation_on_every_machine() {
    // These digests pin the algorithm. If they change, existing galleries are lost.
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let digest = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        hex(&Sha256::digest(&bytes)[..8])
    };
    let mut found = Vec::new();
    for dim in [32, 512] {
        let r = rotation(42, dim);
        let vector: Vec<f32> = (0..dim).map(|i| ((i * 37 % 101) as f32 - 50.0) / 512.0).collect();
        let rotated = r.rotate(&vector);
        let row: Vec<u8> = to_row(&rotated).0.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        found.push([digest(&r.panels), digest(&rotated), hex(&Sha256::digest(&row)[..8])]);
    }
    let expected = [
        ["230bcad20e1b8386", "36fb293e52508bd1", "3bc1257835d4fa1c"],
        ["1f8a02d675581558", "10b12ba5319e5dc9", "4d948b9f494cc7db"],
    ];
    assert_eq!(found, expected);
}

#[test]
fn threads_do_not_change_the_rotation() {
    let make = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| rotation(7, 256).panels.to_vec())
    };
    assert!(make(1) == make(3));
}

#[test]
fn keys_and_dimensions_have_rotations_of_their_own() {
    assert!(*rotation(1, 64).panels != *rotation(2, 64).panels);
    // Not the same random numbers in another shape either.
    assert_ne!(entry(&rotation(1, 64), 0, 0), entry(&rotation(1, 96), 0, 0));
    let (a, b) = (Reflections::draw(&mut Gaussians::new(&[1; 32]), 4), Gaussians::new(&[1; 32]).next());
    assert_eq!(a.vectors[1..4].len(), 3);
    assert!(a.vectors[0].abs() > b.abs(), "the first component grew by the length");
}

#[test]
fn rows_are_rounded_to_nearest_ties_to_even() {
    // 1 + 2^-11 lies between 1 and 1 + 2^-10: even is 1. 1 + 3 * 2^-11: even is 1 + 2^-9.
    let row = to_row(&[1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, -0.25, 6.0e-8, 0.1]);
    let bits: Vec<u16> = row.0.iter().map(|x| x.to_bits()).collect();
    assert_eq!(bits, [0x3c00, 0x3c02, 0xb400, 0x0001, 0x2e66]);
    // And the conversion of slices is that of single numbers.
    let values: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 1.234_567e-3).collect();
    assert!(to_row(&values).0.iter().zip(&values).all(|(row, x)| *row == f16::from_f32(*x)));
}

#[test]
fn a_dimension_no_gallery_has_is_refused() {
    let vault = Vault::new(MasterKey::from_bytes([1; 32]));
    for dim in [0, 31, 33, 2080] {
        let error = Rotation::new(&vault, dim).unwrap_err().to_string();
        assert_eq!(error, format!("dim: {dim} is not a multiple of 32 from 32 to 2048"));
    }
}

#[test]
#[should_panic(expected = "a rotation rotates vectors of its own dimension")]
fn a_vector_of_another_dimension_is_a_bug() {
    let _ = rotation(1, 64).rotate(&[0.0; 128]);
}

#[test]
fn debug_shows_no_coefficient() {
    assert_eq!(format!("{:?}", rotation(1, 32)), "Rotation { dim: 32, .. }");
}

/// Prints the figures: run with `--nocapture`. Asserts a small part of what they should be.
#[test]
fn speed_of_making_and_rotating() {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for dim in [512, 2048] {
        let (r, making) = one_thread.install(|| processor_time(|| rotation(8, dim)));
        println!("making a rotation of {dim}: {making:.3} s of processor time");
        let count = 512;
        let vectors = unit_vectors(count, dim);
        let mut out = vec![0.0; vectors.len()];
        for (name, kernel) in kernel::all() {
            let rounds = if dim == 512 { 8 } else { 1 };
            let ((), time) = processor_time(|| {
                for _ in 0..rounds {
                    kernel::rotate_with(kernel, &r.panels, dim, std::hint::black_box(&vectors), &mut out);
                }
            });
            let per_second = f64::from(rounds) * count as f64 / time;
            println!("rotating in {dim}, {name}: {per_second:.0} vectors/s");
            assert!(per_second > 40.0);
        }
    }
}
