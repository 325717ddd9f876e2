//! In which order are slots scanned, at which level, and how do floors rise?
//!
//! Pure: hands orders to a [`Machine`], so it is tested without a device. Knows floors, probes and
//! slots; does not know wgpu, blocks or threads.
//!
//! 1. Rows without codes are compared on the host, with every probe.
//! 2. A probe that only wants its best rows and has a low floor gets a higher one first: a sample of
//!    rows is compared on the host, the k-th best is a floor; and how their scores spread says from
//!    which *estimate* on some dozens of rows are expected in the first slots. Those are asked for
//!    (the *scout*) and compared, and the k-th best of them is a floor again, a much higher one.
//! 3. The slots are scanned in slices, two of them under way at a time. Slices are so long that what
//!    passes is expected to fit: by the bar at the usual cosine, and by what came of it before. Signs
//!    are scanned where few rows pass them, else fine codes. Floors rise between slices.
//! 4. What does not fit is done again: signs as fine codes first, then in smaller slices, at last
//!    probe by probe. Nothing is dropped: a probe is through with a slice when every pair it had
//!    there has come back.
//!
//! A pair that passed is compared in f32 on the host, and counts from its floor up.
//!
//! Why raising is sound. A row's number is within the slack of its exact score. If `keep` live rows
//! have numbers of at least `t`, then `keep` rows have exact scores of at least `t - slack`, so the
//! `keep`-th best exact score is not below that, and no row below it can be among the `keep` best or
//! tied with the last of them. Rows are never counted twice: the sample and the scout raise a floor
//! each for itself, together with nothing but rows without codes.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use rayon::prelude::*;

use super::bindings::{Bar, Entry, PROBES_MAX};
use super::device::Report;
use super::kernels::SLOT_STEP;
use super::level::Level;
use super::probe::Quantised;
use super::slack::{Bars, estimate, threshold};
use crate::engine::certificate::Certificate;
use crate::engine::dot::dot_slack;
use crate::engine::{CandidateRequest, CandidateRows, EngineError};

/// Slices that may be under way at once.
const FLYING_MAX: usize = super::device::LANES;
/// Rows of the sample.
const SAMPLE_ROWS: u32 = 256;
/// Slots the scout looks at, at most, and of how many it looks at one.
const SCOUT_SLOTS_MAX: u32 = 1 << 18;
const SCOUT_ONE_OF: u32 = 8;
/// Slots under which a scout is not worth its while.
const SCOUT_FROM: u32 = 1 << 14;
/// Pairs of a slice at most, so that one is compared on the host while the next is scanned.
const SLICE_PAIRS: u64 = 1 << 28;
/// Signs are scanned where at most one row in so many is expected to pass them: a pair that passes
/// costs a second look, at four times the bytes and from anywhere.
const SIGNS_ONE_OF: f64 = 48.0;
/// Most rows a probe may hold while its floor still rises.
const FOUND_MAX: usize = 1 << 16;
/// Pairs from which comparing them is divided between threads.
const TOGETHER_FROM: usize = 256;

/// What the schedule needs to know of the gallery and the device.
pub(super) struct Field<'a> {
    /// Slots of all slabs together.
    pub slots: u32,
    /// Components of a row.
    pub dim: usize,
    /// Places for pairs on the device.
    pub entries_max: u32,
    /// The row at a slot and its f32 number for a probe of the request, if the view has the row, it
    /// is live and the probe's filter allows it.
    pub compare: &'a (dyn Fn(usize, u32) -> Option<(f32, u32)> + Sync),
    /// The same for every row of the view that has no codes.
    pub without_codes: &'a (dyn Fn(usize) -> Vec<(f32, u32)> + Sync),
}

/// What the machine is asked to do.
pub(super) struct Order {
    /// Which code is scanned.
    pub level: Level,
    /// Numbers of the probes in the request.
    pub numbers: Vec<usize>,
    /// A bar a probe.
    pub bars: Vec<Bar>,
    /// Parts taken off a row's cosine.
    pub parts_off: u32,
    /// For each probe the bar of the second look; none where there is none.
    pub look: Option<Vec<Bar>>,
    /// The slots.
    pub slots: Range<u32>,
}

