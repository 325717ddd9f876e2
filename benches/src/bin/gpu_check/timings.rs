//! How long searches of ten million rows take, beside PyTorch on the same device and rows.

use std::time::Instant;

use clap::Args;
use roaring::RoaringBitmap;
use serde_json::json;
use thenar::engine::certificate::Certificate;
use thenar::engine::gpu::GpuEngine;
use thenar::engine::{CandidateRows, GalleryView};
use thenar_bench::gallery::Probes;
use thenar_bench::truth::Truth;

use crate::report::Report;
use crate::segments::{Asked, RANDOMISED, gallery, ms, segments, time, upload, view};
use crate::torch::{self, Setup};
use crate::{Common, open_and_measure};

/// Arguments of `timings`.
#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// Rows of the gallery.
    #[arg(long, default_value_t = 10_000_000)]
    n: usize,
    /// Sizes of the batches.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256")]
    batches: Vec<usize>,
    /// Floor of the threshold searches.
    #[arg(long, default_value_t = 0.5)]
    floor: f32,
    /// Best rows to keep.
    #[arg(long, default_value_t = 10)]
    keep: u32,
    /// Probes to check against brute force.
    #[arg(long, default_value_t = 64)]
    check: usize,
    /// Least time to spend on a line of the table, in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// A Python with PyTorch to compare with: f16 products and `topk` on the same device.
    #[arg(long, value_name = "PROGRAM")]
    torch: Option<String>,
}

pub(crate) fn run(common: &Common, arguments: &Arguments, report: &mut Report) -> anyhow::Result<()> {
    let mut arguments = arguments.clone();
    if common.smoke {
        (arguments.n, arguments.batches) = (8192, vec![1, 16, 256]);
        (arguments.check, arguments.seconds) = (16, 0.0);
    }
    let Arguments { n, floor, keep, seconds, check, .. } = arguments;
    let dim = common.dim;
    let (engine, copied) = open_and_measure(common, seconds, report)?;
    let gallery = gallery(n, dim, common.seed, report);
    let segments = segments(&gallery, report);
    let view = view(&segments, dim, 1);
    upload(&engine, &view, report)?;
    let probes = gallery.probes(arguments.batches.iter().copied().max().unwrap_or(1).max(check));
    let started = Instant::now();
    let checked = probes.first(check);
    let truth = Truth::new(&gallery, &checked, keep as usize);
    report.figure("brute force", started.elapsed().as_secs_f64(), "s");
    for certificate in [RANDOMISED, Certificate::Deterministic] {
        for floor in [floor, -1.1] {
            let asked = Asked { floor, keep, certificate, filter: None };
            hold(&engine, &view, &checked, &truth, &asked, report)?;
        }
    }

    let one_percent: RoaringBitmap = (0..u32::try_from(n)?).step_by(100).collect();
    println!("probes    certificate  floor  filter    best ms  median ms  device ms  searches/s  candidates");
    for &batch in &arguments.batches {
        for (certificate, floor, filter) in [
            (RANDOMISED, floor, None),
            (Certificate::Deterministic, floor, None),
            (RANDOMISED, -1.1, None),
            (RANDOMISED, floor, Some(&one_percent)),
        ] {
            // PyTorch and its file take their time too.
            let torch_seconds = if arguments.torch.is_some() { 120.0 } else { 0.0 };
            if report.left().as_secs_f64() < torch_seconds {
                report.wrong(format!("no time was left for batches of {batch}"));
                break;
            }
            let asked = Asked { floor, keep, certificate, filter };
            let line = time(&engine, &view, probes.values(0..batch), &asked, seconds)?;
            let rate = batch as f64 / line.median.as_secs_f64();
            println!(
                "{batch:6} {:>14} {floor:6.2} {:>7} {:10.3} {:10.3} {:>10} {rate:11.0} {:10.1}",
                asked.name(),
                if filter.is_some() { "1 %" } else { "none" },
                ms(line.best),
                ms(line.median),
                line.device_ms().map_or("-".to_owned(), |device| format!("{device:.3}")),
                line.candidates as f64 / batch as f64,
            );
            report.row(
                "searches",
                json!({
                    "probes": batch, "certificate": asked.name(), "floor": floor, "filter": filter.is_some(),
                    "best_ms": ms(line.best), "median_ms": ms(line.median), "device_ms": line.device_ms(),
                    "searches_per_second": rate, "candidates": line.candidates,
                }),
            );
            if batch == 1 && floor > 0.0 && filter.is_none() && certificate == RANDOMISED {
                let bytes = n as f64 * (dim as f64 / 8.0 + 8.0);
                let rate = bytes / line.device.unwrap_or(line.best).as_secs_f64();
                report.figure("1-bit codes read by one probe", rate / 1e9, "GB/s");
                report.figure("of a copy's rate", 100.0 * rate / copied, "%");
            }
        }
    }
    let Some(python) = &arguments.torch else { return Ok(()) };
    // PyTorch has the device to itself.
    drop(engine);
    let setup =
        Setup { gallery: &gallery, probes: &probes, batches: &arguments.batches, k: keep as usize, seconds, check };
    torch::compare(python, &setup, &truth, report)
}

/// Searches all probes together and one of them alone, and holds what is found against the truth.
fn hold(
    engine: &GpuEngine,
    view: &GalleryView<'_>,
    probes: &Probes,
    truth: &Truth,
    asked: &Asked<'_>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut candidates = CandidateRows::default();
    for batch in [1, probes.len()] {
        asked.find_candidates(engine, view, probes.values(0..batch), &mut candidates)?;
        for probe in 0..batch {
            let wanted = truth.wanted(probe, Some(f64::from(asked.floor)));
            let kept = wanted.iter().filter(|hit| candidates.rows[probe].contains(&hit.row)).count();
            if kept < wanted.len() || candidates.overflowed[probe] {
                let (name, floor) = (asked.name(), asked.floor);
                let of = wanted.len();
                report.wrong(format!("probe {probe} of {batch}, {name}, floor {floor}: {kept} of {of} rows"));
            }
        }
    }
    Ok(())
}
