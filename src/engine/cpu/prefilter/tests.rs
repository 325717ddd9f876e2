//! Kernels against their twin, and bounds against what they bound.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;
use thenar_index::codebook;
use thenar_index::codes::{OwnedCodes, codebook_bytes, codebook_cosine};

use super::layout::{LIST_SLACK, PLANES_TOGETHER};
use super::row_bounds::{Parts, TileRowBounds};
use super::tables::{extremes, fill_parts};
use super::*;
use crate::simd::Simd;

const DIMS: [usize; 6] = [32, 64, 96, 160, 512, 2048];

fn paths() -> impl Iterator<Item = Simd> {
    Simd::ALL.into_iter().filter(|path| path.is_available())
}

fn unit(rng: &mut ChaCha8Rng, dim: usize) -> Vec<f32> {
    let values: Vec<f64> = (0..dim).map(|_| rng.sample(StandardNormal)).collect();
    let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    values.into_iter().map(|v| (v / norm) as f32).collect()
}

/// Blocks of rows with their codes, some rows all zero, some far from any quantiser's liking, some like
/// codes themselves.
fn coded(rng: &mut ChaCha8Rng, dim: usize, blocks: usize) -> (Vec<f16>, OwnedCodes) {
    let rows: Vec<f16> = (0..blocks * BLOCK_ROWS)
        .flat_map(|row| match row % 16 {
            3 => vec![0.0; dim],
            5 => (0..dim).map(|i| if i == row % dim { 1.0 } else { 0.0 }).collect(),
            7 => vec![-1.0 / (dim as f32).sqrt(); dim],
            // A codebook code, and a 2-bit code with few large components: a short one.
            9 => {
                let words = (0..dim / codebook::GROUP_DIMS)
                    .flat_map(|g| codebook::CODEWORDS[(row + g) % codebook::CODEWORD_COUNT]);
                words.map(|c| f32::from(c) / (codebook::square(dim) as f32).sqrt()).collect()
            }
            11 => (0..dim).map(|i| if i % 16 == 0 { 2.0 } else { 1.0 } / (dim as f32 * 1.2).sqrt()).collect(),
            _ => unit(rng, dim),
        })
        .map(f16::from_f32)
        .collect();
    let codes = OwnedCodes::of(&rows, dim);
    (rows, codes)
}

/// The cosine that is known of a row's code at a level, and the code's length.
fn cosine_and_norm(codes: &Codes<'_>, level: Level, dim: usize, row: usize) -> (f64, f64) {
    let (factors, norm) = (codes.factors[row], f64::from(level.least_norm(dim)));
    match level {
        Level::Codebook => {
            (codebook_cosine(codes.codebook_cosines(dim, row / BLOCK_ROWS)[row % BLOCK_ROWS]).into(), norm)
        }
        Level::TwoBit => (factors.two_bit_cosine().into(), f64::from(factors.two_bit_square(dim)).sqrt()),
    }
}

/// What tells the rows of a block apart, and the always_pass ones, by the kernels of a path.
fn row_bounds_of(
    kernels: &CodeKernels,
    scale: &Scale,
    level: Level,
    codes: &Codes<'_>,
    block: usize,
) -> (Parts, Parts, u64) {
    let (mut along, mut length) = (Parts::ZERO, Parts::ZERO);
    let always_pass = if level == Level::Codebook {
        kernels.codebook_row_bounds(scale, codes.codebook_cosines(scale.dim, block), &mut along)
    } else {
        let factors = codes.factors[block * BLOCK_ROWS..][..BLOCK_ROWS].try_into().unwrap();
        kernels.row_bounds(scale, factors, &mut along, &mut length)
    };
    (along, length, always_pass)
}

/// The integers of a row's code at a level, from the bits of its planes.
fn integers(codes: &Codes<'_>, level: Level, dim: usize, row: usize) -> Vec<f64> {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    if level == Level::Codebook {
        let bit = |at: usize| {
            let byte = codes.codebook[block * codebook_bytes(dim) + at / 8 * BLOCK_ROWS + lane];
            usize::from(byte >> (at % 8) & 1)
        };
        let word =
            |g: usize| (0..codebook::CODEWORD_BITS).map(|n| bit(g * codebook::CODEWORD_BITS + n) << n).sum::<usize>();
        return (0..codebook::groups(dim)).flat_map(|g| codebook::CODEWORDS[word(g)]).map(f64::from).collect();
    }
    let bit = |plane: &[u8], i: usize| plane[(block * dim / 8 + i / 8) * BLOCK_ROWS + lane] >> (i % 8) & 1 == 1;
    (0..dim)
        .map(|i| {
            let magnitude = if level == Level::TwoBit && bit(codes.two_bit, i) { 3.0 } else { 1.0 };
            if bit(codes.one_bit, i) { -magnitude } else { magnitude }
        })
        .collect()
}

