//! Indices of groups from planes of bits, by AVX-512 with VBMI. Twin: [`super::super::portable::spread`].

use std::arch::x86_64::*;

use thenar_index::codes::BLOCK_ROWS;

use super::super::Level;
use super::super::layout::{IndexLine, SpreadCall};

/// Lines that are unpacked together: their components are a whole number of groups.
pub(super) const LINES: usize = 3;

/// See [`super::super::kernels::Spread`]. The upper two bits of a byte may have any value.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(in super::super) fn spread(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
    assert!(to.len() >= call.groups * call.blocks);
    match call.level {
        Level::Codebook => spread_by::<6, false>(call, to),
        Level::TwoBit => spread_by::<3, true>(call, to),
    }
}

/// Three lines are 24 bits of a row, a whole number of groups of `WIDTH`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn spread_by<const WIDTH: usize, const MAGNITUDES: bool>(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
    assert!(call.width == WIDTH);
    let low_bits = _mm512_set1_epi8((1 << WIDTH) - 1);
    for block in 0..call.blocks {
        for first in (0..call.groups * WIDTH / 8 + 1).step_by(LINES) {
            let mut signs = [_mm512_setzero_si512(); LINES];
            let mut larges = [_mm512_setzero_si512(); LINES];
            for n in 0..LINES {
                if first + n < call.lines {
                    let at = (block * call.stride + first + n) * BLOCK_ROWS;
                    signs[n] = line(call.plane, at);
                    if MAGNITUDES {
                        larges[n] = line(call.two, at);
                    }
                }
            }
            for n in 0..LINES * 8 / WIDTH {
                let group = first * 8 / WIDTH + n;
                if group < call.groups {
                    let index = index_of::<WIDTH, MAGNITUDES>(&signs, &larges, n, low_bits);
                    let to = to.as_mut_ptr().wrapping_add(group * call.blocks + block);
                    // SAFETY: one of the `groups` times `blocks` lines of `to`: asserted by `spread`.
                    unsafe { _mm512_store_si512(to.cast(), index) };
                }
            }
        }
    }
}

/// The line at byte `at` of a plane.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn line(plane: &[u8], at: usize) -> __m512i {
    let line = &plane[at..at + BLOCK_ROWS];
    // SAFETY: a line is 64 bytes.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

/// The indices of the `n`-th group in these lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn index_of<const WIDTH: usize, const MAGNITUDES: bool>(
    signs: &[__m512i; LINES],
    larges: &[__m512i; LINES],
    n: usize,
    low_bits: __m512i,
) -> __m512i {
    let signs = field(signs, n * WIDTH, WIDTH);
    if !MAGNITUDES {
        return signs;
    }
    let magnitudes = _mm512_sll_epi16(field(larges, n * WIDTH, WIDTH), _mm_cvtsi32_si128(WIDTH as i32));
    chosen(low_bits, signs, magnitudes)
}

/// In every byte, bits `at` to `at + width` of the 24 bits that the lines have there. Higher bits may have any
/// value.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn field(lines: &[__m512i; LINES], at: usize, width: usize) -> __m512i {
    let (line, shift) = (at / 8, at % 8);
    let low = _mm512_srl_epi16(lines[line], _mm_cvtsi32_si128(shift as i32));
    if shift + width <= 8 {
        return low;
    }
    let high = _mm512_sll_epi16(lines[line + 1], _mm_cvtsi32_si128(8 - shift as i32));
    chosen(_mm512_set1_epi8((1 << (8 - shift)) - 1), low, high)
}

/// Bits of `low` where `mask` has ones, else of `high`.
#[inline]
#[target_feature(enable = "avx512f")]
fn chosen(mask: __m512i, low: __m512i, high: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0xca>(mask, low, high)
}
