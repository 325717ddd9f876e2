//! Does this adapter compute what the kernels say?
//!
//! Scans a small gallery of awkward codes with every kernel and compares what it reports with the CPU twin,
//! before the device may serve. Bounds ask for whole numbers here, so that a sum that is off by one shows;
//! sums are as large as the largest dimension makes them, so that arithmetic that is exact only for small
//! ones shows too. Knows the device and the twin; keeps nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use thenar_index::codes::{Factors, OwnedCodes, four_bit_bytes, one_bit_bytes};

use super::Device;
use super::batch::{Batch, Refinement, Run};
use super::bindings::{DeviceBound, Entry};
use super::kernels::{Kernel, SLOT_STEP};
use super::layout::{self, DeviceCodes, Level};
use crate::engine::EngineError;
use crate::engine::gpu::twin::Twin;
use crate::engine::quantised_probe::QuantisedProbe;
use crate::model::DIM_MAX;

/// One past the last slot scanned; the ones after it have rows, which must not be reported.
const SLOT_END: u32 = SLOT_STEP - 7;
/// Number of the trial's slot 0 among all slots.
pub(crate) const SLOT_BASE: u32 = 5 * SLOT_STEP;
/// Places for pairs that it needs: one for each of a batch.
pub(super) const ENTRIES: u32 = SLOT_STEP * BATCH as u32;
/// Probes that are scanned at once in a batch: neither a whole tile of any kernel nor a whole batch.
const BATCH: usize = 70;
/// Squared length that the factors of the trial give every 4-bit code.
const SQUARE: u32 = 4097;
/// Erased rows, whose factors are zero: at both ends of blocks and of the run.
const EMPTY: [u32; 9] = [6, 31, 32, 65, 100, 127, 128, 303, 504];

/// What an adapter did wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// A command failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A pair was reported that the twin does not report, or one is missing.
    #[error(
        "{kernel:?} {level:?}, {dim} components: {found} pairs instead of {expected}; the first that differs: probe {probe} with slot {slot}"
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
pub(crate) struct Trial {
    dim: usize,
    /// Index of its slab.
    slab: usize,
    /// What the device is expected to have.
    pub(crate) twin: Twin,
}

/// What a scan and a refinement of a trial ask for.
pub(crate) struct Ask<'a> {
    pub(crate) probes: &'a [QuantisedProbe],
    pub(crate) bounds: &'a [DeviceBound],
    pub(crate) loss_parts: u32,
    pub(crate) refine_bounds: Option<&'a [DeviceBound]>,
}

impl Trial {
    /// Makes the gallery and uploads it as the device's next slab, which has the index `slab`.
    pub(crate) fn upload(device: &mut Device, slab: usize, dim: usize) -> Result<Self, EngineError> {
        let codes = awkward_codes(dim);
        device.add_slab(SLOT_STEP, dim)?;
        device.write_codes(slab, 0, &DeviceCodes::new(&codes.as_codes(), dim))?;
        Ok(Self { dim, slab, twin: Twin::new(&codes.as_codes(), dim, SLOT_BASE) })
    }

    /// Bounds that ask, of every row, for an integer sum of at least that of one row, or one more: off by one
    /// shows. The sum is taken off the base, so that what is compared in f32 lies half a step from the bound
    /// however large it was.
    /// `along` is nothing for a row, and too much for a zeroed slot, which must not be reported.
    pub(crate) fn whole_bounds(&self, probes: &[QuantisedProbe], level: Level) -> Vec<DeviceBound> {
        const SLOTS: [u32; 8] = [1, 0, 5, 2, 255, 40, 129, 300];
        let norm = if level == Level::OneBit { (self.dim as f32).sqrt() } else { (SQUARE as f32).sqrt() };
        let bound = |(nth, probe): (usize, &QuantisedProbe)| {
            let least = self.twin.sum(SLOTS[nth % SLOTS.len()], level, probe) + i32::from(nth % 3 == 2);
            let base = level.base(probe) - least;
            DeviceBound { scale: 1.0, along: 1e-20, across: 0.0, slack: 0.5 / norm, base, quota: u32::MAX }
        };
        probes.iter().enumerate().map(bound).collect()
    }