/// The indices of up to a tile of blocks, by the kernels of a path.
fn indices(kernels: &CodeKernels, level: Level, dim: usize, codes: &Codes<'_>) -> Vec<IndexLine> {
    let mut indices = vec![IndexLine::ZERO; kernels.groups(level, dim) * codes.rows() / BLOCK_ROWS];
    kernels.spread(codes, dim, level, &mut indices);
    indices
}

/// A row's deficit, of whose entries `together` are added in bytes: the definition.
fn deficit(bits: usize, together: usize, indices: &[IndexLine], blocks: usize, table: &[IndexLine], row: usize) -> u32 {
    let entry_count = 1 << bits;
    let tables = bytemuck::cast_slice::<IndexLine, u8>(table).chunks_exact(entry_count);
    let places = indices.iter().skip(row / BLOCK_ROWS).step_by(blocks);
    let place = |line: &IndexLine| usize::from(line.0[row % BLOCK_ROWS]) & (entry_count - 1);
    let entries: Vec<u8> = tables.zip(places).map(|(table, line)| table[place(line)]).collect();
    entries
        .chunks(together)
        .map(|some| u32::from(some.iter().fold(0_u8, |sum, entry| sum.saturating_add(*entry))))
        .sum()
}

/// Where a path has the number of row `r` of a block.
fn place(path: Simd, r: usize) -> usize {
    if path == Simd::ALL[0] && path.is_available() { r % 2 * (BLOCK_ROWS / 2) + r / 2 } else { r }
}

/// The range of each group's parts.
fn ranges(kernels: &CodeKernels, level: Level, probe: &[f32]) -> Vec<f64> {
    let range = |group: &[f32]| {
        let sum = 2.0 * group.iter().map(|q| f64::from(q.abs())).sum::<f64>();
        match level {
            Level::Codebook => {
                let (low, high) = extremes(&codebook::products(group));
                f64::from(high) - f64::from(low)
            }
            Level::TwoBit => 3.0 * sum,
        }
    };
    probe.chunks(kernels.group_dims(level)).map(range).collect()
}

#[test]
fn first_passes_bound_the_product_from_above_and_closely_on_every_path() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        for dim in DIMS {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            for (level, blocks) in Level::ALL.into_iter().flat_map(|level| (1..=TILE_BLOCKS).map(move |b| (level, b))) {
                let (_, codes) = coded(&mut rng, dim, blocks);
                let codes = codes.as_codes();
                let mut spike = vec![0.0; dim];
                spike[dim / 2] = -1.0;
                let probe = if blocks == 2 { spike } else { unit(&mut rng, dim) };
                let tables = Tables::new(kernels, level, &probe, None, &mut rng);
                let indices = indices(kernels, level, dim, &codes);
                let (bits, together) = (kernels.index_bits(level), kernels.together(level));
                // What rounding down can take from a deficit, and what is cut off.
                let step = f64::from(tables.step);
                let bytes: &[u8] = bytemuck::cast_slice(&tables.entries);
                let largest: Vec<u32> =
                    bytes.chunks(1 << bits).map(|table| u32::from(*table.iter().max().unwrap())).collect();
                let ranges = ranges(kernels, level, &probe);
                let cut_off = |(range, largest): (&f64, &u32)| (range - step * f64::from(*largest)).max(0.0);
                let saturated = |some: &[u32]| step * f64::from(some.iter().sum::<u32>().saturating_sub(255));
                let in_bytes = largest.chunks(together).map(saturated).sum::<f64>();
                assert!(level.saturates() || in_bytes == 0.0, "{path} dim {dim} {level:?}: more than a byte");
                let loose = kernels.groups(level, dim) as f64 * step * 1.01
                    + ranges.iter().zip(&largest).map(cut_off).sum::<f64>()
                    + in_bytes;
                let tiny = 1e-7 * f64::from(level.least_norm(dim)) * (dim as f64).sqrt();
                for row in 0..codes.rows() {
                    let products = integers(&codes, level, dim, row).into_iter().zip(&probe);
                    let exact: f64 = products.map(|(c, q)| c * f64::from(*q)).sum();
                    let deficit = deficit(bits, together, &indices, blocks, &tables.entries, row);
                    let bound = f64::from(tables.offset) - step * f64::from(deficit);
                    let what = format!("{path} dim {dim} {level:?} blocks {blocks} row {row}");
                    assert!(bound >= exact - tiny, "{what}: {bound} < {exact}");
                    assert!(bound <= exact + loose, "{what}: {bound} > {exact} + {loose}");
                }
            }
        }
    }
}

