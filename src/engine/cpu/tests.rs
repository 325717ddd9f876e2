//! The promise of the engine on every instruction set, against brute force: every row that
//! matters is among the candidates, once, and little else is.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use roaring::RoaringBitmap;
use thenar_index::codes::{BLOCK_ROWS, Codes, OwnedCodes};

use super::prefilter::Level;
use super::*;
use crate::engine::certificate::{Certificate, PASSES};
use crate::engine::dot::dot_slack;
use crate::engine::{Seed, SegmentView};
use crate::model::synthetic::SyntheticGallery;
use crate::search::score::exact;

fn paths() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|path| path.is_available())
}

/// A unit vector of f32 from any direction.
fn normalised(values: &[f64]) -> Vec<f32> {
    let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    values.iter().map(|v| (v / norm) as f32).collect()
}

fn direction(rng: &mut ChaCha8Rng, dim: usize) -> Vec<f64> {
    (0..dim).map(|_| rng.sample(StandardNormal)).collect()
}

/// One block of a test gallery.
struct Block {
    first_row: u32,
    rows: Vec<f16>,
    live: Vec<u64>,
    codes: OwnedCodes,
}

/// A gallery in blocks of odd sizes with gaps between them.
struct Gallery {
    dim: usize,
    /// Whether the engine is shown the codes.
    coded: bool,
    blocks: Vec<Block>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Independent directions.
    Random,
    /// Twenty centres, rows within 0.002 of one: refine_probes than bf16 tells apart.
    Clustered,
    /// One direction for all.
    Equal,
    /// Every row several times.
    Duplicates,
    /// Every row with its opposite, and zero rows between.
    Antipodes,
}

const KINDS: [Kind; 5] = [Kind::Random, Kind::Clustered, Kind::Equal, Kind::Duplicates, Kind::Antipodes];

impl Gallery {
    fn new(rng: &mut ChaCha8Rng, kind: Kind, dim: usize, count: usize, dead: f64) -> Self {
        let centres: Vec<Vec<f64>> = (0..20).map(|_| direction(rng, dim)).collect();
        let rows: Vec<Vec<f16>> = (0..count)
            .map(|i| {
                let values = match kind {
                    Kind::Random => direction(rng, dim),
                    Kind::Clustered => {
                        let noise = direction(rng, dim);
                        centres[i % 20].iter().zip(&noise).map(|(c, n)| c + 0.002 * n).collect()
                    }
                    Kind::Equal => centres[0].clone(),
                    Kind::Duplicates => centres[i * 7 % 20].clone(),
                    Kind::Antipodes => {
                        let factor = [1.0, -1.0, 0.0][i % 3];
                        centres[i / 3 % 20].iter().map(|c| c * factor).collect()
                    }
                };
                if values.iter().all(|v| *v == 0.0) {
                    return vec![f16::ZERO; dim];
                }
                normalised(&values).into_iter().map(f16::from_f32).collect()
            })
            .collect();
        let mut blocks = Vec::new();
        let mut first_row = rng.random_range(0..100);
        let mut rest = &rows[..];
        while !rest.is_empty() || blocks.is_empty() {
            let size = rng.random_range(1..=1 + 2 * count / 3).min(rest.len());
            let (here, after) = rest.split_at(size);
            let here = here.concat();
            blocks.push(Block {
                first_row,
                codes: OwnedCodes::of(&here[..size / BLOCK_ROWS * BLOCK_ROWS * dim], dim),
                rows: here,
                live: (0..size.div_ceil(64))
                    .map(|_| (0..64).fold(0, |word, bit| word | u64::from(!rng.random_bool(dead)) << bit))
                    .collect(),
            });
            first_row += size as u32 + rng.random_range(0..3) * 64;
            rest = after;
        }
        Self { dim, coded: true, blocks }
    }

