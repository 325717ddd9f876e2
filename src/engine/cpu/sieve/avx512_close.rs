//! The second look in AVX-512 with VNNI: fine codes of sixteen hits at a time.
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512Vbmi`]; layouts are
//! those of [`super::kernels`].

use std::arch::x86_64::*;

use super::kernels::{CloseCall, Hit, ask_for_lines};

/// Hits that [`close`] takes at once, and whose products it adds up together.
const CLOSE_HITS: usize = 16;
const CLOSE_DOTS: usize = 4;

/// See [`super::kernels::Close`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn close(call: &CloseCall<'_>, hits: &mut [Hit]) -> usize {
    let code_bytes = call.sieve.dim / 2;
    let mut kept = 0;
    for first in (0..hits.len()).step_by(CLOSE_HITS) {
        for hit in &hits[hits.len().min(first + CLOSE_HITS)..hits.len().min(first + 2 * CLOSE_HITS)] {
            ask_for_lines(&call.fine[hit.row() * code_bytes..(hit.row() + 1) * code_bytes]);
        }
        let count = CLOSE_HITS.min(hits.len() - first);
        let mut dots = [0; CLOSE_HITS];
        // Of each hit: scale, 15 times the sum, error; along, across, slack; square, cosine.
        let mut numbers = [[0.0_f32; CLOSE_HITS]; 8];
        for at in (0..count).step_by(CLOSE_DOTS) {
            let mut pairs: [(&[u8], &[i8]); CLOSE_DOTS] = [(&[], &[]); CLOSE_DOTS];
            for n in 0..CLOSE_DOTS {
                // Those that fill up are the last one again.
                let hit = hits[first + (at + n).min(count - 1)];
                let (probe, terms) = (call.sieve.fine_probe(hit.probe()), call.terms[hit.row()]);
                pairs[n] = (&call.fine[hit.row() * code_bytes..(hit.row() + 1) * code_bytes], &probe.integers);
                let (along, across, slack) = match call.cuts[hit.probe()].cut {
                    Some(cut) => cut.parts(),
                    None => (0.0, 0.0, f32::INFINITY),
                };
                let cosine = call.cutter.leaning(terms.fine_cosine()).along;
                // The sum of 2,048 integers in 8 bits, times 15, is exact.
                let of_hit = [probe.scale, (15 * probe.sum) as f32, probe.error, along, across, slack];
                for (numbers, number) in
                    numbers.iter_mut().zip(of_hit.into_iter().chain([terms.fine_square() as f32, cosine]))
                {
                    numbers[at + n] = number;
                }
            }
            dots[at..at + CLOSE_DOTS].copy_from_slice(&products(&pairs));
        }
        let mut of = [_mm512_setzero_ps(); 8];
        for (of, numbers) in of.iter_mut().zip(&numbers) {
            // SAFETY: sixteen numbers.
            *of = unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
        }
        let [scale, sum, error, along, across, slack, square, cosine] = of;
        // SAFETY: sixteen numbers.
        let dots = unsafe { _mm512_loadu_si512(dots.as_ptr().cast()) };
        // `FineProbe::reach` and `Cut::bar`, sixteen at a time. Integers under 2^24 are exact.
        let product = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_slli_epi32::<1>(dots)), sum);
        let reach = _mm512_add_ps(_mm512_div_ps(_mm512_mul_ps(scale, product), _mm512_sqrt_ps(square)), error);
        let sine = _mm512_max_ps(_mm512_fnmadd_ps(cosine, cosine, _mm512_set1_ps(1.0)), _mm512_setzero_ps());
        let bar = _mm512_fnmadd_ps(across, _mm512_sqrt_ps(sine), _mm512_mul_ps(along, cosine));
        // Without a cut every row passes, one of zeros too, which may reach what is no number.
        let mut reached = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(reach, _mm512_sub_ps(bar, slack));
        reached &= ((1_u32 << count) - 1) as __mmask16;
        while reached != 0 {
            hits[kept] = hits[first + reached.trailing_zeros() as usize];
            reached &= reached - 1;
            kept += 1;
        }
    }
    kept
}

/// For each of some pairs, the sum of products of the row's nibbles and the probe's integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn products(pairs: &[(&[u8], &[i8]); CLOSE_DOTS]) -> [i32; CLOSE_DOTS] {
    let half = pairs[0].0.len();
    assert!(pairs.iter().all(|(code, probe)| code.len() == half && probe.len() == 2 * half));
    let low_bits = _mm512_set1_epi8(15);
    let mut low = [_mm512_setzero_si512(); CLOSE_DOTS];
    let mut high = [_mm512_setzero_si512(); CLOSE_DOTS];
    for at in (0..half).step_by(64) {
        let left = half - at;
        let mask: __mmask64 = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        for n in 0..CLOSE_DOTS {
            let (code, probe) = (pairs[n].0.as_ptr(), pairs[n].1.as_ptr());
            // SAFETY: masked to the `left` bytes that a code, and each half of a probe, has from `at`
            // on.
            let (nibbles, first, second) = unsafe {
                (
                    _mm512_maskz_loadu_epi8(mask, code.wrapping_add(at).cast()),
                    _mm512_maskz_loadu_epi8(mask, probe.wrapping_add(at)),
                    _mm512_maskz_loadu_epi8(mask, probe.wrapping_add(half + at)),
                )
            };
            low[n] = _mm512_dpbusd_epi32(low[n], _mm512_and_si512(nibbles, low_bits), first);
            high[n] = _mm512_dpbusd_epi32(high[n], _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low_bits), second);
        }
    }
    for n in 0..CLOSE_DOTS {
        low[n] = _mm512_add_epi32(low[n], high[n]);
    }
    // Two rows' sums side by side, halved in number; then the four rows'; then over the four lanes.
    let first = _mm512_add_epi32(_mm512_unpacklo_epi32(low[0], low[1]), _mm512_unpackhi_epi32(low[0], low[1]));
    let second = _mm512_add_epi32(_mm512_unpacklo_epi32(low[2], low[3]), _mm512_unpackhi_epi32(low[2], low[3]));
    let lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    let lanes = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
    let all = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    [_mm_extract_epi32::<0>(all), _mm_extract_epi32::<1>(all), _mm_extract_epi32::<2>(all), _mm_extract_epi32::<3>(all)]
}