/// Does orders, one after the other.
pub(super) trait Machine {
    /// Begins an order, while others may be under way.
    fn submit(&mut self, order: &Order) -> Result<(), EngineError>;
    /// Waits for the order that was submitted first of those under way.
    fn collect(&mut self) -> Result<Report, EngineError>;
}

/// A probe on its way.
struct Hunt {
    floor: f64,
    slack: f64,
    keep: usize,
    candidates_max: usize,
    found: Vec<(f32, u32)>,
    overflowed: bool,
}

/// Slots to scan for some probes (places in the batch).
struct Task {
    slots: Range<u32>,
    probes: Vec<usize>,
    /// Whether signs did not do.
    fine: bool,
}

/// A task under way.
struct Flying {
    task: Task,
    level: Level,
    /// Pairs expected to pass.
    expected: f64,
}

/// One batch of a request.
pub(super) struct Schedule<'a> {
    field: &'a Field<'a>,
    machine: &'a mut dyn Machine,
    first: usize,
    probes: &'a [Quantised],
    bars: Bars,
    hunts: Vec<Hunt>,
    /// How many more pairs passed than expected, by level.
    stretch: [f64; 2],
    device_time: Option<Duration>,
    signs_used: bool,
    fine_used: bool,
}

/// Sifts the probes `batch` of the request, `quantised` each, and files their rows in `candidates`.
///
/// # Errors
/// The first error of the machine.
pub(super) fn find_candidates(
    field: &Field<'_>,
    request: &CandidateRequest<'_>,
    batch: Range<usize>,
    quantised: &[Quantised],
    machine: &mut dyn Machine,
    candidates: &mut CandidateRows,
) -> Result<(), EngineError> {
    assert!(batch.len() <= PROBES_MAX && quantised.len() == batch.len());
    let mut schedule = Schedule {
        field,
        machine,
        first: batch.start,
        probes: quantised,
        bars: Bars::new(request.certificate, field.dim),
        hunts: batch.clone().map(|probe| Hunt::new(field.dim, request, probe)).collect(),
        stretch: [1.0; 2],
        device_time: None,
        signs_used: false,
        fine_used: false,
    };
    schedule.compare_rows_without_codes();
    let low = schedule.low_floors();
    schedule.scout(&low)?;
    schedule.scan()?;
    if let Some(time) = schedule.device_time {
        *candidates.device_time.get_or_insert_default() += time;
    }
    // What is scanned at either level passes rows over under the certificate that was asked for.
    if schedule.signs_used || schedule.fine_used {
        candidates.certificate = weaker(candidates.certificate, request.certificate);
    }
    for (probe, hunt) in batch.zip(&mut schedule.hunts) {
        hunt.file(probe, candidates);
    }
    Ok(())
}

fn weaker(a: Certificate, b: Certificate) -> Certificate {
    if a.miss_probability() >= b.miss_probability() { a } else { b }
}