    fn view(&self) -> GalleryView<'_> {
        let blocks = self.blocks.iter().zip(1..).map(|(block, identity)| SegmentView {
            identity,
            first_row: block.first_row,
            rows: &block.rows,
            live: &block.live,
            codes: if self.coded { block.codes.as_codes() } else { Codes::default() },
        });
        GalleryView { dim: self.dim, segments: blocks.collect() }
    }

    /// Brute force: (score, row) of every live row.
    fn scores(&self, probe: &[f32]) -> Vec<(f64, u32)> {
        let mut scores = Vec::new();
        for block in self.view().segments {
            for (i, row) in block.rows.chunks_exact(self.dim).enumerate() {
                if block.is_live(i) {
                    scores.push((exact(row, probe), block.first_row + i as u32));
                }
            }
        }
        scores.sort_by(|a, b| b.0.total_cmp(&a.0));
        scores
    }

    /// Probes of every sort: rows themselves, rows with noise, strangers, single components.
    fn probes(&self, rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
        let rows: Vec<&[f16]> = self.blocks.iter().flat_map(|b| b.rows.chunks_exact(self.dim)).collect();
        let mut probes = Vec::new();
        for i in 0..count {
            let mut values = direction(rng, self.dim);
            if i % 4 < 2 && !rows.is_empty() {
                let row = rows[rng.random_range(0..rows.len())];
                let noise = if i % 4 == 0 { 0.0 } else { 0.6 / (self.dim as f64).sqrt() };
                for (value, row) in values.iter_mut().zip(row) {
                    *value = *value * noise + row.to_f64();
                }
            } else if i % 4 == 2 {
                values.fill(0.0);
                values[i % self.dim] = -1.0;
            }
            if values.iter().all(|v| *v == 0.0) {
                values[0] = 1.0;
            }
            probes.extend(normalised(&values));
        }
        probes
    }
}

/// Checks one probe's candidates against brute force: a superset, without repeats, and tight: an
/// f32 number is within `slack` of the score, so nothing further than four of them below the
/// last row that counts can be there.
fn check(scores: &[(f64, u32)], floor: f32, keep: u32, dim: usize, candidates: &[u32], what: &str) {
    let kth = match keep {
        0 => f64::NEG_INFINITY,
        keep => scores.get(keep as usize - 1).map_or(f64::NEG_INFINITY, |s| s.0),
    };
    let least = f64::from(floor).max(kth);
    let margin = 4.1 * f64::from(dot_slack(dim));
    let found: std::collections::HashSet<u32> = candidates.iter().copied().collect();
    assert_eq!(found.len(), candidates.len(), "repeats: {what}");
    for (score, row) in scores {
        assert!(*score < least || found.contains(row), "row {row} with {score} is missing, least {least}: {what}");
        assert!(
            *score >= least - margin || !found.contains(row),
            "row {row} with {score} has no business there, least {least}: {what}"
        );
    }
    let live: std::collections::HashSet<u32> = scores.iter().map(|s| s.1).collect();
    assert!(found.is_subset(&live), "dead or unknown rows: {what}");
}

/// Asserts that a reported floor is kept, and no higher than `keep` rows allow.
fn check_held(scores: &[(f64, u32)], asked: f32, keep: u32, held: f32, candidates: &[u32], what: &str) {
    let found: std::collections::HashSet<u32> = candidates.iter().copied().collect();
    let missing = scores.iter().find(|(score, row)| *score >= f64::from(held) && !found.contains(row));
    assert_eq!(missing, None, "held to {held}: {what}");
    match scores.get((keep as usize).wrapping_sub(1)) {
        Some((kth, _)) => {
            assert!(held >= asked && f64::from(held) <= kth.max(asked.into()), "{held} for {kth}: {what}");
        }
        None => assert_eq!(held.to_bits(), asked.to_bits(), "nothing raises it: {what}"),
    }
}

