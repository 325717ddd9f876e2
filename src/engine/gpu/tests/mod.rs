//! The engine against an f64 brute force, on whatever adapter the machine has.
//!
//! Without an adapter every test prints `skipped: no adapter`; with `THENAR_REQUIRE_GPU=1` in the
//! environment that is a failure.

mod cache;
mod exactness;
mod filters;
mod following;
mod loss;

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::device::DeviceOptions;
use super::{AdapterChoice, GpuEngine};
use thenar_index::codes::OwnedCodes;

use crate::engine::certificate::Certificate;
use crate::engine::{CandidateRequest, CandidateRows, Engine, EngineError, GalleryView, SegmentView};

/// How far below what is wanted a candidate may lie: several times the slack of comparing in f32 at the largest
/// dimension tested.
const FAR: f64 = 5e-4;

/// An engine, or a reported skip.
fn engine_with(options: DeviceOptions) -> Option<GpuEngine> {
    match GpuEngine::open(AdapterChoice::Any, options) {
        Ok(engine) => Some(engine),
        Err(EngineError::NoAdapter { reason }) => {
            assert!(std::env::var("THENAR_REQUIRE_GPU").as_deref() != Ok("1"), "a GPU adapter is required: {reason}");
            println!("skipped: no adapter ({reason})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// An engine of the usual sizes, shared by the tests that do not break it. Searches of different
/// views exclude each other by the lock.
fn shared_engine() -> Option<parking_lot::MutexGuard<'static, GpuEngine>> {
    static SHARED: OnceLock<Option<parking_lot::Mutex<GpuEngine>>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| engine_with(DeviceOptions::default()).map(parking_lot::Mutex::new));
    if shared.is_none() {
        println!("skipped: no adapter");
    }
    shared.as_ref().map(parking_lot::Mutex::lock)
}

/// Identities that no two galleries share.
fn fresh_identity() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

struct Segment {
    identity: u64,
    first_row: u32,
    rows: Vec<f16>,
    live: Vec<u64>,
    codes: OwnedCodes,
}

impl Segment {
    fn new(first_row: u32, rows: &[f16], dim: usize) -> Self {
        let mut segment =
            Self { identity: 0, first_row, rows: Vec::new(), live: Vec::new(), codes: OwnedCodes::zeroed(dim, 0) };
        segment.replace(rows, dim);
        segment
    }

    /// Other rows, all live, under another identity.
    fn replace(&mut self, rows: &[f16], dim: usize) {
        self.identity = fresh_identity();
        self.rows = rows.to_vec();
        self.live = vec![u64::MAX; (rows.len() / dim).div_ceil(64)];
        self.recode(dim);
    }

    /// More rows, all live.
    fn append(&mut self, rows: &[f16], dim: usize) {
        self.rows.extend_from_slice(rows);
        self.live.resize((self.rows.len() / dim).div_ceil(64), u64::MAX);
        self.recode(dim);
    }

    /// Makes the codes of the whole blocks.
    fn recode(&mut self, dim: usize) {
        let coded = self.rows.len() / dim / 64 * 64;
        self.codes = OwnedCodes::of(&self.rows[..coded * dim], dim);
    }
}

struct Gallery {
    dim: usize,
    segments: Vec<Segment>,
}

impl Gallery {
    /// `rows` cut into segments of these lengths, with gaps between, all live.
    fn new(dim: usize, rows: &[f16], lengths: &[usize]) -> Self {
        let mut gallery = Self { dim, segments: Vec::new() };
        let (mut first_row, mut at) = (3, 0);
        for &length in lengths {
            gallery.segments.push(Segment::new(first_row, &rows[at * dim..(at + length) * dim], dim));
            at += length;
            first_row += u32::try_from(length).unwrap() + 77;
        }
        assert_eq!(at * dim, rows.len());
        gallery
    }

    fn view(&self) -> GalleryView<'_> {
        let segments = self.segments.iter().map(|segment| SegmentView {
            identity: segment.identity,
            first_row: segment.first_row,
            rows: &segment.rows,
            live: &segment.live,
            codes: segment.codes.as_codes(),
        });
        GalleryView { dim: self.dim, segments: segments.collect() }
    }

    fn kill(&mut self, segment: usize, offset: usize) {
        self.segments[segment].live[offset / 64] &= !(1 << (offset % 64));
    }

    /// Row numbers and exact scores of the live rows.
    fn scores(&self, probe: &[f32]) -> Vec<(u32, f64)> {
        let mut scores = Vec::new();
        for segment in &self.view().segments {
            for (offset, row) in segment.rows.chunks_exact(self.dim).enumerate() {
                if segment.is_live(offset) {
                    let factors = row.iter().zip(probe).map(|(x, q)| f64::from(x.to_f32()) * f64::from(*q));
                    scores.push((segment.first_row + u32::try_from(offset).unwrap(), factors.sum()));
                }
            }
        }
        scores
    }
}

/// A request that owns its parts.
struct Asked {
    probes: Vec<f32>,
    floors: Vec<f32>,
    keep: Vec<u32>,
    candidates_max: usize,
}

impl Asked {
    fn alike(probes: Vec<f32>, dim: usize, floor: f32, keep: u32, candidates_max: usize) -> Self {
        let count = probes.len() / dim;
        Self { probes, floors: vec![floor; count], keep: vec![keep; count], candidates_max }
    }

    fn request(&self) -> CandidateRequest<'_> {
        CandidateRequest {
            probes: &self.probes,
            floors: &self.floors,
            keep: &self.keep,
            candidates_max: self.candidates_max,
            ..CandidateRequest::default()
        }
    }
}

