//! Prefiltering by codes: most rows are passed over after reading a thirtieth of their bytes.
//!
//! A row goes through three steps, each with fewer rows and more bytes per row:
//!
//! 1. The *first pass* over one [`Level`] of the code, by table look-ups, 64 rows at a time.
//! 2. *Refining*: the 4-bit code against the probe in eight bits.
//! 3. The row itself in f32, as in an exhaustive comparison.
//!
//! The first two may be randomised. The lower bounds that <q, u> must reach are those of
//! [`crate::engine::certificate`]; this module computes upper bounds of <q, u>, which are proved at
//! [`Tables::new`] and [`QuantisedProbe`].
//!
//! Knows codes, bounds and floors. Does not know threads or which pieces of the gallery there are.
//!
//! - `level`: which codes. `tables`: a probe's look-up tables. `row_bounds`: what a row's sum must reach.
//! - `layout`, `kernels`, `refine`: how kernels are called, the table of one instruction set, 4-bit codes.
//! - `avx512`, `avx2`: their twin is `portable`. `scratch`: a thread's working memory.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod kernels;
mod layout;
mod level;
mod portable;
mod refine;
mod row_bounds;
mod scratch;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use thenar_index::codes::{BLOCK_ROWS, Codes};

use self::kernels::CodeKernels;
use self::layout::{Hit, IndexLine, ListCall, SCAN_PROBES, ScanCall, ScanHits, ScanProbe, TILE_BLOCKS};
pub(super) use self::level::Level;
use self::refine::{RefineCall, RefineProbe, prefetch_hits};
use self::row_bounds::{MaxDeficit, Scale};
use self::scratch::{FloorBounds, TileRows};
pub(super) use self::scratch::{PrefilterScratch, TILE_ROWS};
use self::tables::Tables;
use crate::engine::certificate::{Bounds, Certificate, PASSES};
use crate::engine::quantised_probe::QuantisedProbe;
use crate::engine::top_k::TopK;
use crate::engine::{Seed, SegmentView};

/// What one probe needs, made by the thread that needs it first.
#[derive(Debug, Default)]
struct Prepared {
    tables: [OnceLock<Tables>; Level::ALL.len()],
    quantised: OnceLock<QuantisedProbe>,
    seed: Seed,
}

impl Prepared {
    /// The source of one level's dither: it depends on the probe's seed and the level, and nothing else.
    fn dither(&self, level: Level) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::from_seed(self.seed);
        rng.set_stream(level as u64);
        rng
    }
}

/// How many rows that passed the first pass may wait to be refined, apart from those of one
/// more scan: their 4-bit codes, which are prefetched meanwhile, fit a core's own cache.
const HITS_MAX: usize = 1024;
/// If a scan lists at most so many rows, their 4-bit codes are prefetched at once. If it lists more, refining
/// itself prefetches early enough, and this would do the work twice.
const PREFETCHED_MAX: usize = 6;
/// Bytes of the tables of the probes that are scanned together over the tiles of a piece: with the tiles'
/// indices they stay in a core's own cache.
const TABLES_BYTES: usize = 384 << 10;

/// The most probes of one request, and places of a piece: each has 16 bits in a hit.
pub(super) const PROBES_MAX: usize = 1 << 16;
const PLACES_MAX: usize = 1 << 16;

/// One tile of a piece, ready to be scanned.
struct Tile<'a> {
    level: Level,
    /// Whether it is scanned without indices.
    by_planes: bool,
    groups: usize,
    blocks: usize,
    /// Place of its first row in the piece.
    at: usize,
    rows: &'a TileRows,
    indices: &'a [IndexLine],
}

/// The prefilter of one request, as all its threads see it.
pub(super) struct Prefilter<'a> {
    kernels: &'static CodeKernels,
    dim: usize,
    /// Shape: `[probes, dim]`.
    probes: &'a [f32],
    prepared: Vec<Prepared>,
    certificate: Certificate,
    bounds: Bounds,
    scales: [Scale; Level::ALL.len()],
    /// For each level, the largest step of dithered tables, if tables are dithered.
    dither: [Option<f32>; Level::ALL.len()],
}

