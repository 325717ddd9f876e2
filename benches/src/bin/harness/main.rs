//! The load harness: a real server, bulk enrolment over loopback, and an open loop of gates,
//! terminals and writers.
//!
//!     cargo run --release -p thenar-bench --bin harness -- --rate 100,300 --floorless 0,2
//!
//! Without FAISS, which it does not need: `--no-default-features`. Calls arrive at random at the given
//! rates, whether or not earlier ones have been answered, and latency counts from when a call was
//! due. Every answer is checked, and after the run every enrolment and deletion that was acknowledged.
//!
//! Starts a server of its own (this very program is one: it has `serve` and `keys` as `thenar`
//! does) or loads the one that `--server` names. Client and server share the machine, as on a
//! terminal's desk; palms are generated before the clock starts. Exit code 1 if an answer is wrong, a
//! write is lost, or there is an error that `--allow` does not name.

mod clients;
mod judge;
mod report;
mod scenario;
mod world;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use clap::Parser;
use rayon::prelude::*;
use thenar::api::proto::BulkEnrollRequest;
use thenar::cli::bulk::enrol_all;
use thenar::cli::client::Server;
use thenar::cli::output::{print, print_json};
use thenar::cli::own_server::{OwnServer, ServerFolder};
use thenar::cli::population::Population;
use thenar::cli::{self, Cli};
use thenar_bench::facts::Facts;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use clients::{Clients, Outcome, Record};
use judge::{Judge, Policies};
use report::{Judged, Measurement, Report, Verdict};
use scenario::LoadArgs;
use world::World;

/// From connecting to the first call.
const LEAD: Duration = Duration::from_millis(200);

