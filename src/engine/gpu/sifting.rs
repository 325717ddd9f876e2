//! In which order are slots sifted, and how do floors rise?
//!
//! A probe with a floor that few rows reach, or without a limit on rows, is sifted over all slots
//! at once, with no intermediate read-back. A probe that only wants its best rows and has a low
//! floor starts with a short run of slots: the best scores there give a floor for the next, longer
//! run, and so on. What does not fit the entries buffer is done again in smaller runs.
//!
//! Pure: hands batches to a closure, so it is tested without a device. Knows scores, slacks and
//! slots; does not know wgpu, blocks or threads.
//!
//! Why raising is sound. The device's score of a row is within `slack` of its exact score. If
//! `keep` live rows have device scores of at least `t`, then `keep` rows have exact scores of at
//! least `t - slack`, so the `keep`-th best exact score is not below that, and no row below it can
//! be among the `keep` best or tied with the last of them. Rows at `t - slack` or above pass the
//! cut of that floor, whichever run they are in.

use std::ops::Range;

use super::device::Report;
use super::kernels::{Bar, SLOT_STEP};
use super::slack::{cut, slack};
use crate::engine::{EngineError, SiftRequest, Survivors};

/// Slots of the first run of a probe that must find its floor.
const FIRST_SLOTS: u32 = 2 * SLOT_STEP;
/// How much longer each run is than all before it together: with rows in random order about
/// `keep` times this many pass.
const GROWTH: u32 = 32;
/// Fewest entries a probe may store in a run, if only its best are wanted.
const QUOTA_LEAST: usize = 4096;
/// Most rows a probe may hold while its floor still rises.
const FOUND_MAX: usize = 1 << 16;

/// What the schedule needs to know of the gallery and the device.
pub(super) struct Field<'a> {
    /// Slots of all slabs together.
    pub slots: u32,
    /// Components of a row.
    pub dim: usize,
    /// Whether f16 subnormals keep their value on the device.
    pub f16_subnormals_kept: bool,
    /// The row at a slot, if the view has it and it is live.
    pub live_row: &'a dyn Fn(u32) -> Option<u32>,
}

/// Sifts one batch of probes over some slots: numbers of the probes in the request, their bars,
/// the slots.
pub(super) type RunBatch<'a> = dyn FnMut(&[usize], &[Bar], &Range<u32>) -> Result<Report, EngineError> + 'a;

/// A probe on its way.
struct Hunt {
    floor: f64,
    slack: f64,
    keep: usize,
    quota: usize,
    found: Vec<(f32, u32)>,
    overflowed: bool,
}

struct Task {
    slots: Range<u32>,
    probes: Vec<usize>,
    /// Whether the floors must be found first, so that runs start short.
    cautious: bool,
    /// Whether these slots were done before with lower floors.
    again: bool,
}

/// Sifts the probes `batch` of the request and files their rows in `survivors`.
///
/// # Errors
/// The first error of `run`.
pub(super) fn sift(
    field: &Field<'_>,
    request: &SiftRequest<'_>,
    batch: Range<usize>,
    run: &mut RunBatch<'_>,
    survivors: &mut Survivors,
) -> Result<(), EngineError> {
    let first = batch.start;
    let mut hunts: Vec<Hunt> = batch.clone().map(|probe| Hunt::new(field, request, probe)).collect();
    // Scores of unrelated rows of a real gallery deviate by about 2 / sqrt(dim): few reach this.
    let high_floor = 5.5 / (field.dim as f64).sqrt();
    let (cautious, direct): (Vec<usize>, Vec<usize>) = (0..hunts.len()).partition(|&probe| {
        let hunt = &hunts[probe];
        hunt.keep > 0 && hunt.floor < high_floor && field.slots > FIRST_SLOTS
    });
    let mut tasks: Vec<Task> = Vec::new();
    for (probes, cautious) in [(direct, false), (cautious, true)] {
        let slots = 0..field.slots;
        tasks.push(Task { slots, probes, cautious, again: false });
    }
    while let Some(mut task) = tasks.pop() {
        task.probes.retain(|&probe| !hunts[probe].overflowed);
        if task.probes.is_empty() || task.slots.is_empty() {
            continue;
        }
        let head = if task.cautious { head_of(&task.slots) } else { task.slots.clone() };
        if head.end < task.slots.end {
            tasks.push(Task {
                slots: head.end..task.slots.end,
                probes: task.probes.clone(),
                cautious: true,
                again: false,
            });
        }
        let bars: Vec<Bar> = task.probes.iter().map(|&probe| hunts[probe].bar()).collect();
        let numbers: Vec<usize> = task.probes.iter().map(|&probe| first + probe).collect();
        let report = run(&numbers, &bars, &head)?;
        if let Some(time) = report.device_time {
            *survivors.device_time.get_or_insert_default() += time;
        }
        let unfinished = collect(field, &mut hunts, &task.probes, &report, request.survivors_max);
        again(&mut tasks, unfinished, head, &task);
    }
    for (probe, hunt) in batch.zip(&mut hunts) {
        hunt.prune();
        survivors.overflowed[probe] = hunt.overflowed || hunt.found.len() > request.survivors_max;
        if !survivors.overflowed[probe] {
            survivors.rows[probe].extend(hunt.found.iter().map(|&(_, row)| row));
        }
    }
    Ok(())
}