/// The certificates under which every test searches. At the default no test that is ever run misses.
const CERTIFICATES: [Certificate; 2] =
    [Certificate::Randomised { miss_probability: 1e-12 }, Certificate::Deterministic];

/// Searches under both certificates and compares the candidates with brute force: none missing, none dead, none
/// far below, and overflow exactly if there are too many.
fn hold(engine: &GpuEngine, gallery: &Gallery, asked: &Asked, what: &str) -> CandidateRows {
    let mut candidates = CandidateRows::default();
    for certificate in CERTIFICATES {
        let request = CandidateRequest { certificate, ..asked.request() };
        let what = format!("{what}, {certificate:?}");
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap_or_else(|e| panic!("{what}: {e}"));
        hold_candidates(&candidates, gallery, asked, &what);
        assert!(candidates.certificate.miss_probability() <= certificate.miss_probability(), "{what}");
    }
    candidates
}

fn hold_candidates(candidates: &CandidateRows, gallery: &Gallery, asked: &Asked, what: &str) {
    assert_eq!(candidates.rows.len(), asked.floors.len(), "{what}");
    for (number, probe) in asked.probes.chunks_exact(gallery.dim).enumerate() {
        let scores = gallery.scores(probe);
        let keep = asked.keep[number] as usize;
        let mut line = f64::from(asked.floors[number]);
        if keep > 0 && scores.len() >= keep {
            let mut best: Vec<f64> = scores.iter().map(|&(_, score)| score).collect();
            best.sort_by(|a, b| b.total_cmp(a));
            line = line.max(best[keep - 1]);
        }
        let at_least = |line: f64| -> BTreeSet<u32> {
            scores.iter().filter(|(_, score)| *score >= line).map(|&(row, _)| row).collect()
        };
        let (must, may) = (at_least(line), at_least(line - FAR));
        let rows: BTreeSet<u32> = candidates.rows[number].iter().copied().collect();
        if candidates.overflowed[number] {
            assert!(may.len() > asked.candidates_max, "{what}: probe {number} overflowed with {} rows", may.len());
            continue;
        }
        assert_eq!(rows.len(), candidates.rows[number].len(), "{what}: probe {number} has repeats");
        let held = candidates.floors[number];
        assert!(at_least(held.into()).is_subset(&rows), "{what}: probe {number} was not held to {held}");
        assert!(held >= asked.floors[number] && f64::from(held) <= line, "{what}: probe {number} held to {held}");
        let missing: Vec<_> = must.difference(&rows).collect();
        assert!(missing.is_empty(), "{what}: probe {number} misses {missing:?}");
        let far: Vec<_> = rows.difference(&may).take(5).collect();
        assert!(far.is_empty(), "{what}: probe {number} has dead or far rows {far:?}");
        assert!(rows.len() <= asked.candidates_max, "{what}: probe {number} has {} rows", rows.len());
    }
}

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Unit vectors as in the standard benchmark gallery. Shape: `[count, dim]`.
fn unit_vectors(count: usize, dim: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut values = Vec::with_capacity(count * dim);
    for _ in 0..count {
        let draw: Vec<f32> = (1..=dim)
            .map(|i| {
                let normal: f32 = StandardNormal.sample(rng);
                normal * (i as f32).powf(-0.35)
            })
            .collect();
        values.extend(normalised(&draw));
    }
    values
}

fn normalised(values: &[f32]) -> Vec<f32> {
    let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    values.iter().map(|v| (f64::from(*v) / norm) as f32).collect()
}

fn to_rows(values: &[f32]) -> Vec<f16> {
    values.iter().map(|&v| f16::from_f32(v)).collect()
}

/// Probes; every other one is near a row of `values` (genuine scores about 0.76).
fn probes_near(values: &[f32], count: usize, dim: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut probes = unit_vectors(count, dim, rng);
    let rows = values.len() / dim;
    if rows > 0 {
        for (number, probe) in probes.chunks_exact_mut(dim).enumerate().filter(|(n, _)| n % 2 == 0) {
            let row = &values[number * 7919 % rows * dim..][..dim];
            let near: Vec<f32> = row.iter().zip(probe.iter()).map(|(x, noise)| x + 0.85 * noise).collect();
            probe.copy_from_slice(&normalised(&near));
        }
    }
    probes
}
