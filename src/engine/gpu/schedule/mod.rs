//! In which order are slots scanned, at which level, and how do floors rise?
//!
//! Pure: hands scans to an [`Executor`], so it is tested without a device. Knows floors, probes and slots; does
//! not know wgpu, segments or threads. `slices`: how many slots at a time, and which code.
//!
//! 1. Rows without codes are compared on the host, with every probe.
//! 2. A probe that only needs its best rows and has a low floor gets a higher one first. A sample of rows is
//!    compared on the host, and the k-th best is a floor; the spread of their scores tells from which
//!    *estimate* on some dozens of rows are expected in the first slots. The *scout* scans those slots for such
//!    rows, they are compared, and the k-th best of them is a floor again, a much higher one.
//! 3. The slots are scanned in slices, two of them in flight at a time. 1-bit codes are scanned if few rows
//!    pass them, otherwise 4-bit codes. Floors rise between slices.
//! 4. A slice whose pairs do not fit is scanned again: first its 4-bit codes instead of the 1-bit codes, then
//!    in smaller slices, at last for half of the probes at a time. Nothing is dropped: a probe is done with a
//!    slice when every pair it had there has come back.
//!
//! A pair that passed is compared in f32 on the host, and counts from its floor up. Rows are never counted
//! twice: the sample and the scout raise a floor each for itself, together with nothing but rows without codes.

pub(crate) mod slices;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use rayon::prelude::*;

use self::slices::{Expectations, Limits, normal_quantile};
use super::bounds::{DeviceBounds, estimate};
use super::compare::Numbered;
use super::device::LANES;
use super::device::batch::Report;
use super::device::bindings::{DeviceBound, Entry, PROBES_MAX};
use super::device::kernels::SLOT_STEP;
use super::device::layout::Level;
use crate::engine::certificate::Certificate;
use crate::engine::dot::dot_slack;
use crate::engine::quantised_probe::QuantisedProbe;
use crate::engine::top_k::{TopK, TopKList};
use crate::engine::{CandidateRequest, CandidateRows, EngineError};

/// Slices that may be in flight at once.
const IN_FLIGHT_MAX: usize = LANES;
/// Rows of the sample.
const SAMPLE_ROWS: u32 = 256;
/// Slots that the scout scans at most, and one in how many it scans.
const SCOUT_SLOTS_MAX: u32 = 1 << 18;
const SCOUT_ONE_OF: u32 = 8;
/// Slots below which a scout costs more than it saves.
const SCOUT_SLOTS_MIN: u32 = 1 << 14;
/// Pairs from which comparing them is divided between threads.
const PARALLEL_PAIRS_MIN: usize = 256;

/// What the schedule needs to know of the gallery and the device.
pub(super) struct Context<'a> {
    /// Slots of all slabs together.
    pub(super) slots: u32,
    /// What the device can take at once.
    pub(super) limits: Limits,
    /// The row at a slot and its number for a probe of the request, if the view has the row, it is live and
    /// the probe's filter allows it.
    pub(super) compare: &'a (dyn Fn(usize, u32) -> Option<Numbered> + Sync),
    /// The same for every row of the view that has no codes.
    pub(super) without_codes: &'a (dyn Fn(usize) -> Vec<Numbered> + Sync),
}

/// What the executor is asked to do.
pub(super) struct Scan {
    /// Which code is scanned.
    pub(super) level: Level,
    /// Numbers of the probes in the request.
    pub(super) probes: Vec<usize>,
    /// One bound per probe.
    pub(super) bounds: Vec<DeviceBound>,
    /// Parts taken off a row's cosine.
    pub(super) loss_parts: u32,
    /// One bound per probe for the refinement; none if there is no refinement.
    pub(super) refine_bounds: Option<Vec<DeviceBound>>,
    /// The slots.
    pub(super) slots: Range<u32>,
}

/// Does scans, one after the other.
pub(super) trait Executor {
    /// Begins a scan, while others may be in flight.
    fn submit(&mut self, scan: &Scan) -> Result<(), EngineError>;
    /// Waits for the scan that was submitted first of those in flight.
    fn collect(&mut self) -> Result<Report, EngineError>;
}

/// Slots to scan for some probes (places in the batch).
struct Task {
    slots: Range<u32>,
    probes: Vec<usize>,
    /// Whether 1-bit codes are ruled out.
    four_bit: bool,
    /// Pairs per slot that passed when these slots were scanned before, in vain.
    pairs_per_slot: f64,
}