impl Schedule<'_> {
    fn compare_rows_without_codes(&mut self) {
        let (field, first) = (self.field, self.first);
        let probes: Vec<usize> = (0..self.hunts.len()).collect();
        let rows = each(&probes, |probe| (field.without_codes)(first + probe));
        for (hunt, rows) in self.hunts.iter_mut().zip(rows) {
            hunt.take(rows);
        }
    }

    /// Compares a sample for every probe that only wants its best rows and whose floor many rows
    /// reach; raises its floor, and returns its place with the mean and the deviation of the scores.
    fn low_floors(&mut self) -> Vec<(usize, f64, f64)> {
        // Scores of unrelated rows of a real gallery deviate by about 2 / sqrt(dim): few reach this.
        let high_floor = 5.5 / (self.field.dim as f64).sqrt();
        let low = |probe: &usize| self.hunts[*probe].keep > 0 && self.hunts[*probe].floor < high_floor;
        let low: Vec<usize> = (0..self.hunts.len()).filter(low).collect();
        let (field, first) = (self.field, self.first);
        let slots = u64::from(field.slots);
        let count = u64::from(SAMPLE_ROWS).min(slots);
        let samples = each(&low, |probe| {
            // Evenly spread, and no two alike.
            let sample = (0..count).map(|nth| (nth * slots / count) as u32);
            sample.filter_map(|slot| (field.compare)(first + probe, slot)).collect()
        });
        let mut spreads = Vec::new();
        for (&probe, sample) in low.iter().zip(&samples) {
            self.hunts[probe].raise(sample);
            let count = sample.len() as f64;
            if count >= 32.0 {
                let mean = sample.iter().map(|(number, _)| f64::from(*number)).sum::<f64>() / count;
                let square = sample.iter().map(|(number, _)| (f64::from(*number) - mean).powi(2)).sum::<f64>() / count;
                spreads.push((probe, mean, square.sqrt()));
            }
        }
        spreads
    }

    /// Looks for rows that raise the floors of these probes among the first slots. What it finds is
    /// forgotten again: these slots are scanned with all others.
    fn scout(&mut self, low: &[(usize, f64, f64)]) -> Result<(), EngineError> {
        let slots = (self.field.slots / SCOUT_ONE_OF).min(SCOUT_SLOTS_MAX) / SLOT_STEP * SLOT_STEP;
        if low.is_empty() || self.field.slots < SCOUT_FROM {
            return Ok(());
        }
        let level = Level::FourBit;
        let bars = low.iter().map(|&(probe, mean, deviation)| {
            let wanted = 4 * self.hunts[probe].keep + 16;
            let score = mean + deviation * normal_quantile(wanted as f64 / f64::from(slots));
            let room = self.field.entries_max as usize / low.len();
            estimate(&self.probes[probe], level, score, u32::try_from((4 * wanted).min(room)).unwrap_or(u32::MAX))
        });
        let order = Order {
            level,
            numbers: low.iter().map(|&(probe, ..)| self.first + probe).collect(),
            bars: bars.collect(),
            parts_off: 0,
            look: None,
            slots: 0..slots,
        };
        self.machine.submit(&order)?;
        let report = self.machine.collect()?;
        self.add_time(&report);
        let places: Vec<usize> = low.iter().map(|&(probe, ..)| probe).collect();
        for (probe, rows) in places.iter().zip(self.compared(&places, &report)) {
            self.hunts[*probe].raise(&rows);
        }
        Ok(())
    }

    /// Scans all slots for all probes.
    fn scan(&mut self) -> Result<(), EngineError> {
        let mut tasks = vec![Task { slots: 0..self.field.slots, probes: (0..self.hunts.len()).collect(), fine: false }];
        let mut flying: VecDeque<Flying> = VecDeque::new();
        loop {
            while flying.len() < FLYING_MAX {
                let Some(task) = tasks.pop() else { break };
                if let Some((now, order)) = self.next(task, &mut tasks) {
                    self.machine.submit(&order)?;
                    flying.push_back(now);
                }
            }
            let Some(done) = flying.pop_front() else { return Ok(()) };
            let report = self.machine.collect()?;
            self.add_time(&report);
            self.take(done, &report, &mut tasks);
        }
    }

    /// What to do of a task now, and the rest of it back to the others.
    fn next(&mut self, mut task: Task, tasks: &mut Vec<Task>) -> Option<(Flying, Order)> {
        task.probes.retain(|&probe| !self.hunts[probe].overflowed);
        if task.probes.is_empty() || task.slots.is_empty() {
            return None;
        }
        // Probes whose signs tell too little go their own way.
        if !task.fine && self.bars.randomised() {
            let signs: Vec<bool> = task.probes.iter().map(|&probe| self.signs_do(probe)).collect();
            if signs.contains(&false) {
                let mut by_fine = task.probes.clone();
                let mut nth = signs.iter();
                by_fine.retain(|_| !nth.next().expect("one a probe"));
                let mut nth = signs.iter();
                task.probes.retain(|_| *nth.next().expect("one a probe"));
                tasks.push(Task { slots: task.slots.clone(), probes: by_fine, fine: true });
            }
            if task.probes.is_empty() {
                return None;
            }
        }
        let level = if task.fine || !self.bars.randomised() { Level::FourBit } else { Level::OneBit };
        let each: f64 = task.probes.iter().map(|&probe| self.passing(level, probe)).sum();
        let slots = self.slice_slots(each, task.probes.len());
        if task.slots.end - task.slots.start > slots {
            let rest = task.slots.start + slots..task.slots.end;
            tasks.push(Task { slots: rest, probes: task.probes.clone(), fine: task.fine });
            task.slots.end = task.slots.start + slots;
        }
        let bar = |&probe: &usize| self.bars.scan(level, &self.probes[probe], self.hunts[probe].floor, u32::MAX);
        let look = |&probe: &usize| self.bars.look(&self.probes[probe], self.hunts[probe].floor);
        let order = Order {
            level,
            numbers: task.probes.iter().map(|probe| self.first + probe).collect(),
            bars: task.probes.iter().map(bar).collect(),
            parts_off: self.bars.parts_off(level),
            look: (level == Level::OneBit).then(|| task.probes.iter().map(look).collect()),
            slots: task.slots.clone(),
        };
        match level {
            Level::OneBit => self.signs_used = true,
            Level::FourBit => self.fine_used = true,
        }
        let expected = each * f64::from(task.slots.end - task.slots.start);
        Some((Flying { task, level, expected }, order))
    }

    /// Files what a slice reported, or plans to do it again.
    fn take(&mut self, Flying { task, level, expected }: Flying, report: &Report, tasks: &mut Vec<Task>) {
        let before = self.stretch[level.index()];
        // Dead slots and luck make it less, so it sinks slowly; what there was is expected again.
        let measured = before * (report.stored as f64 + 1.0) / (expected + 1.0);
        self.stretch[level.index()] = measured.max(before / 2.0).clamp(1e-3, 1e9);
        if !report.spilled {
            let compared = self.compared(&task.probes, report);
            for (&probe, rows) in task.probes.iter().zip(compared) {
                self.hunts[probe].take(rows);
            }
            return;
        }
        let Task { slots, mut probes, fine } = task;
        if level == Level::OneBit {
            tasks.push(Task { slots, probes, fine: true });
            return;
        }
        let steps = (slots.end - slots.start).div_ceil(SLOT_STEP);
        if steps > 1 {
            let parts = (2 * report.stored).div_ceil(self.field.entries_max.into()).clamp(2, steps.into());
            let each = steps.div_ceil(u32::try_from(parts).unwrap_or(u32::MAX)) * SLOT_STEP;
            // The last is pushed first, so that slots come in their order.
            let starts: Vec<u32> = (slots.start..slots.end).step_by(each as usize).collect();
            for start in starts.into_iter().rev() {
                let slots = start..slots.end.min(start.saturating_add(each));
                tasks.push(Task { slots, probes: probes.clone(), fine });
            }
        } else {
            // One step of one probe always fits: the device has at least that many places.
            assert!(probes.len() > 1, "a single probe overflowed a single step of slots");
            let right = probes.split_off(probes.len() / 2);
            tasks.push(Task { slots: slots.clone(), probes: right, fine });
            tasks.push(Task { slots, probes, fine });
        }
    }

    /// The numbers and rows of what a report has, for each of its probes.
    fn compared(&self, places: &[usize], report: &Report) -> Vec<Vec<(f32, u32)>> {
        let (field, first) = (self.field, self.first);
        let compare = |entry: &Entry| {
            let found = (field.compare)(first + places[entry.probe as usize], entry.slot);
            found.map(|found| (entry.probe as usize, found))
        };
        let found: Vec<(usize, (f32, u32))> = if report.entries.len() < TOGETHER_FROM {
            report.entries.iter().filter_map(compare).collect()
        } else {
            report.entries.par_iter().with_min_len(TOGETHER_FROM / 4).filter_map(compare).collect()
        };
        let mut by_probe = vec![Vec::new(); places.len()];
        for (probe, found) in found {
            by_probe[probe].push(found);
        }
        by_probe
    }

    /// The part of the rows that is expected to pass a scan.
    fn passing(&self, level: Level, probe: usize) -> f64 {
        let deviation = 2.0 / (self.field.dim as f64).sqrt();
        match self.bars.usual_bar(level, &self.probes[probe], self.hunts[probe].floor) {
            Some(bar) => (normal_tail(bar / deviation) * self.stretch[level.index()]).min(1.0),
            None => 1.0,
        }
    }

    /// Whether scanning signs is worth while for a probe.
    fn signs_do(&self, probe: usize) -> bool {
        self.passing(Level::OneBit, probe) * SIGNS_ONE_OF < 1.0
    }

    /// How many slots fit a slice of which the part `each` is expected to pass, over all its probes.
    fn slice_slots(&self, each: f64, probes: usize) -> u32 {
        let room = f64::from(self.field.entries_max) / 2.0 / each.max(1e-12);
        let most = (SLICE_PAIRS / probes as u64).min(u64::from(u32::MAX - SLOT_STEP)) as f64;
        ((room.min(most) as u32) / SLOT_STEP * SLOT_STEP).max(SLOT_STEP)
    }

    fn add_time(&mut self, report: &Report) {
        if let Some(time) = report.device_time {
            *self.device_time.get_or_insert_default() += time;
        }
    }
}

