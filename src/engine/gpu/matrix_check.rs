//! Do cooperative matrices compute what packed dot products compute, on a whole gallery?
//!
//! The self-test at start scans 512 slots once. This scans all resident slots with both kernels, as often as
//! it is asked to, and compares every pair that they report. Bounds ask for whole sums, so that a sum that
//! is off by one shows, and rounding decides nothing. For checks; searches never come here.

use std::time::Duration;

use rayon::prelude::*;
use thenar_index::codes::BLOCK_ROWS;

use super::device::batch::Report;
use super::device::bindings::{DeviceBound, Entry, PROBES_MAX};
use super::device::kernels::FEW_PROBES;
use super::device::layout::Level;
use super::executor::BatchExecutor;
use super::resident::Resident;
use super::schedule::{Executor as _, Scan};
use super::twin::Twin;
use super::{GpuEngine, limits};
use crate::engine::quantised_probe::QuantisedProbe;
use crate::engine::{EngineError, GalleryView};

/// What one comparison of two kernels came to.
#[derive(Debug, Clone, PartialEq)]
pub struct MatrixCheck {
    /// Which kernels were compared.
    pub kernels: &'static str,
    /// Pairs of a probe and a row, counted once per level.
    pub pairs: u64,
    /// How many of them reached their bound.
    pub passed: u64,
    /// How many of those were compared one by one. Of the others, the counts per probe were compared.
    pub listed: u64,
    /// The first difference, for people; none if both agree.
    pub wrong: Option<String>,
    /// Time on the device of the kernel under test and of the plain one, if the adapter can tell.
    pub device_times: Option<[Duration; 2]>,
}

impl GpuEngine {
    /// Scans every resident row of `view` with the kernels for large batches and with plain ones, at
    /// both levels, and compares what they report. `deviations`: how far above the mean of a probe's
    /// sums its bound lies, in standard deviations. Pairs are listed if they fit the device's list, from
    /// about 3 up at a million rows. Without matrices, the packed kernel for large batches is compared
    /// with the one for small batches. `probes`: 1 to 256, row-major, `[count, dim]`.
    ///
    /// # Errors
    /// [`EngineError`] where the device fails or does not hold the view.
    pub fn check_matrices(
        &self,
        view: &GalleryView<'_>,
        probes: &[f32],
        deviations: f64,
    ) -> Result<MatrixCheck, EngineError> {
        let resident = self.resident.read();
        if !self.device.is_open(resident.generation) || !resident.covers(view) {
            return Err(EngineError::Rebuilding);
        }
        let dim = view.dim;
        let quantised: Vec<QuantisedProbe> = probes.chunks_exact(dim).map(QuantisedProbe::new).collect();
        assert!((1..=PROBES_MAX).contains(&quantised.len()), "a batch of probes");
        let matrices = self.device.info().matrices;
        let (kernels, plain_probes) = if matrices {
            ("matrices against packed dot products", PROBES_MAX)
        } else {
            ("packed dot products in tiles against one row per invocation", FEW_PROBES)
        };
        let sample = view.segments.iter().find(|segment| segment.coded(dim) >= BLOCK_ROWS);
        let sample = sample.map(|segment| Twin::new(&segment.codes.blocks(dim, 0, 1), dim, 0));
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
            let bounds: Vec<DeviceBound> =
                quantised.par_iter().map(|probe| whole_bound(&sample, level, dim, probe, deviations)).collect();
            let tested = self.scanned(&resident, matrices, level, &quantised, &bounds, PROBES_MAX)?;
            let plain = self.scanned(&resident, false, level, &quantised, &bounds, plain_probes)?;
            check.pairs += u64::from(resident.slots()) * quantised.len() as u64;
            check.passed += plain.stored;
            if !plain.overflowed {
                check.listed += plain.stored;
            }
            check.device_times = match (check.device_times, tested.device_time, plain.device_time) {
                (Some([a, b]), Some(tested), Some(plain)) => Some([a + tested, b + plain]),
                _ => None,
            };
            if let Some(wrong) = difference(&tested, &plain) {
                check.wrong = Some(format!("{level:?} codes, bounds at {deviations} deviations: {wrong}"));
                break;
            }
        }
        Ok(check)
    }

    /// The pairs of all slots that reach the bounds, `together` probes at a time, entries in order.
    fn scanned(
        &self,
        resident: &Resident,
        matrices: bool,
        level: Level,
        quantised: &[QuantisedProbe],
        bounds: &[DeviceBound],
        together: usize,
    ) -> Result<Report, EngineError> {
        let mut whole = Report { device_time: Some(Duration::ZERO), ..Report::default() };
        let limits = limits(&self.device.info(), resident.dim);
        for first in (0..quantised.len()).step_by(together) {
            let probes = first..quantised.len().min(first + together);
            let base = u32::try_from(first).expect("a batch is small");
            let mut executor = BatchExecutor::new(&self.device, resident, matrices, 0, quantised);
            let mut counts = vec![0; probes.len()];
            let step = limits.slice_slots(probes.len(), 0.0);
            for slot_first in (0..resident.slots()).step_by(step as usize) {
                executor.submit(&Scan {
                    level,
                    probes: probes.clone().collect(),
                    bounds: bounds[probes.clone()].to_vec(),
                    loss_parts: 0,
                    refine_bounds: None,
                    slots: slot_first..resident.slots().min(slot_first.saturating_add(step)),
                })?;
                let report = executor.collect()?;
                whole.entries.extend(report.entries.iter().map(|entry| Entry { probe: base + entry.probe, ..*entry }));
                counts.iter_mut().zip(&report.counts).for_each(|(sum, count)| *sum += count);
                whole.stored += report.stored;
                whole.overflowed |= report.overflowed;
                whole.device_time = whole.device_time.zip(report.device_time).map(|(sum, time)| sum + time);
            }
            whole.counts.extend(counts);
        }
        whole.entries.par_sort_unstable();
        Ok(whole)
    }
}

