// Sifts for a batch of probes. Bound by arithmetic: a workgroup brings DEPTH components of
// 8 * BANDS rows and 4 * COLUMNS probes into shared memory, and every invocation multiplies eight
// rows with four probes in registers. Twin: `src/engine/gpu/sift_many.rs`.
//
// `probes` comes in tiles of 4 * COLUMNS probes; in a tile, component after component, COLUMNS
// vectors of four probes each.

// Invocations along the probes.
override COLUMNS: u32 = 8u;
// Invocations along the rows, a multiple of 4.
override BANDS: u32 = 16u;
// Components in shared memory at a time: 8, 16 or 32, so that it divides every dimension.
override DEPTH: u32 = 32u;
// Groups of four rows in the tile.
override QUADS: u32 = BANDS * 2u;
override THREADS: u32 = COLUMNS * BANDS;

var<workgroup> row_tile: array<vec4<f32>, DEPTH * QUADS>;
var<workgroup> probe_tile: array<vec4<f32>, DEPTH * COLUMNS>;

// Judges one row against four probes; most rows fail all four bars at once.
fn judge_four(probe: u32, cuts: vec4<f32>, slot: u32, scores: vec4<f32>) {
    if any(scores >= cuts) {
        judge(probe, slot, scores.x);
        judge(probe + 1u, slot, scores.y);
        judge(probe + 2u, slot, scores.z);
        judge(probe + 3u, slot, scores.w);
    }
}

@compute @workgroup_size(COLUMNS, BANDS)
fn sift_many(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) place: vec3<u32>,
    @builtin(local_invocation_index) me: u32,
) {
    // Probe tiles run fastest, so that workgroups that share rows run side by side.
    let tile = slice.slot_first + (group.z * groups.y + group.y) * (4u * QUADS);
    if tile >= slice.slot_end {
        return;
    }
    let column = place.x;
    let band = place.y;
    let words = slice.row_words;
    let probes_at = group.x * words * 8u * COLUMNS;

    var sums_0 = vec4<f32>();
    var sums_1 = vec4<f32>();
    var sums_2 = vec4<f32>();
    var sums_3 = vec4<f32>();
    var sums_4 = vec4<f32>();
    var sums_5 = vec4<f32>();
    var sums_6 = vec4<f32>();
    var sums_7 = vec4<f32>();
    for (var first = 0u; first < 8u * words; first += DEPTH) {
        // Four rows by eight components a task, transposed on the way: consecutive invocations
        // store consecutive vectors, and DEPTH / 8 of them read one row's consecutive words.
        for (var task = me; task < QUADS * DEPTH / 8u; task += THREADS) {
            let quad = task % 8u + 8u * (task / DEPTH);
            let word = (task / 8u) % (DEPTH / 8u);
            let at = (tile + 4u * quad) * words + first / 8u + word;
            let row_0 = rows[at];
            let row_1 = rows[at + words];
            let row_2 = rows[at + 2u * words];
            let row_3 = rows[at + 3u * words];
            let to = 8u * word * QUADS + quad;
            let x_0 = unpack2x16float(row_0.x);
            let x_1 = unpack2x16float(row_1.x);
            let x_2 = unpack2x16float(row_2.x);
            let x_3 = unpack2x16float(row_3.x);
            row_tile[to] = vec4<f32>(x_0.x, x_1.x, x_2.x, x_3.x);
            row_tile[to + QUADS] = vec4<f32>(x_0.y, x_1.y, x_2.y, x_3.y);
            let y_0 = unpack2x16float(row_0.y);
            let y_1 = unpack2x16float(row_1.y);
            let y_2 = unpack2x16float(row_2.y);
            let y_3 = unpack2x16float(row_3.y);
            row_tile[to + 2u * QUADS] = vec4<f32>(y_0.x, y_1.x, y_2.x, y_3.x);
            row_tile[to + 3u * QUADS] = vec4<f32>(y_0.y, y_1.y, y_2.y, y_3.y);
            let z_0 = unpack2x16float(row_0.z);
            let z_1 = unpack2x16float(row_1.z);
            let z_2 = unpack2x16float(row_2.z);
            let z_3 = unpack2x16float(row_3.z);
            row_tile[to + 4u * QUADS] = vec4<f32>(z_0.x, z_1.x, z_2.x, z_3.x);
            row_tile[to + 5u * QUADS] = vec4<f32>(z_0.y, z_1.y, z_2.y, z_3.y);
            let w_0 = unpack2x16float(row_0.w);
            let w_1 = unpack2x16float(row_1.w);
            let w_2 = unpack2x16float(row_2.w);
            let w_3 = unpack2x16float(row_3.w);
            row_tile[to + 6u * QUADS] = vec4<f32>(w_0.x, w_1.x, w_2.x, w_3.x);
            row_tile[to + 7u * QUADS] = vec4<f32>(w_0.y, w_1.y, w_2.y, w_3.y);
        }
        for (var task = me; task < DEPTH * COLUMNS; task += THREADS) {
            probe_tile[task] = probes[probes_at + first * COLUMNS + task];
        }
        workgroupBarrier();
        for (var depth = 0u; depth < DEPTH; depth += 1u) {
            let upper = row_tile[depth * QUADS + band];
            let lower = row_tile[depth * QUADS + BANDS + band];
            let quad = probe_tile[depth * COLUMNS + column];
            sums_0 += upper.x * quad;
            sums_1 += upper.y * quad;
            sums_2 += upper.z * quad;
            sums_3 += upper.w * quad;
            sums_4 += lower.x * quad;
            sums_5 += lower.y * quad;
            sums_6 += lower.z * quad;
            sums_7 += lower.w * quad;
        }
        workgroupBarrier();
    }

    let probe = 4u * (group.x * COLUMNS + column);
    let cuts = vec4<f32>(bars[probe].cut, bars[probe + 1u].cut, bars[probe + 2u].cut, bars[probe + 3u].cut);
    let upper_slot = tile + 4u * band;
    judge_four(probe, cuts, upper_slot, sums_0);
    judge_four(probe, cuts, upper_slot + 1u, sums_1);
    judge_four(probe, cuts, upper_slot + 2u, sums_2);
    judge_four(probe, cuts, upper_slot + 3u, sums_3);
    let lower_slot = upper_slot + 4u * BANDS;
    judge_four(probe, cuts, lower_slot, sums_4);
    judge_four(probe, cuts, lower_slot + 1u, sums_5);
    judge_four(probe, cuts, lower_slot + 2u, sums_6);
    judge_four(probe, cuts, lower_slot + 3u, sums_7);
}
