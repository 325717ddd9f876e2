//! Checks and times the GPU engine on the machine it runs on, with nothing else at hand.
//!
//! Lists the adapters, makes the standard benchmark gallery and its codes on the host, uploads the
//! codes, holds the survivors of some probes against an f64 brute force over every row, under both
//! certificates and with filters, and times single probes and batches. With `--largest` it goes on to
//! add copies of the gallery until the card is full. The last lines are a short table. Exit code 1
//! if an answer was wrong or no adapter fits.
//!
//!     cargo run --release -p thenar-bench --bin gpu_check -- --n 1000000 --dim 512 --largest

use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use clap::Parser;
use half::f16;
use rayon::prelude::*;
use roaring::RoaringBitmap;
use thenar::certificate::Certificate;
use thenar::engine::gpu::{AdapterChoice, GpuEngine, available_adapters};
use thenar::engine::{BlockView, Engine, EngineError, GalleryView, SiftRequest, Survivors};
use thenar_bench::gallery::{Gallery, GalleryKind};
use thenar_index::codes::{BLOCK_ROWS, OwnedCodes};

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
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,256")]
    batches: Vec<usize>,
    /// Floor of the threshold searches.
    #[arg(long, default_value_t = 0.5)]
    floor: f32,
    /// Best rows to keep.
    #[arg(long, default_value_t = 10)]
    keep: u32,
    /// Probes to check against brute force.
    #[arg(long, default_value_t = 60)]
    check: usize,
    /// Least time to spend on a line of the table, in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Seed of the gallery and the probes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Add copies of the gallery until the card is full, and time a single probe then.
    #[arg(long)]
    largest: bool,
    /// Rows, in millions, at which `--largest` stops at the latest.
    #[arg(long, default_value_t = 4000.0)]
    largest_millions_max: f64,
    /// Seconds instead of minutes, on a software adapter (lavapipe) where none is named: 4,100 rows
    /// of 128. For tests; without any adapter there is nothing to do, unless THENAR_REQUIRE_GPU=1.
    #[arg(long)]
    smoke: bool,
}

/// Rows of a segment: the gallery comes in several, as it would from an index.
const SEGMENT_ROWS: usize = 1 << 20;
const RANDOMISED: Certificate = Certificate::Randomised { miss_probability: 1e-12 };
/// Survivors a probe may have.
const SURVIVORS_MAX: usize = 100_000;

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    let adapters = available_adapters();
    if arguments.smoke {
        // The last four rows have no codes.
        (arguments.n, arguments.dim, arguments.batches) = (4100, 128, vec![1, 16, 256]);
        (arguments.check, arguments.seconds) = (4, 0.0);
        (arguments.largest, arguments.largest_millions_max) = (true, 0.01);
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
    println!("kernels: {}", engine.kernels());
    let copied = match engine.copy_rate() {
        Ok(rate) => rate,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    println!("a copy moves {:.0} GB/s", copied / 1e9);
    match check_and_time(&arguments, &engine, copied) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A segment of the gallery with what a view borrows.
struct Segment<'a> {
    rows: &'a [f16],
    codes: OwnedCodes,
    live: Vec<AtomicU64>,
}

impl<'a> Segment<'a> {
    fn new(rows: &'a [f16], dim: usize) -> Self {
        let count = rows.len() / dim;
        let coded = count / BLOCK_ROWS * BLOCK_ROWS;
        let mut codes = OwnedCodes::zeroed(dim, 0);
        let parts: Vec<OwnedCodes> =
            rows[..coded * dim].par_chunks(BLOCK_ROWS * dim).map(|rows| OwnedCodes::of(rows, dim)).collect();
        for part in parts {
            codes.sketch.extend(part.sketch);
            codes.sign.extend(part.sign);
            codes.two.extend(part.two);
            codes.fine.extend(part.fine);
            codes.terms.extend(part.terms);
        }
        Self { rows, codes, live: (0..count.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX)).collect() }
    }

    fn block(&self, identity: u64, first_row: u32) -> BlockView<'_> {
        BlockView { identity, first_row, rows: self.rows, live: &self.live, codes: self.codes.as_codes() }
    }
}

