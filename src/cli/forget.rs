//! `thenar forget`: deletes subjects and every byte of their templates.
//!
//! Asks first, then deletes one subject after another, and continues if one is unknown.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::args::ServerArgs;
use super::client::{self, Server, random_request_id};
use super::error::CliError;
use super::output::{Failure, print, print_json};
use super::{Outcome, lists};
use crate::api::proto::ForgetRequest;
use crate::model::{RequestId, SubjectId};

/// Subjects named in the question; more are counted.
const NAMED_MAX: usize = 10;

/// Delete subjects and every byte of their templates.
///
/// Cannot be undone. Asks first, unless --yes is given. A subject that is not there is reported,
/// the others are deleted, and the exit code is 1.
#[derive(Debug, Clone, Args)]
pub(crate) struct ForgetArgs {
    /// Subjects to forget.
    #[arg(value_name = "SUBJECT_ID", required_unless_present = "from_file")]
    subjects: Vec<String>,
    /// Also forget the subjects in this file, one per line.
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
    /// Name of the request, for scripts: the same deletion under the same name happens once.
    /// With several subjects, each gets NAME.SUBJECT_ID. Default: a random name.
    #[arg(long, value_name = "NAME")]
    request_id: Option<String>,
    /// Print one JSON object per line and subject: subject_id, request_id, forgotten, and
    /// templates_erased and lsn, or error (code, message).
    #[arg(long)]
    json: bool,
    /// The server to delete at.
    #[command(flatten)]
    server: ServerArgs,
}

