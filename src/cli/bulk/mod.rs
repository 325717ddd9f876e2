//! Bulk enrolment: where messages with many subjects go, and which of them are acknowledged.
//!
//! `Sink` separates what makes the messages from what enrols them: a server (`GrpcSink`), or a
//! data folder of this machine (`import`). Knows messages and acknowledgements;
//! does not know files or rows.

mod grpc;

use std::collections::VecDeque;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::client::Server;
use super::error::CliError;
use super::output::{Failure, Progress};
use crate::api::proto::{BulkEnrollError, BulkEnrollProgress, BulkEnrollRequest};
pub(crate) use grpc::GrpcSink;

/// Messages sent and not yet acknowledged, at most. With 4 MiB per message this bounds the memory.
pub(crate) const IN_FLIGHT_MAX: usize = 8;

/// What has become of messages, in the order in which they were submitted.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Acknowledgement {
    /// Messages that are done: durable and searchable.
    pub(crate) messages: usize,
    /// Subjects enrolled since the last acknowledgement.
    pub(crate) enrolled: u64,
    /// Subjects that were there already, the same in every respect.
    pub(crate) unchanged: u64,
    /// Templates made durable.
    pub(crate) templates: u64,
    /// Subjects rejected, each with its reason.
    pub(crate) rejected: Vec<BulkEnrollError>,
}

/// Enrols messages of subjects.
pub(crate) trait Sink {
    /// Submits a message; waits while too many are in flight. Returns what has been acknowledged
    /// meanwhile, which may be nothing and may concern earlier messages.
    ///
    /// # Errors
    /// [`CliError`] if it cannot go on. What was acknowledged before holds.
    fn submit(
        &mut self,
        message: BulkEnrollRequest,
    ) -> impl Future<Output = Result<Vec<Acknowledgement>, CliError>> + Send;

    /// Waits for every message in flight.
    ///
    /// # Errors
    /// [`CliError`] if it cannot go on. What was acknowledged before holds.
    fn finish(&mut self) -> impl Future<Output = Result<Vec<Acknowledgement>, CliError>> + Send;
}

/// What one stream has told so far: turns its running totals into what is new.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// The totals of the last answer.
    totals: BulkEnrollProgress,
    /// Items of the messages that this stream has acknowledged.
    settled: u64,
}

impl Tally {
    /// Removes the messages that `answer` covers from `in_flight`; `items` says how many one has.
    pub(crate) fn settle<M>(
        &mut self,
        answer: BulkEnrollProgress,
        in_flight: &mut VecDeque<M>,
        items: impl Fn(&M) -> usize,
    ) -> Acknowledgement {
        let mut messages = 0;
        while let Some(message) = in_flight.front()
            && self.settled + items(message) as u64 <= answer.received
        {
            self.settled += items(message) as u64;
            in_flight.pop_front();
            messages += 1;
        }
        let acknowledgement = Acknowledgement {
            messages,
            enrolled: answer.enrolled.saturating_sub(self.totals.enrolled),
            unchanged: answer.unchanged.saturating_sub(self.totals.unchanged),
            templates: answer.templates.saturating_sub(self.totals.templates),
            rejected: answer.errors.clone(),
        };
        self.totals = answer;
        acknowledgement
    }
}

/// Enrols everybody in `messages`, who have `palms` palms, at `server`, until all is durable and
/// searchable. A lost connection ends it, and so does the first subject that is rejected.
///
/// # Errors
/// If the server cannot be reached, refuses a message or rejects a subject.
pub async fn enrol_all(
    server: &Server,
    mut messages: impl Stream<Item = BulkEnrollRequest> + Unpin,
    palms: u64,
    interrupted: &CancellationToken,
) -> Result<(), CliError> {
    let progress = Progress::new("enrolling", palms, "palms");
    let mut sink = GrpcSink::new(server.clone(), Duration::ZERO, interrupted.clone(), progress.clone());
    let mut enrolled = 0;
    let mut count = |acknowledged: Vec<Acknowledgement>| {
        for acknowledgement in acknowledged {
            if let Some(error) = acknowledgement.rejected.first() {
                let reason = Failure::new(Code::from_i32(error.code), &error.message);
                let problem = format!("{} was rejected: {reason}", error.subject_id);
                return Err(CliError::Protocol { call: "BulkEnroll", problem });
            }
            enrolled += acknowledgement.templates;
        }
        progress.set(enrolled);
        Ok(())
    };
    while let Some(message) = messages.next().await {
        count(sink.submit(message).await?)?;
    }
    count(sink.finish().await?)?;
    progress.finish();
    Ok(())
}
