//! The CPU twin of `shaders/sift_few.wgsl`: the same sums in the same order, on plain slices.
//!
//! Knows rows, live bits and bars as the kernel sees them. For tests and the start-up check.

use half::f16;

use super::kernels::{Bar, Entry, FEW_LANES};

/// Every (probe, slot) pair of `slots` live slots that reaches its bar, as the kernel would report
/// them without a limit, and in slot order. `rows`: `[slots, dim]`; `live`: a bit a slot;
/// `probes`: row-major, `[bars.len(), dim]`.
pub(super) fn sift_few(rows: &[f16], live: &[u64], probes: &[f32], bars: &[Bar], dim: usize) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (slot, row) in rows.chunks_exact(dim).enumerate() {
        if live[slot / 64] >> (slot % 64) & 1 == 0 {
            continue;
        }
        for (number, (probe, bar)) in probes.chunks_exact(dim).zip(bars).enumerate() {
            // Eight lanes take every eighth word of eight components; each half word is one sum.
            let mut lanes = [0.0_f32; FEW_LANES as usize];
            for (word, (values, factors)) in row.chunks_exact(8).zip(probe.chunks_exact(8)).enumerate() {
                let half = |at: usize| {
                    (at..at + 4).map(|i| values[i].to_f32() * factors[i]).fold(0.0_f32, |sum, product| sum + product)
                };
                lanes[word % FEW_LANES as usize] += half(0) + half(4);
            }
            let score = lanes.iter().fold(0.0_f32, |sum, lane| sum + lane);
            if score >= bar.cut {
                entries.push(entry(number, slot, score));
            }
        }
    }
    entries
}

/// An entry of the kernels' u32 numbers.
pub(super) fn entry(probe: usize, slot: usize, score: f32) -> Entry {
    let number = |n: usize| u32::try_from(n).expect("probes and slots are counted in u32");
    Entry { probe: number(probe), slot: number(slot), score }
}
