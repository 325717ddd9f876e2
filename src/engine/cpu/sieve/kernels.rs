//! The table of code kernels of one instruction set, and the layouts they share.
//!
//! The first look at a row is a sum of table look-ups. Components are taken in *groups*; the bits
//! of a group in a row's code are an *index* of [`CodeKernels::bits`] bits, and a probe has a
//! table for each group whose entry at that index says, in whole steps, by how much the group's part
//! of <q, c> falls short of the group's largest. So a row's sum of entries, its *deficit*, bounds
//! <q, c> from above, in integers, and a byte shuffle looks up the same group of many rows at once
//! (fast scan: André, Kermarrec and Le Scouarnec, VLDB 2015). Sums of some groups may saturate: a
//! deficit that is too small is a bound that is too large.
//!
//! Layouts. A *tile* is one to [`TILE_BLOCKS`] blocks of 64 rows. Its indices are lines of 64
//! bytes, `[groups][blocks]`, byte r for row r of the block. Tables are `[groups][2^bits]` bytes.
//!
//! Knows slices only: no live bits, no floors beyond the sums to compare with.

use thenar_index::codebook;
use thenar_index::codes::{BLOCK_ROWS, Codes, Factors, codebook_bytes, one_bit_bytes};

use super::bars::{Most, Parts, Scale, TileBars};
use super::portable;
use super::{Level, PLACES_MAX, PROBES_MAX};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, avx512_close};
use crate::engine::certificate::{Bound, Bounds};
use crate::engine::quantised_probe::QuantisedProbe;
use crate::simd::Simd;

/// Blocks of the largest tile.
pub(in crate::engine::cpu) const TILE_BLOCKS: usize = 4;
/// Groups whose entries a scan of planes adds in bytes.
pub(super) const PLANES_TOGETHER: usize = 4;
/// Probes that one call of a scan takes, at most.
pub(super) const SCAN_PROBES: usize = 2;

/// The indices of one group in one block. A path whose look-ups pass over the bits above those of an
/// index may leave anything in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(in crate::engine::cpu) struct IndexLine(pub(super) [u8; BLOCK_ROWS]);

impl IndexLine {
    pub(super) const ZERO: Self = Self([0; BLOCK_ROWS]);
}

/// For each probe and block, the rows whose deficits are at most the largest that counts.
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
    /// A scan of planes of codebook codes reads their cosines itself, and puts the odd rows among the hits.
    pub(super) bars: &'a TileBars,
    /// Of the level.
    pub(super) scale: &'a Scale,
}

/// What a scan needs of a probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScanProbe<'a> {
    /// The bytes `[groups, 2^bits]`, in whole lines.
    pub(super) table: &'a [IndexLine],
    pub(super) most: Most,
}

/// The planes of a tile's blocks, to be made into indices.
pub(super) struct SpreadCall<'a> {
    /// Words or signs. Shape: `[blocks, stride, 64]`, as [`thenar_index::codes::Codes`] has them.
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

/// What a scan left, to be listed: rows of a tile for consecutive probes.
pub(super) struct ListCall<'a> {
    /// Of each probe and block, the rows that passed.
    pub(super) found: &'a ScanHits,
    pub(super) probes: usize,
    /// Of each block, rows that pass whether they were found or not; no other rows count than the
    /// live ones.
    pub(super) odd: &'a [u64; TILE_BLOCKS],
    pub(super) live: &'a [u64; TILE_BLOCKS],
    pub(super) blocks: usize,
    /// Number of the first probe, and place of the tile's first row in the piece.
    pub(super) first_probe: usize,
    pub(super) first_row: usize,
}

/// A row that passed the first look: the probe, and the row's place in the piece.
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

/// Places that a listing may write to behind the last hit.
pub(super) const LIST_SLACK: usize = BLOCK_ROWS;

/// Fine codes to be held against probes.
pub(super) struct CloseCall<'a> {
    /// Of a piece. Shape: `[rows, dim / 2]`.
    pub(super) fine: &'a [u8],
    /// Shape: `[rows]`.
    pub(super) factors: &'a [Factors],
    /// Those that hits number.
    pub(super) probes: &'a [CloseProbe<'a>],
    pub(super) cutter: &'a Bounds,
}