/// A bound on the integer sum alone: that many standard deviations above the mean of the sample's sums.
fn whole_bound(sample: &Twin, level: Level, dim: usize, probe: &QuantisedProbe, deviations: f64) -> DeviceBound {
    let sums: Vec<f64> = (0..BLOCK_ROWS as u32).map(|slot| f64::from(sample.sum(slot, level, probe))).collect();
    let mean = sums.iter().sum::<f64>() / sums.len() as f64;
    let square = sums.iter().map(|sum| (sum - mean).powi(2)).sum::<f64>() / sums.len() as f64;
    let least = (mean + deviations * square.sqrt()).round() as i32;
    // No code is longer than this, so what is taken off the bound is at most a half, and more than none.
    let slack = 0.5 / (15.0 * (dim as f32).sqrt());
    DeviceBound { scale: 1.0, along: 0.0, across: 0.0, slack, base: level.base(probe) - least, quota: u32::MAX }
}

/// The first difference between two reports on the same slots, probes and bounds.
fn difference(tested: &Report, plain: &Report) -> Option<String> {
    if let Some(probe) = (0..plain.counts.len()).find(|&probe| tested.counts.get(probe) != plain.counts.get(probe)) {
        let found = tested.counts.get(probe).copied().unwrap_or(0);
        return Some(format!("probe {probe}: {found} rows instead of {}", plain.counts[probe]));
    }
    if tested.overflowed || plain.overflowed {
        return None;
    }
    let mut pairs = tested.entries.iter().zip(&plain.entries);
    if let Some((found, wanted)) = pairs.find(|(found, wanted)| found != wanted) {
        return Some(format!("the first pair that differs: {found:?} instead of {wanted:?}"));
    }
    (tested.entries.len() != plain.entries.len())
        .then(|| format!("{} pairs instead of {}", tested.entries.len(), plain.entries.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_that_differ_in_a_pair_or_a_count_are_told_apart() {
        let entry = |probe, slot| Entry { probe, slot };
        let report = |entries: &[Entry], counts: [u32; 2], overflowed| Report {
            entries: entries.to_vec(),
            stored: entries.len() as u64,
            counts: counts.to_vec(),
            overflowed,
            device_time: None,
        };
        let plain = report(&[entry(0, 3), entry(1, 7)], [1, 1], false);
        assert_eq!(difference(&plain, &plain), None);
        let moved = report(&[entry(0, 3), entry(1, 8)], [1, 1], false);
        assert!(difference(&moved, &plain).unwrap().contains("slot: 8"));
        let fewer = report(&[entry(0, 3)], [1, 0], false);
        assert!(difference(&fewer, &plain).unwrap().contains("probe 1: 0 rows"));
        let counted_alone = report(&[], [1, 2], true);
        assert!(difference(&counted_alone, &plain).unwrap().contains("2 rows instead of 1"));
    }
}
