//! How indices, tables and hits lie in memory for the first pass, and the calls of its kernels.
//!
//! A *tile* is one to [`TILE_BLOCKS`] blocks of 64 rows. Its indices are lines of 64
//! bytes, `[groups][blocks]`, byte r for row r of the block. Tables are `[groups][2^bits]` bytes.

use thenar_index::codes::BLOCK_ROWS;

use super::row_bounds::{MaxDeficit, Scale, TileRowBounds};
use super::{Level, PLACES_MAX, PROBES_MAX};

/// Blocks of the largest tile.
pub(in crate::engine::cpu) const TILE_BLOCKS: usize = 4;
/// Groups whose entries a scan of planes adds up in bytes.
pub(super) const PLANES_TOGETHER: usize = 4;
/// The most probes that one call of a scan takes.
pub(super) const SCAN_PROBES: usize = 2;

/// The indices of one group in one block. If the look-ups of a path ignore the bits above those of an
/// index, these bits may have any value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(in crate::engine::cpu) struct IndexLine(pub(super) [u8; BLOCK_ROWS]);

impl IndexLine {
    pub(super) const ZERO: Self = Self([0; BLOCK_ROWS]);
}

/// For each probe and block, the rows whose deficits are at most their maximum.
pub(super) type ScanHits = [[u64; TILE_BLOCKS]; SCAN_PROBES];

/// One tile against a few probes.
pub(super) struct ScanCall<'a> {
    pub(super) level: Level,
    /// Shape: `[groups, blocks]`.
    pub(super) indices: &'a [IndexLine],
    pub(super) blocks: usize,
    /// One to [`SCAN_PROBES`].
    pub(super) probes: &'a [ScanProbe<'a>],
    pub(super) groups: usize,
    /// A scan of planes of codebook codes reads their cosines itself, and adds the rows that always pass to the
    /// hits.
    pub(super) row_bounds: &'a TileRowBounds,
    /// Of the level.
    pub(super) scale: &'a Scale,
}

/// What a scan needs of a probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScanProbe<'a> {
    /// The bytes `[groups, 2^bits]`, in whole lines.
    pub(super) table: &'a [IndexLine],
    pub(super) max_deficit: MaxDeficit,
}

/// The planes of a tile's blocks, to be made into indices.
pub(super) struct SpreadCall<'a> {
    /// Codewords or signs. Shape: `[blocks, stride, 64]`, as [`thenar_index::codes::Codes`] has them.
    pub(super) plane: &'a [u8],
    /// Likewise; only read for [`Level::TwoBit`].
    pub(super) two: &'a [u8],
    pub(super) level: Level,
    /// Lines of a block that have bits, and lines from one block to the next.
    pub(super) lines: usize,
    pub(super) stride: usize,
    pub(super) blocks: usize,
    /// Bits that a group has in a plane.
    pub(super) width: usize,
    pub(super) groups: usize,
}

/// What passed a scan, to be listed: rows of a tile for consecutive probes.
pub(super) struct ListCall<'a> {
    /// Of each probe and block, the rows that passed.
    pub(super) found: &'a ScanHits,
    pub(super) probes: usize,
    /// Of each block, rows that pass whether they were found or not. Only live rows count.
    pub(super) always_pass: &'a [u64; TILE_BLOCKS],
    pub(super) live: &'a [u64; TILE_BLOCKS],
    pub(super) blocks: usize,
    /// Number of the first probe, and place of the tile's first row in the piece.
    pub(super) first_probe: usize,
    pub(super) first_row: usize,
}

/// A row that passed the first pass: the probe, and the row's place in the piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub(super) struct Hit(pub(super) u32);

impl Hit {
    pub(super) fn new(probe: usize, row: usize) -> Self {
        debug_assert!(probe < PROBES_MAX && row < PLACES_MAX);
        Self((probe as u32) << 16 | row as u32)
    }

    pub(super) fn probe(self) -> usize {
        (self.0 >> 16) as usize
    }

    pub(super) fn row(self) -> usize {
        (self.0 & 0xffff) as usize
    }
}

/// Places behind the last hit that a listing may write to.
pub(super) const LIST_SLACK: usize = BLOCK_ROWS;
