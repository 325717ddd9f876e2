//! Seeded palms: random unit vectors, captures near them, and galleries with a shape.
//!
//! Synthetic numbers, nobody's palm.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use thenar::model::Hand;

/// One capture: a hand and an embedding.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Palm {
    pub(crate) hand: Hand,
    pub(crate) values: Vec<f32>,
}

impl Palm {
    pub(crate) fn new(hand: Hand, values: Vec<f32>) -> Self {
        Self { hand, values }
    }
}

/// Draws palms of one dimension from one seed.
pub(crate) struct Palms {
    pub(crate) rng: ChaCha8Rng,
    dim: usize,
}

impl Palms {
    pub(crate) fn new(seed: u64, dim: usize) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), dim }
    }

    /// A unit vector in a uniform direction.
    pub(crate) fn vector(&mut self) -> Vec<f32> {
        let mut values: Vec<f32> = (0..self.dim).map(|_| self.rng.sample(StandardNormal)).collect();
        normalise(&mut values);
        values
    }

    /// A unit vector near `origin`: plus `noise` times an independent direction.
    pub(crate) fn near(&mut self, origin: &[f32], noise: f32) -> Vec<f32> {
        let mut values = self.vector();
        for (value, origin) in values.iter_mut().zip(origin) {
            *value = origin + noise * *value;
        }
        normalise(&mut values);
        values
    }

    pub(crate) fn hand(&mut self) -> Hand {
        [Hand::Unspecified, Hand::Left, Hand::Right][self.below(3)]
    }

    pub(crate) fn palm(&mut self) -> Palm {
        let hand = self.hand();
        Palm::new(hand, self.vector())
    }

    /// Names and a palm for each: `prefix-0`, `prefix-1` and so on.
    pub(crate) fn people(&mut self, prefix: &str, count: usize) -> Vec<(String, Palm)> {
        (0..count).map(|number| (format!("{prefix}-{number}"), self.palm())).collect()
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.rng.random_range(0..end)
    }
}

/// Scales to unit length.
pub(crate) fn normalise(values: &mut [f32]) {
    let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    values.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
}

/// How the vectors of a gallery lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Independent directions.
    Random,
    /// Few centres, each with a crowd that differs in the third digit.
    Clustered,
    /// One vector for everybody.
    AllEqual,
    /// Every second vector is the negative of the one before.
    Antipodes,
}

impl Shape {
    pub(crate) const ALL: [Self; 4] = [Self::Random, Self::Clustered, Self::AllEqual, Self::Antipodes];

    /// `count` unit vectors.
    pub(crate) fn vectors(self, palms: &mut Palms, count: usize) -> Vec<Vec<f32>> {
        match self {
            Self::Random => (0..count).map(|_| palms.vector()).collect(),
            Self::Clustered => {
                let centres: Vec<Vec<f32>> = (0..count.div_ceil(50)).map(|_| palms.vector()).collect();
                (0..count).map(|i| palms.near(&centres[i % centres.len()], 0.002)).collect()
            }
            Self::AllEqual => vec![palms.vector(); count],
            Self::Antipodes => {
                let mut vectors: Vec<Vec<f32>> = Vec::with_capacity(count);
                for i in 0..count {
                    let vector = if i % 2 == 1 { vectors[i - 1].iter().map(|v| -v).collect() } else { palms.vector() };
                    vectors.push(vector);
                }
                vectors
            }
        }
    }
}
