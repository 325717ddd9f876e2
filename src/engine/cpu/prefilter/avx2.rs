//! Code kernels in AVX2: look-ups of four bits, 32 rows per instruction. Twin: [`super::portable`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx2`]; layouts are those of
//! [`super::layout`].

use std::arch::x86_64::*;

use thenar_index::codebook;
use thenar_index::codes::{BLOCK_ROWS, Factors};

use super::Level;
use super::layout::{Hit, IndexLine, ScanCall, ScanHits, SpreadCall};
use super::portable;
use super::refine::{RefineCall, refine_by};
use super::row_bounds::{self, Parts, Scale};

pub(super) const BITS: usize = 4;
/// For each level, groups whose entries are added in bytes before they are widened.
pub(super) const TOGETHER: [usize; Level::ALL.len()] = [8, 4];

/// See [`super::kernels::Spread`].
#[target_feature(enable = "avx2")]
pub(super) fn spread(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
    portable::spread(call, to);
}

/// See [`super::kernels::RowBounds`].
#[target_feature(enable = "avx2")]
pub(super) fn row_bounds(scale: &Scale, factors: &[Factors; BLOCK_ROWS], along: &mut Parts, length: &mut Parts) -> u64 {
    row_bounds::of_rows(scale, factors, along, length)
}

/// See [`super::kernels::CodebookRowBounds`].
#[target_feature(enable = "avx2")]
pub(super) fn codebook_row_bounds(scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
    row_bounds::of_cosines(scale, cosines, along)
}

/// See [`super::kernels::Scan`].
#[target_feature(enable = "avx2")]
pub(super) fn scan(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    match call.level {
        // One block at a time: a table of theirs takes four registers.
        Level::Codebook => by_blocks::<1, { TOGETHER[Level::Codebook as usize] }, CODEWORD_QUARTERS>(call, hits),
        Level::TwoBit => by_blocks::<2, { TOGETHER[Level::TwoBit as usize] }, 1>(call, hits),
    }
}

/// [`blocks`] for all blocks and probes, `B` blocks at a time and then one by one.
#[target_feature(enable = "avx2")]
fn by_blocks<const B: usize, const N: usize, const Q: usize>(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    let mut any = false;
    for p in 0..call.probes.len() {
        let mut block = 0;
        while block + B <= call.blocks {
            any |= blocks::<B, N, Q>(call, p, block, hits);
            block += B;
        }
        while block < call.blocks {
            any |= blocks::<1, N, Q>(call, p, block, hits);
            block += 1;
        }
    }
    any
}

/// Look-ups in sixteen entries that make a look-up of one codeword.
const CODEWORD_QUARTERS: usize = codebook::CODEWORD_COUNT >> BITS;

/// The entries of 32 rows at their indices, in a table of `Q` times sixteen.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up<const Q: usize>(table: &[__m256i; Q], index: __m256i) -> __m256i {
    // The shuffle ignores bits 4 to 6 of an index.
    let quarter = |q: usize| _mm256_shuffle_epi8(table[q], index);
    if Q == 1 {
        return quarter(0);
    }
    // A blend tests the highest bit of a byte.
    let (bit_4, bit_5) = (_mm256_slli_epi16::<3>(index), _mm256_slli_epi16::<2>(index));
    let low = _mm256_blendv_epi8(quarter(0), quarter(1), bit_4);
    _mm256_blendv_epi8(low, _mm256_blendv_epi8(quarter(2), quarter(3), bit_4), bit_5)
}

