//! `thenar demo`: a server of its own, generated palms, full load, and every answer checked.
//!
//! Starts the same program that serves in earnest, in a folder that is removed at the end, and is
//! a client like any other: what it measures is what gates and terminals would see on one machine
//! that they share with the server.

pub mod load;
pub mod population;
pub mod report;
pub mod server;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rayon::prelude::*;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::connect::{self, Server, ServerArgs};
use super::error::{CliError, code_name};
use super::import::sink::{Acknowledgement, GrpcSink, Sink as _};
use super::progress::Progress;
use super::{Outcome, interrupt, table};
use crate::api::proto::{self, BulkEnrollItem, BulkEnrollRequest, GetStatusRequest, Purpose};
use crate::model::{self, DIM_MAX};
use load::{Scene, THRESHOLD, Tally};
use population::Population;
use report::{Example, Latency, Report, Side};
use server::{DemoFolder, DemoServer};

/// Subjects in a message.
const BATCH: u32 = 512;
/// Batches generated ahead of sending.
const GENERATE_AHEAD: usize = 4;
/// Dimensions under which generated palms are too alike to be told apart in a large gallery.
const DIM_DISTINCT: u16 = 512;
/// Time for a server that breaks a connection to turn out to have ended.
const LAST_WORDS_WITHIN: Duration = Duration::from_millis(500);
/// Candidates listed in an example, from this score on.
const EXAMPLE_THRESHOLD: f64 = 0.3;
const EXAMPLE_CANDIDATES: u32 = 3;

/// Start a server on generated palms, put it under load and check every answer.
///
/// Enrols the palms, then searches from gates (one stream each) and payment terminals as fast as
/// the answers come, while people are forgotten and enrolled. The exit code is 1 if any answer is
/// wrong, missed or not up to date. The server runs in a temporary folder (see TMPDIR; about 4 KiB
/// a palm) and is stopped at the end.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Palms to enrol. Every tenth person has two.
    #[arg(long, value_name = "COUNT", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(100..=100_000_000))]
    pub palms: u32,
    /// Dimensions of an embedding. Under 512, generated palms are so alike that even an
    /// exhaustive search takes some for others.
    #[arg(long, value_name = "D", default_value_t = DIM_DISTINCT, value_parser = dimension)]
    pub dim: u16,
    /// Seed of the palms: the same seed, the same palms.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub seed: u64,
    /// Seconds of searching.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Gates that search at the same time.
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub gates: u32,
    /// Payment terminals that search at the same time.
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub terminals: u32,
    /// What the server searches with; auto takes a graphics card where there is one.
    #[arg(long, value_enum, default_value_t = EngineWord::Auto)]
    pub engine: EngineWord,
    /// Work in this folder, which must be new or empty, and leave key, configuration and data there.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Print one JSON object: gallery, dim, engine, adapter, searches, correct, wrong, missed,
    /// latency_ms (p50, p99, p999), searches_per_second, enrolled_per_second and more.
    #[arg(long)]
    pub json: bool,
}

/// The engines by their words in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineWord {
    /// The GPU where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU, or no server at all.
    Gpu,
}

impl EngineWord {
    fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
        }
    }
}

fn dimension(text: &str) -> Result<u16, String> {
    let dim = text.parse::<u16>().map_err(|_| format!("{text:?} is not a number up to {DIM_MAX}"))?;
    model::checked_dim(dim.into()).map(|_| dim).map_err(|invalid| invalid.to_string())
}

/// Runs `thenar demo`.
///
/// # Errors
/// [`CliError`] where the server does not start, fails or does not stop well, or on Ctrl-C.
pub async fn run(args: DemoArgs) -> Result<Outcome, CliError> {
    let program = std::env::current_exe()?;
    let interrupted = interrupt::watch(interrupt::Again::IsIgnored)?;
    let report = demonstrate(&args, &program, &interrupted).await;
    if let Err(CliError::Refused { status, .. }) = &report
        && status.code() == tonic::Code::ResourceExhausted
    {
        eprintln!("note: about 4 KiB a palm are needed; TMPDIR or --keep name a folder on a larger disk");
    }
    let report = report?;
    if args.json {
        table::say_json(&report)?;
    } else {
        table::say(report.render())?;
    }
    Ok(report.outcome())
}

