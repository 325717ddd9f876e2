//! The table of first-pass and refining kernels of one instruction set.
//!
//! The first pass is a sum of table look-ups per row. Components are taken in *groups*; the bits
//! of a group in a row's code are an *index* of [`CodeKernels::bits`] bits, and a probe has a
//! table for each group whose entry at that index says, in whole steps, by how much the group's part
//! of <q, c> falls short of the group's largest. So a row's sum of entries, its *deficit*, bounds
//! <q, c> from above, in integers, and a byte shuffle looks up the same group of many rows at once
//! (fast scan: André, Kermarrec and Le Scouarnec, VLDB 2015). Sums of some groups may saturate: a
//! deficit that is too small is a bound that is too large.
//!
//! Knows slices only: no live bits, no floors beyond the sums to compare with.

use thenar_index::codebook;
use thenar_index::codes::{BLOCK_ROWS, Codes, Factors, codebook_bytes, one_bit_bytes};

use super::layout::{
    Hit, IndexLine, LIST_SLACK, ListCall, PLANES_TOGETHER, SCAN_PROBES, ScanCall, ScanHits, SpreadCall, TILE_BLOCKS,
};
use super::portable;
use super::refine::RefineCall;
use super::row_bounds::{self, Parts, Scale};
use super::{Level, PLACES_MAX, PROBES_MAX};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::simd::Simd;

