//! One run of an import: reads, submits, counts, and keeps the state file up to date.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::batch::{Batch, Batches, Rejection};
use super::rejections::Rejections;
use super::state::{self, ImportState, StateFile};
use super::{Files, ImportArgs, Summary};
use crate::cli::bulk::{Acknowledgement, Sink};
use crate::cli::error::CliError;
use crate::cli::output::{Failure, Progress};

/// Batches read ahead of sending.
const READ_AHEAD: usize = 2;
/// Time between two writings of the state file.
const STATE_INTERVAL: Duration = Duration::from_secs(1);

/// Enrols the rows of `files` through `sink`, from where an earlier run to `target` stopped.
/// Stops early, with what is in flight finished, once `interrupted`.
///
/// # Errors
/// [`CliError`] if a file or the sink fails; the state file then says where to continue.
pub(super) async fn run<S: Sink>(
    args: &ImportArgs,
    files: &Files,
    sink: &mut S,
    target: &str,
    interrupted: &CancellationToken,
    progress: &Progress,
) -> Result<Summary, CliError> {
    let started = Instant::now();
    let state_file = StateFile::new(args.state.as_deref(), &args.embeddings);
    let inputs = state::inputs(files.embeddings.identity(), files.roster.digest(), target);
    let mut resumed = state_file.load(&inputs)?;
    // As of the start: --after-forget does not apply to subjects that are forgotten during the import.
    let after_forget = args.after_forget.then(|| SystemTime::now().into());
    let mut summary = loop {
        let start = resumed.take().unwrap_or_else(|| ImportState::start(&inputs));
        let mut pass = Pass::start(args, files.embeddings.rows(), start, &state_file, progress)?;
        match pass.run(args, files, sink, after_forget, interrupted).await? {
            Ended::Here => break pass.summary,
            Ended::StateIsWrong => {
                progress.note("what an earlier run had enrolled is not there any more; starting from the first row");
            }
        }
    };
    summary.interrupted = summary.done_rows < summary.rows;
    summary.seconds = started.elapsed().as_secs_f64();
    summary.templates_per_second = summary.templates as f64 / summary.seconds.max(1e-9);
    if !summary.interrupted {
        state_file.remove()?;
    }
    Ok(summary)
}

/// How one pass over the rows ended.
enum Ended {
    /// At the last row, or because it was interrupted.
    Here,
    /// The rows before the start are not where the state file said they were.
    StateIsWrong,
}

/// A batch that has been read and is not done.
struct Pending {
    first_row: u64,
    end_row: u64,
    /// Whether it went to the sink; a batch of bad lines only does not.
    sent: bool,
    rejections: Vec<Rejection>,
    rejected: u64,
}

/// One pass over the rows: what is in flight and what has been counted.
struct Pass<'a> {
    start_row: u64,
    pending: VecDeque<Pending>,
    summary: Summary,
    rejections: Rejections,
    state: ImportState,
    state_file: &'a StateFile,
    saved: Option<Instant>,
    progress: &'a Progress,
}

impl<'a> Pass<'a> {
    fn start(
        args: &ImportArgs,
        rows: u64,
        state: ImportState,
        state_file: &'a StateFile,
        progress: &'a Progress,
    ) -> Result<Self, CliError> {
        let rejections = Rejections::open(args.errors.as_deref(), state.errors_bytes)?;
        if state.row > 0 {
            progress.note(format_args!("continuing at row {} of {rows}, where an earlier run stopped", state.row));
        }
        progress.set(state.row);
        Ok(Self {
            start_row: state.row,
            pending: VecDeque::new(),
            summary: Summary {
                rejected: state.rejected,
                skipped_rows: state.row,
                done_rows: state.row,
                rows,
                ..Summary::default()
            },
            rejections,
            state,
            state_file,
            saved: None,
            progress,
        })
    }

