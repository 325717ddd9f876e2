//! Who is enrolled, what is asked about them, and what the right answers are.
//!
//! The palms are those of a seeded population, so that the score of any subject for any question can
//! be worked out here: an answer is held against the embeddings themselves, not against another answer
//! of the server. The best subjects for questions without a threshold come from a brute force.
//!
//! People `0..stable` stay. The others come and go, and a [`Life`] has the times between which a call
//! was under way, because until it is acknowledged a change may be in force or not.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use thenar::api::proto::{BulkEnrollRequest, Hand, PalmSample, palm_sample};
use thenar::cli::population::Population;
use thenar_bench::truth::product;

use crate::scenario::{Kind, LoadArgs, seed_of};

/// How far the rounding of a row to f16 may move a score: half a unit in the last of eleven bits for
/// each component, and the rotation's own rounding.
pub(crate) const TOLERANCE: f64 = 6e-4;
/// Candidates that a search without a threshold asks for.
pub(crate) const FLOORLESS_CANDIDATES: u32 = 10;
/// Best subjects that are known for it: more than it asks for, since scores may be tied but for rounding.
const BEST_KNOWN: usize = 32;
/// Share of the questions that show somebody who is enrolled.
const MATED_SHARE: f64 = 0.7;
/// Questions that are made before the clock starts.
const PREPARED: u32 = 4096;
/// Questions for whose best subjects the gallery is searched by brute force.
const PREPARED_FLOORLESS: u32 = 64;

/// What is asked with: captures of one person.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Question {
    pub(crate) probes: Vec<PalmSample>,
    /// Whose they are, or nobody's.
    pub(crate) about: Option<u32>,
    /// The best of those who stay, best first, where they were searched for: every one who is not
    /// among them has a score of at most the last.
    pub(crate) best: Vec<(u32, f64)>,
}

/// When somebody who comes or goes was enrolled and forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Life {
    /// Whether enrolled before the first measurement.
    pub(crate) from_the_start: bool,
    pub(crate) enrolled: Option<Change>,
    pub(crate) forgotten: Option<Change>,
}

/// A change between its being sent and its being acknowledged, if it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) sent: Instant,
    pub(crate) acknowledged: Option<Instant>,
}

impl Life {
    /// Whether an answer that was given between two moments may name this person.
    pub(crate) fn may_be_found(&self, asked: Instant, answered: Instant) -> bool {
        let came = self.from_the_start || self.enrolled.is_some_and(|change| change.sent <= answered);
        let gone = self.forgotten.and_then(|change| change.acknowledged).is_some_and(|at| at < asked);
        came && !gone
    }

    /// Whether every right answer between two moments finds this person.
    pub(crate) fn must_be_found(&self, asked: Instant, answered: Instant) -> bool {
        let came = self.enrolled.and_then(|change| change.acknowledged).is_some_and(|at| at <= asked);
        let stays = self.forgotten.is_none_or(|change| change.sent >= answered);
        (self.from_the_start || came) && stays
    }
}

/// What all clients share.
pub(crate) struct World {
    pub(crate) people: Population,
    /// People who stay, from 0.
    pub(crate) stable: u32,
    lives: Mutex<HashMap<u32, Life>>,
    /// Who may be forgotten, next first.
    leaving: Mutex<VecDeque<u32>>,
    /// The next to be enrolled.
    coming: AtomicU32,
    /// Without hands, as gates see them.
    at_gates: Vec<Arc<Question>>,
    /// With hands, both where there are two.
    at_terminals: Vec<Arc<Question>>,
    floorless: Vec<Arc<Question>>,
}

