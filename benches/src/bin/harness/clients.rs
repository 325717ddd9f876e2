//! Gates, terminals, writers and slow readers: they send each call at its time and note what came of it.
//!
//! A thread of its own keeps time and never waits for an answer. Latency counts from when a call was
//! due, so that a client that falls behind does not hide it. Knows calls; does not know right answers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use thenar::api::proto::identify_stream_response::Outcome as StreamOutcome;
use thenar::api::proto::{
    EnrollRequest, ForgetRequest, IdentifyRequest, IdentifyResponse, IdentifyStreamResponse, VerifyRequest,
    VerifyResponse,
};
use thenar::cli::client::{self, Server};
use thenar::cli::population::{Population, THRESHOLD};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::judge::Asked;
use crate::scenario::{Arrival, Kind, LoadArgs};
use crate::world::{FLOORLESS_CANDIDATES, Question, World};

/// Candidates of all searches but those without a threshold.
const CANDIDATES: u32 = 5;
/// A server that takes so much longer than a call's deadline has failed.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// Pause before a write that was refused is sent again, and how often it is.
const WRITE_PAUSE: Duration = Duration::from_millis(20);
const WRITE_ATTEMPTS_MAX: u32 = 500;
/// A slow client asks so often, reads so seldom, and has room for so few bytes.
const SLOW_ASKS_EVERY: Duration = Duration::from_millis(500);
const SLOW_READS_EVERY: Duration = Duration::from_millis(1500);
const SLOW_WINDOW_BYTES: u32 = 1024;

/// What came of one call.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    /// When it should have been sent, and when it was.
    pub(crate) due: Instant,
    pub(crate) sent: Instant,
    pub(crate) done: Instant,
    pub(crate) outcome: Outcome,
}

/// How a call ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Identified(Asked, Box<IdentifyResponse>),
    Verified(Arc<Question>, u32, VerifyResponse),
    /// A write was acknowledged, as it should be.
    Written,
    /// The server said "not now", and when to come back.
    Refused,
    /// The deadline passed.
    Expired,
    Failed(String),
}

/// The clients of one measurement.
pub(crate) struct Clients {
    world: Arc<World>,
    gates: Vec<Gate>,
    terminals: Vec<Channel>,
    records: mpsc::UnboundedSender<Record>,
    deadline: Duration,
    number: AtomicU64,
    runtime: Handle,
}

/// A turnstile's stream.
struct Gate {
    kind: Kind,
    requests: mpsc::UnboundedSender<IdentifyRequest>,
    waiting: Arc<Mutex<Waiting>>,
    records: mpsc::UnboundedSender<Record>,
}

/// Searches of a stream that were not answered yet.
#[derive(Default)]
struct Waiting {
    /// By number: what was asked, due and sent when.
    searches: HashMap<u64, (Asked, Instant, Instant)>,
    /// Why no more answers come, once none do.
    ended: Option<String>,
}

impl Clients {
    /// Connects all of them; what comes of their calls is told to `records`.
    pub(crate) async fn connect(
        world: &Arc<World>,
        server: &Server,
        arguments: &LoadArgs,
        records: mpsc::UnboundedSender<Record>,
    ) -> anyhow::Result<Self> {
        let mut terminals = Vec::new();
        for _ in 0..arguments.terminals {
            terminals.push(server.connect().await?);
        }
        let mut gates = Vec::new();
        for _ in 0..arguments.gates {
            gates.push(Gate::open(server.connect().await?, Kind::Entry, Instant::now(), records.clone()).await?);
        }
        Ok(Self {
            world: Arc::clone(world),
            gates,
            terminals,
            records,
            deadline: Duration::from_millis(arguments.deadline_ms),
            number: AtomicU64::new(0),
            runtime: Handle::current(),
        })
    }

    /// Makes every call at its time, from `start` on. Blocks; to be called on a thread that may.
    pub(crate) fn make(&self, arrivals: &[Arrival], start: Instant) {
        for arrival in arrivals {
            let due = start + arrival.at;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.begin(arrival, due);
        }
    }