/// Starts the server, works, and stops the server whatever happens.
async fn demonstrate(args: &DemoArgs, program: &Path, interrupted: &CancellationToken) -> Result<Report, CliError> {
    if args.dim < DIM_DISTINCT {
        eprintln!("note: with {} dimensions generated palms are alike; some answers will be wrong", args.dim);
    }
    let folder = DemoFolder::new(args.keep.as_deref())?;
    eprintln!("starting a server in {}", folder.path().display());
    let mut child = DemoServer::start(program, folder.path(), args.dim.into(), args.engine.as_str()).await?;
    let ready = tokio::select! {
        biased;
        () = interrupted.cancelled() => None,
        ready = child.ready() => Some(ready?),
    };
    let worked = match ready {
        None => Err(CliError::DemoInterrupted { kept: args.keep.is_some() }),
        Some(address) => {
            let server = ServerArgs::plain(&address).resolve()?;
            tokio::select! {
                biased;
                () = interrupted.cancelled() => Err(CliError::DemoInterrupted { kept: args.keep.is_some() }),
                failure = child.ended() => return Err(failure),
                worked = work(args, &server, interrupted) => worked,
            }
        }
    };
    // A broken connection is the first that is seen of a server that ends; its own words say more.
    if worked.is_err()
        && !interrupted.is_cancelled()
        && let Ok(failure) = tokio::time::timeout(LAST_WORDS_WITHIN, child.ended()).await
    {
        return Err(failure);
    }
    let stopped = child.stop().await;
    drop(folder);
    let report = worked?;
    stopped.map(|()| report)
}

/// Enrols, searches, asks for examples and for the status.
async fn work(args: &DemoArgs, server: &Server, interrupted: &CancellationToken) -> Result<Report, CliError> {
    let people = Arc::new(Population::new(args.seed, args.dim.into(), args.palms));
    let enrolling = Instant::now();
    enrol(&people, server, interrupted).await?;
    let enrol_seconds = enrolling.elapsed().as_secs_f64();
    let status = status(server).await?;
    if status.templates != u64::from(people.palms()) || status.subjects != u64::from(people.subjects()) {
        return Err(CliError::Protocol {
            call: "GetStatus",
            problem: format!(
                "{} palms of {} people were enrolled, the gallery has {} of {}",
                people.palms(),
                people.subjects(),
                status.templates,
                status.subjects
            ),
        });
    }
    let none = Tally::new();
    let engine = status.engine.unwrap_or_default();
    let mut report = Report {
        gallery: status.templates,
        dim: status.dim,
        engine: engine.kind,
        adapter: engine.adapter,
        searches: 0,
        correct: 0,
        wrong: 0,
        missed: 0,
        latency_ms: Latency::of(&none.latency_us),
        searches_per_second: 0.0,
        enrolled_per_second: f64::from(people.palms()) / enrol_seconds,
        mated: 0,
        refused: 0,
        fresh_checks: 0,
        stale: 0,
        subjects: status.subjects,
        seed: args.seed,
        threshold: THRESHOLD,
        enrol_seconds,
        search_seconds: 0.0,
        gates: Side::new(0, &none),
        terminals: Side::new(0, &none),
        examples: Vec::new(),
    };
    search(args, &people, server, &mut report).await?;
    report.examples = examples(&people, server).await?;
    Ok(report)
}

async fn status(server: &Server) -> Result<proto::Status, CliError> {
    let answer = connect::administration(server.connect().await?).get_status(GetStatusRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|status| CliError::refused("GetStatus", status))
}

/// Enrols everybody; generating goes on while the server takes in.
async fn enrol(people: &Arc<Population>, server: &Server, interrupted: &CancellationToken) -> Result<(), CliError> {
    let progress = Progress::new("enrolling", people.palms().into(), "palms");
    let mut sink = GrpcSink::new(server.clone(), Duration::ZERO, interrupted.clone(), progress.clone());
    let mut batches = generate(people.clone());
    let mut palms = 0;
    let mut count = |acknowledged: Vec<Acknowledgement>| {
        for acknowledgement in acknowledged {
            if let Some(error) = acknowledgement.rejected.first() {
                let code = code_name(tonic::Code::from_i32(error.code));
                let problem = format!("{} was rejected: {code}: {}", error.subject_id, error.message);
                return Err(CliError::Protocol { call: "BulkEnroll", problem });
            }
            palms += acknowledgement.templates;
        }
        progress.set(palms);
        Ok(())
    };
    while let Some(batch) = batches.recv().await {
        count(sink.submit(batch).await?)?;
    }
    count(sink.finish().await?)?;
    progress.finish();
    Ok(())
}

