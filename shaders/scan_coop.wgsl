// Scans codes for a large batch of probes with cooperative matrices of 16 by 16. Codes are unpacked to f16 in
// workgroup memory (0 and 1 for 1-bit codes, 0 to 15 for 4-bit codes), probes come as f16 integers of at most
// 127; products and all their sums are integers below 2^24, which f32 accumulators hold exactly in whatever
// order they are added. The self-test at start says whether this adapter does so.
// Twin: `Twin::scan` in `src/engine/gpu/twin.rs`.
//
// Eight subgroups of 32, told apart by the index of their invocations: this module must not contain a subgroup
// operation or a subgroup built-in (NVIDIA driver 595 ends the process if a module has both). A subgroup has
// two tiles of rows and four of probes. Indices of matrix loads and stores are variables of their own, because
// naga's SPIR-V needs them to be.

enable f16;
enable wgpu_cooperative_matrix;

const TILE: u32 = 16u;
const ROWS: u32 = 8u * TILE;
const COLUMNS: u32 = 8u * TILE;
const THREADS: u32 = 256u;
const SUBGROUP: u32 = 32u;
// Components unpacked at a time: one word of a 1-bit code, one quad of a 4-bit code.
const CHUNK: u32 = 32u;
// vec4<f16> from one row to the next in workgroup memory: CHUNK / 4 and two against bank conflicts.
const LINE: u32 = 10u;

// Tile after tile of COLUMNS probes; in a tile, chunk after chunk; in a chunk, the components of each probe in
// the order in which `unpack` writes them.
@group(1) @binding(2) var<storage, read> probes: array<vec4<f16>>;

var<workgroup> row_tile: array<vec4<f16>, ROWS * LINE>;
var<workgroup> probe_tile: array<vec4<f16>, COLUMNS * LINE>;
var<workgroup> sums: array<f32, 8u * TILE * TILE>;
var<workgroup> row_angles: array<vec4<f32>, ROWS>;
// Four bits as four numbers, and a byte as its two halves.
var<workgroup> fours: array<vec4<f16>, 16>;
var<workgroup> pairs: array<vec2<f16>, 256>;

fn two_bytes(word: u32, at: u32) -> vec4<f16> {
    return vec4<f16>(pairs[(word >> at) & 255u], pairs[(word >> (at + 8u)) & 255u]);
}

// Unpacks half a chunk of one row.
fn unpack(slot: u32, row: u32, chunk: u32, half_of: u32) {
    let to = row * LINE + 4u * half_of;
    let row_at = (slot >> 6u) * slice.quads * 64u + (slot & 63u);
    if FOUR_BIT {
        let code = codes[row_at + chunk * 64u];
        let first = select(code.x, code.z, half_of == 1u);
        let second = select(code.y, code.w, half_of == 1u);
        row_tile[to] = two_bytes(first, 0u);
        row_tile[to + 1u] = two_bytes(first, 16u);
        row_tile[to + 2u] = two_bytes(second, 0u);
        row_tile[to + 3u] = two_bytes(second, 16u);
    } else {
        let code = codes[row_at + (chunk >> 2u) * 64u];
        let word = code[chunk & 3u] >> (16u * half_of);
        row_tile[to] = fours[word & 15u];
        row_tile[to + 1u] = fours[(word >> 4u) & 15u];
        row_tile[to + 2u] = fours[(word >> 8u) & 15u];
        row_tile[to + 3u] = fours[(word >> 12u) & 15u];
    }
}

// Reports the pairs of one tile, whose sums its subgroup has stored.
fn report_tile(tile: u32, row_first: u32, column_first: u32, subgroup: u32, lane: u32) {
    for (var nth = lane; nth < TILE * TILE; nth += SUBGROUP) {
        let row = row_first + nth / TILE;
        let slot = tile + row;
        if slot < slice.slot_end {
            let of_row = row_angles[row];
            let dot = i32(sums[subgroup * TILE * TILE + nth]);
            report(column_first + nth % TILE, slot, Row(of_row.x, of_row.y, of_row.z), dot);
        }
    }
}