#[test]
fn dithered_entries_are_right_on_average_and_within_a_step() {
    const DRAWS: u32 = 4000;
    const DIM: usize = 96;
    let kernels = CodeKernels::of(Simd::Portable);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for level in Level::ALL {
        let probe = unit(&mut rng, DIM);
        let (dims, bits) = (kernels.group_dims(level), kernels.index_bits(level));
        let mut draw = || Tables::new(kernels, level, &probe, Some(f32::MAX), &mut rng);
        let step = draw().step;
        let mut deficits = vec![0.0_f32; DIM.div_ceil(dims) << bits];
        for (parts, group) in deficits.chunks_exact_mut(1 << bits).zip(probe.chunks(dims)) {
            let (_, high) = fill_parts(parts, group, dims, level);
            parts.iter_mut().for_each(|part| *part = (high - *part) / step);
        }
        let mut sums = vec![0_u32; deficits.len()];
        for _ in 0..DRAWS {
            let tables = draw();
            assert_eq!(tables.step, step);
            let entries: &[u8] = bytemuck::cast_slice(&tables.entries);
            for ((sum, entry), deficit) in sums.iter_mut().zip(entries).zip(&deficits) {
                assert!(f32::from(*entry) < deficit + 1.001, "{level:?}: {entry} for {deficit}");
                assert!(*entry >= 254 || f32::from(*entry) > deficit - 1.01, "{level:?}: {entry} for {deficit}");
                *sum += u32::from(*entry);
            }
        }
        // Five deviations of a mean of numbers that deviate by half a step at most; and what is taken off.
        let near = 0.5 * 5.0 / f64::from(DRAWS).sqrt();
        for (sum, deficit) in sums.iter().zip(&deficits) {
            let (mean, deficit) = (f64::from(*sum) / f64::from(DRAWS), f64::from(*deficit));
            assert!(mean <= deficit + near, "{level:?}: {mean} for {deficit} on average");
            assert!(mean >= 253.0 || mean >= deficit - near - 0.005, "{level:?}: {mean} for {deficit} on average");
        }
    }
}

#[test]
fn what_a_dither_leaves_has_one_law_whatever_the_probe() {
    // Table look-ups of bytes: 128 groups of four components, of which the first is not zero.
    const DIM: usize = 512;
    const DRAWS: usize = 4000;
    let kernels = CodeKernels::of(Simd::Portable);
    let dims = kernels.group_dims(Level::TwoBit);
    let groups = DIM / dims;
    let deviation = (groups as f64 / 12.0).sqrt();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for fraction in [0.0, 0.02, 0.25, 0.5, 0.75, 0.98] {
        // A range of so many steps: more than a byte holds with finer ones.
        let (steps, step) = (240.0 + fraction, 1.0 / 1024.0);
        let probe: Vec<f32> = (0..DIM).map(|i| if i % dims == 0 { (steps * step / 6.0) as f32 } else { 0.0 }).collect();
        let product = -3.0 * probe.iter().map(|q| f64::from(*q)).sum::<f64>();
        let mut mean = 0.0;
        let mut square = 0.0;
        for _ in 0..DRAWS {
            let tables = Tables::new(kernels, Level::TwoBit, &probe, Some(step as f32), &mut rng);
            assert_eq!(f64::from(tables.step), step);
            // The index of a code of minus threes.
            let entries = bytemuck::cast_slice::<IndexLine, u8>(&tables.entries).chunks_exact(256);
            let deficit: f64 = entries.map(|table| f64::from(table[255])).sum();
            let error = (product - f64::from(tables.offset)) / step + deficit;
            mean += error / DRAWS as f64;
            square += error * error / DRAWS as f64;
        }
        let found = (square - mean * mean).sqrt();
        let what = format!("fractions of {fraction}: errors of {mean} and a deviation of {found} steps");
        // A deviation's own is a 90th of it. The mean is below zero by the slack of all entries.
        assert!((found / deviation - 1.0).abs() < 0.05, "{what}, not {deviation}");
        assert!(mean <= 0.0 && mean > -1.0, "{what}");
    }
}