/// One gallery, some probes, many floors, on every path and with one and three threads.
fn check_gallery(seed: u64, kind: Kind, dim: usize, count: usize, probes: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let dead = [0.0, 0.2, 0.9][rng.random_range(0..3)];
    let gallery = Gallery::new(&mut rng, kind, dim, count, dead);
    let values = gallery.probes(&mut rng, probes);
    let scores: Vec<Vec<(f64, u32)>> = values.chunks_exact(dim).map(|probe| gallery.scores(probe)).collect();
    let keep: Vec<u32> = (0..probes).map(|_| [0, 1, 10, 100][rng.random_range(0..4)]).collect();
    let floors: Vec<f32> = scores
        .iter()
        .map(|scores| match rng.random_range(0..6) {
            0 => -1.1,
            1 => 0.0,
            2 => 0.5,
            3 => 1.0,
            // The f32 at or next below some score: the row is just in, or exactly at the floor.
            _ if scores.is_empty() => 0.25,
            _ => {
                let score = scores[rng.random_range(0..scores.len().min(30))].0;
                let nearest = score as f32;
                if f64::from(nearest) <= score { nearest } else { nearest.next_down() }
            }
        })
        .collect();
    let request = CandidateRequest {
        probes: &values,
        floors: &floors,
        keep: &keep,
        candidates_max: count + 1,
        ..CandidateRequest::default()
    };
    let view = gallery.view();
    for path in paths() {
        for threads in [1, 3] {
            let engine = CpuEngine::with_simd(threads, path).unwrap();
            let mut candidates = CandidateRows::default();
            for round in 0..2 {
                engine.find_candidates(&view, &request, &mut candidates).unwrap();
                // The next round reads copies of codebook codes.
                engine.follow(&view).unwrap();
                assert_eq!(candidates.rows.len(), probes);
                for p in 0..probes {
                    let what = format!(
                        "{path}, {threads} threads, round {round}, seed {seed}, {kind:?}, {count} x {dim}, probe {p} of {probes}, floor {}, keep {}",
                        floors[p], keep[p]
                    );
                    assert!(!candidates.overflowed[p], "overflow: {what}");
                    check(&scores[p], floors[p], keep[p], dim, &candidates.rows[p], &what);
                    check_held(&scores[p], floors[p], keep[p], candidates.floors[p], &candidates.rows[p], &what);
                }
            }
        }
    }
}

#[test]
fn candidates_are_a_tight_superset_for_every_dimension_and_odd_count() {
    let mut seed = 0;
    for dim in [32, 64, 128, 256, 512, 1024, 2048] {
        for count in [0, 1, 63, 64, 65] {
            seed += 1;
            let kind = KINDS[seed as usize % 5];
            check_gallery(seed, kind, dim, count, 1 + seed as usize * 7 % 20);
        }
    }
}

#[test]
fn candidates_are_a_tight_superset_in_every_kind_of_gallery() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (j, probes) in [1, 2, 5, 13, 26, 40].into_iter().enumerate() {
            let seed = 100 + (i * 10 + j) as u64;
            check_gallery(seed, kind, [64, 128, 512][(i + j) % 3], 1000, probes);
        }
    }
}

#[test]
fn candidates_are_a_tight_superset_in_a_larger_gallery() {
    check_gallery(200, Kind::Random, 128, 20_000, 3);
    check_gallery(201, Kind::Clustered, 64, 20_000, 40);
    check_gallery(202, Kind::Random, 512, 20_000, 14);
}

#[test]
fn tiles_of_every_width_agree_with_brute_force() {
    // More probes than any path gives to dots, in numbers that leave every remainder.
    for probes in 66..=78 {
        check_gallery(300 + probes as u64, Kind::Random, 64, 333, probes);
    }
}

