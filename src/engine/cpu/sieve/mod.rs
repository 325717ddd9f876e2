//! Sifting by codes: most rows are passed over after a look at a thirtieth of their bytes.
//!
//! A row goes through three looks, each at fewer rows and more bytes:
//!
//! 1. The *first look* at one [`Level`] of the code, by table look-ups, 64 rows at a time.
//! 2. The fine code against the probe in eight bits.
//! 3. The row itself in f32, as in an exhaustive sift.
//!
//! The first two may be randomised.
//!
//! Every bound is `certificate`'s; this module makes the upper bounds of <q, u> that are held
//! against its bars, and proves them where they are made: [`Tables::new`], [`QuantisedProbe::new`].
//!
//! Knows codes, cuts and floors. Does not know threads or which pieces of the gallery there are.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_close;
mod bars;
pub(super) mod kernels;
mod portable;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use thenar_index::codebook;
use thenar_index::codes::{BLOCK_ROWS, Codes};
use zeroize::Zeroize;

use self::bars::{Most, Scale, TileBars};
use self::kernels::{
    CloseCall, CloseProbe, CodeKernels, Hit, IndexLine, LIST_SLACK, ListCall, SCAN_PROBES, ScanCall, ScanHits,
    ScanProbe, TILE_BLOCKS,
};
use self::tables::Tables;
use crate::engine::certificate::{Bound, Bounds, Certificate, PASSES};
use crate::engine::quantised_probe::QuantisedProbe;
use crate::engine::top_k::TopK;
use crate::engine::{Seed, SegmentView};

/// Which bits of a row's codes the first look reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Words: six bits for eight components. Passes nothing over under the deterministic certificate.
    Codebook,
    /// Signs: one bit a component. Passes nothing over under the deterministic certificate.
    OneBit,
    /// Signs and two magnitudes.
    TwoBit,
}

impl Level {
    pub(super) const ALL: [Self; 3] = [Self::Codebook, Self::OneBit, Self::TwoBit];

    /// Whether codes of one dimension differ in length.
    pub(super) fn has_lengths(self) -> bool {
        self == Self::TwoBit
    }

    /// Whether entries that are added in bytes may come to more than one holds. Saturating addition
    /// costs up to a tenth of a scan, and cuts less off than smaller entries: with many groups, and
    /// few of them together, that is worth it.
    pub(super) fn saturates(self) -> bool {
        self == Self::TwoBit
    }

    /// The cosine of a usual row with its code.
    pub(super) fn usual_cosine(self) -> f32 {
        match self {
            // What words keep of normal variables.
            Self::Codebook => 0.747,
            // The mean magnitude of a normal variable, and what four levels keep of one.
            Self::OneBit => 0.798,
            Self::TwoBit => 0.939,
        }
    }

    /// Length of every code of `dim` components; of the shortest, where they differ.
    pub(super) fn least_norm(self, dim: usize) -> f32 {
        match self {
            Self::Codebook => (codebook::square(dim) as f32).sqrt(),
            Self::OneBit | Self::TwoBit => (dim as f32).sqrt(),
        }
    }
}

/// What one probe needs, made by the thread that needs it first.
#[derive(Debug, Default)]
struct Prepared {
    tables: [OnceLock<Tables>; Level::ALL.len()],
    fine: OnceLock<QuantisedProbe>,
    seed: Seed,
}

impl Prepared {
    /// What one level's dither is drawn from: the probe's seed and the level, and nothing else.
    fn dither(&self, level: Level) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::from_seed(self.seed);
        rng.set_stream(level as u64);
        rng
    }
}

/// Rows that have passed the first look and wait for the second, at most, but for those of one
/// more scan: their fine codes, which are asked for meanwhile, fit a core's own cache.
const HITS_MAX: usize = 1024;
/// Rows that one scan may list for their fine codes to be asked for at once. Where more pass, the
/// second look itself asks early enough, and this would be work twice.
const ASKED_MAX: usize = 6;
/// Bytes of the tables of probes that take turns over the tiles of a piece: with the tiles' indices
/// they stay in a core's own cache.
const TABLES_BYTES: usize = 384 << 10;

/// Probes of one sift by codes, and places of a piece, at most: each has 16 bits in a hit.
pub(super) const PROBES_MAX: usize = 1 << 16;
const PLACES_MAX: usize = 1 << 16;

