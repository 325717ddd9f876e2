//! Checks and times the GPU engine on the machine it runs on, with nothing else at hand.
//!
//! Four calls, each of which ends within ten minutes on a machine with 16 cores, so that a card that is
//! lent for minutes can be used. Each prints a short table and, with `--json`, writes what it found
//! after every line, so that a call that is cut off leaves its figures. Exit code 1 if an answer was
//! wrong, a driver failed or no adapter fits.
//!
//! - `small`: every kind of search on a small gallery against brute force in f64, and the cost of a
//!   search over almost nothing.
//! - `timings`: ten million rows, single probes and batches, beside PyTorch where there is one.
//! - `matrices`: cooperative matrices against the plain kernel, again and again, in processes of their
//!   own, because a driver may crash on them.
//! - `capacity`: copies of a gallery until the card is full.
//!
//! `benches/gpu.sh` runs them; `--no-matrices` leaves matrices off in all but `matrices`.

mod capacity;
mod matrices;
mod report;
mod segments;
mod small;
mod timings;
mod torch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use thenar::engine::gpu::{AdapterChoice, GpuEngine, GpuOptions, available_adapters};

use report::Report;

/// Checks and times the GPU engine.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    call: Call,
}

#[derive(Subcommand)]
enum Call {
    /// Every kind of search on a small gallery against brute force.
    Small(small::Arguments),
    /// Single probes and batches on ten million rows, beside PyTorch.
    Timings(timings::Arguments),
    /// Cooperative matrices against the plain kernel, in processes of their own.
    Matrices(matrices::Arguments),
    /// How many rows the card holds, and a search among them.
    Capacity(capacity::Arguments),
}

/// What every call takes.
#[derive(Args, Clone)]
struct Common {
    /// Components of a row, a multiple of 32.
    #[arg(long, default_value = "512", value_parser = thenar_bench::gallery::dimension)]
    dim: usize,
    /// Part of the adapter's name; without it a graphics processor if there is one.
    #[arg(long)]
    adapter: Option<String>,
    /// Leave cooperative matrices off.
    #[arg(long)]
    no_matrices: bool,
    /// Seed of the gallery and the probes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds after which nothing new is begun.
    #[arg(long, default_value_t = 480.0)]
    limit_seconds: f64,
    /// Where to write what was found.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds instead of minutes, on a software adapter (lavapipe) where none is named: a few thousand
    /// rows of 128. For tests; without any adapter there is nothing to do, unless THENAR_REQUIRE_GPU=1.
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let (name, common) = match &mut arguments.call {
        Call::Small(call) => ("small", &mut call.common),
        Call::Timings(call) => ("timings", &mut call.common),
        Call::Matrices(call) => ("matrices", &mut call.common),
        Call::Capacity(call) => ("capacity", &mut call.common),
    };
    if common.smoke {
        common.dim = 128;
        if common.adapter.is_none() {
            let adapters = available_adapters();
            let Some(adapter) = adapters.iter().find(|adapter| adapter.software).or(adapters.first()) else {
                eprintln!("gpu_check: skipped, there is no adapter");
                let required = std::env::var_os("THENAR_REQUIRE_GPU").is_some_and(|value| value == "1");
                return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
            };
            common.adapter = Some(adapter.name.clone());
        }
    }
    let mut report = Report::new(name, common);
    let done = match &arguments.call {
        Call::Small(call) => small::run(call, &mut report),
        Call::Timings(call) => timings::run(call, &mut report),
        Call::Matrices(call) => matrices::run(call, &mut report),
        Call::Capacity(call) => capacity::run(call, &mut report),
    };
    if let Err(error) = done {
        report.wrong(format!("{error:#}"));
    }
    report.conclude()
}

/// Opens the engine and says on what.
fn open(common: &Common, report: &mut Report) -> anyhow::Result<GpuEngine> {
    let adapters: Vec<String> = available_adapters()
        .iter()
        .map(|a| format!("{} ({}, {}, {})", a.name, a.driver, a.backend, a.device_type))
        .collect();
    report.note("adapters", adapters.join("; "));
    let choice = common.adapter.clone().map_or(AdapterChoice::Any, AdapterChoice::Named);
    let started = Instant::now();
    let options = GpuOptions { matrices: !common.no_matrices, kernels_in: None, ..GpuOptions::default() };
    let engine = GpuEngine::with_options(choice, options).context("no engine")?;
    report.figure("opened and checked", started.elapsed().as_secs_f64(), "s");
    report.note("engine", thenar::engine::Engine::describe(&engine).adapter);
    report.note("kernels", engine.kernels());
    Ok(engine)
}
