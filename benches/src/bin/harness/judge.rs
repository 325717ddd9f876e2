//! Is an answer right?
//!
//! Every candidate's score is worked out from the embeddings, whoever is named; who must be named
//! follows from whom the probes show, from the brute force where there is no threshold, and from the
//! times of enrolments and deletions. The decision follows from the list and the policy.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use thenar::api::proto::{Decision, IdentifyResponse, Status, VerifyResponse};

use crate::scenario::Kind;
use crate::world::{Life, Question, TOLERANCE, World};

/// A search as it was asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) kind: Kind,
    pub(crate) question: Arc<Question>,
    pub(crate) threshold: f64,
    pub(crate) candidates_max: u32,
}

/// What the policies say, as the server tells.
#[derive(Debug, Clone)]
pub(crate) struct Policies(HashMap<String, (f64, f64)>);

impl Policies {
    pub(crate) fn of(status: &Status) -> Self {
        Self(status.policies.iter().map(|p| (p.purpose.clone(), (p.threshold, p.margin))).collect())
    }

    fn get(&self, kind: Kind) -> Option<(f64, f64)> {
        let purpose = kind.purpose().as_str_name().trim_start_matches("PURPOSE_").to_lowercase();
        self.0.get(&purpose).copied()
    }
}

/// Judges answers once all is over.
pub(crate) struct Judge<'a> {
    pub(crate) world: &'a World,
    pub(crate) policies: &'a Policies,
    pub(crate) lives: HashMap<u32, Life>,
}

impl Judge<'_> {
    fn may_be_found(&self, subject: u32, asked: Instant, answered: Instant) -> bool {
        match self.lives.get(&subject) {
            Some(life) => life.may_be_found(asked, answered),
            None => subject < self.world.stable,
        }
    }

    fn must_be_found(&self, subject: u32, asked: Instant, answered: Instant) -> bool {
        match self.lives.get(&subject) {
            Some(life) => life.must_be_found(asked, answered),
            None => subject < self.world.stable,
        }
    }

    /// Why an answer is wrong, if it is. `sent` and `done` are the moments between which it was given.
    pub(crate) fn identification(
        &self,
        asked: &Asked,
        answer: &IdentifyResponse,
        sent: Instant,
        done: Instant,
    ) -> Result<(), String> {
        let (policy, margin) = self.policies.get(asked.kind).ok_or("the server told no policy")?;
        let threshold = policy.max(asked.threshold);
        if answer.threshold.to_bits() != threshold.to_bits() {
            return Err(format!("the decision's threshold is {}, not {threshold}", answer.threshold));
        }
        if answer.candidates.len() > asked.candidates_max as usize {
            return Err(format!("{} candidates were listed", answer.candidates.len()));
        }
        let best = answer.candidates.first().map_or(f64::NEG_INFINITY, |candidate| candidate.score);
        let mut listed: Vec<(u32, f64)> = Vec::new();
        for (candidate, rank) in answer.candidates.iter().zip(1..) {
            let name = &candidate.subject_id;
            let subject = number_of(name).ok_or_else(|| format!("there never was a subject {name:?}"))?;
            let right = self.world.score(&asked.question, subject).ok_or_else(|| format!("{name} has no such hand"))?;
            if (candidate.score - right).abs() > TOLERANCE {
                return Err(format!("{name} has a score of {}, not {right}", candidate.score));
            }
            if !self.may_be_found(subject, sent, done) {
                return Err(format!("{name} was not enrolled at any moment of the search"));
            }
            if candidate.rank != rank || listed.last().is_some_and(|(_, last)| *last < candidate.score) {
                return Err(format!("{name} has rank {} with {}", candidate.rank, candidate.score));
            }
            if listed.iter().any(|(other, _)| *other == subject) {
                return Err(format!("{name} is listed twice"));
            }
            if candidate.score < asked.threshold && best - candidate.score >= margin {
                return Err(format!("{name} is listed with {}", candidate.score));
            }
            listed.push((subject, candidate.score));
        }
        // Whoever is better than this must be there.
        let full = listed.len() == asked.candidates_max as usize;
        let bar = match listed.last() {
            Some((_, last)) if full => *last,
            _ => asked.threshold,
        };
        let stable = asked.question.best.iter().copied();
        let about = asked.question.about.into_iter();
        let moving = self.lives.keys().copied().filter(|_| asked.kind == Kind::Floorless);
        let others = about.chain(moving).filter_map(|s| Some((s, self.world.score(&asked.question, s)?)));
        for (subject, score) in stable.chain(others) {
            let is_listed = listed.iter().any(|(other, _)| *other == subject);
            if score > bar + TOLERANCE && !is_listed && self.must_be_found(subject, sent, done) {
                return Err(format!("palm {subject} with a score of {score:.4} is missing"));
            }
        }
        let decision = match answer.candidates.get(1) {
            _ if best < threshold => Decision::NoMatch,
            Some(second) if second.score >= best || best - second.score < margin => Decision::Inconclusive,
            _ => Decision::Match,
        };
        if answer.decision() != decision {
            return Err(format!("decided {:?}, not {decision:?}", answer.decision()));
        }
        Ok(())
    }

    /// Why the answer to a comparison with `claimed` is wrong, if it is.
    pub(crate) fn verification(
        &self,
        question: &Question,
        claimed: u32,
        answer: &VerifyResponse,
    ) -> Result<(), String> {
        let (threshold, _) = self.policies.get(Kind::Verify).ok_or("the server told no policy")?;
        let right = self.world.score(question, claimed).unwrap_or(-1.0);
        if answer.threshold.to_bits() != threshold.to_bits() || (answer.score - right).abs() > TOLERANCE {
            return Err(format!("palm {claimed} has {} for {}, not {right}", answer.score, answer.threshold));
        }
        let decision = if answer.score >= threshold { Decision::Match } else { Decision::NoMatch };
        if answer.decision() != decision {
            return Err(format!("decided {:?}, not {decision:?}", answer.decision()));
        }
        Ok(())
    }
}

