//! The gallery as an index would hand it to the engine, what is asked of it, and how long that takes.

use std::time::{Duration, Instant};

use half::f16;
use rayon::prelude::*;
use roaring::RoaringBitmap;
use thenar::engine::certificate::Certificate;
use thenar::engine::gpu::GpuEngine;
use thenar::engine::{CandidateRequest, CandidateRows, Engine, EngineError, GalleryView, SegmentView};
use thenar_bench::gallery::{Gallery, GalleryKind};
use thenar_index::codes::{BLOCK_ROWS, OwnedCodes};

use crate::report::Report;

/// Rows of a segment: the gallery comes in several, as it would from an index.
pub(crate) const SEGMENT_ROWS: usize = 1 << 20;
/// The default certificate of a server.
pub(crate) const RANDOMISED: Certificate = Certificate::Randomised { miss_probability: 1e-12 };
/// Candidates that a probe may have.
const CANDIDATES_MAX: usize = 100_000;

/// A segment of the gallery with what a view borrows.
pub(crate) struct Segment<'a> {
    pub(crate) rows: &'a [f16],
    codes: OwnedCodes,
    live: Vec<u64>,
}

impl<'a> Segment<'a> {
    fn new(rows: &'a [f16], dim: usize) -> Self {
        let count = rows.len() / dim;
        let coded = count / BLOCK_ROWS * BLOCK_ROWS;
        let mut codes = OwnedCodes::zeroed(dim, 0);
        let parts: Vec<OwnedCodes> =
            rows[..coded * dim].par_chunks(BLOCK_ROWS * dim).map(|rows| OwnedCodes::of(rows, dim)).collect();
        for part in parts {
            codes.codebook.extend(part.codebook);
            codes.one_bit.extend(part.one_bit);
            codes.two_bit.extend(part.two_bit);
            codes.four_bit.extend(part.four_bit);
            codes.factors.extend(part.factors);
        }
        Self { rows, codes, live: vec![u64::MAX; count.div_ceil(64)] }
    }

    /// The segments of a gallery, with their codes.
    pub(crate) fn all(gallery: &'a Gallery) -> Vec<Self> {
        let dim = gallery.dim();
        gallery.rows().chunks(SEGMENT_ROWS * dim).map(|rows| Self::new(rows, dim)).collect()
    }

    pub(crate) fn block(&self, identity: u64, first_row: u32) -> SegmentView<'_> {
        SegmentView { identity, first_row, rows: self.rows, live: &self.live, codes: self.codes.as_codes() }
    }
}

/// The standard gallery of `n` rows, and how long it took to make.
pub(crate) fn gallery(n: usize, dim: usize, seed: u64, report: &mut Report) -> Gallery {
    let started = Instant::now();
    let gallery = Gallery::new(GalleryKind::Standard, seed, n, dim);
    report.figure("rows", n as f64, "");
    report.figure("gallery made", started.elapsed().as_secs_f64(), "s");
    gallery
}

/// Its segments with their codes, and how long those took to make.
pub(crate) fn segments<'a>(gallery: &'a Gallery, report: &mut Report) -> Vec<Segment<'a>> {
    let started = Instant::now();
    let segments = Segment::all(gallery);
    report.figure("codes made", started.elapsed().as_secs_f64(), "s");
    segments
}

