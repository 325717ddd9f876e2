//! The audit itself: opens the folder, makes or reads the probes, and compares the answers.

use std::ops::ControlFlow;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use thenar_index::Snapshot;
use tokio_util::sync::CancellationToken;

use super::AuditArgs;
use super::report::{ReportContext, WAIT_POLICY};
use crate::audit::{Asked, Audit, AuditError, Sampler, faiss, probe_of};
use crate::cli::embeddings::EmbeddingsFile;
use crate::cli::error::CliError;
use crate::cli::output::{Progress, print, print_json, properties, start_log_of_warnings};
use crate::cli::{Outcome, blocking, interrupt};
use crate::engine::CandidateRows;
use crate::engine::certificate::{Certificate, MISS_PROBABILITY_DEFAULT};
use crate::model::{Embedding, Purpose};
use crate::process::supervisor::Supervisor;
use crate::search::batch::{Priority, Searcher as _};
use crate::search::{Probe, Search, SearchError};
use crate::server::config::Config;
use crate::server::{self, Opened};
use crate::vault::Rotation;

pub(super) async fn run(args: AuditArgs) -> Result<Outcome, CliError> {
    start_without_spinning();
    let interrupted = interrupt::watch(interrupt::Again::Ends)?;
    blocking(move || audit(args, &interrupted)).await
}

/// Starts this program again with OpenMP's threads told to sleep while they have nothing to do, unless
/// the environment says how they are to wait. Threads that spin take the cores from those of the
/// BLAS, and FAISS is several times slower; OpenMP reads the variable before `main` could set it.
fn start_without_spinning() {
    if std::env::var_os(WAIT_POLICY).is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let mut again = Command::new(program);
        again.args(std::env::args_os().skip(1)).env(WAIT_POLICY, "passive");
        // Returns only if it failed; slower is better than not at all.
        let error = again.exec();
        tracing::warn!(%error, "FAISS will be slow");
    }
}

fn audit(mut args: AuditArgs, interrupted: &CancellationToken) -> Result<Outcome, CliError> {
    let config = std::mem::take(&mut args.folder).config(|_| {})?;
    start_log_of_warnings(&config.log);
    let file = args.probes_file.as_deref().map(EmbeddingsFile::open).transpose()?;
    faiss::set_threads(config.engine.threads);
    let opened = server::open_existing(&config, &Supervisor::default())?;
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
    // Nobody writes: this process has the folder, and nothing else here asks it for a change.
    let snapshot = opened.gallery().snapshot().ok_or(AuditError::Search(SearchError::IndexLost))?;
    let rotation = opened.rotation();
    let source = match file {
        Some(file) if file.dim() != snapshot.dim() => {
            let (path, found, expected) = (file.path().to_owned(), file.dim(), snapshot.dim());
            return Err(CliError::OtherDimension { path, found, expected });
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
    let mut answer = |searches: &[&Search]| {
        opened.gallery().search(searches, Priority::High, &mut candidates).map(|(answers, _)| answers)
    };
    let mut audit = Audit::new(asked(args, config), &mut answer);
    let pass = audit.probes_per_pass();
    let engine = opened.gallery().status().engine;
    let context = ReportContext { args, dim: snapshot.dim(), engine, threads: config.engine.threads };
    if !args.json {
        print(properties(&context.before(snapshot.live(), total)))?;
    }

    let live = snapshot.live();
    let progress = Progress::new("comparing", audit.comparisons(total, live), "comparisons");
    let mut stopped = false;
    for first in (0..total).step_by(pass) {
        let before = audit.comparisons(first, live);
        let probes = source.probes(&snapshot, rotation, first, total.min(first + pass))?;
        let mut on_progress = |done: u64| {
            progress.set(before + done);
            if interrupted.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match audit.pass(&snapshot, &probes, &mut on_progress) {
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
        print_json(&context.json(&report, stopped))?;
    } else {
        context.after(&report)?;
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
        snapshot: &Snapshot,
        rotation: &Rotation,
        first: usize,
        end: usize,
    ) -> Result<Vec<Probe>, CliError> {
        match self {
            Self::Sampled(sampler) => Ok(sampler.probes(snapshot, rotation, first, end)),
            Self::File(file) => {
                let mut rows = file.rows_from(first as u64)?;
                let read = (first..end).map(|row| {
                    let embedding = Embedding::new(rows.read()?, file.dim());
                    let origin = format!("{} row {row}", file.path().display());
                    Ok(probe_of(&embedding.map_err(CliError::value(origin))?, rotation))
                });
                read.collect()
            }
        }
    }
}
