//! Do cooperative matrices compute what packed dot products compute, on a whole gallery?
//!
//! The start-up test scans 512 slots once. This scans all resident slots with both kernels, as often as
//! it is asked to, and compares every pair that they report. Bars ask for whole sums, so a sum that is
//! off by one is seen at its bar, and rounding decides nothing. For checks; searches never come here.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use rayon::prelude::*;
use thenar_index::codes::BLOCK_ROWS;

use super::bindings::{Bar, Entry, PROBES_MAX};
use super::card::CardCodes;
use super::device::Report;
use super::kernels::FEW_PROBES;
use super::level::Level;
use super::owner::Facts;
use super::probe::Quantised;
use super::resident::Resident;
use super::selftest::Trial;
use super::sifting::{Machine as _, Order};
use super::{Batches, GpuEngine};
use crate::engine::{EngineError, GalleryView};

/// What one comparison of two kernels came to.
#[derive(Debug, Clone, PartialEq)]
pub struct MatrixCheck {
    /// Which kernels were compared.
    pub kernels: &'static str,
    /// Pairs of a probe and a row, counted once per level.
    pub pairs: u64,
    /// How many of them reached their bar.
    pub passed: u64,
    /// How many of those were compared one by one. Of the others, the counts per probe were.
    pub listed: u64,
    /// The first difference, for people; none where both agree.
    pub wrong: Option<String>,
    /// Time on the device of the kernel under test and of the plain one, where the adapter can tell.
    pub device_times: Option<[Duration; 2]>,
}

impl GpuEngine {
    /// Scans every resident row of `view` with the kernels for large batches and with plain ones, at
    /// both levels, and compares what they report. `deviations`: how far above the mean of a probe's
    /// sums its bar lies, in standard deviations. Pairs are listed where they fit the device's list, from
    /// about 3 up at a million rows. Without matrices, the packed kernel for large batches is compared
    /// with the one for small batches. `probes`: 1 to 256, row-major, `[count, dim]`.
    ///
    /// # Errors
    /// [`EngineError`] where the device fails, or does not hold the view.
    pub fn check_matrices(
        &self,
        view: &GalleryView<'_>,
        probes: &[f32],
        deviations: f64,
    ) -> Result<MatrixCheck, EngineError> {
        let resident = self.resident.read();
        if resident.generation != self.generation() || !resident.covers(view) {
            return Err(EngineError::Rebuilding);
        }
        let dim = view.dim;
        let quantised: Vec<Quantised> = probes.chunks_exact(dim).map(Quantised::new).collect();
        assert!((1..=PROBES_MAX).contains(&quantised.len()), "a batch of probes");
        let facts = self.standing.facts.lock().clone();
        let plain_facts = Facts { coop: None, ..facts.clone() };
        let (kernels, plain_probes) = match facts.coop {
            Some(_) => ("matrices against packed dot products", PROBES_MAX),
            None => ("packed dot products in tiles against one row an invocation", FEW_PROBES),
        };
        let sample = view.segments.iter().find(|block| block.coded(dim) >= BLOCK_ROWS);
        let sample = sample.map(|block| Trial {
            dim,
            slab: 0,
            codes: CardCodes::new(&block.codes.blocks(dim, 0, 1), dim),
            live: vec![u64::MAX],
        });
        let mut check = MatrixCheck {
            kernels,
            pairs: 0,
            passed: 0,
            listed: 0,
            wrong: None,
            device_times: Some(Default::default()),
        };
        let Some(sample) = sample else { return Ok(check) };
        for level in Level::ALL {
            let bars: Vec<Bar> =
                quantised.par_iter().map(|probe| whole_bar(&sample, level, probe, deviations)).collect();
            let tested = self.scanned(&resident, &facts, level, &quantised, &bars, PROBES_MAX)?;
            let plain = self.scanned(&resident, &plain_facts, level, &quantised, &bars, plain_probes)?;
            check.pairs += u64::from(resident.slots()) * quantised.len() as u64;
            check.passed += plain.stored;
            if !plain.spilled {
                check.listed += plain.stored;
            }
            check.device_times = match (check.device_times, tested.device_time, plain.device_time) {
                (Some([a, b]), Some(tested), Some(plain)) => Some([a + tested, b + plain]),
                _ => None,
            };
            if let Some(wrong) = difference(&tested, &plain) {
                check.wrong = Some(format!("{level:?} codes, bars at {deviations} deviations: {wrong}"));
                break;
            }
        }
        Ok(check)
    }

