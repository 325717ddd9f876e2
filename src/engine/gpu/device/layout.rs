//! How do codes and probes lie on the device, and how many bytes does a row take there?
//!
//! Files keep codes as the CPU's kernels read them; here the words of neighbouring rows lie side by side, so
//! that neighbouring invocations read neighbouring words. `shaders/bindings.wgsl` has the layout of codes,
//! each kernel that of its probes. Pure; knows slices alone.

use half::f16;
use rayon::prelude::*;
use thenar_index::codes::{BLOCK_ROWS, Codes, Factors};
use zeroize::{Zeroize, Zeroizing};

use super::bindings::COSINE_PARTS;
use super::kernels::Kernel;
use crate::engine::quantised_probe::QuantisedProbe;

/// Words of a quad.
const QUAD: usize = 4;
/// Bytes of a row's factors on the device.
pub(crate) const FACTORS_BYTES: usize = 8;

/// A code that is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Level {
    /// One bit per component, 64 bytes per row of 512; only under a randomised certificate.
    OneBit,
    /// Four bits per component, four times as many bytes.
    FourBit,
}

impl Level {
    /// Both, in the order of [`Level::index`].
    pub(crate) const ALL: [Self; 2] = [Self::OneBit, Self::FourBit];

    /// Its place in [`Level::ALL`].
    pub(crate) fn index(self) -> usize {
        match self {
            Self::OneBit => 0,
            Self::FourBit => 1,
        }
    }

    /// What is added to the dot product of a probe with the unsigned integers that codes keep, times -2 or 2: the
    /// sum is <k, c> then.
    pub(crate) fn base(self, probe: &QuantisedProbe) -> i32 {
        match self {
            Self::OneBit => probe.sum(),
            Self::FourBit => -15 * probe.sum(),
        }
    }

    /// Quads of a row's code. 1-bit codes are padded to whole ones with components that no probe has.
    pub(crate) fn quads(self, dim: usize) -> usize {
        match self {
            Self::OneBit => dim.div_ceil(128),
            Self::FourBit => dim / 32,
        }
    }

    /// Bytes of a row's code.
    pub(crate) fn row_bytes(self, dim: usize) -> usize {
        self.quads(dim) * QUAD * 4
    }

    /// How many times a quad is spread into bytes.
    pub(crate) fn spreads(self) -> usize {
        match self {
            Self::OneBit => 8,
            Self::FourBit => 2,
        }
    }

    /// The component in byte `byte` of word `word` of quad `quad` after the `nth` spread; `dim` or more in
    /// the padding.
    fn component(self, dim: usize, quad: usize, nth: usize, word: usize, byte: usize) -> usize {
        match self {
            Self::OneBit => 128 * quad + 32 * word + 8 * byte + nth,
            Self::FourBit => nth * (dim / 2) + 16 * quad + 4 * word + byte,
        }
    }

    /// The component at `place` of the `chunk`-th 32 components, in the order in which `scan_coop` unpacks
    /// them.
    fn unpacked(self, dim: usize, chunk: usize, place: usize) -> usize {
        match self {
            Self::OneBit => 32 * chunk + place,
            Self::FourBit => self.component(dim, chunk, place % 2, place / 8, place % 8 / 2),
        }
    }
}

/// Bytes of codes and factors that a row takes on the device.
pub(crate) fn row_bytes(dim: usize) -> usize {
    Level::ALL.iter().map(|level| level.row_bytes(dim)).sum::<usize>() + FACTORS_BYTES
}

/// Codes of whole blocks in the layout of the device. Wiped when it is dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DeviceCodes {
    /// Shape: `[blocks, quads, 64, 4]`.
    pub(crate) one_bit: Vec<u32>,
    /// Shape: `[blocks, quads, 64, 4]`.
    pub(crate) four_bit: Vec<u32>,
    /// Shape: `[rows]`.
    pub(crate) factors: Vec<[u32; 2]>,
}