#[test]
fn the_standard_gallery_leaves_few_candidates() {
    let (dim, count) = (256, 20_000_u32);
    let standard = SyntheticGallery::new(11, dim);
    let mut rows = vec![f16::ZERO; dim * count as usize];
    let mut row = vec![0.0; dim];
    for (i, to) in (0..).zip(rows.chunks_exact_mut(dim)) {
        standard.row(i, &mut row);
        to.iter_mut().zip(&row).for_each(|(to, value)| *to = f16::from_f32(*value));
    }
    let live = vec![u64::MAX; count.div_ceil(64) as usize];
    let codes = OwnedCodes::of(&rows[..rows.len() / dim / BLOCK_ROWS * BLOCK_ROWS * dim], dim);
    let gallery = Gallery { dim, coded: true, blocks: vec![Block { first_row: 0, rows, live, codes }] };
    let probes = 20;
    let mut values = vec![0.0; probes * dim];
    for (i, probe) in (0..).zip(values.chunks_exact_mut(dim)) {
        if i % 2 == 0 { standard.mate(i * 900, 0, probe) } else { standard.stranger(i, probe) }
    }
    let floors = vec![0.5; probes];
    for keep in [0, 10] {
        let keep = vec![keep; probes];
        let request = CandidateRequest {
            probes: &values,
            floors: &floors,
            keep: &keep,
            candidates_max: 100,
            ..CandidateRequest::default()
        };
        for path in paths() {
            let mut candidates = CandidateRows::default();
            let engine = CpuEngine::with_simd(2, path).unwrap();
            engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
            let found: usize = candidates.rows.iter().map(Vec::len).sum();
            let all = values.chunks_exact(dim).flat_map(|probe| gallery.scores(probe));
            let matter = all.filter(|(score, _)| *score >= 0.5).count();
            assert!(matter >= probes / 2, "every mate counts");
            assert!((matter..=matter + 2).contains(&found), "{path}: {found} candidates, {matter} matter");
        }
    }
}

#[test]
fn more_candidates_than_allowed_are_an_overflow_and_as_many_are_not() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let gallery = Gallery::new(&mut rng, Kind::Equal, 64, 5000, 0.0);
    let count = gallery.scores(&vec![0.1; 64]).len();
    for probes in [1, 70] {
        let mut values = gallery.probes(&mut rng, probes);
        // The first probe is the row of the gallery, the last is its opposite.
        values.copy_within(0..64, (probes - 1) * 64);
        if probes > 1 {
            values[(probes - 1) * 64..].iter_mut().for_each(|v| *v = -*v);
        }
        for path in paths() {
            let engine = CpuEngine::with_simd(2, path).unwrap();
            for keep in [0, 10] {
                for (candidates_max, overflows) in [(count, false), (count - 1, true), (20, true), (0, true)] {
                    let request = CandidateRequest {
                        probes: &values,
                        floors: &vec![0.5; probes],
                        keep: &vec![keep; probes],
                        candidates_max,
                        ..CandidateRequest::default()
                    };
                    let mut candidates = CandidateRows::default();
                    engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
                    assert_eq!(candidates.overflowed[0], overflows, "{path}, keep {keep}, {candidates_max} of {count}");
                    if !overflows {
                        assert_eq!(candidates.rows[0].len(), count);
                    }
                    if probes > 1 {
                        assert!(!candidates.overflowed[probes - 1], "the opposite has no candidates");
                        assert!(candidates.rows[probes - 1].is_empty());
                    }
                }
            }
            // What overflowed once leaves no trace in the next request.
            let request = CandidateRequest {
                probes: &values,
                floors: &vec![0.5; probes],
                keep: &vec![0; probes],
                candidates_max: count,
                ..CandidateRequest::default()
            };
            let mut candidates = CandidateRows::default();
            engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
            assert_eq!(candidates.rows[0].len(), count);
        }
    }
}

