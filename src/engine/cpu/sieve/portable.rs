//! Code kernels in plain Rust, for every processor: the twin that the others are held against.

use thenar_index::codebook;
use thenar_index::codes::{BLOCK_ROWS, Factors};

use super::Level;
use super::bars::{self, Parts, Scale, tell_rows};
use super::kernels::{CloseCall, Hit, IndexLine, ListCall, ScanCall, ScanHits, SpreadCall, close_by, spread_bits};

/// Bits of an index on this path: a table look-up of a byte costs as much as one of a nibble.
pub(super) const BITS: usize = 8;

/// See [`super::kernels::Spread`].
pub(super) fn spread(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
    spread_bits(call, to);
}

/// See [`super::kernels::Tell`].
pub(super) fn tell(
    scale: &Scale,
    level: Level,
    factors: &[Factors; BLOCK_ROWS],
    along: &mut Parts,
    length: &mut Parts,
) -> u64 {
    tell_rows(scale, level, factors, along, length)
}

/// See [`super::kernels::TellSketches`].
pub(super) fn tell_sketches(scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
    bars::tell_sketches(scale, cosines, along)
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
            let (along, length) = (&call.bars.along[block].0, &call.bars.length[block].0);
            let passes = |r: usize| sums[r] <= probe.most.of(along[r], length[r]);
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
            let mut mask = (call.found[probe][block] | call.odd[block]) & call.live[block];
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

/// See [`super::kernels::Close`].
pub(super) fn close(call: &CloseCall<'_>, hits: &mut [Hit]) -> usize {
    close_by(call, hits, fine)
}

/// The sum of products of a row's nibbles and a probe's integers.
fn fine(code: &[u8], probe: &[i8]) -> i32 {
    let (low, high) = probe.split_at(code.len());
    code.iter()
        .zip(low.iter().zip(high))
        .map(|(code, (low, high))| i32::from(code & 15) * i32::from(*low) + i32::from(code >> 4) * i32::from(*high))
        .sum()
}
