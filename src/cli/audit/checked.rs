//! The audit itself: opens the folder, makes or reads the probes, and tells what came of it.

use std::ops::ControlFlow;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::AuditArgs;
use crate::audit::{Asked, Audit, AuditError, Report, Sampler, exhaustive, faiss, probe_of};
use crate::cli::embeddings::EmbeddingsFile;
use crate::cli::error::CliError;
use crate::cli::progress::Progress;
use crate::cli::table::{facts, grouped, say, say_json, table};
use crate::cli::{Outcome, import, interrupt, serve};
use crate::engine::CandidateRows;
use crate::engine::certificate::{Certificate, MISS_PROBABILITY_DEFAULT};
use crate::model::{Embedding, Purpose};
use crate::process::supervisor::Supervisor;
use crate::search::batch::{Priority, Searcher as _};
use crate::search::{Probe, SearchError};
use crate::server::config::{Config, LogConfig};
use crate::server::data_folder::FolderError;
use crate::server::{self, Opened, ServerError};

/// Whether OpenMP's threads spin between two of FAISS's parallel loops.
const WAIT_POLICY: &str = "OMP_WAIT_POLICY";

pub(super) async fn run(args: AuditArgs) -> Result<Outcome, CliError> {
    start_without_spinning();
    let interrupted = interrupt::watch(interrupt::Again::Ends)?;
    import::blocking(move || audit(args, &interrupted)).await
}

/// Starts this program anew with OpenMP's threads told to sleep while they have nothing to do, unless
/// whoever started it said how they are to wait. Threads that spin take the cores from those of the
/// BLAS, and FAISS is several times slower; OpenMP reads the variable before `main` could set it.
fn start_without_spinning() {
    if std::env::var_os(WAIT_POLICY).is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let mut again = Command::new(program);
        again.args(std::env::args_os().skip(1)).env(WAIT_POLICY, "passive");
        // Returns only where it failed; slower is better than not at all.
        let error = again.exec();
        tracing::warn!(%error, "FAISS will be slow");
    }
}

fn audit(mut args: AuditArgs, interrupted: &CancellationToken) -> Result<Outcome, CliError> {
    let config = std::mem::take(&mut args.over).config(args.config.as_deref(), |_| {})?;
    // What is wrong is said; a line about everything else would tear the progress bar.
    serve::log(&LogConfig { level: "warn".to_owned(), json: config.log.json });
    let file = args.probes_file.as_deref().map(EmbeddingsFile::open).transpose()?;
    faiss::set_threads(config.engine.threads);
    let opened = server::open_existing(&config, &Supervisor::default()).map_err(|error| match error {
        ServerError::Folder(FolderError::InUse { path }) => CliError::FolderInUse { path },
        error => CliError::Folder(Box::new(error)),
    })?;
    let outcome = audit_opened(&args, &config, &opened, file.as_ref(), interrupted);
    opened.close();
    outcome
}

