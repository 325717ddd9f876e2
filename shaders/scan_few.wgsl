// Scans codes for one to eight probes. Bound by memory: an invocation has a row, neighbours read neighbouring
// words, every word is read once for all probes, and the probes come from uniform memory, at the same place
// for all invocations. Twin: `Twin::scan` in `src/engine/gpu/twin.rs`.

// Probes computed, padding included: 1, 2, 4 or 8.
override PROBES: u32 = 8u;
const THREADS: u32 = 256u;

// Probe after probe, and for each probe quad after quad, what the results of `spread` are multiplied with.
@group(1) @binding(1) var<uniform> few: array<vec4<u32>, 1024>;

@compute @workgroup_size(THREADS)
fn scan_few(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) me: u32,
) {
    let slot = slice.slot_first + (group.y * groups.x + group.x) * THREADS + me;
    if slot >= slice.slot_end {
        return;
    }
    let quads = slice.quads;
    let spreads = select(8u, 2u, FOUR_BIT);
    let each = quads * spreads;
    let row_at = (slot >> 6u) * quads * 64u + (slot & 63u);
    var low = vec4<i32>();
    var high = vec4<i32>();
    for (var quad = 0u; quad < quads; quad += 1u) {
        let code = codes[row_at + quad * 64u];
        for (var nth = 0u; nth < spreads; nth += 1u) {
            let bytes = spread(code, nth);
            let at = quad * spreads + nth;
            low.x += products(bytes, few[at]);
            if PROBES > 1u {
                low.y += products(bytes, few[at + each]);
            }
            if PROBES > 2u {
                low.z += products(bytes, few[at + 2u * each]);
                low.w += products(bytes, few[at + 3u * each]);
            }
            if PROBES > 4u {
                high.x += products(bytes, few[at + 4u * each]);
                high.y += products(bytes, few[at + 5u * each]);
                high.z += products(bytes, few[at + 6u * each]);
                high.w += products(bytes, few[at + 7u * each]);
            }
        }
    }
    let row = row_of(slot, FOUR_BIT, slice.loss_parts);
    report(0u, slot, row, low.x);
    if PROBES > 1u {
        report(1u, slot, row, low.y);
    }
    if PROBES > 2u {
        report(2u, slot, row, low.z);
        report(3u, slot, row, low.w);
    }
    if PROBES > 4u {
        report(4u, slot, row, high.x);
        report(5u, slot, row, high.y);
        report(6u, slot, row, high.z);
        report(7u, slot, row, high.w);
    }
}