impl World {
    /// Sets people aside who will leave, and makes questions, the slow ones searched for in `messages`,
    /// which enrol everybody in order.
    pub(crate) fn new(people: Population, messages: &[BulkEnrollRequest], arguments: &LoadArgs) -> Self {
        let measurements = (arguments.rate.len() * arguments.floorless.len()) as f64;
        let seconds = (arguments.seconds + arguments.warmup) as f64 * measurements;
        let wanted = if arguments.forget > 0.0 { (arguments.forget * seconds * 1.2) as u32 + 16 } else { 0 };
        let stable = people.subjects() - wanted.min(people.subjects() / 4);
        let lives = (stable..people.subjects()).map(|s| (s, Life { from_the_start: true, ..Life::default() }));
        let mut world = Self {
            stable,
            lives: Mutex::new(lives.collect()),
            leaving: Mutex::new((stable..people.subjects()).collect()),
            coming: AtomicU32::new(people.subjects()),
            at_gates: Vec::new(),
            at_terminals: Vec::new(),
            floorless: Vec::new(),
            people,
        };
        let of = |use_number: u64| ChaCha8Rng::seed_from_u64(seed_of(arguments.seed, use_number));
        world.at_gates = world.questions(PREPARED, false, &mut of(1));
        world.at_terminals = world.questions(PREPARED, true, &mut of(2));
        if arguments.floorless.iter().any(|rate| *rate > 0.0) {
            let asked = world.questions(PREPARED_FLOORLESS, false, &mut of(3));
            let best = world.best_subjects(&asked, messages);
            world.floorless = asked
                .iter()
                .zip(best)
                .map(|(question, best)| Arc::new(Question { best, ..Question::clone(question) }))
                .collect();
        }
        world
    }

    fn questions(&self, count: u32, with_hands: bool, random: &mut ChaCha8Rng) -> Vec<Arc<Question>> {
        let drawn: Vec<(Option<u32>, u32)> = (0..count)
            .map(|_| (random.random_bool(MATED_SHARE).then(|| random.random_range(0..self.stable)), random.random()))
            .collect();
        let question = |(about, draw): (Option<u32>, u32)| {
            let probes = match about {
                Some(subject) if with_hands => self.people.captures(subject, draw as u16),
                Some(subject) => vec![self.people.capture(subject, draw as u16)],
                None => vec![self.people.stranger(draw)],
            };
            Arc::new(Question { probes, about, best: Vec::new() })
        };
        drawn.into_par_iter().map(question).collect()
    }

    /// For each question of one probe, the best of those who stay: every template against every probe.
    fn best_subjects(&self, questions: &[Arc<Question>], messages: &[BulkEnrollRequest]) -> Vec<Vec<(u32, f64)>> {
        let empty = || vec![Vec::<(u32, f64)>::new(); questions.len()];
        let keep_best = |best: &mut Vec<(u32, f64)>| {
            best.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            best.truncate(BEST_KNOWN);
        };
        messages
            .par_iter()
            .fold(empty, |mut best, message| {
                for item in &message.items {
                    let subject = u32::try_from(item.sequence).unwrap_or(u32::MAX);
                    let Some(enrollment) = item.enrollment.as_ref().filter(|_| subject < self.stable) else { continue };
                    for (question, best) in questions.iter().zip(&mut best) {
                        let Some(score) = fused(&question.probes, &enrollment.samples) else { continue };
                        if best.len() < BEST_KNOWN || score > best[best.len() - 1].1 {
                            best.push((subject, score));
                            keep_best(best);
                        }
                    }
                }
                best
            })
            .reduce(empty, |mut all, more| {
                for (best, more) in all.iter_mut().zip(more) {
                    best.extend(more);
                    keep_best(best);
                }
                all
            })
    }

    /// What a call of `kind` asks.
    pub(crate) fn question(&self, kind: Kind, pick: u64) -> Arc<Question> {
        let from = match kind {
            Kind::Floorless => &self.floorless,
            Kind::Payment | Kind::Verify => &self.at_terminals,
            _ => &self.at_gates,
        };
        Arc::clone(&from[(pick % from.len() as u64) as usize])
    }

    /// A question about one person, made now.
    pub(crate) fn question_about(&self, subject: u32) -> Question {
        Question { probes: vec![self.people.capture(subject, 0)], about: Some(subject), best: Vec::new() }
    }

