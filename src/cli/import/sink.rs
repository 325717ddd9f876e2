//! Where batches of enrolments go, and the one that goes to a server.
//!
//! [`Sink`] is the seam between reading an import's files and what takes them in; the other sink is
//! [`super::local`]. Knows messages and acknowledgements; does not know files or rows.
//!
//! Invariant of [`GrpcSink`]: a batch is held until the server has acknowledged it, and sent
//! again on a new connection where the old one broke; at most [`IN_FLIGHT_MAX`] are held.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming};

use crate::api::proto::{BulkEnrollError, BulkEnrollProgress, BulkEnrollRequest};
use crate::cli::connect::{self, Server};
use crate::cli::error::{CliError, code_name};
use crate::cli::progress::Progress;

/// Messages sent and not yet acknowledged, at most. With 4 MiB a message this bounds the memory.
pub const IN_FLIGHT_MAX: usize = 8;
/// First and longest pause before a lost connection is tried again.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// What has become of batches, in the order in which they were submitted.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Acknowledgement {
    /// Batches that are done, durable and searchable with this.
    pub batches: usize,
    /// Subjects enrolled since the last acknowledgement.
    pub enrolled: u64,
    /// Subjects that were there already, the same in every respect.
    pub unchanged: u64,
    /// Templates made durable.
    pub templates: u64,
    /// Subjects rejected, each with its reason.
    pub rejected: Vec<BulkEnrollError>,
}

/// Takes batches of enrolments in.
pub trait Sink {
    /// Hands a batch over; waits while too many are under way. Answers with what has been
    /// acknowledged meanwhile, which may be nothing and may concern earlier batches.
    ///
    /// # Errors
    /// [`CliError`] where it cannot go on. What was acknowledged before holds.
    fn submit(
        &mut self,
        batch: BulkEnrollRequest,
    ) -> impl Future<Output = Result<Vec<Acknowledgement>, CliError>> + Send;

    /// Waits for every batch under way.
    ///
    /// # Errors
    /// [`CliError`] where it cannot go on. What was acknowledged before holds.
    fn finish(&mut self) -> impl Future<Output = Result<Vec<Acknowledgement>, CliError>> + Send;
}

/// A server's bulk enrolment, pipelined, on a connection that is made again when it breaks.
#[derive(Debug)]
pub struct GrpcSink {
    server: Server,
    /// How long to try without any acknowledgement before giving up.
    retry: Duration,
    interrupted: CancellationToken,
    progress: Progress,
    unacknowledged: VecDeque<BulkEnrollRequest>,
    stream: Option<OpenStream>,
    /// Nothing more is coming: streams are closed on this side as soon as all is sent.
    finishing: bool,
    last_progress: Instant,
    pause: Duration,
}

/// One `BulkEnroll` call and what it has told so far.
#[derive(Debug)]
struct OpenStream {
    /// None once everything is sent: the server then sees the stream's end.
    requests: Option<mpsc::Sender<BulkEnrollRequest>>,
    answers: Streaming<BulkEnrollProgress>,
    tally: Tally,
}

/// What one stream has told so far: turns its running totals into what is new.
#[derive(Debug, Default)]
pub struct Tally {
    /// The totals of the last answer.
    totals: BulkEnrollProgress,
    /// Items of the batches that this stream has acknowledged.
    settled: u64,
}

/// Why a stream gave no acknowledgement.
enum Failure {
    /// Trying again can help.
    Lost(String),
    /// It can, where searches or writes were too many; not where the disk is full. Told apart from
    /// a lost connection, because the server is there and says what it lacks.
    Full(Box<tonic::Status>),
    /// It cannot.
    Refused(CliError),
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        match status.code() {
            // What a broken connection, a server that restarts or one that is full looks like.
            Code::Unavailable
            | Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::DeadlineExceeded
            | Code::Ok => Self::Lost(format!("{}: {}", code_name(status.code()), status.message())),
            Code::ResourceExhausted => Self::Full(Box::new(status)),
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss
            | Code::Unauthenticated => Self::Refused(CliError::refused("BulkEnroll", status)),
        }
    }
}

impl Failure {
    /// What is told to whoever waits.
    fn reason(&self) -> String {
        match self {
            Self::Lost(reason) => reason.clone(),
            Self::Full(status) => format!("{}: {}", code_name(status.code()), status.message()),
            Self::Refused(error) => error.to_string(),
        }
    }

    /// The error where this was the last try.
    fn given_up(self, address: &str) -> CliError {
        match self {
            Self::Lost(reason) => CliError::Unreachable { address: address.to_owned(), reason },
            Self::Full(status) => CliError::Refused { call: "BulkEnroll", status },
            Self::Refused(error) => error,
        }
    }
}

impl GrpcSink {
    /// A sink to `server` that gives up after `retry` without an acknowledgement, or at once when
    /// `interrupted` while the connection is down. Lost connections are told on `progress`.
    #[must_use]
    pub fn new(server: Server, retry: Duration, interrupted: CancellationToken, progress: Progress) -> Self {
        Self {
            server,
            retry,
            interrupted,
            progress,
            unacknowledged: VecDeque::with_capacity(IN_FLIGHT_MAX),
            stream: None,
            finishing: false,
            last_progress: Instant::now(),
            pause: PAUSE_FIRST,
        }
    }