/// A probe's cuts at the floor they were made for.
#[derive(Debug, Clone, Copy)]
struct Cuts {
    floor: f32,
    /// None while the floor is too low.
    cut: Option<Bound>,
    /// Likewise, for a first look at dithered tables.
    dithered: Option<Bound>,
}

/// What one thread sieves in. Kept between sifts.
#[derive(Debug, Default)]
pub(super) struct SieveBench {
    indices: Vec<IndexLine>,
    hits: Vec<Hit>,
    cuts: Vec<Cuts>,
    tiles: Vec<TileTerms>,
}

impl SieveBench {
    pub(super) fn bytes(&self) -> usize {
        self.indices.capacity() * size_of::<IndexLine>()
            + self.hits.capacity() * size_of::<Hit>()
            + self.cuts.capacity() * size_of::<Cuts>()
            + self.tiles.capacity() * size_of::<TileTerms>()
    }

    /// Overwrites the copies of codes.
    pub(super) fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<IndexLine, u8>(&mut self.indices).zeroize();
    }

    /// Makes ready for a sift with pieces of at most `rows` rows: room, and no cuts of another
    /// certificate. Wipes indices before it moves them, so that no copy of a code is left in memory
    /// that is given back.
    pub(super) fn begin(&mut self, sieve: &Sieve<'_>, rows: usize) {
        let tiles = rows.div_ceil(TILE_ROWS);
        let groups = Level::ALL.map(|level| sieve.kernels.groups(level, sieve.dim)).into_iter().max().unwrap_or(0);
        let by_planes = sieve.kernels.scans_planes(sieve.prepared.len());
        let lines = if by_planes { 0 } else { tiles * groups * TILE_BLOCKS };
        if self.indices.len() < lines {
            self.wipe();
            self.indices.resize(lines, IndexLine::ZERO);
        }
        if self.tiles.len() < tiles {
            self.tiles.resize_with(tiles, || TileTerms::EMPTY);
        }
        self.hits.resize(HITS_MAX + SCAN_PROBES * TILE_ROWS + LIST_SLACK, Hit(0));
        self.cuts.clear();
        self.cuts.resize(sieve.prepared.len(), sieve.cuts(f32::NEG_INFINITY));
    }

    #[cfg(test)]
    pub(super) fn holds_rows(&self) -> bool {
        self.indices.iter().any(|line| *line != IndexLine::ZERO)
    }
}

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = TILE_BLOCKS * BLOCK_ROWS;

/// A tile's rows as the first look needs them.
#[derive(Debug)]
struct TileTerms {
    /// Of each block, the live rows.
    live: [u64; TILE_BLOCKS],
    bars: TileBars,
}

impl TileTerms {
    const EMPTY: Self = Self { live: [0; TILE_BLOCKS], bars: TileBars::EMPTY };
}

/// One tile of a piece, ready to be scanned.
struct Tile<'a> {
    level: Level,
    /// Whether it is scanned without indices.
    by_planes: bool,
    groups: usize,
    blocks: usize,
    /// Place of its first row in the piece.
    at: usize,
    factors: &'a TileTerms,
    indices: &'a [IndexLine],
}

/// One sift by codes, as all its threads see it.
pub(super) struct Sieve<'a> {
    kernels: &'static CodeKernels,
    dim: usize,
    /// Shape: `[probes, dim]`.
    probes: &'a [f32],
    prepared: Vec<Prepared>,
    certificate: Certificate,
    cutter: Bounds,
    scales: [Scale; Level::ALL.len()],
    /// For each level, the largest step of tables that are dithered, if they are.
    dither: [Option<f32>; Level::ALL.len()],
}