impl<'a> Prefilter<'a> {
    /// Under a randomised certificate each of the three codes has one of [`PASSES`] parts of the miss
    /// probability, what dithering may add to it included.
    pub(super) fn new(
        kernels: &'static CodeKernels,
        dim: usize,
        probes: &'a [f32],
        seeds: impl Iterator<Item = Seed>,
        certificate: Certificate,
    ) -> Self {
        assert!(probes.len() / dim <= PROBES_MAX, "more probes than fit a hit");
        let each = match certificate {
            Certificate::Deterministic => Certificate::Deterministic,
            Certificate::Randomised { miss_probability } => {
                Certificate::Randomised { miss_probability: miss_probability / PASSES as f64 }
            }
        };
        let bounds = Bounds::dithered(each, dim);
        let scales = Level::ALL.map(|level| Scale::new(level, dim));
        let dither = Level::ALL.map(|level| {
            let Scale { usual, max, length_base, .. } = scales[level as usize];
            bounds.dither_step(kernels.groups(level, dim), usual, max).map(|step| step * length_base)
        });
        Self {
            kernels,
            dim,
            probes,
            prepared: seeds.map(|seed| Prepared { seed, ..Prepared::default() }).collect(),
            certificate,
            bounds,
            scales,
            dither,
        }
    }

    /// The certificate under which rows are passed over.
    pub(super) fn certificate(&self) -> Certificate {
        self.certificate
    }

