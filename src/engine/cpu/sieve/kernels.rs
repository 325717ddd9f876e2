//! The table of code kernels of one instruction set, and the layouts they share.
//!
//! The first look at a row is a sum of table look-ups. Components are taken in *groups*; the bits
//! of a group in a row's code are an *index* of [`CodeKernels::bits`] bits, and a probe has a
//! table for each group whose entry at that index bounds the group's part of <q, c> from above, in
//! whole steps. So a row's sum bounds <q, c> from above, in integers, and a byte shuffle looks up
//! the same group of many rows at once (fast scan: André, Kermarrec and Le Scouarnec, VLDB 2015).
//!
//! Layouts. A *tile* is one to [`TILE_BLOCKS`] blocks of 64 rows. Its indices are lines of 64
//! bytes, `[groups][blocks]`, byte r for row r of the block. Tables are `[groups][2^bits]` bytes.
//!
//! Knows slices only: no live bits, no floors beyond the sums to compare with.

use thenar_index::codes::BLOCK_ROWS;

use super::portable;
use super::{Level, Reach, RowTerms};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::certificate::Cut;
use crate::simd::Simd;

/// Blocks of the largest tile.
pub(in crate::engine::cpu) const TILE_BLOCKS: usize = 4;
/// Probes that one call of a scan takes, at most.
pub(super) const SCAN_PROBES: usize = 2;

/// The indices of one group in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(in crate::engine::cpu) struct IndexLine(pub(super) [u8; BLOCK_ROWS]);

impl IndexLine {
    pub(super) const ZERO: Self = Self([0; BLOCK_ROWS]);
}

/// What a scan found: a mask of the rows whose sum reached the least, and their sums, which are
/// only written where a mask is not empty.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct ScanHits {
    pub(super) masks: [[u64; TILE_BLOCKS]; SCAN_PROBES],
    pub(super) sums: [[[u16; BLOCK_ROWS]; TILE_BLOCKS]; SCAN_PROBES],
}

impl ScanHits {
    pub(super) const EMPTY: Self =
        Self { masks: [[0; TILE_BLOCKS]; SCAN_PROBES], sums: [[[0; BLOCK_ROWS]; TILE_BLOCKS]; SCAN_PROBES] };
}

/// The least sums that count, for each probe and block.
pub(super) type Least = [[u16; TILE_BLOCKS]; SCAN_PROBES];

/// One tile against one or two probes.
pub(super) struct ScanCall<'a> {
    /// Shape: `[groups, blocks]`.
    pub(super) indices: &'a [IndexLine],
    pub(super) blocks: usize,
    /// For each probe, the bytes `[groups, 2^bits]`, in whole lines. One probe or two; the second is
    /// not read where `probes` is 1.
    pub(super) tables: [&'a [IndexLine]; SCAN_PROBES],
    pub(super) probes: usize,
    pub(super) groups: usize,
    pub(super) least: &'a Least,
}