/// Misses of first passes with dithered tables among `pairs` mated pairs of exactly the floor's score.
fn misses(path: Simd, level: Level, dim: usize, probability: f64, pairs: u64) -> u64 {
    const TAU: f64 = 0.5;
    let kernels = CodeKernels::of(path);
    let bounds = Bounds::dithered(Certificate::Randomised { miss_probability: probability }, dim);
    let scale = Scale::new(level, dim);
    let errors = kernels.groups(level, dim);
    let step_max = bounds.dither_step(errors, scale.usual, scale.max).expect("a step") * scale.length_base;
    let of_block = |nth: u64| {
        let mut rng = ChaCha8Rng::seed_from_u64(nth);
        let rows: Vec<Vec<f32>> = (0..BLOCK_ROWS).map(|_| unit(&mut rng, dim)).collect();
        let stored: Vec<f16> = rows.iter().flatten().map(|v| f16::from_f32(*v)).collect();
        let codes = OwnedCodes::of(&stored, dim);
        let codes = codes.as_codes();
        let indices = indices(kernels, level, dim, &codes);
        let (along, length, always_pass) = row_bounds_of(kernels, &scale, level, &codes, 0);
        let missed = |(r, row): (usize, &Vec<f32>)| {
            let w = unit(&mut rng, dim);
            let along_row: f32 = w.iter().zip(row).map(|(w, y)| w * y).sum();
            let across: Vec<f32> = w.iter().zip(row).map(|(w, y)| w - along_row * y).collect();
            let norm = across.iter().map(|v| v * v).sum::<f32>().sqrt();
            let (cosine, sine) = (TAU as f32, (1.0 - TAU * TAU).sqrt() as f32);
            let probe: Vec<f32> = across.iter().zip(row).map(|(w, y)| cosine * y + sine * w / norm).collect();
            let tables = Tables::new(kernels, level, &probe, Some(step_max), &mut rng);
            // The score that the server would find for this probe is the floor to hold.
            let stored = &stored[r * dim..(r + 1) * dim];
            let score: f64 = stored.iter().zip(&probe).map(|(y, q)| y.to_f64() * f64::from(*q)).sum();
            let most = MaxDeficit::new(&scale, &bounds, bounds.dithered_bound(score), (tables.offset, tables.step));
            let (bits, together) = (kernels.index_bits(level), kernels.together(level));
            let found = deficit(bits, together, &indices, 1, &tables.entries, r);
            let at = place(path, r);
            always_pass >> r & 1 == 0 && found > u32::from(most.of(along.0[at], length.0[at]))
        };
        rows.iter().enumerate().map(missed).filter(|missed| *missed).count() as u64
    };
    (0..pairs / BLOCK_ROWS as u64).into_par_iter().map(of_block).sum()
}

#[test]
fn dithered_first_passes_miss_no_more_than_claimed_and_not_never() {
    // Three deviations of a Poisson count. Entries rounded up would be caught, and a bound that never
    // misses. That the proof has no room to spare is shown by `dithered_bounds_spend_what_they_claim`.
    const PAIRS: u64 = 1 << 18;
    // Paths of one width of index have the same tables.
    let mut widths = Vec::new();
    for path in paths() {
        let bits = CodeKernels::of(path).index_bits(Level::TwoBit);
        if widths.contains(&bits) {
            continue;
        }
        widths.push(bits);
        for (level, (dim, probability)) in
            Level::ALL.into_iter().flat_map(|level| [(64, 2e-3), (128, 1e-3)].map(|at| (level, at)))
        {
            let (missed, claimed) = (misses(path, level, dim, probability, PAIRS), PAIRS as f64 * probability);
            let what = format!("{path} {level:?} dim {dim}: {missed} missed of {PAIRS}, claimed {claimed}");
            assert!(missed as f64 <= claimed + 3.0 * claimed.sqrt(), "{what}");
            assert!(missed as f64 >= 0.05 * claimed, "{what}");
        }
    }
}