    /// Scans with `kernel` on both sides and compares.
    ///
    /// # Errors
    /// The first [`Fault`] found.
    pub(crate) fn check(
        &self,
        device: &mut Device,
        kernel: Kernel,
        level: Level,
        ask: &Ask<'_>,
    ) -> Result<usize, Fault> {
        let dim = self.dim;
        let probes: Vec<&QuantisedProbe> = ask.probes.iter().collect();
        let scanned = self.twin.scan(0..SLOT_END, level, &probes, ask.bounds, ask.loss_parts);
        let expected: BTreeSet<Entry> = match ask.refine_bounds {
            Some(bounds) => self.twin.refine(&scanned, &probes, bounds).into_iter().collect(),
            None => scanned.iter().copied().collect(),
        };
        let in_flight = device.submit(&Batch {
            dim,
            kernel,
            level,
            probes: probes.len(),
            packed: Arc::new(layout::pack(kernel, level, &probes, dim)),
            bounds: ask.bounds.to_vec(),
            loss_parts: ask.loss_parts,
            refinement: ask.refine_bounds.map(|bounds| Refinement {
                packed: Arc::new(layout::pack_rows(Level::FourBit, &probes, dim)),
                bounds: bounds.to_vec(),
            }),
            runs: vec![Run { slab: self.slab, slot_first: 0, slot_end: SLOT_END, slot_base: SLOT_BASE }],
        })?;
        let (report, lane) = in_flight.collect()?;
        device.return_lane(lane);
        let found: BTreeSet<Entry> = report.entries.iter().copied().collect();
        let differs = found.symmetric_difference(&expected).next();
        if let Some(&Entry { probe, slot }) = differs.or(report.entries.get(expected.len())) {
            let (found, expected) = (report.entries.len(), expected.len());
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
                Kernel::Many | Kernel::Coop => BATCH.min(BATCH * 512 / dim),
            };
            let probes = whole_probes(dim, count);
            let (bounds, refine_bounds) =
                (trial.whole_bounds(&probes, level), trial.whole_bounds(&probes, Level::FourBit));
            let ask = Ask { probes: &probes, bounds: &bounds, loss_parts: 0, refine_bounds: None };
            trial.check(device, kernel, level, &ask)?;
            if level == Level::OneBit {
                trial.check(device, kernel, level, &Ask { refine_bounds: Some(&refine_bounds), ..ask })?;
            }
        }
    }
    device.clear()?;
    Ok(())
}

/// A stream of numbers, the same on every machine.
fn noise(seed: u64) -> impl FnMut() -> i16 {
    let mut state = 0x7468_656e_6172_u64 ^ seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        i16::from_ne_bytes([(state >> 48) as u8, (state >> 56) as u8])
    }
}

/// Codes of [`SLOT_STEP`] slots: of noise, and among them the least and the largest there are, and such that
/// cancel.
pub(super) fn awkward_codes(dim: usize) -> OwnedCodes {
    let mut codes = OwnedCodes::zeroed(dim, SLOT_STEP as usize);
    let mut next = noise(dim as u64);
    codes.one_bit.iter_mut().chain(&mut codes.four_bit).for_each(|byte| *byte = (next() >> 4) as u8);
    for (slot, pattern) in [(0, 0), (1, 255), (2, 0x0f), (3, 0xf0), (63, 255), (64, 0), (255, 255)] {
        let block = &mut codes.one_bit[slot / 64 * one_bit_bytes(dim)..][..one_bit_bytes(dim)];
        block.iter_mut().skip(slot % 64).step_by(64).for_each(|byte| *byte = pattern);
        codes.four_bit[slot * four_bit_bytes(dim) / 64..][..dim / 2].fill(pattern);
    }
    for (slot, factors) in (0..SLOT_STEP).zip(&mut codes.factors).filter(|(slot, _)| !EMPTY.contains(slot)) {
        // Cosines of every size: of the 1-bit code in the low half of the first word, of the 4-bit code in
        // that of the second. Then the squared length of the 4-bit code.
        *factors = bytemuck::cast::<[u32; 3], Factors>([slot * 127, 65_535 - slot, SQUARE]);
    }
    codes
}

/// Probes of noise, and the largest integers there are, of one sign and of both.
pub(crate) fn whole_probes(dim: usize, count: usize) -> Vec<QuantisedProbe> {
    let mut next = noise(count as u64);
    (0..count)
        .map(|number| {
            let values: Vec<f32> = match number {
                0 => vec![1.0; dim],
                1 => (0..dim).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect(),
                _ => (0..dim).map(|_| f32::from(next()) / 32_768.0).collect(),
            };
            QuantisedProbe::new(&values)
        })
        .collect()
}
