//! The galleries that peers are compared on, and the probes, seeded.
//!
//! Every peer gets the same rows: those that Thenar stores, rotated by a key and rounded to f16
//! (others widen them again), and the same rotated f32 probes. So scores agree to the rounding of
//! the peer's own sums. A rotation changes no score and helps or hinders no peer but those that
//! look at single components.
//! Knows no files and no peers.

use std::ops::Range;

use clap::ValueEnum;
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rayon::prelude::*;
use serde::Serialize;
use thenar::model::synthetic::SyntheticGallery;
use thenar::vault::{MasterKey, Rotation, Vault};

/// The key of the rotation: figures are for one.
const KEY: [u8; 32] = *b"a key that everybody may know ..";
/// Rows rotated together, so that the matrix is read once for all of them.
const ROTATED_TOGETHER: usize = 64;
/// Rows of a family in the clustered gallery.
const FAMILY_ROWS: u32 = 50;
/// Cosines between rows of one family: each family has its own in this range.
const FAMILY_COSINES: Range<f64> = 0.6..0.8;
/// Decay of the heavy spectrum.
const HEAVY_DECAY: f64 = -0.8;
/// Length of the noise between two captures of one palm, as in the standard gallery.
const NOISE: f32 = 0.85;

/// The dimension that a command line says.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn dimension(text: &str) -> Result<usize, String> {
    let dim = text.replace('_', "").parse().map_err(|_| format!("{text:?} is not a number"))?;
    thenar::model::checked_dim(dim).map_err(|invalid| invalid.to_string())
}

/// Which gallery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GalleryKind {
    /// Independent rows, spectrum i^-0.35: the standard of every figure.
    Standard,
    /// Families of 50 rows that are near-duplicates, with cosines of 0.6 to 0.8.
    Clustered,
    /// Independent rows, spectrum i^-0.8: few directions matter, all scores are high.
    Heavy,
}

impl GalleryKind {
    /// As on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Clustered => "clustered",
            Self::Heavy => "heavy",
        }
    }
}

/// Where rows and probes come from.
struct Source {
    kind: GalleryKind,
    draws: SyntheticGallery,
    /// What tells rows of a family apart, and captures of a row.
    others: SyntheticGallery,
}

impl Source {
    fn new(kind: GalleryKind, seed: u64, dim: usize) -> Self {
        let of = |seed| match kind {
            GalleryKind::Heavy => SyntheticGallery::with_decay(seed, dim, HEAVY_DECAY),
            GalleryKind::Standard | GalleryKind::Clustered => SyntheticGallery::new(seed, dim),
        };
        Self { kind, draws: of(seed), others: of(!seed) }
    }

    fn row(&self, row: u32, out: &mut [f32]) {
        if self.kind != GalleryKind::Clustered {
            return self.draws.row(row, out);
        }
        // sqrt(c) centre + sqrt(1 - c) of a unit vector across it: two such have cosine c, give or
        // take how far their own parts are from orthogonal.
        let family = row / FAMILY_ROWS;
        let spread = (f64::from(family) * 0.618_033_988_75).fract();
        let cosine = FAMILY_COSINES.start + spread * (FAMILY_COSINES.end - FAMILY_COSINES.start);
        let mut centre = vec![0.0; out.len()];
        self.draws.row(family, &mut centre);
        self.others.row(row, out);
        let along = dot(&centre, out) as f32;
        out.iter_mut().zip(&centre).for_each(|(own, centre)| *own -= along * centre);
        normalise(out);
        let (common, apart) = (cosine.sqrt() as f32, (1.0 - cosine).sqrt() as f32);
        out.iter_mut().zip(&centre).for_each(|(own, centre)| *own = common * centre + apart * *own);
        normalise(out);
    }

    fn mate(&self, row: u32, out: &mut [f32]) {
        if self.kind != GalleryKind::Clustered {
            return self.draws.mate(row, 0, out);
        }
        let mut noise = vec![0.0; out.len()];
        self.row(row, out);
        self.others.stranger(row, &mut noise);
        out.iter_mut().zip(&noise).for_each(|(value, noise)| *value += NOISE * noise);
        normalise(out);
    }
}

/// The rows.
pub struct Gallery {
    source: Source,
    rotation: Rotation,
    dim: usize,
    rows: Vec<f16>,
}