/// What became of one subject.
#[derive(Debug, Serialize)]
struct Report {
    subject_id: String,
    request_id: String,
    forgotten: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    templates_erased: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lsn: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

/// Runs `thenar forget`.
///
/// # Errors
/// [`CliError`] if it was not confirmed, an id is invalid, or the server cannot be reached.
pub(crate) async fn run(args: ForgetArgs) -> Result<Outcome, CliError> {
    let confirm = || std::io::stdin().is_terminal().then(ask);
    forget(&args, confirm, |report| match (&report.error, report.templates_erased.unwrap_or(0)) {
        _ if args.json => print_json(report),
        (Some(error), _) => {
            eprintln!("{}: {error}", report.subject_id);
            Ok(())
        }
        (None, 1) => print(format_args!("{}: forgotten, 1 template erased", report.subject_id)),
        (None, erased) => print(format_args!("{}: forgotten, {erased} templates erased", report.subject_id)),
    })
    .await
}

/// Reads the answer to the question; anything but yes is no.
fn ask() -> bool {
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// Forgets them all. `confirm` returns none if there is nobody to ask.
async fn forget(
    args: &ForgetArgs,
    confirm: impl FnOnce() -> Option<bool>,
    mut emit: impl FnMut(&Report) -> std::io::Result<()>,
) -> Result<Outcome, CliError> {
    let server = Server::new(&args.server)?;
    let requests = requests(args)?;
    if !args.yes {
        let named: Vec<&str> = requests.iter().take(NAMED_MAX).map(|request| request.subject_id.as_str()).collect();
        let more = if requests.len() > NAMED_MAX { ", ..." } else { "" };
        eprint!("Forget {} for good ({}{more}) at {}? [y/N] ", requests.len(), named.join(", "), server.address());
        std::io::stderr().flush()?;
        match confirm() {
            Some(true) => {}
            Some(false) => {
                eprintln!("nothing was forgotten");
                return Ok(Outcome::Failed);
            }
            None => {
                eprintln!();
                return Err(CliError::NeedsConsent);
            }
        }
    }
    let mut client = client::enrollment(server.connect().await?);
    let mut done = true;
    for request in requests {
        let ForgetRequest { request_id, subject_id } = request.clone();
        let mut report =
            Report { subject_id, request_id, forgotten: false, templates_erased: None, lsn: None, error: None };
        match client.forget(request).await {
            Ok(response) => {
                report.forgotten = true;
                report.templates_erased = Some(response.get_ref().templates_erased);
                report.lsn = Some(response.get_ref().lsn);
            }
            Err(status) => {
                report.error = Some(Failure::new(status.code(), status.message()));
            }
        }
        done &= report.forgotten;
        emit(&report)?;
    }
    Ok(Outcome::done_if(done))
}

/// The requests in order, every name checked before the first is sent.
fn requests(args: &ForgetArgs) -> Result<Vec<ForgetRequest>, CliError> {
    let mut subjects: Vec<(String, String)> =
        args.subjects.iter().map(|subject| ("SUBJECT_ID".to_owned(), subject.clone())).collect();
    if let Some(path) = &args.from_file {
        subjects.extend(lists::subject_ids(path)?);
    }
    let several = subjects.len() > 1;
    subjects
        .into_iter()
        .map(|(origin, subject)| {
            let subject_id = SubjectId::new(&subject).map_err(CliError::value(origin))?;
            let request_id = match &args.request_id {
                Some(name) if several => format!("{name}.{subject_id}"),
                Some(name) => name.clone(),
                None => random_request_id("forget"),
            };
            RequestId::new(&request_id).map_err(CliError::value("--request-id"))?;
            Ok(ForgetRequest { request_id, subject_id: subject })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::mock_server::MockServer;

    fn args(mock: &MockServer, subjects: &[&str]) -> ForgetArgs {
        ForgetArgs {
            subjects: subjects.iter().map(|&subject| subject.to_owned()).collect(),
            from_file: None,
            yes: true,
            request_id: None,
            json: true,
            server: mock.args(),
        }
    }

    async fn gallery() -> MockServer {
        let mock = MockServer::start(32).await;
        for (subject, templates) in [("ann", 1), ("bob", 2), ("cid", 1)] {
            mock.state().subjects.insert(subject.to_owned(), vec![(vec![1.0; 32], 0); templates]);
        }
        mock
    }

    async fn reports(args: &ForgetArgs) -> (Outcome, Vec<serde_json::Value>) {
        let mut reports = Vec::new();
        let outcome = forget(
            args,
            || None,
            |report| {
                reports.push(serde_json::from_str(&serde_json::to_string(report)?)?);
                Ok(())
            },
        )
        .await
        .unwrap();
        (outcome, reports)
    }

    #[tokio::test]
    async fn what_is_erased_is_reported_and_an_unknown_subject_does_not_stop_the_others() {
        let mock = gallery().await;
        let (outcome, reports) = reports(&args(&mock, &["bob", "nobody", "cid"])).await;
        assert_eq!(outcome, Outcome::Failed);
        assert_eq!(reports[0]["forgotten"], true);
        assert_eq!(reports[0]["templates_erased"], 2);
        assert_eq!(reports[1]["forgotten"], false);
        assert_eq!(reports[1]["error"]["code"], "NOT_FOUND");
        assert_eq!(reports[2]["subject_id"], "cid");
        assert_ne!(reports[0]["request_id"], reports[2]["request_id"]);
        assert_eq!(mock.state().subjects.keys().collect::<Vec<_>>(), ["ann"]);
    }

    #[tokio::test]
    async fn without_yes_and_without_a_terminal_nothing_is_forgotten() {
        let mock = gallery().await;
        let unconfirmed = ForgetArgs { yes: false, ..args(&mock, &["ann"]) };
        let error = forget(&unconfirmed, || None, |_| Ok(())).await.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(forget(&unconfirmed, || Some(false), |_| Ok(())).await.unwrap(), Outcome::Failed);
        assert_eq!(mock.state().subjects.len(), 3);
        assert_eq!(forget(&unconfirmed, || Some(true), |_| Ok(())).await.unwrap(), Outcome::Done);
        assert_eq!(mock.state().subjects.len(), 2);
    }

    #[tokio::test]
    async fn subjects_come_from_a_file_too_and_requests_can_be_named() {
        let mock = gallery().await;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "bob\n\n  cid \n").unwrap();
        let named = ForgetArgs {
            from_file: Some(file.path().to_owned()),
            request_id: Some("case-7".to_owned()),
            ..args(&mock, &["ann"])
        };
        let (outcome, reports) = reports(&named).await;
        assert_eq!(outcome, Outcome::Done);
        let ids: Vec<_> = reports.iter().map(|report| report["request_id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["case-7.ann", "case-7.bob", "case-7.cid"]);
        let alone = ForgetArgs { request_id: Some("case-8".to_owned()), ..args(&mock, &["ann"]) };
        assert_eq!(requests(&alone).unwrap()[0].request_id, "case-8");
    }

    #[tokio::test]
    async fn a_bad_id_is_found_before_anybody_is_forgotten() {
        let mock = gallery().await;
        let error = forget(&args(&mock, &["ann", "two words"]), || None, |_| Ok(())).await.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(mock.state().subjects.len(), 3);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "ann\nb b\n").unwrap();
        let from_file = ForgetArgs { from_file: Some(file.path().to_owned()), ..args(&mock, &[]) };
        let error = forget(&from_file, || None, |_| Ok(())).await.unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