#[test]
fn what_a_first_pass_passes_over_at_a_floor_it_passes_over_at_higher_ones_if_the_seed_is_the_same() {
    const DIM: usize = 256;
    const PROBES: usize = 64;
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let rows: Vec<f32> = (0..BLOCK_ROWS).flat_map(|_| unit(&mut rng, DIM)).collect();
    let stored: Vec<f16> = rows.iter().map(|v| f16::from_f32(*v)).collect();
    let codes = OwnedCodes::of(&stored, DIM);
    let codes = codes.as_codes();
    // Between four rows each.
    let between = |p: usize| {
        let sum = |i: usize| (0..4).map(|n| rows[(p + n * n * 5) % BLOCK_ROWS * DIM + i]).sum::<f32>();
        let values: Vec<f32> = (0..DIM).map(sum).collect();
        let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
        values.into_iter().map(move |v| v / norm)
    };
    let probes: Vec<f32> = (0..PROBES).flat_map(between).collect();
    let certificate = Certificate::Randomised { miss_probability: 1e-2 };
    for (path, level) in paths().flat_map(|path| Level::ALL.map(|level| (path, level))) {
        let kernels = CodeKernels::of(path);
        let indices = indices(kernels, level, DIM, &codes);
        let scale = Scale::new(level, DIM);
        let (along, length, always_pass) = row_bounds_of(kernels, &scale, level, &codes, 0);
        let prefilter = |seed: u64| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let seeds: Vec<Seed> = (0..PROBES).map(|_| rng.random()).collect();
            Prefilter::new(kernels, DIM, &probes, seeds.into_iter(), certificate)
        };
        let deficits = |prefilter: &Prefilter<'_>| -> Vec<u32> {
            let (bits, together) = (kernels.index_bits(level), kernels.together(level));
            let of = |probe: usize| {
                let entries = &prefilter.tables(level, probe).entries;
                (0..BLOCK_ROWS).map(|r| deficit(bits, together, &indices, 1, entries, r)).collect::<Vec<_>>()
            };
            (0..PROBES).flat_map(of).collect()
        };
        // Which pairs pass, and how far a floor must rise for row_bounds to rise by more than they are rounded:
        // one step and a quarter at the base, and two for the row's number.
        let pass = |(prefilter, deficits): &(Prefilter<'_>, Vec<u32>), floor: f32| -> (Vec<bool>, f32) {
            let (mut pass, mut rise) = (Vec::new(), 0.0_f32);
            for (probe, deficits) in deficits.chunks_exact(BLOCK_ROWS).enumerate() {
                let Tables { offset, step, .. } = prefilter.tables(level, probe);
                let most = MaxDeficit::new(
                    &scale,
                    &prefilter.bounds,
                    prefilter.floor_bounds(floor).dithered,
                    (*offset, *step),
                );
                rise = rise.max(3.3 * step / (scale.length_base * scale.usual));
                pass.extend(deficits.iter().enumerate().map(|(r, deficit)| {
                    let at = place(path, r);
                    always_pass >> r & 1 == 1 || *deficit <= most.of(along.0[at], length.0[at]).into()
                }));
            }
            (pass, rise)
        };
        let of = |seed: u64| {
            let prefilter = prefilter(seed);
            let deficits = deficits(&prefilter);
            (prefilter, deficits)
        };
        let (first, same, others) = (of(1), of(1), [2, 3, 4, 5, 6, 7].map(of));
        let only_high =
            |low: &[bool], high: &[bool]| low.iter().zip(high).filter(|(low, high)| !**low && **high).count();
        let (mut with_same, mut with_others, mut fell) = (0, 0, 0);
        // Bounds among the products of unrelated rows, of which there are many, and of the four.
        for floor in [0.1, 0.13, 0.16, 0.2, 0.24, 0.3, 0.5] {
            let (low, rise) = pass(&first, floor);
            let high = pass(&same, floor + rise).0;
            with_same += only_high(&low, &high);
            fell += only_high(&high, &low);
            with_others += others.iter().map(|other| only_high(&low, &pass(other, floor + rise).0)).sum::<usize>();
        }
        let what =
            format!("{path} {level:?}: {with_same} and {with_others} pass only the higher floor, {fell} the lower");
        assert_eq!(with_same, 0, "{what}");
        // A round that drew anew would have other misses.
        assert!(with_others > 0 && fell > 20, "{what}");
    }
}

