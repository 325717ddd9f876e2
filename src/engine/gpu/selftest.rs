//! Does this adapter compute what the kernels say?
//!
//! Scans a small gallery of awkward codes with every kernel and holds what it reports against the CPU
//! twins, before the device may serve. Bars ask for whole numbers here, so that a sum that is off by
//! one is seen; sums are as large as the largest dimension makes them, so that arithmetic that is exact
//! only for small ones is seen too. Knows the device and the twins; keeps nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bindings::{Bar, Card, Entry, Slice, spread};
use super::card::CardCodes;
use super::device::{Batch, Device, LivePiece, Look, Run};
use super::kernels::{Kernel, SLOT_STEP};
use super::level::{Level, QUAD};
use super::look::look;
use super::probe::{self, Quantised};
use super::scan_coop::scan_coop;
use super::scan_few::scan_few;
use super::scan_many::scan_many;
use crate::engine::EngineError;
use crate::model::DIM_MAX;

/// One past the last slot scanned; the ones after it are live and must not be reported.
const SLOT_END: u32 = SLOT_STEP - 7;
/// Number of the trial's slot 0 among all slots.
const SLOT_BASE: u32 = 5 * SLOT_STEP;
/// Places for pairs that it needs: one for each of a batch.
pub(super) const ENTRIES: u32 = SLOT_STEP * BATCH as u32;
/// Probes that are scanned at once in a batch: neither a whole tile of any kernel nor a whole batch.
const BATCH: usize = 70;

/// What an adapter did wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// A command failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A pair was reported that the twin does not report, or one is missing.
    #[error(
        "{kernel:?} {level:?}, {dim} components: {found} pairs where there are {expected}; the first that differs: probe {probe} with slot {slot}"
    )]
    Pairs {
        /// The kernel at fault.
        kernel: Kernel,
        /// The code it scanned.
        level: Level,
        /// Components.
        dim: usize,
        /// Pairs reported.
        found: usize,
        /// Pairs of the twin.
        expected: usize,
        /// The probe of the first pair that only one of the two has.
        probe: u32,
        /// And its slot.
        slot: u32,
    },
    /// A count differs from the twin's.
    #[error("{kernel:?} {level:?}, {dim} components: counts of pairs differ from the pairs")]
    Counts {
        /// The kernel at fault.
        kernel: Kernel,
        /// The code it scanned.
        level: Level,
        /// Components.
        dim: usize,
    },
}

/// A gallery on both sides.
pub(super) struct Trial {
    /// Components.
    pub dim: usize,
    /// Number of its slab.
    pub slab: usize,
    /// Codes and factors of [`SLOT_STEP`] slots.
    pub codes: CardCodes,
    /// Live bits.
    pub live: Vec<u64>,
}

impl Trial {
    /// Makes the gallery and uploads it as the device's next slab, number `slab`.
    pub(super) fn upload(device: &mut Device, slab: usize, dim: usize) -> Result<Self, EngineError> {
        let trial = Self { slab, ..Self::in_memory(dim) };
        device.add_slab(SLOT_STEP, dim)?;
        device.write_codes(slab, 0, &trial.codes)?;
        device.write_live(&[LivePiece { slab, word: 0, words: trial.live.clone() }])?;
        Ok(trial)
    }

    /// The gallery alone.
    pub(super) fn in_memory(dim: usize) -> Self {
        Self { dim, slab: 0, codes: awkward_codes(dim), live: awkward_live() }
    }

    /// What a twin of a scan at `level` is bound to.
    pub(super) fn card<'a>(&'a self, level: Level, bars: &'a [Bar]) -> Card<'a> {
        let dim = self.dim;
        let slice = Slice {
            quads: level.quads(dim) as u32,
            slot_first: 0,
            slot_end: SLOT_END,
            slot_base: SLOT_BASE,
            entries_max: u32::MAX,
            parts_off: 0,
            look_parts_off: 0,
            look_at: 0,
            fine_quads: Level::FourBit.quads(dim) as u32,
            sign_norm: (dim as f32).sqrt(),
            reserved: [0; 2],
        };
        let codes = if level == Level::OneBit { &self.codes.one_bit } else { &self.codes.four_bit };
        Card { codes, factors: &self.codes.factors, live: &self.live, slice, bars }
    }

