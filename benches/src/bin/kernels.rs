//! The CPU engine's search for candidates on every instruction set, beside the processor's own limits measured in
//! the same run: memory reading and fused multiply-adds.
//!
//!     cargo run --release -p thenar-bench --bin kernels
//!
//! Figures are medians. CandidateRows are held against a brute force; exit code 1 if one is missing.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use half::f16;
use serde::Serialize;
use thenar::cli::output::{print, print_json, properties, table};
use thenar::engine::certificate::{Certificate, MISS_PROBABILITY_DEFAULT};
use thenar::engine::cpu::CpuEngine;
use thenar::engine::{CandidateRequest, CandidateRows, Engine, GalleryView, Seed, SegmentView};
use thenar::search::score;
use thenar::simd::Simd;
use thenar_bench::facts::Facts;
use thenar_bench::gallery::{Gallery, GalleryKind};
use thenar_bench::measure::median;
use thenar_bench::truth::Truth;
use thenar_index::codes::{BLOCK_ROWS, Codes, OwnedCodes};

/// Time the CPU engine's search for candidates on every instruction set.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rows of the standard gallery.
    #[arg(long, default_value_t = 1_000_000)]
    n: usize,
    /// Components of a row, a multiple of 32.
    #[arg(long, default_value_t = 512, value_parser = thenar_bench::gallery::dimension)]
    dim: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Probes of a call.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256")]
    batch: Vec<usize>,
    /// Instruction sets: avx512vbmi, avx512bf16, avx512, avx2, portable. All that the processor has unless given.
    #[arg(long, value_delimiter = ',')]
    path: Vec<Simd>,
    /// Floor of every probe.
    #[arg(long, default_value_t = 0.5)]
    tau: f32,
    /// Best rows wanted.
    #[arg(long, default_value_t = 10)]
    k: u32,
    /// Seed of the gallery.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds instead of minutes: 20,000 rows of 128. For tests.
    #[arg(long)]
    smoke: bool,
    /// Print a JSON object a line: one for each path and batch, last the facts of the run.
    #[arg(long)]
    json: bool,
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Row {
    path: &'static str,
    /// exhaustive, or by codes under a certificate.
    way: &'static str,
    n: usize,
    dim: usize,
    batch: usize,
    threads: usize,
    ms_p50: f64,
    pairs_per_second: f64,
    /// Stored rows read once, in GB a second.
    row_gb_per_second: f64,
    /// Share of the multiply-adds in f32 that the processor can do.
    f32_peak_percent: f64,
    candidates: usize,
    /// Rows of brute force that are not among the candidates.
    missing: usize,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.smoke {
        (arguments.n, arguments.dim, arguments.batch) = (20_000, 128, vec![1, 3, 16, 64]);
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kernels: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let Arguments { n, dim, threads, .. } = *arguments;
    let machine = Facts::gather();
    let gallery = Gallery::new(GalleryKind::Standard, arguments.seed, n, dim);
    let live = vec![u64::MAX; n.div_ceil(64)];
    let codes = OwnedCodes::of(&gallery.rows()[..n / BLOCK_ROWS * BLOCK_ROWS * dim], dim);
    let view = |codes| GalleryView {
        dim,
        segments: vec![SegmentView { identity: 1, first_row: 0, rows: gallery.rows(), live: &live, codes }],
    };
    let ways = [
        ("exhaustive", view(Codes::default()), Certificate::Deterministic),
        ("deterministic", view(codes.as_codes()), Certificate::Deterministic),
        ("randomised", view(codes.as_codes()), Certificate::Randomised { miss_probability: MISS_PROBABILITY_DEFAULT }),
    ];

    let gigabytes = (n * dim * 2) as f64 / 1e9;
    let reading = gigabytes / seconds(5, || read_all(gallery.rows(), threads));
    let peak = fma_peak(threads);
    let score_ns = score_cost(gallery.rows(), dim);
    let mut limits = machine.rows();
    limits.push(("memory", format!("{reading:.1} GB/s read, {threads} threads")));
    limits.push(("f32", format!("{peak:.1} G multiply-adds/s, {threads} threads")));
    limits.push(("exact score", format!("{score_ns:.0} ns per row")));

    let paths = if arguments.path.is_empty() { Simd::ALL.to_vec() } else { arguments.path.clone() };
    let mut rows = Vec::new();
    for path in paths.into_iter().filter(|path| path.is_available()) {
        let engine = CpuEngine::with_simd(threads, path)?;
        for (&batch, (way, view, certificate)) in
            arguments.batch.iter().flat_map(|batch| ways.iter().map(move |way| (batch, way)))
        {
            let probes = gallery.probes(batch);
            let (floors, keep) = (vec![arguments.tau; batch], vec![arguments.k; batch]);
            let values = probes.values(0..batch);
            let seeds: Vec<Seed> = (0..batch).map(|probe| [probe as u8; 32]).collect();
            let request = CandidateRequest {
                probes: values,
                floors: &floors,
                keep: &keep,
                candidates_max: 4096,
                certificate: *certificate,
                seeds: &seeds,
                ..CandidateRequest::default()
            };
            let mut candidates = CandidateRows::default();
            engine.find_candidates(view, &request, &mut candidates)?;
            let truth = Truth::new(&gallery, &probes, arguments.k as usize);
            let missing = (0..batch).map(|probe| {
                let wanted = truth.wanted(probe, Some(f64::from(arguments.tau)));
                wanted.iter().filter(|hit| !candidates.rows[probe].contains(&hit.row)).count()
            });
            let missing = missing.sum();
            let rounds = if arguments.smoke { 3 } else { (64 / batch).clamp(3, 11) };
            let mut failed = None;
            let seconds = seconds(rounds, || {
                if let Err(error) = engine.find_candidates(view, &request, &mut candidates) {
                    failed = Some(error);
                }
            });
            if let Some(error) = failed {
                return Err(error.into());
            }
            let pairs_per_second = (n * batch) as f64 / seconds;
            rows.push(Row {
                path: path.as_str(),
                way,
                n,
                dim,
                batch,
                threads,
                ms_p50: seconds * 1e3,
                pairs_per_second,
                row_gb_per_second: gigabytes / seconds,
                f32_peak_percent: pairs_per_second * dim as f64 / (peak * 1e9) * 100.0,
                candidates: candidates.rows.iter().map(Vec::len).sum(),
                missing,
            });
        }
    }

    if arguments.json {
        rows.iter().try_for_each(print_json)?;
        let facts = serde_json::json!({
            "facts": machine, "memory_gb_per_second": reading, "f32_multiply_adds_per_second": peak * 1e9,
            "exact_score_ns": score_ns, "tau": arguments.tau, "k": arguments.k,
        });
        print_json(&facts)?;
    } else {
        print(properties(&limits))?;
        print(rendered(&rows))?;
        print(format!("{n} x {dim}, standard gallery, floor {}, {} best", arguments.tau, arguments.k))?;
    }
    let missing: usize = rows.iter().map(|row| row.missing).sum();
    if missing > 0 {
        eprintln!("kernels: {missing} rows are missing among the candidates");
    }
    Ok(missing == 0 && !rows.is_empty())
}

fn rendered(rows: &[Row]) -> String {
    let header = ["path", "way", "probes", "ms", "Mpairs/s", "GB/s of rows", "% of f32 peak", "candidates", "missing"];
    let mut out = table(&header, 2);
    for row in rows {
        out.add_row(vec![
            row.path.to_owned(),
            row.way.to_owned(),
            row.batch.to_string(),
            format!("{:.2}", row.ms_p50),
            format!("{:.1}", row.pairs_per_second / 1e6),
            format!("{:.1}", row.row_gb_per_second),
            format!("{:.1}", row.f32_peak_percent),
            row.candidates.to_string(),
            row.missing.to_string(),
        ]);
    }
    out.to_string()
}

/// Median seconds of `rounds` runs, after one that does not count.
fn seconds(rounds: usize, mut run: impl FnMut()) -> f64 {
    run();
    let seconds: Vec<f64> = (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            run();
            begin.elapsed().as_secs_f64()
        })
        .collect();
    median(&seconds)
}

