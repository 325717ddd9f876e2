//! The promise of the engine on every instruction set, against brute force: every row that
//! matters is among the candidates, once, and little else is.

mod exactness;
mod lifecycle;
mod misses;
mod requests;

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
