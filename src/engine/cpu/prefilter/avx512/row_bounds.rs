//! How the bounds of a block's rows differ, by AVX-512. Twin: [`super::super::row_bounds`].
//!
//! Numbers of even rows come first, then those of odd ones: the order in which a scan has its sums.

use std::arch::x86_64::*;

use thenar_index::codes::{BLOCK_ROWS, Factors};

use super::super::row_bounds::{Parts, Scale, TileRowBounds};
use super::indices::line;

/// See [`super::super::kernels::RowBounds`]. Reads [`Factors`] as three 32-bit words: the cosines with the 1-bit and
/// 2-bit codes, that with the 4-bit code and the number of threes, and the square.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn row_bounds(
    scale: &Scale,
    factors: &[Factors; BLOCK_ROWS],
    along: &mut Parts,
    length: &mut Parts,
) -> u64 {
    let words: &[u32] = bytemuck::cast_slice(factors);
    let reference = _mm512_set1_epi32(i32::from(scale.reference_parts));
    let max = _mm512_set1_epi32(i32::from(scale.max_parts));
    let mut always_pass = 0;
    // Of sixteen rows each, numbers in their order.
    let mut alongs = [_mm256_setzero_si256(); 4];
    let mut lengths = [_mm256_setzero_si256(); 4];
    for (at, words) in words.as_chunks::<48>().0.iter().enumerate() {
        let cosines = every_third(words, 0);
        let parts = _mm512_srli_epi32::<16>(cosines);
        always_pass |= u64::from(_mm512_cmplt_epu32_mask(parts, reference)) << (16 * at);
        let above = _mm512_sub_epi32(_mm512_min_epi32(parts, max), reference);
        let above = _mm512_max_epi32(above, _mm512_setzero_si512());
        let threes = _mm512_srli_epi32::<16>(every_third(words, 1));
        let squares = _mm512_add_epi32(_mm512_slli_epi32::<3>(threes), _mm512_set1_epi32(scale.dim as i32));
        let short = _mm512_cmplt_epu32_mask(squares, _mm512_set1_epi32(scale.square_base.cast_signed()));
        always_pass |= u64::from(short) << (16 * at);
        let norms = _mm512_sqrt_ps(_mm512_cvtepi32_ps(squares));
        let units = _mm512_set1_ps(1.0 / 65_536.0 / scale.along_unit);
        let row_along = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(above), norms), units);
        alongs[at] = _mm512_cvtusepi32_epi16(_mm512_cvttps_epu32(row_along));
        let longer = _mm512_max_ps(_mm512_sub_ps(norms, _mm512_set1_ps(scale.length_base)), _mm512_setzero_ps());
        let row_length = _mm512_mul_ps(longer, _mm512_set1_ps(1.0 / scale.length_unit));
        lengths[at] = _mm512_cvtusepi32_epi16(_mm512_cvttps_epu32(row_length));
    }
    write(along, alongs);
    write(length, lengths);
    always_pass
}

/// See [`super::super::kernels::CodebookRowBounds`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(in super::super) fn codebook_row_bounds(scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
    let BlockRowBounds { along: [even, odd], always_pass, .. } = bounds_of_cosines(scale, line(cosines, 0));
    let to: *mut u16 = along.0.as_mut_ptr();
    // SAFETY: twice 32 of the 64 numbers.
    unsafe {
        _mm512_storeu_si512(to.cast(), even);
        _mm512_storeu_si512(to.wrapping_add(BLOCK_ROWS / 2).cast(), odd);
    }
    always_pass
}

/// [`super::super::row_bounds::of_cosines`]. Parts of the cosines of codebook codes are bytes, and so are their limits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn bounds_of_cosines(scale: &Scale, cosines: __m512i) -> BlockRowBounds {
    let [reference, max] =
        [scale.reference_parts, scale.max_parts].map(|parts| _mm512_set1_epi8((parts as u8).cast_signed()));
    let above = _mm512_subs_epu8(_mm512_min_epu8(cosines, max), reference);
    let high_bytes = _mm512_set1_epi16(0xff00_u16.cast_signed());
    BlockRowBounds {
        along: [_mm512_slli_epi16::<8>(above), _mm512_and_si512(above, high_bytes)],
        length: [_mm512_setzero_si512(); 2],
        always_pass: _mm512_cmplt_epu8_mask(cosines, reference),
    }
}

/// Writes the numbers of even rows, then those of odd ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn write(to: &mut Parts, rows: [__m256i; 4]) {
    let first = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(rows[0]), rows[1]);
    let second = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(rows[2]), rows[3]);
    // SAFETY: places are 16-bit numbers 0 to 63, a register of them.
    let even = unsafe { _mm512_loadu_si512(EVEN_ROWS.as_ptr().cast()) };
    let odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    let to: *mut u16 = to.0.as_mut_ptr();
    // SAFETY: twice 32 of the 64 numbers.
    unsafe {
        _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(first, even, second));
        _mm512_storeu_si512(to.wrapping_add(BLOCK_ROWS / 2).cast(), _mm512_permutex2var_epi16(first, odd, second));
    }
}

/// The even numbers below 64.
const EVEN_ROWS: [u16; BLOCK_ROWS / 2] = {
    let mut rows = [0; BLOCK_ROWS / 2];
    let mut at = 0;
    while at < rows.len() {
        rows[at] = 2 * at as u16;
        at += 1;
    }
    rows
};

/// Of 48 words, the ones at `word`, `word + 3`, and so on.
#[inline]
#[target_feature(enable = "avx512f")]
fn every_third(words: &[u32; 48], word: i32) -> __m512i {
    let from: *const u32 = words.as_ptr();
    // SAFETY: three times sixteen words.
    let (first, second, third) = unsafe {
        (
            _mm512_loadu_si512(from.cast()),
            _mm512_loadu_si512(from.wrapping_add(16).cast()),
            _mm512_loadu_si512(from.wrapping_add(32).cast()),
        )
    };
    let at = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
    let at = _mm512_add_epi32(at, _mm512_set1_epi32(word));
    let early = _mm512_permutex2var_epi32(first, at, second);
    // The permutation takes its places modulo 16, so that 32 is the first.
    _mm512_mask_permutexvar_epi32(early, _mm512_cmpge_epu32_mask(at, _mm512_set1_epi32(32)), at, third)
}

/// How the bounds of a block's rows differ: numbers of even rows, then of odd ones.
pub(super) struct BlockRowBounds {
    pub(super) along: [__m512i; 2],
    pub(super) length: [__m512i; 2],
    /// Rows that always pass.
    pub(super) always_pass: u64,
}

/// The numbers of a block that were written before.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn stored<const LENGTHS: bool>(bounds: &TileRowBounds, block: usize) -> BlockRowBounds {
    let halves = |parts: &Parts| {
        // SAFETY: twice 32 of the 64 numbers.
        [0, BLOCK_ROWS / 2].map(|at| unsafe { _mm512_loadu_si512(parts.0.as_ptr().wrapping_add(at).cast()) })
    };
    let length = if LENGTHS { halves(&bounds.length[block]) } else { [_mm512_setzero_si512(); 2] };
    BlockRowBounds { along: halves(&bounds.along[block]), length, always_pass: 0 }
}