/// `B` blocks from `first` on against the probe `p`; `N` groups are added in bytes, and a table is
/// `Q` times sixteen entries.
#[expect(clippy::needless_range_loop, reason = "counters are constants once the loops are unrolled")]
#[target_feature(enable = "avx2")]
fn blocks<const B: usize, const N: usize, const Q: usize>(
    call: &ScanCall<'_>,
    p: usize,
    first: usize,
    hits: &mut ScanHits,
) -> bool {
    assert!(call.groups.is_multiple_of(N) && first + B <= call.blocks && p < call.probes.len());
    assert!(call.indices.len() >= call.groups * call.blocks);
    assert!(BLOCK_ROWS * call.probes[p].table.len() >= (call.groups * Q) << BITS);
    // As in `avx512`, for each half of each block.
    let mut both = [[_mm256_setzero_si256(); 2]; B];
    let mut odd = [[_mm256_setzero_si256(); 2]; B];
    let mut indices: *const IndexLine = call.indices.as_ptr().wrapping_add(first);
    let mut tables: *const u8 = call.probes[p].table.as_ptr().cast();
    for _ in 0..call.groups / N {
        let mut part = [[_mm256_setzero_si256(); 2]; B];
        for _ in 0..N {
            let mut table = [_mm256_setzero_si256(); Q];
            for q in 0..Q {
                // SAFETY: sixteen of this group's entries, of the probe's `groups` tables.
                let entries = unsafe { _mm_load_si128(tables.wrapping_add(q << BITS).cast()) };
                table[q] = _mm256_broadcastsi128_si256(entries);
            }
            for b in 0..B {
                for half in 0..2 {
                    let from: *const __m256i = indices.wrapping_add(b).cast();
                    // SAFETY: half of the line of this group and block `first + b < blocks`.
                    let index = unsafe { _mm256_load_si256(from.wrapping_add(half)) };
                    part[b][half] = _mm256_adds_epu8(part[b][half], look_up(&table, index));
                }
            }
            indices = indices.wrapping_add(call.blocks);
            tables = tables.wrapping_add(Q << BITS);
        }
        for b in 0..B {
            for half in 0..2 {
                both[b][half] = _mm256_add_epi16(both[b][half], part[b][half]);
                odd[b][half] = _mm256_add_epi16(odd[b][half], _mm256_srli_epi16::<8>(part[b][half]));
            }
        }
    }
    let splat = |value: u16| _mm256_set1_epi16(value.cast_signed());
    let max = call.probes[p].max_deficit;
    let (base, along, longer, shorter) = (splat(max.base), splat(max.along), splat(max.longer), splat(max.shorter));
    let mut any = false;
    for b in 0..B {
        let mut mask = 0_u64;
        for half in 0..2 {
            let even = _mm256_sub_epi16(both[b][half], _mm256_slli_epi16::<8>(odd[b][half]));
            let low = _mm256_unpacklo_epi16(even, odd[b][half]);
            let high = _mm256_unpackhi_epi16(even, odd[b][half]);
            // Rows 0 to 15 and 16 to 31 of this half.
            let rows = [_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high)];
            let mut passed = [_mm256_setzero_si256(); 2];
            for i in 0..2 {
                let at = 32 * half + 16 * i;
                // SAFETY: sixteen of the 64 numbers.
                let (row_along, row_length) = unsafe {
                    (
                        _mm256_loadu_si256(call.row_bounds.along[first + b].0.as_ptr().wrapping_add(at).cast()),
                        _mm256_loadu_si256(call.row_bounds.length[first + b].0.as_ptr().wrapping_add(at).cast()),
                    )
                };
                // `MaxDeficit::of`.
                let max = _mm256_subs_epu16(base, _mm256_mulhi_epu16(row_along, along));
                let max = _mm256_subs_epu16(max, _mm256_mulhi_epu16(row_length, longer));
                let max = _mm256_adds_epu16(max, _mm256_mulhi_epu16(row_length, shorter));
                // Unsigned a <= b if min(a, b) is a.
                passed[i] = _mm256_cmpeq_epi16(_mm256_min_epu16(rows[i], max), rows[i]);
            }
            let bits = _mm256_packs_epi16(passed[0], passed[1]);
            let bits = _mm256_movemask_epi8(_mm256_permute4x64_epi64::<0b11_01_10_00>(bits)).cast_unsigned();
            mask |= u64::from(bits) << (32 * half);
        }
        hits[p][first + b] = mask;
        any |= mask != 0;
    }
    any
}

/// See [`super::kernels::Refine`].
#[target_feature(enable = "avx2")]
pub(super) fn refine(call: &RefineCall<'_>, hits: &mut [Hit]) -> usize {
    refine_by(call, hits, |code, probe| product(code, probe))
}

/// The sum of products of a row's nibbles and a probe's integers.
#[inline]
#[target_feature(enable = "avx2")]
fn product(code: &[u8], probe: &[i8]) -> i32 {
    let half = code.len();
    assert!(probe.len() == 2 * half && half.is_multiple_of(16));
    let (low_bits, ones) = (_mm_set1_epi8(15), _mm_set1_epi16(1));
    let mut sum = _mm_setzero_si128();
    for at in (0..half).step_by(16) {
        // SAFETY: 16 bytes from `at <= half - 16` of each.
        let (nibbles, first, second) = unsafe {
            (
                _mm_loadu_si128(code.as_ptr().wrapping_add(at).cast()),
                _mm_loadu_si128(probe.as_ptr().wrapping_add(at).cast()),
                _mm_loadu_si128(probe.as_ptr().wrapping_add(half + at).cast()),
            )
        };
        // Two products of at most 15 * 128 fit 16 bits with a sign, twice over.
        let low = _mm_maddubs_epi16(_mm_and_si128(nibbles, low_bits), first);
        let high = _mm_maddubs_epi16(_mm_and_si128(_mm_srli_epi16::<4>(nibbles), low_bits), second);
        sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_add_epi16(low, high), ones));
    }
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
    _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum)))
}
