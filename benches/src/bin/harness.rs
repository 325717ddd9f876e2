//! The load harness: a real server, bulk enrolment over loopback, and gates that search.
//!
//!     cargo run --release -p thenar-bench --bin harness
//!
//! Starts a server of its own (this very program is one: it has `serve` and `keys` as `thenar`
//! does) or loads the one that `--server` names. Client and server share the machine, as on a
//! terminal's desk; palms are generated before the clock starts. Exit code 1 if an answer is wrong.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Parser, Subcommand};
use rayon::prelude::*;
use serde::Serialize;
use thenar::cli::connect::{self, Server, ServerArgs};
use thenar::cli::demo::load::{self, Scene, Tally};
use thenar::cli::demo::population::Population;
use thenar::cli::demo::server::{DemoFolder, DemoServer};
use thenar::cli::import::sink::{Acknowledgement, GrpcSink, Sink as _};
use thenar::cli::progress::Progress;
use thenar::cli::table::{facts, grouped, say, say_json, table};
use thenar::cli::{self, keys::KeysArgs, serve::ServeArgs};
use thenar::wire::{BulkEnrollItem, BulkEnrollRequest, GetStatusRequest, Status};
use thenar_bench::facts::Facts;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Subjects in a message.
const MESSAGE_SUBJECTS: u32 = 512;

/// Load a server and measure what its clients see.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    server_program: Option<ServerProgram>,
    #[command(flatten)]
    load: LoadArgs,
}

/// What makes this program a server for itself.
#[derive(Debug, Subcommand)]
enum ServerProgram {
    /// As `thenar serve`.
    #[command(hide = true)]
    Serve(ServeArgs),
    /// As `thenar keys`.
    #[command(hide = true)]
    Keys(KeysArgs),
}

#[derive(Debug, Args)]
struct LoadArgs {
    /// Load this server instead of one of its own. The palms stay enrolled there.
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Run this `thenar` instead of the server in this program.
    #[arg(long, value_name = "FILE", conflicts_with = "server")]
    program: Option<PathBuf>,
    /// Palms to enrol.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(100..))]
    palms: u32,
    /// Components of an embedding; under 512 generated palms are so alike that some answers are wrong.
    #[arg(long, default_value_t = 512)]
    dim: usize,
    /// What its own server searches with: auto, cpu or gpu.
    #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "gpu"])]
    engine: String,
    /// Gates at the same time, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,20,100")]
    gates: Vec<u32>,
    /// Palms a minute at each gate; 0 shows the next as soon as the last is answered.
    #[arg(long, value_delimiter = ',', default_value = "0,40")]
    pace: Vec<u32>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Seed of the palms.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds instead of minutes: 3,000 palms, 8 gates for a second. For tests.
    #[arg(long)]
    smoke: bool,
    /// Print a JSON object a line: the enrolment, the measurements, last the facts of the run.
    #[arg(long)]
    json: bool,
}

/// What bulk enrolment came to.
#[derive(Debug, Serialize)]
struct Enrolment {
    templates: u64,
    /// Templates that were enrolled before, on a server that is used again.
    unchanged_subjects: u64,
    seconds: f64,
    /// Durable and searchable, acknowledged.
    templates_per_second: f64,
}

/// One measurement.
#[derive(Debug, Serialize)]
struct Row {
    gates: u32,
    /// Palms a minute at a gate; 0 as fast as answered.
    pace: u32,
    gallery: u64,
    dim: u32,
    engine: String,
    searches: u64,
    searches_per_second: f64,
    latency_ms_p50: f64,
    latency_ms_p99: f64,
    latency_ms_p999: f64,
    latency_ms_max: f64,
    correct: u64,
    wrong: u64,
    missed: u64,
    refused: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().max_blocking_threads(128).build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("harness: could not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match arguments.server_program {
            Some(ServerProgram::Serve(serve)) => cli::conclude_local(cli::serve::run(serve).await),
            Some(ServerProgram::Keys(keys)) => cli::conclude_local(cli::keys::run(keys)),
            None => match run(arguments.load).await {
                Ok(true) => ExitCode::SUCCESS,
                Ok(false) => ExitCode::FAILURE,
                Err(error) => {
                    eprintln!("harness: {error:#}");
                    ExitCode::FAILURE
                }
            },
        }
    })
}

