//! Why a client command could not run, in words for the person who typed it.
//!
//! One enum for the client commands, and for `import` and `audit` of a folder. Errors of single rows or subjects are not here: those are
//! results, reported while the rest goes on.

use std::path::PathBuf;

use super::embeddings::EmbeddingsError;
use super::import::roster::RosterError;
use crate::model::Invalid;
use crate::server::ServerError;
use crate::server::config::ConfigError;

/// A command that could not run or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// `--server` is not an address.
    #[error("{address:?} is not a server address: write http://HOST:PORT or https://HOST:PORT")]
    BadAddress {
        /// As given.
        address: String,
    },
    /// TLS options and the address's scheme do not fit together.
    #[error("{address}: {problem}")]
    TlsUsage {
        /// The server's address.
        address: String,
        /// What is missing or too much.
        problem: &'static str,
    },
    /// A deletion was not confirmed and nobody is there to ask.
    #[error("forgetting cannot be undone and there is no terminal to ask on; add --yes to go ahead")]
    NeedsConsent,
    /// A value on the command line or in a list of subjects that the protocol does not take.
    #[error("{origin}: {invalid}")]
    Value {
        /// The argument, or the file and line.
        origin: String,
        /// What is wrong with it.
        invalid: Invalid,
    },
    /// `--rows` names rows that the array does not have.
    #[error("--rows asks for row {asked}, {path} has rows 0 to {last}", last = rows.saturating_sub(1), path = path.display())]
    NoSuchRow {
        /// The array.
        path: PathBuf,
        /// The first row asked for that is not there.
        asked: u64,
        /// Rows in the array.
        rows: u64,
    },
    /// The server cannot be reached.
    #[error("cannot reach the server at {address}: {reason}")]
    Unreachable {
        /// The server's address.
        address: String,
        /// The innermost cause.
        reason: String,
    },
    /// The server answered a call with an error.
    #[error("{call} failed: {}: {}", code_name(status.code()), status.message())]
    Refused {
        /// The call's name in the protocol.
        call: &'static str,
        /// The server's answer.
        status: Box<tonic::Status>,
    },
    /// The server answered something the protocol does not allow.
    #[error("{call}: the server's answer does not follow the protocol: {problem}")]
    Protocol {
        /// The call's name in the protocol.
        call: &'static str,
        /// What was wrong.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Standard input or output failed.
    #[error("the terminal: {0}")]
    Terminal(#[from] std::io::Error),
    /// The embeddings cannot be used.
    #[error(transparent)]
    Embeddings(#[from] EmbeddingsError),
    /// The list of subjects cannot be used.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// The array and the list do not belong together.
    #[error(
        "{embeddings} has {rows} rows and {subjects} has {lines} lines after its header; each line names the row at the same place",
        embeddings = embeddings.display(), subjects = subjects.display()
    )]
    OutOfStep {
        /// The array.
        embeddings: PathBuf,
        /// Its rows.
        rows: u64,
        /// The list.
        subjects: PathBuf,
        /// Its lines, without the header.
        lines: u64,
    },
    /// The array's dimension is not the gallery's.
    #[error("{path} holds embeddings of {found} values, the gallery has {expected} dimensions", path = path.display())]
    OtherDimension {
        /// The array.
        path: PathBuf,
        /// Its dimension.
        found: usize,
        /// The gallery's.
        expected: u32,
    },
    /// The configuration of a data folder is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A server, or another import, has the data folder.
    #[error(
        "the data folder {} is in use by another Thenar process; stop that one, or enrol at it with --server",
        path.display()
    )]
    FolderInUse {
        /// The folder.
        path: PathBuf,
    },
    /// The data folder cannot be opened.
    #[error(transparent)]
    Folder(Box<ServerError>),
    /// The audit did not get to its end.
    #[cfg(feature = "faiss")]
    #[error(transparent)]
    Audit(#[from] crate::audit::AuditError),
    /// There is no FAISS in this program.
    #[error(
        "this thenar was built without FAISS, which an audit holds answers against; build one with it: \
         cargo build --release --features faiss (needs cmake, a C++ compiler and OpenBLAS)"
    )]
    WithoutFaiss,
    /// `thenar demo --keep` on a folder with something in it.
    #[error("{} is not empty; --keep takes a folder that is new or empty", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// The demo's server could not be started or ended badly.
    #[error("the demo's server {problem}{}", log_tail(log))]
    DemoServer {
        /// What it did.
        problem: String,
        /// Its last lines.
        log: Vec<String>,
    },
    /// The demo was interrupted.
    #[error("interrupted; the demo's server is stopped and its folder {}", if *kept { "kept" } else { "removed" })]
    DemoInterrupted {
        /// Whether the folder was to be kept.
        kept: bool,
    },
}

impl CliError {
    /// The shell's exit code for it: 2 where the command line was wrong, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::BadAddress { .. }
            | Self::TlsUsage { .. }
            | Self::NeedsConsent
            | Self::Value { .. }
            | Self::NoSuchRow { .. }
            | Self::WithoutFaiss
            | Self::NotEmpty { .. } => 2,
            Self::Unreachable { .. }
            | Self::Refused { .. }
            | Self::Protocol { .. }
            | Self::File { .. }
            | Self::Terminal(_)
            | Self::Embeddings(_)
            | Self::Roster(_)
            | Self::OutOfStep { .. }
            | Self::OtherDimension { .. }
            | Self::Config(_)
            | Self::FolderInUse { .. }
            | Self::Folder(_)
            | Self::DemoServer { .. }
            | Self::DemoInterrupted { .. } => 1,
            #[cfg(feature = "faiss")]
            Self::Audit(_) => 1,
        }
    }

    /// The server's refusal of `call`.
    #[must_use]
    pub fn refused(call: &'static str, status: tonic::Status) -> Self {
        Self::Refused { call, status: Box::new(status) }
    }
}

/// The protocol's name of a status code, such as `NOT_FOUND`.
#[must_use]
pub fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The innermost cause of an error: the part that names what really happened.
#[must_use]
pub fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn log_tail(log: &[String]) -> String {
    if log.is_empty() {
        return String::new();
    }
    let mut text = String::from("; its last lines:");
    for line in log {
        text.push_str("\n    ");
        text.push_str(line);
    }
    text
}