    /// Bars that ask, of every row, for an integer sum of at least that of one row, or one more: off by
    /// one is seen. The sum is taken off the base, so that what is compared in f32 lies half a step
    /// from the bar however large it was.
    pub(super) fn whole_bars(&self, probes: &[Quantised], level: Level) -> Vec<Bar> {
        const SLOTS: [usize; 8] = [1, 0, 5, 2, 255, 40, 129, 300];
        let norm = if level == Level::OneBit { (self.dim as f32).sqrt() } else { (SQUARE as f32).sqrt() };
        let bar = |(nth, probe): (usize, &Quantised)| {
            let least = self.sum(SLOTS[nth % SLOTS.len()], level, probe) + i32::from(nth % 3 == 2);
            let base = probe.base(level) - least;
            Bar { scale: 1.0, along: 0.0, across: 0.0, rest: 0.5 / norm, base, quota: u32::MAX }
        };
        probes.iter().enumerate().map(bar).collect()
    }

    /// The integer sum of a slot's code and a probe, component by component.
    pub(super) fn sum(&self, slot: usize, level: Level, probe: &Quantised) -> i32 {
        let words = if level == Level::OneBit { &self.codes.one_bit } else { &self.codes.four_bit };
        let quads = level.quads(self.dim);
        let mut sum = 0;
        for quad in 0..quads {
            for word in 0..QUAD {
                let code = words[((slot / 64 * quads + quad) * 64 + slot % 64) * QUAD + word];
                for nth in 0..level.spreads() {
                    for (byte, value) in spread(code, level, nth as u32).to_le_bytes().into_iter().enumerate() {
                        let k = probe.integer(level.component(self.dim, quad, nth, word, byte));
                        sum += i32::from(k) * (level.factor() * i32::from(value));
                    }
                }
            }
        }
        sum + probe.base(level)
    }

    /// Scans with `kernel` on both sides and compares.
    ///
    /// # Errors
    /// The first [`Fault`] found.
    #[expect(clippy::too_many_arguments, reason = "the parts of a batch, and where it runs")]
    pub(super) fn check(
        &self,
        device: &mut Device,
        kernel: Kernel,
        level: Level,
        probes: &[Quantised],
        bars: &[Bar],
        parts_off: u32,
        look_bars: Option<&[Bar]>,
    ) -> Result<usize, Fault> {
        let dim = self.dim;
        let all: Vec<&Quantised> = probes.iter().collect();
        let packed = Arc::new(probe::pack(kernel, level, &all, dim));
        let mut padded = bars.to_vec();
        padded.resize(kernel.padded(probes.len()), Bar::CLOSED);
        let of_scan = self.card(level, &padded);
        let of_scan = Card { slice: Slice { parts_off, ..of_scan.slice }, ..of_scan };
        let scanned = match kernel {
            Kernel::Few { .. } => scan_few(&of_scan, level, &packed),
            Kernel::Many => scan_many(&of_scan, level, &packed),
            Kernel::Coop { .. } => scan_coop(&of_scan, kernel, level, &packed),
        };
        let look_packed = Arc::new(probe::look(Level::FourBit, &all, dim));
        let expected = match look_bars {
            Some(bars) => look(&self.card(Level::FourBit, bars), &look_packed, &scanned),
            None => scanned.clone(),
        };
        let batch = Batch {
            dim,
            kernel,
            level,
            probes: probes.len(),
            packed,
            bars: padded.clone(),
            parts_off,
            look: look_bars.map(|bars| Look { packed: look_packed, bars: bars.to_vec() }),
            runs: vec![Run { slab: self.slab, slot_first: 0, slot_end: SLOT_END, slot_base: SLOT_BASE }],
        };
        device.submit(&batch)?;
        let report = device.collect()?;
        let found: BTreeSet<Entry> = report.entries.iter().copied().collect();
        let wanted: BTreeSet<Entry> = expected.iter().copied().collect();
        let differs = found.symmetric_difference(&wanted).next();
        if let Some(&Entry { probe, slot }) = differs.or(report.entries.get(wanted.len())) {
            let (found, expected) = (report.entries.len(), wanted.len());
            return Err(Fault::Pairs { kernel, level, dim, found, expected, probe, slot });
        }
        let mut counts = vec![0; probes.len()];
        scanned.iter().for_each(|entry| counts[entry.probe as usize] += 1);
        if counts != report.counts || report.stored != scanned.len() as u64 {
            return Err(Fault::Counts { kernel, level, dim });
        }
        Ok(expected.len())
    }
}

