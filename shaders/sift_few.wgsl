// Sifts for one to four probes. Bound by memory: rows stream through once, eight neighbouring
// invocations read 128 consecutive bytes of a row, and each works on four rows at a time so that
// a probe component is fetched once for four products. Twin: `src/engine/gpu/sift_few.rs`.
//
// `probes` is row-major: PROBES rows of 2 * row_words vectors.

// Probes computed, padding included: 1, 2 or 4.
override PROBES: u32 = 4u;
// Invocations in a workgroup, a multiple of LANES.
override THREADS: u32 = 256u;
// Invocations that share a row.
const LANES: u32 = 8u;
// Rows an invocation works on at a time, STRANDS apart.
const ROWS_EACH: u32 = 4u;
// Groups of LANES invocations in a workgroup.
override STRANDS: u32 = THREADS / LANES;

// Partial sums, by probe, then strand, then lane; a vector holds the four rows of the strand.
var<workgroup> partial: array<vec4<f32>, PROBES * THREADS>;

fn low_half(words: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}

fn high_half(words: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));
}

// Eight components of four rows (columns of `low` and `high`), ready for any number of probes.
struct Strip {
    low: mat4x4<f32>,
    high: mat4x4<f32>,
}

// Products of the strip with eight components of a probe, one sum for each of the four rows.
fn products(strip: Strip, low: vec4<f32>, high: vec4<f32>) -> vec4<f32> {
    return strip.low * low + strip.high * high;
}

@compute @workgroup_size(THREADS)
fn sift_few(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) me: u32,
) {
    let tile = slice.slot_first + (group.y * groups.x + group.x) * (STRANDS * ROWS_EACH);
    if tile >= slice.slot_end {
        return;
    }
    let lane = me % LANES;
    let strand = me / LANES;
    let words = slice.row_words;
    let at_0 = (tile + strand) * words;
    let at_1 = at_0 + STRANDS * words;
    let at_2 = at_1 + STRANDS * words;
    let at_3 = at_2 + STRANDS * words;

    var sums_0 = vec4<f32>();
    var sums_1 = vec4<f32>();
    var sums_2 = vec4<f32>();
    var sums_3 = vec4<f32>();
    for (var word = lane; word < words; word += LANES) {
        let row_0 = rows[at_0 + word];
        let row_1 = rows[at_1 + word];
        let row_2 = rows[at_2 + word];
        let row_3 = rows[at_3 + word];
        let strip = Strip(
            transpose(mat4x4<f32>(low_half(row_0), low_half(row_1), low_half(row_2), low_half(row_3))),
            transpose(mat4x4<f32>(high_half(row_0), high_half(row_1), high_half(row_2), high_half(row_3))),
        );
        let at = 2u * word;
        sums_0 += products(strip, probes[at], probes[at + 1u]);
        if PROBES > 1u {
            let next = at + 2u * words;
            sums_1 += products(strip, probes[next], probes[next + 1u]);
        }
        if PROBES > 2u {
            let third = at + 4u * words;
            sums_2 += products(strip, probes[third], probes[third + 1u]);
            let fourth = at + 6u * words;
            sums_3 += products(strip, probes[fourth], probes[fourth + 1u]);
        }
    }

    partial[me] = sums_0;
    if PROBES > 1u {
        partial[THREADS + me] = sums_1;
    }
    if PROBES > 2u {
        partial[2u * THREADS + me] = sums_2;
        partial[3u * THREADS + me] = sums_3;
    }
    workgroupBarrier();

    // One invocation a (probe, strand): the lanes' sums in order, then four rows to judge.
    if me < PROBES * STRANDS {
        let probe = me / STRANDS;
        let row_strand = me % STRANDS;
        var sums = vec4<f32>();
        for (var from_lane = 0u; from_lane < LANES; from_lane += 1u) {
            sums += partial[probe * THREADS + row_strand * LANES + from_lane];
        }
        if any(sums >= vec4<f32>(bars[probe].cut)) {
            let slot = tile + row_strand;
            judge(probe, slot, sums.x);
            judge(probe, slot + STRANDS, sums.y);
            judge(probe, slot + 2u * STRANDS, sums.z);
            judge(probe, slot + 3u * STRANDS, sums.w);
        }
    }
}
