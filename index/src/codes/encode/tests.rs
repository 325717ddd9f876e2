//! Codes against their definition, and bit for bit against those in files.

use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::codes::{Codes, codebook_cosine};

/// Nearly normal numbers, from a seed.
fn rows(seed: u64, dim: usize, count: usize) -> Vec<f16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let mut rows = Vec::with_capacity(dim * count);
    for _ in 0..count {
        let values: Vec<f64> = (0..dim).map(|_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0).collect();
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        // Through f32, because some machines round f64 to f16 twice.
        rows.extend(values.iter().map(|v| f16::from_f32((v / norm) as f32)));
    }
    rows
}

/// The integers of a row, read from the bits.
fn integers(codes: &Codes<'_>, dim: usize, at: usize) -> [Vec<f64>; 4] {
    let (block, lane) = (at / BLOCK_ROWS, at % BLOCK_ROWS);
    let bit = |plane: &[u8], i: usize| plane[block * one_bit_bytes(dim) + i / 8 * BLOCK_ROWS + lane] >> (i % 8) & 1;
    let one_bit: Vec<f64> = (0..dim).map(|i| if bit(codes.one_bit, i) == 1 { -1.0 } else { 1.0 }).collect();
    let two_bit = (0..dim).map(|i| one_bit[i] * if bit(codes.two_bit, i) == 1 { 3.0 } else { 1.0 }).collect();
    let four_bit = (0..dim)
        .map(|i| {
            let byte = codes.four_bit[at * dim / 2 + i % (dim / 2)];
            let nibble = if i < dim / 2 { byte & 15 } else { byte >> 4 };
            f64::from(2 * i32::from(nibble) - 15)
        })
        .collect();
    let codebook_code = |i: usize| {
        let (group, i) = (i / codebook::GROUP_DIMS, i % codebook::GROUP_DIMS);
        let bit = |n: usize| {
            let at = group * codebook::CODEWORD_BITS + n;
            codes.codebook[block * codebook_bytes(dim) + at / 8 * BLOCK_ROWS + lane] >> (at % 8) & 1
        };
        let codeword = (0..codebook::CODEWORD_BITS).map(|n| usize::from(bit(n)) << n).sum::<usize>();
        f64::from(codebook::CODEWORDS[codeword][i])
    };
    [one_bit, two_bit, four_bit, (0..codebook::groups(dim) * codebook::GROUP_DIMS).map(codebook_code).collect()]
}

#[test]
fn codes_are_near_their_rows_and_factors_say_how_near() {
    for dim in [32, 96, 128, 512, 1024] {
        let rows = rows(dim as u64, dim, 128);
        let owned = OwnedCodes::of(&rows, dim);
        let codes = owned.as_codes();
        assert_eq!(codes.rows(), 128);
        for (at, row) in rows.chunks_exact(dim).enumerate() {
            let factors = codes.factors[at];
            let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
            let row: Vec<f64> = row.iter().map(|v| v.to_f64()).collect();
            let [one_bit, two_bit, four_bit, codebook_code] = integers(&codes, dim, at);
            assert_eq!(norm(&codebook_code).powi(2).round() as u32, codebook::square(dim));
            assert_eq!(norm(&two_bit).powi(2).round() as u32, factors.two_bit_square(dim));
            assert_eq!(norm(&four_bit).powi(2).round() as u32, factors.four_bit_square());
            let stored = [factors.one_bit_cosine(), factors.two_bit_cosine(), factors.four_bit_cosine()];
            for ((code, stored), least) in [one_bit, two_bit, four_bit].iter().zip(stored).zip([0.6, 0.85, 0.96]) {
                let dot: f64 = row.iter().zip(code).map(|(x, c)| x * c).sum();
                let cosine = dot / norm(&row) / norm(code);
                assert!(f64::from(stored) <= cosine, "dim {dim}: {stored} of {cosine}");
                assert!(cosine - f64::from(stored) < 2.0 / 65_536.0, "dim {dim}: {stored} of {cosine}");
                assert!(cosine > least, "dim {dim}: {cosine}");
            }
            let cosines = codes.codebook_cosines(dim, at / BLOCK_ROWS);
            let stored = f64::from(codebook_cosine(cosines[at % BLOCK_ROWS]));
            let cosine =
                row.iter().zip(&codebook_code).map(|(x, c)| x * c).sum::<f64>() / norm(&row) / norm(&codebook_code);
            assert!(stored <= cosine && cosine - stored < 1.1 / 256.0, "dim {dim}: {stored} of {cosine}");
            assert!(cosine > if dim < 512 { 0.55 } else { 0.7 }, "dim {dim}: {cosine}");
        }
    }
}

