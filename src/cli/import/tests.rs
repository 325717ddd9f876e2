//! Imports into a mock server: bad rows, interruptions, broken connections.

use std::fs;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::*;
use crate::cli::embeddings::tests::npy_f32;
use crate::cli::mock_server::MockServer;

const DIM: usize = 32;

/// Distinct directions: the row's number in three of the coordinates.
fn vector(row: usize) -> Vec<f32> {
    let mut values = vec![0.01; DIM];
    values[row % DIM] = 1.0;
    values[row / DIM % DIM] += 0.5;
    values[row / (DIM * DIM) % DIM] -= 0.25;
    values
}

struct Import {
    folder: tempfile::TempDir,
    args: ImportArgs,
    interrupted: CancellationToken,
}

impl Import {
    fn new(mock: &MockServer, rows: &[Vec<f32>], list: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let args = ImportArgs {
            embeddings: folder.path().join("gallery.npy"),
            subjects: folder.path().join("subjects.csv"),
            batch: 10,
            state: None,
            errors: Some(folder.path().join("errors.csv")),
            after_forget: false,
            retry_seconds: 20,
            json: false,
            server: mock.args(),
            folder: FolderArgs::default(),
        };
        fs::write(&args.embeddings, npy_f32(rows, DIM)).unwrap();
        fs::write(&args.subjects, list).unwrap();
        Self { folder, args, interrupted: CancellationToken::new() }
    }

    /// A gallery of `subjects` with a template each.
    fn simple(mock: &MockServer, subjects: usize) -> Self {
        let rows: Vec<_> = (0..subjects).map(vector).collect();
        let list: String = (0..subjects).map(|i| format!("s{i}\n")).collect();
        Self::new(mock, &rows, &format!("subject_id\n{list}"))
    }

    async fn drive(&self) -> Result<Summary, CliError> {
        let server = Server::new(&self.args.server)?;
        let files = open(&self.args).await?;
        check_dimension(&server, &files.embeddings).await?;
        let progress = Progress::new("enrolling", files.embeddings.rows(), "templates");
        let retry = Duration::from_secs(self.args.retry_seconds);
        let mut sink = GrpcSink::new(server.clone(), retry, self.interrupted.clone(), progress.clone());
        run::run(&self.args, &files, &mut sink, server.address(), &self.interrupted, &progress).await
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.args.errors.as_ref().unwrap()).unwrap()
    }

    fn state_exists(&self) -> bool {
        self.folder.path().join("gallery.npy.thenar-import").exists()
    }
}

#[tokio::test]
async fn everything_goes_in_once_however_often_it_is_imported() {
    let mock = MockServer::start(DIM).await;
    let import = Import::simple(&mock, 95);
    let summary = import.drive().await.unwrap();
    assert_eq!((summary.enrolled, summary.unchanged, summary.rejected, summary.templates), (95, 0, 0, 95));
    assert_eq!(mock.state().subjects.len(), 95);
    assert_eq!(mock.state().messages, [10, 10, 10, 10, 10, 10, 10, 10, 10, 5]);
    assert_eq!(mock.state().subjects["s7"], [(vector(7), 0)]);
    assert!(!import.state_exists());
    let again = import.drive().await.unwrap();
    assert_eq!((again.enrolled, again.unchanged, again.rejected), (0, 95, 0));
    let longer = Import::simple(&mock, 100).drive().await.unwrap();
    assert_eq!((longer.enrolled, longer.unchanged), (5, 95));
}

#[tokio::test]
async fn bad_rows_are_reported_with_line_and_reason_and_the_rest_goes_in() {
    let mock = MockServer::start(DIM).await;
    Import::new(&mock, &[vector(900)], "subject_id\ntaken\n").drive().await.unwrap();
    let mut rows: Vec<_> = (0..30).map(vector).collect();
    rows[3][1] = f32::NAN;
    let list: String = (0..30)
        .map(|i| match i {
            12 => "taken,left\n".to_owned(),
            14 => "s14,upper\n".to_owned(),
            _ => format!("s{i},left\n"),
        })
        .collect();
    let import = Import::new(&mock, &rows, &format!("subject_id,hand\n{list}"));
    let summary = import.drive().await.unwrap();
    assert_eq!((summary.enrolled, summary.rejected, summary.done_rows), (27, 3, 30));
    let errors = import.errors();
    let lines: Vec<&str> = errors.lines().collect();
    assert_eq!(lines.len(), 4, "{errors}");
    assert_eq!(lines[0], "line,subject_id,reason");
    assert!(lines.iter().any(|line| line.starts_with("5,s3,") && line.contains("finite")), "{errors}");
    assert!(lines.iter().any(|line| line.starts_with("14,taken,") && line.contains("ALREADY_EXISTS")), "{errors}");
    assert!(lines.iter().any(|line| line.starts_with("16,s14,") && line.contains("hand")), "{errors}");
    assert_eq!(run(import.args.clone()).await.unwrap(), Outcome::Failed, "rejected rows are a failure");
}

#[tokio::test]
async fn a_list_of_bad_rows_only_sends_nothing_and_ends() {
    let mock = MockServer::start(DIM).await;
    let import = Import::new(&mock, &vec![vec![0.0; DIM]; 25], &format!("subject_id\n{}", "x y\n".repeat(25)));
    let summary = import.drive().await.unwrap();
    assert_eq!((summary.enrolled, summary.rejected, summary.done_rows), (0, 1, 25), "25 lines of one subject");
    assert_eq!(mock.state().streams, 0);
    let empty = Import::new(&mock, &[], "subject_id\n");
    assert_eq!(run(empty.args.clone()).await.unwrap(), Outcome::Done);
}

