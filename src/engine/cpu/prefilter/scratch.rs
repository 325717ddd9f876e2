//! The working memory of one thread of the prefilter.

use thenar_index::codes::BLOCK_ROWS;
use zeroize::Zeroize;

use super::layout::{Hit, IndexLine, LIST_SLACK, SCAN_PROBES, TILE_BLOCKS};
use super::row_bounds::TileRowBounds;
use super::{HITS_MAX, Level, Prefilter};
use crate::engine::certificate::Bound;

/// A probe's bounds, and the floor they were made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct FloorBounds {
    pub(super) floor: f32,
    /// None while the floor is too low.
    pub(super) bound: Option<Bound>,
    /// Likewise, for a first pass with dithered tables.
    pub(super) dithered: Option<Bound>,
}

/// The working memory of one thread. Kept between requests.
#[derive(Debug, Default)]
pub(in crate::engine::cpu) struct PrefilterScratch {
    pub(super) indices: Vec<IndexLine>,
    pub(super) hits: Vec<Hit>,
    pub(super) floor_bounds: Vec<FloorBounds>,
    pub(super) tiles: Vec<TileRows>,
}

impl PrefilterScratch {
    pub(in crate::engine::cpu) fn bytes(&self) -> usize {
        self.indices.capacity() * size_of::<IndexLine>()
            + self.hits.capacity() * size_of::<Hit>()
            + self.floor_bounds.capacity() * size_of::<FloorBounds>()
            + self.tiles.capacity() * size_of::<TileRows>()
    }

    /// Overwrites the copies of codes.
    pub(in crate::engine::cpu) fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<IndexLine, u8>(&mut self.indices).zeroize();
    }

    /// Prepares for a request with pieces of at most `rows` rows: makes room, and forgets the bounds of the
    /// request before. Wipes indices before it moves them, so that no copy of a code is left in memory
    /// that is given back.
    pub(in crate::engine::cpu) fn begin(&mut self, prefilter: &Prefilter<'_>, rows: usize) {
        let tiles = rows.div_ceil(TILE_ROWS);
        let groups =
            Level::ALL.map(|level| prefilter.kernels.groups(level, prefilter.dim)).into_iter().max().unwrap_or(0);
        let by_planes = prefilter.kernels.scans_planes(prefilter.prepared.len());
        let lines = if by_planes { 0 } else { tiles * groups * TILE_BLOCKS };
        if self.indices.len() < lines {
            self.wipe();
            self.indices.resize(lines, IndexLine::ZERO);
        }
        if self.tiles.len() < tiles {
            self.tiles.resize_with(tiles, || TileRows::EMPTY);
        }
        self.hits.resize(HITS_MAX + SCAN_PROBES * TILE_ROWS + LIST_SLACK, Hit(0));
        self.floor_bounds.clear();
        self.floor_bounds.resize(prefilter.prepared.len(), prefilter.floor_bounds(f32::NEG_INFINITY));
    }

    #[cfg(test)]
    pub(in crate::engine::cpu) fn holds_rows(&self) -> bool {
        self.indices.iter().any(|line| *line != IndexLine::ZERO)
    }
}

/// Rows of a tile.
pub(in crate::engine::cpu) const TILE_ROWS: usize = TILE_BLOCKS * BLOCK_ROWS;

/// A tile's rows as the first pass needs them.
#[derive(Debug)]
pub(super) struct TileRows {
    /// Of each block, the live rows.
    pub(super) live: [u64; TILE_BLOCKS],
    pub(super) bounds: TileRowBounds,
}

impl TileRows {
    pub(super) const EMPTY: Self = Self { live: [0; TILE_BLOCKS], bounds: TileRowBounds::EMPTY };
}
