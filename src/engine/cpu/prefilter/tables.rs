//! A probe's look-up tables for the first pass, with the proof that they bound <q, c> from above.
//!
//! Pure but for the dither, whose random numbers the caller brings.

use rand::{Rng, RngExt};
use thenar_index::codebook;
use thenar_index::codes::BLOCK_ROWS;

use super::Level;
use super::kernels::CodeKernels;
use super::layout::IndexLine;

/// What the sum of entries that are added in bytes may reach, as a multiple of the mean range of as many
/// groups: finer steps would cut more off. Less if sums saturate, since sums of many numbers rarely reach as
/// much. Simulated for one to sixteen.
fn range_kept(level: Level, together: usize) -> f32 {
    if level.saturates() { 0.65 + 0.6 / together as f32 } else { 0.95 + 0.15 / together as f32 }
}

/// By how many steps f32 arithmetic may make an entry too large: see [`Tables::new`].
const ENTRY_SLACK: f64 = 1.0 / 256.0;

/// A probe's look-up tables at one level.
#[derive(Debug)]
pub(super) struct Tables {
    /// Shape: `[groups, 2^bits]`.
    pub(super) entries: Vec<IndexLine>,
    /// <q, c> <= offset - step * sum of the entries at c's indices; of dithered tables, the same with a
    /// sum of errors on the right, one for each group: independent, and uniform from -1/2 to 1/2 step.
    pub(super) offset: f32,
    pub(super) step: f32,
}

impl Tables {
    /// The entry of index i in group g is by how many steps the group's part v of <q, c> falls short of
    /// the group's largest, rounded down: v <= high_g - step * entry; the largest parts of all groups
    /// add up to the offset, apart from dither and slack. An entry that is too large for its byte, or a sum
    /// of entries for its own, is replaced by the largest that fits, which makes the bound of v larger. If
    /// sums do not saturate, each group has a share of the byte, by its range.
    ///
    /// An entry of x steps is kept as floor(x + u). Without a dither u is 0, and the entry is at most x.
    /// `dither`, if any, is the largest step of dithered entries: then u is uniform on
    /// [0, 1), one number for all entries of a group, and u - 1/2 is subtracted again. All rows share
    /// the numbers of a probe, so their sum goes into the offset, once:
    ///
    /// ```text
    /// offset = sum of (high_g + step (u_g - 1/2 + ENTRY_SLACK))
    /// ```
    ///
    /// With that floor(x + u) - u + 1/2 = x + e, and e is uniform on (-1/2, 1/2] whatever x is: what
    /// [`crate::engine::certificate`] requires of errors. An entry or a sum that is too small, because it is capped or
    /// saturates, makes the bound of <q, c> larger.
    ///
    /// [`ENTRY_SLACK`]: an entry must not be larger than floor(x + ENTRY_SLACK + u), with x from `high`
    /// (an f32) to the part over the reals, and u over the reals too. Since that is at least
    /// zero, a cast that saturates at zero is on the safe side.
    /// - Parts of 2-bit codes are added up in f32 by at most 16 additions of factors whose magnitudes
    ///   sum to half the group's range, so they are wrong by less than 2^-18 of the range. Those of codewords
    ///   are eight products of a group q_g with a codeword of length 100: wrong by less than
    ///   2^-20 * 100 ‖q_g‖, and the largest range is at least a quarter of the largest 100 ‖q_g‖, since codewords
    ///   point everywhere (`codewords_point_everywhere`). A step is at least 1/512 of the largest range, so
    ///   either is below 2^-9 of a step.
    /// - A subtraction, an inverse, a multiplication and the addition of u round at most 513 steps to 24
    ///   bits each: below 2^-12 of a step.
    /// - u has 24 bits: it is at most 2^-24 below the real number.
    ///
    /// The offset is summed in f64 and rounded up.
    pub(super) fn new(
        kernels: &CodeKernels,
        level: Level,
        probe: &[f32],
        dither: Option<f32>,
        rng: &mut impl Rng,
    ) -> Self {
        const RANGE_PARTS: f32 = 512.0;
        let dims = kernels.group_dims(level);
        let groups = kernels.groups(level, probe.len());
        let together = kernels.together(level);
        let bits = kernels.index_bits(level);
        let mut parts = vec![0.0_f32; probe.len().div_ceil(dims) << bits];
        let of_groups = parts.chunks_exact_mut(1 << bits).zip(probe.chunks(dims));
        let extremes: Vec<(f32, f32)> = of_groups.map(|(parts, group)| fill_parts(parts, group, dims, level)).collect();
        let ranges = extremes.iter().map(|(low, high)| high - low);
        let largest = ranges.clone().fold(0.0, f32::max);
        let usual = ranges.sum::<f32>() / extremes.len() as f32 * together as f32;
        let entry_max = kernels.entry_max(level, probe.len());
        let sum_max = (together * usize::from(entry_max)).min(usize::from(u8::MAX));
        // A probe of zeros has no range; any step will do.
        let least = (largest / RANGE_PARTS).max(f32::MIN_POSITIVE / f32::EPSILON);
        let wanted = (range_kept(level, together) * usual / sum_max as f32).max(least);
        let dithered = dither.filter(|step| *step >= least);
        let step = dithered.map_or(wanted, |step_max| wanted.min(step_max));
        let inverse = 1.0 / step;

        let mut entries = vec![IndexLine::ZERO; (groups << bits).div_ceil(BLOCK_ROWS)];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut entries);
        let mut offset = 0.0_f64;
        let tables = bytes.chunks_exact_mut(1 << bits).zip(parts.chunks_exact(1 << bits));
        let of_chunks = extremes.chunks(together).flat_map(|chunk| {
            let range: f32 = chunk.iter().map(|(low, high)| high - low).sum();
            // The shares of a chunk, each rounded down twice, add up to a byte at most.
            let share = move |low: f32, high: f32| ((high - low) / range * (255.0 - 1.0 / 64.0)) as u8;
            chunk.iter().map(move |(low, high)| if level.saturates() { u8::MAX } else { share(*low, *high) })
        });
        let caps: Vec<u8> = of_chunks.map(|cap| cap.min(entry_max)).collect();
        for (((table, parts), (_, high)), cap) in tables.zip(&extremes).zip(caps) {
            let (up, middle) = if dithered.is_some() { (rng.random::<f32>(), 0.5) } else { (0.0, 0.0) };
            offset += f64::from(*high) + f64::from(step) * (f64::from(up) - middle + ENTRY_SLACK);
            for (entry, part) in table.iter_mut().zip(parts) {
                // The cast rounds down, and saturates at 0 and at the top.
                *entry = (((high - part) * inverse + up) as u8).min(cap);
            }
        }
        Self { entries, offset: (offset as f32).next_up(), step }
    }
}

