//! The CPU twin of `shaders/bindings.wgsl`: the structs that host and kernels share, what a row must
//! reach, and how a pair is reported, on plain slices.
//!
//! [`Card`] is what a kernel is bound to; the twins of the kernels scan it. Floats are computed as
//! the kernels do but rounded to nearest throughout, so a twin may differ from a device on pairs
//! that lie within `slack::DEVICE_SLACK` of their bar.

use bytemuck::{Pod, Zeroable};

use super::level::Level;

/// Most probes in one batch; `PROBES_MAX` in the kernels.
pub(super) const PROBES_MAX: usize = 256;
/// A cosine of 1 in the parts that factors have.
pub(super) const COSINE_PARTS: f32 = 65_536.0;

/// One run of slots of one slab; `Slice` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(super) struct Slice {
    /// `vec4<u32>` of a row's code at the level that is scanned.
    pub quads: u32,
    /// First slot in the slab.
    pub slot_first: u32,
    /// One past the last slot in the slab.
    pub slot_end: u32,
    /// Number of the slab's slot 0 among all slots.
    pub slot_base: u32,
    /// Places in the lists of entries.
    pub entries_max: u32,
    /// Parts that are taken off a row's cosine at the scan.
    pub parts_off: u32,
    /// The same at the second look.
    pub look_parts_off: u32,
    /// `vec4<u32>` of the probes before those of the second look.
    pub look_at: u32,
    /// `vec4<u32>` of a row's fine code.
    pub fine_quads: u32,
    /// Length of every sign code.
    pub sign_norm: f32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// What a row must reach for one probe; `Bar` in the kernels, which have the formula.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(super) struct Bar {
    /// What the integer sum is multiplied with.
    pub scale: f32,
    /// What the cosine is multiplied with.
    pub along: f32,
    /// What the sine is multiplied with.
    pub across: f32,
    /// What bounds and roundings take off the bar.
    pub rest: f32,
    /// The integer sum is this and [`Level::factor`] times the dot product.
    pub base: i32,
    /// Entries the probe may store; more are only counted.
    pub quota: u32,
}

/// More than any product of a unit probe, and still far from infinity when it is multiplied.
const EVERYTHING: f32 = 1e30;

impl Bar {
    /// The bar of a padding probe: nothing passes, nothing is stored.
    pub(super) const CLOSED: Self = Self { scale: 0.0, along: 0.0, across: 0.0, rest: -EVERYTHING, base: 0, quota: 0 };

    /// The bar that every row reaches.
    pub(super) fn open(quota: u32) -> Self {
        Self { rest: EVERYTHING, quota, ..Self::CLOSED }
    }
}

/// A (probe, slot) pair that reached its bar; `Entry` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub(super) struct Entry {
    /// Number of the probe in the batch.
    pub probe: u32,
    /// Number of the slot among the slots of all slabs.
    pub slot: u32,
}

/// A row's angle, multiplied by the length of its code, and that length; `Row` in the kernels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    along: f32,
    across: f32,
    norm: f32,
}

/// What a kernel is bound to, in main memory.
pub(super) struct Card<'a> {
    /// Signs or fine codes, as `card.rs` lays them out.
    pub codes: &'a [u32],
    /// Factors of each slot.
    pub factors: &'a [[u32; 2]],
    /// A bit a slot.
    pub live: &'a [u64],
    /// The run.
    pub slice: Slice,
    /// A bar a probe, padding included.
    pub bars: &'a [Bar],
}

impl Card<'_> {
    /// Slots of the run that are live.
    pub(super) fn live_slots(&self) -> impl Iterator<Item = u32> {
        let live = |slot: &u32| self.live[*slot as usize / 64] >> (slot % 64) & 1 == 1;
        (self.slice.slot_first..self.slice.slot_end).filter(live)
    }

    /// Word `word` of quad `quad` of the code at a slot, where a code has `quads`.
    pub(super) fn word(&self, slot: u32, quads: u32, quad: u32, word: u32) -> u32 {
        self.codes[((((slot / 64) * quads + quad) * 64 + slot % 64) * 4 + word) as usize]
    }

    /// `row_of` in the kernels.
    pub(super) fn row(&self, slot: u32, level: Level, parts_off: u32) -> Row {
        let [cosines, square] = self.factors[slot as usize];
        let (parts, norm) = match level {
            Level::OneBit => (cosines & 0xffff, self.slice.sign_norm),
            Level::FourBit => (cosines >> 16, (square.max(1) as f32).sqrt()),
        };
        let parts = parts.max(parts_off) - parts_off;
        let across = ((65_536 - parts) as f32 * (65_536 + parts) as f32).sqrt();
        Row { along: parts as f32 / COSINE_PARTS * norm, across: across / COSINE_PARTS * norm, norm }
    }

    /// The entry of a pair, if it reaches its bar.
    pub(super) fn judge(&self, probe: usize, slot: u32, row: Row, level: Level, dot: i32) -> Option<Entry> {
        let bar = &self.bars[probe];
        let probe = u32::try_from(probe).expect("a batch is small");
        reaches(bar, row, bar.base + level.factor() * dot).then_some(Entry { probe, slot: self.slice.slot_base + slot })
    }
}

/// `reaches` in the kernels.
pub(super) fn reaches(bar: &Bar, row: Row, sum: i32) -> bool {
    bar.scale * sum as f32 >= bar.along * row.along - bar.across * row.across - bar.rest * row.norm
}

/// `spread` in the kernels, of one word.
pub(super) fn spread(word: u32, level: Level, nth: u32) -> u32 {
    match level {
        Level::OneBit => word >> nth & 0x0101_0101,
        Level::FourBit => word >> (4 * nth) & 0x0f0f_0f0f,
    }
}

/// `dot4I8Packed` in WGSL.
pub(super) fn dot4(a: u32, b: u32) -> i32 {
    let of = |word: u32| word.to_le_bytes().map(u8::cast_signed);
    of(a).into_iter().zip(of(b)).map(|(a, b)| i32::from(a) * i32::from(b)).sum()
}
