//! Measures the index: append, open, forget and verify.
//!
//! `cargo run --release -p thenar-index --example open -- FOLDER [ROWS] [DIM]`; the folder must
//! not hold an index, and holds none afterwards. Rows come from a fixed seed. Says what was
//! measured on how many threads.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use half::f16;
use thenar_index::{Error, Geometry, Index, KeyId, Lsn, NewRow, SubjectNumber, TemplateId, verify};

const KEY: KeyId = KeyId(*b"measuring-key-01");
/// Rows appended between two publications.
const BATCH: usize = 4096;
const ERASURES: u64 = 100;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args_os().skip(1);
    let Some(dir) = arguments.next().map(PathBuf::from) else {
        eprintln!("usage: open FOLDER [ROWS] [DIM]");
        std::process::exit(2);
    };
    let mut number = |default: usize| arguments.next().and_then(|text| text.to_str()?.parse().ok()).unwrap_or(default);
    let (rows, dim) = (number(1_000_000), number(512));
    println!(
        "{rows} rows of {dim} components, {} threads",
        std::thread::available_parallelism().map_or(1, usize::from)
    );
    measure(&dir, rows, dim)?;
    Index::wipe(&dir)
}

fn measure(dir: &std::path::Path, rows: usize, dim: usize) -> Result<(), Error> {
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
    let mut worst = Duration::ZERO;
    for subject in 0..ERASURES {
        let began = Instant::now();
        let rows = index.forget(SubjectNumber(subject * 37 % (done as u64 / 2).max(1)));
        drop(index.publish(Lsn(done as u64 + subject)));
        index.erase(&rows)?;
        worst = worst.max(began.elapsed());
    }
    println!("forget, publish and erase a subject, the longest of {ERASURES}: {worst:.2?}");
    timed("checkpoint", || index.checkpoint())?;
    drop(index);
    let report = timed("verify", || verify(dir, KEY, &|_, _| ControlFlow::Continue(())))?;
    println!("sound: {}, {} live, {} erased", report.is_sound(), report.live, report.erased);
    Ok(())
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = work();
    println!("{what}: {:.2?}", began.elapsed());
    result
}

/// Finite f16 noise from a fixed seed (xorshift64).
fn noise(count: usize) -> Vec<f16> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f16::from_bits(state as u16 & 0xbbff)
    };
    (0..count).map(|_| next()).collect()
}
