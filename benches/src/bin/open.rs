//! Measures the index: codes, append, open, forget and verify.
//!
//!     cargo run --release -p thenar-bench --bin open
//!
//! Rows come from a fixed seed, in a folder that is removed. Exit code 1 where the index does not
//! hold what it should.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use half::f16;
use thenar_bench::facts::Facts;
use thenar_index::codes::{BLOCK_ROWS, OwnedCodes};
use thenar_index::{GalleryId, Geometry, Index, KeyId, Lsn, NewRow, Origin, SubjectNumber, TemplateId, verify};

const KEY: Origin = Origin { gallery: GalleryId(*b"measuring-galler"), key: KeyId(*b"measuring-key-01") };
/// Rows appended between two publications.
const BATCH: usize = 4096;
const ERASURES: u64 = 100;

/// Measure the index: append, open, forget and verify.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rows, two a subject.
    #[arg(long, default_value_t = 1_000_000)]
    n: usize,
    /// Components of a row, a multiple of 32.
    #[arg(long, default_value_t = 512)]
    dim: usize,
    /// Folder in which to make the index; where temporary files go unless given.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Seconds instead of minutes: 20,000 rows of 128. For tests.
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.smoke {
        (arguments.n, arguments.dim) = (20_000, 128);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("open: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    for (name, value) in Facts::gather().rows() {
        println!("{name}: {value}");
    }
    println!("{} rows of {} components", arguments.n, arguments.dim);
    let mut folder = tempfile::Builder::new();
    folder.prefix("thenar-bench");
    let folder = match &arguments.dir {
        Some(dir) => folder.tempdir_in(dir)?,
        None => folder.tempdir()?,
    };
    measure_codes(arguments.dim);
    measure(&folder.path().join("index"), arguments.n, arguments.dim)
}

fn measure(dir: &std::path::Path, rows: usize, dim: usize) -> anyhow::Result<()> {
    let mut index = Index::create(dir, Geometry::new(dim), KEY)?;
    let vectors = noise(BATCH * dim);
    let (mut appending, mut done) = (Duration::ZERO, 0);
    while done < rows {
        let count = BATCH.min(rows - done);
        let labels: Vec<String> = (done..done + count).map(|row| format!("subject-{}", row / 2)).collect();
        let batch: Vec<NewRow<'_>> = (0..count)
            .map(|at| NewRow {
                template: TemplateId((done + at) as u64 + 1),
                subject: SubjectNumber((done + at) as u64 / 2),
                hand: (at % 2) as u8 + 1,
                label: &labels[at],
                source: (done + at) as u64,
                vector: &vectors[at * dim..(at + 1) * dim],
            })
            .collect();
        let began = Instant::now();
        index.append(&batch)?;
        done += count;
        drop(index.publish(Lsn(done as u64)));
        appending += began.elapsed();
    }
    let per_second = rows as f64 / appending.as_secs_f64();
    println!("append, published every {BATCH}: {appending:.2?}, {per_second:.0} rows/s");
    timed("checkpoint", || index.checkpoint())?;
    let snapshot = index.snapshot();
    println!("mapped {} MiB, heap {} KiB", snapshot.mapped_bytes() >> 20, snapshot.host_bytes() >> 10);
    drop(snapshot);
    drop(index);
    let mut opened = None;
    for _ in 0..3 {
        drop(opened.take());
        let unrepaired = timed("open, every row checked", || Index::open(dir, KEY))?;
        opened = Some(timed("finish", || unrepaired.finish())?);
    }
    let mut index = opened.expect("it was opened three times");
    ensure!(index.snapshot().live() == rows as u64, "{} of {rows} rows came back", index.snapshot().live());
    let mut worst = Duration::ZERO;
    let mut erased = 0;
    for subject in 0..ERASURES {
        let began = Instant::now();
        let rows = index.forget(SubjectNumber(subject * 37 % (done as u64 / 2).max(1)));
        drop(index.publish(Lsn(done as u64 + subject)));
        index.erase(&rows)?;
        erased += rows.len() as u64;
        worst = worst.max(began.elapsed());
    }
    println!("forget, publish and erase a subject, the longest of {ERASURES}: {worst:.2?}");
    timed("checkpoint", || index.checkpoint())?;
    drop(index);
    let report = timed("verify", || verify(dir, KEY, &|_, _| ControlFlow::Continue(())))?;
    println!("sound: {}, {} live, {} erased", report.is_sound(), report.live, report.erased);
    ensure!(report.is_sound(), "the index is damaged");
    let (live, found) = (rows as u64 - erased, report.live);
    ensure!(found == live, "{found} rows are live, {live} should be");
    Ok(())
}

/// The writer makes the codes of every row that is appended, on its one thread.
fn measure_codes(dim: usize) {
    const BLOCKS: usize = 64;
    let rows = noise(BLOCKS * BLOCK_ROWS * dim);
    let mut codes = OwnedCodes::zeroed(dim, BLOCKS * BLOCK_ROWS);
    let began = Instant::now();
    for (at, row) in rows.chunks_exact(dim).enumerate() {
        codes.put(at, row);
    }
    let each = began.elapsed().as_secs_f64() / (BLOCKS * BLOCK_ROWS) as f64;
    println!("codes: {:.2} us a row ({:?})", each * 1e6, codes.as_codes().factors[0]);
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = work();
    println!("{what}: {:.2?}", began.elapsed());
    result
}

/// Noise from a fixed seed (xorshift64), of magnitudes between 1/128 and 1/8 as most components of
/// a template have. Subnormal numbers would cost processors more.
fn noise(count: usize) -> Vec<f16> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f16::from_bits(state as u16 & 0x8fff | 0x2000)
    };
    (0..count).map(|_| next()).collect()
}
