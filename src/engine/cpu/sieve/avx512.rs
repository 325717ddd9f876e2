//! The first look in AVX-512 with VBMI: look-ups of six bits, 64 rows an instruction.
//!
//! Every function here needs the instructions of [`crate::simd::Simd::Avx512Vbmi`]; layouts are
//! those of [`super::kernels`].

use std::arch::x86_64::*;

use thenar_index::codes::{BLOCK_ROWS, Factors};

use super::Level;
use super::bars::{Most, Parts, Scale, TileBars};
use super::kernels::{
    Hit, IndexLine, ListCall, PLANES_TOGETHER, SCAN_PROBES, ScanCall, ScanHits, SpreadCall, TILE_BLOCKS,
};

pub(super) const BITS: usize = 6;
/// For each level, groups whose entries are added in bytes before they are widened. Fewer mean finer
/// entries, and three operations more for every so many look-ups, each of which costs two.
pub(super) const TOGETHER: [usize; Level::ALL.len()] = [8, 8, 4];
/// Lines that are taken apart together: their components are a whole number of groups.
const LINES: usize = 3;

/// See [`super::kernels::Spread`]. Leaves anything in the upper two bits of a byte.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn spread(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
    assert!(to.len() >= call.groups * call.blocks);
    match call.level {
        Level::Codebook | Level::OneBit => spread_by::<6, false>(call, to),
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
fn line(plane: &[u8], at: usize) -> __m512i {
    let line = &plane[at..at + BLOCK_ROWS];
    // SAFETY: a line is 64 bytes.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

/// See [`super::kernels::ScanPlanes`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
pub(super) fn scan_planes(planes: &SpreadCall<'_>, call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    let mut any = false;
    for block in 0..planes.blocks {
        any |= match (planes.level, call.probes.len()) {
            (Level::Codebook | Level::OneBit, 1) => block_planes::<6, false, 1>(planes, call, block, hits),
            (Level::Codebook | Level::OneBit, _) => block_planes::<6, false, 2>(planes, call, block, hits),
            (Level::TwoBit, 1) => block_planes::<3, true, 1>(planes, call, block, hits),
            (Level::TwoBit, _) => block_planes::<3, true, 2>(planes, call, block, hits),
        };
    }
    any
}

/// One block against `P` probes: indices are made, looked up and forgotten.
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
                // Those behind the last component have nothing in their tables, or have none.
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
        // The line is in reach of what fetched those before, and would not be before they were read.
        let cosines = line(planes.plane, ((block + 1) * planes.stride - 1) * BLOCK_ROWS);
        sketch_bars(call.scale, cosines)
    } else {
        told::<MAGNITUDES>(call.bars, block)
    };
    let mut any = false;
    for p in 0..P {
        let mask = passing::<MAGNITUDES>(both[p], odd[p], call.probes[p].most, &rows);
        hits[p][block] = mask;
        any |= mask != 0;
    }
    any
}

/// The indices of the `n`-th group in these lines.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn index_of<const WIDTH: usize, const MAGNITUDES: bool>(
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

/// In every byte, bits `at` to `at + width` of the 24 that the lines have there, and anything above.
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

/// See [`super::kernels::Tell`]. Reads [`Factors`] as three words: the cosines with sign and two code,
/// the fine one with the number of threes, and the square. Even rows come first, then odd ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn tell(
    scale: &Scale,
    level: Level,
    factors: &[Factors; BLOCK_ROWS],
    along: &mut Parts,
    length: &mut Parts,
) -> u64 {
    let words: &[u32] = bytemuck::cast_slice(factors);
    let reference = _mm512_set1_epi32(i32::from(scale.reference_parts));
    let most = _mm512_set1_epi32(i32::from(scale.most_parts));
    let mut odd = 0;
    // Of sixteen rows each, numbers in their order.
    let mut alongs = [_mm256_setzero_si256(); 4];
    let mut lengths = [_mm256_setzero_si256(); 4];
    for (at, words) in words.as_chunks::<48>().0.iter().enumerate() {
        let cosines = every_third(words, 0);
        let parts = if level.has_lengths() {
            _mm512_srli_epi32::<16>(cosines)
        } else {
            _mm512_and_si512(cosines, _mm512_set1_epi32(0xffff))
        };
        odd |= u64::from(_mm512_cmplt_epu32_mask(parts, reference)) << (16 * at);
        let above = _mm512_sub_epi32(_mm512_min_epi32(parts, most), reference);
        let above = _mm512_max_epi32(above, _mm512_setzero_si512());
        if !level.has_lengths() {
            alongs[at] = _mm512_cvtepi32_epi16(above);
            continue;
        }
        let threes = _mm512_srli_epi32::<16>(every_third(words, 1));
        let squares = _mm512_add_epi32(_mm512_slli_epi32::<3>(threes), _mm512_set1_epi32(scale.dim as i32));
        let short = _mm512_cmplt_epu32_mask(squares, _mm512_set1_epi32(scale.square_base.cast_signed()));
        odd |= u64::from(short) << (16 * at);
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
    odd
}

/// See [`super::kernels::TellSketches`]. Even rows come first, then odd ones.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn tell_sketches(scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
    let RowBars { along: [even, odd], odd_rows, .. } = sketch_bars(scale, line(cosines, 0));
    let to: *mut u16 = along.0.as_mut_ptr();
    // SAFETY: twice 32 of the 64 numbers.
    unsafe {
        _mm512_storeu_si512(to.cast(), even);
        _mm512_storeu_si512(to.wrapping_add(BLOCK_ROWS / 2).cast(), odd);
    }
    odd_rows
}

