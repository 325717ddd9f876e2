//! How many slots does a scan take at once, and which code is worth scanning?
//!
//! Both follow from how many pairs are expected to reach their bounds: by the bound of a row with a usual
//! cosine, among rows whose scores are distributed normally, and by what came of it so far. Pure arithmetic.

use crate::engine::gpu::bounds::DeviceBounds;
use crate::engine::gpu::device::kernels::SLOT_STEP;
use crate::engine::gpu::device::layout::Level;
use crate::engine::quantised_probe::QuantisedProbe;

/// 1-bit codes are scanned if at most one row in so many is expected to pass: a pair that passes is refined
/// by four times the bytes, which lie anywhere.
const ONE_BIT_PASSES_ONE_OF: f64 = 48.0;

/// What the device can take at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Components of a row.
    pub(crate) dim: usize,
    /// Places for pairs.
    pub(crate) entries_max: u32,
    /// Products of a component of a probe and one of a code.
    pub(crate) products_max: u64,
}

impl Limits {
    /// The one rule for slices: as many slots as the device may scan in one batch, and of which twice the
    /// pairs would fit that are expected per slot, over all probes. A multiple of [`SLOT_STEP`], at least one.
    pub(crate) fn slice_slots(&self, probes: usize, pairs_per_slot: f64) -> u32 {
        let room = f64::from(self.entries_max) / 2.0 / pairs_per_slot.max(1e-12);
        let most = self.products_max / (probes * self.dim) as u64;
        let slots = room.min(most.min(u64::from(u32::MAX - SLOT_STEP)) as f64) as u32;
        (slots / SLOT_STEP * SLOT_STEP).max(SLOT_STEP)
    }
}

/// How many rows pass a scan.
pub(super) struct Expectations {
    deviation: f64,
    /// How many times as many pairs passed as expected, by level.
    ratio: [f64; 2],
}

impl Expectations {
    pub(super) fn new(dim: usize) -> Self {
        Self { deviation: 2.0 / (dim as f64).sqrt(), ratio: [1.0; 2] }
    }

    /// The part of the rows that is expected to pass a scan.
    pub(super) fn passing(&self, bounds: &DeviceBounds, level: Level, probe: &QuantisedProbe, floor: f64) -> f64 {
        match bounds.usual_least_product(level, probe, floor) {
            Some(least) => (normal_tail(least / self.deviation) * self.ratio[level.index()]).min(1.0),
            None => 1.0,
        }
    }

    /// Whether scanning 1-bit codes is worth it for a probe.
    pub(super) fn one_bit_pays(&self, bounds: &DeviceBounds, probe: &QuantisedProbe, floor: f64) -> bool {
        bounds.randomised() && self.passing(bounds, Level::OneBit, probe, floor) * ONE_BIT_PASSES_ONE_OF < 1.0
    }

    /// Learns from a scan in which `passed` pairs passed where `expected` were expected.
    pub(super) fn learn(&mut self, level: Level, passed: u64, expected: f64) {
        let ratio = &mut self.ratio[level.index()];
        // Zeroed slots and luck make it less, so it sinks slowly; what there was is expected again.
        let measured = *ratio * (passed as f64 + 1.0) / (expected + 1.0);
        *ratio = measured.max(*ratio / 2.0).clamp(1e-3, 1e9);
    }
}

/// The probability that a standard normal variable is above `z`.
fn normal_tail(z: f64) -> f64 {
    0.5 * libm::erfc(z / std::f64::consts::SQRT_2)
}

/// The number that a standard normal variable is above with `probability`, to a thousandth.
pub(super) fn normal_quantile(probability: f64) -> f64 {
    let (mut low, mut high) = (-6.0, 8.0);
    for _ in 0..16 {
        let middle = 0.5 * (low + high);
        if normal_tail(middle) > probability { low = middle } else { high = middle }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_whole_steps_that_fit_products_and_pairs_and_are_never_empty() {
        let limits = Limits { dim: 512, entries_max: 1 << 20, products_max: 1 << 37 };
        assert_eq!(limits.slice_slots(1, 0.0), 1 << 28);
        assert_eq!(limits.slice_slots(256, 1e-9), 1 << 20);
        assert_eq!(limits.slice_slots(256, 1.0), 1 << 19);
        assert_eq!(limits.slice_slots(256, 256.0), 2048);
        assert_eq!(limits.slice_slots(256, 1e9), SLOT_STEP);
        let wide = Limits { dim: 32, entries_max: u32::MAX, products_max: u64::MAX };
        assert_eq!(wide.slice_slots(1, 0.0) % SLOT_STEP, 0);
        let narrow = Limits { dim: 2048, entries_max: 512, products_max: 1 };
        assert_eq!(narrow.slice_slots(256, 0.0), SLOT_STEP);
    }
}
