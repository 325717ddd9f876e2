//! A scan finds exactly the rows whose deficits count, and lists them.

use super::*;

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
