//! The command line: what each subcommand takes, and what it gives back to the shell.
//!
//! Every subcommand is one module with an `Args` struct and a `run`. Most are clients: they
//! speak gRPC to a server and know nothing of galleries, engines or the registry. `serve`, `keys`,
//! `verify`, `audit` and `import --data` (`import/local.rs`) work on this machine's own files; that
//! import gives `api` the very messages it would send to a server. Results go to stdout, for people
//! or (`--json`) for programs; progress and diagnostics go to stderr.
//!
//! Invariant: the exit code is 0 where everything asked for was done, 1 where something was not,
//! and 2 where the command line itself was wrong and nothing was tried.

pub mod audit;
pub mod connect;
pub mod demo;
pub mod embeddings;
pub mod error;
pub mod forget;
pub mod identify;
pub mod import;
pub mod interrupt;
pub mod keys;
#[cfg(test)]
pub(crate) mod mock_server;
pub mod progress;
pub mod sample;
pub mod serve;
pub mod status;
pub mod table;
pub mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use error::CliError;

/// Identifies people by the palm of their hand, exactly, out of millions, in milliseconds.
#[derive(Debug, Parser)]
#[command(name = "thenar", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Enrol many subjects from a NumPy array and a CSV file.
    Import(import::ImportArgs),
    /// Search for the palms in a NumPy array, one search a row.
    Identify(identify::IdentifyArgs),
    /// Delete subjects and every byte of their templates.
    Forget(forget::ForgetArgs),
    /// Show what a running server is and holds.
    Status(status::StatusArgs),
    /// Start a server on generated palms, put it under load and check every answer.
    Demo(demo::DemoArgs),
    /// Run a server.
    Serve(serve::ServeArgs),
    /// Make the master key, or show its fingerprint.
    Keys(keys::KeysArgs),
    /// Check every byte of a data folder that matters.
    Verify(verify::VerifyArgs),
    /// Prove that answers are those of an exhaustive search: hold them against FAISS.
    Audit(audit::AuditArgs),
}

/// How a command that ran to its end went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything asked for was done.
    Done,
    /// Something was not; it has been reported already.
    Failed,
}

impl Outcome {
    /// [`Outcome::Done`] where `done`.
    #[must_use]
    pub fn done_if(done: bool) -> Self {
        if done { Self::Done } else { Self::Failed }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::Failed => Self::from(1),
        }
    }
}

/// Reports a command's end on stderr, if it has not reported it itself, and says how it ended.
pub fn conclude(result: Result<Outcome, CliError>) -> ExitCode {
    match result {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            eprintln!("thenar: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// As [`conclude`], for the commands that work on this machine's own files.
pub fn conclude_local(result: anyhow::Result<Outcome>) -> ExitCode {
    match result {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            eprintln!("thenar: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_every_argument_has_help() {
        let command = Cli::command();
        command.clone().debug_assert();
        for subcommand in command.get_subcommands() {
            for argument in subcommand.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {} has no help", subcommand.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn bad_usage_is_told_apart_from_failure() {
        let parsed = Cli::try_parse_from(["thenar", "identify", "--embeddings", "a.npy", "--rows", "5..3"]);
        assert_eq!(parsed.unwrap_err().exit_code(), 2);
        assert_eq!(CliError::NeedsConsent.exit_code(), 2);
        assert_eq!(
            CliError::Refused { call: "Forget", status: Box::new(tonic::Status::not_found("x")) }.exit_code(),
            1
        );
    }
}
