//! Kernels against their twin, and bounds against what they bound.

mod refine;
mod row_bounds;
mod scan;
mod tables;

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