/// The least and the largest of some numbers.
pub(super) fn extremes(numbers: &[f32]) -> (f32, f32) {
    numbers.iter().fold((f32::MAX, f32::MIN), |(low, high), number| (low.min(*number), high.max(*number)))
}

/// The parts of <q, c> for every index of a group. Indices are numbers of codewords, or bits set for negative
/// components and, above them, for large ones. Returns the least and the largest part.
pub(super) fn fill_parts(parts: &mut [f32], group: &[f32], dims: usize, level: Level) -> (f32, f32) {
    if level == Level::Codebook {
        parts.copy_from_slice(&codebook::products(group));
        return extremes(parts);
    }
    parts[0] = group.iter().sum();
    for bit in 0..dims {
        let twice = 2.0 * group.get(bit).copied().unwrap_or(0.0);
        let (done, next) = parts.split_at_mut(1 << bit);
        for (next, done) in next.iter_mut().zip(done) {
            *next = *done - twice;
        }
    }
    for bit in 0..dims {
        let twice = 2.0 * group.get(bit).copied().unwrap_or(0.0);
        let (done, next) = parts.split_at_mut(1 << (dims + bit));
        for (at, (next, done)) in next.iter_mut().zip(done).enumerate() {
            // Three times the component instead of once.
            *next = if at >> bit & 1 == 1 { *done - twice } else { *done + twice };
        }
    }
    let reach = 3.0 * group.iter().map(|q| q.abs()).sum::<f32>();
    (-reach, reach)
}