/// All segments, one after the other. `identity`: of the first; the others follow.
pub(crate) fn view<'a>(segments: &'a [Segment<'_>], dim: usize, identity: u64) -> GalleryView<'a> {
    let blocks = segments.iter().enumerate().map(|(number, segment)| {
        segment.block(identity + number as u64, u32::try_from(number * SEGMENT_ROWS).expect("rows fit u32"))
    });
    GalleryView { dim, segments: blocks.collect() }
}

/// Uploads a view, and reports how long that took and how many bytes it occupies.
pub(crate) fn upload(engine: &GpuEngine, view: &GalleryView<'_>, report: &mut Report) -> Result<(), EngineError> {
    let before = engine.describe().device_bytes;
    let started = Instant::now();
    engine.follow(view)?;
    report.figure("uploaded", started.elapsed().as_secs_f64(), "s");
    let rows: usize = view.segments.iter().map(|block| block.count(view.dim)).sum();
    let bytes = engine.describe().device_bytes.saturating_sub(before);
    report.figure("on the device", bytes as f64 / rows.max(1) as f64, "bytes per row");
    Ok(())
}

/// What is asked of every probe of a batch, and the one place where it becomes a request.
#[derive(Clone)]
pub(crate) struct Asked<'a> {
    pub(crate) floor: f32,
    pub(crate) keep: u32,
    pub(crate) certificate: Certificate,
    pub(crate) filter: Option<&'a RoaringBitmap>,
}

impl Asked<'_> {
    pub(crate) fn find_candidates(
        &self,
        engine: &GpuEngine,
        view: &GalleryView<'_>,
        probes: &[f32],
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        let count = probes.len() / view.dim;
        let request = CandidateRequest {
            probes,
            floors: &vec![self.floor; count],
            keep: &vec![self.keep; count],
            candidates_max: CANDIDATES_MAX,
            certificate: self.certificate,
            filters: &vec![self.filter; count],
            seeds: &vec![[1; 32]; count],
            ..CandidateRequest::default()
        };
        engine.find_candidates(view, &request, candidates)
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.certificate {
            Certificate::Deterministic => "deterministic",
            Certificate::Randomised { .. } => "randomised",
        }
    }
}

/// How long a search takes.
#[derive(Clone)]
pub(crate) struct Timing {
    pub(crate) best: Duration,
    pub(crate) median: Duration,
    /// The best on the device alone, if the adapter can tell.
    pub(crate) device: Option<Duration>,
    pub(crate) candidates: usize,
}

impl Timing {
    pub(crate) fn device_ms(&self) -> Option<f64> {
        self.device.map(ms)
    }
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Searches twice at least, and for `seconds`.
pub(crate) fn time(
    engine: &GpuEngine,
    view: &GalleryView<'_>,
    probes: &[f32],
    asked: &Asked<'_>,
    seconds: f64,
) -> Result<Timing, EngineError> {
    let mut candidates = CandidateRows::default();
    let mut walls = Vec::new();
    let mut device: Option<Duration> = None;
    let started = Instant::now();
    while walls.len() < 2 || started.elapsed().as_secs_f64() < seconds {
        let begun = Instant::now();
        asked.find_candidates(engine, view, probes, &mut candidates)?;
        walls.push(begun.elapsed());
        if let Some(time) = candidates.device_time {
            device = Some(device.map_or(time, |device| device.min(time)));
        }
    }
    walls.sort_unstable();
    let candidates = candidates.rows.iter().map(Vec::len).sum();
    Ok(Timing { best: walls[0], median: walls[walls.len() / 2], device, candidates })
}

/// What a search costs when there is nothing to scan but one block of rows, none of which it finds.
pub(crate) fn empty_search(engine: &GpuEngine, dim: usize, seconds: f64, report: &mut Report) -> anyhow::Result<()> {
    let few = Gallery::new(GalleryKind::Standard, 0, BLOCK_ROWS, dim);
    let segment = Segment::new(few.rows(), dim);
    let view = GalleryView { dim, segments: vec![segment.block(u64::MAX, 0)] };
    engine.follow(&view)?;
    for count in [1, 256] {
        let mut strangers = few.probes(count).values(0..count).to_vec();
        // The opposite of a mate resembles nobody.
        strangers.iter_mut().for_each(|value| *value = -*value);
        let asked = Asked { floor: 0.9, keep: 0, certificate: RANDOMISED, filter: None };
        let timing = time(engine, &view, &strangers, &asked, seconds)?;
        report.figure(&format!("empty search of {count}"), ms(timing.median), "ms");
        if let Some(device) = timing.device_ms() {
            report.figure(&format!("empty search of {count}, device"), device, "ms");
        }
    }
    Ok(())
}
