//! From scores of rows to scores of subjects.
//!
//! A subject's score for one probe is that of its best comparable template (same hand, or an
//! unknown hand). Its fused score is the mean over the probes that have one: the sum rule of score
//! fusion (Kittler et al., "On combining classifiers", 1998), clamped to the least and the largest of
//! them, since rounding may carry a mean of f64 past them: the mean of three times 0.8055098475906457 ends
//! in 58. So a fused score never exceeds the subject's best single score, which is what lets `plan`
//! find every subject at or above a floor by looking for rows at or above it.

use std::cmp::Ordering;

use half::f16;
use thenar_index::{Snapshot, SubjectNumber, TemplateId};

use super::{Found, Probe, score};
use crate::model::Hand;

/// The exact fused score of `subject` against `probes`, or `None` if no template of it is live
/// and comparable with any of them.
#[must_use]
pub fn fuse(snapshot: &Snapshot, subject: SubjectNumber, probes: &[Probe]) -> Option<Found> {
    let rows = snapshot.rows_of(subject);
    let mut sum = 0.0;
    let (mut least, mut largest) = (f64::INFINITY, f64::NEG_INFINITY);
    let mut compared = 0_u32;
    let mut best: Option<(f64, TemplateId, Hand)> = None;
    let mut subject_id: Box<str> = Box::default();
    for probe in probes {
        let mut best_of_probe: Option<f64> = None;
        for &row in rows.iter() {
            let Some(meta) = snapshot.meta(row) else { continue };
            let hand = Hand::from_code(meta.hand).unwrap_or_default();
            if !probe.hand.comparable(hand) {
                continue;
            }
            let vector: &[f16] = snapshot.row(row);
            let exact = score::exact(vector, &probe.vector);
            if best_of_probe.is_none_or(|b| exact > b) {
                best_of_probe = Some(exact);
            }
            // Among equals the smallest id over all probes: an earlier probe may have seen a larger id first.
            if best.is_none_or(|(b, id, _)| exact > b || (exact == b && meta.template < id)) {
                best = Some((exact, meta.template, hand));
                if subject_id.is_empty() {
                    subject_id = meta.label.into();
                }
            }
        }
        if let Some(score) = best_of_probe {
            sum += score;
            least = score.min(least);
            largest = score.max(largest);
            compared += 1;
        }
    }
    let (_, template, hand) = best?;
    let score = (sum / f64::from(compared)).clamp(least, largest);
    Some(Found { subject, subject_id, score, hand, template, probes_compared: compared })
}

/// The order of an answer: higher score first, ties by the smaller template id.
#[must_use]
pub fn order(a: &Found, b: &Found) -> Ordering {
    b.score.total_cmp(&a.score).then(a.template.cmp(&b.template))
}

/// The `k` best subjects offered so far, in order.
pub struct Best {
    k: usize,
    found: Vec<Found>,
}

impl Best {
    /// With room for the `k` best.
    #[must_use]
    pub fn new(k: usize) -> Self {
        Self { k, found: Vec::with_capacity(k + 1) }
    }

    /// Offers a subject. Offering one again, with the same score, changes nothing.
    pub fn offer(&mut self, found: Found) {
        if self.holds(found.subject) {
            return;
        }
        let at = self.found.partition_point(|f| order(f, &found) == Ordering::Less);
        if at < self.k {
            self.found.insert(at, found);
            self.found.truncate(self.k);
        }
    }

    /// Whether this subject is among those held.
    #[must_use]
    pub fn holds(&self, subject: SubjectNumber) -> bool {
        self.found.iter().any(|f| f.subject == subject)
    }

    /// The `k`-th best score, once there are `k`.
    #[must_use]
    pub fn kth(&self) -> Option<f64> {
        (self.found.len() == self.k).then(|| self.found[self.k - 1].score)
    }

    /// The best, in order.
    #[must_use]
    pub fn into_sorted(self) -> Vec<Found> {
        self.found
    }
}
