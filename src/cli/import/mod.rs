//! `thenar import`: enrols a gallery from a NumPy array and a CSV file.
//!
//! Reading (`batch`, on a thread of its own), submitting to a server ([`super::bulk`]) or straight
//! to a data folder (`local`), counting (`run`) and remembering how far it is (`state`) are
//! separate; this module joins them. Submitting the same rows again is harmless, because request ids
//! follow from the content, so every interruption is answered by the same command again.

mod batch;
mod local;
mod rejections;
mod roster;
mod run;
mod state;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tonic::Code;

use super::args::ServerArgs;
use super::bulk::GrpcSink;
use super::client::Server;
use super::embeddings::EmbeddingsFile;
use super::error::CliError;
use super::output::{Progress, print, print_json};
use super::{Outcome, blocking, interrupt};
use batch::ITEMS_MAX;
use local::{Folder, FolderArgs, FolderSink};
use roster::Roster;

/// Enrol many subjects from a NumPy array and a CSV file.
///
/// The CSV file names the subject of each row of the array: a header with the column subject_id
/// and, if wanted, hand (left, right or empty) and request_id; then one line per row. Consecutive
/// lines with the same subject_id are one subject with several templates, 16 at most. A bad line
/// is reported and its subject left out; everybody else is enrolled. Lines of subjects that were
/// forgotten are rejected too: a list may be older than their wish.
///
/// Enrols at a running server or, with --data or --config, straight into a data folder that no
/// server is using. Running the same import again changes nothing for those who are enrolled. An
/// interrupted import continues where it stopped when the same command is given again.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImportArgs {
    /// Embeddings: a NumPy file with a float32 or float16 array of shape [N, D] in C order.
    #[arg(long, value_name = "FILE.npy")]
    embeddings: PathBuf,
    /// Subjects: a CSV file with N lines after its header, in step with the array.
    #[arg(long, value_name = "FILE.csv")]
    subjects: PathBuf,
    /// Subjects in a message (fewer if a message would exceed 4 MiB).
    #[arg(long, value_name = "COUNT", default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..=ITEMS_MAX as i64))]
    batch: u16,
    /// Where to remember how far the import is; removed when it ends well.
    /// Default: beside the array, FILE.npy.thenar-import.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Write every rejected line here: a CSV file with line, subject_id and reason.
    #[arg(long, value_name = "FILE.csv")]
    errors: Option<PathBuf>,
    /// Also enrol subjects that were forgotten before now; otherwise their lines are rejected.
    #[arg(long)]
    after_forget: bool,
    /// Seconds to keep trying when the connection is lost.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    retry_seconds: u64,
    /// Print the summary as one JSON object.
    #[arg(long)]
    json: bool,
    /// The server to enrol at.
    #[command(flatten)]
    server: ServerArgs,
    /// The data folder to enrol in instead.
    #[command(flatten)]
    folder: FolderArgs,
}

/// What an import has done.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
struct Summary {
    /// Subjects enrolled in this run.
    enrolled: u64,
    /// Subjects that were there already, the same in every respect.
    unchanged: u64,
    /// Subjects left out, in this run and in the interrupted ones that it continues.
    rejected: u64,
    /// Rows passed over because an interrupted run had them acknowledged.
    skipped_rows: u64,
    /// Rows done, of `rows`.
    done_rows: u64,
    /// Rows of the array.
    rows: u64,
    /// Templates made durable in this run.
    templates: u64,
    /// Time this run took.
    seconds: f64,
    /// Of this run.
    templates_per_second: f64,
    /// Whether it was stopped before its end.
    interrupted: bool,
}

/// Runs `thenar import`.
///
/// # Errors
/// [`CliError`] if a file is not usable, or the server or the folder is unavailable or refuses.
pub(crate) async fn run(args: ImportArgs) -> Result<Outcome, CliError> {
    let summary = if args.folder.are_given() { into_folder(&args).await? } else { into_server(&args).await? };
    report(&args, &summary)?;
    Ok(Outcome::done_if(!summary.interrupted && summary.rejected == 0))
}

async fn into_server(args: &ImportArgs) -> Result<Summary, CliError> {
    let server = Server::new(&args.server)?;
    let interrupted = interrupt::watch(interrupt::Again::Ends)?;
    let files = open(args).await?;
    let progress = progress(&files);
    check_dimension(&server, &files.embeddings).await?;
    let retry = Duration::from_secs(args.retry_seconds);
    let mut sink = GrpcSink::new(server.clone(), retry, interrupted.clone(), progress.clone());
    let summary = run::run(args, &files, &mut sink, server.address(), &interrupted, &progress).await;
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
    let mut sink = FolderSink::new(&folder);
    let summary = run::run(args, &files, &mut sink, &target, &interrupted, &progress).await;
    progress.finish();
    sink.close().await;
    folder.close().await;
    summary
}

fn progress(files: &Files) -> Progress {
    Progress::new("enrolling", files.embeddings.rows(), "templates")
}

/// The two files of an import, opened, scanned and of equal length.
#[derive(Debug)]
struct Files {
    embeddings: Arc<EmbeddingsFile>,
    roster: Arc<Roster>,
}

/// Opens both files and compares them.
///
/// # Errors
/// [`CliError`] if one is not usable, or they differ in length.
async fn open(args: &ImportArgs) -> Result<Files, CliError> {
    let (embeddings, subjects) = (args.embeddings.clone(), args.subjects.clone());
    let files = blocking(move || {
        let embeddings = EmbeddingsFile::open(&embeddings)?;
        let roster = Roster::scan(&subjects)?;
        Ok::<_, CliError>(Files { embeddings: Arc::new(embeddings), roster: Arc::new(roster) })
    })
    .await?;
    let (rows, lines) = (files.embeddings.rows(), files.roster.rows());
    if rows != lines {
        let (embeddings, list) = (args.embeddings.clone(), args.subjects.clone());
        return Err(CliError::OutOfStep { embeddings, rows, list, lines });
    }
    if !files.roster.ignored().is_empty() {
        eprintln!("note: these columns are ignored: {}", files.roster.ignored().join(", "));
    }
    Ok(files)
}

/// Compares the array's dimension with the gallery's before anything is sent. If a server does not
/// tell this client its status, the first batch will show it.
async fn check_dimension(server: &Server, embeddings: &EmbeddingsFile) -> Result<(), CliError> {
    match server.status().await {
        // With an empty gallery the first enrolment decides.
        Ok(status) if status.dim != 0 && status.dim as usize != embeddings.dim() => Err(CliError::OtherDimension {
            path: embeddings.path().to_owned(),
            found: embeddings.dim(),
            expected: status.dim as usize,
        }),
        Err(CliError::Refused { status, .. })
            if matches!(status.code(), Code::PermissionDenied | Code::Unimplemented | Code::Unavailable) =>
        {
            Ok(())
        }
        answer => answer.map(drop),
    }
}

fn report(args: &ImportArgs, summary: &Summary) -> std::io::Result<()> {
    if args.json {
        print_json(summary)?;
    } else {
        print(format_args!(
            "{} enrolled, {} unchanged, {} rejected; {} templates in {:.1} s, {:.0} per second",
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
            "stopped at row {} of {}; give the same command again to continue from there",
            summary.done_rows, summary.rows
        );
    }
    Ok(())
}