/// Load a server and measure what its clients see.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    load: LoadArgs,
}

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().max_blocking_threads(128).build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("harness: could not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    // This program is a server for itself, as `thenar` is.
    if let Some("serve" | "keys") = std::env::args().nth(1).as_deref() {
        return runtime.block_on(cli::run(Cli::parse()));
    }
    match runtime.block_on(run(Arguments::parse().load.resolved())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("harness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: LoadArgs) -> anyhow::Result<bool> {
    if let Some(problem) = arguments.problem() {
        bail!("{problem}");
    }
    let machine = Facts::gather();
    let Some(url) = &arguments.server else {
        let program = match &arguments.program {
            Some(program) => program.clone(),
            None => std::env::current_exe()?,
        };
        let folder = ServerFolder::new(None)?;
        let mut own = OwnServer::start(&program, folder.path(), arguments.dim, arguments.engine).await?;
        let address = own.ready().await?;
        let server = Server::plain(&address)?;
        let worked = tokio::select! {
            biased;
            failure = own.ended() => return Err(failure.into()),
            worked = work(&arguments, &server, machine) => worked,
        };
        own.stop().await?;
        return worked;
    };
    let server = Server::plain(url)?;
    work(&arguments, &server, machine).await
}

async fn work(arguments: &LoadArgs, server: &Server, machine: Facts) -> anyhow::Result<bool> {
    let before = server.status().await?;
    ensure!(before.templates == 0 || arguments.enrol + arguments.forget == 0.0, "writes need an empty gallery");
    let people = Population::new(arguments.seed, usize::try_from(before.dim)?, arguments.palms);
    let (world, messages) = {
        let arguments = arguments.clone();
        spawn_blocking(move || {
            let messages: Vec<_> = people.message_starts().into_par_iter().map(|first| people.message(first)).collect();
            (Arc::new(World::new(people, &messages, &arguments)), messages)
        })
        .await?
    };
    let templates_per_second = enrol(messages, arguments.palms.into(), server).await?;
    let status_before = server.status().await?;
    let policies = Policies::of(&status_before);
    let enrolled = status_before.templates;
    ensure!(enrolled >= arguments.palms.into(), "{} palms were enrolled, {enrolled} are there", arguments.palms);

    let mut measurements = Vec::new();
    for (&rate, &floorless) in arguments.rate.iter().flat_map(|rate| arguments.floorless.iter().map(move |f| (rate, f)))
    {
        eprintln!("{rate} searches a second and {floorless} without a threshold, for {} s", arguments.seconds);
        let seed = scenario::seed_of(arguments.seed, 100 + measurements.len() as u64);
        let arrivals = scenario::arrivals(arguments, rate, floorless, seed);
        let (records, start) = measure(&world, server, arguments, arrivals).await?;
        let judged = judged(&world, &policies, records).await?;
        let deadline = Duration::from_millis(arguments.deadline_ms);
        let loads = (rate, floorless);
        measurements.push(Measurement::new(loads, &judged, start, arguments.seconds, deadline, &arguments.allow));
    }
    let lost_writes = lost_writes(&world, &policies, server, arguments, enrolled).await?;

    let server_rows = report::server_rows(&status_before, templates_per_second);
    let report = Report { facts: machine, server: server_rows, measurements, lost_writes };
    if let Some(path) = &arguments.save {
        report.save(path)?;
    }
    if arguments.json {
        print_json(&report)?;
    } else {
        print(report.text())?;
    }
    Ok(report.is_good())
}

/// Enrols everybody; returns the templates per second, from the first message to the last
/// acknowledgement, which says that they are durable and searchable.
async fn enrol(messages: Vec<BulkEnrollRequest>, palms: u64, server: &Server) -> anyhow::Result<f64> {
    let began = Instant::now();
    enrol_all(server, tokio_stream::iter(messages), palms, &CancellationToken::new()).await?;
    Ok(palms as f64 / began.elapsed().as_secs_f64())
}

/// Makes all calls at their times and waits for what comes of them. The measurement begins at the
/// moment that is returned.
async fn measure(
    world: &Arc<World>,
    server: &Server,
    arguments: &LoadArgs,
    arrivals: Vec<scenario::Arrival>,
) -> anyhow::Result<(Vec<Record>, Instant)> {
    let (records, mut coming) = mpsc::unbounded_channel();
    let clients = Clients::connect(world, server, arguments, records.clone()).await?;
    let warmup = Duration::from_secs(arguments.warmup);
    let start = Instant::now() + LEAD;
    let until = start + warmup + Duration::from_secs(arguments.seconds);
    let mut slow = JoinSet::new();
    for _ in 0..arguments.slow {
        slow.spawn(clients::slow(Arc::clone(world), server.address().to_owned(), until, records.clone()));
    }
    drop(records);
    let making = spawn_blocking(move || clients.make(&arrivals, start));
    let mut all = Vec::new();
    // Ends once the last call has: each holds a sender.
    while let Some(record) = coming.recv().await {
        all.push(record);
    }
    making.await?;
    while let Some(client) = slow.join_next().await {
        client??;
    }
    Ok((all, start + warmup))
}

/// Judges every record, in parallel.
async fn judged(world: &Arc<World>, policies: &Policies, records: Vec<Record>) -> anyhow::Result<Vec<Judged>> {
    let (world, policies) = (Arc::clone(world), policies.clone());
    let judged = spawn_blocking(move || {
        let judge = Judge { world: &world, policies: &policies, lives: world.lives() };
        records.into_par_iter().map(|record| judged_one(&judge, record)).collect()
    });
    Ok(judged.await?)
}

fn judged_one(judge: &Judge<'_>, record: Record) -> Judged {
    let Record { kind, due, sent, done, outcome } = record;
    let of = |right: Result<(), String>| right.map_or_else(Verdict::Wrong, |()| Verdict::Right);
    let verdict = match outcome {
        Outcome::Identified(asked, answer) => of(judge.identification(&asked, &answer, sent, done)),
        Outcome::Verified(question, claimed, answer) => of(judge.verification(&question, claimed, &answer)),
        Outcome::Written => Verdict::Right,
        Outcome::Refused => Verdict::Refused,
        Outcome::Expired => Verdict::Expired,
        Outcome::Failed(why) => Verdict::Failed(why),
    };
    Judged { kind, due, sent, done, verdict }
}

/// What is not as it was acknowledged: everybody who came or went is searched for once more, and the
/// templates are counted.
async fn lost_writes(
    world: &Arc<World>,
    policies: &Policies,
    server: &Server,
    arguments: &LoadArgs,
    enrolled: u64,
) -> anyhow::Result<Vec<String>> {
    let lives = world.lives();
    let answered = clients::look_for_all(world, server, arguments, lives.keys().copied().collect()).await?;
    let mut lost: Vec<String> = judged(world, policies, answered)
        .await?
        .into_iter()
        .filter_map(|call| match call.verdict {
            Verdict::Right => None,
            verdict => Some(format!("after the run: {verdict:?}")),
        })
        .collect();
    let is_known = |change: &Option<world::Change>| change.is_none_or(|change| change.acknowledged.is_some());
    if lives.values().all(|life| is_known(&life.enrolled) && is_known(&life.forgotten)) {
        let came = lives.values().filter(|life| life.enrolled.is_some()).count() as u64;
        let gone = lives.iter().filter(|(_, life)| life.forgotten.is_some());
        let gone: usize = gone.map(|(subject, _)| world.people.enrollment(*subject).samples.len()).sum();
        let (right, there) = (enrolled + came - gone as u64, server.status().await?.templates);
        if there != right {
            lost.push(format!("after the run: {there} templates, not {right}"));
        }
    }
    Ok(lost)
}
