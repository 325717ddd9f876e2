//! The demo's load: gates and terminals that search as fast as they are answered, and a client that
//! forgets and enrols people meanwhile and checks that the very next search knows.
//!
//! Every answer is judged against the truth of the [`Population`]. Gates and terminals only show
//! palms of people who stay; those who come and go belong to [`churn`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::api::proto::{
    Decision, ForgetRequest, IdentifyRequest, IdentifyResponse, PalmSample, Purpose, identify_stream_response,
};
use crate::cli::client::{self, Server};
use crate::cli::error::CliError;
use crate::cli::latencies::Latencies;
use crate::cli::population::{Population, THRESHOLD};

/// Share of probes that show somebody who is enrolled.
const MATED_SHARE: f64 = 0.7;
/// Share of a terminal's mated probes that come from people with two palms.
const TWO_PALMS_SHARE: f64 = 0.5;
/// A server that takes longer has failed.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Pause after a refusal that does not name one.
const REFUSED_PAUSE: Duration = Duration::from_millis(20);
/// Time between two rounds of forgetting and enrolling.
const CHURN_INTERVAL: Duration = Duration::from_millis(250);
/// How often a refused call of the churn is made again.
const CHURN_ATTEMPTS_MAX: u32 = 200;
/// Rounds of the churn for which people are set aside, per second of load.
const CHURN_ROUNDS_A_SECOND: u32 = 4;

/// What the searches of some clients came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    /// Of answered searches, from sending to the answer.
    pub(super) latencies: Latencies,
    /// Answered searches that showed somebody who is enrolled.
    pub(super) mated: u64,
    /// Answers that are right: the enrolled person, or nobody for a stranger.
    pub(super) correct: u64,
    /// Matches with somebody else.
    pub(super) wrong: u64,
    /// People who are enrolled and were not matched.
    pub(super) missed: u64,
    /// Searches that the server refused because it was full, draining or too late.
    pub(super) refused: u64,
}

impl Tally {
    /// Answered searches.
    pub(super) fn searches(&self) -> u64 {
        self.correct + self.wrong + self.missed
    }

    /// Adds another's figures.
    pub(super) fn add(&mut self, other: &Self) {
        self.latencies.add_all(&other.latencies);
        self.mated += other.mated;
        self.correct += other.correct;
        self.wrong += other.wrong;
        self.missed += other.missed;
        self.refused += other.refused;
    }

    fn count(&mut self, truth: Option<u32>, response: &IdentifyResponse, took: Duration) {
        self.mated += u64::from(truth.is_some());
        match judge(truth, response) {
            Verdict::Correct => self.correct += 1,
            Verdict::Wrong => self.wrong += 1,
            Verdict::Missed => self.missed += 1,
        }
        self.latencies.add(took);
    }
}

/// Whether an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The enrolled person, or nobody for a stranger.
    Correct,
    /// Somebody else.
    Wrong,
    /// Nobody, though the person is enrolled.
    Missed,
}

/// Compares an answer with the truth: the subject whose palm it was, or none for a stranger. A
/// stranger about whom the server cannot decide is not let in, which is right.
pub(super) fn judge(truth: Option<u32>, response: &IdentifyResponse) -> Verdict {
    if response.decision() != Decision::Match {
        return if truth.is_some() { Verdict::Missed } else { Verdict::Correct };
    }
    let matched = response.candidates.first().map(|candidate| candidate.subject_id.as_str());
    if truth.is_some() && matched == truth.map(Population::subject_id).as_deref() {
        Verdict::Correct
    } else {
        Verdict::Wrong
    }
}

/// Whether a status says "not now" rather than "no".
fn is_refusal(code: Code) -> bool {
    matches!(code, Code::ResourceExhausted | Code::DeadlineExceeded | Code::Unavailable)
}