impl<'a> Sieve<'a> {
    /// Under a randomised certificate each of the four codes has one of [`PASSES`] parts of the miss
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
        let cutter = Bounds::dithered(each, dim);
        let scales = Level::ALL.map(|level| Scale::new(level, dim));
        let dither = Level::ALL.map(|level| {
            let Scale { usual, most, length_base, .. } = scales[level as usize];
            cutter.dither_step(kernels.groups(level, dim), usual, most).map(|step| step * length_base)
        });
        Self {
            kernels,
            dim,
            probes,
            prepared: seeds.map(|seed| Prepared { seed, ..Prepared::default() }).collect(),
            certificate,
            cutter,
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

    /// Makes what a first look at `level` needs, each probe's by whoever comes first. Threads start
    /// at different probes (`nth` of a hundred) so that they do not wait for each other.
    pub(super) fn prepare(&self, level: Level, nth: usize) {
        let probes = self.prepared.len();
        let start = probes * (nth % 100) / 100;
        for probe in (start..probes).chain(0..start) {
            self.tables(level, probe);
            self.fine_probe(probe);
        }
    }

    fn fine_probe(&self, probe: usize) -> &QuantisedProbe {
        self.prepared[probe].fine.get_or_init(|| QuantisedProbe::new(self.probe(probe)))
    }

    fn cuts(&self, floor: f32) -> Cuts {
        Cuts { floor, cut: self.cutter.bound(floor.into()), dithered: self.cutter.dithered_bound(floor.into()) }
    }

    /// Compares `count` coded rows (whole blocks, few tiles) from row `first` of `block` on with every
    /// probe, and hands (probe, offset in the block) of each live row that passes two looks to
    /// `pass`. Returns the rows that passed the first, over all probes.
    ///
    /// `bench` has begun with this sieve and that many rows. Probes take turns in groups whose tables
    /// fit a core's own cache, each over all tiles.
    pub(super) fn piece(
        &self,
        level: Level,
        block: &SegmentView<'_>,
        (first, count): (usize, usize),
        floors: &[TopK],
        bench: &mut SieveBench,
        mut pass: impl FnMut(usize, usize),
    ) -> usize {
        let codes = block.codes.blocks(self.dim, first / BLOCK_ROWS, count / BLOCK_ROWS);
        let groups = self.kernels.groups(level, self.dim);
        let tiles_count = count.div_ceil(TILE_ROWS);
        let SieveBench { indices, hits, cuts, tiles } = bench;
        let blocks_of = |t: usize| TILE_BLOCKS.min(count / BLOCK_ROWS - t * TILE_BLOCKS);
        let tiles = &mut tiles[..tiles_count];
        let by_planes = self.kernels.scans_planes(floors.len());
        let lines_of = |t: usize| {
            let first = t * groups * TILE_BLOCKS;
            if by_planes { 0..0 } else { first..first + groups * blocks_of(t) }
        };
        for (t, factors) in tiles.iter_mut().enumerate() {
            let codes = codes.blocks(self.dim, t * TILE_BLOCKS, blocks_of(t));
            self.read_terms(level, by_planes, block, first + t * TILE_ROWS, &codes, factors);
            if !by_planes {
                self.kernels.spread(&codes, self.dim, level, &mut indices[lines_of(t)]);
            }
        }
        let scale = &self.scales[level as usize];
        let probes = floors.iter().zip(cuts.iter_mut()).enumerate().map(|(probe, (floor, cuts))| {
            let floor = floor.threshold();
            if cuts.floor.to_bits() != floor.to_bits() {
                *cuts = self.cuts(floor);
            }
            let Tables { entries, offset, step } = self.tables(level, probe);
            let cut = if self.dither[level as usize].is_some() { cuts.dithered } else { cuts.cut };
            ScanProbe { table: entries, most: Most::new(scale, &self.cutter, cut, (*offset, *step)) }
        });
        let probes: Vec<ScanProbe<'_>> = probes.collect();
        let closer = cuts.iter().enumerate().map(|(probe, cuts)| CloseProbe::new(self.fine_probe(probe), cuts.cut));
        let closer: Vec<CloseProbe<'_>> = closer.collect();
        let together = (TABLES_BYTES / (groups << self.kernels.index_bits(level))).next_multiple_of(SCAN_PROBES);
        let (mut passed, mut waiting) = (0, 0);
        for (turn, probes) in probes.chunks(together).enumerate() {
            for (t, factors) in tiles.iter().enumerate() {
                let (blocks, indices) = (blocks_of(t), &indices[lines_of(t)]);
                let tile = Tile { level, by_planes, groups, blocks, at: t * TILE_ROWS, factors, indices };
                for (few, probes) in probes.chunks(SCAN_PROBES).enumerate() {
                    // Those of one more call always fit.
                    let number = turn * together + few * SCAN_PROBES;
                    let listed = self.first_look(&tile, number, probes, &codes, &mut hits[waiting..]);
                    if listed <= ASKED_MAX {
                        kernels::ask_for(&codes, &hits[waiting..waiting + listed]);
                    }
                    waiting += listed;
                    if waiting >= HITS_MAX {
                        passed += waiting;
                        self.second_look(&mut hits[..waiting], &codes, &closer, |probe, row| pass(probe, first + row));
                        waiting = 0;
                    }
                }
            }
        }
        passed += waiting;
        self.second_look(&mut hits[..waiting], &codes, &closer, |probe, row| pass(probe, first + row));
        passed
    }

    /// Scans a tile for some probes of which `first` is the number of the first, [`SCAN_PROBES`] at most,
    /// and writes what passes to `hits`. Returns how many did.
    #[inline]
    fn first_look(
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
            bars: &tile.factors.bars,
            scale: &self.scales[tile.level as usize],
        };
        let mut found: ScanHits = Default::default();
        let any = if tile.by_planes {
            let codes = codes.blocks(self.dim, tile.at / BLOCK_ROWS, tile.blocks);
            self.kernels.scan_planes(&codes, self.dim, tile.level, &call, &mut found)
        } else {
            self.kernels.scan(&call, &mut found)
        };
        let odd = &tile.factors.bars.odd;
        if !any && *odd == [0; TILE_BLOCKS] {
            return 0;
        }
        let call = ListCall {
            found: &found,
            probes: probes.len(),
            odd,
            live: &tile.factors.live,
            blocks: tile.blocks,
            first_probe: first,
            first_row: tile.at,
        };
        self.kernels.list(&call, hits)
    }

