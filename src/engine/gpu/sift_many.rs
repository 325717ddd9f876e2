//! The CPU twin of `shaders/sift_many.wgsl`: the same sums in the same order, on plain slices.
//!
//! Reads the probes in the packed tiles that the kernel reads. For tests and the start-up check.

use half::f16;

use super::kernels::{Bar, Entry};
use super::sift_few::entry;

/// Every (probe, slot) pair of live slots that reaches its bar, as the kernel would report them
/// without a limit, by slot and then probe. `rows`: `[slots, dim]`; `live`: a bit a slot;
/// `packed`: tiles of `tile_probes` probes, component after component; `bars`: one a packed probe.
pub(super) fn sift_many(
    rows: &[f16],
    live: &[u64],
    packed: &[f32],
    tile_probes: usize,
    bars: &[Bar],
    dim: usize,
) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (slot, row) in rows.chunks_exact(dim).enumerate() {
        if live[slot / 64] >> (slot % 64) & 1 == 0 {
            continue;
        }
        for (tile, probes) in packed.chunks_exact(tile_probes * dim).enumerate() {
            // One product after the other, straight into the sum.
            let mut sums = vec![0.0_f32; tile_probes];
            for (value, factors) in row.iter().zip(probes.chunks_exact(tile_probes)) {
                for (sum, factor) in sums.iter_mut().zip(factors) {
                    *sum += value.to_f32() * factor;
                }
            }
            for (column, &score) in sums.iter().enumerate() {
                let probe = tile * tile_probes + column;
                if score >= bars[probe].cut {
                    entries.push(entry(probe, slot, score));
                }
            }
        }
    }
    entries
}