@compute @workgroup_size(THREADS)
fn scan_coop(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) me: u32,
) {
    // Probe tiles run fastest, so that workgroups that share rows run side by side.
    let tile = slice.slot_first + (group.z * groups.y + group.y) * ROWS;
    if tile >= slice.slot_end {
        return;
    }
    let subgroup = me / SUBGROUP;
    let lane = me % SUBGROUP;
    let row_first = (subgroup % 4u) * 2u * TILE;
    let column_first = (subgroup / 4u) * 4u * TILE;
    let chunks = slice.four_bit_quads;

    if me < 16u {
        fours[me] = vec4<f16>(f16(me & 1u), f16((me >> 1u) & 1u), f16((me >> 2u) & 1u), f16(me >> 3u));
    }
    pairs[me] = vec2<f16>(f16(me & 15u), f16(me >> 4u));
    if me < ROWS {
        let row = row_of(tile + me, FOUR_BIT, slice.loss_parts);
        row_angles[me] = vec4<f32>(row.along, row.across, row.norm, 0.0);
    }
    workgroupBarrier();

    var sum_00 = coop_mat16x16<f32, C>();
    var sum_01 = coop_mat16x16<f32, C>();
    var sum_02 = coop_mat16x16<f32, C>();
    var sum_03 = coop_mat16x16<f32, C>();
    var sum_10 = coop_mat16x16<f32, C>();
    var sum_11 = coop_mat16x16<f32, C>();
    var sum_12 = coop_mat16x16<f32, C>();
    var sum_13 = coop_mat16x16<f32, C>();
    for (var chunk = 0u; chunk < chunks; chunk += 1u) {
        // Consecutive invocations have consecutive rows.
        for (var task = me; task < 2u * ROWS; task += THREADS) {
            unpack(tile + task % ROWS, task % ROWS, chunk, task / ROWS);
        }
        let probes_at = (group.x * chunks + chunk) * COLUMNS * 8u;
        for (var task = me; task < COLUMNS * 8u; task += THREADS) {
            probe_tile[(task / 8u) * LINE + task % 8u] = probes[probes_at + task];
        }
        workgroupBarrier();
        for (var part = 0u; part < CHUNK / 4u; part += TILE / 4u) {
            let stride = LINE;
            let at_row_0 = row_first * LINE + part;
            let at_row_1 = (row_first + TILE) * LINE + part;
            let at_column_0 = column_first * LINE + part;
            let at_column_1 = (column_first + TILE) * LINE + part;
            let at_column_2 = (column_first + 2u * TILE) * LINE + part;
            let at_column_3 = (column_first + 3u * TILE) * LINE + part;
            let rows_0 = coopLoadT<coop_mat16x16<f16, A>>(&row_tile[at_row_0], stride);
            let rows_1 = coopLoadT<coop_mat16x16<f16, A>>(&row_tile[at_row_1], stride);
            let columns_0 = coopLoad<coop_mat16x16<f16, B>>(&probe_tile[at_column_0], stride);
            sum_00 = coopMultiplyAdd(rows_0, columns_0, sum_00);
            sum_10 = coopMultiplyAdd(rows_1, columns_0, sum_10);
            let columns_1 = coopLoad<coop_mat16x16<f16, B>>(&probe_tile[at_column_1], stride);
            sum_01 = coopMultiplyAdd(rows_0, columns_1, sum_01);
            sum_11 = coopMultiplyAdd(rows_1, columns_1, sum_11);
            let columns_2 = coopLoad<coop_mat16x16<f16, B>>(&probe_tile[at_column_2], stride);
            sum_02 = coopMultiplyAdd(rows_0, columns_2, sum_02);
            sum_12 = coopMultiplyAdd(rows_1, columns_2, sum_12);
            let columns_3 = coopLoad<coop_mat16x16<f16, B>>(&probe_tile[at_column_3], stride);
            sum_03 = coopMultiplyAdd(rows_0, columns_3, sum_03);
            sum_13 = coopMultiplyAdd(rows_1, columns_3, sum_13);
        }
        workgroupBarrier();
    }

    let probe_first = group.x * COLUMNS + column_first;
    let sums_at = subgroup * TILE * TILE;
    let sums_stride = TILE;
    coopStoreT(sum_00, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first, probe_first, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_01, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first, probe_first + TILE, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_02, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first, probe_first + 2u * TILE, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_03, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first, probe_first + 3u * TILE, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_10, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first + TILE, probe_first, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_11, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first + TILE, probe_first + TILE, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_12, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first + TILE, probe_first + 2u * TILE, subgroup, lane);
    workgroupBarrier();
    coopStoreT(sum_13, &sums[sums_at], sums_stride);
    workgroupBarrier();
    report_tile(tile, row_first + TILE, probe_first + 3u * TILE, subgroup, lane);
}
