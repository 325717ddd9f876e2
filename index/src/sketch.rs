//! The words of the sketch code: directions of ten dimensions, 64 of them.
//!
//! A sketch says of every group of [`GROUP_DIMS`] components which word points most nearly where
//! they do: six bits for ten components. That is less than a bit a component, and yet more than so
//! many signs would say: a word is chosen for all ten at once. After the secret rotation components
//! are as good as normal and independent, so one set of words serves every gallery.
//!
//! The words were found by Lloyd's algorithm on the sphere (Linde, Buzo and Gray, An algorithm for
//! vector quantizer design, 1980; on directions: Dhillon and Modha, 2001): of 60 random starts on
//! 60,000 normal vectors the best, refined on a million, times 100, rounded to integers of squared
//! length 10,000 exactly. Rows whose groups are filled up with zeros have words that reach behind
//! their last component; the code's length counts them whole.
//!
//! Pure. Invariant: all words are of one length, so that all sketches of a dimension are.

/// Components of a group.
pub const GROUP_DIMS: usize = 10;
/// Bits that number a word.
pub const WORD_BITS: usize = 6;
/// How many words there are.
pub const WORD_COUNT: usize = 1 << WORD_BITS;
/// Squared length of every word.
pub const WORD_SQUARE: u32 = 10_000;

/// Groups of `dim` components, the last one filled up with zeros.
#[must_use]
pub const fn groups(dim: usize) -> usize {
    dim.div_ceil(GROUP_DIMS)
}

/// Squared length of the sketch of a row of `dim` components.
#[must_use]
pub const fn square(dim: usize) -> u32 {
    groups(dim) as u32 * WORD_SQUARE
}

/// Lines of 64 bytes that the words of a block take, 8 bits a row each.
#[must_use]
pub const fn lines(dim: usize) -> usize {
    (groups(dim) * WORD_BITS).div_ceil(8)
}

/// The number of the word whose product with `group` is the largest, the first of several; of up to
/// [`GROUP_DIMS`] components, those that are missing being zero. Products are exact in f32, and
/// added up in the order of the components.
#[must_use]
pub(crate) fn nearest(group: &[f32]) -> usize {
    let mut products = [0.0_f32; WORD_COUNT];
    for (value, of_words) in group.iter().zip(&BY_COMPONENT) {
        for (product, component) in products.iter_mut().zip(of_words) {
            *product += value * component;
        }
    }
    let most = products.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    products.iter().position(|product| *product == most).unwrap_or(0)
}

/// The words again, a component of all of them at a time.
const BY_COMPONENT: [[f32; WORD_COUNT]; GROUP_DIMS] = {
    let mut turned = [[0.0; WORD_COUNT]; GROUP_DIMS];
    let mut word = 0;
    while word < WORD_COUNT {
        let mut i = 0;
        while i < GROUP_DIMS {
            turned[i][word] = WORDS[word][i] as f32;
            i += 1;
        }
        word += 1;
    }
    turned
};

