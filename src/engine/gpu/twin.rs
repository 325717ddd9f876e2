//! The CPU twin of all kernels: which pairs each of them must report, bit for bit.
//!
//! Sums are made component by component, from codes as files keep them and probes as they were quantised,
//! so that a fault in a kernel, in the layout of codes on the device or in the packing of probes differs
//! from the twin. Floats are computed as `row_of` and `reaches` in `shaders/bindings.wgsl` do, but rounded
//! to nearest, so a device may differ on pairs within `bounds::DEVICE_SLACK` of their bound. For tests and
//! for the self-test of a device; slow.

use std::ops::Range;

use thenar_index::codes::{BLOCK_ROWS, Codes, Factors};

use super::device::bindings::{COSINE_PARTS, DeviceBound, EVERYTHING, Entry};
use super::device::layout::Level;
use crate::engine::quantised_probe::QuantisedProbe;

/// Codes of a slab in main memory.
pub(crate) struct Twin {
    dim: usize,
    /// For each level, the components of every slot's code. Shape: `[slots, dim]`.
    components: [Vec<i8>; 2],
    factors: Vec<Factors>,
    /// Number of slot 0 among the slots of all slabs.
    slot_base: u32,
}

/// A row's angle, multiplied by the length of its code, and that length; `Row` in the kernels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    along: f32,
    across: f32,
    norm: f32,
}

impl Twin {
    pub(crate) fn new(codes: &Codes<'_>, dim: usize, slot_base: u32) -> Self {
        let components = Level::ALL.map(|level| {
            let places = (0..codes.rows()).flat_map(|slot| (0..dim).map(move |i| (slot, i)));
            places.map(|(slot, i)| component(codes, dim, level, slot, i)).collect()
        });
        Self { dim, components, factors: codes.factors.to_vec(), slot_base }
    }

    /// The product of a slot's code and a probe, both of whole numbers.
    pub(crate) fn sum(&self, slot: u32, level: Level, probe: &QuantisedProbe) -> i32 {
        let code = &self.components[level.index()][slot as usize * self.dim..][..self.dim];
        code.iter().zip(probe.integers()).map(|(c, k)| i32::from(*c) * i32::from(*k)).sum()
    }

    /// Every pair of those slots and probes that reaches its bound, as any of the scans reports them.
    pub(crate) fn scan(
        &self,
        slots: Range<u32>,
        level: Level,
        probes: &[&QuantisedProbe],
        bounds: &[DeviceBound],
        loss_parts: u32,
    ) -> Vec<Entry> {
        let mut entries = Vec::new();
        for slot in slots {
            let row = self.row(slot, level, loss_parts);
            for (number, (probe, bound)) in (0..).zip(probes.iter().zip(bounds)) {
                if reaches(bound, row, bound.base - level.base(probe) + self.sum(slot, level, probe)) {
                    entries.push(Entry { probe: number, slot: self.slot_base + slot });
                }
            }
        }
        entries
    }

    /// Those of a scan's pairs whose 4-bit codes reach the bounds of the refinement.
    pub(crate) fn refine(&self, entries: &[Entry], probes: &[&QuantisedProbe], bounds: &[DeviceBound]) -> Vec<Entry> {
        let refined = |entry: &&Entry| {
            let (slot, probe) = (entry.slot - self.slot_base, entry.probe as usize);
            !self.scan(slot..slot + 1, Level::FourBit, &probes[probe..=probe], &bounds[probe..=probe], 0).is_empty()
        };
        entries.iter().filter(refined).copied().collect()
    }

    /// `row_of` in the kernels.
    fn row(&self, slot: u32, level: Level, loss_parts: u32) -> Row {
        row_of(self.factors[slot as usize], self.dim, level, loss_parts)
    }
}

/// `row_of` in the kernels.
pub(crate) fn row_of(factors: Factors, dim: usize, level: Level, loss_parts: u32) -> Row {
    if factors.four_bit_square() == 0 {
        return Row { along: EVERYTHING, across: 0.0, norm: 1.0 };
    }
    let (cosine, square) = match level {
        Level::OneBit => (factors.one_bit_cosine(), dim as u32),
        Level::FourBit => (factors.four_bit_cosine(), factors.four_bit_square()),
    };
    // Stored cosines are whole parts, so this product is exact.
    let parts = ((cosine * COSINE_PARTS) as u32).max(loss_parts) - loss_parts;
    let norm = (square as f32).sqrt();
    let across = ((65_536 - parts) as f32 * (65_536 + parts) as f32).sqrt();
    Row { along: parts as f32 / COSINE_PARTS * norm, across: across / COSINE_PARTS * norm, norm }
}

/// `reaches` in the kernels.
pub(crate) fn reaches(bound: &DeviceBound, row: Row, sum: i32) -> bool {
    bound.scale * sum as f32 >= bound.along * row.along - bound.across * row.across - bound.slack * row.norm
}

/// A component of a row's code, as `thenar_index::codes` keeps it.
pub(crate) fn component(codes: &Codes<'_>, dim: usize, level: Level, row: usize, i: usize) -> i8 {
    match level {
        Level::OneBit => {
            let line = row / BLOCK_ROWS * dim / 8 + i / 8;
            let is_negative = codes.one_bit[line * BLOCK_ROWS + row % BLOCK_ROWS] >> (i % 8) & 1;
            1 - 2 * is_negative.cast_signed()
        }
        Level::FourBit => {
            let byte = codes.four_bit[row * dim / 2 + i % (dim / 2)];
            let nibble = if i < dim / 2 { byte & 15 } else { byte >> 4 };
            2 * nibble.cast_signed() - 15
        }
    }
}
