// What every kernel is bound to, what a row must reach, and how a pair is reported. The build script puts
// this before each kernel's own text; it is no kernel of its own.
//
// Structs: `src/engine/gpu/device/bindings.rs`; a test reflects this file with naga and compares sizes, offsets
// and bindings. Twin of `row_of` and `reaches`: `src/engine/gpu/twin.rs`. Layout of codes:
// `src/engine/gpu/device/layout.rs`. The kernels declare `probes`, which they read as different types.

// One run of slots of one slab.
struct Slice {
    // vec4<u32> of a row's code at the level that is scanned.
    quads: u32,
    // First slot of the run in the slab, a multiple of SLOT_STEP.
    slot_first: u32,
    // One past the last slot of the run in the slab.
    slot_end: u32,
    // Number of the slab's slot 0 among the slots of all slabs.
    slot_base: u32,
    // Places in `entries` and in `refined`.
    entries_max: u32,
    // Parts (of 65,536) that the scan takes off a row's cosine, for the row's own rounding.
    loss_parts: u32,
    // vec4<u32> of `probes` before those of the refinement.
    refine_at: u32,
    // vec4<u32> of a row's 4-bit code.
    four_bit_quads: u32,
    // Length of every 1-bit code.
    one_bit_norm: f32,
    reserved_0: u32,
    reserved_1: u32,
    reserved_2: u32,
}

// What a row must reach for one probe.
struct Bound {
    // <q, c> is at most scale * (the integer sum), but for what `slack` has.
    scale: f32,
    // The bound of <q, c> for a code of length n is n * (along * cosine - across * sine - slack).
    along: f32,
    across: f32,
    slack: f32,
    // The integer sum is base + factor * dot, for the unsigned integers that codes are kept as.
    base: i32,
    // Entries that the probe may store; more are only counted.
    quota: u32,
}

// A (probe, slot) pair that reached its bound.
struct Entry {
    probe: u32,
    slot: u32,
}

struct Tally {
    // Entries that were to be stored, including those that found no place.
    stored: atomic<u32>,
    // Entries that passed the refinement.
    refined: atomic<u32>,
    // Pairs that reached the bound of the scan, by probe, stored or not.
    counts: array<atomic<u32>>,
}

// Cosine and sine between a row and its code, both multiplied by the length of the code, and that length.
struct Row {
    along: f32,
    across: f32,
    norm: f32,
}

// Whether 4-bit codes are scanned, rather than 1-bit codes.
override FOUR_BIT: bool = false;

// Most probes in a batch: the bounds of the refinement come after as many bounds of the scan.
const PROBES_MAX: u32 = 256u;

// Codes lie in blocks of 64 rows; in a block, quad after quad, the vec4<u32> of 64 rows. A quad of 1-bit
// codes has 128 components: bit 8b + s of word j is component 128 quad + 32 j + 8 b + s, set if it is
// negative. A quad of 4-bit codes has 32: with h = dim / 2, bits 4s to 4s + 3 of byte b of word j are
// component s h + 16 quad + 4 j + b, as (c + 15) / 2.
@group(0) @binding(0) var<storage, read> codes: array<vec4<u32>>;
// Of each slot, the cosines of the 1-bit code (low half) and the 4-bit code in parts of 65,536, and the
// squared length of the 4-bit code.
@group(0) @binding(1) var<storage, read> factors: array<vec2<u32>>;
@group(1) @binding(0) var<uniform> slice: Slice;
@group(1) @binding(3) var<storage, read> bounds: array<Bound>;
@group(1) @binding(4) var<storage, read_write> tally: Tally;
@group(1) @binding(5) var<storage, read_write> entries: array<Entry>;

// The row of a slot. Everything under the root is exact but one product.
fn row_of(slot: u32, four_bit: bool, loss_parts: u32) -> Row {
    let about = factors[slot];
    // A zeroed slot has no row, or an erased one; no code has length 0. It never reaches the bound of a
    // certified floor, by the arithmetic that `src/engine/gpu/bounds.rs` explains.
    if about.y == 0u {
        return Row(1e30, 0.0, 1.0);
    }
    let parts = max(select(about.x & 0xffffu, about.x >> 16u, four_bit), loss_parts) - loss_parts;
    let norm = select(slice.one_bit_norm, sqrt(f32(about.y)), four_bit);
    let across = sqrt(f32(65536u - parts) * f32(65536u + parts));
    return Row(f32(parts) * 0.0000152587890625 * norm, across * 0.0000152587890625 * norm, norm);
}

// Whether a pair reaches its bound; `sum` is exact.
fn reaches(bound: Bound, row: Row, sum: i32) -> bool {
    return bound.scale * f32(sum) >= bound.along * row.along - bound.across * row.across - bound.slack * row.norm;
}

// Four times four components of a quad at a time, as bytes: 8 times for 1-bit codes, twice for 4-bit codes.
fn spread(code: vec4<u32>, nth: u32) -> vec4<u32> {
    if FOUR_BIT {
        return (code >> vec4<u32>(4u * nth)) & vec4<u32>(0x0f0f0f0fu);
    }
    return (code >> vec4<u32>(nth)) & vec4<u32>(0x01010101u);
}

fn products(bytes: vec4<u32>, probe: vec4<u32>) -> i32 {
    return dot4I8Packed(bytes.x, probe.x) + dot4I8Packed(bytes.y, probe.y)
        + dot4I8Packed(bytes.z, probe.z) + dot4I8Packed(bytes.w, probe.w);
}

// Reports a pair of a slot of the run if it reaches its bound. Counts it in any case, so that the host knows
// how many did not fit.
fn report(probe: u32, slot: u32, row: Row, dot: i32) {
    let bound = bounds[probe];
    if reaches(bound, row, bound.base + select(-2, 2, FOUR_BIT) * dot) {
        let nth = atomicAdd(&tally.counts[probe], 1u);
        if nth < bound.quota {
            let at = atomicAdd(&tally.stored, 1u);
            if at < slice.entries_max {
                entries[at] = Entry(probe, slice.slot_base + slot);
            }
        }
    }
}
