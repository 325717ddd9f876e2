//! The CPU twin of `shaders/scan_few.wgsl`, on plain slices. For tests and the start-up check.

use super::bindings::{Card, Entry, dot4, spread};
use super::level::{Level, QUAD};

/// Every pair of a live slot of the run that reaches its bar, as the kernel would report them without
/// a limit. `few`: the probes as `probe::pack` lays them out, a bar each.
pub(super) fn scan_few(card: &Card<'_>, level: Level, few: &[u32]) -> Vec<Entry> {
    let quads = card.slice.quads;
    let spreads = level.spreads() as u32;
    let each = (quads * spreads) as usize * QUAD;
    let mut entries = Vec::new();
    for slot in card.live_slots() {
        let mut sums = vec![0; card.bars.len()];
        for (quad, nth) in (0..quads).flat_map(|quad| (0..spreads).map(move |nth| (quad, nth))) {
            for word in 0..QUAD as u32 {
                let bytes = spread(card.word(slot, quads, quad, word), level, nth);
                for (probe, sum) in sums.iter_mut().enumerate() {
                    *sum += dot4(bytes, few[probe * each + ((quad * spreads + nth) * QUAD as u32 + word) as usize]);
                }
            }
        }
        let row = card.row(slot, level, card.slice.parts_off);
        entries.extend(sums.iter().enumerate().filter_map(|(probe, dot)| card.judge(probe, slot, row, level, *dot)));
    }
    entries
}
