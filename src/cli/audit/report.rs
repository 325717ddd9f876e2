//! What an audit tells people and programs.

use serde_json::json;

use super::AuditArgs;
use crate::audit::{Report, exhaustive, faiss};
use crate::cli::output::{grouped, print, table};
use crate::engine::EngineDescription;

/// Whether OpenMP's threads spin between two of FAISS's parallel loops.
pub(super) const WAIT_POLICY: &str = "OMP_WAIT_POLICY";

/// What a report says besides what was found.
pub(super) struct ReportContext<'a> {
    pub(super) args: &'a AuditArgs,
    pub(super) dim: usize,
    pub(super) engine: EngineDescription,
    pub(super) threads: usize,
}

impl ReportContext<'_> {
    pub(super) fn before(&self, live: u64, probes: usize) -> Vec<(&'static str, String)> {
        let dim = self.dim;
        let probes = grouped(probes as u64);
        let engine = &self.engine;
        let rows = exhaustive::chunk_rows(dim);
        let mib = (rows * dim * size_of::<f32>()) >> 20;
        vec![
            ("gallery", format!("{} templates of {dim} components", grouped(live))),
            (
                "probes",
                match &self.args.probes_file {
                    Some(path) => format!("{probes} embeddings of {}", path.display()),
                    None => {
                        format!("{probes} templates with noise {}, seed {}", self.args.noise, self.args.seed)
                    }
                },
            ),
            ("Thenar", format!("{} engine, {}, {} threads", engine.kind, engine.adapter, engine.threads)),
            ("FAISS", format!("IndexFlatIP, {}", self.faiss())),
            ("memory", format!("FAISS has {} rows at a time, {mib} MiB", grouped(rows as u64))),
        ]
    }

    fn faiss(&self) -> String {
        let waits = std::env::var(WAIT_POLICY).unwrap_or_else(|_| "not set".to_owned());
        format!("{}, {}, {} threads, {WAIT_POLICY} {waits}", faiss::simd(), faiss::blas(), self.threads)
    }

    pub(super) fn after(&self, report: &Report) -> std::io::Result<()> {
        let mut rows = table(
            &[
                "certificate",
                "scores from",
                "probes",
                "candidates",
                "largest difference",
                "ranks within rounding",
                "disagreements",
                "ms per search",
            ],
            1,
        );
        for line in &report.lines {
            rows.add_row(vec![
                line.certificate.to_string(),
                line.threshold.map_or_else(|| "any".to_owned(), |threshold| format!("{threshold:.2}")),
                grouped(line.searches),
                grouped(line.compared),
                format!("{:.1e}", line.score_difference_max),
                grouped(line.ranks_within_rounding),
                grouped(line.disagreements),
                format!("{:.2}", line.thenar.as_secs_f64() * 1e3 / line.searches.max(1) as f64),
            ]);
        }
        print(rows)?;
        for disagreement in &report.disagreements {
            let from = disagreement.threshold.map_or_else(|| "any score".to_owned(), |from| format!("{from:.2}"));
            print(format_args!(
                "probe {}, {}, from {from}: {}",
                disagreement.probe, disagreement.certificate, disagreement.difference
            ))?;
        }
        if report.probes == 0 {
            return Ok(());
        }
        let wrong: u64 = report.lines.iter().map(|line| line.disagreements).sum();
        if wrong > 0 {
            return print(format_args!("{} answers are NOT those of FAISS's exhaustive search.", grouped(wrong)));
        }
        print(format_args!(
            "Every answer is that of FAISS's exhaustive search ({} comparisons in {:.1} s); scores may differ by \
             {:.1e}, the rounding of f32.",
            grouped(report.probes * report.templates),
            report.faiss.as_secs_f64(),
            report.tolerance
        ))
    }

    pub(super) fn json(&self, report: &Report, interrupted: bool) -> serde_json::Value {
        let lines = report.lines.iter().map(|line| {
            json!({
                "certificate": line.certificate.to_string(),
                "threshold": line.threshold,
                "searches": line.searches,
                "held_deterministic": line.held_deterministic,
                "candidates_compared": line.compared,
                "score_difference_max": line.score_difference_max,
                "ranks_within_rounding": line.ranks_within_rounding,
                "disagreements": line.disagreements,
                "thenar_seconds": line.thenar.as_secs_f64(),
            })
        });
        let disagreements = report.disagreements.iter().map(|disagreement| {
            json!({
                "probe": disagreement.probe,
                "certificate": disagreement.certificate.to_string(),
                "threshold": disagreement.threshold,
                "difference": disagreement.difference.to_string(),
            })
        });
        let engine = &self.engine;
        let probes_file = self.args.probes_file.as_ref().map(|path| path.display().to_string());
        json!({
            "agrees": report.agrees(),
            "interrupted": interrupted,
            "templates": report.templates,
            "dim": self.dim,
            "probes": report.probes,
            "probes_file": probes_file,
            "noise": self.args.probes_file.is_none().then_some(self.args.noise),
            "seed": self.args.probes_file.is_none().then_some(self.args.seed),
            "k": self.args.k,
            "engine": engine.kind,
            "adapter": engine.adapter,
            "threads": self.threads,
            "faiss": self.faiss(),
            "faiss_seconds": report.faiss.as_secs_f64(),
            "tolerance": report.tolerance,
            "searches": lines.collect::<Vec<_>>(),
            "differences": disagreements.collect::<Vec<_>>(),
        })
    }
}