/// What a look at fine codes needs of a probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct CloseProbe<'a> {
    integers: &'a [i8],
    scale: f32,
    /// 15 times the sum of the integers.
    sum: i32,
    /// The cut's parts; its slack and what the error may take from <q, u>.
    along: f32,
    across: f32,
    slack: f32,
}

impl<'a> CloseProbe<'a> {
    /// Without a cut every row passes.
    pub(super) fn new(probe: &'a QuantisedProbe, cut: Option<Bound>) -> Self {
        let (along, across, slack) = cut.map_or((0.0, 0.0, f32::INFINITY), |cut| cut.parts());
        let slack = slack + (probe.error() as f32).next_up();
        Self { integers: probe.integers(), scale: probe.scale(), sum: 15 * probe.sum(), along, across, slack }
    }
}

pub(super) type Spread = unsafe fn(&SpreadCall<'_>, &mut [IndexLine]);
/// (scale, level, factors of a block's rows, numbers along, numbers of length) to the odd rows, in the
/// order of the rows; the numbers are in the path's own.
pub(super) type Tell = unsafe fn(&Scale, Level, &[Factors; BLOCK_ROWS], &mut Parts, &mut Parts) -> u64;
/// [`Tell`] for codebook codes: (scale, cosines of a block's rows, numbers along) to the odd rows.
pub(super) type TellSketches = unsafe fn(&Scale, &[u8; BLOCK_ROWS], &mut Parts) -> u64;
/// A scan of planes whose indices are not made before: for a few probes, which would read them no
/// more often than they were written. The call has no indices.
pub(super) type ScanPlanes = unsafe fn(&SpreadCall<'_>, &ScanCall<'_>, &mut ScanHits) -> bool;
/// Whether any row passes.
pub(super) type Scan = unsafe fn(&ScanCall<'_>, &mut ScanHits) -> bool;
/// Writes hits, and says how many: by probe, rows ascending. There is room for all and
/// [`LIST_SLACK`] more.
pub(super) type List = unsafe fn(&ListCall<'_>, &mut [Hit]) -> usize;
/// Moves those of the hits to the front whose fine codes reach their bars, and says how many.
pub(super) type Close = unsafe fn(&CloseCall<'_>, &mut [Hit]) -> usize;

/// The kernels of one path. Calling them is sound where the processor has the path, which
/// [`CodeKernels::of`] is only asked for then.
pub(in crate::engine::cpu) struct CodeKernels {
    /// Bits of an index into signs, or signs and magnitudes.
    bits: usize,
    /// For each level: groups are padded to a multiple of this, and entries of so many are added in
    /// bytes, which saturate where [`Level::saturates`].
    together: [usize; Level::ALL.len()],
    spread: Spread,
    tell: Tell,
    tell_sketches: TellSketches,
    scan: Scan,
    scan_planes: Option<ScanPlanes>,
    list: List,
    close: Close,
}

impl CodeKernels {
    /// The kernels of `path`. The caller makes sure that the processor has it.
    pub(in crate::engine::cpu) fn of(path: Simd) -> &'static Self {
        match path {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Vbmi => &Self {
                bits: avx512::BITS,
                together: avx512::TOGETHER,
                spread: avx512::spread,
                tell: avx512::tell,
                tell_sketches: avx512::tell_sketches,
                scan: avx512::scan,
                scan_planes: Some(avx512::scan_planes),
                list: avx512::list,
                close: avx512_close::close,
            },
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Bf16 | Simd::Avx512 | Simd::Avx2 => &Self {
                bits: avx2::BITS,
                together: avx2::TOGETHER,
                spread: avx2::spread,
                tell: avx2::tell,
                tell_sketches: avx2::tell_sketches,
                scan: avx2::scan,
                scan_planes: None,
                list: portable::list,
                close: avx2::close,
            },
            _ => &Self {
                bits: portable::BITS,
                together: [1; Level::ALL.len()],
                spread: portable::spread,
                tell: portable::tell,
                tell_sketches: portable::tell_sketches,
                scan: portable::scan,
                scan_planes: None,
                list: portable::list,
                close: portable::close,
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
            Level::OneBit => self.bits,
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

    /// The largest table entry: all of a row must fit 16 bits, and leave the largest of them free.
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
            Level::OneBit | Level::TwoBit => (codes.one_bit, dim / 8, one_bit_bytes(dim)),
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

    /// Reads what tells a block's rows apart, and returns the odd ones.
    #[inline]
    pub(super) fn tell(
        &self,
        scale: &Scale,
        level: Level,
        factors: &[Factors; BLOCK_ROWS],
        along: &mut Parts,
        length: &mut Parts,
    ) -> u64 {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.tell)(scale, level, factors, along, length) }
    }

    /// [`CodeKernels::tell`] for codebook codes, from their cosines.
    #[inline]
    pub(super) fn tell_sketches(&self, scale: &Scale, cosines: &[u8; BLOCK_ROWS], along: &mut Parts) -> u64 {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.tell_sketches)(scale, cosines, along) }
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

    /// Writes what a scan left to the front of `hits`, and says how many there are.
    #[inline]
    pub(super) fn list(&self, call: &ListCall<'_>, hits: &mut [Hit]) -> usize {
        assert!(hits.len() >= call.probes * call.blocks * BLOCK_ROWS + LIST_SLACK);
        assert!(
            call.first_row + call.blocks * BLOCK_ROWS <= PLACES_MAX && call.first_probe + call.probes <= PROBES_MAX
        );
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.list)(call, hits) }
    }

    /// Moves those of `hits` to the front whose fine codes reach their bars, and says how many.
    #[inline]
    pub(super) fn close(&self, call: &CloseCall<'_>, hits: &mut [Hit]) -> usize {
        // SAFETY: the processor has this path, see `of`.
        unsafe { (self.close)(call, hits) }
    }
}

/// Asks the memory for what a second look at `hits` reads: where few rows pass, their fine codes lie
/// far apart, and one after the other would take as long as all of the first look.
#[inline]
pub(super) fn ask_for(codes: &Codes<'_>, hits: &[Hit]) {
    let code = fine_codes(codes.four_bit, codes.factors);
    for hit in hits {
        ask_for_lines(code(*hit));
        prefetch((&raw const codes.factors[hit.row()]).cast());
    }
}

/// The fine code of a hit's row, among those of rows of which `factors` are the factors.
#[inline(always)]
fn fine_codes<'a>(fine: &'a [u8], factors: &[Factors]) -> impl Fn(Hit) -> &'a [u8] {
    let code_bytes = fine.len() / factors.len().max(1);
    move |hit| &fine[hit.row() * code_bytes..][..code_bytes]
}

