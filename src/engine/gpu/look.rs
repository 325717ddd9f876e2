//! The CPU twin of `shaders/look.wgsl`, on plain slices. For tests and the start-up check.

use super::bindings::{Card, Entry, dot4};
use super::level::{Level, QUAD};

/// Those of `entries` whose slots are in the run and whose fine code reaches the bar of the second
/// look. `card`: of fine codes, its bars those of the second look; `probes`: as `probe::look` lays
/// them out.
pub(super) fn look(card: &Card<'_>, probes: &[u32], entries: &[Entry]) -> Vec<Entry> {
    let quads = card.slice.fine_quads;
    let passes = |entry: &&Entry| {
        let slot = entry.slot.wrapping_sub(card.slice.slot_base);
        if !(card.slice.slot_first..card.slice.slot_end).contains(&slot) {
            return false;
        }
        let mut dot = 0;
        for quad in 0..quads {
            for word in 0..QUAD as u32 {
                let code = card.word(slot, quads, quad, word);
                let at = ((entry.probe * quads + quad) * 2 * QUAD as u32 + word) as usize;
                dot += dot4(code & 0x0f0f_0f0f, probes[at]);
                dot += dot4(code >> 4 & 0x0f0f_0f0f, probes[at + QUAD]);
            }
        }
        let row = card.row(slot, Level::FourBit, card.slice.look_parts_off);
        card.judge(entry.probe as usize, slot, row, Level::FourBit, dot).is_some()
    };
    entries.iter().filter(passes).copied().collect()
}
