//! Checks and times the GPU engine on the machine it runs on. Needs nothing but this program.
//!
//! Four calls, each of which ends within ten minutes on a machine with 16 cores, so that a graphics card that is
//! available for minutes can be used. Each prints a short table and, with `--json`, writes what it found after
//! every line, so that a call that is interrupted leaves its figures. Exit code 1 if an answer was wrong, a
//! driver failed or no adapter fits.
//!
//! - `small`: every kind of search on a small gallery against brute force in f64, and the cost of a search over
//!   almost nothing.
//! - `timings`: ten million rows, single probes and batches, beside PyTorch if there is one.
//! - `matrices`: cooperative matrices against the plain kernel, again and again, in processes of their own,
//!   because a driver may crash on them.
//! - `capacity`: copies of a gallery until the device is full.
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
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Subcommand)]
enum Call {
    /// Every kind of search on a small gallery against brute force.
    Small(small::Arguments),
    /// Single probes and batches on ten million rows, beside PyTorch.
    Timings(timings::Arguments),
    /// Cooperative matrices against the plain kernel, in processes of their own.
    Matrices(matrices::Arguments),
    /// How many rows the device holds, and a search among them.
    Capacity(capacity::Arguments),
}

impl Call {
    fn name(&self) -> &'static str {
        match self {
            Self::Small(_) => "small",
            Self::Timings(_) => "timings",
            Self::Matrices(_) => "matrices",
            Self::Capacity(_) => "capacity",
        }
    }
}

/// What every call takes.
#[derive(Args, Clone)]
struct Common {
    /// Components of a row, a multiple of 32.
    #[arg(long, global = true, default_value = "512", value_parser = thenar_bench::gallery::dimension)]
    dim: usize,
    /// Part of the adapter's name; by default a graphics processor if there is one.
    #[arg(long, global = true)]
    adapter: Option<String>,
    /// Leave cooperative matrices off.
    #[arg(long, global = true)]
    no_matrices: bool,
    /// Seed of the gallery and the probes.
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
    /// Seconds after which no new measurement begins.
    #[arg(long, global = true, default_value_t = 480.0)]
    limit_seconds: f64,
    /// Where to write what was found.
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds instead of minutes, on a software adapter (lavapipe) if none is named: a few thousand
    /// rows of 128. For tests; without an adapter it is skipped, unless THENAR_REQUIRE_GPU=1.
    #[arg(long, global = true)]
    smoke: bool,
}

fn main() -> ExitCode {
    let Arguments { call, mut common } = Arguments::parse();
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
    let mut report = Report::new(call.name(), &common);
    let done = match &call {
        Call::Small(call) => small::run(&common, call, &mut report),
        Call::Timings(call) => timings::run(&common, call, &mut report),
        Call::Matrices(call) => matrices::run(&common, call, &mut report),
        Call::Capacity(call) => capacity::run(&common, call, &mut report),
    };
    if let Err(error) = done {
        report.wrong(format!("{error:#}"));
    }
    report.conclude()
}

/// Opens the engine, reports on which adapter, and measures what the other figures are compared with: the
/// engine, and the bytes per second of a copy on the device.
fn open_and_measure(common: &Common, seconds: f64, report: &mut Report) -> anyhow::Result<(GpuEngine, f64)> {
    let engine = open(common, report)?;
    let copied = engine.copy_rate()?;
    report.figure("a copy on the device", copied / 1e9, "GB/s");
    segments::empty_search(&engine, common.dim, seconds, report)?;
    Ok((engine, copied))
}

/// Opens the engine and reports on which adapter.
fn open(common: &Common, report: &mut Report) -> anyhow::Result<GpuEngine> {
    let adapters: Vec<String> = available_adapters()
        .iter()
        .map(|a| format!("{} ({}, {}, {})", a.name, a.driver, a.backend, a.device_type))
        .collect();
    report.note("adapters", adapters.join("; "));
    let choice = common.adapter.clone().map_or(AdapterChoice::Any, AdapterChoice::Named);
    let started = Instant::now();
    let options = GpuOptions { matrices: !common.no_matrices, kernels_in: None };
    let engine = GpuEngine::with_options(choice, options).context("no engine")?;
    report.figure("opened and checked", started.elapsed().as_secs_f64(), "s");
    report.note("engine", thenar::engine::Engine::describe(&engine).adapter);
    report.note("kernels", engine.kernels());
    Ok(engine)
}