impl DeviceCodes {
    pub(crate) fn new(codes: &Codes<'_>, dim: usize) -> Self {
        let blocks = codes.rows() / BLOCK_ROWS;
        let [one_bit_words, four_bit_words] = Level::ALL.map(|level| level.row_bytes(dim) / 4 * BLOCK_ROWS);
        let mut laid_out = Self {
            one_bit: vec![0; blocks * one_bit_words],
            four_bit: vec![0; blocks * four_bit_words],
            factors: codes.factors.iter().map(|factors| packed(*factors)).collect(),
        };
        let place = |row: usize, word: usize| (word / QUAD * BLOCK_ROWS + row) * QUAD + word % QUAD;
        let one_bit = codes.one_bit.par_chunks_exact(dim / 8 * BLOCK_ROWS);
        one_bit.zip(laid_out.one_bit.par_chunks_exact_mut(one_bit_words)).for_each(|(lines, to)| {
            // Word w of a row is made of its bytes in lines 4w to 4w + 3.
            for (word, lines) in lines.chunks_exact(4 * BLOCK_ROWS).enumerate() {
                for row in 0..BLOCK_ROWS {
                    let bytes = std::array::from_fn(|line| lines[line * BLOCK_ROWS + row]);
                    to[place(row, word)] = u32::from_le_bytes(bytes);
                }
            }
        });
        let four_bit = codes.four_bit.par_chunks_exact(dim / 2 * BLOCK_ROWS);
        four_bit.zip(laid_out.four_bit.par_chunks_exact_mut(four_bit_words)).for_each(|(rows, to)| {
            for (row, code) in rows.chunks_exact(dim / 2).enumerate() {
                for (word, bytes) in code.as_chunks::<4>().0.iter().enumerate() {
                    to[place(row, word)] = u32::from_le_bytes(*bytes);
                }
            }
        });
        laid_out
    }
}

impl Drop for DeviceCodes {
    fn drop(&mut self) {
        self.one_bit.zeroize();
        self.four_bit.zeroize();
        bytemuck::cast_slice_mut::<[u32; 2], u32>(&mut self.factors).zeroize();
    }
}

/// The factors of a row as the device has them.
fn packed(factors: Factors) -> [u32; 2] {
    // Stored cosines are whole parts, so these products are exact.
    let parts = |cosine: f32| (cosine * COSINE_PARTS) as u32;
    [parts(factors.one_bit_cosine()) | parts(factors.four_bit_cosine()) << 16, factors.four_bit_square()]
}

/// A batch of probes as a kernel reads them, padded with zeros.
pub(crate) fn pack(kernel: Kernel, level: Level, probes: &[&QuantisedProbe], dim: usize) -> Zeroizing<Vec<u32>> {
    let (tile_probes, padded) = (kernel.tile_probes(), kernel.padded(probes.len()));
    let spreads: Vec<(usize, usize)> = spreads(level, dim).collect();
    match kernel {
        Kernel::Few { .. } => {
            let mut packed = Zeroizing::new(pack_rows(level, probes, dim).to_vec());
            packed.resize(padded * spreads.len() * QUAD, 0);
            packed
        }
        Kernel::Many => {
            let mut packed = Zeroizing::new(vec![0; padded * spreads.len() * QUAD]);
            for (number, probe) in probes.iter().enumerate() {
                let (tile, column) = (number / tile_probes, number % tile_probes);
                for (index, (quad, nth)) in spreads.iter().enumerate() {
                    let at = ((tile * spreads.len() + index) * tile_probes + column) * QUAD;
                    packed[at..at + QUAD].copy_from_slice(&words(probe, level, dim, *quad, *nth));
                }
            }
            packed
        }
        Kernel::Coop => {
            let chunks = dim / 32;
            let halves: [u32; 256] =
                std::array::from_fn(|byte| f16::from_f32(f32::from((byte as u8).cast_signed())).to_bits().into());
            let mut packed = Zeroizing::new(vec![0; padded * dim / 2]);
            for (number, probe) in probes.iter().enumerate() {
                let (tile, column) = (number / tile_probes, number % tile_probes);
                for chunk in 0..chunks {
                    let at = ((tile * chunks + chunk) * tile_probes + column) * 16;
                    for (pair, word) in packed[at..at + 16].iter_mut().enumerate() {
                        let integer = |place| integer(probe, level.unpacked(dim, chunk, place));
                        let half = |place| halves[usize::from(integer(place).cast_unsigned())];
                        *word = half(2 * pair) | half(2 * pair + 1) << 16;
                    }
                }
            }
            packed
        }
    }
}

/// Probe after probe, as `scan_few` and `refine` read them.
pub(crate) fn pack_rows(level: Level, probes: &[&QuantisedProbe], dim: usize) -> Zeroizing<Vec<u32>> {
    let mut packed = Zeroizing::new(Vec::with_capacity(probes.len() * level.quads(dim) * level.spreads() * QUAD));
    for probe in probes {
        packed.extend(spreads(level, dim).flat_map(|(quad, nth)| words(probe, level, dim, quad, nth)));
    }
    packed
}

/// Every spread of every quad of a code.
fn spreads(level: Level, dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..level.quads(dim)).flat_map(move |quad| (0..level.spreads()).map(move |nth| (quad, nth)))
}

/// The integer of a component; zero in the padding.
fn integer(probe: &QuantisedProbe, component: usize) -> i8 {
    probe.integers().get(component).copied().unwrap_or(0)
}

