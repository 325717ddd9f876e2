//! Code kernels in AVX-512 with VBMI and VNNI: look-ups of six bits, 64 rows an instruction.
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512Vbmi`]; layouts are
//! those of [`super::kernels`].

use std::arch::x86_64::*;

use thenar_index::codes::BLOCK_ROWS;

use super::Level;
use super::kernels::{IndexLine, ScanCall, ScanHits, TILE_BLOCKS, spread_bits};
use super::{Reach, RowTerms};
use crate::certificate::Cut;

const BITS: usize = 6;
/// Groups whose entries are added in bytes before they are widened.
const TOGETHER: usize = 3;

/// See [`super::kernels::Spread`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn spread(sign: &[u8], two: &[u8], dim: usize, blocks: usize, level: Level, to: &mut [IndexLine]) {
    spread_bits((BITS, TOGETHER), sign, two, dim, blocks, level, to);
}

/// See [`super::kernels::Scan`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
pub(super) fn scan(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    match (call.blocks, call.probes) {
        (TILE_BLOCKS, 2) => tile::<TILE_BLOCKS, 2>(call, TILE_BLOCKS, 0, hits),
        (TILE_BLOCKS, _) => tile::<TILE_BLOCKS, 1>(call, TILE_BLOCKS, 0, hits),
        (blocks, 2) => (0..blocks).fold(false, |any, block| tile::<1, 2>(call, blocks, block, hits) | any),
        (blocks, _) => (0..blocks).fold(false, |any, block| tile::<1, 1>(call, blocks, block, hits) | any),
    }
}

/// `B` blocks from `first` on, of `stride` in the tile, against `P` probes. Inlined, so that a
/// stride that is known is.
#[inline]
#[expect(clippy::needless_range_loop, reason = "counters are constants once the loops are unrolled")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
fn tile<const B: usize, const P: usize>(call: &ScanCall<'_>, stride: usize, first: usize, hits: &mut ScanHits) -> bool {
    assert!(call.groups.is_multiple_of(TOGETHER) && first + B <= stride && stride == call.blocks && P <= call.probes);
    assert!(call.indices.len() >= call.groups * call.blocks);
    assert!(call.tables[..P].iter().all(|tables| tables.len() >= call.groups));
    // Sums of whole 16-bit words, so that of an odd row's byte there is 256 times its entry in
    // `both`, and sums of the odd rows' entries.
    let mut both = [[_mm512_setzero_si512(); B]; P];
    let mut odd = [[_mm512_setzero_si512(); B]; P];
    let groups = call.groups;
    let mut indices: *const IndexLine = call.indices.as_ptr().wrapping_add(first);
    let mut tables: [*const IndexLine; P] = std::array::from_fn(|p| call.tables[p].as_ptr());
    for _ in 0..groups / TOGETHER {
        let mut part = [[_mm512_setzero_si512(); B]; P];
        for n in 0..TOGETHER {
            let mut table = [_mm512_setzero_si512(); P];
            for p in 0..P {
                // SAFETY: this group's 64 entries, of as many in each of `groups` tables.
                table[p] = unsafe { _mm512_load_si512(tables[p].wrapping_add(n).cast()) };
            }
            for b in 0..B {
                // SAFETY: the line of this group and block `first + b < blocks`.
                let index =
                    unsafe { _mm512_load_si512(indices.wrapping_add(n.wrapping_mul(stride).wrapping_add(b)).cast()) };
                for p in 0..P {
                    let entries = _mm512_permutexvar_epi8(index, table[p]);
                    part[p][b] = if n == 0 { entries } else { _mm512_add_epi8(part[p][b], entries) };
                }
            }
        }
        for b in 0..B {
            for p in 0..P {
                both[p][b] = _mm512_add_epi16(both[p][b], part[p][b]);
                odd[p][b] = _mm512_add_epi16(odd[p][b], _mm512_srli_epi16::<8>(part[p][b]));
            }
        }
        indices = indices.wrapping_add(TOGETHER.wrapping_mul(stride));
        tables = tables.map(|table| table.wrapping_add(TOGETHER));
    }
    let mut any = false;
    for p in 0..P {
        for b in 0..B {
            let even = _mm512_sub_epi16(both[p][b], _mm512_slli_epi16::<8>(odd[p][b]));
            let least = _mm512_set1_epi16(call.least[p][first + b].cast_signed());
            let even_mask = _mm512_cmpge_epu16_mask(even, least);
            let odd_mask = _mm512_cmpge_epu16_mask(odd[p][b], least);
            hits.masks[p][first + b] = 0;
            if even_mask | odd_mask != 0 {
                any = true;
                hits.masks[p][first + b] = _pdep_u64(even_mask.into(), 0x5555_5555_5555_5555)
                    | _pdep_u64(odd_mask.into(), 0xaaaa_aaaa_aaaa_aaaa);
                store(even, odd[p][b], &mut hits.sums[p][first + b]);
            }
        }
    }
    any
}

/// Writes the sums of even and odd rows in the order of the rows.
#[target_feature(enable = "avx512f,avx512bw")]
fn store(even: __m512i, odd: __m512i, to: &mut [u16; BLOCK_ROWS]) {
    // Within each 128-bit lane l: rows 16 l to 16 l + 7, and 16 l + 8 to 16 l + 15.
    let low = _mm512_unpacklo_epi16(even, odd);
    let high = _mm512_unpackhi_epi16(even, odd);
    let first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    let second = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
    let to: *mut u16 = to.as_mut_ptr();
    // SAFETY: 64 words are 128 bytes, two registers.
    unsafe {
        _mm512_storeu_si512(to.cast(), first);
        _mm512_storeu_si512(to.wrapping_add(32).cast(), second);
    }
}

/// See [`super::kernels::Reaching`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn reaching(sums: &[u16; BLOCK_ROWS], reach: Reach, cut: Cut, rows: &RowTerms) -> u64 {
    let (along, across, slack) = cut.parts();
    let [offset, step] = [reach.offset, reach.step].map(|v| _mm512_set1_ps(v));
    let [along, across, slack] = [along, across, slack].map(|v| _mm512_set1_ps(v));
    let mut mask = 0;
    for at in (0..BLOCK_ROWS).step_by(16) {
        // SAFETY: sixteen from `at <= 48` of the 64 of each array.
        let (sums, row_along, row_across, norm) = unsafe {
            (
                _mm256_loadu_si256(sums.as_ptr().wrapping_add(at).cast()),
                _mm512_loadu_ps(rows.along.as_ptr().wrapping_add(at)),
                _mm512_loadu_ps(rows.across.as_ptr().wrapping_add(at)),
                _mm512_loadu_ps(rows.norm.as_ptr().wrapping_add(at)),
            )
        };
        let sums = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(sums));
        let reached = _mm512_fmadd_ps(step, sums, offset);
        let bar = _mm512_mul_ps(along, row_along);
        let bar = _mm512_fnmadd_ps(across, row_across, bar);
        let bar = _mm512_fnmadd_ps(slack, norm, bar);
        mask |= u64::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(reached, bar)) << at;
    }
    mask
}

/// See [`super::kernels::Fine`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn fine(code: &[u8], probe: &[i8]) -> i32 {
    let half = code.len();
    assert_eq!(probe.len(), 2 * half);
    let low_bits = _mm512_set1_epi8(15);
    let (mut low, mut high) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let mut at = 0;
    while at < half {
        let left = half - at;
        let mask: __mmask64 = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        // SAFETY: masked to the `left` bytes that each of the three slices has from `at` on.
        let (nibbles, first, second) = unsafe {
            (
                _mm512_maskz_loadu_epi8(mask, code.as_ptr().wrapping_add(at).cast()),
                _mm512_maskz_loadu_epi8(mask, probe.as_ptr().wrapping_add(at)),
                _mm512_maskz_loadu_epi8(mask, probe.as_ptr().wrapping_add(half + at)),
            )
        };
        low = _mm512_dpbusd_epi32(low, _mm512_and_si512(nibbles, low_bits), first);
        high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low_bits), second);
        at += 64;
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(low, high))
}
