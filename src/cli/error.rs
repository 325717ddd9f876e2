//! Why a command could not run, in words for the person who typed it, and the exit code for it.
//!
//! Errors of single rows or subjects are not here: those are results, reported while the others are done.

use std::error::Error;
use std::path::{Path, PathBuf};

use super::embeddings::EmbeddingsError;
use super::lists::ListError;
use super::output::code_name;
use crate::model::Invalid;
use crate::registry::RegistryError;
use crate::server::ServerError;
use crate::server::config::ConfigError;
use crate::server::data_folder::FolderError;
use crate::vault::KeyError;

/// A command that could not run or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error("{address:?} is not a server address: write http://HOST:PORT or https://HOST:PORT")]
    BadAddress { address: String },
    /// TLS options and the address's scheme do not fit together.
    #[error("{address}: {problem}")]
    TlsUsage { address: String, problem: &'static str },
    #[error("forgetting cannot be undone and there is no terminal to ask on; add --yes to go ahead")]
    NeedsConsent,
    /// A value on the command line, or in a list of subjects, that the protocol does not take.
    #[error("{origin}: {invalid}")]
    Value { origin: String, invalid: Invalid },
    #[error("--rows asks for row {asked}, {path} has rows 0 to {last}", last = rows.saturating_sub(1), path = path.display())]
    NoSuchRow { path: PathBuf, asked: u64, rows: u64 },
    #[error("cannot reach the server at {address}: {source}")]
    Unreachable { address: String, source: Disconnected },
    /// The server answered a call with an error.
    #[error("{call} failed: {}: {}", code_name(status.code()), status.message())]
    Refused { call: &'static str, status: Box<tonic::Status> },
    #[error("{call}: the server's answer does not follow the protocol: {problem}")]
    Protocol { call: &'static str, problem: String },
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    /// Standard input or output failed.
    #[error("the terminal: {0}")]
    Terminal(#[from] std::io::Error),
    #[error(transparent)]
    Embeddings(#[from] EmbeddingsError),
    #[error(transparent)]
    List(#[from] ListError),
    /// The array and the list do not belong together.
    #[error(
        "{embeddings} has {rows} rows and {list} has {lines} lines after its header; each line names the row at the same place",
        embeddings = embeddings.display(), list = list.display()
    )]
    OutOfStep { embeddings: PathBuf, rows: u64, list: PathBuf, lines: u64 },
    #[error("{path} holds embeddings of {found} values, the gallery has {expected} dimensions", path = path.display())]
    OtherDimension { path: PathBuf, found: usize, expected: usize },
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data folder, its key or what is in it cannot be used, or the server over it failed.
    #[error(transparent)]
    Server(Box<ServerError>),
    #[error(
        "the data folder {} is in use by another Thenar process; stop that one, or enrol at it with --server",
        path.display()
    )]
    ImportFolderInUse { path: PathBuf },
    #[error("the registry in {} has no gallery yet", path.display())]
    NoGallery { path: PathBuf },
    #[cfg(feature = "faiss")]
    #[error(transparent)]
    Audit(#[from] crate::audit::AuditError),
    #[cfg(not(feature = "faiss"))]
    #[error(
        "this thenar was built without FAISS, which an audit compares answers with; build one with it: \
         cargo build --release --features faiss (needs cmake, a C++ compiler and OpenBLAS)"
    )]
    WithoutFaiss,
    #[error("{} is not empty; --keep takes a folder that is new or empty", path.display())]
    NotEmpty { path: PathBuf },
    #[error("the demo's server {problem}{}", log_tail(log))]
    OwnServer { problem: String, log: Vec<String> },
    #[error("interrupted; the demo's server is stopped and its folder {}", if *kept { "kept" } else { "removed" })]
    DemoInterrupted { kept: bool },
}

impl CliError {
    /// The shell's exit code for it: 2 if the command line was wrong, otherwise 1.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            #[cfg(not(feature = "faiss"))]
            Self::WithoutFaiss => 2,
            Self::BadAddress { .. }
            | Self::TlsUsage { .. }
            | Self::NeedsConsent
            | Self::Value { .. }
            | Self::NoSuchRow { .. }
            | Self::NotEmpty { .. } => 2,
            _ => 1,
        }
    }

    /// The server's refusal of `call`.
    pub(crate) fn refused(call: &'static str, status: tonic::Status) -> Self {
        Self::Refused { call, status: Box::new(status) }
    }

    /// What makes an error of the system's answer to an `action` on `path`.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { action, path: path.clone(), source }
    }

    /// What makes an error of an invalid value that comes from `origin`.
    pub(crate) fn value(origin: impl ToString) -> impl FnOnce(Invalid) -> Self {
        move |invalid| Self::Value { origin: origin.to_string(), invalid }
    }

    /// The whole message: the error, then its causes, unless it names the innermost one itself.
    pub(crate) fn message(&self) -> String {
        let mut message = self.to_string();
        let innermost = innermost(self);
        let mut cause = self.source();
        while let Some(error) = cause
            && !message.contains(innermost.trim_end())
        {
            let words = error.to_string();
            if !message.contains(words.trim_end()) {
                message = format!("{message}: {words}");
            }
            cause = error.source();
        }
        message
    }
}

macro_rules! from_what_a_folder_is_opened_with {
    ($($error:ty),*) => {$(
        impl From<$error> for CliError {
            fn from(error: $error) -> Self {
                Self::Server(Box::new(error.into()))
            }
        }
    )*};
}

from_what_a_folder_is_opened_with!(ServerError, FolderError, KeyError, RegistryError, crate::gallery::GalleryError);

/// Why there is no connection, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Disconnected {
    #[error("{}", innermost(.0))]
    Connect(#[source] tonic::transport::Error),
    #[error("the TLS files cannot be used: {}", innermost(.0))]
    Tls(#[source] tonic::transport::Error),
    /// A stream broke, and trying again can help.
    #[error("{}: {}", code_name(.0.code()), .0.message())]
    Broken(Box<tonic::Status>),
    #[error("the server ended the stream")]
    Ended,
}

/// The innermost cause of an error: the part that names what really happened.
fn innermost(mut error: &(dyn Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn log_tail(log: &[String]) -> String {
    if log.is_empty() { String::new() } else { format!("; its last lines:\n    {}", log.join("\n    ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_usage_is_told_apart_from_failure() {
        assert_eq!(CliError::NeedsConsent.exit_code(), 2);
        assert_eq!(CliError::refused("Forget", tonic::Status::not_found("x")).exit_code(), 1);
    }

    #[test]
    fn every_cause_is_told_once() {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let told = CliError::from(ConfigError::Unreadable { path: "a.toml".into(), source: missing() }).message();
        assert_eq!(told, format!("could not read the configuration a.toml: {}", missing()));
        let toml = toml::from_str::<toml::Table>("a = ").unwrap_err();
        let malformed = ConfigError::Malformed { path: "a.toml".into(), source: Box::new(toml) };
        let words = malformed.to_string();
        assert_eq!(CliError::from(malformed).message(), words);
        let index = thenar_index::Error::Io { action: "open", path: "seg".into(), source: missing() };
        let told = CliError::from(crate::gallery::GalleryError::from(index)).message();
        assert_eq!(told, format!("the index: could not open seg: {}", missing()));
    }
}