/// A task in flight.
struct Slice {
    task: Task,
    level: Level,
    /// Pairs expected to pass.
    expected: f64,
}

/// One batch of a request.
struct Schedule<'a> {
    context: &'a Context<'a>,
    executor: &'a mut dyn Executor,
    first: usize,
    probes: &'a [QuantisedProbe],
    bounds: DeviceBounds,
    found: Vec<Found>,
    expectations: Expectations,
    device_time: Option<Duration>,
    scanned: bool,
}

/// Finds the candidates of the probes `batch` of the request, `quantised` each, and stores them in `candidates`.
///
/// # Errors
/// The first error of the executor.
pub(super) fn find_candidates(
    context: &Context<'_>,
    request: &CandidateRequest<'_>,
    batch: Range<usize>,
    quantised: &[QuantisedProbe],
    executor: &mut dyn Executor,
    candidates: &mut CandidateRows,
) -> Result<(), EngineError> {
    assert!(batch.len() <= PROBES_MAX && quantised.len() == batch.len());
    let dim = context.limits.dim;
    let mut schedule = Schedule {
        context,
        executor,
        first: batch.start,
        probes: quantised,
        bounds: DeviceBounds::new(request.certificate, dim),
        found: batch.clone().map(|probe| Found::new(request, probe, dim)).collect(),
        expectations: Expectations::new(dim),
        device_time: None,
        scanned: false,
    };
    schedule.compare_rows_without_codes();
    let low = schedule.raise_low_floors();
    schedule.scout(&low)?;
    schedule.scan()?;
    if let Some(time) = schedule.device_time {
        *candidates.device_time.get_or_insert_default() += time;
    }
    // Scans at either level pass rows over under the certificate that was asked for.
    if schedule.scanned {
        candidates.certificate = weaker(candidates.certificate, request.certificate);
    }
    for (probe, found) in batch.zip(&mut schedule.found) {
        found.store(probe, candidates);
    }
    Ok(())
}

fn weaker(a: Certificate, b: Certificate) -> Certificate {
    if a.miss_probability() >= b.miss_probability() { a } else { b }
}