#[test]
fn a_scan_reports_exactly_the_rows_whose_deficits_count() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for ((blocks, probes), level) in (1..=TILE_BLOCKS)
            .flat_map(|b| (1..=SCAN_PROBES).map(move |p| (b, p)))
            .flat_map(|at| Level::ALL.map(|l| (at, l)))
        {
            for dim in DIMS {
                let (_, codes) = coded(&mut rng, dim, blocks);
                let codes = codes.as_codes();
                let groups = kernels.groups(level, dim);
                let indices = indices(kernels, level, dim, &codes);
                let tables: Vec<Tables> = (0..probes)
                    .map(|p| {
                        let mut tables = Tables::new(kernels, level, &unit(&mut rng, dim), None, &mut rng);
                        // Sums that saturate, where they may.
                        if p == 0 && level.saturates() {
                            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut tables.entries);
                            let largest = kernels.entry_max(level, dim);
                            bytes.iter_mut().for_each(|entry| *entry = entry.saturating_mul(4).min(largest));
                        }
                        tables
                    })
                    .collect();
                let mut row_bounds = TileRowBounds::EMPTY;
                let scale = Scale::new(level, dim);
                let mut always_pass = [0; TILE_BLOCKS];
                for (b, always_pass) in always_pass.iter_mut().enumerate().take(blocks) {
                    row_bounds.along[b] = Parts(std::array::from_fn(|_| rng.random()));
                    if level == Level::TwoBit {
                        row_bounds.length[b] = Parts(std::array::from_fn(|_| rng.random()));
                    }
                    if level == Level::Codebook {
                        (row_bounds.along[b], _, *always_pass) = row_bounds_of(kernels, &scale, level, &codes, b);
                    }
                }
                let bits = kernels.index_bits(level);
                let wanted = |together: usize, p: usize, row: usize| {
                    deficit(bits, together, &indices, blocks, &tables[p].entries, row)
                };
                let scanned: Vec<ScanProbe<'_>> = (0..probes)
                    .map(|p| {
                        let usual = wanted(kernels.together(level), p, 5) as u16;
                        let (longer, shorter) = if p == 0 { (0, usual / 4) } else { (usual / 4, 0) };
                        let max_deficit =
                            MaxDeficit { base: usual.saturating_add(usual / 4), along: usual / 2, longer, shorter };
                        ScanProbe { table: &tables[p].entries, max_deficit }
                    })
                    .collect();
                let call = ScanCall {
                    level,
                    indices: &indices,
                    blocks,
                    probes: &scanned,
                    groups,
                    row_bounds: &row_bounds,
                    scale: &scale,
                };
                let expected = |together: usize| {
                    let mut expected: ScanHits = Default::default();
                    for (p, row) in (0..probes).flat_map(|p| (0..codes.rows()).map(move |row| (p, row))) {
                        let (b, r) = (row / BLOCK_ROWS, place(path, row % BLOCK_ROWS));
                        let most = scanned[p].max_deficit.of(row_bounds.along[b].0[r], row_bounds.length[b].0[r]);
                        let counts = wanted(together, p, row) <= u32::from(most);
                        expected[p][b] |= u64::from(counts) << (row % BLOCK_ROWS);
                    }
                    expected
                };
                let any_of = |expected: &ScanHits| expected.iter().flatten().any(|mask| *mask != 0);
                let what = format!("{path} {level:?} dim {dim} blocks {blocks} probes {probes}");
                let by_indices = expected(kernels.together(level));
                let mut found: ScanHits = Default::default();
                assert_eq!(kernels.scan(&call, &mut found), any_of(&by_indices), "{what}");
                assert_eq!(found, by_indices, "{what}");
                if kernels.scans_planes(probes) {
                    let mut by_planes = expected(PLANES_TOGETHER);
                    for by_planes in &mut by_planes[..probes] {
                        by_planes.iter_mut().zip(always_pass).for_each(|(mask, always_pass)| *mask |= always_pass);
                    }
                    let mut found: ScanHits = Default::default();
                    assert_eq!(
                        kernels.scan_planes(&codes, dim, level, &call, &mut found),
                        any_of(&by_planes),
                        "{what}"
                    );
                    assert_eq!(found, by_planes, "{what}, by planes");
                }
            }
        }
    }
}