/// Makes a call until it is not refused, and returns its answer: what is asked for under load must
/// happen eventually, and every call of the churn is idempotent.
macro_rules! patiently {
    ($call:literal, $made:expr) => {{
        let mut attempts = 0;
        loop {
            attempts += 1;
            match within($call, $made).await? {
                Ok(response) => break response.into_inner(),
                Err(status) if is_refusal(status.code()) && attempts < CHURN_ATTEMPTS_MAX => {
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
                Err(status) => return Err(CliError::refused($call, status)),
            }
        }
    }};
}

/// People who stay enrolled: `0..stable`; the rest may be forgotten while the load runs. Twice as
/// many are set aside as the rounds need, but never more than a quarter.
///
/// # Panics
/// If there are fewer than 64 people.
pub(super) fn stable_subjects(people: &Population, seconds: u64) -> u32 {
    assert!(people.subjects() >= 64, "{} people are too few to come and go", people.subjects());
    let set_aside = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_mul(2 * CHURN_ROUNDS_A_SECOND);
    people.subjects() - set_aside.clamp(16, people.subjects() / 4)
}

/// What all clients of the load share.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    /// Who is enrolled.
    pub(super) people: Arc<Population>,
    /// People who stay, from 0.
    pub(super) stable: u32,
    /// Where to search.
    pub(super) server: Server,
    /// When to stop.
    pub(super) until: Instant,
    /// Tells one client's random choices from another's.
    pub(super) seed: u64,
}

/// A search of the demo.
pub(super) fn request(request_id: String, venue: &str, purpose: Purpose, probes: Vec<PalmSample>) -> IdentifyRequest {
    IdentifyRequest {
        request_id,
        venue_id: venue.to_owned(),
        purpose: purpose.into(),
        probes,
        max_candidates: 5,
        threshold: Some(THRESHOLD),
        certificate: None,
        only: None,
    }
}

/// One gate: a stream, one palm after another, each after the last is answered.
///
/// # Errors
/// [`CliError`] if the stream breaks or the server does not follow the protocol.
pub(super) async fn gate(scene: Scene) -> Result<Tally, CliError> {
    const CALL: &str = "IdentifyStream";
    let broken = |status: Status| CliError::refused(CALL, status);
    let ended = || broken(Status::unavailable("the server ended the stream"));
    let mut random = ChaCha8Rng::seed_from_u64(scene.seed);
    let mut tally = Tally::default();
    let (requests, queue) = mpsc::channel(1);
    let mut client = client::identification(scene.server.connect().await?);
    let mut answers = client.identify_stream(ReceiverStream::new(queue)).await.map_err(broken)?.into_inner();
    let mut asked = 0_u64;
    while Instant::now() < scene.until {
        let truth = random.random_bool(MATED_SHARE).then(|| random.random_range(0..scene.stable));
        let probe = match truth {
            Some(subject) => scene.people.capture(subject, random.random()),
            None => scene.people.stranger(random.random()),
        };
        let request_id = format!("gate-{}-{asked}", scene.seed);
        asked += 1;
        let sent = Instant::now();
        let question = request(request_id.clone(), "demo-stadium", Purpose::Entry, vec![probe]);
        requests.send(question).await.map_err(|_| ended())?;
        let answer = within(CALL, answers.message()).await?.map_err(broken)?.ok_or_else(ended)?;
        let took = sent.elapsed();
        if answer.request_id != request_id {
            let problem = format!("{:?} was answered, {request_id:?} was asked", answer.request_id);
            return Err(CliError::Protocol { call: CALL, problem });
        }
        match answer.outcome {
            Some(identify_stream_response::Outcome::Response(response)) => tally.count(truth, &response, took),
            Some(identify_stream_response::Outcome::Error(error)) if is_refusal(Code::from_i32(error.code)) => {
                tally.refused += 1;
                let pause = error.retry_after.and_then(|span| Duration::try_from(span).ok());
                tokio::time::sleep(pause.unwrap_or(REFUSED_PAUSE)).await;
            }
            Some(identify_stream_response::Outcome::Error(error)) => {
                return Err(broken(Status::new(Code::from_i32(error.code), error.message)));
            }
            None => return Err(CliError::Protocol { call: CALL, problem: "an answer without outcome".to_owned() }),
        }
    }
    Ok(tally)
}