#[test]
fn only_live_rows_raise_a_floor() {
    // The best hundred rows are dead; the ten best of the living must all be found.
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let mut gallery = Gallery::new(&mut rng, Kind::Random, 64, 3000, 0.0);
    for probes in [1, 70] {
        let values = gallery.probes(&mut rng, probes);
        let best: Vec<u32> = gallery.scores(&values[..64]).iter().take(100).map(|s| s.1).collect();
        for block in &mut gallery.blocks {
            for row in best.iter().filter_map(|row| row.checked_sub(block.first_row)) {
                if let Some(word) = block.live.get_mut(row as usize / 64) {
                    *word &= !(1 << (row % 64));
                }
            }
        }
        let request = CandidateRequest {
            probes: &values,
            floors: &vec![-1.1; probes],
            keep: &vec![10; probes],
            candidates_max: 3000,
            ..CandidateRequest::default()
        };
        let scores = gallery.scores(&values[..64]);
        for path in paths() {
            let mut candidates = CandidateRows::default();
            CpuEngine::with_simd(2, path).unwrap().find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
            check(&scores, -1.1, 10, 64, &candidates.rows[0], path.as_str());
        }
    }
}

#[test]
fn an_engine_says_what_it_is_and_forgets_what_it_read() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let gallery = Gallery::new(&mut rng, Kind::Random, 128, 2000, 0.0);
    let values = gallery.probes(&mut rng, 80);
    let request = CandidateRequest {
        probes: &values,
        floors: &[0.5; 80],
        keep: &[10; 80],
        candidates_max: 100,
        ..CandidateRequest::default()
    };
    for path in paths() {
        let engine = CpuEngine::with_simd(2, path).unwrap();
        assert_eq!(engine.describe().host_bytes, 0);
        let mut candidates = CandidateRows::default();
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
        let description = engine.describe();
        assert_eq!((description.kind, description.threads), ("cpu", 2));
        assert_eq!(description.adapter, path.as_str());
        // Packed probes alone are 80 x 128 numbers of two or four bytes.
        assert!((20_000..4_000_000).contains(&description.host_bytes), "{description:?}");
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
        assert_eq!(engine.describe().host_bytes, description.host_bytes, "{path}: scratch is used again");

        let rows_left = |engine: &CpuEngine| {
            let mut kept = engine.scratch.lock();
            kept.iter_mut().flat_map(|scratch| scratch.threads.iter_mut()).any(|thread| thread.get_mut().holds_rows())
        };
        assert!(rows_left(&engine), "{path}: a request leaves the last panels behind");
        engine.follow(&gallery.view()).unwrap();
        let whole = &gallery.blocks[..gallery.blocks.len() - 1];
        let copied: usize = whole.iter().map(|block| block.codes.codebook.len()).sum();
        assert!(copied > 0, "{path}: there are whole blocks");
        assert_eq!(engine.describe().host_bytes, description.host_bytes + copied as u64, "{path}");
        let first = whole.iter().position(|block| !block.codes.codebook.is_empty()).unwrap();
        engine.erase(&[whole[first].first_row + 1]).unwrap();
        assert!(!rows_left(&engine), "{path}: an erasure does not");
        let mut left = whole[first].codes.clone();
        left.clear(1);
        let codebook_copy = engine.codebook_copy.read();
        assert!(
            codebook_copy.over(&gallery.view()).segments[first].codes.codebook == left.codebook,
            "{path}: and clears the copy"
        );
    }
}

#[test]
fn no_threads_and_missing_instructions_are_refused() {
    assert!(matches!(CpuEngine::with_simd(0, Simd::Portable), Err(CpuEngineError::NoThreads)));
    for path in Simd::ALL.into_iter().filter(|path| !path.is_available()) {
        assert!(matches!(CpuEngine::with_simd(1, path), Err(CpuEngineError::Simd(_))), "{path}");
    }
}

#[test]
fn no_probes_and_no_rows_are_nothing_to_find() {
    let empty = GalleryView { dim: 64, segments: Vec::new() };
    let mut values = vec![0.0; 64];
    values[3] = 1.0;
    for path in paths() {
        let engine = CpuEngine::with_simd(1, path).unwrap();
        let mut candidates = CandidateRows::default();
        let nothing =
            CandidateRequest { probes: &[], floors: &[], keep: &[], candidates_max: 10, ..CandidateRequest::default() };
        engine.find_candidates(&empty, &nothing, &mut candidates).unwrap();
        assert!(candidates.rows.is_empty());
        let one = CandidateRequest {
            probes: &values,
            floors: &[-1.1],
            keep: &[5],
            candidates_max: 10,
            ..CandidateRequest::default()
        };
        engine.find_candidates(&empty, &one, &mut candidates).unwrap();
        assert_eq!(
            (candidates.rows.as_slice(), candidates.overflowed.as_slice()),
            ([vec![]].as_slice(), [false].as_slice())
        );
    }
}

