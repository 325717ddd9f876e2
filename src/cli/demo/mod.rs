//! `thenar demo`: a server of its own, generated palms, full load, and every answer checked.
//!
//! Starts the same program that runs in production, in a folder that is removed at the end, and is
//! a client like any other: it measures what gates and terminals would see on one machine that they
//! share with the server.

mod load;
mod report;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::bulk::enrol_all;
use super::client::{self, Server};
use super::error::CliError;
use super::output::{Progress, print, print_json};
use super::own_server::{EngineChoice, OwnServer, ServerFolder};
use super::population::Population;
use super::{Outcome, interrupt};
use crate::api::proto::{BulkEnrollRequest, Purpose};
use crate::model::{self, DIM_MAX};
use load::{Scene, Tally};
use report::{Example, Report};

/// Messages generated ahead of sending.
const GENERATE_AHEAD: usize = 4;
/// Dimensions under which generated palms are too alike to be told apart in a large gallery.
const DIM_DISTINCT: u16 = 512;
/// Time in which a server that breaks a connection may turn out to have ended.
const LAST_WORDS_WITHIN: Duration = Duration::from_millis(500);
/// Candidates listed in an example, from this score on.
const EXAMPLE_THRESHOLD: f64 = 0.3;
const EXAMPLE_CANDIDATES: u32 = 3;

/// Start a server on generated palms, put it under load and check every answer.
///
/// Enrols the palms, then searches from gates (one stream each) and payment terminals as fast as
/// the answers come, while people are forgotten and enrolled. The exit code is 1 if any answer is
/// wrong, missed or not up to date. The server runs in a temporary folder (see TMPDIR; about 4 KiB
/// per palm) and is stopped at the end.
#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// Palms to enrol. Every tenth person has two.
    #[arg(long, value_name = "COUNT", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(100..=100_000_000))]
    palms: u32,
    /// Dimensions of an embedding. Under 512, generated palms are so alike that even an
    /// exhaustive search takes some for others.
    #[arg(long, value_name = "D", default_value_t = DIM_DISTINCT, value_parser = dimension)]
    dim: u16,
    /// Seed of the palms: the same seed, the same palms.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Seconds of searching.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Gates that search at the same time.
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    gates: u32,
    /// Payment terminals that search at the same time.
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=1000))]
    terminals: u32,
    /// What the server searches with; auto uses a graphics card if there is one.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    engine: EngineChoice,
    /// Work in this folder, which must be new or empty, and leave key, configuration and data there.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Print one JSON object: gallery, dim, engine, adapter, searches, correct, wrong, missed,
    /// latency_ms (p50, p99, p999), searches_per_second, enrolled_per_second and more.
    #[arg(long)]
    json: bool,
}

fn dimension(text: &str) -> Result<u16, String> {
    let dim = text.parse::<u16>().map_err(|_| format!("{text:?} is not a number up to {DIM_MAX}"))?;
    model::checked_dim(dim.into()).map(|_| dim).map_err(|invalid| invalid.to_string())
}

/// Runs `thenar demo`.
///
/// # Errors
/// [`CliError`] if the server does not start, fails or does not stop cleanly, or on Ctrl-C.
pub(crate) async fn run(args: DemoArgs) -> Result<Outcome, CliError> {
    let program = std::env::current_exe()?;
    let interrupted = interrupt::watch(interrupt::Again::IsIgnored)?;
    let report = demonstrate(&args, &program, &interrupted).await;
    if let Err(CliError::Refused { status, .. }) = &report
        && status.code() == tonic::Code::ResourceExhausted
    {
        eprintln!("note: about 4 KiB per palm are needed; TMPDIR or --keep can name a folder on a larger disk");
    }
    let report = report?;
    if args.json {
        print_json(&report)?;
    } else {
        print(report.render())?;
    }
    Ok(report.outcome())
}

/// Starts the server, works, and stops the server whatever happens.
async fn demonstrate(args: &DemoArgs, program: &Path, interrupted: &CancellationToken) -> Result<Report, CliError> {
    if args.dim < DIM_DISTINCT {
        eprintln!("note: with {} dimensions generated palms are alike; some answers will be wrong", args.dim);
    }
    let folder = ServerFolder::new(args.keep.as_deref())?;
    eprintln!("starting a server in {}", folder.path().display());
    let mut child = OwnServer::start(program, folder.path(), args.dim.into(), args.engine).await?;
    let ready = tokio::select! {
        biased;
        () = interrupted.cancelled() => None,
        ready = child.ready() => Some(ready?),
    };
    let worked = match ready {
        None => Err(CliError::DemoInterrupted { kept: args.keep.is_some() }),
        Some(address) => {
            let server = Server::plain(&address)?;
            tokio::select! {
                biased;
                () = interrupted.cancelled() => Err(CliError::DemoInterrupted { kept: args.keep.is_some() }),
                failure = child.ended() => return Err(failure),
                worked = work(args, &server, interrupted) => worked,
            }
        }
    };
    // A broken connection is the first sign of a server that ends; its own words say more.
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
    enrol_all(server, messages(people.clone()), people.palms().into(), interrupted).await?;
    let enrol_seconds = enrolling.elapsed().as_secs_f64();
    let status = server.status().await?;
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
    let mut report = Report::new(status, args.seed, enrol_seconds);
    search(args, &people, server, &mut report).await?;
    report.examples = examples(&people, server).await?;
    Ok(report)
}

/// Everybody's enrolment, generated on all cores, a few messages ahead.
fn messages(people: Arc<Population>) -> ReceiverStream<BulkEnrollRequest> {
    let (sender, receiver) = mpsc::channel(GENERATE_AHEAD);
    tokio::task::spawn_blocking(move || {
        for first in people.message_starts() {
            if sender.blocking_send(people.message(first)).is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
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
    let mut total = Tally::default();
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
    let mut client = client::identification(server.connect().await?);
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
