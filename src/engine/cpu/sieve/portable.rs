//! Code kernels in plain Rust, for every processor: the twin that the others are held against.

use thenar_index::codes::BLOCK_ROWS;

use super::Level;
use super::kernels::{IndexLine, ScanCall, ScanHits, reaching_rows, spread_bits};
use super::{Reach, RowTerms};
use crate::certificate::Cut;

/// Bits of an index on this path: a table look-up of a byte costs as much as one of a nibble.
const BITS: usize = 8;

pub(super) fn spread(sign: &[u8], two: &[u8], dim: usize, blocks: usize, level: Level, to: &mut [IndexLine]) {
    spread_bits((BITS, 1), sign, two, dim, blocks, level, to);
}

/// See [`super::kernels::Scan`].
pub(super) fn scan(call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    scan_with(BITS, call, hits)
}

/// A scan with indices of `bits` bits.
pub(super) fn scan_with(bits: usize, call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
    let mut any = false;
    for p in 0..call.probes {
        let tables = &bytemuck::cast_slice::<IndexLine, u8>(call.tables[p])[..call.groups << bits];
        for block in 0..call.blocks {
            let mut sums = [0_u16; BLOCK_ROWS];
            for (group, table) in tables.chunks_exact(1 << bits).enumerate() {
                let indices = &call.indices[group * call.blocks + block].0;
                for (sum, index) in sums.iter_mut().zip(indices) {
                    *sum += u16::from(table[usize::from(*index)]);
                }
            }
            let least = call.least[p][block];
            let mask = (0..BLOCK_ROWS).fold(0, |mask, r| mask | u64::from(sums[r] >= least) << r);
            hits.masks[p][block] = mask;
            hits.sums[p][block] = sums;
            any |= mask != 0;
        }
    }
    any
}

/// See [`super::kernels::Reaching`].
pub(super) fn reaching(sums: &[u16; BLOCK_ROWS], reach: Reach, cut: Cut, rows: &RowTerms) -> u64 {
    reaching_rows(sums, reach, cut, rows)
}

/// See [`super::kernels::Fine`].
pub(super) fn fine(code: &[u8], probe: &[i8]) -> i32 {
    let (low, high) = probe.split_at(code.len());
    code.iter()
        .zip(low.iter().zip(high))
        .map(|(code, (low, high))| i32::from(code & 15) * i32::from(*low) + i32::from(code >> 4) * i32::from(*high))
        .sum()
}
