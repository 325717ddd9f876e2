//! PyTorch on the same device, rows and probes: products in f16 and `topk`.
//!
//! `benches/python/torch_topk.py` travels inside this program, so that nothing but it is needed.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use serde_json::json;
use thenar_bench::gallery::{Gallery, Probes};
use thenar_bench::truth::Truth;

use crate::report::Report;

const SCRIPT: &str = include_str!("../../../python/torch_topk.py");

/// What is searched.
pub(crate) struct Setup<'a> {
    pub(crate) gallery: &'a Gallery,
    pub(crate) probes: &'a Probes,
    pub(crate) batches: &'a [usize],
    pub(crate) k: usize,
    pub(crate) seconds: f64,
    /// Probes whose answers are held against the truth.
    pub(crate) check: usize,
}

#[derive(Deserialize)]
struct Answer {
    version: String,
    device: String,
    lines: Vec<Line>,
    /// For the first probes, rows.
    found: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Line {
    probes: usize,
    best_ms: f64,
    median_ms: f64,
}

/// Lets PyTorch search, and reports its times and how many of the best rows it finds.
pub(crate) fn compare(python: &str, setup: &Setup<'_>, truth: &Truth, report: &mut Report) -> anyhow::Result<()> {
    let files = tempfile::Builder::new().prefix("thenar-bench").tempdir()?;
    let (rows, probes) = (files.path().join("rows.f16"), files.path().join("probes.f32"));
    std::fs::write(&rows, bytemuck::cast_slice(setup.gallery.rows()))?;
    std::fs::write(&probes, bytemuck::cast_slice(setup.probes.values(0..setup.probes.len())))?;
    let asked = json!({
        "rows": rows, "probes": probes, "count": setup.gallery.len(), "probe_count": setup.probes.len(),
        "dim": setup.gallery.dim(), "k": setup.k, "batches": setup.batches, "seconds": setup.seconds,
        "seconds_max": report.left().as_secs_f64(), "check": setup.check,
    });
    let output = Command::new(python)
        .args(["-c", SCRIPT, &asked.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{python} does not start"))?;
    ensure!(output.status.success(), "PyTorch did not search: {}", output.status);
    let answer: Answer = serde_json::from_slice(&output.stdout).context("what PyTorch said")?;
    report.note("peer", format!("PyTorch {} on {}, f16 products and topk", answer.version, answer.device));
    println!("probes    best ms  median ms  searches/s");
    for Line { probes, best_ms, median_ms } in answer.lines {
        let rate = probes as f64 / median_ms * 1e3;
        println!("{probes:6} {best_ms:10.3} {median_ms:10.3} {rate:11.0}");
        report.row(
            "pytorch",
            json!({ "probes": probes, "best_ms": best_ms, "median_ms": median_ms, "searches_per_second": rate }),
        );
    }
    let (mut wanted, mut found) = (0, 0);
    for (probe, rows) in answer.found.iter().enumerate() {
        let best = truth.wanted(probe, None);
        wanted += best.len();
        found += best.iter().filter(|hit| rows.contains(&hit.row)).count();
    }
    report.figure("PyTorch's share of best rows", 100.0 * found as f64 / wanted.max(1) as f64, "%");
    Ok(())
}
