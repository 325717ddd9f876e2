//! The command line: what each subcommand takes, and what it returns to the shell.
//!
//! Every subcommand is one module with an `Args` struct and a `run`; none imports another. What several
//! share is beside them: arguments (`args`), what is printed (`output`), errors (`error`), the
//! connection (`client`), arrays (`embeddings`) and lists (`lists`) on disk, and, for the demo
//! and for the load harness of the benchmarks alike, synthetic people (`population`), their enrolment
//! (`bulk`), a server process (`own_server`) and `latencies`.
//!
//! Most commands are clients: they speak gRPC to a server and know nothing of galleries, engines or the
//! registry. `serve`, `keys`, `verify`, `audit` and `import --data` (`import/local.rs`) work on this
//! machine's own files; that import submits the very messages to `api` that it would send to a server.
//! Results go to stdout, for people or (`--json`) for programs; progress and diagnostics go to stderr.
//!
//! Invariant: the exit code is 0 if everything asked for was done, 1 if something was not, and 2 if the
//! command line itself was wrong and nothing was tried.

mod args;
mod audit;
pub mod bulk;
pub mod client;
mod demo;
mod embeddings;
mod error;
mod forget;
mod identify;
mod import;
mod interrupt;
mod keys;
pub mod latencies;
mod lists;
#[cfg(test)]
mod mock_server;
pub mod output;
pub mod own_server;
pub mod population;
mod serve;
mod status;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Identifies people by the palm of their hand, exactly, out of millions, in milliseconds.
#[derive(Debug, Parser)]
#[command(name = "thenar", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
enum Command {
    /// Enrol many subjects from a NumPy array and a CSV file.
    Import(import::ImportArgs),
    /// Search for the palms in a NumPy array, one search per row.
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
    /// Prove that answers are those of an exhaustive search: compare them with FAISS's.
    Audit(audit::AuditArgs),
}

/// Runs a command to its end and reports it on stderr if it fails.
pub async fn run(cli: Cli) -> ExitCode {
    let outcome = match cli.command {
        Command::Import(args) => import::run(args).await,
        Command::Identify(args) => identify::run(args).await,
        Command::Forget(args) => forget::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Serve(args) => serve::run(args).await,
        Command::Keys(args) => keys::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Audit(args) => audit::run(args).await,
    };
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("thenar: {}", error.message());
            ExitCode::from(error.exit_code())
        }
    }
}

/// How a command that ran to its end went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Everything asked for was done.
    Done,
    /// Something was not; it has been reported already.
    Failed,
}

impl Outcome {
    /// [`Outcome::Done`] if `done`.
    fn done_if(done: bool) -> Self {
        if done { Self::Done } else { Self::Failed }
    }
}

/// What `work` returns, done on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
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
    fn a_bad_row_set_is_bad_usage() {
        let parsed = Cli::try_parse_from(["thenar", "identify", "--embeddings", "a.npy", "--rows", "5..3"]);
        assert_eq!(parsed.unwrap_err().exit_code(), 2);
    }
}