/// Galleries with mated pairs at exactly their floor.
struct Mated {
    gallery: Gallery,
    /// Shape: `[pairs, dim]`.
    probes: Vec<f32>,
    mates: Vec<u32>,
    floors: Vec<f32>,
    seeds: Vec<Seed>,
}

impl Mated {
    /// `pairs` probes at the cosine `tau` of rows that have codes.
    fn new(seed: u64, dim: usize, tau: f64, pairs: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut gallery = Gallery::new(&mut rng, Kind::Random, dim, 4 * BLOCK_ROWS, 0.0);
        // One block, so that all rows have codes.
        let rows: Vec<f16> = gallery.blocks.iter().flat_map(|block| &block.rows).copied().collect();
        let codes = OwnedCodes::of(&rows, dim);
        let live = vec![u64::MAX; 4];
        gallery.blocks = vec![Block { first_row: 0, rows, live, codes }];
        let (mut probes, mut mates, mut floors) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..pairs {
            let mate = rng.random_range(0..4 * BLOCK_ROWS);
            let stored = &gallery.blocks[0].rows[mate * dim..(mate + 1) * dim];
            let row: Vec<f64> = stored.iter().map(|v| v.to_f64()).collect();
            let noise = direction(&mut rng, dim);
            let along: f64 = row.iter().zip(&noise).map(|(x, n)| x * n).sum();
            let across: Vec<f64> = row.iter().zip(&noise).map(|(x, n)| n - along * x).collect();
            let length = across.iter().map(|v| v * v).sum::<f64>().sqrt();
            let sine = (1.0 - tau * tau).sqrt();
            let probe: Vec<f64> = row.iter().zip(&across).map(|(x, w)| tau * x + sine * w / length).collect();
            let probe = normalised(&probe);
            floors.push(crate::search::plan::round_down(exact(stored, &probe)));
            mates.push(u32::try_from(mate).unwrap());
            probes.extend(probe);
        }
        let seeds = (0..pairs).map(|_| rng.random()).collect();
        Self { gallery, probes, mates, floors, seeds }
    }

    /// Of each pair, whether the engine misses it.
    fn missed(&self, engine: &CpuEngine, certificate: Certificate) -> Vec<bool> {
        let request = CandidateRequest {
            probes: &self.probes,
            floors: &self.floors,
            keep: &vec![0; self.floors.len()],
            candidates_max: 4 * BLOCK_ROWS,
            certificate,
            seeds: &self.seeds,
            ..CandidateRequest::default()
        };
        let mut candidates = CandidateRows::default();
        engine.find_candidates(&self.gallery.view(), &request, &mut candidates).unwrap();
        assert_eq!(candidates.certificate, certificate, "codes were read");
        self.mates.iter().zip(&candidates.rows).map(|(mate, rows)| !rows.contains(mate)).collect()
    }
}

