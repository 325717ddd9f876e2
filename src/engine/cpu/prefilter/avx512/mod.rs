//! Code kernels in AVX-512 with VBMI: look-ups of six bits, 64 rows per instruction. Twin: [`super::portable`].
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512Vbmi`]; layouts are
//! those of [`super::layout`].

pub(super) mod indices;
pub(super) mod list;
pub(super) mod refine;
pub(super) mod row_bounds;

use std::arch::x86_64::*;

use thenar_index::codes::BLOCK_ROWS;

use self::indices::{LINES, index_of, line};
use self::row_bounds::{BlockRowBounds, bounds_of_cosines, stored};
use super::Level;
use super::layout::{IndexLine, PLANES_TOGETHER, SCAN_PROBES, ScanCall, ScanHits, SpreadCall, TILE_BLOCKS};
use super::row_bounds::MaxDeficit;

pub(super) const BITS: usize = 6;
/// For each level, groups whose entries are added in bytes before they are widened. Fewer groups mean finer
/// entries, but three more operations for every so many look-ups, each of which costs two.
pub(super) const TOGETHER: [usize; Level::ALL.len()] = [8, 4];
/// See [`super::kernels::ScanPlanes`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
pub(super) fn scan_planes(planes: &SpreadCall<'_>, call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    let mut any = false;
    for block in 0..planes.blocks {
        any |= match (planes.level, call.probes.len()) {
            (Level::Codebook, 1) => block_planes::<6, false, 1>(planes, call, block, hits),
            (Level::Codebook, _) => block_planes::<6, false, 2>(planes, call, block, hits),
            (Level::TwoBit, 1) => block_planes::<3, true, 1>(planes, call, block, hits),
            (Level::TwoBit, _) => block_planes::<3, true, 2>(planes, call, block, hits),
        };
    }
    any
}

/// One block against `P` probes: indices are made, used and not stored.
#[inline]
#[expect(clippy::needless_range_loop, reason = "counters are constants once the loops are unrolled")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
fn block_planes<const WIDTH: usize, const MAGNITUDES: bool, const P: usize>(
    planes: &SpreadCall<'_>,
    call: &ScanCall<'_>,
    block: usize,
    hits: &mut ScanHits,
) -> bool {
    assert!(planes.width == WIDTH && call.probes[..P].iter().all(|probe| probe.table.len() >= call.groups));
    let low_bits = _mm512_set1_epi8((1 << WIDTH) - 1);
    let mut both = [_mm512_setzero_si512(); P];
    let mut odd = [_mm512_setzero_si512(); P];
    for first in (0..planes.lines).step_by(LINES) {
        let mut signs = [_mm512_setzero_si512(); LINES];
        let mut larges = [_mm512_setzero_si512(); LINES];
        for n in 0..LINES {
            if first + n < planes.lines {
                let at = (block * planes.stride + first + n) * BLOCK_ROWS;
                signs[n] = line(planes.plane, at);
                if MAGNITUDES {
                    larges[n] = line(planes.two, at);
                }
            }
        }
        for few in 0..LINES * 8 / WIDTH / PLANES_TOGETHER {
            let mut part = [_mm512_setzero_si512(); P];
            for n in few * PLANES_TOGETHER..(few + 1) * PLANES_TOGETHER {
                let group = first * 8 / WIDTH + n;
                // Groups behind the last component have tables of zeros, or none.
                if group < call.groups {
                    let index = index_of::<WIDTH, MAGNITUDES>(&signs, &larges, n, low_bits);
                    for p in 0..P {
                        // SAFETY: this group's 64 entries, of as many in each of `groups` tables.
                        let table =
                            unsafe { _mm512_load_si512(call.probes[p].table.as_ptr().wrapping_add(group).cast()) };
                        part[p] = added::<MAGNITUDES>(part[p], _mm512_permutexvar_epi8(index, table));
                    }
                }
            }
            for p in 0..P {
                both[p] = _mm512_add_epi16(both[p], part[p]);
                odd[p] = _mm512_add_epi16(odd[p], _mm512_srli_epi16::<8>(part[p]));
            }
        }
    }
    let rows = if planes.level == Level::Codebook {
        // The prefetcher has got to this line only after those before it were read.
        let cosines = line(planes.plane, ((block + 1) * planes.stride - 1) * BLOCK_ROWS);
        bounds_of_cosines(call.scale, cosines)
    } else {
        stored::<MAGNITUDES>(call.row_bounds, block)
    };
    let mut any = false;
    for p in 0..P {
        let mask = passing::<MAGNITUDES>(both[p], odd[p], call.probes[p].max_deficit, &rows);
        hits[p][block] = mask;
        any |= mask != 0;
    }
    any
}

/// See [`super::kernels::Scan`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
pub(super) fn scan(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    match call.level {
        Level::Codebook => by_groups::<{ TOGETHER[Level::Codebook as usize] }, false>(call, hits),
        Level::TwoBit => by_groups::<{ TOGETHER[Level::TwoBit as usize] }, true>(call, hits),
    }
}

/// `N` groups are added in bytes; codes differ in length or do not.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
fn by_groups<const N: usize, const LENGTHS: bool>(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    match (call.blocks, call.probes.len()) {
        (TILE_BLOCKS, SCAN_PROBES) => tile::<TILE_BLOCKS, SCAN_PROBES, N, LENGTHS>(call, TILE_BLOCKS, 0, 0, hits),
        (TILE_BLOCKS, probes) => (0..probes)
            .fold(false, |any, probe| tile::<TILE_BLOCKS, 1, N, LENGTHS>(call, TILE_BLOCKS, 0, probe, hits) | any),
        (blocks, SCAN_PROBES) => {
            (0..blocks).fold(false, |any, block| tile::<1, SCAN_PROBES, N, LENGTHS>(call, blocks, block, 0, hits) | any)
        }
        (blocks, probes) => (0..blocks * probes)
            .fold(false, |any, at| tile::<1, 1, N, LENGTHS>(call, blocks, at % blocks, at / blocks, hits) | any),
    }
}

/// `B` blocks from `first` on, of `stride` in the tile, against `P` probes from `from` on. Inlined,
/// so that a stride that is known is.
#[inline]
#[expect(clippy::needless_range_loop, reason = "counters are constants once the loops are unrolled")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
fn tile<const B: usize, const P: usize, const N: usize, const LENGTHS: bool>(
    call: &ScanCall<'_>,
    stride: usize,
    first: usize,
    from: usize,
    hits: &mut ScanHits,
) -> bool {
    assert!(call.groups.is_multiple_of(N) && first + B <= stride && stride == call.blocks);
    assert!(call.indices.len() >= call.groups * call.blocks);
    assert!(call.probes[from..from + P].iter().all(|probe| probe.table.len() >= call.groups));
    // Sums of whole 16-bit words, so that of an odd row's byte there is 256 times its entry in
    // `both`, and sums of the odd rows' entries.
    let mut both = [[_mm512_setzero_si512(); B]; P];
    let mut odd = [[_mm512_setzero_si512(); B]; P];
    let groups = call.groups;
    let mut indices: *const IndexLine = call.indices.as_ptr().wrapping_add(first);
    let mut tables: [*const IndexLine; P] = [std::ptr::null(); P];
    for p in 0..P {
        tables[p] = call.probes[from + p].table.as_ptr();
    }
    for _ in 0..groups / N {
        let mut part = [[_mm512_setzero_si512(); B]; P];
        for n in 0..N {
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
                    part[p][b] = if n == 0 { entries } else { added::<LENGTHS>(part[p][b], entries) };
                }
            }
        }
        for b in 0..B {
            for p in 0..P {
                both[p][b] = _mm512_add_epi16(both[p][b], part[p][b]);
                odd[p][b] = _mm512_add_epi16(odd[p][b], _mm512_srli_epi16::<8>(part[p][b]));
            }
        }
        indices = indices.wrapping_add(N.wrapping_mul(stride));
        for p in 0..P {
            tables[p] = tables[p].wrapping_add(N);
        }
    }
    let mut any = false;
    for p in 0..P {
        for b in 0..B {
            let rows = stored::<LENGTHS>(call.row_bounds, first + b);
            let mask = passing::<LENGTHS>(both[p][b], odd[p][b], call.probes[from + p].max_deficit, &rows);
            hits[from + p][first + b] = mask;
            any |= mask != 0;
        }
    }
    any
}

/// Entries added in bytes, saturating if a sum may not fit: [`Level::saturates`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn added<const SATURATES: bool>(a: __m512i, b: __m512i) -> __m512i {
    if SATURATES { _mm512_adds_epu8(a, b) } else { _mm512_add_epi8(a, b) }
}

/// The rows of a block whose deficits are at most the largest that counts: [`MaxDeficit::of`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,bmi2")]
fn passing<const LENGTHS: bool>(both: __m512i, odd: __m512i, max: MaxDeficit, rows: &BlockRowBounds) -> u64 {
    let even = _mm512_sub_epi16(both, _mm512_slli_epi16::<8>(odd));
    let mut masks = [0; 2];
    for (half, sums) in [even, odd].into_iter().enumerate() {
        let times = high_product(rows.along[half], max.along);
        let mut largest = _mm512_subs_epu16(_mm512_set1_epi16(max.base.cast_signed()), times);
        if LENGTHS {
            let longer = high_product(rows.length[half], max.longer);
            let shorter = high_product(rows.length[half], max.shorter);
            largest = _mm512_adds_epu16(_mm512_subs_epu16(largest, longer), shorter);
        }
        masks[half] = _mm512_cmple_epu16_mask(sums, largest);
    }
    _pdep_u64(masks[0].into(), 0x5555_5555_5555_5555)
        | _pdep_u64(masks[1].into(), 0xaaaa_aaaa_aaaa_aaaa)
        | rows.always_pass
}

/// The upper halves of the products of 16-bit numbers with `factor`: `vpmulhuw`. The compiler expands the
/// intrinsic if the factor does not change, and multiplies in 32 bits, which takes four times
/// as long.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn high_product(numbers: __m512i, factor: u16) -> __m512i {
    let product: __m512i;
    // SAFETY: needs AVX-512BW, which is enabled here; touches nothing but its registers.
    unsafe {
        std::arch::asm!(
            "vpmulhuw {product}, {numbers}, {factor}",
            product = lateout(zmm_reg) product,
            numbers = in(zmm_reg) numbers,
            factor = in(zmm_reg) _mm512_set1_epi16(factor.cast_signed()),
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    product
}
