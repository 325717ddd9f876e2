//! How many rows does the device hold, and how long does a search among them take?

use std::time::Instant;

use clap::Args;
use serde_json::json;
use thenar::engine::gpu::GpuEngine;
use thenar::engine::{Engine as _, EngineError, GalleryView};

use crate::report::Report;
use crate::segments::{Asked, RANDOMISED, SEGMENT_ROWS, Segment, gallery, ms, segments, time};
use crate::{Common, open};

/// Arguments of `capacity`.
#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// Most rows, in millions.
    #[arg(long, default_value_t = 4000.0)]
    millions_max: f64,
    /// Least time to spend on a line of the table, in seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

/// Seconds kept for the searches.
const SEARCHING_SECONDS: f64 = 90.0;

pub(crate) fn run(common: &Common, arguments: &Arguments, report: &mut Report) -> anyhow::Result<()> {
    let Arguments { mut millions_max, mut seconds } = arguments.clone();
    let mut rows = SEGMENT_ROWS;
    if common.smoke {
        (rows, millions_max, seconds) = (4096, 0.02, 0.0);
    }
    let engine = open(common, report)?;
    let gallery = gallery(rows, common.dim, common.seed, report);
    let segments = segments(&gallery, report);
    let segment = &segments[0];
    let probes = gallery.probes(256);
    // Every row is found once per copy.
    let asked = Asked { floor: 0.5, keep: 0, certificate: RANDOMISED, filter: None };
    engine.follow(&copies(segment, 1, common.dim))?;
    let once = time(&engine, &copies(segment, 1, common.dim), probes.values(0..1), &asked, 0.0)?.candidates;

    let started = Instant::now();
    let held = fill(&engine, segment, common.dim, rows, millions_max, report)?;
    let took = started.elapsed().as_secs_f64();
    let held_rows = f64::from(held) * rows as f64;
    report.figure("held", held_rows / 1e6, "million rows");
    report.figure("on the device", engine.describe().device_bytes as f64 / 1e9, "GB");
    report.figure("uploaded in", took, "s");
    let view = copies(segment, held, common.dim);
    engine.follow(&view)?;
    println!("probes    best ms  median ms  device ms");
    for batch in [1, 8, 64, 256] {
        if report.left().is_zero() {
            report.wrong(format!("no time was left for batches of {batch}"));
            break;
        }
        let line = time(&engine, &view, probes.values(0..batch), &asked, seconds)?;
        let device = line.device_ms().map_or("-".to_owned(), |device| format!("{device:.3}"));
        println!("{batch:6} {:10.3} {:10.3} {device:>10}", ms(line.best), ms(line.median));
        report.row(
            "searches",
            json!({ "probes": batch, "best_ms": ms(line.best), "median_ms": ms(line.median), "device_ms": line.device_ms() }),
        );
        if batch == 1 && line.candidates != once * held as usize {
            report.wrong(format!("{} rows are found in {held} copies, {once} in one", line.candidates));
        }
    }
    Ok(())
}

/// So many copies of a segment, one after the other.
fn copies<'a>(segment: &'a Segment<'_>, count: u32, dim: usize) -> GalleryView<'a> {
    let rows = u32::try_from(segment.rows.len() / dim).expect("a segment is small");
    GalleryView { dim, segments: (0..count).map(|copy| segment.block(u64::from(copy) + 1, copy * rows)).collect() }
}

/// Adds copies until the device has no room or the time is up. Returns how many there are then.
fn fill(
    engine: &GpuEngine,
    segment: &Segment<'_>,
    dim: usize,
    rows: usize,
    millions_max: f64,
    report: &mut Report,
) -> anyhow::Result<u32> {
    // Row numbers have 32 bits.
    let most = ((millions_max * 1e6 / rows as f64) as u32).clamp(1, u32::MAX / u32::try_from(rows)?);
    for count in 2..=most {
        if report.left().as_secs_f64() < SEARCHING_SECONDS {
            report.note("filling ended", "no time was left");
            return Ok(count - 1);
        }
        match engine.follow(&copies(segment, count, dim)) {
            Ok(()) => {}
            Err(EngineError::OutOfDeviceMemory { .. }) => {
                report.note("filling ended", "the device is full");
                return Ok(count - 1);
            }
            Err(error) => return Err(error.into()),
        }
    }
    report.note("filling ended", "at the largest gallery that was asked for");
    Ok(most)
}