/// What is asked of every probe of a batch, and the one place where it becomes a request.
#[derive(Clone)]
struct Asked<'a> {
    floor: f32,
    keep: u32,
    certificate: Certificate,
    filter: Option<&'a RoaringBitmap>,
}

impl Asked<'_> {
    fn sift(
        &self,
        engine: &GpuEngine,
        view: &GalleryView<'_>,
        probes: &[f32],
        survivors: &mut Survivors,
    ) -> Result<(), EngineError> {
        let count = probes.len() / view.dim;
        let request = SiftRequest {
            probes,
            floors: &vec![self.floor; count],
            keep: &vec![self.keep; count],
            survivors_max: SURVIVORS_MAX,
            certificate: self.certificate,
            filters: &vec![self.filter; count],
        };
        engine.sift(view, &request, survivors)
    }

    fn name(&self) -> &'static str {
        match self.certificate {
            Certificate::Deterministic => "deterministic",
            Certificate::Randomised { .. } => "randomised",
        }
    }
}

/// `copied`: bytes a second that a copy on the card moves.
fn check_and_time(arguments: &Arguments, engine: &GpuEngine, copied: f64) -> Result<bool, EngineError> {
    let Arguments { n, dim, seed, floor, keep, .. } = *arguments;
    let started = Instant::now();
    let gallery = Gallery::new(GalleryKind::Standard, seed, n, dim);
    let rows = gallery.rows();
    println!("gallery of {n} x {dim}, {} MB, made in {:.1?}", n * dim * 2 / 1_000_000, started.elapsed());
    let started = Instant::now();
    let segments: Vec<Segment<'_>> = rows.chunks(SEGMENT_ROWS * dim).map(|rows| Segment::new(rows, dim)).collect();
    println!("its codes made in {:.1?}", started.elapsed());
    let blocks = segments.iter().enumerate().map(|(number, segment)| {
        segment.block(number as u64 + 1, u32::try_from(number * SEGMENT_ROWS).expect("rows fit u32"))
    });
    let view = GalleryView { dim, blocks: blocks.collect() };
    let before = engine.describe().device_bytes;
    let started = Instant::now();
    engine.follow(&view)?;
    let took = started.elapsed();
    let on_device = engine.describe().device_bytes - before;
    println!(
        "uploaded in {took:.2?}; {} MB on the device, {} MB of it slabs: {:.0} bytes a row; {} MB of buffers on the host",
        engine.describe().device_bytes / 1_000_000,
        on_device / 1_000_000,
        on_device as f64 / n as f64,
        engine.describe().host_bytes / 1_000_000,
    );

    let probes = gallery.probes(arguments.batches.iter().copied().max().unwrap_or(1).max(arguments.check));
    let one_percent: RoaringBitmap = (0..u32::try_from(n).expect("rows fit u32")).step_by(100).collect();
    let half: RoaringBitmap = (0..u32::try_from(n).expect("rows fit u32")).step_by(2).collect();
    let asked = |certificate, floor, keep, filter| Asked { floor, keep, certificate, filter };
    let mut right = true;
    for certificate in [RANDOMISED, Certificate::Deterministic] {
        for (floor, keep) in [(floor, 0), (floor, keep), (-1.1, keep)] {
            for filter in [None, Some(&one_percent), Some(&half)] {
                for batch in [1, arguments.check] {
                    let asked = asked(certificate, floor, keep, filter);
                    right &= agrees(engine, &view, rows, probes.values(0..batch), &asked)?;
                }
            }
        }
    }

    println!("probes     certificate   floor  filter   wall ms (best)   device ms (best)   searches/s   survivors");
    let mut single = None;
    let mut largest_batch = None;
    for &batch in &arguments.batches {
        for (certificate, floor, filter) in [
            (RANDOMISED, floor, None),
            (Certificate::Deterministic, floor, None),
            (RANDOMISED, -1.1, None),
            (RANDOMISED, floor, Some(&one_percent)),
        ] {
            let asked = asked(certificate, floor, keep, filter);
            let line = time(engine, &view, probes.values(0..batch), &asked, arguments.seconds)?;
            println!(
                "{batch:6}  {:>14} {floor:7.2} {:>7} {:16.3} {:>18} {:12.0} {:11.1}",
                asked.name(),
                if filter.is_some() { "1 %" } else { "none" },
                line.wall.as_secs_f64() * 1e3,
                line.device_ms(),
                batch as f64 / line.wall.as_secs_f64(),
                line.survivors as f64 / batch as f64,
            );
            if certificate == RANDOMISED && floor > 0.0 && filter.is_none() {
                if batch == 1 {
                    single = Some(line.clone());
                }
                largest_batch = Some((batch, line));
            }
        }
    }
    let full =
        if arguments.largest { Some(fill(engine, &segments, dim, probes.values(0..1), arguments)?) } else { None };

    println!(
        "\n{} | {n} x {dim}, standard gallery, floor {floor}, k {keep}, randomised 1e-12",
        engine.describe().adapter
    );
    if let Some(single) = single {
        let bytes = n as f64 * (dim as f64 / 8.0 + 8.0);
        let rate = bytes / single.device.unwrap_or(single.wall).as_secs_f64();
        println!("single probe, device       {:>12} ms", single.device_ms());
        println!("single probe, engine       {:12.3} ms", single.wall.as_secs_f64() * 1e3);
        println!("codes read by it           {:12.1} GB/s, {:.0} % of a copy's", rate / 1e9, 100.0 * rate / copied);
    }
    if let Some((batch, line)) = largest_batch {
        println!("batch of {batch:<17} {:12.0} searches/s", batch as f64 / line.wall.as_secs_f64());
        let seconds = line.device.unwrap_or(line.wall).as_secs_f64();
        println!("products of it             {:12.3} TFLOP/s", 2.0 * (n * batch * dim) as f64 / seconds / 1e12);
    }
    if let Some((rows, line)) = full {
        println!("largest gallery            {:12.3} million rows", rows as f64 / 1e6);
        println!("single probe in it, device {:>12} ms", line.device_ms());
        println!("single probe in it, engine {:12.3} ms", line.wall.as_secs_f64() * 1e3);
    }
    println!("{}", if right { "every answer was right" } else { "WRONG ANSWERS, see above" });
    Ok(right)
}

