//! A server's bulk enrolment as a sink.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::{Acknowledgement, IN_FLIGHT_MAX, Sink, Tally};
use crate::api::proto::{BulkEnrollProgress, BulkEnrollRequest};
use crate::cli::client::{self, Server};
use crate::cli::error::{CliError, Disconnected};
use crate::cli::output::Progress;

/// First and longest pause before a lost connection is tried again.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// A server's bulk enrolment, pipelined, over a connection that is made again when it breaks.
///
/// Invariant: a message is held until the server has acknowledged it, and sent again on a new
/// connection if the old one broke; at most [`IN_FLIGHT_MAX`] are held.
#[derive(Debug)]
pub(crate) struct GrpcSink {
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

/// Why a stream gave no acknowledgement.
struct Failure {
    error: CliError,
    /// What is told while it is tried again; none if that cannot help.
    retried: Option<&'static str>,
}

impl GrpcSink {
    /// A sink to `server` that gives up after `retry` without an acknowledgement, or at once when
    /// `interrupted` while the connection is down. Lost connections are told on `progress`.
    pub(crate) fn new(server: Server, retry: Duration, interrupted: CancellationToken, progress: Progress) -> Self {
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
        let channel = self.server.connect().await.map_err(lost)?;
        let (requests, queue) = mpsc::channel(IN_FLIGHT_MAX);
        for message in &self.unacknowledged {
            // There is room for all of them, and the receiver is in scope.
            let _ = requests.try_send(message.clone());
        }
        let requests = (!self.finishing).then_some(requests);
        let answers = client::enrollment(channel).bulk_enroll(ReceiverStream::new(queue)).await;
        let answers = answers.map_err(|status| self.failure(status))?.into_inner();
        Ok(OpenStream { requests, answers, tally: Tally::default() })
    }

    fn disconnected(&self, source: Disconnected) -> Failure {
        lost(CliError::Unreachable { address: self.server.address().to_owned(), source })
    }

    fn failure(&self, status: Status) -> Failure {
        match status.code() {
            // What a broken connection or a server that restarts looks like.
            Code::Unavailable
            | Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::DeadlineExceeded
            | Code::Ok => self.disconnected(Disconnected::Broken(Box::new(status))),
            // Helps if writes were too many, but not if the disk is full. Told apart from a lost
            // connection, because the server is there and says what it lacks.
            Code::ResourceExhausted => {
                Failure { error: CliError::refused("BulkEnroll", status), retried: Some("the server is full") }
            }
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::DataLoss
            | Code::Unauthenticated => Failure { error: CliError::refused("BulkEnroll", status), retried: None },
        }
    }

    /// Waits for the next acknowledgement, over as many connections as it takes.
    async fn receive(&mut self) -> Result<Acknowledgement, CliError> {
        loop {
            let outcome = match self.stream.take() {
                None => self.open().await.map(|stream| (stream, None)),
                Some(mut stream) => match stream.answers.message().await {
                    Ok(Some(answer)) => Ok((stream, Some(answer))),
                    Ok(None) => Err(self.disconnected(Disconnected::Ended)),
                    Err(status) => Err(self.failure(status)),
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

    /// Pauses after a failure, longer each time; gives up if trying again cannot help or has gone on
    /// too long.
    async fn wait_after(&mut self, failure: Failure) -> Result<(), CliError> {
        let Failure { error, retried } = failure;
        let left = self.retry.saturating_sub(self.last_progress.elapsed());
        let Some(what) = retried.filter(|_| !left.is_zero() && !self.interrupted.is_cancelled()) else {
            return Err(error);
        };
        if self.pause == PAUSE_FIRST {
            self.progress.note(format_args!("{what} ({error}); trying again for {} s", left.as_secs().max(1)));
        }
        tokio::select! {
            () = tokio::time::sleep(self.pause.min(left)) => {}
            () = self.interrupted.cancelled() => return Err(error),
        }
        self.pause = (self.pause * 2).min(PAUSE_LONGEST);
        Ok(())
    }
}

impl Sink for GrpcSink {
    async fn submit(&mut self, message: BulkEnrollRequest) -> Result<Vec<Acknowledgement>, CliError> {
        if self.unacknowledged.is_empty() {
            self.last_progress = Instant::now();
        }
        self.unacknowledged.push_back(message.clone());
        let mut acknowledged = Vec::new();
        match &self.stream {
            // A stream whose other end is gone is noticed by the next `receive`.
            Some(OpenStream { requests: Some(requests), .. }) => drop(requests.send(message).await),
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

/// A connection that is to be made again.
fn lost(error: CliError) -> Failure {
    Failure { error, retried: Some("connection lost") }
}

fn items(message: &BulkEnrollRequest) -> usize {
    message.items.len()
}
