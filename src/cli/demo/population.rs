//! Who is in the demo's gallery: the truth that every answer is held against.
//!
//! A palm is a row of the standard gallery. Palms come in blocks of eleven that belong to ten
//! subjects: the tenth has two palms, a left and a right one, the others have one. So the number
//! of templates is the number of palms, to the last.

use crate::api::proto::{EnrollRequest, PalmSample};
use crate::cli::sample::sample;
use crate::model::Hand;
use crate::model::synthetic::SyntheticGallery;

/// Palms of a block.
const BLOCK_PALMS: u32 = 11;
/// Subjects of a block.
const BLOCK_SUBJECTS: u32 = 10;

/// The people of the demo. Subjects are numbered from 0; those from [`Population::subjects`] on
/// are newcomers that are enrolled one by one, with one palm each.
#[derive(Debug, Clone)]
pub struct Population {
    gallery: SyntheticGallery,
    palms: u32,
}

impl Population {
    /// `palms` palms of `dim` dimensions, the same for the same `seed`.
    #[must_use]
    pub fn new(seed: u64, dim: usize, palms: u32) -> Self {
        Self { gallery: SyntheticGallery::new(seed, dim), palms }
    }

    /// Palms enrolled at the start.
    #[must_use]
    pub fn palms(&self) -> u32 {
        self.palms
    }

    /// Subjects enrolled at the start.
    #[must_use]
    pub fn subjects(&self) -> u32 {
        // A broken block has at most ten palms, each of a subject of its own.
        self.palms / BLOCK_PALMS * BLOCK_SUBJECTS + self.palms % BLOCK_PALMS
    }

    /// The id under which a subject is enrolled.
    #[must_use]
    pub fn subject_id(subject: u32) -> String {
        format!("palm-{:07}", u64::from(subject) + 1)
    }

    /// Whether a subject has two palms.
    #[must_use]
    pub fn has_two(&self, subject: u32) -> bool {
        self.palms_of(subject).1.is_some()
    }

    /// The enrolment of a subject.
    #[must_use]
    pub fn enrollment(&self, subject: u32) -> EnrollRequest {
        let samples = self.each_palm(subject, |row, out| self.gallery.row(row, out));
        let subject_id = Self::subject_id(subject);
        EnrollRequest { request_id: format!("demo-{subject_id}"), subject_id, samples }
    }

    /// New captures of all of a subject's palms, with their hands. `nth` tells captures apart.
    #[must_use]
    pub fn captures(&self, subject: u32, nth: u16) -> Vec<PalmSample> {
        self.each_palm(subject, |row, out| self.gallery.mate(row, nth, out))
    }

    /// A new capture of a subject's first palm as a gate sees it: nobody says which hand it is.
    #[must_use]
    pub fn capture(&self, subject: u32, nth: u16) -> PalmSample {
        self.one(Hand::Unspecified, |out| self.gallery.mate(self.palms_of(subject).0, nth, out))
    }

    /// The palm of somebody who is not enrolled.
    #[must_use]
    pub fn stranger(&self, stranger: u32) -> PalmSample {
        self.one(Hand::Unspecified, |out| self.gallery.stranger(stranger, out))
    }

    /// Rows of a subject's only or left palm, and of the right one where there are two.
    fn palms_of(&self, subject: u32) -> (u32, Option<u32>) {
        if subject >= self.subjects() {
            return (self.palms + (subject - self.subjects()), None);
        }
        let (block, within) = (subject / BLOCK_SUBJECTS, subject % BLOCK_SUBJECTS);
        let first = block * BLOCK_PALMS + within;
        let second = first + 1;
        (first, (within + 1 == BLOCK_SUBJECTS && second < self.palms).then_some(second))
    }

    fn each_palm(&self, subject: u32, draw: impl Fn(u32, &mut [f32])) -> Vec<PalmSample> {
        match self.palms_of(subject) {
            (only, None) => {
                let hand = if subject.is_multiple_of(2) { Hand::Right } else { Hand::Left };
                vec![self.one(hand, |out| draw(only, out))]
            }
            (left, Some(right)) => {
                vec![self.one(Hand::Left, |out| draw(left, out)), self.one(Hand::Right, |out| draw(right, out))]
            }
        }
    }

    fn one(&self, hand: Hand, draw: impl FnOnce(&mut [f32])) -> PalmSample {
        let mut values = vec![0.0; self.gallery.dim()];
        draw(&mut values);
        sample(values, hand)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_palm_belongs_to_one_subject_and_every_tenth_subject_has_two() {
        for palms in 0..60 {
            let people = Population::new(1, 32, palms);
            let mut rows = HashSet::new();
            let mut pairs = 0;
            for subject in 0..people.subjects() {
                let (first, second) = people.palms_of(subject);
                assert!(rows.insert(first), "{palms} palms: row {first} twice");
                if let Some(second) = second {
                    assert!(rows.insert(second), "{palms} palms: row {second} twice");
                    assert_eq!(subject % 10, 9);
                    pairs += 1;
                }
            }
            assert_eq!(rows, (0..palms).collect(), "{palms} palms");
            assert_eq!(pairs, palms / 11);
        }
    }

    #[test]
    fn newcomers_have_palms_of_their_own() {
        let people = Population::new(1, 32, 25);
        let newcomer = people.enrollment(people.subjects() + 3);
        assert_eq!(newcomer.samples.len(), 1);
        assert_eq!(people.palms_of(people.subjects() + 3), (28, None));
        assert_eq!(newcomer.subject_id, "palm-0000027");
    }

    #[test]
    fn two_palms_carry_their_hands_and_a_gate_knows_none() {
        let people = Population::new(1, 32, 25);
        let hands: Vec<i32> = people.captures(9, 0).iter().map(|sample| sample.hand).collect();
        assert_eq!(hands, [1, 2]);
        assert!(people.has_two(9) && !people.has_two(8));
        assert_eq!(people.capture(9, 0).hand, 0);
        assert_ne!(people.capture(9, 0), people.capture(9, 1));
        assert_ne!(people.stranger(9), people.capture(9, 0));
    }
}