#[tokio::test]
async fn a_lost_connection_is_made_again_and_what_was_not_acknowledged_is_sent_again() {
    let mock = MockServer::start(DIM).await;
    {
        let mut state = mock.state();
        state.break_after = Some(3);
        state.breaks_left = 2;
    }
    let import = Import::simple(&mock, 200);
    let summary = import.drive().await.unwrap();
    assert_eq!(summary.enrolled + summary.unchanged, 200);
    assert!(summary.unchanged >= 10, "what the breaking stream took in comes back as unchanged: {summary:?}");
    assert_eq!(summary.rejected, 0);
    assert_eq!(mock.state().subjects.len(), 200);
    assert!(mock.state().streams >= 4);
}

#[tokio::test]
async fn a_server_that_restarts_is_waited_for() {
    let mock = MockServer::start(DIM).await;
    let (address, shared) = (mock.address, mock.shared.clone());
    shared.lock().break_after = Some(2);
    let import = Import::simple(&mock, 120);
    let restarted = async {
        // Stops once the stream broke, and is away for a while.
        while shared.lock().break_after.is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(mock);
        tokio::time::sleep(Duration::from_millis(400)).await;
        MockServer::start_with(shared.clone(), address).await
    };
    let (summary, restarted) = tokio::join!(import.drive(), restarted);
    let summary = summary.unwrap();
    assert_eq!(summary.enrolled + summary.unchanged, 120);
    assert_eq!(restarted.state().subjects.len(), 120);
}

#[tokio::test]
async fn an_interrupted_import_goes_on_where_it_stood() {
    let mock = MockServer::start(DIM).await;
    let mut rows: Vec<_> = (0..300).map(vector).collect();
    rows[4][0] = f32::INFINITY;
    let list: String = (0..300).map(|i| format!("s{i}\n")).collect();
    let mut import = Import::new(&mock, &rows, &format!("subject_id\n{list}"));
    mock.state().cancel_after = Some((5, import.interrupted.clone()));
    let first = import.drive().await.unwrap();
    assert!(first.interrupted, "{first:?}");
    assert!(first.done_rows >= 50 && first.done_rows < 300, "{first:?}");
    assert_eq!(first.done_rows, first.enrolled + 1, "everything under way was finished: {first:?}");
    assert!(import.state_exists());

    import.interrupted = CancellationToken::new();
    mock.state().cancel_after = None;
    mock.state().messages.clear();
    let second = import.drive().await.unwrap();
    assert!(!second.interrupted && !import.state_exists(), "{second:?}");
    assert!(second.skipped_rows >= 40, "{second:?}");
    assert_eq!(second.enrolled + first.enrolled, 299);
    assert_eq!(second.unchanged, 10, "the last acknowledged batch is sent again, nothing before it");
    assert_eq!(second.rejected, 1, "the row that the first run rejected still counts");
    assert_eq!(import.errors().lines().count(), 2, "and is told once: {}", import.errors());
    assert_eq!(mock.state().subjects.len(), 299);
}

#[tokio::test]
async fn a_connection_that_stays_away_ends_the_import_and_the_next_run_goes_on() {
    let mock = MockServer::start(DIM).await;
    let mut import = Import::simple(&mock, 200);
    import.args.retry_seconds = 0;
    mock.state().break_after = Some(12);
    let error = import.drive().await.unwrap_err();
    assert!(matches!(error, CliError::Unreachable { .. }), "{error}");
    assert_eq!(error.exit_code(), 1);
    assert!(import.state_exists());
    let summary = import.drive().await.unwrap();
    assert!(summary.skipped_rows > 0, "{summary:?}");
    assert_eq!(mock.state().subjects.len(), 200);
}

#[tokio::test]
async fn a_state_file_of_another_data_folder_is_found_out() {
    let mock = MockServer::start(DIM).await;
    let mut import = Import::simple(&mock, 200);
    import.args.retry_seconds = 0;
    mock.state().break_after = Some(12);
    import.drive().await.unwrap_err();
    assert!(import.state_exists());
    // The same address, a new and empty gallery behind it.
    {
        let mut state = mock.state();
        state.subjects.clear();
        state.requests.clear();
    }
    let summary = import.drive().await.unwrap();
    assert_eq!(mock.state().subjects.len(), 200);
    assert_eq!((summary.skipped_rows, summary.done_rows), (0, 200));
}

#[tokio::test]
async fn acknowledgements_for_several_messages_at_once_are_understood() {
    let mock = MockServer::start(DIM).await;
    mock.state().coalesce = true;
    let import = Import::simple(&mock, 205);
    let summary = import.drive().await.unwrap();
    assert_eq!((summary.enrolled, summary.done_rows), (205, 205));
}

#[tokio::test]
async fn a_refusal_for_good_is_not_tried_again() {
    let mock = MockServer::start(DIM).await;
    mock.state().refuse_bulk = Some(Code::PermissionDenied);
    let error = Import::simple(&mock, 20).drive().await.unwrap_err();
    assert!(error.to_string().contains("PERMISSION_DENIED"), "{error}");
    assert_eq!(mock.state().streams, 1);
}

#[tokio::test]
async fn files_out_of_step_and_other_dimensions_are_found_before_anything_is_sent() {
    let mock = MockServer::start(DIM).await;
    let error = Import::new(&mock, &[vector(1), vector(2)], "subject_id\nann\n").drive().await.unwrap_err();
    assert!(error.to_string().contains("2 rows") && error.to_string().contains("1 lines"), "{error}");
    let other = MockServer::start(64).await;
    let error = Import::simple(&other, 3).drive().await.unwrap_err();
    assert!(error.to_string().contains("32 values") && error.to_string().contains("64 dimensions"), "{error}");
    assert_eq!(mock.state().streams + other.state().streams, 0);
}
