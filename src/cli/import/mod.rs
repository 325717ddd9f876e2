//! `thenar import`: enrols a gallery from a NumPy array and a CSV file.
//!
//! Reading ([`batch`], on a thread of its own), handing over to a server ([`sink`]) or straight to
//! a data folder ([`local`]), and remembering where it stands ([`state`]) are separate; this module
//! joins them and counts. Handing over the same rows
//! again is harmless, because request ids follow from the content, so every interruption is
//! answered by the same command again.

pub mod batch;
pub mod local;
pub mod roster;
pub mod sink;
pub mod state;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::connect::{self, Server, ServerArgs};
use super::embeddings::EmbeddingsFile;
use super::error::{CliError, code_name};
use super::progress::Progress;
use super::{Outcome, interrupt, table};
use crate::api::proto::GetStatusRequest;
use batch::{Batch, Batches, ITEMS_MAX, Rejection};
use local::{Folder, FolderArgs, LocalSink};
use roster::Roster;
use sink::{Acknowledgement, GrpcSink, Sink};
use state::{ImportState, StateFile};

/// Rejected lines told on stderr; all of them go into `--errors`.
const REJECTIONS_TOLD: u64 = 20;
/// Batches read ahead of sending.
const READ_AHEAD: usize = 2;
/// Time between two writings of the state file.
const STATE_INTERVAL: Duration = Duration::from_secs(1);

/// Enrol many subjects from a NumPy array and a CSV file.
///
/// The CSV file names the subject of each row of the array: a header with the column subject_id
/// and, if wanted, hand (left, right or empty) and request_id; then one line a row. Consecutive
/// lines with the same subject_id are one subject with several templates, 16 at most. A bad line
/// is reported and its subject left out; everybody else goes in. Rejected too are the lines of
/// subjects that were forgotten: a list may be older than their wish.
///
/// Enrols at a running server or, with --data or --config, straight in a data folder that no
/// server is using. Running the same import again changes nothing for those who are in. An
/// interrupted import goes on where it stood when the same command is given again.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// Embeddings: a NumPy file with a float32 or float16 array of shape [N, D] in C order.
    #[arg(long, value_name = "FILE.npy")]
    pub embeddings: PathBuf,
    /// Subjects: a CSV file with N lines after its header, in step with the array.
    #[arg(long, value_name = "FILE.csv")]
    pub subjects: PathBuf,
    /// Subjects in a message (less where a message would pass 4 MiB).
    #[arg(long, value_name = "COUNT", default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..=ITEMS_MAX as i64))]
    pub batch: u16,
    /// Where to remember how far the import is; removed when it ends well.
    /// Without it, beside the array: FILE.npy.thenar-import.
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Write every rejected line here: a CSV file with line, subject_id and reason.
    #[arg(long, value_name = "FILE.csv")]
    pub errors: Option<PathBuf>,
    /// Enrol subjects too that were forgotten before now; without it, their lines are rejected.
    #[arg(long)]
    pub after_forget: bool,
    /// Seconds to go on trying when the connection is lost.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub retry_seconds: u64,
    /// Print the summary as one JSON object.
    #[arg(long)]
    pub json: bool,
    /// The server to enrol at.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The data folder to enrol in instead.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// What an import has done.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Subjects enrolled in this run.
    pub enrolled: u64,
    /// Subjects that were there already, the same in every respect.
    pub unchanged: u64,
    /// Subjects left out, in this run and in the interrupted ones that it goes on from.
    pub rejected: u64,
    /// Rows passed over because an interrupted run had them acknowledged.
    pub skipped_rows: u64,
    /// Rows done, of `rows`.
    pub done_rows: u64,
    /// Rows of the array.
    pub rows: u64,
    /// Templates made durable in this run.
    pub templates: u64,
    /// Time this run took, in seconds.
    pub seconds: f64,
    /// Templates a second in this run.
    pub templates_per_second: f64,
    /// Whether it was stopped before its end.
    pub interrupted: bool,
}