impl Schedule<'_> {
    fn compare_rows_without_codes(&mut self) {
        let (context, first) = (self.context, self.first);
        let probes: Vec<usize> = (0..self.found.len()).collect();
        let rows = for_each_probe(&probes, |probe| (context.without_codes)(first + probe));
        for (found, rows) in self.found.iter_mut().zip(rows) {
            found.take(rows);
        }
    }

    /// Compares a sample for every probe that only needs its best rows and whose floor many rows reach; raises
    /// its floor, and returns its place with the mean and the deviation of the scores.
    fn raise_low_floors(&mut self) -> Vec<(usize, f64, f64)> {
        // Scores of unrelated rows of a real gallery deviate by about 2 / sqrt(dim): few reach this.
        let high_floor = 5.5 / (self.context.limits.dim as f64).sqrt();
        let is_low = |probe: &usize| self.found[*probe].keep > 0 && self.found[*probe].floor() < high_floor;
        let low: Vec<usize> = (0..self.found.len()).filter(is_low).collect();
        let (context, first) = (self.context, self.first);
        let slots = u64::from(context.slots);
        let count = u64::from(SAMPLE_ROWS).min(slots);
        let samples = for_each_probe(&low, |probe| {
            // Evenly spread, and no two alike.
            let sample = (0..count).map(|nth| (nth * slots / count) as u32);
            sample.filter_map(|slot| (context.compare)(first + probe, slot)).collect()
        });
        let mut spreads = Vec::new();
        for (&probe, sample) in low.iter().zip(&samples) {
            self.found[probe].scout(sample);
            let count = sample.len() as f64;
            if count >= 32.0 {
                let mean = sample.iter().map(|(number, _)| f64::from(*number)).sum::<f64>() / count;
                let square = sample.iter().map(|(number, _)| (f64::from(*number) - mean).powi(2)).sum::<f64>() / count;
                spreads.push((probe, mean, square.sqrt()));
            }
        }
        spreads
    }

    /// Looks for rows that raise the floors of these probes among the first slots. What it finds is discarded:
    /// these slots are scanned with all others.
    fn scout(&mut self, low: &[(usize, f64, f64)]) -> Result<(), EngineError> {
        let slots = (self.context.slots / SCOUT_ONE_OF).min(SCOUT_SLOTS_MAX) / SLOT_STEP * SLOT_STEP;
        if low.is_empty() || self.context.slots < SCOUT_SLOTS_MIN {
            return Ok(());
        }
        let level = Level::FourBit;
        let bounds = low.iter().map(|&(probe, mean, deviation)| {
            let wanted = 4 * self.found[probe].keep + 16;
            let score = mean + deviation * normal_quantile(wanted as f64 / f64::from(slots));
            let room = self.context.limits.entries_max as usize / low.len();
            estimate(&self.probes[probe], level, score, u32::try_from((4 * wanted).min(room)).unwrap_or(u32::MAX))
        });
        self.executor.submit(&Scan {
            level,
            probes: low.iter().map(|&(probe, ..)| self.first + probe).collect(),
            bounds: bounds.collect(),
            loss_parts: 0,
            refine_bounds: None,
            slots: 0..slots,
        })?;
        let report = self.executor.collect()?;
        self.add_time(&report);
        let places: Vec<usize> = low.iter().map(|&(probe, ..)| probe).collect();
        for (probe, rows) in places.iter().zip(self.compared(&places, &report)) {
            self.found[*probe].scout(&rows);
        }
        Ok(())
    }

    /// Scans all slots for all probes.
    fn scan(&mut self) -> Result<(), EngineError> {
        let probes = (0..self.found.len()).collect();
        let mut tasks = vec![Task { slots: 0..self.context.slots, probes, four_bit: false, pairs_per_slot: 0.0 }];
        let mut in_flight: VecDeque<Slice> = VecDeque::new();
        loop {
            while in_flight.len() < IN_FLIGHT_MAX {
                let Some(task) = tasks.pop() else { break };
                if let Some((slice, scan)) = self.next_slice(task, &mut tasks) {
                    self.executor.submit(&scan)?;
                    in_flight.push_back(slice);
                }
            }
            let Some(slice) = in_flight.pop_front() else { return Ok(()) };
            let report = self.executor.collect()?;
            self.add_time(&report);
            self.take(slice, &report, &mut tasks);
        }
    }

    /// The slice of a task to scan now; the rest of the task goes back to the others.
    fn next_slice(&mut self, mut task: Task, tasks: &mut Vec<Task>) -> Option<(Slice, Scan)> {
        task.probes.retain(|&probe| !self.found[probe].top_k.overflowed());
        if !task.four_bit {
            // Probes for which 1-bit codes do not pay are scanned by themselves.
            let pays = |probe: &usize| {
                self.expectations.one_bit_pays(&self.bounds, &self.probes[*probe], self.found[*probe].floor())
            };
            let (one_bit, four_bit): (Vec<usize>, Vec<usize>) = task.probes.iter().partition(|probe| pays(probe));
            tasks.push(Task { slots: task.slots.clone(), probes: four_bit, four_bit: true, ..task });
            task.probes = one_bit;
        }
        if task.probes.is_empty() || task.slots.is_empty() {
            return None;
        }
        let level = if task.four_bit { Level::FourBit } else { Level::OneBit };
        let passing = |&probe: &usize| {
            self.expectations.passing(&self.bounds, level, &self.probes[probe], self.found[probe].floor())
        };
        let pairs_per_slot: f64 = task.probes.iter().map(passing).sum();
        let slots = self.context.limits.slice_slots(task.probes.len(), pairs_per_slot.max(task.pairs_per_slot));
        if task.slots.end - task.slots.start > slots {
            let rest = task.slots.start + slots..task.slots.end;
            tasks.push(Task { slots: rest, probes: task.probes.clone(), ..task });
            task.slots.end = task.slots.start + slots;
        }
        let bound = |&probe: &usize| self.bounds.scan(level, &self.probes[probe], self.found[probe].floor(), u32::MAX);
        let refine = |&probe: &usize| self.bounds.refine(&self.probes[probe], self.found[probe].floor());
        let scan = Scan {
            level,
            probes: task.probes.iter().map(|probe| self.first + probe).collect(),
            bounds: task.probes.iter().map(bound).collect(),
            loss_parts: self.bounds.loss_parts(level),
            refine_bounds: (level == Level::OneBit).then(|| task.probes.iter().map(refine).collect()),
            slots: task.slots.clone(),
        };
        self.scanned = true;
        let expected = pairs_per_slot * f64::from(task.slots.end - task.slots.start);
        Some((Slice { task, level, expected }, scan))
    }

    /// Takes what a slice reported, or plans to scan it again.
    fn take(&mut self, Slice { task, level, expected }: Slice, report: &Report, tasks: &mut Vec<Task>) {
        self.expectations.learn(level, report.stored, expected);
        if !report.overflowed {
            let compared = self.compared(&task.probes, report);
            for (&probe, rows) in task.probes.iter().zip(compared) {
                self.found[probe].take(rows);
            }
            return;
        }
        let slots = task.slots.end - task.slots.start;
        let Task { slots: range, mut probes, .. } = task;
        if level == Level::OneBit {
            tasks.push(Task { slots: range, probes, four_bit: true, pairs_per_slot: 0.0 });
        } else if slots > SLOT_STEP {
            // More pairs passed than there are places, so the next slice is at most half as long.
            let pairs_per_slot = report.stored as f64 / f64::from(slots);
            tasks.push(Task { slots: range, probes, four_bit: true, pairs_per_slot });
        } else {
            // One step of one probe always fits: the device has at least that many places.
            assert!(probes.len() > 1, "a single probe overflowed a single step of slots");
            for probes in [probes.split_off(probes.len() / 2), probes] {
                tasks.push(Task { slots: range.clone(), probes, four_bit: true, pairs_per_slot: 0.0 });
            }
        }
    }

    /// The numbers and rows of what a report has, for each of its probes.
    fn compared(&self, places: &[usize], report: &Report) -> Vec<Vec<Numbered>> {
        let (context, first) = (self.context, self.first);
        let compare = |entry: &Entry| {
            let found = (context.compare)(first + places[entry.probe as usize], entry.slot);
            found.map(|found| (entry.probe as usize, found))
        };
        let found: Vec<(usize, Numbered)> = if report.entries.len() < PARALLEL_PAIRS_MIN {
            report.entries.iter().filter_map(compare).collect()
        } else {
            report.entries.par_iter().with_min_len(PARALLEL_PAIRS_MIN / 4).filter_map(compare).collect()
        };
        let mut by_probe = vec![Vec::new(); places.len()];
        for (probe, found) in found {
            by_probe[probe].push(found);
        }
        by_probe
    }

    fn add_time(&mut self, report: &Report) {
        if let Some(time) = report.device_time {
            *self.device_time.get_or_insert_default() += time;
        }
    }
}