/// One payment terminal: one call per search, with both palms of those who have two.
///
/// # Errors
/// [`CliError`] if the server cannot be reached or refuses for good.
pub(super) async fn terminal(scene: Scene) -> Result<Tally, CliError> {
    let mut random = ChaCha8Rng::seed_from_u64(scene.seed);
    let mut tally = Tally::default();
    let mut client = client::identification(scene.server.connect().await?);
    let mut asked = 0_u64;
    while Instant::now() < scene.until {
        let truth = random.random_bool(MATED_SHARE).then(|| {
            let subject = random.random_range(0..scene.stable);
            let of_two = subject / 10 * 10 + 9;
            let take_two = random.random_bool(TWO_PALMS_SHARE) && of_two < scene.stable;
            if take_two { of_two } else { subject }
        });
        let probes = match truth {
            Some(subject) => scene.people.captures(subject, random.random()),
            None => vec![scene.people.stranger(random.random())],
        };
        let request_id = format!("terminal-{}-{asked}", scene.seed);
        asked += 1;
        let sent = Instant::now();
        let question = request(request_id, "demo-store", Purpose::Payment, probes);
        match within("Identify", client.identify(question)).await? {
            Ok(response) => tally.count(truth, response.get_ref(), sent.elapsed()),
            Err(status) if is_refusal(status.code()) => {
                tally.refused += 1;
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
            Err(status) => return Err(CliError::refused("Identify", status)),
        }
    }
    Ok(tally)
}

/// What was found about those who came and went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Freshness {
    /// People forgotten, each searched for by the very next call.
    pub(super) forgotten: u64,
    /// People enrolled, each searched for by the very next call.
    pub(super) enrolled: u64,
    /// Searches that still knew the first or did not yet know the second.
    pub(super) stale: u64,
}

/// Forgets somebody and enrols somebody every quarter of a second, and searches for both at once.
///
/// # Errors
/// [`CliError`] if the server cannot be reached or refuses for good.
pub(super) async fn churn(scene: Scene) -> Result<Freshness, CliError> {
    let channel = scene.server.connect().await?;
    let (mut enrollment, mut identification) = (client::enrollment(channel.clone()), client::identification(channel));
    let mut freshness = Freshness::default();
    let people = &scene.people;
    let mut leaving = scene.stable..people.subjects();
    let mut coming = people.subjects()..;
    let mut rounds = tokio::time::interval(CHURN_INTERVAL);
    loop {
        rounds.tick().await;
        if Instant::now() >= scene.until {
            return Ok(freshness);
        }
        if let Some(subject) = leaving.next() {
            let subject_id = Population::subject_id(subject);
            let request = ForgetRequest { request_id: format!("demo-forget-{subject_id}"), subject_id };
            patiently!("Forget", enrollment.forget(request.clone()));
            freshness.forgotten += 1;
            let question = request_for(&scene, subject, "after-forgetting");
            let response = patiently!("Identify", identification.identify(question.clone()));
            let known = response.candidates.iter().any(|candidate| candidate.subject_id == request.subject_id);
            freshness.stale += u64::from(known);
        }
        if let Some(subject) = coming.next() {
            let request = people.enrollment(subject);
            patiently!("Enroll", enrollment.enroll(request.clone()));
            freshness.enrolled += 1;
            let question = request_for(&scene, subject, "after-enrolling");
            let response = patiently!("Identify", identification.identify(question.clone()));
            freshness.stale += u64::from(judge(Some(subject), &response) != Verdict::Correct);
        }
    }
}

fn request_for(scene: &Scene, subject: u32, when: &str) -> IdentifyRequest {
    let request_id = format!("{when}-{subject}");
    request(request_id, "demo-stadium", Purpose::Entry, vec![scene.people.capture(subject, 0)])
}

/// The answer of a call, or an error if it takes too long.
async fn within<T>(call: &'static str, answer: impl Future<Output = T>) -> Result<T, CliError> {
    tokio::time::timeout(ANSWER_WITHIN, answer).await.map_err(|_elapsed| CliError::Protocol {
        call,
        problem: format!("no answer within {} s", ANSWER_WITHIN.as_secs()),
    })
}