/// Runs `thenar import`.
///
/// # Errors
/// [`CliError`] where files do not do, or the server or the folder cannot be had or refuses.
pub async fn run(args: ImportArgs) -> Result<Outcome, CliError> {
    let summary = if args.folder.are_given() { into_folder(&args).await? } else { into_server(&args).await? };
    tell(&args, &summary)?;
    Ok(Outcome::done_if(!summary.interrupted && summary.rejected == 0))
}

async fn into_server(args: &ImportArgs) -> Result<Summary, CliError> {
    let server = args.server.resolve()?;
    let interrupted = interrupt::watch(interrupt::Again::Ends)?;
    let files = open(args).await?;
    let progress = progress(&files);
    check_dimension(&server, &files.embeddings).await?;
    let mut sink =
        GrpcSink::new(server.clone(), Duration::from_secs(args.retry_seconds), interrupted.clone(), progress.clone());
    let summary = drive(args, &files, &mut sink, server.address(), &interrupted, &progress).await;
    progress.finish();
    summary
}

async fn into_folder(args: &ImportArgs) -> Result<Summary, CliError> {
    let interrupted = interrupt::watch(interrupt::Again::Ends)?;
    let files = open(args).await?;
    let folder = Folder::open(&args.folder, &files.embeddings).await?;
    let target = format!("folder {}", folder.path().display());
    if folder.is_new() {
        eprintln!("a new gallery of {} dimensions in {}", files.embeddings.dim(), folder.path().display());
    }
    let progress = progress(&files);
    let mut sink = LocalSink::new(&folder);
    let summary = drive(args, &files, &mut sink, &target, &interrupted, &progress).await;
    progress.finish();
    sink.close().await;
    folder.close().await;
    summary
}

fn progress(files: &Files) -> Progress {
    Progress::new("enrolling", files.embeddings.rows(), "templates")
}

/// The two files of an import, opened, scanned and in step.
#[derive(Debug)]
pub struct Files {
    embeddings: Arc<EmbeddingsFile>,
    roster: Arc<Roster>,
}

/// Opens both files and holds them against each other.
///
/// # Errors
/// [`CliError`] where one does not do, or they differ in length.
pub async fn open(args: &ImportArgs) -> Result<Files, CliError> {
    let (embeddings, subjects) = (args.embeddings.clone(), args.subjects.clone());
    let files = blocking(move || {
        let embeddings = EmbeddingsFile::open(&embeddings)?;
        let roster = Roster::scan(&subjects)?;
        Ok::<_, CliError>(Files { embeddings: Arc::new(embeddings), roster: Arc::new(roster) })
    })
    .await?;
    let (rows, lines) = (files.embeddings.rows(), files.roster.rows());
    if rows != lines {
        return Err(CliError::OutOfStep {
            embeddings: args.embeddings.clone(),
            rows,
            subjects: args.subjects.clone(),
            lines,
        });
    }
    if !files.roster.ignored().is_empty() {
        eprintln!("note: columns that mean nothing here: {}", files.roster.ignored().join(", "));
    }
    Ok(files)
}

/// Enrols the rows of `files` through `sink`, from where an earlier run to `target` stopped.
/// Stops early, with what is under way finished, once `interrupted`.
///
/// # Errors
/// [`CliError`] where a file or the sink fails; the state file then says where to go on.
pub async fn drive<S: Sink>(
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
    // Of the start: who is forgotten while this goes on is not meant.
    let after_forget = args.after_forget.then(|| SystemTime::now().into());
    let summary = loop {
        let start = resumed.take().unwrap_or(ImportState {
            inputs: inputs.clone(),
            row: 0,
            end_row: 0,
            rejected: 0,
            errors_bytes: 0,
        });
        let mut run = Run::start(args, files.embeddings.rows(), start, &state_file, progress)?;
        match run.pass(args, files, sink, after_forget, interrupted).await? {
            Pass::Ended { interrupted } => break run.summary(started, interrupted),
            Pass::StateIsWrong => {
                progress.note("what an earlier run had enrolled is not there any more; starting from the first row");
            }
        }
    };
    if !summary.interrupted {
        state_file.remove()?;
    }
    Ok(summary)
}

