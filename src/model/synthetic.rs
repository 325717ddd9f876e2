//! The synthetic gallery: the seeded gallery of every demonstration and benchmark.
//!
//! A row is a standard normal draw in `dim` dimensions with coordinate `i` (from 1) scaled by
//! `i^-0.35`, normalised: its spectrum decays like that of trained embeddings. A mated
//! probe is its row plus 0.85 times an independent normalised draw of the same kind, normalised.
//! At 512 dimensions mated scores average 0.76, and non-mated scores have a deviation of 0.087.
//!
//! Row `i` depends only on the seed, `dim` and `i` (it has its own ChaCha8 stream), so rows can be
//! made on many threads and in any order, and an interrupted import can be resumed. It contains nobody's
//! palm: these are random numbers. Knows no files, no rotation and no f16.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// How fast the spectrum decays.
const DECAY: f64 = -0.35;
/// Length of the noise between two captures of one palm, whose own length is 1.
const NOISE: f32 = 0.85;

/// What a random stream is for: streams of the same number but different purpose are independent.
#[derive(Clone, Copy)]
enum Draw {
    Row = 0,
    Capture = 1,
    Stranger = 2,
}

/// A synthetic gallery and its probes. Cheap to make and to clone for each thread.
///
/// ```
/// use thenar::model::synthetic::SyntheticGallery;
///
/// let gallery = SyntheticGallery::new(7, 512);
/// let (mut row, mut probe) = ([0.0; 512], [0.0; 512]);
/// gallery.row(12, &mut row);
/// gallery.mate(12, 0, &mut probe);
/// let score: f32 = row.iter().zip(&probe).map(|(x, q)| x * q).sum();
/// assert!(score > 0.6);
/// ```
#[derive(Debug, Clone)]
pub struct SyntheticGallery {
    origin: ChaCha8Rng,
    scales: Vec<f32>,
}

impl SyntheticGallery {
    /// The gallery of `seed` with embeddings of `dim` components.
    #[must_use]
    pub fn new(seed: u64, dim: usize) -> Self {
        Self::with_decay(seed, dim, DECAY)
    }

    /// A gallery whose spectrum decays as `i^decay` instead: benchmarks also use heavier ones.
    #[must_use]
    pub fn with_decay(seed: u64, dim: usize, decay: f64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            reason = "a scale is a figure of few digits and dimensions are small"
        )]
        let scales = (1..=dim).map(|i| (i as f64).powf(decay) as f32).collect();
        Self { origin: ChaCha8Rng::seed_from_u64(seed), scales }
    }

    /// Components of an embedding.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.scales.len()
    }

    /// Writes the embedding of row `i`, of unit length. Shape: `[dim]`.
    ///
    /// # Panics
    /// If `row` does not have `dim` components; the other two methods do so, too.
    pub fn row(&self, i: u32, row: &mut [f32]) {
        self.draw(Draw::Row, 0, i, row);
    }

    /// Writes the `nth` new capture of row `i`'s palm: a mated probe of unit length. Shape: `[dim]`.
    pub fn mate(&self, i: u32, nth: u16, probe: &mut [f32]) {
        let mut row = vec![0.0; self.dim()];
        self.row(i, &mut row);
        self.draw(Draw::Capture, nth, i, probe);
        for (probe, row) in probe.iter_mut().zip(&row) {
            *probe = row + NOISE * *probe;
        }
        normalise(probe);
    }

    /// Writes the `i`-th palm that is in no row: a non-mated probe of unit length. Shape: `[dim]`.
    pub fn stranger(&self, i: u32, probe: &mut [f32]) {
        self.draw(Draw::Stranger, 0, i, probe);
    }

    fn draw(&self, what: Draw, nth: u16, i: u32, out: &mut [f32]) {
        assert_eq!(out.len(), self.dim(), "room for one embedding");
        let mut rng = self.origin.clone();
        rng.set_stream((what as u64) << 48 | u64::from(nth) << 32 | u64::from(i));
        for (out, scale) in out.iter_mut().zip(&self.scales) {
            let normal: f32 = rng.sample(StandardNormal);
            *out = normal * scale;
        }
        normalise(out);
    }
}

/// Scales to unit length. The draws are never all zero.
fn normalise(values: &mut [f32]) {
    let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    #[expect(clippy::cast_possible_truncation, reason = "the inverse of a norm near 1")]
    let inverse = (1.0 / norm) as f32;
    values.iter_mut().for_each(|v| *v *= inverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn scores_have_the_published_statistics() {
        let gallery = SyntheticGallery::new(1, 512);
        let (mut row, mut probe) = ([0.0; 512], [0.0; 512]);
        let mut mated = Vec::new();
        for i in 0..256 {
            gallery.row(i, &mut row);
            gallery.mate(i, 0, &mut probe);
            mated.push(dot(&row, &probe));
        }
        let mean = mated.iter().sum::<f64>() / 256.0;
        let least = mated.iter().copied().fold(f64::INFINITY, f64::min);
        assert!((mean - 0.76).abs() < 0.005, "mated mean {mean}");
        assert!((0.66..0.72).contains(&least), "least mated {least}");

        // Independent pairs: scores of one probe share that probe's luck.
        let non_mated: Vec<f64> = (0..10_000)
            .map(|i| {
                gallery.row(1000 + i, &mut row);
                gallery.stranger(i, &mut probe);
                dot(&row, &probe)
            })
            .collect();
        let mean = non_mated.iter().sum::<f64>() / 10_000.0;
        let deviation = (non_mated.iter().map(|s| s * s).sum::<f64>() / 10_000.0).sqrt();
        assert!(mean.abs() < 0.004, "non-mated mean {mean}");
        assert!((deviation - 0.087).abs() < 0.003, "non-mated deviation {deviation}");
    }

    #[test]
    fn a_row_depends_on_seed_and_number_alone() {
        let (mut first, mut again) = ([0.0; 64], [0.0; 64]);
        SyntheticGallery::new(3, 64).row(9, &mut first);
        let gallery = SyntheticGallery::new(3, 64);
        gallery.row(8, &mut again);
        gallery.mate(9, 1, &mut again);
        gallery.row(9, &mut again);
        assert_eq!(first, again);
        SyntheticGallery::new(4, 64).row(9, &mut again);
        assert_ne!(first, again, "another seed");
    }

    #[test]
    fn rows_captures_and_strangers_of_one_number_are_different_draws() {
        let gallery = SyntheticGallery::new(5, 256);
        let mut draws = vec![vec![0.0; 256]; 4];
        gallery.row(2, &mut draws[0]);
        gallery.stranger(2, &mut draws[1]);
        gallery.mate(2, 0, &mut draws[2]);
        gallery.mate(2, 1, &mut draws[3]);
        assert!(dot(&draws[0], &draws[1]).abs() < 0.6);
        let between_captures = dot(&draws[2], &draws[3]);
        assert!((0.3..0.9).contains(&between_captures), "{between_captures}");
        for draw in &draws {
            assert!((dot(draw, draw) - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn the_gallery_of_a_seed_stays_the_same_in_every_version() {
        let mut row = [0.0; 32];
        SyntheticGallery::new(1, 32).row(0, &mut row);
        assert_eq!(row[..3].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), PINNED);
    }

    const PINNED: [u32; 3] = [3_182_834_866, 3_201_741_476, 1_034_937_971];
}