/// The next run of a probe whose floor must be found first.
fn head_of(slots: &Range<u32>) -> Range<u32> {
    let length = if slots.start == 0 { FIRST_SLOTS } else { slots.start.saturating_mul(GROWTH) };
    slots.start..slots.end.min(slots.start.saturating_add(length))
}

/// Files what a run reported. The probes whose entries did not all fit, with their floors raised
/// by those that did, and whether any floor rose.
fn collect(
    field: &Field<'_>,
    hunts: &mut [Hunt],
    probes: &[usize],
    report: &Report,
    survivors_max: usize,
) -> (Vec<usize>, bool) {
    let mut received: Vec<Vec<(f32, u32)>> = vec![Vec::new(); probes.len()];
    let mut stored = vec![0_usize; probes.len()];
    for entry in &report.entries {
        let place = entry.probe as usize;
        stored[place] += 1;
        if let Some(row) = (field.live_row)(entry.slot) {
            received[place].push((entry.score, row));
        }
    }
    let (mut unfinished, mut raised) = (Vec::new(), false);
    for (place, &probe) in probes.iter().enumerate() {
        let hunt = &mut hunts[probe];
        let count = report.counts[place] as usize;
        if stored[place] == count {
            hunt.found.append(&mut received[place]);
            hunt.raise(&[]);
            let most = if hunt.keep > 0 { survivors_max.max(FOUND_MAX) } else { survivors_max };
            hunt.overflowed |= hunt.found.len() > most;
        } else if hunt.keep == 0 && count > survivors_max {
            hunt.overflowed = true;
        } else {
            raised |= hunt.raise(&received[place]);
            unfinished.push(probe);
        }
    }
    (unfinished, raised)
}

/// Plans to do the slots again for the probes whose entries did not fit: all of them once more if
/// a floor rose, otherwise in two halves; at the least number of slots, in smaller groups of probes.
fn again(tasks: &mut Vec<Task>, (probes, raised): (Vec<usize>, bool), slots: Range<u32>, of: &Task) {
    if probes.is_empty() {
        return;
    }
    if raised && !of.again {
        let cautious = false;
        tasks.push(Task { slots, probes, cautious, again: true });
        return;
    }
    let steps = (slots.end - slots.start).div_ceil(SLOT_STEP);
    if steps > 1 {
        let middle = slots.start + steps / 2 * SLOT_STEP;
        for half in [middle..slots.end, slots.start..middle] {
            tasks.push(Task { slots: half, probes: probes.clone(), cautious: false, again: false });
        }
    } else if probes.len() < of.probes.len() {
        // The others found their places; alone these may too.
        tasks.push(Task { slots, probes, cautious: false, again: false });
    } else {
        // One step of one probe always fits: the device has at least that many places, and the
        // quota of a probe that keeps only its best is larger.
        assert!(probes.len() > 1, "a single probe overflowed a single step of slots");
        let (left, right) = probes.split_at(probes.len() / 2);
        for half in [left, right] {
            tasks.push(Task { slots: slots.clone(), probes: half.to_vec(), cautious: false, again: false });
        }
    }
}

impl Hunt {
    fn new(field: &Field<'_>, request: &SiftRequest<'_>, probe: usize) -> Self {
        let values = &request.probes[probe * field.dim..][..field.dim];
        let keep = request.keep[probe] as usize;
        Self {
            floor: f64::from(request.floors[probe]),
            slack: slack(values, field.f16_subnormals_kept),
            keep,
            quota: if keep > 0 { request.survivors_max.max(QUOTA_LEAST) } else { request.survivors_max },
            found: Vec::new(),
            overflowed: false,
        }
    }

    fn bar(&self) -> Bar {
        Bar { cut: cut(self.floor, self.slack), quota: u32::try_from(self.quota).unwrap_or(u32::MAX) }
    }

    /// Raises the floor to what the rows found and those `besides` allow, and drops found rows
    /// below it. Whether it rose.
    fn raise(&mut self, besides: &[(f32, u32)]) -> bool {
        if self.keep == 0 || self.found.len() + besides.len() < self.keep {
            return false;
        }
        let mut scores: Vec<f32> = self.found.iter().chain(besides).map(|&(score, _)| score).collect();
        let (_, &mut last, _) = scores.select_nth_unstable_by(self.keep - 1, |a, b| b.total_cmp(a));
        let floor = f64::from(last) - self.slack;
        let rose = floor > self.floor;
        if rose {
            self.floor = floor;
            self.prune();
        }
        rose
    }

    fn prune(&mut self) {
        let cut = self.bar().cut;
        self.found.retain(|&(score, _)| score >= cut);
    }
}

#[cfg(test)]
#[path = "sifting_tests.rs"]
mod tests;
