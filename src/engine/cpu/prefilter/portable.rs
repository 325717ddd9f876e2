//! Code kernels in plain Rust, for every processor: the twin that `avx2` and `avx512` are held against.

use thenar_index::codebook;
use thenar_index::codes::BLOCK_ROWS;

use super::Level;
use super::layout::{Hit, IndexLine, ListCall, ScanCall, ScanHits, SpreadCall};
use super::refine::{RefineCall, refine_by};

/// Bits of an index on this path: a table look-up of a byte costs as much as one of a nibble.
pub(super) const BITS: usize = 8;

/// See [`super::kernels::Spread`]. Inlined, so that other paths compile it with their instructions.
#[inline(always)]
pub(super) fn spread(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
    const NOTHING: [u8; BLOCK_ROWS] = [0; BLOCK_ROWS];
    let SpreadCall { width, lines, stride, .. } = *call;
    let mask = (1_u16 << width) - 1;
    let line = |plane: &'_ [u8], block: usize, at: usize| -> [u8; BLOCK_ROWS] {
        if at < lines {
            plane[(block * stride + at) * BLOCK_ROWS..][..BLOCK_ROWS].try_into().expect("a line")
        } else {
            NOTHING
        }
    };
    for (group, to) in to.chunks_exact_mut(call.blocks).take(call.groups).enumerate() {
        let (at, shift) = (group * width / 8, group * width % 8);
        for (block, to) in to.iter_mut().enumerate() {
            let (low, high) = (line(call.plane, block, at), line(call.plane, block, at + 1));
            for r in 0..BLOCK_ROWS {
                let pair = u16::from(low[r]) | u16::from(high[r]) << 8;
                to.0[r] = (pair >> shift & mask) as u8;
            }
            if call.level == Level::TwoBit {
                let (low, high) = (line(call.two, block, at), line(call.two, block, at + 1));
                for r in 0..BLOCK_ROWS {
                    let pair = u16::from(low[r]) | u16::from(high[r]) << 8;
                    to.0[r] |= ((pair >> shift & mask) << width) as u8;
                }
            }
        }
    }
}

/// See [`super::kernels::Scan`].
pub(super) fn scan(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    let bits = if call.level == Level::Codebook { codebook::CODEWORD_BITS } else { BITS };
    let mut any = false;
    for (probe, hits) in call.probes.iter().zip(hits) {
        let tables = &bytemuck::cast_slice::<IndexLine, u8>(probe.table)[..call.groups << bits];
        for (block, mask) in hits.iter_mut().enumerate().take(call.blocks) {
            let mut sums = [0_u16; BLOCK_ROWS];
            for (group, table) in tables.chunks_exact(1 << bits).enumerate() {
                let indices = &call.indices[group * call.blocks + block].0;
                for (sum, index) in sums.iter_mut().zip(indices) {
                    *sum += u16::from(table[usize::from(*index)]);
                }
            }
            let (along, length) = (&call.row_bounds.along[block].0, &call.row_bounds.length[block].0);
            let passes = |r: usize| sums[r] <= probe.max_deficit.of(along[r], length[r]);
            *mask = (0..BLOCK_ROWS).fold(0, |mask, r| mask | u64::from(passes(r)) << r);
            any |= *mask != 0;
        }
    }
    any
}

/// See [`super::kernels::List`].
pub(super) fn list(call: &ListCall<'_>, hits: &mut [Hit]) -> usize {
    let mut listed = 0;
    for probe in 0..call.probes {
        for block in 0..call.blocks {
            let mut mask = (call.found[probe][block] | call.always_pass[block]) & call.live[block];
            let first = Hit::new(call.first_probe + probe, call.first_row + block * BLOCK_ROWS);
            while mask != 0 {
                hits[listed] = Hit(first.0 + mask.trailing_zeros());
                mask &= mask - 1;
                listed += 1;
            }
        }
    }
    listed
}

/// See [`super::kernels::Refine`].
pub(super) fn refine(call: &RefineCall<'_>, hits: &mut [Hit]) -> usize {
    refine_by(call, hits, product)
}

/// The sum of products of a row's nibbles and a probe's integers.
fn product(code: &[u8], probe: &[i8]) -> i32 {
    let (low, high) = probe.split_at(code.len());
    code.iter()
        .zip(low.iter().zip(high))
        .map(|(code, (low, high))| i32::from(code & 15) * i32::from(*low) + i32::from(code >> 4) * i32::from(*high))
        .sum()
}