impl Gallery {
    /// `len` rows of `dim` components, made on all threads.
    #[must_use]
    pub fn new(kind: GalleryKind, seed: u64, len: usize, dim: usize) -> Self {
        let source = Source::new(kind, seed, dim);
        let end = u32::try_from(len).expect("rows are counted in 32 bits");
        let rotation = Rotation::new(&Vault::new(MasterKey::from_bytes(KEY)), dim).expect("a dimension of a gallery");
        let mut rows = vec![f16::ZERO; len * dim];
        rows.par_chunks_mut(dim * ROTATED_TOGETHER)
            .zip((0..end).into_par_iter().step_by(ROTATED_TOGETHER))
            .for_each_init(
                || (vec![0.0; dim * ROTATED_TOGETHER], vec![0.0; dim * ROTATED_TOGETHER]),
                |(wide, rotated), (rows, first)| {
                    let wide = &mut wide[..rows.len()];
                    let rotated = &mut rotated[..rows.len()];
                    wide.chunks_exact_mut(dim).zip(first..).for_each(|(row, number)| source.row(number, row));
                    rotation.rotate_many(wide, rotated);
                    rows.convert_from_f32_slice(rotated);
                },
            );
        Self { source, rotation, dim, rows }
    }

    /// Components of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len() / self.dim
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// All rows. Shape: `[len, dim]`.
    #[must_use]
    pub fn rows(&self) -> &[f16] {
        &self.rows
    }

    /// One row. Shape: `[dim]`.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f16] {
        &self.rows[row * self.dim..(row + 1) * self.dim]
    }

    /// Mates of `count` rows spread over the gallery.
    #[must_use]
    pub fn probes(&self, count: usize) -> Probes {
        let mates: Vec<u32> =
            (0..count).map(|probe| u32::try_from(probe * self.len() / count).expect("a row number")).collect();
        let mut values = vec![0.0; count * self.dim];
        values.par_chunks_exact_mut(self.dim).zip(&mates).for_each(|(probe, mate)| {
            self.source.mate(*mate, probe);
            let rotated = self.rotation.rotate(probe);
            probe.copy_from_slice(&rotated);
        });
        Probes { dim: self.dim, values, mates }
    }
}

/// Mated probes.
pub struct Probes {
    dim: usize,
    values: Vec<f32>,
    mates: Vec<u32>,
}

impl Probes {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mates.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mates.is_empty()
    }

    /// The first `count` of them.
    #[must_use]
    pub fn first(&self, count: usize) -> Self {
        Self { dim: self.dim, values: self.values(0..count).to_vec(), mates: self.mates[..count].to_vec() }
    }

    /// Some of them. Shape: `[range.len(), dim]`.
    #[must_use]
    pub fn values(&self, range: Range<usize>) -> &[f32] {
        &self.values[range.start * self.dim..range.end * self.dim]
    }

    /// The row whose palm a probe shows.
    #[must_use]
    pub fn mate(&self, probe: usize) -> u32 {
        self.mates[probe]
    }
}

/// The cosine of two unit vectors, summed in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn normalise(values: &mut [f32]) {
    let inverse = (1.0 / dot(values, values).sqrt()) as f32;
    values.iter_mut().for_each(|value| *value *= inverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(gallery: &Gallery, row: usize) -> Vec<f32> {
        gallery.row(row).iter().map(|value| value.to_f32()).collect()
    }

    #[test]
    fn rows_of_a_family_are_near_duplicates_and_families_are_strangers() {
        let gallery = Gallery::new(GalleryKind::Clustered, 3, 400, 512);
        let mut within = Vec::new();
        for family in 0..8 {
            for (a, b) in [(0, 1), (2, 40), (17, 49)] {
                within.push(dot(&wide(&gallery, family * 50 + a), &wide(&gallery, family * 50 + b)));
            }
        }
        assert!(within.iter().all(|cosine| (0.5..0.9).contains(cosine)), "{within:?}");
        let mean = within.iter().sum::<f64>() / within.len() as f64;
        assert!((0.65..0.75).contains(&mean), "{mean}");
        assert!(dot(&wide(&gallery, 0), &wide(&gallery, 50)).abs() < 0.45);
    }

    #[test]
    fn a_probe_is_nearest_to_its_mate() {
        for kind in [GalleryKind::Standard, GalleryKind::Clustered] {
            let gallery = Gallery::new(kind, 1, 500, 512);
            let probes = gallery.probes(20);
            for probe in 0..20 {
                let score = |row: usize| dot(&wide(&gallery, row), probes.values(probe..probe + 1));
                let best = (0..500).max_by(|a, b| score(*a).total_cmp(&score(*b))).unwrap();
                assert_eq!(best, probes.mate(probe) as usize, "{kind:?}");
                assert!(score(best) > 0.6, "{kind:?}: {}", score(best));
            }
        }
    }

    #[test]
    fn a_heavy_spectrum_makes_strangers_alike() {
        let deviation = |kind| {
            let gallery = Gallery::new(kind, 5, 200, 256);
            let scores = (1..200).map(|row| dot(&wide(&gallery, 0), &wide(&gallery, row)).powi(2));
            (scores.sum::<f64>() / 199.0).sqrt()
        };
        let (standard, heavy) = (deviation(GalleryKind::Standard), deviation(GalleryKind::Heavy));
        assert!(heavy > 2.0 * standard, "{heavy} against {standard}");
    }
}