async fn run(mut arguments: LoadArgs) -> anyhow::Result<bool> {
    if arguments.smoke {
        (arguments.palms, arguments.seconds, arguments.gates, arguments.pace) = (3000, 1, vec![8], vec![0, 600]);
    }
    let machine = Facts::gather();
    let Some(url) = &arguments.server else {
        let program = match &arguments.program {
            Some(program) => program.clone(),
            None => std::env::current_exe()?,
        };
        let folder = DemoFolder::new(None)?;
        let mut own = DemoServer::start(&program, folder.path(), arguments.dim, &arguments.engine).await?;
        let address = own.ready().await?;
        let server = ServerArgs::plain(&address).resolve()?;
        let worked = tokio::select! {
            biased;
            failure = own.ended() => return Err(failure.into()),
            worked = work(&arguments, &server, &machine) => worked,
        };
        own.stop().await?;
        return worked;
    };
    let server = ServerArgs::plain(url).resolve()?;
    work(&arguments, &server, &machine).await
}

async fn work(arguments: &LoadArgs, server: &Server, machine: &Facts) -> anyhow::Result<bool> {
    let before = status(server).await?;
    let dim = usize::try_from(before.dim)?;
    let people = Arc::new(Population::new(arguments.seed, dim, arguments.palms));
    let enrolment = enrol(&people, server).await?;
    let status = status(server).await?;
    let gained = status.templates - before.templates;
    if enrolment.unchanged_subjects == 0 {
        ensure!(gained == u64::from(people.palms()), "{} palms were enrolled, {gained} are there", people.palms());
    }

    let mut rows = Vec::new();
    for &gates in &arguments.gates {
        for &pace in &arguments.pace {
            eprintln!("{gates} gates, {} for {} s", pace_words(pace), arguments.seconds);
            let seed = arguments.seed << 32 | (rows.len() as u64) << 16;
            let (tally, seconds) = search(arguments, &people, server, gates, pace, seed).await?;
            let ms = |quantile| tally.latency_us.value_at_quantile(quantile) as f64 / 1e3;
            rows.push(Row {
                gates,
                pace,
                gallery: status.templates,
                dim: status.dim,
                engine: status.engine.clone().unwrap_or_default().kind,
                searches: tally.searches(),
                searches_per_second: tally.searches() as f64 / seconds,
                latency_ms_p50: ms(0.5),
                latency_ms_p99: ms(0.99),
                latency_ms_p999: ms(0.999),
                latency_ms_max: tally.latency_us.max() as f64 / 1e3,
                correct: tally.correct,
                wrong: tally.wrong,
                missed: tally.missed,
                refused: tally.refused,
            });
        }
    }

    if arguments.json {
        say_json(&serde_json::json!({ "enrolment": enrolment }))?;
        rows.iter().try_for_each(say_json)?;
        say_json(&serde_json::json!({ "facts": machine }))?;
    } else {
        say(rendered(machine, &enrolment, &status, &rows))?;
    }
    let unanswered = rows.iter().any(|row| row.searches == 0);
    let wrong: u64 = rows.iter().map(|row| row.wrong + row.missed).sum();
    if wrong > 0 || unanswered {
        eprintln!(
            "harness: {wrong} answers were wrong{}",
            if unanswered { ", and a measurement has none" } else { "" }
        );
    }
    Ok(wrong == 0 && !unanswered)
}

async fn status(server: &Server) -> anyhow::Result<Status> {
    let answer = connect::administration(server.connect().await?).get_status(GetStatusRequest {}).await;
    Ok(answer.context("GetStatus was refused")?.into_inner())
}