/// The number of a subject of the population, by its name.
fn number_of(name: &str) -> Option<u32> {
    name.strip_prefix("palm-")?.parse::<u32>().ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser as _;
    use thenar::api::proto::{Candidate, PolicyStatus};
    use thenar::cli::population::Population;

    use super::*;
    use crate::Arguments;

    const DIM: usize = 128;

    struct Case {
        world: World,
        policies: Policies,
    }

    impl Case {
        fn new() -> Self {
            let people = Population::new(5, DIM, 220);
            let messages = [people.message(0)];
            let words = ["harness", "--floorless", "1", "--forget", "1", "--seconds", "1", "--warmup", "0"];
            let world = World::new(people, &messages, &Arguments::parse_from(words).load);
            let policy = |purpose: &str| PolicyStatus { purpose: purpose.to_owned(), threshold: 0.58, margin: 0.03 };
            let status = Status { policies: vec![policy("entry"), policy("loyalty")], ..Status::default() };
            Self { world, policies: Policies::of(&status) }
        }

        fn judge(&self) -> Judge<'_> {
            Judge { world: &self.world, policies: &self.policies, lives: self.world.lives() }
        }

        /// The right answer, from every subject's score.
        fn answer(&self, asked: &Asked, enrolled: impl Iterator<Item = u32>) -> IdentifyResponse {
            let mut scores: Vec<(u32, f64)> =
                enrolled.filter_map(|s| Some((s, self.world.score(&asked.question, s)?))).collect();
            scores.sort_by(|a, b| b.1.total_cmp(&a.1));
            scores.retain(|(_, score)| *score >= asked.threshold);
            scores.truncate(asked.candidates_max as usize);
            let threshold = asked.threshold.max(0.58);
            let decision = match scores.as_slice() {
                [] => Decision::NoMatch,
                [best, ..] if best.1 < threshold => Decision::NoMatch,
                [best, second, ..] if best.1 - second.1 < 0.03 => Decision::Inconclusive,
                _ => Decision::Match,
            };
            let candidates = scores.iter().zip(1..).map(|((subject, score), rank)| Candidate {
                rank,
                subject_id: Population::subject_id(*subject),
                score: *score,
                ..Candidate::default()
            });
            IdentifyResponse {
                decision: decision.into(),
                threshold,
                candidates: candidates.collect(),
                ..IdentifyResponse::default()
            }
        }
    }

    fn asked(case: &Case, kind: Kind, mated: bool) -> Asked {
        let question = (0..).map(|pick| case.world.question(kind, pick));
        let question = question.into_iter().find(|question| question.about.is_some() == mated).unwrap();
        let floorless = kind == Kind::Floorless;
        Asked {
            kind,
            question,
            threshold: if floorless { -1.0 } else { 0.6 },
            candidates_max: if floorless { 10 } else { 5 },
        }
    }

    #[test]
    fn right_answers_pass_and_each_kind_of_wrong_one_is_found() {
        let case = Case::new();
        let now = Instant::now();
        let judge = case.judge();
        let everybody = || 0..case.world.people.subjects();
        let is_right = |asked: &Asked, answer: &IdentifyResponse| judge.identification(asked, answer, now, now);
        let mut wrong = 0;
        for (kind, mated) in [(Kind::Entry, true), (Kind::Entry, false), (Kind::Floorless, true)] {
            let asked = asked(&case, kind, mated);
            let right = case.answer(&asked, everybody());
            assert_eq!(is_right(&asked, &right), Ok(()), "{kind:?}");
            let mut spoilt = |name: &str, spoil: &dyn Fn(&mut IdentifyResponse)| {
                let mut answer = right.clone();
                spoil(&mut answer);
                assert!(is_right(&asked, &answer).is_err(), "{kind:?}: {name}");
                wrong += 1;
            };
            spoilt("decision", &|a| a.decision = Decision::Unspecified.into());
            spoilt("threshold", &|a| a.threshold = 0.4);
            if !right.candidates.is_empty() {
                spoilt("somebody else", &|a| a.candidates[0].subject_id = Population::subject_id(3));
                spoilt("nobody", &|a| a.candidates[0].subject_id = "x".to_owned());
                spoilt("score", &|a| a.candidates[0].score -= 0.01);
                spoilt("nobody is found", &|a| {
                    a.candidates.clear();
                    a.decision = Decision::NoMatch.into();
                });
            }
            if right.candidates.len() > 2 {
                spoilt("one is left out", &|a| {
                    a.candidates.remove(2);
                    a.candidates.iter_mut().zip(1..).for_each(|(c, rank)| c.rank = rank);
                });
                spoilt("order", &|a| a.candidates.swap(1, 2));
                spoilt("twice", &|a| a.candidates[2] = Candidate { rank: 3, ..a.candidates[1].clone() });
            }
        }
        assert!(wrong > 15);
    }

    #[test]
    fn a_lost_enrolment_and_an_undone_deletion_are_found() {
        let case = Case::new();
        let comer = case.world.comes();
        let leaver = case.world.leaves().unwrap();
        let in_between = Instant::now();
        case.world.came(comer);
        case.world.left(leaver);
        let after = Instant::now() + Duration::from_millis(1);
        let judge = case.judge();
        for (subject, is_there) in [(comer, true), (leaver, false)] {
            let question = Arc::new(case.world.question_about(subject));
            let asked = Asked { kind: Kind::Fresh, question, threshold: 0.6, candidates_max: 5 };
            let found = case.answer(&asked, std::iter::once(subject));
            let not_found = case.answer(&asked, std::iter::empty());
            assert_eq!(judge.identification(&asked, &found, after, after).is_ok(), is_there, "{subject}");
            assert_eq!(judge.identification(&asked, &not_found, after, after).is_ok(), !is_there, "{subject}");
            // Before it was acknowledged both are right.
            assert_eq!(judge.identification(&asked, &found, in_between, in_between), Ok(()));
            assert_eq!(judge.identification(&asked, &not_found, in_between, in_between), Ok(()));
        }
    }

    #[test]
    fn a_comparison_is_held_against_the_embeddings() {
        let mut case = Case::new();
        case.policies.0.insert("payment".to_owned(), (0.62, 0.05));
        let judge = case.judge();
        let question = case.world.question_about(7);
        let right = case.world.score(&question, 7).unwrap();
        let answer = |score: f64, decision: Decision| VerifyResponse {
            decision: decision.into(),
            score,
            threshold: 0.62,
            ..VerifyResponse::default()
        };
        assert!(right > 0.62, "{right}");
        assert_eq!(judge.verification(&question, 7, &answer(right, Decision::Match)), Ok(()));
        assert!(judge.verification(&question, 7, &answer(right, Decision::NoMatch)).is_err());
        assert!(judge.verification(&question, 8, &answer(right, Decision::Match)).is_err());
    }
}