/// Generates enrolments on all cores, a few batches ahead.
fn generate(people: Arc<Population>) -> mpsc::Receiver<BulkEnrollRequest> {
    let (sender, receiver) = mpsc::channel(GENERATE_AHEAD);
    tokio::task::spawn_blocking(move || {
        for first in (0..people.subjects()).step_by(BATCH as usize) {
            let items = (first..people.subjects().min(first + BATCH))
                .into_par_iter()
                .map(|subject| BulkEnrollItem {
                    sequence: subject.into(),
                    enrollment: Some(people.enrollment(subject)),
                })
                .collect();
            if sender.blocking_send(BulkEnrollRequest { items, after_forget: None }).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Puts the server under load for the time asked for.
async fn search(
    args: &DemoArgs,
    people: &Arc<Population>,
    server: &Server,
    report: &mut Report,
) -> Result<(), CliError> {
    let started = Instant::now();
    let until = started + Duration::from_secs(args.seconds);
    let scene = |client: u32| Scene {
        people: people.clone(),
        stable: load::stable_subjects(people, args.seconds),
        server: server.clone(),
        until,
        seed: args.seed << 16 ^ u64::from(client),
        pace: None,
    };
    let mut gates = JoinSet::new();
    let mut terminals = JoinSet::new();
    (0..args.gates).for_each(|gate| drop(gates.spawn(load::gate(scene(gate)))));
    (0..args.terminals).for_each(|terminal| drop(terminals.spawn(load::terminal(scene(args.gates + terminal)))));
    let progress = Progress::new("searching", args.seconds, "seconds");
    let ticking = async {
        loop {
            tokio::time::sleep(Duration::from_millis(250)).await;
            progress.set(started.elapsed().as_secs().min(args.seconds));
        }
    };
    let working =
        async { tokio::try_join!(total(gates), total(terminals), load::churn(scene(args.gates + args.terminals))) };
    let worked = tokio::select! {
        worked = working => worked,
        never = ticking => never,
    };
    progress.finish();
    let (gates, terminals, freshness) = worked?;
    let seconds = started.elapsed().as_secs_f64();
    report.add_load((args.gates, &gates), (args.terminals, &terminals), freshness, seconds);
    Ok(())
}

/// Waits for clients of one kind and adds them up.
async fn total(mut clients: JoinSet<Result<Tally, CliError>>) -> Result<Tally, CliError> {
    let mut total = Tally::new();
    while let Some(client) = clients.join_next().await {
        match client {
            Ok(tally) => total.add(&tally?),
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
    Ok(total)
}

/// Three searches to look at: the first person, a stranger, and the first with two palms.
async fn examples(people: &Population, server: &Server) -> Result<Vec<Example>, CliError> {
    let mut client = connect::identification(server.connect().await?);
    let shown = [
        ("an enrolled palm", Some(0), Purpose::Entry, vec![people.capture(0, u16::MAX)]),
        ("a stranger's palm", None, Purpose::Entry, vec![people.stranger(u32::MAX)]),
        ("both palms, to pay", Some(9), Purpose::Payment, people.captures(9, u16::MAX)),
    ];
    let mut examples = Vec::with_capacity(shown.len());
    for (at, (shown, truth, purpose, probes)) in shown.into_iter().enumerate() {
        let mut request = load::request(format!("example-{at}"), "demo-store", purpose, probes);
        request.threshold = Some(EXAMPLE_THRESHOLD);
        request.max_candidates = EXAMPLE_CANDIDATES;
        let response = client.identify(request).await.map_err(|status| CliError::refused("Identify", status))?;
        examples.push(Example::new(shown, truth, response.into_inner()));
    }
    Ok(examples)
}

#[cfg(test)]
mod tests;