/// [`super::bars::tell_sketches`]. Parts of cosines of codebook codes are bytes, and so are their ends.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn sketch_bars(scale: &Scale, cosines: __m512i) -> RowBars {
    let [reference, most] =
        [scale.reference_parts, scale.most_parts].map(|parts| _mm512_set1_epi8((parts as u8).cast_signed()));
    let above = _mm512_subs_epu8(_mm512_min_epu8(cosines, most), reference);
    let high_bytes = _mm512_set1_epi16(0xff00_u16.cast_signed());
    RowBars {
        along: [_mm512_slli_epi16::<8>(above), _mm512_and_si512(above, high_bytes)],
        length: [_mm512_setzero_si512(); 2],
        odd_rows: _mm512_cmplt_epu8_mask(cosines, reference),
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

/// See [`super::kernels::Scan`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,bmi2")]
pub(super) fn scan(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    match call.level {
        Level::Codebook => by_groups::<{ TOGETHER[Level::Codebook as usize] }, false>(call, hits),
        Level::OneBit => by_groups::<{ TOGETHER[Level::OneBit as usize] }, false>(call, hits),
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
            let rows = told::<LENGTHS>(call.bars, first + b);
            let mask = passing::<LENGTHS>(both[p][b], odd[p][b], call.probes[from + p].most, &rows);
            hits[from + p][first + b] = mask;
            any |= mask != 0;
        }
    }
    any
}

/// Entries added in bytes, which saturate where more may come together: [`Level::saturates`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn added<const SATURATES: bool>(a: __m512i, b: __m512i) -> __m512i {
    if SATURATES { _mm512_adds_epu8(a, b) } else { _mm512_add_epi8(a, b) }
}

/// What tells a block's rows apart: numbers of even rows, then of odd ones.
struct RowBars {
    along: [__m512i; 2],
    length: [__m512i; 2],
    /// Rows that always pass.
    odd_rows: u64,
}

/// The numbers of a block that were told before.
#[inline]
#[target_feature(enable = "avx512f")]
fn told<const LENGTHS: bool>(bars: &TileBars, block: usize) -> RowBars {
    let halves = |parts: &Parts| {
        // SAFETY: twice 32 of the 64 numbers.
        [0, BLOCK_ROWS / 2].map(|at| unsafe { _mm512_loadu_si512(parts.0.as_ptr().wrapping_add(at).cast()) })
    };
    let length = if LENGTHS { halves(&bars.length[block]) } else { [_mm512_setzero_si512(); 2] };
    RowBars { along: halves(&bars.along[block]), length, odd_rows: 0 }
}

/// The rows of a block whose deficits are at most the largest that counts: [`Most::of`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,bmi2")]
fn passing<const LENGTHS: bool>(both: __m512i, odd: __m512i, most: Most, rows: &RowBars) -> u64 {
    let even = _mm512_sub_epi16(both, _mm512_slli_epi16::<8>(odd));
    let mut masks = [0; 2];
    for (half, sums) in [even, odd].into_iter().enumerate() {
        let times = high_product(rows.along[half], most.along);
        let mut largest = _mm512_subs_epu16(_mm512_set1_epi16(most.base.cast_signed()), times);
        if LENGTHS {
            let longer = high_product(rows.length[half], most.longer);
            let shorter = high_product(rows.length[half], most.shorter);
            largest = _mm512_adds_epu16(_mm512_subs_epu16(largest, longer), shorter);
        }
        masks[half] = _mm512_cmple_epu16_mask(sums, largest);
    }
    _pdep_u64(masks[0].into(), 0x5555_5555_5555_5555)
        | _pdep_u64(masks[1].into(), 0xaaaa_aaaa_aaaa_aaaa)
        | rows.odd_rows
}

/// The upper halves of the products of 16-bit numbers with `factor`: `vpmulhuw`. The compiler takes the
/// intrinsic apart where the factor does not change, and multiplies in 32 bits, which takes four times
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

/// See [`super::kernels::List`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2")]
pub(super) fn list(call: &ListCall<'_>, hits: &mut [Hit]) -> usize {
    const LANES: usize = 16;
    // SAFETY: 64 bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let mut listed = 0;
    for probe in 0..call.probes {
        for block in 0..call.blocks {
            let mask = (call.found[probe][block] | call.odd[block]) & call.live[block];
            if mask == 0 {
                continue;
            }
            let first = Hit::new(call.first_probe + probe, call.first_row + block * BLOCK_ROWS);
            let first = _mm512_set1_epi32(first.0.cast_signed());
            let rows = _mm512_maskz_compress_epi8(mask, places);
            let count = mask.count_ones() as usize;
            let to = hits[listed..listed + BLOCK_ROWS].as_mut_ptr();
            let quarters = [
                _mm512_castsi512_si128(rows),
                _mm512_extracti32x4_epi32::<1>(rows),
                _mm512_extracti32x4_epi32::<2>(rows),
                _mm512_extracti32x4_epi32::<3>(rows),
            ];
            for (n, rows) in quarters.into_iter().enumerate() {
                if n * LANES >= count {
                    break;
                }
                let some = _mm512_add_epi32(first, _mm512_cvtepu8_epi32(rows));
                // SAFETY: sixteen of 64 places, what is behind the last hit included.
                unsafe { _mm512_storeu_si512(to.wrapping_add(n * LANES).cast(), some) };
            }
            listed += count;
        }
    }
    listed
}

/// The numbers below 64.
const PLACES: [u8; BLOCK_ROWS] = {
    let mut places = [0; BLOCK_ROWS];
    let mut at = 0;
    while at < places.len() {
        places[at] = at as u8;
        at += 1;
    }
    places
};