/// What a component's codes should be, by the definition: the magnitudes in the 2-bit and the 4-bit code.
fn defined(value: f64, rms: f64) -> (f64, f64) {
    let two_bit = if value.abs() > rms * TWO_BIT_STEP { 3.0 } else { 1.0 };
    let index = (1..8).filter(|&k| value.abs() >= f64::from(k) * (rms * FOUR_BIT_STEP)).count();
    (two_bit, (2 * index + 1) as f64)
}

#[test]
fn every_component_has_the_code_of_its_definition() {
    for dim in [32, 96, 512] {
        let mut rows = rows(dim as u64 + 1, dim, 64);
        // Extremes: all equal, a single one, the smallest, both zeros, the largest.
        rows[..dim].fill(f16::from_f64(-0.25));
        rows[dim..2 * dim].fill(f16::ZERO);
        rows[dim + 3] = f16::from_f64(0.5);
        rows[2 * dim..3 * dim].iter_mut().enumerate().for_each(|(i, v)| *v = f16::from_bits(i as u16 % 3));
        rows[3 * dim..3 * dim + 7].fill(f16::NEG_ZERO);
        rows[4 * dim..5 * dim].iter_mut().enumerate().for_each(|(i, v)| *v = f16::from_bits(0x7b00 + i as u16 % 256));
        let owned = OwnedCodes::of(&rows, dim);
        for (at, row) in rows.chunks_exact(dim).enumerate() {
            let values: Vec<f64> = row.iter().map(|v| v.to_f64()).collect();
            // The order does not matter: no component is so near a step that rounding decides.
            let rms = (values.iter().map(|v| v * v).sum::<f64>() / dim as f64).sqrt();
            let [one_bit, two_bit, four_bit, codebook_code] = integers(&owned.as_codes(), dim, at);
            for (group, codeword) in values.chunks(codebook::GROUP_DIMS).zip(codebook_code.chunks(codebook::GROUP_DIMS))
            {
                let dot = |codeword: &[f64]| group.iter().zip(codeword).map(|(x, c)| x * c).sum::<f64>();
                let most = codebook::CODEWORDS
                    .map(|codeword| dot(&codeword.map(f64::from)))
                    .into_iter()
                    .fold(f64::MIN, f64::max);
                // Products are summed in f32.
                assert!(dot(codeword) >= most - 1e-6 * most.abs(), "row {at}: {} of {most}", dot(codeword));
            }
            for (i, &value) in values.iter().enumerate() {
                let (two_magnitude, fine_magnitude) = defined(value, rms);
                let signum = value.signum();
                assert_eq!(
                    (one_bit[i], two_bit[i], four_bit[i]),
                    (signum, signum * two_magnitude, signum * fine_magnitude),
                    "component {i} of row {at}, {value} root mean square {rms}"
                );
            }
        }
    }
}

#[test]
fn magnitudes_compare_like_their_values() {
    for bits in 0..=0x7bff {
        let value = f16::from_bits(bits).to_f64();
        assert_eq!(f64::from(value_of(bits)), value);
        assert_eq!((bits_from(value), bits_above(value)), (bits, bits + 1));
        assert_eq!((bits_from(value.next_up()), bits_above(value.next_down().max(0.0))), (bits + 1, bits.max(1)));
    }
    assert!(bits_from(1e9) > MAGNITUDE && bits_above(1e9) > MAGNITUDE);
}