    fn begin(&self, arrival: &Arrival, due: Instant) {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let channel = self.terminals[(number % self.terminals.len() as u64) as usize].clone();
        let caller = Caller { channel, records: self.records.clone(), deadline: self.deadline, number };
        let world = Arc::clone(&self.world);
        match arrival.kind {
            Kind::Entry => {
                let gate = &self.gates[(number % self.gates.len() as u64) as usize];
                gate.ask(asked(Kind::Entry, world.question(Kind::Entry, arrival.pick)), number, due);
            }
            Kind::Verify => {
                let question = world.question(Kind::Verify, arrival.pick);
                // Half of them are who they say.
                let another = (arrival.pick >> 32) as u32 % world.stable;
                let claimed = question.about.filter(|_| arrival.pick & 1 == 0).unwrap_or(another);
                self.runtime.spawn(caller.verify(question, claimed, due));
            }
            Kind::Enrol => {
                self.runtime.spawn(caller.enrol(world, due));
            }
            Kind::Forget => {
                self.runtime.spawn(caller.forget(world, due));
            }
            kind => {
                self.runtime.spawn(caller.identify(asked(kind, world.question(kind, arrival.pick)), due));
            }
        }
    }
}

/// A search of that kind.
fn asked(kind: Kind, question: Arc<Question>) -> Asked {
    match kind {
        Kind::Floorless => Asked { kind, question, threshold: -1.0, candidates_max: FLOORLESS_CANDIDATES },
        _ => Asked { kind, question, threshold: THRESHOLD, candidates_max: CANDIDATES },
    }
}

fn request(asked: &Asked, request_id: String) -> IdentifyRequest {
    IdentifyRequest {
        request_id,
        venue_id: "load".to_owned(),
        purpose: asked.kind.purpose().into(),
        probes: asked.question.probes.clone(),
        max_candidates: asked.candidates_max,
        threshold: Some(asked.threshold),
        certificate: None,
        only: None,
    }
}

fn outcome_of(status: &Status) -> Outcome {
    match status.code() {
        Code::ResourceExhausted if status.details().is_empty() => {
            Outcome::Failed(format!("refused without a time to come back: {}", status.message()))
        }
        Code::ResourceExhausted => Outcome::Refused,
        Code::DeadlineExceeded => Outcome::Expired,
        // The client's own clock was first.
        Code::Cancelled if status.message().contains("Timeout expired") => Outcome::Expired,
        code => Outcome::Failed(format!("{code:?}: {}", status.message())),
    }
}

/// One call, or one write with the search after it.
#[derive(Clone)]
struct Caller {
    channel: Channel,
    records: mpsc::UnboundedSender<Record>,
    deadline: Duration,
    number: u64,
}

impl Caller {
    fn note(&self, kind: Kind, due: Instant, sent: Instant, outcome: Outcome) {
        // Nobody listens any more where the run has failed.
        let _ = self.records.send(Record { kind, due, sent, done: Instant::now(), outcome });
    }