/// Adds copies of the segments until the card has no room; the rows that fit, and a single probe among
/// them, whose rows come up as often as there are copies.
fn fill(
    engine: &GpuEngine,
    segments: &[Segment<'_>],
    dim: usize,
    probe: &[f32],
    arguments: &Arguments,
) -> Result<(u64, Timing), EngineError> {
    let whole: Vec<&Segment<'_>> = segments.iter().filter(|segment| segment.rows.len() >= BLOCK_ROWS * dim).collect();
    let mut blocks: Vec<(u64, u32, &Segment<'_>)> = Vec::new();
    let mut next = 0_u64;
    loop {
        let segment = whole[next as usize % whole.len()];
        let held: usize = blocks.iter().map(|(.., segment)| segment.rows.len() / dim).sum();
        if held as f64 >= arguments.largest_millions_max * 1e6 {
            break;
        }
        let Ok(first_row) = u32::try_from(next * SEGMENT_ROWS as u64) else { break };
        blocks.push((next + 1, first_row, segment));
        let view = GalleryView { dim, blocks: blocks.iter().map(|(id, row, s)| s.block(*id, *row)).collect() };
        match engine.follow(&view) {
            Ok(()) => next += 1,
            Err(EngineError::OutOfDeviceMemory { .. }) => {
                blocks.pop();
                break;
            }
            Err(error) => return Err(error),
        }
    }
    let view = GalleryView { dim, blocks: blocks.iter().map(|(id, row, s)| s.block(*id, *row)).collect() };
    engine.follow(&view)?;
    let rows = view.blocks.iter().map(|block| block.count(dim) as u64).sum();
    let asked = Asked { floor: arguments.floor, keep: arguments.keep, certificate: RANDOMISED, filter: None };
    Ok((rows, time(engine, &view, probe, &asked, arguments.seconds)?))
}

/// Whether the survivors hold every row that brute force wants, and none that the filter holds back.
/// Says so if not.
fn agrees(
    engine: &GpuEngine,
    view: &GalleryView<'_>,
    rows: &[f16],
    probes: &[f32],
    asked: &Asked<'_>,
) -> Result<bool, EngineError> {
    let dim = view.dim;
    let count = probes.len() / dim;
    let mut survivors = Survivors::default();
    asked.sift(engine, view, probes, &mut survivors)?;
    let mut right = survivors.certificate.miss_probability() <= asked.certificate.miss_probability();
    if !right {
        println!("asked for {}, and got {:?}", asked.name(), survivors.certificate);
    }
    for (number, probe) in probes.chunks_exact(dim).enumerate() {
        let mut scores: Vec<f64> = rows
            .par_chunks_exact(dim)
            .map(|row| row.iter().zip(probe).map(|(x, q)| f64::from(x.to_f32()) * f64::from(*q)).sum())
            .collect();
        if let Some(filter) = asked.filter {
            let held_back = (0_u32..).zip(&mut scores).filter(|(row, _)| !filter.contains(*row));
            held_back.for_each(|(_, score)| *score = f64::NEG_INFINITY);
        }
        let mut line = f64::from(asked.floor);
        if asked.keep > 0 && scores.len() >= asked.keep as usize {
            let mut best = scores.clone();
            let (_, last, _) = best.select_nth_unstable_by(asked.keep as usize - 1, |a, b| b.total_cmp(a));
            line = line.max(*last);
        }
        let wanted = scores.iter().filter(|score| **score >= line).count();
        let mut found = survivors.rows[number].clone();
        found.sort_unstable();
        found.dedup();
        let kept = found.iter().filter(|&&row| scores[row as usize] >= line).count();
        let allowed = found.iter().all(|&row| scores[row as usize] > f64::NEG_INFINITY);
        if survivors.overflowed[number] || kept != wanted || found.len() != survivors.rows[number].len() || !allowed {
            println!(
                "probe {number} of {count}, {}, floor {}, keep {}: {kept} of {wanted} rows, overflowed: {}, allowed: {allowed}",
                asked.name(),
                asked.floor,
                asked.keep,
                survivors.overflowed[number]
            );
            right = false;
        }
    }
    Ok(right)
}

#[derive(Clone)]
struct Timing {
    wall: Duration,
    device: Option<Duration>,
    survivors: usize,
}

impl Timing {
    fn device_ms(&self) -> String {
        self.device.map_or("-".to_owned(), |d| format!("{:.3}", d.as_secs_f64() * 1e3))
    }
}

fn time(
    engine: &GpuEngine,
    view: &GalleryView<'_>,
    probes: &[f32],
    asked: &Asked<'_>,
    seconds: f64,
) -> Result<Timing, EngineError> {
    let mut survivors = Survivors::default();
    let mut best = Timing { wall: Duration::MAX, device: None, survivors: 0 };
    let started = Instant::now();
    let mut rounds = 0;
    while rounds < 2 || started.elapsed().as_secs_f64() < seconds {
        let begun = Instant::now();
        asked.sift(engine, view, probes, &mut survivors)?;
        best.wall = best.wall.min(begun.elapsed());
        if let Some(time) = survivors.device_time {
            best.device = Some(best.device.map_or(time, |device| device.min(time)));
        }
        rounds += 1;
    }
    best.survivors = survivors.rows.iter().map(Vec::len).sum();
    Ok(best)
}