/// How one pass over the rows ended.
enum Pass {
    /// At the last row, or because it was interrupted.
    Ended { interrupted: bool },
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

/// One pass over the rows: what is under way and what has been counted.
struct Run<'a> {
    start_row: u64,
    pending: VecDeque<Pending>,
    summary: Summary,
    /// The errors file.
    errors: Option<(PathBuf, csv::Writer<File>)>,
    told: u64,
    state: ImportState,
    state_file: &'a StateFile,
    saved: Option<Instant>,
    progress: &'a Progress,
}

impl<'a> Run<'a> {
    fn start(
        args: &ImportArgs,
        rows: u64,
        state: ImportState,
        state_file: &'a StateFile,
        progress: &'a Progress,
    ) -> Result<Self, CliError> {
        let errors = args.errors.as_deref().map(|path| open_errors(path, state.errors_bytes)).transpose()?;
        if state.row > 0 {
            progress.note(format_args!("going on at row {} of {rows}, where an earlier run stopped", state.row));
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
            errors,
            told: 0,
            state,
            state_file,
            saved: None,
            progress,
        })
    }

    async fn pass<S: Sink>(
        &mut self,
        args: &ImportArgs,
        files: &Files,
        sink: &mut S,
        after_forget: Option<prost_types::Timestamp>,
        interrupted: &CancellationToken,
    ) -> Result<Pass, CliError> {
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
            let acknowledged = if sent {
                match sink.submit(batch.message).await {
                    Ok(acknowledged) => acknowledged,
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
            } else {
                Vec::new()
            };
            if self.apply(acknowledged)? {
                sink.finish().await?;
                return Ok(Pass::StateIsWrong);
            }
        }
        if outcome.is_ok() {
            match sink.finish().await {
                Ok(acknowledged) => {
                    if self.apply(acknowledged)? {
                        return Ok(Pass::StateIsWrong);
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
        if let Some((path, writer)) = &mut self.errors {
            writer.flush().map_err(|source| CliError::File { action: "write", path: path.clone(), source })?;
        }
        if outcome.is_err() {
            self.progress.note(format_args!(
                "stopped at row {} of {}; what is acknowledged is kept, and the same command goes on from there",
                self.summary.done_rows, self.summary.rows
            ));
        }
        outcome.map(|()| Pass::Ended { interrupted: self.summary.done_rows < self.summary.rows })
    }

    /// Counts acknowledgements in; true where the first one shows that the state file was wrong.
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
            if acknowledgement.batches > 0 {
                self.mark()?;
            }
            for _ in 0..acknowledgement.batches {
                self.settle_unsent()?;
                self.settle_front()?;
            }
            self.state.end_row = self.summary.done_rows;
            for error in acknowledgement.rejected {
                self.summary.rejected += 1;
                let code = code_name(tonic::Code::from_i32(error.code));
                self.tell(Rejection {
                    line: error.sequence,
                    subject_id: error.subject_id,
                    reason: format!("{code}: {}", error.message),
                })?;
            }
        }
        self.settle_unsent()?;
        self.progress.set(self.summary.done_rows);
        if self.saved.is_none_or(|saved| saved.elapsed() >= STATE_INTERVAL) && self.state.row > 0 {
            self.save()?;
        }
        Ok(false)
    }

    /// Remembers the oldest batch under way as where to go on: what has been told so far belongs
    /// to rows before it.
    fn mark(&mut self) -> Result<(), CliError> {
        let Some(batch) = self.pending.front() else { return Ok(()) };
        self.state.row = batch.first_row;
        self.state.rejected = self.summary.rejected;
        if let Some((path, writer)) = &mut self.errors {
            let length = writer.flush().and_then(|()| Ok(writer.get_ref().metadata()?.len()));
            self.state.errors_bytes =
                length.map_err(|source| CliError::File { action: "write", path: path.clone(), source })?;
        }
        Ok(())
    }

    /// Ends the oldest batches under way as long as nothing of them went to the sink.
    fn settle_unsent(&mut self) -> Result<(), CliError> {
        while self.pending.front().is_some_and(|batch| !batch.sent) {
            self.settle_front()?;
        }
        Ok(())
    }

    /// Ends the oldest batch under way.
    fn settle_front(&mut self) -> Result<(), CliError> {
        let Some(batch) = self.pending.pop_front() else {
            return Err(CliError::Protocol {
                call: "BulkEnroll",
                problem: "more batches are acknowledged than were sent".to_owned(),
            });
        };
        self.summary.done_rows = batch.end_row;
        self.summary.rejected += batch.rejected;
        for rejection in batch.rejections {
            self.tell(rejection)?;
        }
        Ok(())
    }

    fn tell(&mut self, rejection: Rejection) -> Result<(), CliError> {
        self.told += 1;
        let Rejection { line, subject_id, reason } = rejection;
        if self.told <= REJECTIONS_TOLD {
            self.progress.note(format_args!("line {line}: {subject_id:?}: {reason}"));
        } else if self.told == REJECTIONS_TOLD + 1 {
            let rest =
                if self.errors.is_some() { "the rest is in the --errors file" } else { "--errors FILE takes them all" };
            self.progress.note(format_args!("more lines were rejected; {rest}"));
        }
        if let Some((path, writer)) = &mut self.errors {
            writer.write_record([line.to_string(), subject_id, reason]).map_err(|error| CliError::File {
                action: "write",
                path: path.clone(),
                source: error.into(),
            })?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<(), CliError> {
        self.saved = Some(Instant::now());
        self.state_file.save(&self.state)
    }

    fn summary(&self, started: Instant, interrupted: bool) -> Summary {
        let seconds = started.elapsed().as_secs_f64();
        Summary {
            seconds,
            templates_per_second: self.summary.templates as f64 / seconds.max(1e-9),
            interrupted,
            ..self.summary.clone()
        }
    }
}

/// Opens the errors file: anew, or cut back to what the rows before the start have told.
fn open_errors(path: &Path, kept_bytes: u64) -> Result<(PathBuf, csv::Writer<File>), CliError> {
    let failed = |source| CliError::File { action: "write", path: path.to_owned(), source };
    let file = OpenOptions::new().create(true).truncate(false).append(true).open(path).map_err(failed)?;
    let kept = kept_bytes.min(file.metadata().map_err(failed)?.len());
    file.set_len(kept).map_err(failed)?;
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(file);
    if kept == 0 {
        writer.write_record(["line", "subject_id", "reason"]).map_err(|error| failed(error.into()))?;
    }
    Ok((path.to_owned(), writer))
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

/// Compares the array's dimension with the gallery's before anything is sent. A server that does
/// not tell this client its status is asked by the first batch instead.
async fn check_dimension(server: &Server, embeddings: &EmbeddingsFile) -> Result<(), CliError> {
    let channel = server.connect().await?;
    match connect::administration(channel).get_status(GetStatusRequest {}).await {
        // The first enrolment decides.
        Ok(status) if status.get_ref().dim == 0 => Ok(()),
        Ok(status) if status.get_ref().dim as usize != embeddings.dim() => Err(CliError::OtherDimension {
            path: embeddings.path().to_owned(),
            found: embeddings.dim(),
            expected: status.get_ref().dim,
        }),
        Ok(_) => Ok(()),
        Err(status)
            if matches!(
                status.code(),
                tonic::Code::PermissionDenied | tonic::Code::Unimplemented | tonic::Code::Unavailable
            ) =>
        {
            Ok(())
        }
        Err(status) => Err(CliError::refused("GetStatus", status)),
    }
}

fn tell(args: &ImportArgs, summary: &Summary) -> Result<(), CliError> {
    if args.json {
        table::say_json(summary)?;
    } else {
        table::say(format_args!(
            "{} enrolled, {} unchanged, {} rejected; {} templates in {:.1} s, {:.0} a second",
            summary.enrolled,
            summary.unchanged,
            summary.rejected,
            summary.templates,
            summary.seconds,
            summary.templates_per_second
        ))?;
    }
    if summary.interrupted {
        eprintln!(
            "stopped at row {} of {}; give the same command again to go on from there",
            summary.done_rows, summary.rows
        );
    }
    Ok(())
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

#[cfg(test)]
mod tests;
