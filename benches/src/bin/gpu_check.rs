//! Checks and times the GPU engine on the machine it runs on, with nothing else at hand.
//!
//! Lists the adapters, makes the standard benchmark gallery on the host, uploads it, holds the
//! survivors of some probes against an f64 brute force over every row, and times single probes and
//! batches with and without a floor. Exit code 1 if an answer was wrong or no adapter fits.
//!
//!     cargo run --release -p thenar-bench --bin gpu_check -- --n 1000000 --dim 512

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use clap::Parser;
use half::f16;
use rayon::prelude::*;
use thenar::engine::gpu::{AdapterChoice, GpuEngine, available_adapters};
use thenar::engine::{BlockView, Engine, GalleryView, SiftRequest, Survivors};
use thenar_bench::gallery::{Gallery, GalleryKind};
use thenar_index::codes::Codes;

/// Checks and times the GPU engine.
#[derive(Parser)]
struct Arguments {
    /// Rows of the gallery.
    #[arg(long, default_value_t = 100_000)]
    n: usize,
    /// Components of a row, a multiple of 32.
    #[arg(long, default_value_t = 512)]
    dim: usize,
    /// Part of the adapter's name; without it a graphics processor if there is one.
    #[arg(long)]
    adapter: Option<String>,
    /// Sizes of the batches to time.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,16,32,64,256")]
    batches: Vec<usize>,
    /// Floor of the threshold searches.
    #[arg(long, default_value_t = 0.5)]
    floor: f32,
    /// Best rows to keep.
    #[arg(long, default_value_t = 10)]
    keep: u32,
    /// Probes to check against brute force.
    #[arg(long, default_value_t = 8)]
    check: usize,
    /// Least time to spend on a line of the table, in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Seed of the gallery and the probes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds instead of minutes, on a software adapter (lavapipe) where none is named: 4,096 rows
    /// of 128. For tests; without any adapter there is nothing to do, unless THENAR_REQUIRE_GPU=1.
    #[arg(long)]
    smoke: bool,
}

/// Rows of a block: the gallery comes in several, as it would from an index.
const BLOCK_ROWS: usize = 1 << 20;

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let adapters = available_adapters();
    if arguments.smoke {
        (arguments.n, arguments.dim, arguments.batches) = (4096, 128, vec![1, 16]);
        (arguments.check, arguments.seconds) = (4, 0.0);
        if arguments.adapter.is_none() {
            let Some(adapter) = adapters.iter().find(|adapter| adapter.software).or(adapters.first()) else {
                eprintln!("gpu_check: skipped, there is no adapter");
                let required = std::env::var_os("THENAR_REQUIRE_GPU").is_some_and(|value| value == "1");
                return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
            };
            arguments.adapter = Some(adapter.name.clone());
        }
    }
    for adapter in adapters {
        println!(
            "adapter: {} ({}, {}, {}{})",
            adapter.name,
            adapter.driver,
            adapter.backend,
            adapter.device_type,
            if adapter.software { ", software" } else { "" }
        );
    }
    let choice = arguments.adapter.clone().map_or(AdapterChoice::Any, AdapterChoice::Named);
    let started = Instant::now();
    let engine = match GpuEngine::new(choice) {
        Ok(engine) => engine,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    println!("engine on {}, opened and checked in {:.2?}", engine.describe().adapter, started.elapsed());
    match check_and_time(&arguments, &engine) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn check_and_time(arguments: &Arguments, engine: &GpuEngine) -> Result<bool, thenar::engine::EngineError> {
    let Arguments { n, dim, seed, .. } = *arguments;
    let started = Instant::now();
    let gallery = Gallery::new(GalleryKind::Standard, seed, n, dim);
    let rows = gallery.rows();
    println!("gallery of {n} x {dim}, {} MB, made in {:.1?}", n * dim * 2 / 1_000_000, started.elapsed());
    let live: Vec<AtomicU64> = (0..n.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX)).collect();
    let blocks = rows.chunks(BLOCK_ROWS * dim).enumerate().map(|(number, rows)| BlockView {
        identity: number as u64 + 1,
        first_row: u32::try_from(number * BLOCK_ROWS).expect("rows fit u32"),
        rows,
        live: &live[number * BLOCK_ROWS / 64..],
        codes: Codes::default(),
    });
    let view = GalleryView { dim, blocks: blocks.collect() };
    let started = Instant::now();
    engine.follow(&view)?;
    let took = started.elapsed();
    println!(
        "uploaded in {took:.2?}, {:.2} GB/s; {} MB on the device, {} MB of buffers on the host",
        (n * dim * 2) as f64 / took.as_secs_f64() / 1e9,
        engine.describe().device_bytes / 1_000_000,
        engine.describe().host_bytes / 1_000_000,
    );

    let probes = gallery.probes(arguments.batches.iter().copied().max().unwrap_or(1).max(arguments.check));
    let mut right = true;
    for (floor, keep) in [(arguments.floor, 0), (arguments.floor, arguments.keep), (-1.1, arguments.keep)] {
        for batch in [1, arguments.check] {
            right &= agrees(engine, &view, rows, probes.values(0..batch), floor, keep)?;
        }
    }

    let mut table = String::from(
        "probes   floor  keep   wall ms (best)  device ms (best)    pairs/s (device)   row GB/s   GFLOP/s   survivors\n",
    );
    for &batch in &arguments.batches {
        for (floor, keep) in [(arguments.floor, arguments.keep), (-1.1, arguments.keep)] {
            let line = time(engine, &view, probes.values(0..batch), floor, keep, arguments.seconds)?;
            let seconds = line.device.unwrap_or(line.wall).as_secs_f64();
            let pairs = (n * batch) as f64;
            writeln!(
                table,
                "{batch:6} {floor:7.2} {keep:5} {:16.3} {:>17} {:19.3e} {:10.1} {:9.1} {:11.1}",
                line.wall.as_secs_f64() * 1e3,
                line.device.map_or("-".to_owned(), |d| format!("{:.3}", d.as_secs_f64() * 1e3)),
                pairs / seconds,
                (n * dim * 2) as f64 / seconds / 1e9,
                pairs * dim as f64 * 2.0 / seconds / 1e9,
                line.survivors as f64 / batch as f64,
            )
            .expect("a String takes all");
        }
    }
    println!("{table}");
    println!("{}", if right { "every answer was right" } else { "WRONG ANSWERS, see above" });
    Ok(right)
}