/// Generates everybody, then times enrolling them from the first message to the last
/// acknowledgement, which says that they are durable and in force.
async fn enrol(people: &Arc<Population>, server: &Server) -> anyhow::Result<Enrolment> {
    let began = Instant::now();
    let generating = Arc::clone(people);
    let messages: Vec<BulkEnrollRequest> = tokio::task::spawn_blocking(move || {
        let firsts = (0..generating.subjects()).step_by(MESSAGE_SUBJECTS as usize).collect::<Vec<_>>();
        let message = |first: u32| BulkEnrollRequest {
            items: (first..generating.subjects().min(first + MESSAGE_SUBJECTS))
                .map(|subject| BulkEnrollItem {
                    sequence: subject.into(),
                    enrollment: Some(generating.enrollment(subject)),
                })
                .collect(),
        };
        firsts.into_par_iter().map(message).collect()
    })
    .await?;
    eprintln!("{} palms generated in {:.1} s", people.palms(), began.elapsed().as_secs_f64());

    let progress = Progress::new("enrolling", people.palms().into(), "palms");
    let mut sink = GrpcSink::new(server.clone(), Duration::ZERO, CancellationToken::new(), progress.clone());
    let (mut templates, mut unchanged) = (0, 0);
    let mut count = |acknowledged: Vec<Acknowledgement>| {
        for acknowledgement in acknowledged {
            if let Some(rejected) = acknowledgement.rejected.first() {
                bail!("{} was rejected: {}", rejected.subject_id, rejected.message);
            }
            templates += acknowledgement.templates;
            unchanged += acknowledgement.unchanged;
        }
        progress.set(templates);
        Ok(())
    };
    let began = Instant::now();
    for message in messages {
        count(sink.submit(message).await?)?;
    }
    count(sink.finish().await?)?;
    let seconds = began.elapsed().as_secs_f64();
    progress.finish();
    Ok(Enrolment {
        templates,
        unchanged_subjects: unchanged,
        seconds,
        templates_per_second: templates as f64 / seconds,
    })
}

/// Lets `gates` gates search, and adds up what they saw.
async fn search(
    arguments: &LoadArgs,
    people: &Arc<Population>,
    server: &Server,
    gates: u32,
    pace: u32,
    seed: u64,
) -> anyhow::Result<(Tally, f64)> {
    let began = Instant::now();
    let scene = |gate: u32| Scene {
        people: Arc::clone(people),
        stable: people.subjects(),
        server: server.clone(),
        until: began + Duration::from_secs(arguments.seconds),
        seed: seed ^ u64::from(gate),
        pace: (pace > 0).then(|| Duration::from_secs(60) / pace),
    };
    let mut clients = JoinSet::new();
    for gate in 0..gates {
        clients.spawn(load::gate(scene(gate)));
    }
    let mut total = Tally::new();
    while let Some(client) = clients.join_next().await {
        total.add(&client??);
    }
    Ok((total, began.elapsed().as_secs_f64()))
}

fn pace_words(pace: u32) -> String {
    if pace == 0 { "as fast as answered".to_owned() } else { format!("{pace} a minute each") }
}

fn rendered(machine: &Facts, enrolment: &Enrolment, status: &Status, rows: &[Row]) -> String {
    let mut told = machine.rows();
    let engine = status.engine.clone().unwrap_or_default();
    told.push((
        "gallery",
        format!("{} templates x {}, {} engine, {}", grouped(status.templates), status.dim, engine.kind, engine.adapter),
    ));
    told.push((
        "BulkEnroll",
        format!(
            "{} templates in {:.2} s, {} a second, durable and searchable",
            grouped(enrolment.templates),
            enrolment.seconds,
            grouped(enrolment.templates_per_second as u64)
        ),
    ));
    let header = [
        "gates",
        "palms",
        "searches",
        "searches/s",
        "ms p50",
        "p99",
        "p99.9",
        "max",
        "right",
        "wrong",
        "missed",
        "refused",
    ];
    let mut out = table(&header, 2);
    for row in rows {
        let ms = |value: f64| format!("{value:.1}");
        out.add_row(vec![
            row.gates.to_string(),
            pace_words(row.pace),
            row.searches.to_string(),
            format!("{:.1}", row.searches_per_second),
            ms(row.latency_ms_p50),
            ms(row.latency_ms_p99),
            ms(row.latency_ms_p999),
            ms(row.latency_ms_max),
            row.correct.to_string(),
            row.wrong.to_string(),
            row.missed.to_string(),
            row.refused.to_string(),
        ]);
    }
    format!("{}\n{out}", facts(&told))
}
