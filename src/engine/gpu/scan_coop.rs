//! The CPU twin of `shaders/scan_coop.wgsl`, on plain slices. For tests and the start-up check.
//!
//! Sums are f32 here too, from f16 numbers: what must be exact is seen to be. Padding is passed over.

use half::f16;

use super::bindings::{Bar, Card, Entry};
use super::kernels::Kernel;
use super::level::Level;

/// Components unpacked at a time; `CHUNK` in the kernel.
const CHUNK: usize = 32;

/// Every pair of a live slot of the run that reaches its bar, as the kernel would report them without
/// a limit. `packed`: the probes in tiles, as `probe::pack` lays them out for `kernel`, a bar each.
pub(super) fn scan_coop(card: &Card<'_>, kernel: Kernel, level: Level, packed: &[u32]) -> Vec<Entry> {
    let wide = kernel.tile_probes();
    let chunks = card.slice.fine_quads as usize;
    let mut entries = Vec::new();
    for slot in card.live_slots() {
        let row = card.row(slot, level, card.slice.parts_off);
        let unpacked: Vec<[f16; CHUNK]> = (0..chunks).map(|chunk| unpack(card, slot, level, chunk)).collect();
        for tile in 0..card.bars.len() / wide {
            let open = |column: &usize| card.bars[tile * wide + column] != Bar::CLOSED;
            for column in (0..wide).filter(open) {
                let mut sum = 0.0_f32;
                for (chunk, values) in unpacked.iter().enumerate() {
                    let words = &packed[((tile * chunks + chunk) * wide + column) * (CHUNK / 2)..][..CHUNK / 2];
                    let factors = words.iter().flat_map(|word| [*word as u16, (word >> 16) as u16]);
                    for (value, factor) in values.iter().zip(factors) {
                        sum += value.to_f32() * f16::from_bits(factor).to_f32();
                    }
                }
                entries.extend(card.judge(tile * wide + column, slot, row, level, sum as i32));
            }
        }
    }
    entries
}

/// `unpack` in the kernel, both halves: bit after bit of a word of signs; of a quad of the fine code,
/// byte after byte, each the low half first.
fn unpack(card: &Card<'_>, slot: u32, level: Level, chunk: usize) -> [f16; CHUNK] {
    let chunk = chunk as u32;
    std::array::from_fn(|place| {
        let place = place as u32;
        let number = match level {
            Level::OneBit => card.word(slot, card.slice.quads, chunk / 4, chunk % 4) >> place & 1,
            Level::FourBit => {
                let byte = card.word(slot, card.slice.quads, chunk, place / 8) >> (place % 8 / 2 * 8) & 255;
                if place.is_multiple_of(2) { byte & 15 } else { byte >> 4 }
            }
        };
        f16::from_f32(number as f32)
    })
}