/// Whether the survivors hold every row that brute force wants. Says so if not.
fn agrees(
    engine: &GpuEngine,
    view: &GalleryView<'_>,
    rows: &[f16],
    probes: &[f32],
    floor: f32,
    keep: u32,
) -> Result<bool, thenar::engine::EngineError> {
    let dim = view.dim;
    let count = probes.len() / dim;
    let mut survivors = Survivors::default();
    let request = SiftRequest {
        probes,
        floors: &vec![floor; count],
        keep: &vec![keep; count],
        survivors_max: 100_000,
        ..SiftRequest::default()
    };
    engine.sift(view, &request, &mut survivors)?;
    let mut right = true;
    for (number, probe) in probes.chunks_exact(dim).enumerate() {
        let scores: Vec<f64> = rows
            .par_chunks_exact(dim)
            .map(|row| row.iter().zip(probe).map(|(x, q)| f64::from(x.to_f32()) * f64::from(*q)).sum())
            .collect();
        let mut line = f64::from(floor);
        if keep > 0 && scores.len() >= keep as usize {
            let mut best = scores.clone();
            let (_, last, _) = best.select_nth_unstable_by(keep as usize - 1, |a, b| b.total_cmp(a));
            line = line.max(*last);
        }
        let wanted = scores.iter().filter(|score| **score >= line).count();
        let mut found = survivors.rows[number].clone();
        found.sort_unstable();
        found.dedup();
        let kept = found.iter().filter(|&&row| scores[row as usize] >= line).count();
        if survivors.overflowed[number] || kept != wanted || found.len() != survivors.rows[number].len() {
            println!(
                "probe {number} of {count}, floor {floor}, keep {keep}: {kept} of {wanted} rows, overflowed: {}",
                survivors.overflowed[number]
            );
            right = false;
        }
    }
    Ok(right)
}

struct Timing {
    wall: Duration,
    device: Option<Duration>,
    survivors: usize,
}

fn time(
    engine: &GpuEngine,
    view: &GalleryView<'_>,
    probes: &[f32],
    floor: f32,
    keep: u32,
    seconds: f64,
) -> Result<Timing, thenar::engine::EngineError> {
    let count = probes.len() / view.dim;
    let request = SiftRequest {
        probes,
        floors: &vec![floor; count],
        keep: &vec![keep; count],
        survivors_max: 100_000,
        ..SiftRequest::default()
    };
    let mut survivors = Survivors::default();
    let mut best = Timing { wall: Duration::MAX, device: None, survivors: 0 };
    let started = Instant::now();
    let mut rounds = 0;
    while rounds < 2 || started.elapsed().as_secs_f64() < seconds {
        let begun = Instant::now();
        engine.sift(view, &request, &mut survivors)?;
        best.wall = best.wall.min(begun.elapsed());
        if let Some(time) = survivors.device_time {
            best.device = Some(best.device.map_or(time, |device| device.min(time)));
        }
        rounds += 1;
    }
    best.survivors = survivors.rows.iter().map(Vec::len).sum();
    Ok(best)
}
