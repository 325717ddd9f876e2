//! Speed of the CPU engine on the standard gallery, beside the processor's own limits measured
//! in the same run: memory reading and fused multiply-adds.
//!
//!     cargo run --release --example sift_speed -- [rows] [dim] [threads] [path ...]
//!
//! Every figure is the median of its rounds. Floor 0.5, the 10 best, mated probes.

use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use half::f16;
use rayon::prelude::*;
use thenar::engine::cpu::CpuEngine;
use thenar::engine::{BlockView, Engine, GalleryView, SiftRequest, Survivors};
use thenar::search::score;
use thenar::simd::Simd;
use thenar::standard::StandardGallery;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (rows, dim, threads) = (number(1_000_000), number(512), number(2));
    let paths: Vec<Simd> = arguments.map(|name| name.parse().expect("an instruction set")).collect();
    let paths = if paths.is_empty() { Simd::ALL.to_vec() } else { paths };

    let gallery = StandardGallery::new(1, dim);
    let begin = Instant::now();
    let mut stored = vec![f16::ZERO; rows * dim];
    stored.par_chunks_exact_mut(dim).enumerate().for_each_init(
        || vec![0.0; dim],
        |row, (i, to)| {
            gallery.row(u32::try_from(i).expect("a row number"), row);
            for (to, value) in to.iter_mut().zip(row) {
                *to = f16::from_f32(*value);
            }
        },
    );
    println!("{rows} x {dim}: made in {:.1} s", begin.elapsed().as_secs_f64());
    let live: Vec<AtomicU64> = (0..rows.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX)).collect();
    let view = GalleryView { dim, blocks: vec![BlockView { identity: 1, first_row: 0, rows: &stored, live: &live }] };

    let gigabytes = (rows * dim * 2) as f64 / 1e9;
    let reading = gigabytes / median(5, || read_all(&stored, threads));
    let peak = fma_peak(threads);
    println!("memory {reading:.1} GB/s, f32 multiply-adds {peak:.1} G/s, {threads} threads");
    let some = score_cost(&stored, dim);
    println!("exact score of consecutive rows {some:.0} ns, {:.0} ns by exact_many", score_many_cost(&stored, dim));

    println!("path        probes      ms   Mpairs/s   GB/s  % of f32 peak  survivors");
    for path in paths.into_iter().filter(|path| path.is_available()) {
        let engine = CpuEngine::with_simd(threads, path).expect("an engine");
        for probes in [1_usize, 2, 3, 4, 6, 8, 12, 16, 32, 64, 256] {
            let mut values = vec![0.0; probes * dim];
            for (i, probe) in values.chunks_exact_mut(dim).enumerate() {
                let mate = i * (rows / probes);
                gallery.mate(u32::try_from(mate).expect("a row number"), 0, probe);
            }
            let (floors, keep) = (vec![0.5; probes], vec![10; probes]);
            let request = SiftRequest { probes: &values, floors: &floors, keep: &keep, survivors_max: 4096 };
            let mut survivors = Survivors::default();
            let rounds = (64 / probes).clamp(3, 11);
            let seconds = median(rounds, || {
                engine.sift(&view, &request, &mut survivors).expect("a sift");
            });
            let pairs = (rows * probes) as f64 / seconds;
            let found: usize = survivors.rows.iter().map(Vec::len).sum();
            println!(
                "{:<10} {probes:>7} {:>7.1} {:>10.1} {:>6.1} {:>14.1} {found:>10}",
                path.as_str(),
                seconds * 1e3,
                pairs / 1e6,
                gigabytes / seconds,
                pairs * dim as f64 / (peak * 1e9) * 100.0,
            );
        }
    }
}

/// Median seconds of `rounds` runs, after one that does not count.
fn median(rounds: usize, mut run: impl FnMut()) -> f64 {
    run();
    let mut seconds: Vec<f64> = (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            run();
            begin.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[rounds / 2]
}

fn score_cost(stored: &[f16], dim: usize) -> f64 {
    let probe = vec![0.01; dim];
    let rows = (stored.len() / dim).min(1000);
    let seconds = median(15, || {
        for row in stored[..rows * dim].chunks_exact(dim) {
            black_box(score::exact(row, &probe));
        }
    });
    seconds / rows as f64 * 1e9
}

fn score_many_cost(stored: &[f16], dim: usize) -> f64 {
    let probe = vec![0.01; dim];
    let rows = (stored.len() / dim).min(1000);
    let mut scores = vec![0.0; rows];
    let seconds = median(15, || {
        score::exact_many(&stored[..rows * dim], &probe, &mut scores);
        black_box(&mut scores);
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
    let seconds = median(5, || {
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
