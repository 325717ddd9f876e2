//! What the demo found, for programs and for people.

use serde::Serialize;

use super::load::{Freshness, Tally, Verdict, judge};
use crate::api::proto::{self, IdentifyResponse};
use crate::cli::Outcome;
use crate::cli::latencies::Latencies;
use crate::cli::output::{decision_word, grouped, hand_word, properties, table};
use crate::cli::population::THRESHOLD;

/// Everything the demo found. The order and the names of the first keys are relied on.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Palms enrolled and searched.
    pub(super) gallery: u64,
    /// Dimensions of an embedding.
    pub(super) dim: u32,
    /// The engine that answered: cpu or gpu.
    pub(super) engine: String,
    /// The processor or the graphics card.
    pub(super) adapter: String,
    /// Searches of gates and terminals that were answered.
    pub(super) searches: u64,
    /// Right answers.
    pub(super) correct: u64,
    /// Matches with somebody else.
    pub(super) wrong: u64,
    /// Enrolled people who were not matched.
    pub(super) missed: u64,
    /// Of gates and terminals together, as they saw it.
    pub(super) latency_ms: Latency,
    /// Searches answered per second.
    pub(super) searches_per_second: f64,
    /// Palms enrolled per second, until durable and searchable.
    pub(super) enrolled_per_second: f64,
    /// Answered searches that showed somebody who is enrolled; the others showed strangers.
    pub(super) mated: u64,
    /// Searches that were refused because the server was full.
    pub(super) refused: u64,
    /// People forgotten or enrolled under load, each searched for by the next call.
    pub(super) fresh_checks: u64,
    /// Those searches that still saw the gallery of before.
    pub(super) stale: u64,
    /// People the palms belong to.
    pub(super) subjects: u64,
    /// Seed of the gallery.
    pub(super) seed: u64,
    /// Least score of a match in the load.
    pub(super) threshold: f64,
    /// Time of enrolling, in seconds.
    pub(super) enrol_seconds: f64,
    /// Time of searching, in seconds.
    pub(super) search_seconds: f64,
    /// The gates alone.
    pub(super) gates: Side,
    /// The terminals alone.
    pub(super) terminals: Side,
    /// One enrolled person, one stranger and one payment with two palms.
    pub(super) examples: Vec<Example>,
}

/// The clients of one kind.
#[derive(Debug, Serialize)]
pub(super) struct Side {
    /// How many there were.
    pub(super) count: u32,
    /// Their searches that were answered.
    pub(super) searches: u64,
    /// As they saw it.
    pub(super) latency_ms: Latency,
}

/// Latency in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Latency {
    /// Half of the searches took no longer.
    pub(super) p50: f64,
    /// 99 of 100 took no longer.
    pub(super) p99: f64,
    /// 999 of 1000 took no longer.
    pub(super) p999: f64,
}

/// One search, shown in full.
#[derive(Debug, Serialize)]
pub(super) struct Example {
    /// What was shown.
    pub(super) shown: &'static str,
    /// The server's decision.
    pub(super) decision: String,
    /// Whether that is the truth.
    pub(super) right: bool,
    /// By rank.
    pub(super) candidates: Vec<ExampleCandidate>,
}

/// One ranked identity.
#[derive(Debug, Serialize)]
pub(super) struct ExampleCandidate {
    /// From 1.
    pub(super) rank: u32,
    /// Whose palm it may be.
    pub(super) subject_id: String,
    /// Comparison score.
    pub(super) score: f64,
    /// The hand of the best template.
    pub(super) hand: String,
}

impl Example {
    /// The answer to what was `shown`: the palm of the subject `truth`, or a stranger's.
    pub(super) fn new(shown: &'static str, truth: Option<u32>, response: IdentifyResponse) -> Self {
        Self {
            shown,
            decision: decision_word(response.decision),
            right: judge(truth, &response) == Verdict::Correct,
            candidates: response
                .candidates
                .into_iter()
                .map(|candidate| ExampleCandidate {
                    rank: candidate.rank,
                    subject_id: candidate.subject_id,
                    score: candidate.score,
                    hand: hand_word(candidate.hand),
                })
                .collect(),
        }
    }
}

impl Latency {
    fn of(latencies: &Latencies) -> Self {
        Self { p50: latencies.ms(0.5), p99: latencies.ms(0.99), p999: latencies.ms(0.999) }
    }
}