    /// Calls `BulkEnroll` and sends what is not acknowledged.
    async fn open(&mut self) -> Result<OpenStream, Failure> {
        let channel = self.server.connect().await.map_err(|error| Failure::Lost(error.to_string()))?;
        let (requests, queue) = mpsc::channel(IN_FLIGHT_MAX);
        for batch in &self.unacknowledged {
            // There is room for all of them, and the receiver is in scope.
            let _ = requests.try_send(batch.clone());
        }
        let requests = (!self.finishing).then_some(requests);
        let answers = connect::enrollment(channel).bulk_enroll(ReceiverStream::new(queue)).await?.into_inner();
        Ok(OpenStream { requests, answers, tally: Tally::default() })
    }

    /// Waits for the next acknowledgement, over as many connections as it takes.
    async fn receive(&mut self) -> Result<Acknowledgement, CliError> {
        loop {
            let outcome = match self.stream.take() {
                None => self.open().await.map(|stream| (stream, None)),
                Some(mut stream) => match stream.answers.message().await {
                    Ok(Some(answer)) => Ok((stream, Some(answer))),
                    Ok(None) => Err(Failure::Lost("the server ended the stream".to_owned())),
                    Err(status) => Err(status.into()),
                },
            };
            match outcome {
                Ok((stream, answer)) => {
                    let stream = self.stream.insert(stream);
                    if let Some(answer) = answer {
                        self.last_progress = Instant::now();
                        self.pause = PAUSE_FIRST;
                        return Ok(stream.tally.settle(answer, &mut self.unacknowledged, items));
                    }
                }
                Err(failure) => self.wait_after(failure).await?,
            }
        }
    }

    /// Pauses after a failure, longer each time; gives up where trying again cannot help or has
    /// gone on too long.
    async fn wait_after(&mut self, failure: Failure) -> Result<(), CliError> {
        let left = self.retry.saturating_sub(self.last_progress.elapsed());
        if matches!(failure, Failure::Refused(_)) || left.is_zero() || self.interrupted.is_cancelled() {
            return Err(failure.given_up(self.server.address()));
        }
        if self.pause == PAUSE_FIRST {
            let (what, reason) = match &failure {
                Failure::Full(_) => ("the server is full", failure.reason()),
                Failure::Lost(_) | Failure::Refused(_) => ("connection lost", failure.reason()),
            };
            self.progress.note(format_args!("{what} ({reason}); trying again for {} s", left.as_secs().max(1)));
        }
        tokio::select! {
            () = tokio::time::sleep(self.pause.min(left)) => {}
            () = self.interrupted.cancelled() => return Err(failure.given_up(self.server.address())),
        }
        self.pause = (self.pause * 2).min(PAUSE_LONGEST);
        Ok(())
    }
}

impl Sink for GrpcSink {
    async fn submit(&mut self, batch: BulkEnrollRequest) -> Result<Vec<Acknowledgement>, CliError> {
        if self.unacknowledged.is_empty() {
            self.last_progress = Instant::now();
        }
        self.unacknowledged.push_back(batch.clone());
        let mut acknowledged = Vec::new();
        match &self.stream {
            // A stream whose other end is gone is noticed by the next `receive`.
            Some(OpenStream { requests: Some(requests), .. }) => drop(requests.send(batch).await),
            _ => match self.open().await {
                Ok(stream) => self.stream = Some(stream),
                Err(failure) => self.wait_after(failure).await?,
            },
        }
        while self.unacknowledged.len() >= IN_FLIGHT_MAX {
            acknowledged.push(self.receive().await?);
        }
        while !self.unacknowledged.is_empty()
            && let Some(stream) = &mut self.stream
            && let Some(Ok(Some(answer))) = stream.answers.message().now_or_never()
        {
            self.last_progress = Instant::now();
            acknowledged.push(stream.tally.settle(answer, &mut self.unacknowledged, items));
        }
        Ok(acknowledged)
    }

    async fn finish(&mut self) -> Result<Vec<Acknowledgement>, CliError> {
        let mut acknowledged = Vec::new();
        self.finishing = true;
        if let Some(stream) = &mut self.stream {
            stream.requests = None;
        }
        while !self.unacknowledged.is_empty() {
            acknowledged.push(self.receive().await?);
        }
        self.stream = None;
        self.finishing = false;
        Ok(acknowledged)
    }
}

impl Tally {
    /// Takes the batches that `answer` covers off `under_way`; `items` says how many a batch has.
    pub fn settle<B>(
        &mut self,
        answer: BulkEnrollProgress,
        under_way: &mut VecDeque<B>,
        items: impl Fn(&B) -> usize,
    ) -> Acknowledgement {
        let mut batches = 0;
        while let Some(batch) = under_way.front()
            && self.settled + items(batch) as u64 <= answer.received
        {
            self.settled += items(batch) as u64;
            under_way.pop_front();
            batches += 1;
        }
        let acknowledgement = Acknowledgement {
            batches,
            enrolled: answer.enrolled.saturating_sub(self.totals.enrolled),
            unchanged: answer.unchanged.saturating_sub(self.totals.unchanged),
            templates: answer.templates.saturating_sub(self.totals.templates),
            rejected: answer.errors.clone(),
        };
        self.totals = answer;
        acknowledgement
    }
}

fn items(batch: &BulkEnrollRequest) -> usize {
    batch.items.len()
}