/// Checks every kernel.
///
/// # Errors
/// The first [`Fault`] found.
pub(super) fn run(device: &mut Device) -> Result<(), Fault> {
    device.clear()?;
    for (slab, dim) in [96, DIM_MAX].into_iter().enumerate() {
        let trial = Trial::upload(device, slab, dim)?;
        for (kernel, level) in device.kernels() {
            let count = match kernel {
                Kernel::Few { probes } => probes as usize - usize::from(probes > 2),
                // The twin takes its time at the largest dimension.
                Kernel::Many | Kernel::Coop { .. } => BATCH.min(BATCH * 512 / dim),
            };
            let probes = whole_probes(dim, count);
            let bars = trial.whole_bars(&probes, level);
            let look_bars = trial.whole_bars(&probes, Level::FourBit);
            let second = (level == Level::OneBit).then_some(&*look_bars);
            trial.check(device, kernel, level, &probes, &bars, 0, None)?;
            if let Some(second) = second {
                trial.check(device, kernel, level, &probes, &bars, 0, Some(second))?;
            }
        }
    }
    device.clear()?;
    Ok(())
}

/// Squared length that the factors of the trial give every fine code.
const SQUARE: u32 = 4097;

/// A stream of numbers in -1..1, the same on every machine.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = 0x7468_656e_6172_u64 ^ seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let top = i16::from_ne_bytes([(state >> 48) as u8, (state >> 56) as u8]);
        f32::from(top) / 32_768.0
    }
}

/// Codes of noise, and among them the least and the largest there are, and such that cancel.
fn awkward_codes(dim: usize) -> CardCodes {
    let mut next = noise(dim as u64);
    let mut words = |count: usize| -> Vec<u32> {
        (0..count).map(|_| next().to_bits().rotate_left(11) ^ next().to_bits().wrapping_mul(0x9e37_79b9)).collect()
    };
    let slots = SLOT_STEP as usize;
    let mut sign = words(slots * Level::OneBit.row_bytes(dim) / 4);
    let mut fine = words(slots * Level::FourBit.row_bytes(dim) / 4);
    let blocks = [(Level::OneBit, &mut sign), (Level::FourBit, &mut fine)];
    for (level, words) in blocks {
        let quads = level.quads(dim);
        for (slot, pattern) in
            [(0, 0), (1, u32::MAX), (2, 0x0f0f_0f0f), (3, 0xffff_0000), (63, u32::MAX), (64, 0), (255, u32::MAX)]
        {
            for place in 0..quads * 4 {
                words[((slot / 64 * quads + place / 4) * 64 + slot % 64) * 4 + place % 4] = pattern;
            }
        }
    }
    // A cosine of every size.
    let factors = (0..SLOT_STEP).map(|slot| [(slot * 127) | ((65_535 - slot) << 16), SQUARE]).collect();
    CardCodes { one_bit: sign, four_bit: fine, factors }
}

/// All live but some: at both ends of words and of the run.
fn awkward_live() -> Vec<u64> {
    let mut live = vec![u64::MAX; SLOT_STEP as usize / 64];
    for dead in [6_usize, 31, 32, 65, 100, 127, 128, 300, 504] {
        live[dead / 64] &= !(1 << (dead % 64));
    }
    live
}

/// Probes of noise, and the largest integers there are, of one sign and of both.
pub(super) fn whole_probes(dim: usize, count: usize) -> Vec<Quantised> {
    let mut next = noise(count as u64);
    (0..count)
        .map(|number| {
            let values: Vec<f32> = match number {
                0 => vec![1.0; dim],
                1 => (0..dim).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect(),
                _ => (0..dim).map(|_| next()).collect(),
            };
            Quantised::new(&values)
        })
        .collect()
}