/// What one probe has found so far, and the floor it is held to.
pub(super) struct Found {
    keep: usize,
    top_k: TopK,
    list: TopKList,
}

impl Found {
    pub(super) fn new(request: &CandidateRequest<'_>, probe: usize, dim: usize) -> Self {
        let top_k = TopK::new(request, probe, dot_slack(dim));
        Self { keep: request.keep[probe] as usize, top_k, list: TopKList::default() }
    }

    fn floor(&self) -> f64 {
        f64::from(self.top_k.floor())
    }

    /// Keeps the rows that reach the floor, and raises it by them.
    pub(super) fn take(&mut self, rows: Vec<Numbered>) {
        for (number, row) in rows {
            if number >= self.top_k.threshold() {
                self.list.offer(&self.top_k, number, row);
            }
        }
    }

    /// Raises the floor by rows that are not kept, and may be found again.
    fn scout(&mut self, rows: &[Numbered]) {
        self.top_k.scout(rows.iter().map(|(number, _)| *number));
    }

    /// Stores the rows as the probe's candidates, with the floor from which they are complete.
    pub(super) fn store(&mut self, probe: usize, candidates: &mut CandidateRows) {
        self.top_k.file(std::iter::once(&mut self.list), probe, candidates);
    }
}

/// Numbers and rows for each of some probes; on all threads if waking them is worth it.
fn for_each_probe(probes: &[usize], rows: impl Fn(usize) -> Vec<Numbered> + Sync) -> Vec<Vec<Numbered>> {
    const ALONE_MAX: usize = 4;
    if probes.len() <= ALONE_MAX {
        return probes.iter().map(|&probe| rows(probe)).collect();
    }
    probes.par_iter().map(|&probe| rows(probe)).collect()
}