/// The codes of these rows are the same on every machine. If they change, the format has a new version.
#[test]
fn codes_have_not_changed() {
    // Hashes of 1-bit, 2-bit and 4-bit codes and factors, and of codebook codes.
    let expected = [
        (32, 0xbdf6_2d8e_7415_09d0, 0xabf6_d1f9_632b_1e17),
        (128, 0x115a_e941_3dd0_a276, 0x3745_c4ba_3eb1_a426),
        (512, 0x8be4_32fe_fa87_c64b, 0x8a47_271f_8512_f9b1),
        (1024, 0x0f4a_9c13_f8f3_7fe7, 0xe9a0_6b7f_f37d_e46f),
    ];
    let found = expected.map(|(dim, ..)| {
        let owned = OwnedCodes::of(&rows(7, dim, 128), dim);
        let mut bytes = [&*owned.one_bit, &*owned.two_bit, &*owned.four_bit].concat();
        bytes.extend_from_slice(bytemuck::cast_slice(&owned.factors));
        (dim, xxh3_64(&bytes), xxh3_64(&owned.codebook))
    });
    assert_eq!(found, expected, "{found:#x?}");
}

#[test]
fn a_row_of_zeros_has_codes_of_zeros_and_a_replaced_row_leaves_nothing() {
    let dim = 64;
    let mut codes = OwnedCodes::of(&rows(3, dim, 64), dim);
    for at in 0..64 {
        codes.put(at, &vec![f16::ZERO; dim]);
    }
    assert_eq!(codes, OwnedCodes::zeroed(dim, 64));
    let mut codes = OwnedCodes::of(&rows(3, dim, 64), dim);
    codes.wipe();
    assert_eq!(codes, OwnedCodes::zeroed(dim, 64));
}

#[test]
fn a_row_is_clear_if_none_of_its_codes_is_left() {
    let dim = 64;
    let (zeros, made) = (OwnedCodes::zeroed(dim, 128), OwnedCodes::of(&rows(4, dim, 128), dim));
    let at = 64 + 9;
    assert!(zeros.as_codes().is_clear(dim, at) && !made.as_codes().is_clear(dim, at));
    // One byte of the row left, in the first line or in the last.
    let last = |plane: &[u8]| plane.len() - BLOCK_ROWS + at % BLOCK_ROWS;
    for end in [false, true] {
        for area in 0..4 {
            let mut left = zeros.clone();
            let (plane, first) = match area {
                0 => (&mut left.codebook, codebook_bytes(dim) + at % BLOCK_ROWS),
                1 => (&mut left.one_bit, one_bit_bytes(dim) + at % BLOCK_ROWS),
                2 => (&mut left.two_bit, one_bit_bytes(dim) + at % BLOCK_ROWS),
                _ => (&mut left.four_bit, at * dim / 2),
            };
            let place = match (end, area) {
                (false, _) => first,
                (true, 3) => first + dim / 2 - 1,
                (true, _) => last(plane),
            };
            plane[place] = 1;
            assert!(!left.as_codes().is_clear(dim, at), "area {area}");
            assert!(left.as_codes().is_clear(dim, at - 1) && left.as_codes().is_clear(dim, at - BLOCK_ROWS));
            left.clear(at);
            assert_eq!(left, zeros, "area {area}");
        }
        let mut left = zeros.clone();
        left.factors[at].threes = 1;
        assert!(!left.as_codes().is_clear(dim, at));
        left.clear(at);
        assert_eq!(left, zeros);
    }
}

#[test]
fn blocks_have_the_codes_of_their_rows() {
    let dim = 64;
    let rows = rows(5, dim, 256);
    let all = OwnedCodes::of(&rows, dim);
    let part = OwnedCodes::of(&rows[64 * dim..192 * dim], dim);
    let cut = all.as_codes().blocks(dim, 1, 2);
    assert_eq!(cut.codebook, &*part.codebook);
    assert_eq!(
        (cut.one_bit, cut.two_bit, cut.four_bit, cut.factors),
        (&*part.one_bit, &*part.two_bit, &*part.four_bit, &*part.factors)
    );
}
