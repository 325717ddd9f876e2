//! The CPU twin of `shaders/scan_many.wgsl`, on plain slices. For tests and the start-up check.

use super::bindings::{Card, Entry, dot4, spread};
use super::kernels::MANY_PROBES;
use super::level::{Level, QUAD};

/// Every pair of a live slot of the run that reaches its bar, as the kernel would report them without
/// a limit. `packed`: the probes in tiles, as `probe::pack` lays them out, a bar each.
pub(super) fn scan_many(card: &Card<'_>, level: Level, packed: &[u32]) -> Vec<Entry> {
    let quads = card.slice.quads;
    let spreads = level.spreads() as u32;
    let mut entries = Vec::new();
    for slot in card.live_slots() {
        let row = card.row(slot, level, card.slice.parts_off);
        for tile in 0..card.bars.len() / MANY_PROBES {
            let mut sums = [0; MANY_PROBES];
            for (quad, nth) in (0..quads).flat_map(|quad| (0..spreads).map(move |nth| (quad, nth))) {
                let at = ((tile as u32 * quads + quad) * spreads + nth) as usize * MANY_PROBES;
                for word in 0..QUAD {
                    let bytes = spread(card.word(slot, quads, quad, word as u32), level, nth);
                    for (column, sum) in sums.iter_mut().enumerate() {
                        *sum += dot4(bytes, packed[(at + column) * QUAD + word]);
                    }
                }
            }
            let judged = sums.iter().enumerate();
            entries.extend(judged.filter_map(|(c, dot)| card.judge(tile * MANY_PROBES + c, slot, row, level, *dot)));
        }
    }
    entries
}