    fn probe(&self, probe: usize) -> &'a [f32] {
        &self.probes[probe * self.dim..(probe + 1) * self.dim]
    }

    fn tables(&self, level: Level, probe: usize) -> &Tables {
        let prepared = &self.prepared[probe];
        prepared.tables[level as usize].get_or_init(|| {
            let mut rng = prepared.dither(level);
            Tables::new(self.kernels, level, self.probe(probe), self.dither[level as usize], &mut rng)
        })
    }

    /// Makes what a first pass at `level` needs; for each probe, the thread that comes first does. Threads start
    /// at different probes (`nth` of a hundred), so that they do not wait for each other.
    pub(super) fn prepare(&self, level: Level, nth: usize) {
        let probes = self.prepared.len();
        let start = probes * (nth % 100) / 100;
        for probe in (start..probes).chain(0..start) {
            self.tables(level, probe);
            self.quantised(probe);
        }
    }

    fn quantised(&self, probe: usize) -> &QuantisedProbe {
        self.prepared[probe].quantised.get_or_init(|| QuantisedProbe::new(self.probe(probe)))
    }

    fn floor_bounds(&self, floor: f32) -> FloorBounds {
        FloorBounds {
            floor,
            bound: self.bounds.bound(floor.into()),
            dithered: self.bounds.dithered_bound(floor.into()),
        }
    }

    /// Compares `count` coded rows (whole blocks, few tiles) from row `first` of `segment` on with every
    /// probe, and hands (probe, offset in the segment) of each live row that passes both steps to
    /// `pass`. Returns how many rows passed the first pass, over all probes.
    ///
    /// `scratch` has begun with this prefilter and that many rows. Probes are scanned in groups whose tables
    /// fit a core's own cache, each over all tiles.
    pub(super) fn piece(
        &self,
        level: Level,
        segment: &SegmentView<'_>,
        (first, count): (usize, usize),
        top_k: &[TopK],
        scratch: &mut PrefilterScratch,
        mut pass: impl FnMut(usize, usize),
    ) -> usize {
        let codes = segment.codes.blocks(self.dim, first / BLOCK_ROWS, count / BLOCK_ROWS);
        let groups = self.kernels.groups(level, self.dim);
        let tiles_count = count.div_ceil(TILE_ROWS);
        let PrefilterScratch { indices, hits, floor_bounds, tiles } = scratch;
        let blocks_of = |t: usize| TILE_BLOCKS.min(count / BLOCK_ROWS - t * TILE_BLOCKS);
        let tiles = &mut tiles[..tiles_count];
        let by_planes = self.kernels.scans_planes(top_k.len());
        let lines_of = |t: usize| {
            let first = t * groups * TILE_BLOCKS;
            if by_planes { 0..0 } else { first..first + groups * blocks_of(t) }
        };
        for (t, rows) in tiles.iter_mut().enumerate() {
            let codes = codes.blocks(self.dim, t * TILE_BLOCKS, blocks_of(t));
            self.read_rows(level, by_planes, segment, first + t * TILE_ROWS, &codes, rows);
            if !by_planes {
                self.kernels.spread(&codes, self.dim, level, &mut indices[lines_of(t)]);
            }
        }
        let scale = &self.scales[level as usize];
        let probes = top_k.iter().zip(floor_bounds.iter_mut()).enumerate().map(|(probe, (top_k, floor_bounds))| {
            let floor = top_k.threshold();
            if floor_bounds.floor.to_bits() != floor.to_bits() {
                *floor_bounds = self.floor_bounds(floor);
            }
            let Tables { entries, offset, step } = self.tables(level, probe);
            let bound = if self.dither[level as usize].is_some() { floor_bounds.dithered } else { floor_bounds.bound };
            ScanProbe { table: entries, max_deficit: MaxDeficit::new(scale, &self.bounds, bound, (*offset, *step)) }
        });
        let probes: Vec<ScanProbe<'_>> = probes.collect();
        let refine_probes = floor_bounds
            .iter()
            .enumerate()
            .map(|(probe, floor_bounds)| RefineProbe::new(self.quantised(probe), floor_bounds.bound));
        let refine_probes: Vec<RefineProbe<'_>> = refine_probes.collect();
        let together = (TABLES_BYTES / (groups << self.kernels.index_bits(level))).next_multiple_of(SCAN_PROBES);
        let (mut passed, mut waiting) = (0, 0);
        for (turn, probes) in probes.chunks(together).enumerate() {
            for (t, rows) in tiles.iter().enumerate() {
                let (blocks, indices) = (blocks_of(t), &indices[lines_of(t)]);
                let tile = Tile { level, by_planes, groups, blocks, at: t * TILE_ROWS, rows, indices };
                for (few, probes) in probes.chunks(SCAN_PROBES).enumerate() {
                    // The hits of one more call always fit.
                    let number = turn * together + few * SCAN_PROBES;
                    let listed = self.first_pass(&tile, number, probes, &codes, &mut hits[waiting..]);
                    if listed <= PREFETCHED_MAX {
                        prefetch_hits(&codes, &hits[waiting..waiting + listed]);
                    }
                    waiting += listed;
                    if waiting >= HITS_MAX {
                        passed += waiting;
                        self.refine(&mut hits[..waiting], &codes, &refine_probes, |probe, row| {
                            pass(probe, first + row);
                        });
                        waiting = 0;
                    }
                }
            }
        }
        passed += waiting;
        self.refine(&mut hits[..waiting], &codes, &refine_probes, |probe, row| pass(probe, first + row));
        passed
    }

    /// Scans a tile for some probes of which `first` is the number of the first, [`SCAN_PROBES`] at most,
    /// and writes what passes to `hits`. Returns how many did.
    #[inline]
    fn first_pass(
        &self,
        tile: &Tile<'_>,
        first: usize,
        probes: &[ScanProbe<'_>],
        codes: &Codes<'_>,
        hits: &mut [Hit],
    ) -> usize {
        let call = ScanCall {
            level: tile.level,
            indices: tile.indices,
            blocks: tile.blocks,
            probes,
            groups: tile.groups,
            row_bounds: &tile.rows.bounds,
            scale: &self.scales[tile.level as usize],
        };
        let mut found: ScanHits = Default::default();
        let any = if tile.by_planes {
            let codes = codes.blocks(self.dim, tile.at / BLOCK_ROWS, tile.blocks);
            self.kernels.scan_planes(&codes, self.dim, tile.level, &call, &mut found)
        } else {
            self.kernels.scan(&call, &mut found)
        };
        let always_pass = &tile.rows.bounds.always_pass;
        if !any && *always_pass == [0; TILE_BLOCKS] {
            return 0;
        }
        let call = ListCall {
            found: &found,
            probes: probes.len(),
            always_pass,
            live: &tile.rows.live,
            blocks: tile.blocks,
            first_probe: first,
            first_row: tile.at,
        };
        self.kernels.list(&call, hits)
    }

    /// Refines the rows that wait by their 4-bit codes, and hands (probe, place in the piece) of those that pass
    /// to `pass`.
    fn refine(
        &self,
        hits: &mut [Hit],
        codes: &Codes<'_>,
        probes: &[RefineProbe<'_>],
        mut pass: impl FnMut(usize, usize),
    ) {
        let passed = self.refine_hits(hits, codes, probes, &self.bounds);
        hits[..passed].iter().for_each(|hit| pass(hit.probe(), hit.row()));
    }

    /// Refines the coded rows at `offsets`, ascending, at the floor of `probe`, deterministically, and hands
    /// those that pass to `pass`. `scratch` has begun with this prefilter.
    pub(super) fn refine_rows(
        &self,
        probe: usize,
        codes: &Codes<'_>,
        offsets: impl Iterator<Item = usize>,
        top_k: &TopK,
        scratch: &mut PrefilterScratch,
        mut pass: impl FnMut(usize),
    ) {
        let bounds = Bounds::new(Certificate::Deterministic, self.dim);
        let PrefilterScratch { hits, .. } = scratch;
        let mut offsets = offsets.peekable();
        while let Some(offset) = offsets.peek() {
            // A stretch of rows whose places fit a hit.
            let first = offset / BLOCK_ROWS;
            let blocks = (codes.rows() / BLOCK_ROWS - first).min(PLACES_MAX / BLOCK_ROWS);
            let mut waiting = 0;
            let within = |offset: &usize| *offset < (first + blocks) * BLOCK_ROWS;
            while waiting < HITS_MAX
                && let Some(offset) = offsets.next_if(within)
            {
                hits[waiting] = Hit::new(0, offset - first * BLOCK_ROWS);
                waiting += 1;
            }
            let floor = top_k.threshold();
            let refine_probes = [RefineProbe::new(self.quantised(probe), bounds.bound(floor.into()))];
            let passed =
                self.refine_hits(&mut hits[..waiting], &codes.blocks(self.dim, first, blocks), &refine_probes, &bounds);
            hits[..passed].iter().for_each(|hit| pass(first * BLOCK_ROWS + hit.row()));
        }
    }

    /// Moves those of `hits` whose 4-bit codes pass to the front, and returns how many there are.
    fn refine_hits(&self, hits: &mut [Hit], codes: &Codes<'_>, probes: &[RefineProbe<'_>], bounds: &Bounds) -> usize {
        let call = RefineCall { four_bit: codes.four_bit, factors: codes.factors, probes, bounds };
        self.kernels.refine(&call, hits)
    }

    fn read_rows(
        &self,
        level: Level,
        by_planes: bool,
        segment: &SegmentView<'_>,
        first: usize,
        codes: &Codes<'_>,
        tile: &mut TileRows,
    ) {
        let scale = &self.scales[level as usize];
        let TileRows { live, bounds } = tile;
        *live = [0; TILE_BLOCKS];
        let blocks = codes.rows() / BLOCK_ROWS;
        for (b, live) in live.iter_mut().enumerate().take(blocks) {
            *live = segment.live[first / BLOCK_ROWS + b];
            // Factors of other levels are not read: a first pass over codebook codes reads nothing but their lines.
            let always_pass = match level {
                Level::Codebook if by_planes => 0,
                Level::Codebook => {
                    self.kernels.codebook_row_bounds(scale, codes.codebook_cosines(self.dim, b), &mut bounds.along[b])
                }
                Level::TwoBit => {
                    let factors = codes.factors[b * BLOCK_ROWS..][..BLOCK_ROWS].try_into().expect("a block");
                    self.kernels.row_bounds(scale, factors, &mut bounds.along[b], &mut bounds.length[b])
                }
            };
            bounds.always_pass[b] = always_pass & *live;
        }
        bounds.always_pass[blocks..].fill(0);
    }
}