    fn timed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline);
        request
    }

    async fn within<T>(&self, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let late = |_elapsed| Status::unknown("no answer, long after the deadline");
        tokio::time::timeout(self.deadline + GIVE_UP_AFTER, answer).await.map_err(late)?
    }

    async fn identify(self, asked: Asked, due: Instant) {
        let (kind, id) = (asked.kind, format!("load-{}", self.number));
        let message = self.timed(request(&asked, id.clone()));
        let sent = Instant::now();
        let outcome = match self.within(client::identification(self.channel.clone()).identify(message)).await {
            Ok(answer) if answer.get_ref().request_id != id => {
                Outcome::Failed(format!("{:?} was answered, {id:?} was asked", answer.get_ref().request_id))
            }
            Ok(answer) => Outcome::Identified(asked, Box::new(answer.into_inner())),
            Err(status) => outcome_of(&status),
        };
        self.note(kind, due, sent, outcome);
    }

    async fn verify(self, question: Arc<Question>, claimed: u32, due: Instant) {
        let message = self.timed(VerifyRequest {
            request_id: format!("verify-{}", self.number),
            venue_id: "load".to_owned(),
            purpose: Kind::Verify.purpose().into(),
            subject_id: Population::subject_id(claimed),
            probes: question.probes.clone(),
        });
        let sent = Instant::now();
        let outcome = match self.within(client::identification(self.channel.clone()).verify(message)).await {
            Ok(answer) => Outcome::Verified(question, claimed, answer.into_inner()),
            Err(status) => outcome_of(&status),
        };
        self.note(Kind::Verify, due, sent, outcome);
    }

    async fn enrol(self, world: Arc<World>, due: Instant) {
        let subject = world.comes();
        let enrollment = world.people.enrollment(subject);
        let send = |request: Request<EnrollRequest>| {
            let mut client = client::enrollment(self.channel.clone());
            let subject_id = enrollment.subject_id.clone();
            async move {
                let told = client.enroll(request).await?.into_inner().subject.unwrap_or_default();
                let is_right = told.subject_id == subject_id && told.templates.len() == 1;
                is_right.then_some(()).ok_or_else(|| Status::unknown(format!("enrolled as {told:?}")))
            }
        };
        if self.write(Kind::Enrol, due, send, &enrollment).await {
            world.came(subject);
            self.look_for(&world, subject).await;
        }
    }

    async fn forget(self, world: Arc<World>, due: Instant) {
        let Some(subject) = world.leaves() else { return };
        let subject_id = Population::subject_id(subject);
        let message = ForgetRequest { request_id: format!("forget-{subject_id}"), subject_id };
        let send = |request: Request<ForgetRequest>| {
            let mut client = client::enrollment(self.channel.clone());
            async move { client.forget(request).await.map(drop) }
        };
        if self.write(Kind::Forget, due, send, &message).await {
            world.left(subject);
            self.look_for(&world, subject).await;
        }
    }

    /// Sends a write until it is acknowledged: what was refused, or not answered in time, may be sent
    /// again under its request id. Says whether it was.
    async fn write<T: Clone, F: Future<Output = Result<(), Status>>>(
        &self,
        kind: Kind,
        due: Instant,
        send: impl Fn(Request<T>) -> F,
        message: &T,
    ) -> bool {
        for _ in 0..WRITE_ATTEMPTS_MAX {
            let sent = Instant::now();
            let outcome = match self.within(send(self.timed(message.clone()))).await {
                Ok(()) => Outcome::Written,
                Err(status) => outcome_of(&status),
            };
            let again = matches!(outcome, Outcome::Refused | Outcome::Expired);
            let done = matches!(outcome, Outcome::Written);
            self.note(kind, due, sent, outcome);
            if !again {
                return done;
            }
            tokio::time::sleep(WRITE_PAUSE).await;
        }
        self.note(kind, due, due, Outcome::Failed(format!("refused {WRITE_ATTEMPTS_MAX} times")));
        false
    }

    /// The very next search after a write.
    async fn look_for(self, world: &World, subject: u32) {
        let question = Arc::new(world.question_about(subject));
        self.identify(asked(Kind::Fresh, question), Instant::now()).await;
    }
}

impl Gate {
    /// Opens a stream, whose answers are read slowly until `slow_until`.
    async fn open(
        channel: Channel,
        kind: Kind,
        slow_until: Instant,
        records: mpsc::UnboundedSender<Record>,
    ) -> anyhow::Result<Self> {
        let (requests, queue) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let mut client = client::identification(channel);
        let stream = client.identify_stream(UnboundedReceiverStream::new(queue)).await;
        let mut answers = stream.context("IdentifyStream was refused")?.into_inner();
        let gate = Self { kind, requests, waiting: Arc::clone(&waiting), records: records.clone() };
        tokio::spawn(async move {
            let failure = loop {
                if Instant::now() < slow_until {
                    tokio::time::sleep(SLOW_READS_EVERY).await;
                }
                match tokio::time::timeout(GIVE_UP_AFTER, answers.message()).await {
                    // A gate where nobody comes is silent.
                    Err(_elapsed) if locked(&waiting).searches.is_empty() => {}
                    Err(_elapsed) => break "no answer on a stream".to_owned(),
                    Ok(Err(status)) => break format!("{:?}: {}", status.code(), status.message()),
                    Ok(Ok(None)) => break "the stream ended before the answer".to_owned(),
                    Ok(Ok(Some(answer))) => {
                        let _ = records.send(record(kind, &waiting, answer));
                    }
                }
            };
            let mut waiting = locked(&waiting);
            for (_, (_, due, sent)) in waiting.searches.drain() {
                let _ = records.send(failed(kind, due, sent, failure.clone()));
            }
            waiting.ended = Some(failure);
        });
        Ok(gate)
    }

