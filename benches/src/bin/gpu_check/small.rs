//! Every kind of search against a brute force that scores each pair of probe and row once.

use std::time::Instant;

use clap::Args;
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rayon::prelude::*;
use roaring::RoaringBitmap;
use thenar::engine::CandidateRows;
use thenar::engine::certificate::Certificate;
use thenar_bench::truth;

use crate::report::Report;
use crate::segments::{Asked, RANDOMISED, gallery, segments, upload, view};
use crate::{Common, open_and_measure};

/// Arguments of `small`.
#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// Rows of the gallery.
    #[arg(long, default_value_t = 200_000)]
    n: usize,
    /// Probes. Some are searched one by one, all in batches.
    #[arg(long, default_value_t = 64)]
    probes: usize,
}

/// Rows widened at a time.
const WIDENED_ROWS: usize = 64;

pub(crate) fn run(common: &Common, arguments: &Arguments, report: &mut Report) -> anyhow::Result<()> {
    let Arguments { mut n, mut probes } = arguments.clone();
    if common.smoke {
        // The last four rows have no codes.
        (n, probes) = (4100, 60);
    }
    let (engine, _) = open_and_measure(common, if common.smoke { 0.0 } else { 1.0 }, report)?;
    let gallery = gallery(n, common.dim, common.seed, report);
    let segments = segments(&gallery, report);
    let view = view(&segments, common.dim, 1);
    upload(&engine, &view, report)?;

    let probes = gallery.probes(probes);
    let started = Instant::now();
    let scores = Scores::new(gallery.rows(), common.dim, probes.values(0..probes.len()));
    report.figure("brute force", started.elapsed().as_secs_f64(), "s");

    let all = || 0..u32::try_from(n).expect("rows fit u32");
    let filters: [Option<RoaringBitmap>; 3] =
        [None, Some(all().step_by(100).collect()), Some(all().step_by(2).collect())];
    let mut batches: Vec<usize> = [1, 2, 4, 8, 32, probes.len()].into_iter().filter(|&b| b <= probes.len()).collect();
    batches.dedup();
    let (mut answers, mut skipped) = (0, 0);
    for certificate in [RANDOMISED, Certificate::Deterministic] {
        for (floor, keep) in [(0.5, 0), (0.5, 10), (-1.1, 10)] {
            for filter in &filters {
                for &batch in &batches {
                    if report.left().is_zero() {
                        skipped += batch;
                        continue;
                    }
                    let asked = Asked { floor, keep, certificate, filter: filter.as_ref() };
                    let mut candidates = CandidateRows::default();
                    asked.find_candidates(&engine, &view, probes.values(0..batch), &mut candidates)?;
                    if candidates.certificate.miss_probability() > certificate.miss_probability() {
                        report.wrong(format!("asked for {}, and got {:?}", asked.name(), candidates.certificate));
                    }
                    let faults: Vec<String> = (0..batch)
                        .into_par_iter()
                        .filter_map(|probe| scores.fault(probe, &candidates, &asked))
                        .collect();
                    for fault in faults {
                        report.wrong(format!("batch of {batch}, {fault}"));
                    }
                    answers += batch;
                }
            }
        }
    }
    report.figure("answers checked", f64::from(u32::try_from(answers)?), "");
    if skipped > 0 {
        report.figure("answers not checked, no time", f64::from(u32::try_from(skipped)?), "");
    }
    Ok(())
}

/// The score of every pair, in f64.
struct Scores {
    rows: usize,
    /// Shape: `[probes, rows]`.
    scores: Vec<f64>,
}

impl Scores {
    fn new(rows: &[f16], dim: usize, probes: &[f32]) -> Self {
        let count = rows.len() / dim;
        // As many probes share a widened row as leave some for every thread.
        let together = (probes.len() / dim).div_ceil(rayon::current_num_threads()).max(1);
        let mut scores = vec![0.0; probes.len() / dim * count];
        scores.par_chunks_mut(count * together).zip(probes.par_chunks(dim * together)).for_each(|(scores, probes)| {
            let mut wide = vec![0.0; WIDENED_ROWS * dim];
            for (block, rows) in rows.chunks(WIDENED_ROWS * dim).enumerate() {
                let wide = &mut wide[..rows.len()];
                rows.convert_to_f32_slice(wide);
                for (scores, probe) in scores.chunks_exact_mut(count).zip(probes.chunks_exact(dim)) {
                    let scores = &mut scores[block * WIDENED_ROWS..];
                    for (score, row) in scores.iter_mut().zip(wide.chunks_exact(dim)) {
                        *score = truth::product(row, probe);
                    }
                }
            }
        });
        Self { rows: count, scores }
    }

    /// What is wrong with the candidates of a probe: they must contain every row that is wanted, once, and none
    /// that the filter rules out.
    fn fault(&self, probe: usize, candidates: &CandidateRows, asked: &Asked<'_>) -> Option<String> {
        let scores = &self.scores[probe * self.rows..(probe + 1) * self.rows];
        let allows = |row: u32| asked.filter.is_none_or(|filter| filter.contains(row));
        let mut allowed: Vec<f64> =
            (0..).zip(scores).filter(|(row, _)| allows(*row)).map(|(_, score)| *score).collect();
        let mut line = f64::from(asked.floor);
        let keep = asked.keep as usize;
        if keep > 0 && allowed.len() >= keep {
            let (_, last, _) = allowed.select_nth_unstable_by(keep - 1, |a, b| b.total_cmp(a));
            line = line.max(*last);
        }
        let wanted = allowed.iter().filter(|score| **score >= line).count();
        let mut found = candidates.rows[probe].clone();
        found.sort_unstable();
        found.dedup();
        let kept = found.iter().filter(|&&row| scores[row as usize] >= line).count();
        let strays = found.iter().filter(|&&row| !allows(row)).count();
        let repeats = candidates.rows[probe].len() - found.len();
        let overflowed = candidates.overflowed[probe];
        (overflowed || kept != wanted || strays + repeats > 0).then(|| {
            format!(
                "probe {probe}, {}, floor {}, keep {keep}, filter {}: {kept} of {wanted} rows, {strays} ruled out, \
                 {repeats} repeats, overflowed: {overflowed}",
                asked.name(),
                asked.floor,
                asked.filter.is_some(),
            )
        })
    }
}