fn audit_opened(
    args: &AuditArgs,
    config: &Config,
    opened: &Opened,
    file: Option<&EmbeddingsFile>,
    interrupted: &CancellationToken,
) -> Result<Outcome, CliError> {
    // Nobody writes: the folder is this process's, and nothing else here asks it for a change.
    let snapshot = opened.gallery().snapshot().ok_or(AuditError::Search(SearchError::IndexLost))?;
    let rotation = opened.rotation();
    let source = match file {
        Some(file) if file.dim() != snapshot.dim() => {
            let expected = u32::try_from(snapshot.dim()).unwrap_or(u32::MAX);
            return Err(CliError::OtherDimension { path: file.path().to_owned(), found: file.dim(), expected });
        }
        Some(file) => Source::File(file),
        None => Source::Sampled(Box::new(Sampler::new(&snapshot, args.probes as usize, args.noise, args.seed)?)),
    };
    let total = match &source {
        Source::File(file) => usize::try_from(file.rows()).unwrap_or(usize::MAX),
        Source::Sampled(_) => args.probes as usize,
    };
    if total == 0 {
        return Err(AuditError::NoProbes.into());
    }
    let mut candidates = CandidateRows::default();
    let mut answer = |searches: &[&crate::search::Search]| {
        opened.gallery().search(searches, Priority::High, &mut candidates).map(|(answers, _)| answers)
    };
    let mut audit = Audit::new(asked(args, config), &mut answer);
    let pass = audit.probes_a_pass();
    let told = Told { args, snapshot_dim: snapshot.dim(), opened, threads: config.engine.threads };
    if !args.json {
        say(facts(&told.before(snapshot.live(), total)))?;
    }

    let live = snapshot.live();
    let progress = Progress::new("comparing", audit.comparisons(total, live), "comparisons");
    let mut stopped = false;
    for first in (0..total).step_by(pass) {
        let before = audit.comparisons(first, live);
        let probes = source.probes(&snapshot, rotation, first, total.min(first + pass))?;
        let mut look = |done: u64| {
            progress.set(before + done);
            if interrupted.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match audit.pass(&snapshot, &probes, &mut look) {
            Err(AuditError::Interrupted) => {
                stopped = true;
                break;
            }
            passed => passed?,
        }
    }
    progress.finish();
    let report = audit.into_report();
    if args.json {
        say_json(&told.json(&report, stopped))?;
    } else {
        told.after(&report)?;
    }
    if stopped {
        eprintln!("thenar: interrupted after {} of {total} probes; nothing was changed", report.probes);
    }
    Ok(Outcome::done_if(report.agrees() && !stopped))
}

fn asked(args: &AuditArgs, config: &Config) -> Asked {
    let certificates = if args.certificate.is_empty() {
        let randomised = match config.certificate {
            Certificate::Deterministic => Certificate::Randomised { miss_probability: MISS_PROBABILITY_DEFAULT },
            randomised @ Certificate::Randomised { .. } => randomised,
        };
        vec![Certificate::Deterministic, randomised]
    } else {
        args.certificate.clone()
    };
    let lowest = Purpose::ALL.map(|purpose| config.policies.of(purpose).lowest_that_matters());
    let lowest = lowest.into_iter().fold(f64::INFINITY, f64::min);
    Asked {
        k: args.k as usize,
        threshold: args.threshold.unwrap_or(lowest),
        certificates,
        batch: config.batch.probes_max,
    }
}

/// Where probes come from.
enum Source<'a> {
    Sampled(Box<Sampler>),
    File(&'a EmbeddingsFile),
}

impl Source<'_> {
    fn probes(
        &self,
        snapshot: &thenar_index::Snapshot,
        rotation: &crate::vault::Rotation,
        first: usize,
        end: usize,
    ) -> Result<Vec<Probe>, CliError> {
        match self {
            Self::Sampled(sampler) => Ok(sampler.probes(snapshot, rotation, first, end)),
            Self::File(file) => {
                let mut rows = file.rows_from(first as u64)?;
                let read = (first..end).map(|row| {
                    let embedding = Embedding::new(rows.read()?, file.dim()).map_err(|invalid| CliError::Value {
                        origin: format!("{} row {row}", file.path().display()),
                        invalid,
                    })?;
                    Ok(probe_of(&embedding, rotation))
                });
                read.collect()
            }
        }
    }
}

/// What people and programs are told.
struct Told<'a> {
    args: &'a AuditArgs,
    snapshot_dim: usize,
    opened: &'a Opened,
    threads: usize,
}

impl Told<'_> {
    fn before(&self, live: u64, probes: usize) -> Vec<(&'static str, String)> {
        let dim = self.snapshot_dim;
        let probes = grouped(probes as u64);
        let engine = self.opened.gallery().status().engine;
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

    fn after(&self, report: &Report) -> std::io::Result<()> {
        let mut rows = table(
            &[
                "certificate",
                "scores from",
                "probes",
                "candidates",
                "largest difference",
                "ranks within rounding",
                "disagreements",
                "ms a search",
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
        say(rows)?;
        for disagreement in &report.disagreements {
            let from = disagreement.threshold.map_or_else(|| "any score".to_owned(), |from| format!("{from:.2}"));
            say(format_args!(
                "probe {}, {}, from {from}: {}",
                disagreement.probe, disagreement.certificate, disagreement.difference
            ))?;
        }
        if report.probes == 0 {
            return Ok(());
        }
        let wrong: u64 = report.lines.iter().map(|line| line.disagreements).sum();
        if wrong > 0 {
            return say(format_args!("{} answers are NOT those of FAISS's exhaustive search.", grouped(wrong)));
        }
        say(format_args!(
            "Every answer is that of FAISS's exhaustive search ({} comparisons in {:.1} s); scores may differ by \
             {:.1e}, the rounding of f32.",
            grouped(report.probes * report.templates),
            report.faiss.as_secs_f64(),
            report.tolerance
        ))
    }

    fn json(&self, report: &Report, interrupted: bool) -> serde_json::Value {
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
        let engine = self.opened.gallery().status().engine;
        let probes_file = self.args.probes_file.as_ref().map(|path: &PathBuf| path.display().to_string());
        json!({
            "agrees": report.agrees(),
            "interrupted": interrupted,
            "templates": report.templates,
            "dim": self.snapshot_dim,
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