impl Side {
    /// `count` clients that found `tally`.
    pub(super) fn new(count: u32, tally: &Tally) -> Self {
        Self { count, searches: tally.searches(), latency_ms: Latency::of(&tally.latencies) }
    }
}

impl Report {
    /// A report on a gallery that was enrolled in `enrol_seconds` and has not been searched yet.
    pub(super) fn new(status: proto::Status, seed: u64, enrol_seconds: f64) -> Self {
        let engine = status.engine.unwrap_or_default();
        let none = Tally::default();
        Self {
            gallery: status.templates,
            dim: status.dim,
            engine: engine.kind,
            adapter: engine.adapter,
            searches: 0,
            correct: 0,
            wrong: 0,
            missed: 0,
            latency_ms: Latency::of(&none.latencies),
            searches_per_second: 0.0,
            enrolled_per_second: status.templates as f64 / enrol_seconds,
            mated: 0,
            refused: 0,
            fresh_checks: 0,
            stale: 0,
            subjects: status.subjects,
            seed,
            threshold: THRESHOLD,
            enrol_seconds,
            search_seconds: 0.0,
            gates: Side::new(0, &none),
            terminals: Side::new(0, &none),
            examples: Vec::new(),
        }
    }

    /// Adds what gates, terminals and those who came and went found in `seconds`.
    pub(super) fn add_load(
        &mut self,
        gates: (u32, &Tally),
        terminals: (u32, &Tally),
        freshness: Freshness,
        seconds: f64,
    ) {
        let mut both = gates.1.clone();
        both.add(terminals.1);
        self.searches = both.searches();
        (self.correct, self.wrong, self.missed, self.refused) = (both.correct, both.wrong, both.missed, both.refused);
        self.mated = both.mated;
        self.latency_ms = Latency::of(&both.latencies);
        self.search_seconds = seconds;
        self.searches_per_second = both.searches() as f64 / seconds;
        self.gates = Side::new(gates.0, gates.1);
        self.terminals = Side::new(terminals.0, terminals.1);
        self.fresh_checks = freshness.forgotten + freshness.enrolled;
        self.stale = freshness.stale;
    }

    /// Done if searches were answered and every answer was right and fresh, the examples' too.
    pub(super) fn outcome(&self) -> Outcome {
        let right = self.wrong == 0 && self.missed == 0 && self.examples.iter().all(|example| example.right);
        Outcome::done_if(self.searches > 0 && right && self.stale == 0)
    }