/// Writes the indices of a tile.
pub(super) type Spread = unsafe fn(&SpreadCall<'_>, &mut [IndexLine]);
/// (scale, factors of a block's rows, numbers along, numbers of length) to the rows that
/// always pass, by row. The numbers are in the order of the path.
pub(super) type RowBounds = unsafe fn(&Scale, &[Factors; BLOCK_ROWS], &mut Parts, &mut Parts) -> u64;
/// [`RowBounds`] for codebook codes: (scale, cosines of a block's rows, numbers along) to the rows that
/// always pass.
pub(super) type CodebookRowBounds = unsafe fn(&Scale, &[u8; BLOCK_ROWS], &mut Parts) -> u64;
/// A scan of planes that makes indices as it goes: for a few probes, which would read stored indices no
/// more often than these are written. The call has no indices.
pub(super) type ScanPlanes = unsafe fn(&SpreadCall<'_>, &ScanCall<'_>, &mut ScanHits) -> bool;
/// Whether any row passes.
pub(super) type Scan = unsafe fn(&ScanCall<'_>, &mut ScanHits) -> bool;
/// Writes hits, by probe, rows ascending, and returns how many there are. There is room for all and
/// [`LIST_SLACK`] more.
pub(super) type List = unsafe fn(&ListCall<'_>, &mut [Hit]) -> usize;
/// Moves the hits whose 4-bit codes reach their bounds to the front, and returns how many there are.
pub(super) type Refine = unsafe fn(&RefineCall<'_>, &mut [Hit]) -> usize;

/// The kernels of one path. Calling them is sound because [`CodeKernels::of`] is only
/// asked for a path that the processor has.
pub(in crate::engine::cpu) struct CodeKernels {
    /// Bits of an index into signs and magnitudes.
    bits: usize,
    /// For each level: groups are padded to a multiple of this, and entries of so many are added in
    /// bytes, saturating if [`Level::saturates`].
    together: [usize; Level::ALL.len()],
    spread: Spread,
    row_bounds: RowBounds,
    codebook_row_bounds: CodebookRowBounds,
    scan: Scan,
    scan_planes: Option<ScanPlanes>,
    list: List,
    refine: Refine,
}

impl CodeKernels {
    /// The kernels of `path`. The caller makes sure that the processor has it.
    pub(in crate::engine::cpu) fn of(path: Simd) -> &'static Self {
        match path {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Vbmi => &Self {
                bits: avx512::BITS,
                together: avx512::TOGETHER,
                spread: avx512::indices::spread,
                row_bounds: avx512::row_bounds::row_bounds,
                codebook_row_bounds: avx512::row_bounds::codebook_row_bounds,
                scan: avx512::scan,
                scan_planes: Some(avx512::scan_planes),
                list: avx512::list::list,
                refine: avx512::refine::refine,
            },
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Bf16 | Simd::Avx512 | Simd::Avx2 => &Self {
                bits: avx2::BITS,
                together: avx2::TOGETHER,
                spread: avx2::spread,
                row_bounds: avx2::row_bounds,
                codebook_row_bounds: avx2::codebook_row_bounds,
                scan: avx2::scan,
                scan_planes: None,
                list: portable::list,
                refine: avx2::refine,
            },
            _ => &Self {
                bits: portable::BITS,
                together: [1; Level::ALL.len()],
                spread: portable::spread,
                row_bounds: row_bounds::of_rows,
                codebook_row_bounds: row_bounds::of_cosines,
                scan: portable::scan,
                scan_planes: None,
                list: portable::list,
                refine: portable::refine,
            },
        }
    }

    /// Bits of an index.
    pub(in crate::engine::cpu) fn index_bits(&self, level: Level) -> usize {
        if level == Level::Codebook { codebook::CODEWORD_BITS } else { self.bits }
    }

    /// Components of a group.
    pub(super) fn group_dims(&self, level: Level) -> usize {
        match level {
            Level::Codebook => codebook::GROUP_DIMS,
            Level::TwoBit => self.bits / 2,
        }
    }

    /// Groups whose entries are added in bytes.
    pub(super) fn together(&self, level: Level) -> usize {
        self.together[level as usize]
    }

    /// Groups of a code of `dim` components, padded.
    pub(super) fn groups(&self, level: Level, dim: usize) -> usize {
        dim.div_ceil(self.group_dims(level)).next_multiple_of(self.together(level))
    }

    /// The largest table entry: the sum of a row's entries must fit 16 bits, and be less than their maximum.
    pub(super) fn entry_max(&self, level: Level, dim: usize) -> u8 {
        const SUM_MAX: usize = u16::MAX as usize - 1;
        let (groups, together) = (self.groups(level, dim), self.together(level).min(PLANES_TOGETHER));
        let fits = groups.div_ceil(together) * usize::from(u8::MAX) <= SUM_MAX;
        if fits { u8::MAX } else { u8::try_from(SUM_MAX / groups).unwrap_or(u8::MAX) }
    }

    fn planes<'a>(&self, codes: &Codes<'a>, dim: usize, level: Level) -> SpreadCall<'a> {
        let (blocks, groups) = (codes.rows() / BLOCK_ROWS, self.groups(level, dim));
        let (plane, lines, block_bytes) = match level {
            Level::Codebook => (codes.codebook, codebook::lines(dim), codebook_bytes(dim)),
            Level::TwoBit => (codes.one_bit, dim / 8, one_bit_bytes(dim)),
        };
        assert!(plane.len() == blocks * block_bytes && codes.two_bit.len() == blocks * one_bit_bytes(dim));
        let width = self.index_bits(level) / if level == Level::TwoBit { 2 } else { 1 };
        let stride = block_bytes / BLOCK_ROWS;
        SpreadCall { plane, two: codes.two_bit, level, lines, stride, blocks, width, groups }
    }

    /// Writes the indices of a tile: the blocks that `codes` are of.
    pub(super) fn spread(&self, codes: &Codes<'_>, dim: usize, level: Level, to: &mut [IndexLine]) {
        let call = self.planes(codes, dim, level);
        assert!(to.len() >= call.groups * call.blocks);
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.spread)(&call, to) }
    }

    /// Whether so many probes are scanned without indices.
    pub(in crate::engine::cpu) fn scans_planes(&self, probes: usize) -> bool {
        self.scan_planes.is_some() && probes <= SCAN_PROBES
    }

    /// Sums the entries of a tile's rows, the blocks that `codes` are of, without indices.
    pub(super) fn scan_planes(
        &self,
        codes: &Codes<'_>,
        dim: usize,
        level: Level,
        call: &ScanCall<'_>,
        hits: &mut ScanHits,
    ) -> bool {
        let planes = self.planes(codes, dim, level);
        assert!((1..=SCAN_PROBES).contains(&call.probes.len()) && (1..=TILE_BLOCKS).contains(&planes.blocks));
        assert!(call.groups == planes.groups && call.level == level);
        assert!(self.has_tables(call));
        let scan = self.scan_planes.expect("asked by `scans_planes`");
        // SAFETY: the processor has this path, see `of`.
        unsafe { scan(&planes, call, hits) }
    }

    /// Writes how the bounds of a block's rows differ, and returns the rows that always pass.
    #[inline]
    pub(super) fn row_bounds(
        &self,
        scale: &Scale,
        factors: &[Factors; BLOCK_ROWS],
        along: &mut Parts,
        length: &mut Parts,
    ) -> u64 {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.row_bounds)(scale, factors, along, length) }
    }

    /// [`CodeKernels::row_bounds`] for codebook codes, from their cosines.
    #[inline]
    pub(super) fn codebook_row_bounds(&self, scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.codebook_row_bounds)(scale, cosines, along) }
    }

    /// Whether there are as many tables as groups.
    fn has_tables(&self, call: &ScanCall<'_>) -> bool {
        let entries = call.groups << self.index_bits(call.level);
        call.groups.is_multiple_of(self.together(call.level))
            && call.probes.iter().all(|probe| BLOCK_ROWS * probe.table.len() >= entries)
    }

    /// Sums the entries of a tile's rows.
    #[inline]
    pub(super) fn scan(&self, call: &ScanCall<'_>, hits: &mut ScanHits) -> bool {
        assert!((1..=SCAN_PROBES).contains(&call.probes.len()) && (1..=TILE_BLOCKS).contains(&call.blocks));
        assert!(call.indices.len() >= call.groups * call.blocks && self.has_tables(call));
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.scan)(call, hits) }
    }

    /// Writes what passed a scan to the front of `hits`, and returns how many there are.
    #[inline]
    pub(super) fn list(&self, call: &ListCall<'_>, hits: &mut [Hit]) -> usize {
        assert!(hits.len() >= call.probes * call.blocks * BLOCK_ROWS + LIST_SLACK);
        assert!(
            call.first_row + call.blocks * BLOCK_ROWS <= PLACES_MAX && call.first_probe + call.probes <= PROBES_MAX
        );
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.list)(call, hits) }
    }

    /// Moves those of `hits` whose 4-bit codes reach their bounds to the front, and returns how many there are.
    #[inline]
    pub(super) fn refine(&self, call: &RefineCall<'_>, hits: &mut [Hit]) -> usize {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.refine)(call, hits) }
    }
}
