//! The codebook: 64 codewords, each a direction in eight dimensions.
//!
//! A codebook code has, for every group of [`GROUP_DIMS`] components, the number of the codeword with the
//! nearest direction: six bits for eight components. That is less than one bit per component, and yet more
//! accurate than as many signs, because a codeword is chosen for all eight components at once. After the
//! secret rotation components are nearly normal and independent, so one codebook serves every gallery.
//!
//! The codewords were found by Lloyd's algorithm on the sphere (Linde, Buzo and Gray, An algorithm for
//! vector quantizer design, 1980; for directions: Dhillon and Modha, 2001): the best of 60 random starts on
//! 60,000 normal vectors, refined on a million, times 100, rounded to integers with a squared length of
//! exactly 10,000.
//!
//! Pure. Invariant: all codewords have the same length, and so have all codebook codes of a dimension.

use crate::types::DIM_STEP;

/// Components per group.
pub const GROUP_DIMS: usize = 8;
/// Bits of a codeword's number.
pub const CODEWORD_BITS: usize = 6;
/// Number of codewords.
pub const CODEWORD_COUNT: usize = 1 << CODEWORD_BITS;
/// Squared length of every codeword.
pub const CODEWORD_SQUARE: u32 = 10_000;

const _: () = assert!(DIM_STEP.is_multiple_of(GROUP_DIMS) && (DIM_STEP / GROUP_DIMS * CODEWORD_BITS).is_multiple_of(8));

/// Number of groups in `dim` components.
#[must_use]
pub const fn groups(dim: usize) -> usize {
    dim / GROUP_DIMS
}

/// Squared length of the codebook code of a row of `dim` components.
#[must_use]
pub const fn square(dim: usize) -> u32 {
    groups(dim) as u32 * CODEWORD_SQUARE
}

/// Lines of 64 bytes in the codebook codes of a block. Each line has 8 bits per row.
#[must_use]
pub const fn lines(dim: usize) -> usize {
    groups(dim) * CODEWORD_BITS / 8
}

/// The products of a group of [`GROUP_DIMS`] components with every codeword, summed in f32 in the order of
/// the components.
#[must_use]
pub fn products(group: &[f32]) -> [f32; CODEWORD_COUNT] {
    let mut products = [0.0; CODEWORD_COUNT];
    for (value, of_codewords) in group.iter().zip(&BY_COMPONENT) {
        for (product, component) in products.iter_mut().zip(of_codewords) {
            *product += value * component;
        }
    }
    products
}

/// The number of the codeword with the largest product with `group`; the first if there are several.
pub(super) fn nearest(group: &[f32]) -> usize {
    let products = products(group);
    let most = products.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    products.iter().position(|product| *product == most).unwrap_or(0)
}

/// The codewords, transposed.
const BY_COMPONENT: [[f32; CODEWORD_COUNT]; GROUP_DIMS] = {
    let mut transposed = [[0.0; CODEWORD_COUNT]; GROUP_DIMS];
    let mut number = 0;
    while number < CODEWORD_COUNT {
        let mut i = 0;
        while i < GROUP_DIMS {
            transposed[i][number] = CODEWORDS[number][i] as f32;
            i += 1;
        }
        number += 1;
    }
    transposed
};

