//! Kernels against their twin, and bounds against what they bound.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use thenar_index::codes::OwnedCodes;

use super::kernels::Least;
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

/// Blocks of rows with their codes, some rows all zero, some far from any quantiser's liking.
fn coded(rng: &mut ChaCha8Rng, dim: usize, blocks: usize) -> (Vec<f16>, OwnedCodes) {
    let rows: Vec<f16> = (0..blocks * BLOCK_ROWS)
        .flat_map(|row| match row % 16 {
            3 => vec![0.0; dim],
            5 => (0..dim).map(|i| if i == row % dim { 1.0 } else { 0.0 }).collect(),
            7 => vec![-1.0 / (dim as f32).sqrt(); dim],
            _ => unit(rng, dim),
        })
        .map(f16::from_f32)
        .collect();
    let codes = OwnedCodes::of(&rows, dim);
    (rows, codes)
}

/// The integers of a row's code at a level, from the bits of its planes.
fn integers(codes: &Codes<'_>, level: Level, dim: usize, row: usize) -> Vec<f64> {
    let (block, lane) = (row / BLOCK_ROWS, row % BLOCK_ROWS);
    let bit = |plane: &[u8], i: usize| plane[(block * dim / 8 + i / 8) * BLOCK_ROWS + lane] >> (i % 8) & 1 == 1;
    (0..dim)
        .map(|i| {
            let magnitude = if level == Level::Two && bit(codes.two, i) { 3.0 } else { 1.0 };
            if bit(codes.sign, i) { -magnitude } else { magnitude }
        })
        .collect()
}

/// Sums of all rows of up to four blocks against one or two probes, by the kernels of a path.
fn sums(kernels: &CodeKernels, level: Level, dim: usize, codes: &Codes<'_>, tables: &[&Tables]) -> Box<ScanHits> {
    let blocks = codes.rows() / BLOCK_ROWS;
    let groups = kernels.groups(level, dim);
    let mut indices = vec![IndexLine::ZERO; groups * blocks];
    kernels.spread(codes.sign, codes.two, dim, blocks, level, &mut indices);
    let mut hits = Box::new(ScanHits::EMPTY);
    let call = ScanCall {
        indices: &indices,
        blocks,
        tables: [&tables[0].entries, &tables[tables.len() - 1].entries],
        probes: tables.len(),
        groups,
        least: &Least::default(),
    };
    assert!(kernels.scan(&call, &mut hits));
    hits
}

