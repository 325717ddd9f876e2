//! 4-bit codes in AVX-512 with VNNI, 64 bytes per instruction. Twin: [`super::super::portable::refine`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512Vbmi`]; layouts are
//! those of [`super::super::layout`].

use std::arch::x86_64::*;

use super::super::layout::Hit;
use super::super::refine::{RefineCall, refine_by};

/// See [`super::super::kernels::Refine`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in super::super) fn refine(call: &RefineCall<'_>, hits: &mut [Hit]) -> usize {
    refine_by(call, hits, |code, probe| products(code, probe))
}

/// The sum of products of a row's nibbles and a probe's integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn products(code: &[u8], probe: &[i8]) -> i32 {
    const LINE: usize = 64;
    let half = code.len();
    assert!(probe.len() == 2 * half);
    let low_bits = _mm512_set1_epi8(15);
    let (mut low, mut high) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let mut add = |nibbles: __m512i, first: __m512i, second: __m512i| {
        low = _mm512_dpbusd_epi32(low, _mm512_and_si512(nibbles, low_bits), first);
        high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low_bits), second);
    };
    let (code, probe) = (code.as_ptr(), probe.as_ptr());
    let whole = half - half % LINE;
    for at in (0..whole).step_by(LINE) {
        // SAFETY: a line from `at <= half - 64` on, of a code and of each half of a probe.
        let (nibbles, first, second) = unsafe {
            (
                _mm512_loadu_si512(code.wrapping_add(at).cast()),
                _mm512_loadu_si512(probe.wrapping_add(at).cast()),
                _mm512_loadu_si512(probe.wrapping_add(half + at).cast()),
            )
        };
        add(nibbles, first, second);
    }
    if whole < half {
        let mask: __mmask64 = (1 << (half - whole)) - 1;
        // SAFETY: masked to the bytes that a code, and each half of a probe, has from `whole` on.
        let (nibbles, first, second) = unsafe {
            (
                _mm512_maskz_loadu_epi8(mask, code.wrapping_add(whole).cast()),
                _mm512_maskz_loadu_epi8(mask, probe.wrapping_add(whole)),
                _mm512_maskz_loadu_epi8(mask, probe.wrapping_add(half + whole)),
            )
        };
        add(nibbles, first, second);
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(low, high))
}