impl Hunt {
    fn new(dim: usize, request: &CandidateRequest<'_>, probe: usize) -> Self {
        Self {
            floor: f64::from(request.floors[probe]),
            slack: f64::from(dot_slack(dim)),
            keep: request.keep[probe] as usize,
            candidates_max: request.candidates_max,
            found: Vec::new(),
            overflowed: false,
        }
    }

    /// Adds the rows that reach the floor, raises it by them, and marks an overflow.
    fn take(&mut self, rows: Vec<(f32, u32)>) {
        let cut = threshold(self.floor, self.slack);
        self.found.extend(rows.into_iter().filter(|&(number, _)| number >= cut));
        self.raise(&[]);
        let most = if self.keep > 0 { self.candidates_max.max(FOUND_MAX) } else { self.candidates_max };
        if self.found.len() > most {
            self.overflowed = true;
            self.found = Vec::new();
        }
    }

    /// Raises the floor to what the rows found and those `besides` allow, none of which is in both,
    /// and drops found rows below it.
    fn raise(&mut self, besides: &[(f32, u32)]) {
        if self.keep == 0 || self.found.len() + besides.len() < self.keep {
            return;
        }
        let mut numbers: Vec<f32> = self.found.iter().chain(besides).map(|&(number, _)| number).collect();
        let (_, &mut last, _) = numbers.select_nth_unstable_by(self.keep - 1, |a, b| b.total_cmp(a));
        let floor = f64::from(last) - self.slack;
        if floor > self.floor {
            self.floor = floor;
            self.prune();
        }
    }

