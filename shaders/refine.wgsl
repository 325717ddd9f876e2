// Refines the pairs that a scan of 1-bit codes reported by their 4-bit codes. Pairs are few and lie anywhere,
// so an invocation takes one pair after the other. Twin: `Twin::refine` in `src/engine/gpu/twin.rs`.
//
// Handles the entries whose slots are in the run, so that runs of several slabs can share a list.

const THREADS: u32 = 64u;

// From `slice.refine_at` on, probe after probe: quad after quad, what the low and the high halves of the bytes
// are multiplied with.
@group(1) @binding(2) var<storage, read> probes: array<vec4<u32>>;
@group(1) @binding(6) var<storage, read_write> refined: array<Entry>;

@compute @workgroup_size(THREADS)
fn refine(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) me: u32,
) {
    let count = min(atomicLoad(&tally.stored), slice.entries_max);
    let quads = slice.four_bit_quads;
    for (var nth = group.x * THREADS + me; nth < count; nth += groups.x * THREADS) {
        let entry = entries[nth];
        let slot = entry.slot - slice.slot_base;
        // A slot of a slab before this one wraps around to a large number.
        if slot < slice.slot_first || slot >= slice.slot_end {
            continue;
        }
        let row_at = (slot >> 6u) * quads * 64u + (slot & 63u);
        let probe_at = slice.refine_at + entry.probe * quads * 2u;
        var dot = 0;
        for (var quad = 0u; quad < quads; quad += 1u) {
            let code = codes[row_at + quad * 64u];
            dot += products(code & vec4<u32>(0x0f0f0f0fu), probes[probe_at + 2u * quad]);
            dot += products((code >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu), probes[probe_at + 2u * quad + 1u]);
        }
        let bound = bounds[PROBES_MAX + entry.probe];
        if reaches(bound, row_of(slot, true, 0u), bound.base + 2 * dot) {
            let at = atomicAdd(&tally.refined, 1u);
            refined[at] = entry;
        }
    }
}
