// Scans codes for a batch of probes with packed dot products: bound by arithmetic, on every adapter. A
// workgroup takes 64 rows and 32 probes; an invocation two rows and eight probes, so that a word of a code is
// spread once for eight probes and a word of a probe read once for two rows.
// Twin: `Twin::scan` in `src/engine/gpu/twin.rs`.

const ROWS: u32 = 64u;
// Probes of a workgroup, a multiple of 8.
const COLUMNS: u32 = 32u;
const HALF: u32 = 32u;
const THREADS: u32 = 128u;

// Tile after tile of COLUMNS probes; in a tile, quad after quad; in a quad, spread after spread, the words of
// all probes.
@group(1) @binding(2) var<storage, read> probes: array<vec4<u32>>;

var<workgroup> shared_probes: array<vec4<u32>, 256>;

// Products with four probes.
fn four(bytes: vec4<u32>, at: u32) -> vec4<i32> {
    return vec4<i32>(
        products(bytes, shared_probes[at]),
        products(bytes, shared_probes[at + 1u]),
        products(bytes, shared_probes[at + 2u]),
        products(bytes, shared_probes[at + 3u]),
    );
}

fn report_eight(probe: u32, slot: u32, low: vec4<i32>, high: vec4<i32>) {
    if slot >= slice.slot_end {
        return;
    }
    let row = row_of(slot, FOUR_BIT, slice.loss_parts);
    report(probe, slot, row, low.x);
    report(probe + 1u, slot, row, low.y);
    report(probe + 2u, slot, row, low.z);
    report(probe + 3u, slot, row, low.w);
    report(probe + 4u, slot, row, high.x);
    report(probe + 5u, slot, row, high.y);
    report(probe + 6u, slot, row, high.z);
    report(probe + 7u, slot, row, high.w);
}

@compute @workgroup_size(THREADS)
fn scan_many(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) me: u32,
) {
    // Probe tiles run fastest, so that workgroups that share rows run side by side.
    let tile = slice.slot_first + (group.z * groups.y + group.y) * ROWS;
    if tile >= slice.slot_end {
        return;
    }
    let quads = slice.quads;
    let spreads = select(8u, 2u, FOUR_BIT);
    let tile_words = spreads * COLUMNS;
    let first = 8u * (me / HALF);
    let row_at = (tile >> 6u) * quads * 64u + me % HALF;
    var upper_low = vec4<i32>();
    var upper_high = vec4<i32>();
    var lower_low = vec4<i32>();
    var lower_high = vec4<i32>();
    for (var quad = 0u; quad < quads; quad += 1u) {
        let probes_at = (group.x * quads + quad) * tile_words;
        for (var task = me; task < tile_words; task += THREADS) {
            shared_probes[task] = probes[probes_at + task];
        }
        let upper = codes[row_at + quad * 64u];
        let lower = codes[row_at + quad * 64u + HALF];
        workgroupBarrier();
        for (var nth = 0u; nth < spreads; nth += 1u) {
            let at = nth * COLUMNS + first;
            let upper_bytes = spread(upper, nth);
            upper_low += four(upper_bytes, at);
            upper_high += four(upper_bytes, at + 4u);
            let lower_bytes = spread(lower, nth);
            lower_low += four(lower_bytes, at);
            lower_high += four(lower_bytes, at + 4u);
        }
        workgroupBarrier();
    }
    let probe = group.x * COLUMNS + first;
    report_eight(probe, tile + me % HALF, upper_low, upper_high);
    report_eight(probe, tile + me % HALF + HALF, lower_low, lower_high);
}