    /// Files the rows found under the probe's number, and the floor that they are complete from.
    fn file(&mut self, probe: usize, candidates: &mut CandidateRows) {
        self.prune();
        candidates.overflowed[probe] = self.overflowed || self.found.len() > self.candidates_max;
        if !candidates.overflowed[probe] {
            candidates.rows[probe].extend(self.found.iter().map(|&(_, row)| row));
            candidates.floors[probe] = round_up(self.floor);
        }
    }

    fn prune(&mut self) {
        let cut = threshold(self.floor, self.slack);
        self.found.retain(|&(number, _)| number >= cut);
    }
}

/// Numbers and rows for each of some probes; on all threads where waking them is worth while.
fn each(probes: &[usize], rows: impl Fn(usize) -> Vec<(f32, u32)> + Sync) -> Vec<Vec<(f32, u32)>> {
    const ALONE: usize = 4;
    if probes.len() <= ALONE {
        return probes.iter().map(|&probe| rows(probe)).collect();
    }
    probes.par_iter().map(|&probe| rows(probe)).collect()
}

/// Sifts one probe over rows that are compared one by one, for a narrow filter: numbers and rows from
/// `rows`. Files them in `candidates`.
pub(super) fn sift_narrow(
    request: &CandidateRequest<'_>,
    dim: usize,
    probe: usize,
    rows: Vec<(f32, u32)>,
    candidates: &mut CandidateRows,
) {
    let mut hunt = Hunt::new(dim, request, probe);
    hunt.take(rows);
    hunt.file(probe, candidates);
}

/// The least f32 that is not below `x`.
fn round_up(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) < x { near.next_up() } else { near }
}

/// The probability that a standard normal variable is above `z`.
fn normal_tail(z: f64) -> f64 {
    0.5 * libm::erfc(z / std::f64::consts::SQRT_2)
}

/// The number that a standard normal variable is above with `probability`, to a thousandth.
fn normal_quantile(probability: f64) -> f64 {
    let (mut low, mut high) = (-6.0, 8.0);
    for _ in 0..16 {
        let middle = 0.5 * (low + high);
        if normal_tail(middle) > probability { low = middle } else { high = middle }
    }
    high
}

#[cfg(test)]
#[path = "sifting_tests.rs"]
mod tests;