fn score_cost(stored: &[f16], dim: usize) -> f64 {
    let probe = vec![0.01; dim];
    let rows = (stored.len() / dim).min(1000);
    let seconds = seconds(15, || {
        for row in stored[..rows * dim].chunks_exact(dim) {
            black_box(score::exact(row, &probe));
        }
    });
    seconds / rows as f64 * 1e9
}

/// Reads every byte once on `threads` threads.
fn read_all(stored: &[f16], threads: usize) {
    std::thread::scope(|scope| {
        for part in stored.chunks(stored.len().div_ceil(threads)) {
            scope.spawn(move || {
                let words: &[u64] = bytemuck::cast_slice(&part[..part.len() / 4 * 4]);
                black_box(words.iter().fold(0, |all, word| all ^ word));
            });
        }
    });
}

/// Multiply-adds of f32, in thousand millions a second, that `threads` threads reach together
/// when nothing but registers is touched. Measured in the widest registers there are.
fn fma_peak(threads: usize) -> f64 {
    const TURNS: usize = 1 << 22;
    let seconds = seconds(5, || {
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| fma_turns(TURNS));
            }
        });
    });
    (threads * TURNS) as f64 * fma_lanes() / seconds / 1e9
}

#[cfg(target_arch = "x86_64")]
fn fma_lanes() -> f64 {
    if Simd::Avx512.is_available() { 256.0 } else { 96.0 }
}

#[cfg(target_arch = "x86_64")]
fn fma_turns(turns: usize) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn wide(turns: usize) {
        let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [x; 16];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    fn narrow(turns: usize) {
        let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut sums = [x; 12];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
    }

    if Simd::Avx512.is_available() {
        // SAFETY: the processor has AVX-512.
        unsafe { wide(turns) }
    } else if Simd::Avx2.is_available() {
        // SAFETY: the processor has AVX2 and FMA.
        unsafe { narrow(turns) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_lanes() -> f64 {
    0.0
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_turns(_turns: usize) {}
