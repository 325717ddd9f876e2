//! Synthetic people, whom the demo and the load harness enrol: the truth that answers are compared with.
//!
//! A palm is a row of the standard gallery. Palms come in groups of eleven that belong to ten
//! subjects: the tenth has two palms, a left and a right one, the others have one. So the number
//! of templates is exactly the number of palms.

use rayon::prelude::*;

use super::client::sample;
use crate::api::proto::{BulkEnrollItem, BulkEnrollRequest, EnrollRequest, PalmSample};
use crate::model::Hand;
use crate::model::synthetic::SyntheticGallery;

/// A threshold that tells these people apart. At 512 dimensions mates of the standard gallery score
/// above 0.65 and strangers, out of millions, below 0.58.
pub const THRESHOLD: f64 = 0.6;
/// Palms of a group.
const GROUP_PALMS: u32 = 11;
/// Subjects of a group.
const GROUP_SUBJECTS: u32 = 10;
/// Subjects in a message.
const MESSAGE_SUBJECTS: u32 = 512;

/// The people. Subjects are numbered from 0; those from [`Population::subjects`] on are newcomers
/// that are enrolled one by one, with one palm each.
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
        // An incomplete group has at most ten palms, each of a subject of its own.
        self.palms / GROUP_PALMS * GROUP_SUBJECTS + self.palms % GROUP_PALMS
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

    /// The first subject of each message that enrols a part of everybody.
    #[must_use]
    pub fn message_starts(&self) -> Vec<u32> {
        (0..self.subjects()).step_by(MESSAGE_SUBJECTS as usize).collect()
    }

    /// The message that begins with the subject `first`. Subject `i` has sequence number `i`.
    #[must_use]
    pub fn message(&self, first: u32) -> BulkEnrollRequest {
        let item =
            |subject: u32| BulkEnrollItem { sequence: subject.into(), enrollment: Some(self.enrollment(subject)) };
        let subjects = first..self.subjects().min(first + MESSAGE_SUBJECTS);
        BulkEnrollRequest { items: subjects.into_par_iter().map(item).collect(), after_forget: None }
    }

    /// New captures of all of a subject's palms, with their hands. `nth` tells captures apart.
    #[must_use]
    pub fn captures(&self, subject: u32, nth: u16) -> Vec<PalmSample> {
        self.each_palm(subject, |row, out| self.gallery.mate(row, nth, out))
    }

    /// A new capture of a subject's first palm as a gate sees it, its hand unspecified.
    #[must_use]
    pub fn capture(&self, subject: u32, nth: u16) -> PalmSample {
        self.one(Hand::Unspecified, |out| self.gallery.mate(self.palms_of(subject).0, nth, out))
    }

    /// The palm of somebody who is not enrolled.
    #[must_use]
    pub fn stranger(&self, stranger: u32) -> PalmSample {
        self.one(Hand::Unspecified, |out| self.gallery.stranger(stranger, out))
    }

    /// Rows of a subject's only or left palm, and of the right one if there are two.
    fn palms_of(&self, subject: u32) -> (u32, Option<u32>) {
        if subject >= self.subjects() {
            return (self.palms + (subject - self.subjects()), None);
        }
        let (group, within) = (subject / GROUP_SUBJECTS, subject % GROUP_SUBJECTS);
        let first = group * GROUP_PALMS + within;
        let second = first + 1;
        (first, (within + 1 == GROUP_SUBJECTS && second < self.palms).then_some(second))
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