#[test]
fn what_a_scan_found_is_listed_without_dead_rows_and_with_those_that_always_pass() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for _ in 0..100 {
        let mut few = || rng.random::<u64>() & rng.random::<u64>() & rng.random::<u64>();
        let found: ScanHits = std::array::from_fn(|_| std::array::from_fn(|_| few()));
        let (always_pass, live) = (std::array::from_fn(|_| few() & few()), std::array::from_fn(|_| !few()));
        let (probes, blocks) = (rng.random_range(1..=SCAN_PROBES), rng.random_range(1..=TILE_BLOCKS));
        let (first_probe, first_row) = (4090, BLOCK_ROWS * 7);
        let call =
            ListCall { found: &found, probes, always_pass: &always_pass, live: &live, blocks, first_probe, first_row };
        let mut expected = Vec::new();
        for (p, row) in (0..probes).flat_map(|p| (0..blocks * BLOCK_ROWS).map(move |row| (p, row))) {
            let (b, bit) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
            if (found[p][b] | always_pass[b]) & live[b] & 1 << bit != 0 {
                expected.push((first_probe + p, first_row + row));
            }
        }
        for path in paths() {
            let mut hits = vec![Hit(0); SCAN_PROBES * TILE_ROWS + LIST_SLACK];
            let listed = CodeKernels::of(path).list(&call, &mut hits);
            let hits: Vec<_> = hits[..listed].iter().map(|hit| (hit.probe(), hit.row())).collect();
            assert_eq!(hits, expected, "{path}");
        }
    }
}

#[test]
fn row_bounds_are_the_same_on_every_path_but_for_the_last_unit() {
    for dim in DIMS {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let (_, codes) = coded(&mut rng, dim, 1);
        let codes = codes.as_codes();
        for level in Level::ALL {
            let scale = Scale::new(level, dim);
            let (along, length, always_pass) = row_bounds_of(CodeKernels::of(Simd::Portable), &scale, level, &codes, 0);
            for r in 0..BLOCK_ROWS {
                let (cosine, norm) = cosine_and_norm(&codes, level, dim, r);
                let always_passes = cosine < f64::from(scale.reference) || norm < f64::from(scale.length_base) - 1e-4;
                assert_eq!(always_pass >> r & 1 == 1, always_passes, "dim {dim} {level:?} row {r}");
                let above = cosine.min(scale.max.into()) - f64::from(scale.reference);
                let exact = (norm * above / f64::from(scale.along_unit)).max(0.0);
                let found = f64::from(along.0[r]);
                assert!(found <= exact * (1.0 + 1e-6), "dim {dim} {level:?} row {r}: {found} of {exact}");
                assert!(found >= exact.min(65_535.0) - 2.0, "dim {dim} {level:?} row {r}: {found} of {exact}");
            }
            assert_ne!(always_pass, 0, "an axis is far from its code");
            for path in paths() {
                let (other_along, other_length, other_always_pass) =
                    row_bounds_of(CodeKernels::of(path), &scale, level, &codes, 0);
                assert_eq!(other_always_pass, always_pass, "{path}");
                for r in 0..BLOCK_ROWS {
                    let at = place(path, r);
                    assert!(along.0[r].abs_diff(other_along.0[at]) <= 1, "{path} dim {dim} {level:?} row {r}");
                    assert!(length.0[r].abs_diff(other_length.0[at]) <= 1, "{path} dim {dim} {level:?} row {r}");
                }
            }
        }
    }
}

#[test]
fn the_largest_deficit_is_never_below_the_bound_and_close_above_it() {
    for dim in DIMS {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let (_, codes) = coded(&mut rng, dim, 2);
        let codes = codes.as_codes();
        let mut counted = 0;
        for (path, level) in paths().flat_map(|path| Level::ALL.map(|level| (path, level))) {
            let kernels = CodeKernels::of(path);
            for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
                let bounds = Bounds::dithered(certificate, dim);
                let scale = Scale::new(level, dim);
                for (block, floor) in [0.25, 0.6].into_iter().enumerate() {
                    let bound = bounds.bound(floor).unwrap();
                    let tables = Tables::new(kernels, level, &unit(&mut rng, dim), None, &mut rng);
                    let most = MaxDeficit::new(&scale, &bounds, Some(bound), (tables.offset, tables.step));
                    let (along, length, always_pass) = row_bounds_of(kernels, &scale, level, &codes, block);
                    for r in (0..BLOCK_ROWS).filter(|r| always_pass >> r & 1 == 0) {
                        let (cosine, n) = cosine_and_norm(&codes, level, dim, block * BLOCK_ROWS + r);
                        let x = (cosine - f64::from(bounds.loss())).max(0.0);
                        let (a, b, slack) = bound.parts();
                        let least = f64::from(a) * x - f64::from(b) * (1.0 - x * x).max(0.0).sqrt() - f64::from(slack);
                        let exact = (f64::from(tables.offset) - n * least) / f64::from(tables.step);
                        let at = place(path, r);
                        let found = f64::from(most.of(along.0[at], length.0[at]));
                        let what = format!("{path} dim {dim} {level:?} floor {floor} row {r}: {found}, {exact}");
                        assert!(found >= exact.min(65_535.0), "{what}");
                        // Usual rows of many components lose a few steps, and a hundredth of the code's
                        // length where their cosine is a tenth off.
                        if dim == 512 && ![5, 7, 9, 11].contains(&(r % 16)) && exact < 65_000.0 {
                            counted += 1;
                            let lost = (x - 0.86).abs().min(0.1) / 10.0 * n / f64::from(tables.step);
                            assert!(found <= exact + 4.0 + lost, "{what}");
                        }
                    }
                }
            }
        }
        assert!(dim != 512 || counted > 0);
    }
}