/// (signs, larges, dim, blocks, level, indices)
pub(super) type Spread = unsafe fn(&[u8], &[u8], usize, usize, Level, &mut [IndexLine]);
/// Whether any row reached any least.
pub(super) type Scan = unsafe fn(&ScanCall<'_>, &mut ScanHits) -> bool;
/// (sums of a block's rows, what they stand for, cut, rows) to a mask of the rows that reach it.
pub(super) type Reaching = unsafe fn(&[u16; BLOCK_ROWS], Reach, Cut, &RowTerms) -> u64;
/// (fine code of a row, probe in 8 bits) to the sum of products of nibbles and probe.
pub(super) type Fine = unsafe fn(&[u8], &[i8]) -> i32;

/// The kernels of one path. Calling them is sound where the processor has the path, which
/// [`CodeKernels::of`] is only asked for then.
pub(in crate::engine::cpu) struct CodeKernels {
    /// Bits of an index.
    pub(super) bits: usize,
    /// Groups are padded to a multiple of this: entries of so many are added in bytes.
    pub(super) together: usize,
    spread: Spread,
    scan: Scan,
    reaching: Reaching,
    fine: Fine,
}

impl CodeKernels {
    /// The kernels of `path`. The caller makes sure that the processor has it.
    pub(in crate::engine::cpu) fn of(path: Simd) -> &'static Self {
        match path {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Vbmi => &Self {
                bits: 6,
                together: 3,
                spread: avx512::spread,
                scan: avx512::scan,
                reaching: avx512::reaching,
                fine: avx512::fine,
            },
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Bf16 | Simd::Avx512 | Simd::Avx2 => &Self {
                bits: 4,
                together: 3,
                spread: avx2::spread,
                scan: avx2::scan,
                reaching: avx2::reaching,
                fine: avx2::fine,
            },
            _ => &Self {
                bits: 8,
                together: 1,
                spread: portable::spread,
                scan: portable::scan,
                reaching: portable::reaching,
                fine: portable::fine,
            },
        }
    }

    /// Components of a group.
    pub(super) fn group_dims(&self, level: Level) -> usize {
        match level {
            Level::Sign => self.bits,
            Level::Two => self.bits / 2,
        }
    }

    /// Groups of a code of `dim` components, padded.
    pub(super) fn groups(&self, level: Level, dim: usize) -> usize {
        dim.div_ceil(self.group_dims(level)).next_multiple_of(self.together)
    }

    /// The largest table entry: so many as are added in bytes must fit one, and all of a row 16
    /// bits.
    pub(super) fn entry_max(&self, level: Level, dim: usize) -> u8 {
        let in_bytes = 255 / self.together;
        let in_sum = usize::from(u16::MAX - 1) / self.groups(level, dim);
        u8::try_from(in_bytes.min(in_sum)).unwrap_or(u8::MAX)
    }

    /// Writes the indices of a tile.
    pub(super) fn spread(
        &self,
        sign: &[u8],
        two: &[u8],
        dim: usize,
        blocks: usize,
        level: Level,
        to: &mut [IndexLine],
    ) {
        assert!(to.len() >= self.groups(level, dim) * blocks);
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.spread)(sign, two, dim, blocks, level, to) }
    }

    /// Sums the entries of a tile's rows.
    #[inline]
    pub(super) fn scan(&self, call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
        assert!((1..=SCAN_PROBES).contains(&call.probes) && (1..=TILE_BLOCKS).contains(&call.blocks));
        assert!(call.indices.len() >= call.groups * call.blocks && call.groups.is_multiple_of(self.together));
        assert!(call.tables[..call.probes].iter().all(|tables| BLOCK_ROWS * tables.len() >= call.groups << self.bits));
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.scan)(call, hits) }
    }

    /// Of a block, the rows whose bound of <q, c> reaches their bar.
    #[inline]
    pub(super) fn reaching(&self, sums: &[u16; BLOCK_ROWS], reach: Reach, cut: Cut, rows: &RowTerms) -> u64 {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.reaching)(sums, reach, cut, rows) }
    }

    /// The sum over components of nibble times probe.
    #[inline]
    pub(super) fn fine(&self, code: &[u8], probe: &[i8]) -> i32 {
        assert_eq!(2 * code.len(), probe.len());
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.fine)(code, probe) }
    }
}

/// The rows that reach their bars: the definition, in a shape that compilers vectorise.
#[inline(always)]
pub(super) fn reaching_rows(sums: &[u16; BLOCK_ROWS], reach: Reach, cut: Cut, rows: &RowTerms) -> u64 {
    let mut reached = [false; BLOCK_ROWS];
    for (r, reached) in reached.iter_mut().enumerate() {
        let bar = cut.scaled_bar(rows.along[r], rows.across[r], rows.norm[r]);
        *reached = reach.offset + reach.step * f32::from(sums[r]) >= bar;
    }
    reached.iter().enumerate().fold(0, |mask, (r, reached)| mask | u64::from(*reached) << r)
}

/// The indices of a tile, of so many bits and padded to groups of so many: the definition, in a shape
/// that compilers vectorise.
#[inline(always)]
pub(super) fn spread_bits(
    (bits, together): (usize, usize),
    sign: &[u8],
    two: &[u8],
    dim: usize,
    blocks: usize,
    level: Level,
    to: &mut [IndexLine],
) {
    let dims = match level {
        Level::Sign => bits,
        Level::Two => bits / 2,
    };
    let groups = dim.div_ceil(dims).next_multiple_of(together);
    let mask = (1_u16 << dims) - 1;
    const NOTHING: [u8; BLOCK_ROWS] = [0; BLOCK_ROWS];
    let lines = dim / 8;
    let line = |plane: &'_ [u8], block: usize, at: usize| -> [u8; BLOCK_ROWS] {
        if at < lines {
            plane[(block * lines + at) * BLOCK_ROWS..][..BLOCK_ROWS].try_into().expect("a line")
        } else {
            NOTHING
        }
    };
    for (group, to) in to.chunks_exact_mut(blocks).take(groups).enumerate() {
        let (at, shift) = (group * dims / 8, group * dims % 8);
        for (block, to) in to.iter_mut().enumerate() {
            let (low, high) = (line(sign, block, at), line(sign, block, at + 1));
            for r in 0..BLOCK_ROWS {
                let pair = u16::from(low[r]) | u16::from(high[r]) << 8;
                to.0[r] = (pair >> shift & mask) as u8;
            }
            if level == Level::Two {
                let (low, high) = (line(two, block, at), line(two, block, at + 1));
                for r in 0..BLOCK_ROWS {
                    let pair = u16::from(low[r]) | u16::from(high[r]) << 8;
                    to.0[r] |= ((pair >> shift & mask) << dims) as u8;
                }
            }
        }
    }
}