    /// The score of `subject` for a question, enrolled or not; none where nothing can be compared.
    pub(crate) fn score(&self, question: &Question, subject: u32) -> Option<f64> {
        fused(&question.probes, &self.people.enrollment(subject).samples)
    }

    /// Somebody to enrol, whose life begins.
    pub(crate) fn comes(&self) -> u32 {
        let subject = self.coming.fetch_add(1, Ordering::Relaxed);
        let change = Change { sent: Instant::now(), acknowledged: None };
        locked(&self.lives).insert(subject, Life { enrolled: Some(change), ..Life::default() });
        subject
    }

    /// The enrolment was acknowledged: the person may be forgotten from now on.
    pub(crate) fn came(&self, subject: u32) {
        let now = Instant::now();
        if let Some(change) = locked(&self.lives).get_mut(&subject).and_then(|life| life.enrolled.as_mut()) {
            change.acknowledged = Some(now);
        }
        locked(&self.leaving).push_back(subject);
    }

    /// Somebody to forget, if anybody is left.
    pub(crate) fn leaves(&self) -> Option<u32> {
        let subject = locked(&self.leaving).pop_front()?;
        let change = Change { sent: Instant::now(), acknowledged: None };
        locked(&self.lives).entry(subject).or_default().forgotten = Some(change);
        Some(subject)
    }

    /// The deletion was acknowledged.
    pub(crate) fn left(&self, subject: u32) {
        let now = Instant::now();
        if let Some(change) = locked(&self.lives).get_mut(&subject).and_then(|life| life.forgotten.as_mut()) {
            change.acknowledged = Some(now);
        }
    }

    /// Everybody who comes or goes, as known now.
    pub(crate) fn lives(&self) -> HashMap<u32, Life> {
        locked(&self.lives).clone()
    }
}

/// Nothing that panics holds one of these locks.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The fused score: the mean, over the probes that can be compared, of each probe's best template.
fn fused(probes: &[PalmSample], templates: &[PalmSample]) -> Option<f64> {
    let unspecified = i32::from(Hand::Unspecified);
    let comparable = |a: i32, b: i32| a == b || a == unspecified || b == unspecified;
    let (mut sum, mut compared) = (0.0, 0);
    for probe in probes {
        let scores = templates.iter().filter(|template| comparable(probe.hand, template.hand));
        let scores = scores.map(|template| product(values(template), values(probe)));
        if let Some(best) = scores.max_by(f64::total_cmp) {
            sum += best;
            compared += 1;
        }
    }
    (compared > 0).then(|| sum / f64::from(compared))
}

fn values(sample: &PalmSample) -> &[f32] {
    match &sample.content {
        Some(palm_sample::Content::Embedding(embedding)) => &embedding.values,
        Some(palm_sample::Content::Picture(_)) | None => &[],
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn until_a_change_is_acknowledged_both_answers_are_right() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let change = |sent, acknowledged: Option<u64>| Change { sent: at(sent), acknowledged: acknowledged.map(at) };
        let life =
            Life { from_the_start: false, enrolled: Some(change(10, Some(20))), forgotten: Some(change(50, Some(60))) };
        // asked, answered: may, must
        for (asked, answered, may, must) in [
            (0, 5, false, false),
            (0, 15, true, false),
            (15, 25, true, false),
            (20, 50, true, true),
            (30, 55, true, false),
            (55, 58, true, false),
            (59, 70, true, false),
            (61, 70, false, false),
        ] {
            assert_eq!(life.may_be_found(at(asked), at(answered)), may, "{asked} to {answered}");
            assert_eq!(life.must_be_found(at(asked), at(answered)), must, "{asked} to {answered}");
        }
        let unknown = Life { enrolled: Some(change(10, None)), forgotten: None, from_the_start: false };
        assert!(unknown.may_be_found(at(100), at(101)) && !unknown.must_be_found(at(100), at(101)));
    }
}
