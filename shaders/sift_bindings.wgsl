// What every sifting kernel is bound to, and how it reports a survivor. Put before each kernel's
// own text by `src/engine/gpu/kernels.rs` and by the build script; no kernel of its own.
//
// The Rust sides of these structs live in `kernels.rs`; a test reflects this file with naga and
// compares sizes, offsets and bindings.

// One run of slots of one slab.
struct Slice {
    // vec4<u32> words of a row: eight f16 components each.
    row_words: u32,
    // First slot of the run in the slab, a multiple of SLOT_STEP.
    slot_first: u32,
    // One past the last slot of the run in the slab.
    slot_end: u32,
    // Number of the slab's slot 0 among the slots of all slabs.
    slot_base: u32,
    // Places in `entries`.
    entries_max: u32,
    reserved_0: u32,
    reserved_1: u32,
    reserved_2: u32,
}

// What a row must reach for one probe.
struct Bar {
    // The probe's floor less the slack of f32 arithmetic.
    cut: f32,
    // Entries the probe may store; more are only counted.
    quota: u32,
}

// A (probe, slot) pair that reached its bar.
struct Entry {
    probe: u32,
    slot: u32,
    score: f32,
}

struct Tally {
    // Entries asked to be stored, those that found no place included.
    stored: atomic<u32>,
    // Pairs that reached the bar, by probe, stored or not.
    counts: array<atomic<u32>>,
}

@group(0) @binding(0) var<uniform> slice: Slice;
@group(0) @binding(1) var<storage, read> rows: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> live: array<u32>;
@group(0) @binding(3) var<storage, read> probes: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> bars: array<Bar>;
@group(0) @binding(5) var<storage, read_write> tally: Tally;
@group(0) @binding(6) var<storage, read_write> entries: array<Entry>;

// Stores the pair if its score reaches the cut and the slot is live and within the run. Counts it
// in any case, so that the host knows what did not fit.
fn judge(probe: u32, slot: u32, score: f32) {
    let bar = bars[probe];
    if score >= bar.cut && slot < slice.slot_end && ((live[slot >> 5u] >> (slot & 31u)) & 1u) == 1u {
        let nth = atomicAdd(&tally.counts[probe], 1u);
        if nth < bar.quota {
            let at = atomicAdd(&tally.stored, 1u);
            if at < slice.entries_max {
                entries[at] = Entry(probe, slice.slot_base + slot, score);
            }
        }
    }
}
