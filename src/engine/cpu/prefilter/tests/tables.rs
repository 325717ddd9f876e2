//! Look-up tables bound products from above, with a dither and without.

use super::*;

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
