// What every kernel is bound to, what a row must reach, and how a survivor is reported. Put before
// each kernel's own text by `src/engine/gpu/kernels.rs` and by the build script; no kernel of its own.
// Twin: `src/engine/gpu/bindings.rs`; a test reflects this file with naga and compares sizes,
// offsets and bindings. `probes` is declared by the kernels, which read it as different types.

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
    // Places in `entries` and in `passed`.
    entries_max: u32,
    // Parts (of 65,536) that are taken off a row's cosine, for the row's own rounding: at the scan,
    // and at the second look.
    parts_off: u32,
    look_parts_off: u32,
    // vec4<u32> of `probes` before those of the second look.
    look_at: u32,
    // vec4<u32> of a row's fine code.
    fine_quads: u32,
    // Length of every sign code.
    sign_norm: f32,
    reserved_0: u32,
    reserved_1: u32,
}

// What a row must reach for one probe.
struct Bar {
    // <q, c> is at most scale * (the integer sum), but for what `rest` has.
    scale: f32,
    // The bar of <q, c> for a code of length n is n * (along * cosine - across * sine - rest).
    along: f32,
    across: f32,
    rest: f32,
    // The integer sum is base + factor * dot, for the unsigned integers that codes are kept as.
    base: i32,
    // Entries the probe may store; more are only counted.
    quota: u32,
}

// A (probe, slot) pair that reached its bar.
struct Entry {
    probe: u32,
    slot: u32,
}

struct Tally {
    // Entries asked to be stored, those that found no place included.
    stored: atomic<u32>,
    // Entries that passed the second look.
    passed: atomic<u32>,
    // Pairs that reached the bar of the scan, by probe, stored or not.
    counts: array<atomic<u32>>,
}

// A row's leaning and the length of its code, the former multiplied by the latter.
struct Row {
    along: f32,
    across: f32,
    norm: f32,
}

// Whether fine codes are scanned, rather than signs.
override FINE: bool = false;

// Most probes in a batch: the bars of the second look come after as many bars of the scan.
const PROBES_MAX: u32 = 256u;

// Codes lie in blocks of 64 rows; in a block, quad after quad, the vec4<u32> of 64 rows. A quad of
// signs has 128 components: bit 8b + s of word j is component 128 quad + 32 j + 8 b + s, set where
// it is negative. A quad of the fine code has 32: with h = dim / 2, bits 4s to 4s + 3 of byte b of
// word j are component s h + 16 quad + 4 j + b, as (c + 15) / 2.
@group(0) @binding(0) var<storage, read> codes: array<vec4<u32>>;
// Of each slot, the cosines of sign (low half) and fine code in parts of 65,536, and the squared
// length of the fine code.
@group(0) @binding(1) var<storage, read> terms: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> live: array<u32>;
@group(1) @binding(0) var<uniform> slice: Slice;
@group(1) @binding(3) var<storage, read> bars: array<Bar>;
@group(1) @binding(4) var<storage, read_write> tally: Tally;
@group(1) @binding(5) var<storage, read_write> entries: array<Entry>;

fn is_live(slot: u32) -> bool {
    return ((live[slot >> 5u] >> (slot & 31u)) & 1u) == 1u;
}

// The row of a slot. Everything under the root is exact but one product.
fn row_of(slot: u32, fine: bool, parts_off: u32) -> Row {
    let about = terms[slot];
    let parts = max(select(about.x & 0xffffu, about.x >> 16u, fine), parts_off) - parts_off;
    let norm = select(slice.sign_norm, sqrt(f32(max(about.y, 1u))), fine);
    let across = sqrt(f32(65536u - parts) * f32(65536u + parts));
    return Row(f32(parts) * 0.0000152587890625 * norm, across * 0.0000152587890625 * norm, norm);
}

// Whether a pair reaches its bar; `sum` is exact.
fn reaches(bar: Bar, row: Row, sum: i32) -> bool {
    return bar.scale * f32(sum) >= bar.along * row.along - bar.across * row.across - bar.rest * row.norm;
}

// Four times four components at a time, as bytes, of a quad: 8 times for signs, twice for fine codes.
fn spread(code: vec4<u32>, nth: u32) -> vec4<u32> {
    if FINE {
        return (code >> vec4<u32>(4u * nth)) & vec4<u32>(0x0f0f0f0fu);
    }
    return (code >> vec4<u32>(nth)) & vec4<u32>(0x01010101u);
}

fn products(bytes: vec4<u32>, probe: vec4<u32>) -> i32 {
    return dot4I8Packed(bytes.x, probe.x) + dot4I8Packed(bytes.y, probe.y)
        + dot4I8Packed(bytes.z, probe.z) + dot4I8Packed(bytes.w, probe.w);
}

// Reports a pair of a live slot of the run if it reaches its bar. Counts it in any case, so that the
// host knows what did not fit.
fn judge(probe: u32, slot: u32, row: Row, dot: i32) {
    let bar = bars[probe];
    if reaches(bar, row, bar.base + select(-2, 2, FINE) * dot) {
        let nth = atomicAdd(&tally.counts[probe], 1u);
        if nth < bar.quota {
            let at = atomicAdd(&tally.stored, 1u);
            if at < slice.entries_max {
                entries[at] = Entry(probe, slice.slot_base + slot);
            }
        }
    }
}