/// Asks for the lines of a fine code.
#[inline]
fn ask_for_lines(code: &[u8]) {
    code.chunks(64).for_each(|line| prefetch(line.as_ptr()));
}

/// Asks for the line at `at`.
#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching reads nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Hits that are asked for before they are looked at.
const ASKED_AHEAD: usize = 16;

/// Hits whose fine codes reach their bars, by a path's sum of products of nibbles and probe.
#[inline(always)]
pub(super) fn close_by(call: &CloseCall<'_>, hits: &mut [Hit], dot: impl Fn(&[u8], &[i8]) -> i32) -> usize {
    let mut kept = 0;
    let (loss, code) = (call.cutter.loss(), fine_codes(call.fine, call.factors));
    for at in 0..hits.len() {
        let hit = hits[at];
        ask_for_lines(code(hits[(at + ASKED_AHEAD).min(hits.len() - 1)]));
        let probe = &call.probes[hit.probe()];
        let factors = call.factors[hit.row()];
        // `Bound::least_product`, and `QuantisedProbe`: 2 <k, n> - 15 <k, 1>.
        let cosine = (factors.four_bit_cosine() - loss).max(0.0);
        let sine = (1.0 - cosine * cosine).max(0.0).sqrt();
        let bar = probe.along * cosine - probe.across * sine - probe.slack;
        let product = 2 * dot(code(hit), probe.integers) - probe.sum;
        let below = probe.scale * (product as f32) < bar * (factors.four_bit_square() as f32).sqrt();
        // Without a cut every row passes, one of zeros too, whose numbers are none. Who does not pass is
        // written over by the next.
        hits[kept] = hit;
        kept += usize::from(!below);
    }
    kept
}

/// The indices of a tile: the definition, in a shape that compilers vectorise.
#[inline(always)]
pub(super) fn spread_bits(call: &SpreadCall<'_>, to: &mut [IndexLine]) {
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