#[test]
fn codewords_point_everywhere() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut least = f32::MAX;
    for n in 0..20_000 {
        // Axes and corners, then anything.
        let group: Vec<f32> = match n {
            0..8 => (0..8).map(|i| if i == n { 1.0 } else { 0.0 }).collect(),
            8..264 => {
                (0..8).map(|i| if (n - 8) >> i & 1 == 1 { 0.125_f32.sqrt() } else { -0.125_f32.sqrt() }).collect()
            }
            _ => unit(&mut rng, 8),
        };
        let (low, high) = extremes(&codebook::products(&group));
        least = least.min(high - low);
    }
    assert!(least > 50.0, "a range of {least}, of codewords of length 100");
}

#[test]
fn four_bit_codes_bound_the_cosine_from_above_and_closely_on_every_path() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        for dim in DIMS {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            let (rows, codes) = coded(&mut rng, dim, 2);
            let codes = codes.as_codes();
            let probes: Vec<f32> = (0..5).flat_map(|_| unit(&mut rng, dim)).collect();
            for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
                let prefilter =
                    Prefilter::new(kernels, dim, &probes, std::iter::repeat_n(Seed::default(), 5), certificate);
                let floor_bounds: Vec<FloorBounds> =
                    [0.05, 0.1, 0.2, 0.3].into_iter().map(|floor| prefilter.floor_bounds(floor)).collect();
                let floor_bounds =
                    [&floor_bounds[..], &[FloorBounds { floor: 0.0, bound: None, dithered: None }]].concat();
                let all = (0..codes.rows()).flat_map(|row| (0..5).map(move |probe| Hit::new(probe, row)));
                let mut hits: Vec<Hit> = all.collect();
                let refine_probes = floor_bounds
                    .iter()
                    .enumerate()
                    .map(|(p, floor_bounds)| RefineProbe::new(prefilter.quantised(p), floor_bounds.bound));
                let refine_probes: Vec<RefineProbe<'_>> = refine_probes.collect();
                let passed = prefilter.refine_hits(&mut hits, &codes, &refine_probes, &prefilter.bounds);
                let passed: std::collections::HashSet<(usize, usize)> =
                    hits[..passed].iter().map(|hit| (hit.probe(), hit.row())).collect();
                for (probe, row) in (0..5).flat_map(|probe| (0..codes.rows()).map(move |row| (probe, row))) {
                    let what = format!("{path} dim {dim} probe {probe} row {row}");
                    let zero = rows[row * dim..(row + 1) * dim].iter().all(|v| v.to_f32() == 0.0);
                    let Some(bound) = floor_bounds[probe].bound else {
                        assert!(passed.contains(&(probe, row)), "{what}");
                        continue;
                    };
                    // It reaches no floor that has a bound.
                    if zero {
                        continue;
                    }
                    let code = &codes.four_bit[row * dim / 2..(row + 1) * dim / 2];
                    let integer = |i: usize| {
                        let byte = code[i % (dim / 2)];
                        f64::from(2 * i32::from(if i < dim / 2 { byte & 15 } else { byte >> 4 }) - 15)
                    };
                    let norm = (0..dim).map(|i| integer(i).powi(2)).sum::<f64>().sqrt();
                    let exact = (0..dim).map(|i| integer(i) * f64::from(prefilter.probe(probe)[i])).sum::<f64>() / norm;
                    let least =
                        f64::from(bound.least_product(prefilter.bounds.angle(codes.factors[row].four_bit_cosine())));
                    let error = prefilter.quantised(probe).error();
                    if exact >= least + 1e-6 {
                        assert!(passed.contains(&(probe, row)), "{what}: {exact} reaches {least}");
                    } else if exact + 2.0 * error + 1e-6 < least {
                        assert!(!passed.contains(&(probe, row)), "{what}: {exact} is far from {least}");
                    }
                }
            }
        }
    }
}