/// Each code has one of [`PASSES`] parts of the miss probability. Mates that one first pass misses, and
/// not every first pass does, are counted as its own; what all of them miss is counted for the 4-bit code.
///
/// The proof leaves room: a first pass spends about half of its share here, because floors and steps are
/// rounded to the safe side, the bound of the tail is not tight at such probabilities, and steps are
/// finer than they might be. A 4-bit code, limited by the slack for the row's and the probe's rounding,
/// spends a hundredth. So each share is compared with what was measured, on every path with these seeds:
/// within a fifth, nearly four deviations of the count. A share smaller by a quarter or twice as
/// large would fail. Other seeds would pass, except for one in thousands.
#[test]
fn each_code_misses_its_share_of_mates_and_deterministic_codes_miss_none() {
    const BATCHES: u64 = 160;
    const PAIRS: usize = 256;
    const MISS_PROBABILITY: f64 = 2e-2 * PASSES as f64;
    let batches: Vec<Mated> = (0..BATCHES).map(|seed| Mated::new(seed, 128, 0.55, PAIRS)).collect();
    let share = MISS_PROBABILITY / PASSES as f64 * BATCHES as f64 * PAIRS as f64;
    // Paths of one width of index have the same tables.
    let mut widths = Vec::new();
    for path in paths() {
        let bits = Level::ALL.map(|level| CodeKernels::of(path).index_bits(level));
        if widths.contains(&bits) {
            continue;
        }
        widths.push(bits);
        let missed = Level::ALL.map(|level| {
            let engine = CpuEngine { only: Some(level), ..CpuEngine::with_simd(1, path).unwrap() };
            let deterministic = batches[..8].iter().flat_map(|batch| batch.missed(&engine, Certificate::Deterministic));
            let lost = deterministic.filter(|missed| *missed).count();
            assert_eq!(lost, 0, "{path} {level:?}: a deterministic pass lost mates");
            let randomised = Certificate::Randomised { miss_probability: MISS_PROBABILITY };
            batches.iter().flat_map(|batch| batch.missed(&engine, randomised)).collect::<Vec<bool>>()
        });
        let by_all: Vec<bool> = (0..missed[0].len()).map(|at| missed.iter().all(|missed| missed[at])).collect();
        let four_bit = by_all.iter().filter(|missed| **missed).count() as f64 / share;
        println!("{path}: the 4-bit code spends {four_bit:.3} of its share");
        assert!((0.003..0.1).contains(&four_bit), "{path}: the 4-bit code spends {four_bit} of its share");
        // Plain Rust looks up eight bits at once, which makes fewer entries and finer steps.
        let measured = if path == Simd::Portable { [0.541, 0.513] } else { [0.426, 0.473] };
        for ((level, measured), missed) in Level::ALL.into_iter().zip(measured).zip(&missed) {
            let own = missed.iter().zip(&by_all).filter(|(missed, by_all)| **missed && !**by_all).count();
            let of_share = own as f64 / share;
            println!("{path} {level:?}: {own} mates missed, {of_share:.3} of the share");
            assert!(
                (of_share / measured - 1.0_f64).abs() < 0.2,
                "{path} {level:?}: {own} mates missed, {of_share} of the share, not {measured}"
            );
            // Three deviations of a count: no more than is claimed, whatever was measured.
            let all = missed.iter().filter(|missed| **missed).count() as f64;
            assert!(all <= 2.0 * share + 3.0 * (2.0 * share).sqrt(), "{path} {level:?}: {all} missed");
        }
    }
}