/// The codewords, by number.
#[rustfmt::skip]
pub const CODEWORDS: [[i8; GROUP_DIMS]; CODEWORD_COUNT] = [
    [-86, -23, -16, 29, 25, 6, 14, -11],
    [-59, -31, 33, -17, 7, -9, -45, 45],
    [-54, 66, -28, 16, -26, -6, 24, -20],
    [-51, 3, 16, -30, -6, 13, 10, -77],
    [-50, 13, -22, 9, -19, -44, -62, -25],
    [-46, 1, 37, -14, 7, -76, 18, -13],
    [-44, 46, 68, -10, -8, 24, -10, 22],
    [-43, 25, -37, -34, 9, 20, 26, 62],
    [-42, -37, 14, -48, -45, 43, 13, 18],
    [-41, 38, -14, 43, 7, 34, -45, 40],
    [-40, 45, -7, -38, 65, 14, -19, -10],
    [-36, -7, 52, 32, -38, 13, 55, -17],
    [-35, -33, -35, 1, -50, -38, 46, 20],
    [-33, -36, -37, -1, 12, 50, -55, -24],
    [-30, -21, -24, -81, 6, -37, -9, 6],
    [-27, -22, -2, 51, 12, 46, 39, 49],
    [-27, -16, 60, 55, 4, -18, -39, -23],
    [-27, 20, 3, 62, -27, -47, 12, 44],
    [-26, -39, 53, -30, 57, 18, 20, -11],
    [-25, -22, -33, 15, 56, -54, -2, 39],
    [-21, 48, -16, -45, -41, 38, -43, 0],
    [-18, -83, -21, 9, -20, -24, -8, -35],
    [-15, 50, 31, 33, 48, -16, 51, 8],
    [-14, -8, -54, -6, -27, 59, 43, -27],
    [-13, -3, -20, 47, -77, 32, -16, -2],
    [-12, 3, -46, -15, 30, -31, 67, -34],
    [-9, 9, -97, 16, -3, -10, -8, 0],
    [-9, 27, 28, 39, 16, 68, -18, -41],
    [-7, -6, 41, -10, -80, -37, -19, 2],
    [-3, -39, -31, 4, -39, -4, -40, 66],
    [-2, -18, 35, -21, 5, -24, 54, 67],
    [-2, 47, 8, -52, -39, -19, 56, -1],
    [-1, 60, -2, -25, -2, -53, -29, 46],
    [1, 52, -9, 50, 45, -32, -33, -24],
    [6, -15, -35, 34, 67, 39, 18, -32],
    [7, -25, 40, -39, -2, 12, -69, -36],
    [8, 6, -5, 54, -23, -11, 15, -78],
    [11, -2, 36, 16, 71, 11, -35, 44],
    [11, 27, 21, -21, 23, 57, 67, -1],
    [13, -46, 26, 48, 35, -35, 46, -13],
    [13, -23, -10, -8, 55, -37, -30, -62],
    [14, -76, 37, 22, -10, 45, -7, 1],
    [15, 2, -40, -42, -54, -27, -19, -49],
    [19, -69, -35, -24, 33, 16, 24, 34],
    [22, 46, 60, -22, 7, -37, -7, -43],
    [23, -34, -24, 81, 11, -6, -30, 11],
    [26, -16, -19, -72, 25, 43, 5, -32],
    [29, 0, -5, -6, 0, 84, -19, 41],
    [31, 0, -44, -29, 37, -2, -67, 20],
    [34, 75, 15, 30, -38, 15, 16, 13],
    [35, -45, 28, -39, -19, -22, 48, -36],
    [35, 14, 46, -67, 4, 15, -17, 38],
    [38, -3, 61, 35, -26, 3, 0, 54],
    [38, 4, 38, -13, -57, 47, 5, -38],
    [40, 65, -36, -16, 10, 17, -5, -47],
    [41, 40, -43, 29, 30, 13, 16, 52],
    [43, -49, 26, -11, 6, -58, -32, 23],
    [45, 28, 10, 23, -28, -1, -76, -1],
    [46, 13, -21, 22, -24, -78, 7, -9],
    [48, -11, -21, 38, -27, 5, 70, 6],
    [54, 3, -34, -36, -51, 2, 13, 43],
    [55, 18, -8, -39, 52, -36, 29, 15],
    [72, -37, -41, 8, -14, 19, -19, -28],
    [77, 2, 40, 20, 37, 17, 3, -20],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codewords_are_distinct_and_have_the_same_length() {
        for (at, word) in CODEWORDS.iter().enumerate() {
            assert_eq!(
                word.iter().map(|c| u32::from(c.unsigned_abs()).pow(2)).sum::<u32>(),
                CODEWORD_SQUARE,
                "word {at}"
            );
            assert!(!CODEWORDS[..at].contains(word), "word {at}");
        }
    }

    /// Normal numbers, by the sum of twelve uniform ones.
    fn normal(state: &mut u64) -> f32 {
        let mut uniform = || {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            (*state >> 11) as f64 / (1_u64 << 53) as f64
        };
        ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) as f32
    }

    #[test]
    fn codewords_are_near_a_local_optimum_for_normal_vectors() {
        let (mut state, count) = (1_u64, 40_000);
        let (mut along, mut square) = (0.0, 0.0);
        let mut centres = [[0.0_f64; GROUP_DIMS]; CODEWORD_COUNT];
        for _ in 0..count {
            let group: [f32; GROUP_DIMS] = std::array::from_fn(|_| normal(&mut state));
            let word = nearest(&group);
            for (i, value) in group.into_iter().map(f64::from).enumerate() {
                along += value * f64::from(CODEWORDS[word][i]) / f64::from(CODEWORD_SQUARE).sqrt();
                square += value * value;
                centres[word][i] += value;
            }
        }
        let cosine = along / (f64::from(count) * square).sqrt();
        assert!((cosine - 0.7471).abs() < 0.005, "{cosine}");
        // Lloyd's condition: each codeword has the direction of the centre of its region.
        for (word, centre) in CODEWORDS.iter().zip(centres) {
            let dot = word.iter().zip(centre).map(|(c, x)| f64::from(*c) * x).sum::<f64>();
            let length = centre.iter().map(|x| x * x).sum::<f64>().sqrt() * f64::from(CODEWORD_SQUARE).sqrt();
            assert!(dot / length > 0.98, "{word:?}: {}", dot / length);
        }
    }
}