#[test]
fn first_looks_bound_the_product_from_above_and_closely_on_every_path() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        for dim in DIMS {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            for level in Level::ALL {
                for blocks in 1..=TILE_BLOCKS {
                    let (_, codes) = coded(&mut rng, dim, blocks);
                    let codes = codes.as_codes();
                    let mut spike = vec![0.0; dim];
                    spike[dim / 2] = -1.0;
                    let probes = [unit(&mut rng, dim), if blocks == 2 { spike } else { unit(&mut rng, dim) }];
                    let tables = probes.each_ref().map(|probe| Tables::new(kernels, level, probe));
                    let hits = sums(kernels, level, dim, &codes, &tables.each_ref()[..1 + blocks % 2]);
                    for p in 0..1 + blocks % 2 {
                        // What rounding up can add, and what is lost where a group's range is larger
                        // than its table's.
                        let step = f64::from(tables[p].step);
                        let kept = step * (f64::from(kernels.entry_max(level, dim)) - 1.0);
                        let largest = if level == Level::Sign { 1.0 } else { 3.0 };
                        let loose = kernels.groups(level, dim) as f64 * step * 1.01
                            + probes[p]
                                .chunks(kernels.group_dims(level))
                                .map(|group| 2.0 * largest * group.iter().map(|q| f64::from(q.abs())).sum::<f64>())
                                .map(|range| (range - kept).max(0.0))
                                .sum::<f64>();
                        for row in 0..codes.rows() {
                            let exact: f64 = integers(&codes, level, dim, row)
                                .iter()
                                .zip(&probes[p])
                                .map(|(c, q)| c * f64::from(*q))
                                .sum();
                            let sum = hits.sums[p][row / BLOCK_ROWS][row % BLOCK_ROWS];
                            let bound = f64::from(tables[p].offset) + f64::from(tables[p].step) * f64::from(sum);
                            let what = format!("{path} dim {dim} {level:?} blocks {blocks} probe {p} row {row}");
                            assert!(bound >= exact - 1e-5, "{what}: {bound} < {exact}");
                            assert!(bound <= exact + loose, "{what}: {bound} > {exact} + {loose}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_scan_reports_exactly_the_rows_that_reach_the_least() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for blocks in 1..=TILE_BLOCKS {
            for probes in 1..=SCAN_PROBES {
                let groups = 4 * kernels.together;
                let line = |rng: &mut ChaCha8Rng| {
                    IndexLine(std::array::from_fn(|_| rng.random_range(0..(1_u32 << kernels.bits)) as u8))
                };
                let indices: Vec<IndexLine> = (0..groups * blocks).map(|_| line(&mut rng)).collect();
                let entry_max = (255 / kernels.together) as u8;
                let tables: [Vec<IndexLine>; 2] = std::array::from_fn(|_| {
                    (0..(groups << kernels.bits).div_ceil(BLOCK_ROWS))
                        .map(|_| IndexLine(std::array::from_fn(|_| rng.random_range(0..=entry_max))))
                        .collect()
                });
                let wanted = |p: usize, block: usize, row: usize| -> u16 {
                    (0..groups)
                        .map(|g| {
                            let index = usize::from(indices[g * blocks + block].0[row]);
                            u16::from(bytemuck::cast_slice::<IndexLine, u8>(&tables[p])[(g << kernels.bits) + index])
                        })
                        .sum()
                };
                let middle = wanted(0, 0, 5);
                let mut least: Least = [[middle; TILE_BLOCKS]; SCAN_PROBES];
                least[0][blocks - 1] = u16::MAX;
                let call = ScanCall {
                    indices: &indices,
                    blocks,
                    tables: tables.each_ref().map(|t| &**t),
                    probes,
                    groups,
                    least: &least,
                };
                let mut hits = ScanHits::EMPTY;
                let any = kernels.scan(&call, &mut hits);
                let mut expected_any = false;
                for (p, block) in (0..probes).flat_map(|p| (0..blocks).map(move |block| (p, block))) {
                    let mask = (0..BLOCK_ROWS)
                        .fold(0, |mask, row| mask | u64::from(wanted(p, block, row) >= least[p][block]) << row);
                    assert_eq!(hits.masks[p][block], mask, "{path} blocks {blocks} probe {p} block {block}");
                    for row in (0..BLOCK_ROWS).filter(|_| mask != 0) {
                        assert_eq!(hits.sums[p][block][row], wanted(p, block, row), "{path} row {row}");
                    }
                    expected_any |= mask != 0;
                }
                assert_eq!(any, expected_any);
            }
        }
    }
}

#[test]
fn fine_codes_bound_the_cosine_from_above_and_closely_on_every_path() {
    for path in paths() {
        let kernels = CodeKernels::of(path);
        for dim in DIMS {
            let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
            let (rows, codes) = coded(&mut rng, dim, 2);
            let codes = codes.as_codes();
            for _ in 0..4 {
                let probe = unit(&mut rng, dim);
                let fine = FineProbe::new(&probe);
                for row in 0..codes.rows() {
                    if rows[row * dim..(row + 1) * dim].iter().all(|v| v.to_f32() == 0.0) {
                        continue;
                    }
                    let code = &codes.fine[row * dim / 2..(row + 1) * dim / 2];
                    let integer = |i: usize| {
                        let byte = code[i % (dim / 2)];
                        f64::from(2 * i32::from(if i < dim / 2 { byte & 15 } else { byte >> 4 }) - 15)
                    };
                    let norm = (0..dim).map(|i| integer(i).powi(2)).sum::<f64>().sqrt();
                    let exact = (0..dim).map(|i| integer(i) * f64::from(probe[i])).sum::<f64>() / norm;
                    let reach = f64::from(fine.reach(kernels, code, codes.terms[row]));
                    assert!(reach >= exact - 1e-6, "{path} dim {dim} row {row}: {reach} < {exact}");
                    assert!(reach <= exact + 2.0 * f64::from(fine.error) + 1e-6, "{path} dim {dim} row {row}");
                }
            }
        }
    }
}

#[test]
fn rows_that_reach_their_bars_are_the_same_on_every_path_but_for_the_last_bit() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for certificate in [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }] {
        let cutter = Cutter::new(certificate, 512);
        for _ in 0..200 {
            let cut = cutter.cut(rng.random_range(0.1..0.9)).unwrap();
            let reach = Reach { offset: rng.random_range(-60.0..-30.0), step: rng.random_range(0.005..0.02) };
            let sums: [u16; BLOCK_ROWS] = std::array::from_fn(|_| rng.random_range(0..8000));
            let mut rows = RowTerms::EMPTY;
            for r in 0..BLOCK_ROWS {
                let leaning = cutter.leaning(rng.random_range(0.7..0.99));
                rows.norm[r] = rng.random_range(20.0..45.0);
                rows.along[r] = leaning.along * rows.norm[r];
                rows.across[r] = leaning.across * rows.norm[r];
            }
            for path in paths() {
                let mask = CodeKernels::of(path).reaching(&sums, reach, cut, &rows);
                for (r, sum) in sums.iter().enumerate() {
                    let bound = f64::from(reach.offset) + f64::from(reach.step) * f64::from(*sum);
                    let (along, across, slack) = cut.parts();
                    let bar = f64::from(along) * f64::from(rows.along[r])
                        - f64::from(across) * f64::from(rows.across[r])
                        - f64::from(slack) * f64::from(rows.norm[r]);
                    // Far less than the slack times the length.
                    if (bound - bar).abs() > 1e-4 {
                        assert_eq!(mask >> r & 1 == 1, bound >= bar, "{path} row {r}: {bound}, {bar}");
                    }
                }
            }
        }
    }
}