    async fn run<S: Sink>(
        &mut self,
        args: &ImportArgs,
        files: &Files,
        sink: &mut S,
        after_forget: Option<prost_types::Timestamp>,
        interrupted: &CancellationToken,
    ) -> Result<Ended, CliError> {
        let mut batches = read_ahead(files, self.state.row..self.state.end_row, usize::from(args.batch));
        let mut outcome = Ok(());
        // What cannot be read does not keep what was read from being finished.
        let mut unread = None;
        loop {
            let batch = tokio::select! {
                biased;
                () = interrupted.cancelled() => break,
                batch = batches.recv() => batch,
            };
            let mut batch = match batch {
                None => break,
                Some(Ok(batch)) => batch,
                Some(Err(error)) => {
                    unread = Some(error);
                    break;
                }
            };
            batch.message.after_forget = after_forget;
            let sent = !batch.message.items.is_empty();
            self.pending.push_back(Pending {
                first_row: batch.first_row,
                end_row: batch.end_row,
                sent,
                rejections: batch.rejections,
                rejected: batch.rejected,
            });
            let acknowledged = if sent { sink.submit(batch.message).await } else { Ok(Vec::new()) };
            let acknowledged = match acknowledged {
                Ok(acknowledged) => acknowledged,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            };
            if self.apply(acknowledged)? {
                sink.finish().await?;
                return Ok(Ended::StateIsWrong);
            }
        }
        if outcome.is_ok() {
            match sink.finish().await {
                Ok(acknowledged) => {
                    if self.apply(acknowledged)? {
                        return Ok(Ended::StateIsWrong);
                    }
                }
                Err(error) => outcome = Err(error),
            }
        }
        if let Some(error) = unread {
            outcome = outcome.and(Err(error));
        }
        if self.summary.done_rows < self.summary.rows || outcome.is_err() {
            self.save()?;
        }
        self.rejections.flush()?;
        if outcome.is_err() {
            self.progress.note(format_args!(
                "stopped at row {} of {}; what is acknowledged is kept, and the same command continues from there",
                self.summary.done_rows, self.summary.rows
            ));
        }
        outcome.map(|()| Ended::Here)
    }

    /// Counts acknowledgements; true if the first one shows that the state file was wrong.
    fn apply(&mut self, acknowledged: Vec<Acknowledgement>) -> Result<bool, CliError> {
        for acknowledgement in acknowledged {
            // The batch at the start was acknowledged by the run before: its subjects are known,
            // unless they went to another data folder than the one behind this address now.
            let first = self.pending.front().is_some_and(|batch| batch.first_row == self.start_row);
            if self.start_row > 0 && first && acknowledgement.enrolled > 0 {
                return Ok(true);
            }
            self.summary.enrolled += acknowledgement.enrolled;
            self.summary.unchanged += acknowledgement.unchanged;
            self.summary.templates += acknowledgement.templates;
            self.settle_unsent()?;
            if acknowledgement.messages > 0 {
                self.mark()?;
            }
            for _ in 0..acknowledgement.messages {
                self.settle_unsent()?;
                self.settle_front()?;
            }
            self.state.end_row = self.summary.done_rows;
            for error in acknowledgement.rejected {
                self.summary.rejected += 1;
                let reason = Failure::new(Code::from_i32(error.code), &error.message).to_string();
                let rejection = Rejection { line: error.sequence, subject_id: error.subject_id, reason };
                self.rejections.add(rejection, self.progress)?;
            }
        }
        self.settle_unsent()?;
        self.progress.set(self.summary.done_rows);
        if self.saved.is_none_or(|saved| saved.elapsed() >= STATE_INTERVAL) && self.state.row > 0 {
            self.save()?;
        }
        Ok(false)
    }

    /// Remembers the oldest batch in flight as the place to continue from: what has been told so far
    /// belongs to rows before it.
    fn mark(&mut self) -> Result<(), CliError> {
        let Some(batch) = self.pending.front() else { return Ok(()) };
        self.state.row = batch.first_row;
        self.state.rejected = self.summary.rejected;
        self.state.errors_bytes = self.rejections.flush()?;
        Ok(())
    }

    /// Ends the oldest batches in flight as long as nothing of them went to the sink.
    fn settle_unsent(&mut self) -> Result<(), CliError> {
        while self.pending.front().is_some_and(|batch| !batch.sent) {
            self.settle_front()?;
        }
        Ok(())
    }

    /// Ends the oldest batch in flight.
    fn settle_front(&mut self) -> Result<(), CliError> {
        let batch = self.pending.pop_front().ok_or_else(|| CliError::Protocol {
            call: "BulkEnroll",
            problem: "more batches are acknowledged than were sent".to_owned(),
        })?;
        self.summary.done_rows = batch.end_row;
        self.summary.rejected += batch.rejected;
        batch.rejections.into_iter().try_for_each(|rejection| self.rejections.add(rejection, self.progress))
    }

    fn save(&mut self) -> Result<(), CliError> {
        self.saved = Some(Instant::now());
        self.state_file.save(&self.state)
    }
}

/// Reads batches on a thread of its own, a few ahead.
fn read_ahead(files: &Files, resumed: Range<u64>, items_max: usize) -> mpsc::Receiver<Result<Batch, CliError>> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    let (embeddings, roster) = (files.embeddings.clone(), files.roster.clone());
    tokio::task::spawn_blocking(move || {
        let mut batches = match Batches::new(&embeddings, roster, resumed, items_max) {
            Ok(batches) => batches,
            Err(error) => {
                // Without a receiver nobody wants to know.
                let _ = sender.blocking_send(Err(error));
                return;
            }
        };
        while let Some(batch) = batches.read().transpose() {
            let ended = batch.is_err();
            if sender.blocking_send(batch).is_err() || ended {
                return;
            }
        }
    });
    receiver
}
