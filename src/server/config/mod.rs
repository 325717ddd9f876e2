//! The configuration: from a TOML file and flags to a tree of the subsystems' own configurations.
//!
//! Text becomes a [`Raw`], flags are laid over it, and [`Raw::validated`] gives a [`Config`] that every
//! part can use without checking again, or else every problem, not only the first. Unknown keys
//! are refused. Does no I/O except for reading the file.

mod raw;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

pub use self::raw::Raw;
use tracing_subscriber::filter::Targets;

use crate::api::CallLimits;
use crate::engine::certificate::Certificate;
use crate::model::VenueId;
use crate::net::{self, TlsConfig};
use crate::policy::Policies;
use crate::search::batch::BatchConfig;
pub use crate::server::engines::{EngineConfig, EngineKind};

/// A valid configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The data folder.
    pub data: PathBuf,
    /// The master key's file; `None`: a systemd credential or the environment.
    pub key_file: Option<PathBuf>,
    /// Components of an embedding; `None`: those of the gallery, or of the first enrolment.
    pub dim: Option<usize>,
    /// Venues that may search; empty means any.
    pub venues: BTreeSet<VenueId>,
    /// How gRPC is served.
    pub server: ServerConfig,
    /// Where metrics are served; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// What searches.
    pub engine: EngineConfig,
    /// Limits of admission.
    pub batch: BatchConfig,
    /// The certificate of searches that do not ask for one.
    pub certificate: Certificate,
    /// Room on the disk that enrolments leave free for deletions.
    pub reserve_bytes: u64,
    /// A policy for each purpose.
    pub policies: Policies,
    /// How to log.
    pub log: LogConfig,
}

/// Where and how gRPC is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Address and port; port 0 picks a free one.
    pub listen: SocketAddr,
    /// How long in-flight requests may take once the server stops.
    pub drain_seconds: u64,
    /// Limits of connections.
    pub connections: net::Limits,
    /// Limits of calls.
    pub calls: CallLimits,
    /// Mutual TLS. Never `None` beyond loopback.
    pub tls: Option<TlsConfig>,
}

/// How to log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// One JSON object per line, for programs.
    pub json: bool,
    /// Which lines, by module and level: `info`, `thenar=debug`, `warn,thenar::gallery=trace`.
    pub level: Targets,
}

/// Why the configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("could not read the configuration {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key.
    #[error("{}: {}", path.display(), source.to_string().trim_end())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// Values are missing or invalid.
    #[error("the configuration has {} {}:\n  {}", problems.len(), if problems.len() == 1 { "problem" } else { "problems" }, problems.join("\n  "))]
    Invalid {
        /// Each, by key.
        problems: Vec<String>,
    },
}