    /// A page for people.
    pub(super) fn render(&self) -> String {
        let mut latency = table(&["", "searches", "p50 ms", "p99 ms", "p99.9 ms"], 1);
        let named = [
            (format!("{} gates", self.gates.count), self.gates.searches, self.gates.latency_ms),
            (format!("{} terminals", self.terminals.count), self.terminals.searches, self.terminals.latency_ms),
            ("together".to_owned(), self.searches, self.latency_ms),
        ];
        for (name, searches, ms) in named {
            let [p50, p99, p999] = [ms.p50, ms.p99, ms.p999].map(|ms| format!("{ms:.2}"));
            latency.add_row(vec![name, grouped(searches), p50, p99, p999]);
        }
        let mut examples = table(&["shown", "decision", "rank", "identity", "hand", "score"], 5);
        for example in &self.examples {
            let mut first = [example.shown.to_owned(), example.decision.clone()];
            if example.candidates.is_empty() {
                examples.add_row(first.iter().map(String::as_str).chain(["-", "-", "-", "-"]));
            }
            for candidate in &example.candidates {
                let [shown, decision] = std::mem::take(&mut first);
                examples.add_row(vec![
                    shown,
                    decision,
                    candidate.rank.to_string(),
                    candidate.subject_id.clone(),
                    candidate.hand.clone(),
                    format!("{:.4}", candidate.score),
                ]);
            }
        }
        let verdict = properties(&[
            (
                "gallery",
                format!(
                    "{} palms of {} people, {} dimensions, seed {}",
                    grouped(self.gallery),
                    grouped(self.subjects),
                    self.dim,
                    self.seed
                ),
            ),
            ("engine", format!("{}: {}", self.engine, self.adapter)),
            (
                "enrolled",
                format!(
                    "in {:.1} s, {} palms per second",
                    self.enrol_seconds,
                    grouped(self.enrolled_per_second as u64)
                ),
            ),
            (
                "searched",
                format!(
                    "{} ({} enrolled palms, {} strangers) in {:.1} s, {} per second, threshold {}",
                    grouped(self.searches),
                    grouped(self.mated),
                    grouped(self.searches - self.mated),
                    self.search_seconds,
                    grouped(self.searches_per_second as u64),
                    self.threshold
                ),
            ),
            (
                "answers",
                format!(
                    "{} correct, {} wrong, {} missed, {} refused",
                    grouped(self.correct),
                    grouped(self.wrong),
                    grouped(self.missed),
                    grouped(self.refused)
                ),
            ),
            (
                "freshness",
                format!("{} changes under load, {} not seen by the next search", self.fresh_checks, self.stale),
            ),
        ]);
        format!("{verdict}\n\n{latency}\n\n{examples}")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::proto::Decision;

    fn report() -> Report {
        Report::new(proto::Status { templates: 1000, dim: 512, subjects: 910, ..proto::Status::default() }, 1, 1.0)
    }

    fn tally(correct: u64, wrong: u64, missed: u64, us: u64) -> Tally {
        let mut tally = Tally { mated: correct + wrong + missed, correct, wrong, missed, ..Tally::default() };
        (0..tally.searches()).for_each(|_| tally.latencies.add(Duration::from_micros(us)));
        tally
    }

    #[test]
    fn gates_and_terminals_add_up() {
        let mut report = report();
        let (gates, terminals) = (tally(90, 0, 0, 2_000), tally(8, 1, 1, 8_000));
        report.add_load((20, &gates), (2, &terminals), Freshness { forgotten: 4, enrolled: 5, stale: 0 }, 2.0);
        assert_eq!((report.searches, report.correct, report.wrong, report.missed), (100, 98, 1, 1));
        assert!((report.searches_per_second - 50.0).abs() < 1e-9);
        assert!((report.latency_ms.p50 - 2.0).abs() < 0.01, "{:?}", report.latency_ms);
        assert!((report.latency_ms.p99 - 8.0).abs() < 0.01, "{:?}", report.latency_ms);
        assert_eq!(report.fresh_checks, 9);
        let page = report.render();
        assert!(page.contains("98 correct, 1 wrong, 1 missed, 0 refused"), "{page}");
        assert!(page.contains("100 (100 enrolled palms, 0 strangers)") && page.contains("20 gates"), "{page}");
    }

    #[test]
    fn one_wrong_missed_or_stale_answer_fails_the_demo_and_so_does_none_at_all() {
        let none = Tally::default();
        let fresh = Freshness { forgotten: 1, enrolled: 1, stale: 0 };
        for (gates, freshness, outcome) in [
            (tally(5, 0, 0, 10), fresh, Outcome::Done),
            (tally(5, 1, 0, 10), fresh, Outcome::Failed),
            (tally(5, 0, 1, 10), fresh, Outcome::Failed),
            (tally(5, 0, 0, 10), Freshness { stale: 1, ..fresh }, Outcome::Failed),
            (none.clone(), fresh, Outcome::Failed),
        ] {
            let mut report = report();
            report.add_load((1, &gates), (0, &none), freshness, 1.0);
            assert_eq!(report.outcome(), outcome, "{gates:?} {freshness:?}");
        }
        let mut report = report();
        report.add_load((1, &tally(5, 0, 0, 10)), (0, &none), fresh, 1.0);
        let nobody = IdentifyResponse { decision: Decision::NoMatch.into(), ..IdentifyResponse::default() };
        report.examples.push(Example::new("a stranger's palm", None, nobody.clone()));
        assert_eq!(report.outcome(), Outcome::Done);
        report.examples.push(Example::new("an enrolled palm", Some(0), nobody));
        assert_eq!(report.outcome(), Outcome::Failed, "a wrong example fails the demo too");
    }

    #[test]
    fn the_object_for_programs_begins_with_the_keys_that_are_relied_on() {
        let text = serde_json::to_string(&report()).unwrap();
        let keys = [
            "gallery",
            "dim",
            "engine",
            "adapter",
            "searches",
            "correct",
            "wrong",
            "missed",
            "latency_ms",
            "searches_per_second",
            "enrolled_per_second",
        ];
        let mut from = 0;
        for key in keys {
            let found = text[from..].find(&format!("\"{key}\":"));
            from += found.unwrap_or_else(|| panic!("{key} is missing or out of order in {text}"));
        }
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let latency: Vec<&String> = value["latency_ms"].as_object().unwrap().keys().collect();
        assert_eq!(latency, ["p50", "p99", "p999"]);
    }
}