    fn ask(&self, asked: Asked, number: u64, due: Instant) {
        let (message, sent) = (request(&asked, format!("gate-{number}")), Instant::now());
        let mut waiting = locked(&self.waiting);
        if let Some(failure) = &waiting.ended {
            let _ = self.records.send(failed(self.kind, due, sent, failure.clone()));
            return;
        }
        waiting.searches.insert(number, (asked, due, sent));
        // Where it cannot be sent any more, whoever reads the answers will say so.
        let _ = self.requests.send(message);
    }
}

fn failed(kind: Kind, due: Instant, sent: Instant, failure: String) -> Record {
    Record { kind, due, sent, done: Instant::now(), outcome: Outcome::Failed(failure) }
}

/// What came of the search that `answer` is for.
fn record(kind: Kind, waiting: &Mutex<Waiting>, answer: IdentifyStreamResponse) -> Record {
    let done = Instant::now();
    let number = answer.request_id.strip_prefix("gate-").and_then(|number| number.parse().ok());
    let Some((asked, due, sent)) = number.and_then(|number: u64| locked(waiting).searches.remove(&number)) else {
        return failed(kind, done, done, format!("{:?} was answered and not asked", answer.request_id));
    };
    let outcome = match answer.outcome {
        Some(StreamOutcome::Response(response)) => Outcome::Identified(asked, Box::new(response)),
        Some(StreamOutcome::Error(error)) => match Code::from_i32(error.code) {
            Code::ResourceExhausted if error.retry_after.is_some() => Outcome::Refused,
            Code::DeadlineExceeded => Outcome::Expired,
            code => Outcome::Failed(format!("{code:?}: {}", error.message)),
        },
        None => Outcome::Failed("an answer without outcome".to_owned()),
    };
    Record { kind, due, sent, done, outcome }
}

/// Nothing that panics holds this lock.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Searches for each of `subjects`, one after the other, until each search is answered or fails for good.
pub(crate) async fn look_for_all(
    world: &Arc<World>,
    server: &Server,
    arguments: &LoadArgs,
    subjects: Vec<u32>,
) -> anyhow::Result<Vec<Record>> {
    let (records, mut coming) = mpsc::unbounded_channel();
    let deadline = Duration::from_millis(arguments.deadline_ms);
    let channel = server.connect().await?;
    let mut last = Vec::new();
    for (number, subject) in (0..).zip(subjects) {
        let question = Arc::new(world.question_about(subject));
        for _ in 0..WRITE_ATTEMPTS_MAX {
            let caller = Caller { channel: channel.clone(), records: records.clone(), deadline, number };
            caller.identify(asked(Kind::Fresh, Arc::clone(&question)), Instant::now()).await;
            let record = coming.recv().await.context("every search leaves a record")?;
            let again = matches!(record.outcome, Outcome::Refused | Outcome::Expired);
            if !again {
                last.push(record);
                break;
            }
            tokio::time::sleep(WRITE_PAUSE).await;
        }
    }
    Ok(last)
}

/// A client that asks until `until` and reads its answers slowly, with little room for them.
pub(crate) async fn slow(
    world: Arc<World>,
    url: String,
    until: Instant,
    records: mpsc::UnboundedSender<Record>,
) -> anyhow::Result<()> {
    let endpoint = Endpoint::from_shared(url)?.initial_stream_window_size(SLOW_WINDOW_BYTES);
    let gate = Gate::open(endpoint.connect().await?, Kind::Slow, until, records).await?;
    let mut number = 0;
    while Instant::now() < until {
        gate.ask(asked(Kind::Slow, world.question(Kind::Slow, number)), number, Instant::now());
        number += 1;
        tokio::time::sleep(SLOW_ASKS_EVERY).await;
    }
    Ok(())
}