/// The words of a probe that the `nth` spread of a quad is multiplied with.
fn words(probe: &QuantisedProbe, level: Level, dim: usize, quad: usize, nth: usize) -> [u32; QUAD] {
    std::array::from_fn(|word| {
        let byte = |byte| integer(probe, level.component(dim, quad, nth, word, byte)).cast_unsigned();
        u32::from_le_bytes(std::array::from_fn(byte))
    })
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use thenar_index::codes::OwnedCodes;

    use super::*;
    use crate::engine::gpu::twin::component;

    fn random_codes(dim: usize) -> OwnedCodes {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let rows: Vec<f16> = (0..128 * dim).map(|_| f16::from_f32(rng.random_range(-1.0..1.0))).collect();
        OwnedCodes::of(&rows, dim)
    }

    /// Word `word` of quad `quad` of a row's code, where `codes[...]` in the kernels reads it.
    fn word_at(words: &[u32], level: Level, dim: usize, row: usize, quad: usize, word: usize) -> u32 {
        words[(((row / 64) * level.quads(dim) + quad) * 64 + row % 64) * QUAD + word]
    }

    #[test]
    fn every_component_of_every_row_lies_where_the_kernels_read_it() {
        for dim in [32, 96, 128, 544] {
            let owned = random_codes(dim);
            let codes = owned.as_codes();
            let laid_out = DeviceCodes::new(&codes, dim);
            for row in 0..128 {
                let [cosines, square] = laid_out.factors[row];
                assert_eq!(square, codes.factors[row].four_bit_square());
                assert_eq!((cosines & 0xffff) as f32 / 65_536.0, codes.factors[row].one_bit_cosine());
                assert_eq!((cosines >> 16) as f32 / 65_536.0, codes.factors[row].four_bit_cosine());
                for level in Level::ALL {
                    let words = if level == Level::OneBit { &laid_out.one_bit } else { &laid_out.four_bit };
                    let mut seen = vec![0; dim];
                    for ((quad, nth), word) in spreads(level, dim).flat_map(|at| (0..QUAD).map(move |word| (at, word)))
                    {
                        // `spread` in the kernels.
                        let code = word_at(words, level, dim, row, quad, word);
                        let spread = match level {
                            Level::OneBit => code >> nth & 0x0101_0101,
                            Level::FourBit => code >> (4 * nth) & 0x0f0f_0f0f,
                        };
                        for (byte, found) in spread.to_le_bytes().into_iter().enumerate() {
                            let i = level.component(dim, quad, nth, word, byte);
                            if i >= dim {
                                assert_eq!(found, 0, "padding");
                                continue;
                            }
                            seen[i] += 1;
                            check(&codes, dim, row, level, i, found);
                        }
                    }
                    assert!(seen.iter().all(|&times| times == 1), "dim {dim} {level:?}");
                }
            }
        }
    }

    /// Matrices do not run on every machine that tests, so the order in which their kernel unpacks codes is
    /// compared here with the one in which probes are packed for it.
    #[test]
    fn matrices_are_given_codes_and_probes_in_one_order() {
        for dim in [32, 160, 512] {
            let owned = random_codes(dim);
            let codes = owned.as_codes();
            let laid_out = DeviceCodes::new(&codes, dim);
            for (row, chunk) in (0..128).flat_map(|row| (0..dim / 32).map(move |chunk| (row, chunk))) {
                for place in 0..32 {
                    // `unpack` in the kernel: bit after bit of a word of a 1-bit code; of a quad of a 4-bit
                    // code, byte after byte, each the low half first.
                    let one_bit =
                        word_at(&laid_out.one_bit, Level::OneBit, dim, row, chunk / 4, chunk % 4) >> place & 1;
                    let word = word_at(&laid_out.four_bit, Level::FourBit, dim, row, chunk, place / 8);
                    let byte = word >> (place % 8 / 2 * 8) & 255;
                    let four_bit = if place % 2 == 0 { byte & 15 } else { byte >> 4 };
                    for (level, found) in Level::ALL.into_iter().zip([one_bit, four_bit]) {
                        check(&codes, dim, row, level, level.unpacked(dim, chunk, place), found as u8);
                    }
                }
            }
        }
    }

    fn check(codes: &Codes<'_>, dim: usize, row: usize, level: Level, i: usize, found: u8) {
        let found = match level {
            Level::OneBit => 1 - 2 * found.cast_signed(),
            Level::FourBit => 2 * found.cast_signed() - 15,
        };
        assert_eq!(found, component(codes, dim, level, row, i), "dim {dim} row {row} {level:?} component {i}");
    }
}