    /// Looks at the fine codes of the rows that wait, and hands on (probe, place in the piece) of those
    /// that pass.
    fn second_look(
        &self,
        hits: &mut [Hit],
        codes: &Codes<'_>,
        probes: &[CloseProbe<'_>],
        mut pass: impl FnMut(usize, usize),
    ) {
        let passed = self.closer(hits, codes, probes, &self.cutter);
        hits[..passed].iter().for_each(|hit| pass(hit.probe(), hit.row()));
    }

    /// Hands those of the coded rows at `offsets`, ascending, to `pass` whose fine codes pass a second
    /// look at the floor of `probe`, which is deterministic here. `bench` has begun with this sieve.
    pub(super) fn look_closer(
        &self,
        probe: usize,
        codes: &Codes<'_>,
        offsets: impl Iterator<Item = usize>,
        floor: &TopK,
        bench: &mut SieveBench,
        mut pass: impl FnMut(usize),
    ) {
        let cutter = Bounds::new(Certificate::Deterministic, self.dim);
        let SieveBench { hits, .. } = bench;
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
            let floor = floor.threshold();
            let closer = [CloseProbe::new(self.fine_probe(probe), cutter.bound(floor.into()))];
            let passed = self.closer(&mut hits[..waiting], &codes.blocks(self.dim, first, blocks), &closer, &cutter);
            hits[..passed].iter().for_each(|hit| pass(first * BLOCK_ROWS + hit.row()));
        }
    }

    /// Moves those of `hits` to the front that pass the second look, and returns how many they are.
    fn closer(&self, hits: &mut [Hit], codes: &Codes<'_>, probes: &[CloseProbe<'_>], cutter: &Bounds) -> usize {
        let call = CloseCall { fine: codes.four_bit, factors: codes.factors, probes, cutter };
        self.kernels.close(&call, hits)
    }

    fn read_terms(
        &self,
        level: Level,
        by_planes: bool,
        block: &SegmentView<'_>,
        first: usize,
        codes: &Codes<'_>,
        tile: &mut TileTerms,
    ) {
        let scale = &self.scales[level as usize];
        let TileTerms { live, bars } = tile;
        *live = [0; TILE_BLOCKS];
        let blocks = codes.rows() / BLOCK_ROWS;
        for (b, live) in live.iter_mut().enumerate().take(blocks) {
            *live = block.live[first / BLOCK_ROWS + b];
            // Factors of other levels are left alone: a look at codebook codes reads nothing but their lines.
            let odd = match level {
                Level::Codebook if by_planes => 0,
                Level::Codebook => {
                    self.kernels.tell_sketches(scale, codes.codebook_cosines(self.dim, b), &mut bars.along[b])
                }
                Level::OneBit | Level::TwoBit => {
                    let factors = codes.factors[b * BLOCK_ROWS..][..BLOCK_ROWS].try_into().expect("a block");
                    self.kernels.tell(scale, level, factors, &mut bars.along[b], &mut bars.length[b])
                }
            };
            bars.odd[b] = odd & *live;
        }
        bars.odd[blocks..].fill(0);
    }
}