/// The words, by number.
#[rustfmt::skip]
pub const WORDS: [[i8; GROUP_DIMS]; WORD_COUNT] = [
    [-83, 13, -9, -6, -1, 31, 13, -41, 2, 3],
    [-50, -16, 36, 14, 47, -24, 13, -6, -19, -49],
    [-48, 22, 14, 19, -16, 4, 59, 45, -6, 29],
    [-46, -3, -27, -35, 2, 7, 16, 42, 22, -58],
    [-45, -30, -13, 52, 28, 29, -28, 14, -34, 21],
    [-45, -7, -58, 17, -37, -45, -2, 15, -25, -5],
    [-43, -37, 37, -15, -57, 5, -16, 20, -27, -23],
    [-40, -16, 4, -46, -7, -67, 30, -5, 18, 15],
    [-36, 43, 29, 28, -19, -36, -19, -34, -34, 30],
    [-34, -22, -17, 46, -49, 13, -14, -2, 56, 7],
    [-34, 34, -15, -21, 59, -33, -3, 27, -25, 33],
    [-32, 17, -31, 5, 19, -41, -53, -5, 52, -11],
    [-30, 25, 46, 19, 0, 45, -30, 27, 38, -30],
    [-26, -49, 44, 27, 28, -22, 4, 21, 38, 33],
    [-24, -63, -25, -48, 13, 22, -38, -2, 19, 8],
    [-24, 43, -16, -14, -15, 30, -60, 29, -39, 6],
    [-22, 16, 28, -32, -31, -7, -42, -9, 41, 54],
    [-19, 0, -31, 34, 55, 29, 42, 8, 42, -8],
    [-16, 77, -23, -18, -12, -20, 24, -16, 35, -19],
    [-15, -61, -14, 24, -20, -1, 68, -4, -4, -15],
    [-15, -9, -65, -3, 20, 0, 3, -11, 21, 67],
    [-13, -59, 7, 5, -3, -27, -12, -71, -8, 17],
    [-12, -15, 61, -32, 25, 38, -6, 2, -44, 29],
    [-11, 24, 39, -70, 15, -4, -28, -22, 2, -37],
    [-10, -23, 31, -34, -18, 28, 38, -21, 65, -6],
    [-9, 8, -61, -12, 38, -5, -25, -38, -34, -36],
    [-9, 39, 48, 2, 2, -49, -4, 56, 2, -23],
    [-8, 19, -20, -75, -25, 25, 33, 9, -17, 29],
    [-6, 60, 7, 17, 47, 43, 18, 2, -38, -14],
    [-4, 34, -23, 60, -19, 8, 3, -6, 2, -65],
    [-2, 23, 4, -21, -25, -32, 37, -18, -58, -48],
    [-1, 9, 18, 24, 54, 19, -48, -53, 22, 12],
    [1, -1, 65, 54, -13, 15, 29, -39, 1, -10],
    [2, -19, -45, 5, -38, 67, 11, 37, -9, -9],
    [2, -4, 0, -37, 52, 9, 53, -53, -8, 12],
    [2, 11, 0, -25, -51, 41, -24, -64, -14, -10],
    [4, -4, -19, 11, -8, 19, 24, -32, -81, 30],
    [7, -28, 24, -7, 25, -46, -66, 10, -36, 7],
    [8, -45, 7, 7, 12, 52, -9, -28, -16, -62],
    [9, -36, -5, -1, -43, -20, -2, 26, -22, 72],
    [9, -11, 27, 19, -38, -53, -19, -27, 34, -47],
    [10, 7, 18, 20, -13, 72, 10, -7, 5, 60],
    [11, 3, 10, -35, 38, 24, -10, 71, 22, 30],
    [12, -49, -20, -36, 35, -7, 21, 38, -50, -10],
    [15, -33, -26, 36, 29, -5, -32, 54, 12, -42],
    [19, 0, -13, 50, 32, -69, 28, -14, -14, 3],
    [23, 23, -26, 35, -24, -2, 40, -62, 24, 21],
    [23, 41, -2, 59, 5, -10, -34, 32, 20, 40],
    [23, 50, 48, -2, 31, -12, 30, -8, 35, 37],
    [25, -16, 29, 52, -18, -2, 8, 50, -51, -9],
    [27, 44, 18, 3, -81, 6, 12, 14, 1, 8],
    [29, 8, -24, -44, -36, -32, -37, 47, -3, -26],
    [33, -10, -20, 7, -19, -32, 34, 45, 60, 14],
    [35, -18, -37, 41, -35, -1, -57, -23, -19, 6],
    [35, 32, -38, -23, 13, 52, -25, -8, 46, -10],
    [40, -10, 4, -20, 57, -33, 4, -9, 43, -40],
    [41, -35, -51, -33, -33, -14, 18, -29, 15, -27],
    [41, 13, 24, -16, 3, 35, 55, 29, 3, -47],
    [46, -28, 56, -30, -19, -32, 34, -3, -17, 15],
    [48, 40, -58, 7, 8, -3, 27, 34, -26, 7],
    [50, 27, -13, -41, 5, -35, -25, -30, -11, 45],
    [54, -36, 36, -5, -26, 25, -43, 17, 32, -2],
    [66, -44, -7, 25, 39, 23, 10, -10, 0, 28],
    [66, 36, 29, 9, 12, 3, -31, -16, -34, -30],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_of_one_length_and_none_is_another() {
        for (at, word) in WORDS.iter().enumerate() {
            assert_eq!(word.iter().map(|c| u32::from(c.unsigned_abs()).pow(2)).sum::<u32>(), WORD_SQUARE, "word {at}");
            assert!(!WORDS[..at].contains(word), "word {at}");
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
    fn words_lie_where_they_are_of_the_most_use() {
        let (mut state, count) = (1_u64, 40_000);
        let (mut along, mut square) = (0.0, 0.0);
        let mut centres = [[0.0_f64; GROUP_DIMS]; WORD_COUNT];
        for _ in 0..count {
            let group: [f32; GROUP_DIMS] = std::array::from_fn(|_| normal(&mut state));
            let word = nearest(&group);
            for (i, value) in group.into_iter().map(f64::from).enumerate() {
                along += value * f64::from(WORDS[word][i]) / f64::from(WORD_SQUARE).sqrt();
                square += value * value;
                centres[word][i] += value;
            }
        }
        let cosine = along / (f64::from(count) * square).sqrt();
        assert!((cosine - 0.6886).abs() < 0.005, "{cosine}");
        // Lloyd's condition: each word points to the middle of what it stands for.
        for (word, centre) in WORDS.iter().zip(centres) {
            let dot = word.iter().zip(centre).map(|(c, x)| f64::from(*c) * x).sum::<f64>();
            let length = centre.iter().map(|x| x * x).sum::<f64>().sqrt() * f64::from(WORD_SQUARE).sqrt();
            assert!(dot / length > 0.98, "{word:?}: {}", dot / length);
        }
    }
}