#[test]
fn a_filter_lets_through_what_it_holds_and_nothing_else() {
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    for dim in [64, 160] {
        let gallery = Gallery::new(&mut rng, Kind::Clustered, dim, 3000, 0.1);
        let view = gallery.view();
        let values = gallery.probes(&mut rng, 40);
        let probes = values.len() / dim;
        let all: Vec<u32> = gallery.scores(&values[..dim]).into_iter().map(|(_, row)| row).collect();
        // None, nearly none, one in a hundred, one in three, all.
        let filters: Vec<Option<RoaringBitmap>> = (0..probes)
            .map(|p| match p % 5 {
                0 => None,
                1 => Some(RoaringBitmap::new()),
                2 => Some(all.iter().copied().filter(|_| rng.random_bool(0.01)).collect()),
                3 => Some(all.iter().copied().filter(|_| rng.random_bool(0.3)).collect()),
                _ => Some(all.iter().copied().collect()),
            })
            .collect();
        let filters: Vec<Option<&RoaringBitmap>> = filters.iter().map(Option::as_ref).collect();
        for (floor, keep) in [(0.4, 0), (-2.0, 10), (0.2, 5)] {
            let request = CandidateRequest {
                probes: &values,
                floors: &vec![floor; probes],
                keep: &vec![keep; probes],
                candidates_max: 4000,
                filters: &filters,
                ..CandidateRequest::default()
            };
            for path in paths() {
                let mut candidates = CandidateRows::default();
                CpuEngine::with_simd(2, path).unwrap().find_candidates(&view, &request, &mut candidates).unwrap();
                for (probe, filter) in filters.iter().enumerate() {
                    let what = format!("{path}, dim {dim}, floor {floor}, keep {keep}, probe {probe}");
                    let mut wanted = gallery.scores(&values[probe * dim..(probe + 1) * dim]);
                    wanted.retain(|(_, row)| filter.is_none_or(|filter| filter.contains(*row)));
                    check_held(&wanted, floor, keep, candidates.floors[probe], &candidates.rows[probe], &what);
                    let kth =
                        if keep > 0 && wanted.len() >= keep as usize { wanted[keep as usize - 1].0 } else { -3.0 };
                    wanted.retain(|(score, _)| *score >= f64::from(floor) && *score >= kth);
                    let found = &candidates.rows[probe];
                    assert!(!candidates.overflowed[probe], "{what}");
                    for (score, row) in &wanted {
                        assert!(found.contains(row), "{what}: row {row} of score {score} is missing");
                    }
                    if let Some(filter) = filter {
                        assert!(found.iter().all(|row| filter.contains(*row)), "{what}: a row that is filtered out");
                    }
                }
            }
        }
    }
}

/// The thread of the pool is never free while yielding requests follow each other, each taking many times as
/// long as the others. If the others waited for one to end, they would take as long.
#[test]
fn a_yielding_request_lets_those_of_other_threads_go_first_and_finds_what_any_request_does() {
    const OTHERS: usize = 15;
    let (dim, many, few) = (32, 128, 5);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let gallery = Gallery::new(&mut rng, Kind::Random, dim, 30_000, 0.0);
    let view = gallery.view();
    let values = gallery.probes(&mut rng, many);
    let scores: Vec<Vec<(f64, u32)>> = values.chunks_exact(dim).take(few).map(|probe| gallery.scores(probe)).collect();
    let (floors, keep) = (vec![-1.1; many], vec![7; many]);
    let request = |probes: usize| CandidateRequest {
        probes: &values[..probes * dim],
        floors: &floors[..probes],
        keep: &keep[..probes],
        candidates_max: 1000,
        ..CandidateRequest::default()
    };
    assert!(few * dim * 30_000 > ALONE_PRODUCTS, "it needs the pool");
    let engine = CpuEngine::new(1).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let (mut aside, mut others) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (mut candidates, mut took) = (CandidateRows::default(), Vec::new());
            while !done.load(Ordering::Relaxed) {
                let begun = std::time::Instant::now();
                let request = CandidateRequest { yields: true, ..request(many) };
                engine.find_candidates(&view, &request, &mut candidates).unwrap();
                took.push(begun.elapsed());
                for (probe, scores) in scores.iter().enumerate() {
                    check(scores, -1.1, 7, dim, &candidates.rows[probe], "aside");
                }
            }
            took
        });
        let mut candidates = CandidateRows::default();
        for _ in 0..OTHERS {
            let begun = std::time::Instant::now();
            engine.find_candidates(&view, &request(few), &mut candidates).unwrap();
            others.push(begun.elapsed());
            for (probe, scores) in scores.iter().enumerate() {
                check(scores, -1.1, 7, dim, &candidates.rows[probe], "meanwhile");
            }
        }
        done.store(true, Ordering::Relaxed);
        aside = thread.join().unwrap();
    });
    aside.sort_unstable();
    others.sort_unstable();
    let (aside, other) = (aside[aside.len() / 2], others[OTHERS / 2]);
    assert!(other < aside / 3, "{other:?} beside requests of {aside:?}");
}