    /// What all slots hold at or above the bars, `together` probes at a time, entries in order.
    fn scanned(
        &self,
        resident: &Resident,
        facts: &Facts,
        level: Level,
        quantised: &[Quantised],
        bars: &[Bar],
        together: usize,
    ) -> Result<Report, EngineError> {
        let mut whole = Report { device_time: Some(Duration::ZERO), ..Report::default() };
        for first in (0..quantised.len()).step_by(together) {
            let probes = first..quantised.len().min(first + together);
            let mut machine = Batches {
                engine: self,
                resident,
                facts,
                first: 0,
                quantised,
                packed: HashMap::new(),
                under_way: VecDeque::new(),
            };
            machine.submit(&Order {
                level,
                numbers: probes.clone().collect(),
                bars: bars[probes].to_vec(),
                parts_off: 0,
                look: None,
                slots: 0..resident.slots(),
            })?;
            let report = machine.collect()?;
            let base = u32::try_from(first).expect("a batch is small");
            whole.entries.extend(report.entries.iter().map(|entry| Entry { probe: base + entry.probe, ..*entry }));
            whole.counts.extend(report.counts);
            whole.stored += report.stored;
            whole.spilled |= report.spilled;
            whole.device_time = whole.device_time.zip(report.device_time).map(|(sum, time)| sum + time);
        }
        whole.entries.par_sort_unstable();
        Ok(whole)
    }
}

/// A bar on the integer sum alone: that many standard deviations above the mean of the sample's sums.
fn whole_bar(sample: &Trial, level: Level, probe: &Quantised, deviations: f64) -> Bar {
    let sums: Vec<f64> = (0..BLOCK_ROWS).map(|slot| f64::from(sample.sum(slot, level, probe))).collect();
    let mean = sums.iter().sum::<f64>() / sums.len() as f64;
    let square = sums.iter().map(|sum| (sum - mean).powi(2)).sum::<f64>() / sums.len() as f64;
    let least = (mean + deviations * square.sqrt()).round() as i32;
    // No code is longer than this, so what is taken off the bar is at most a half, and more than none.
    let longest = 15.0 * (sample.dim as f32).sqrt();
    Bar { scale: 1.0, along: 0.0, across: 0.0, rest: 0.5 / longest, base: probe.base(level) - least, quota: u32::MAX }
}

/// The first difference between two reports on the same slots, probes and bars.
fn difference(tested: &Report, plain: &Report) -> Option<String> {
    if let Some(probe) = (0..plain.counts.len()).find(|&probe| tested.counts.get(probe) != plain.counts.get(probe)) {
        let found = tested.counts.get(probe).copied().unwrap_or(0);
        return Some(format!("probe {probe}: {found} rows where there are {}", plain.counts[probe]));
    }
    if tested.spilled || plain.spilled {
        return None;
    }
    let mut pairs = tested.entries.iter().zip(&plain.entries);
    if let Some((found, wanted)) = pairs.find(|(found, wanted)| found != wanted) {
        return Some(format!("the first pair that differs: {found:?} where there is {wanted:?}"));
    }
    (tested.entries.len() != plain.entries.len())
        .then(|| format!("{} pairs where there are {}", tested.entries.len(), plain.entries.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_that_differ_in_a_pair_or_a_count_are_told_apart() {
        let entry = |probe, slot| Entry { probe, slot };
        let report = |entries: &[Entry], counts: [u32; 2], spilled| Report {
            entries: entries.to_vec(),
            stored: entries.len() as u64,
            counts: counts.to_vec(),
            spilled,
            device_time: None,
        };
        let plain = report(&[entry(0, 3), entry(1, 7)], [1, 1], false);
        assert_eq!(difference(&plain, &plain), None);
        let moved = report(&[entry(0, 3), entry(1, 8)], [1, 1], false);
        assert!(difference(&moved, &plain).unwrap().contains("slot: 8"));
        let fewer = report(&[entry(0, 3)], [1, 0], false);
        assert!(difference(&fewer, &plain).unwrap().contains("probe 1: 0 rows"));
        let counted_alone = report(&[], [1, 2], true);
        assert!(difference(&counted_alone, &plain).unwrap().contains("2 rows where there are 1"));
    }
}
